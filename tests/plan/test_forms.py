"""Every form of the large products gives the same numbers: the rules, exact integers, layouts, and what is saved."""

import contextlib
import math

import numpy as np
import pytest
import torch
from layout_samples import LAYOUTS
from oracles import exact, philox

from lora_kernels import dropout, lora_linear, plan
from lora_kernels.kernels import hybrid, matmul_expand
from lora_kernels.kernels._configs import matmul_configs
from lora_kernels.verify import numerics
from lora_kernels.verify.problems import make_problem, run_problem, with_mask

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HYBRIDS = ("beta1", "padded", "joint")


def forms(p):
    """Strategy of the forward pass and of dx; a strategy that cannot do one of them leaves that to "fused"."""
    return [name for name in HYBRIDS if not (name == "padded" and p)]


def each_form(*probabilities):
    return pytest.mark.parametrize(("name", "p"), [(name, p) for p in probabilities for name in forms(p)])


@pytest.fixture
def take():
    """Take a form wherever it can be taken, as the plan would."""
    with contextlib.ExitStack() as stack:
        yield lambda name: stack.enter_context(plan.force_form(name))


def check(problem, seed=11):
    problem = with_mask(problem, "triton", seed)
    findings = numerics.check(run_problem(problem, "triton", seed), problem, numerics.eager(problem), split=True)
    assert {f.name for f in findings} >= {"y", "dx", "d_lora_A", "d_lora_B"}
    assert all(f.ok for f in findings), [f.message for f in findings if not f.ok]


@each_form(0.0, 0.3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [((3, 17), 37, 53, 3), ((70,), 64, 80, 40)], ids=str)
def test_rules_1_and_2(sizes, dtype, name, p, device, take):
    take(name)
    check(make_problem(*sizes, dtype, device, bias=True, dropout_p=p))


@each_form(0.3)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, name, p, device, take):
    take(name)
    dtype = torch.float16 if "x" in layout else torch.float32
    check(LAYOUTS[layout](make_problem((29,), 40, 36, 6, dtype, device, bias=True, dropout_p=p)))


@pytest.mark.slow
@pytest.mark.parametrize("name", HYBRIDS)
@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16], ids=str)
def test_rule_3_pooled_over_many_problems(name, adapters, device, take):
    """A hybrid rounds as often as the operators do, so it has to be as good as they are, no better."""
    take(name)
    generator, dtype = np.random.default_rng(5), torch.bfloat16
    ours, eagers = {}, {}
    for seed in range(20):
        rows, k, n = (int(v) for v in generator.integers(8, 48, 3))
        r = int(generator.integers(1, 20))
        problem = make_problem((rows,), k, n, r, dtype, device, adapter_dtype=adapters, scaling=1.5, seed=seed)
        truth, base = numerics.exact(problem), numerics.eager(problem)
        for output, value in run_problem(problem, "triton", 0).items():
            scale = numerics.rms(truth[output])
            ours.setdefault(output, []).append(numerics.rms(value.double() - truth[output]) / scale)
            eagers.setdefault(output, []).append(numerics.rms(base[output].double() - truth[output]) / scale)
    for output in ours:
        ratio = math.hypot(*ours[output]) / math.hypot(*eagers[output])
        assert ratio <= 1.10, f"{output}: pooled rms error is {ratio:.3f} of eager's"


@each_form(0.0, 0.5)
def test_exact_integers_twice_over_one_graph(name, p, device, take):
    take(name)
    torch.manual_seed(7)
    keep = philox.keep_mask(int(dropout.draw_seed(torch.device(device))), 33, 40, p) if p else None
    case = exact.draw(33, 40, 35, 5, factor=round(2 / (1 - p)), keep=keep)
    x, w, a, b, bias, dy = (
        getattr(case, n).float().to(device) for n in ("x", "weight", "lora_A", "lora_B", "bias", "dy")
    )
    leaves = {"dx": x, "d_lora_A": a, "d_lora_B": b, "dbias": bias}
    before = {name: leaf.clone() for name, leaf in leaves.items()}
    for leaf in leaves.values():
        leaf.requires_grad_()
    torch.manual_seed(7)
    y = lora_linear(x, w, a, b, scaling=2.0, bias=bias, dropout_p=p, backend="triton")
    for _ in range(2):
        gradients = torch.autograd.grad(y, list(leaves.values()), dy, retain_graph=True)
        for output, value in {"y": y, **dict(zip(leaves, gradients, strict=True))}.items():
            assert torch.equal(value.detach().cpu().long(), case.truth()[output]), output
    assert all(torch.equal(leaf, before[name]) for name, leaf in leaves.items()), "an input was written"


@pytest.mark.parametrize("needs", ["x", "A", "B", "xA", "xB", "AB"])
@pytest.mark.parametrize("name", HYBRIDS)
def test_only_the_gradients_that_are_asked_for(name, needs, device, take):
    problem = make_problem((20,), 24, 28, 4, torch.float32, device)
    leaves = {"x": problem.x, "A": problem.lora_A, "B": problem.lora_B}
    for key, leaf in leaves.items():
        leaf.requires_grad_(key in needs)
    asked = [leaf for leaf in leaves.values() if leaf.requires_grad]

    def gradients():
        y = lora_linear(problem.x, problem.weight, problem.lora_A, problem.lora_B, backend="triton")
        return torch.autograd.grad(y, asked, problem.dy)

    expected = gradients()
    take(name)
    for ours, theirs in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_form_taken_is_the_one_that_runs(device, take, monkeypatch):
    called = []
    for name in HYBRIDS:
        monkeypatch.setitem(hybrid._STRATEGIES, name, lambda *a, _n=name, **k: called.append(_n) or stop())

    def stop():
        raise InterruptedError

    problem = make_problem((20,), 24, 28, 4, torch.float32, device)
    for name in ("beta1", "padded"):
        with plan.force_form(name), pytest.raises(InterruptedError):
            run_problem(problem, "triton", 0)
    assert called == ["beta1", "padded"]


def test_a_padded_product_cannot_mask(device):
    x, w = torch.ones(4, 8, device=device), torch.ones(8, 8, device=device)
    with pytest.raises(ValueError, match="there must be no mask"):
        hybrid.padded_product([([(x, w)], None)], [(x, w, torch.zeros(4, 1, dtype=torch.int32, device=device))])


@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_shipped_tile_gives_the_same_sum(dtype, masked, device):
    """Exact integers, so equal whatever the order of the sum; both paths where there are two."""
    case = exact.draw(70, 72, 88, 5)
    x, w, b = (getattr(case, n).to(dtype).to(device) for n in ("x", "weight", "lora_B"))
    s = (case.x @ case.lora_A.T).to(dtype).to(device)
    keep = torch.full((70, 3), -1, dtype=torch.int32, device=device) if masked else None
    expected = case.x @ case.weight.T + (case.x @ case.lora_A.T) @ case.lora_B.T
    for tma in (False, True):
        if tma and device == "cuda" and (dtype == torch.float32 or torch.cuda.get_device_capability() < (9, 0)):
            continue
        for place in range(len(matmul_configs(dtype, tma, masked))):
            y = matmul_expand([(x, w), (s, b)], None, keep, config=place, tma=tma)
            assert torch.equal(y.double().cpu(), expected.to(dtype).double()), (place, tma)
