"""O11: what PyTorch code may rely on: gradients asked for, inputs left alone, autocast, the generator."""

import itertools
from dataclasses import replace

import pytest
import torch

from lora_kernels import LoRALinear, dropout, lora_linear, reference
from lora_kernels.autograd.linear import LoRALinearFunction
from lora_kernels.verify import numerics
from lora_kernels.verify.problems import make_problem, run_problem, with_mask

BACKENDS = ["torch", "triton"]
WAYS = [*BACKENDS, pytest.param("torch", marks=pytest.mark.small, id="small")]
NAMES = ("x", "weight", "lora_A", "lora_B", "bias")
SUBSETS = [s for n in range(6) for s in itertools.combinations(NAMES, n)]


def draw(device, dtype=torch.float32, batch=(9,), k=12, n=10, r=3):
    q = make_problem(batch, k, n, r, dtype, device, bias=True)
    return {name: getattr(q, name).clone() for name in (*NAMES, "dy")}


def call(t, backend, **kwargs):
    return lora_linear(t["x"], t["weight"], t["lora_A"], t["lora_B"], bias=t["bias"], backend=backend, **kwargs)


@pytest.mark.parametrize(
    ("subset", "backend"),
    # all of them where it is cheap; none, each, each pair and all where the interpreter runs
    [(s, "torch") for s in SUBSETS]
    + [(s, "triton") for s in SUBSETS if len(s) not in (3, 4)]
    + [pytest.param(s, "torch", marks=pytest.mark.small, id="+".join(s) + "-small") for s in SUBSETS],
    ids=lambda v: v if isinstance(v, str) else "+".join(v),
)
def test_gradients_exactly_where_they_are_asked_for(subset, backend, device):
    t = draw(device)
    expected = {n: t[n].double().requires_grad_(n in subset) for n in NAMES}
    y64 = reference.lora_linear(
        expected["x"], expected["weight"], expected["lora_A"], expected["lora_B"], scaling=2.0, bias=expected["bias"]
    )
    for name in subset:
        t[name].requires_grad_()
    y = call(t, backend, scaling=2.0)
    assert y.requires_grad == bool(subset)
    if subset:
        y.backward(t["dy"])
        y64.backward(t["dy"].double())
    for name in NAMES:
        if name in subset:
            torch.testing.assert_close(t[name].grad.double(), expected[name].grad, rtol=1e-4, atol=1e-4)
        else:
            assert t[name].grad is None


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("backend", WAYS)
def test_a_retained_graph_gives_the_same_gradients_and_inputs_stay(backend, p, device):
    t = draw(device)
    before = {name: value.clone() for name, value in t.items()}
    leaves = [t[name].requires_grad_() for name in ("x", "lora_A", "lora_B", "bias")]
    y = call(t, backend, dropout_p=p)
    first = torch.autograd.grad(y, leaves, t["dy"], retain_graph=True)
    second = torch.autograd.grad(y, leaves, t["dy"])
    assert all(map(torch.equal, first, second))
    assert all(torch.equal(t[name].detach(), value) for name, value in before.items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward_raises(backend, device):
    t = draw(device)
    t["x"].requires_grad_()
    t["dy"].requires_grad_()
    (dx,) = torch.autograd.grad(call(t, backend), t["x"], t["dy"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"twice.*once_differentiable"):
        dx.sum().backward()


@pytest.mark.small
def test_double_backward_of_a_small_call():
    t = draw("cpu", torch.float64)
    leaves = tuple(t[name].requires_grad_() for name in NAMES)
    assert torch.autograd.gradgradcheck(
        lambda *leaves: call(dict(zip(NAMES, leaves, strict=True)), "torch"), leaves, t["dy"]
    )


@pytest.mark.parametrize("changed", ["x", "lora_A", "lora_B"])
@pytest.mark.parametrize("backend", WAYS)
def test_a_changed_input_is_noticed(backend, changed, device):
    t = draw(device)
    for name in ("x", "lora_A", "lora_B"):
        t[name].requires_grad_()
    y = call(t, backend)
    with torch.no_grad():
        t[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(t["dy"])


@pytest.mark.parametrize("backend", WAYS)
@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (2, 1, 3), (2, 2, 1, 2)], ids=str)
def test_any_leading_dims(batch, backend, device):
    problem = make_problem(batch, 12, 10, 3, torch.float32, device)
    findings = numerics.check(run_problem(problem, backend, 0), problem, split=backend == "torch")
    assert all(f.ok for f in findings), [f.message for f in findings]


@pytest.mark.parametrize("backend", WAYS)
def test_leading_dims_that_no_view_can_flatten(backend, device):
    problem = make_problem((4, 5), 12, 10, 3, torch.float32, device)
    problem = replace(problem, x=problem.x.transpose(0, 1), dy=problem.dy.transpose(0, 1))
    with pytest.raises(RuntimeError):
        problem.x.view(20, 12)
    findings = numerics.check(run_problem(problem, backend, 0), problem, split=backend == "torch")
    assert all(f.ok for f in findings), [f.message for f in findings]


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("backend", WAYS)
@pytest.mark.parametrize("batch", [(), (2,)], ids=["2 dims", "3 dims"])
@pytest.mark.parametrize("zero", ["M", "N", "K", "r"])
def test_zero_sizes(zero, batch, backend, p, device):
    size = dict(M=4, N=5, K=6, r=2) | {zero: 0}
    m, n, k, r = size.values()
    x, a, b = (torch.randn(s, device=device, requires_grad=True) for s in ((*batch, m, k), (r, k), (n, r)))
    w, bias = torch.randn(n, k, device=device), torch.randn(n, device=device)
    y = lora_linear(x, w, a, b, bias=bias, dropout_p=p, backend=backend)
    assert y.shape == (*batch, m, n)
    if zero in "Kr":
        torch.testing.assert_close(y, torch.nn.functional.linear(x, w, bias))
    y.sum().backward()
    for t in (x, a, b):
        assert t.grad is not None
        assert t.grad.shape == t.shape
    if zero in "MNKr":
        assert not a.grad.any()
        assert not b.grad.any()


@pytest.mark.parametrize("backend", WAYS)
def test_p_of_one_leaves_the_base(backend, device):
    t = draw(device)
    for name in ("lora_A", "lora_B"):
        t[name].requires_grad_()
    y = call(t, backend, dropout_p=1.0)
    torch.testing.assert_close(y, torch.nn.functional.linear(t["x"], t["weight"], t["bias"]))
    y.sum().backward()
    assert not t["lora_A"].grad.any()
    assert not t["lora_B"].grad.any()


@pytest.mark.parametrize("backend", WAYS)
def test_bitwise_repeatable_for_a_seed(backend, device):
    problem = with_mask(make_problem((40,), 33, 21, 5, torch.float32, device, dropout_p=0.3), backend, 1)
    first, second = (run_problem(problem, backend, 1) for _ in range(2))
    other = run_problem(problem, backend, 2)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["y"], other["y"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_grad_the_function_is_skipped(backend, device, monkeypatch):
    t = draw(device)
    t["lora_A"].requires_grad_()
    expected = call(t, backend).detach()
    monkeypatch.setattr(LoRALinearFunction, "apply", None)
    with torch.no_grad():
        assert torch.equal(call(t, backend), expected)
    with pytest.raises(TypeError):
        call(t, backend)


def test_the_generator_advances_by_one_draw_with_dropout_and_by_none_without(device):
    t = draw(device)
    torch.manual_seed(5)
    dropout.draw_seed(device)
    one_draw = torch.rand(3, device=device)
    torch.manual_seed(5)
    call(t, "triton", dropout_p=0.5)
    assert torch.equal(torch.rand(3, device=device), one_draw)
    torch.manual_seed(5)
    fresh = torch.rand(3, device=device)
    for backend in BACKENDS:
        torch.manual_seed(5)
        call(t, backend)
        assert torch.equal(torch.rand(3, device=device), fresh)


@pytest.mark.parametrize("backend", WAYS)
def test_a_shard_of_dropout_gets_its_own_mask_and_leaves_the_generator_as_the_others_do(backend, device):
    t = draw(device)
    torch.manual_seed(5)
    masked = [call(t, backend, dropout_p=0.5) for _ in range(3)]
    after = torch.rand(3, device=device)
    assert not torch.equal(masked[0], masked[1])
    for i in range(3):
        torch.manual_seed(5)
        assert torch.equal(call(t, backend, dropout_p=0.5, dropout_shard=(i, 3)), masked[i])
        assert torch.equal(torch.rand(3, device=device), after)


@pytest.mark.parametrize("backend", WAYS)
def test_nan_stays_in_its_row(backend, device):
    t = draw(device)
    clean = call(t, backend)
    t["x"][4, 2] = float("nan")
    y = call(t, backend)
    assert y[4].isnan().all()
    rest = [i for i in range(9) if i != 4]
    assert torch.equal(y[rest], clean[rest])


@pytest.mark.parametrize(
    ("backend", "p", "extra"), [("torch", 0, 0), ("triton", 0, 0), ("torch", 0.5, 1), ("triton", 0.5, 2 * 4 / 48)]
)
def test_saved_for_backward_is_s_and_the_mask(backend, p, extra, device):
    t = draw(device, batch=(64,), k=48, n=40, r=8)
    for name in ("x", "lora_A", "lora_B"):
        t[name].requires_grad_()
    known = {t[name].untyped_storage().data_ptr() for name in NAMES}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(t, backend, dropout_p=p)
    assert sum(saved.values()) == 64 * 8 * 4 + 64 * 48 * extra


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", WAYS)
def test_autocast(backend, parameters, compute, device):
    """Computed in autocast's dtype; gradients come back in each tensor's own."""
    t = draw(device, parameters, batch=(20,))
    t["lora_A"], t["lora_B"] = t["lora_A"].float(), t["lora_B"].float()
    leaves = {name: t[name].requires_grad_() for name in ("x", "lora_A", "lora_B", "bias")}
    with torch.autocast(device, dtype=compute):
        y = call(t, backend, scaling=2.0)
    assert y.dtype == compute
    y.backward(t["dy"].to(compute))
    assert all(leaf.grad.dtype == leaf.dtype for leaf in leaves.values())
    cast = {name: t[name].detach().to(compute) for name in ("x", "weight", "bias", "dy")}
    problem = numerics.Problem(**cast, lora_A=t["lora_A"].detach(), lora_B=t["lora_B"].detach(), scaling=2.0)
    got = {"y": y.detach(), "d_lora_A": t["lora_A"].grad, "d_lora_B": t["lora_B"].grad}
    findings = numerics.check(got, problem, split=backend == "torch")
    assert all(f.ok for f in findings), [f.message for f in findings]


def test_autocast_leaves_float64_alone():
    layer = LoRALinear(6, 5, r=2, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(3, 6, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("size", ["large", pytest.param("small", marks=pytest.mark.small)])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradcheck_in_float64(p, size):
    """O6: numeric against analytic, through the reference and through the Function on PyTorch's operators."""
    torch.manual_seed(0)
    x, w, a, b, bias = (torch.randn(s, dtype=torch.float64) for s in ((5, 6), (4, 6), (2, 6), (4, 2), (4,)))
    inputs = tuple(t.requires_grad_() for t in (x, w, a, b, bias))

    def through_the_function(x, w, a, b, bias):
        torch.manual_seed(1)  # the same mask at each evaluation
        return lora_linear(x, w, a, b, scaling=1.7, bias=bias, dropout_p=p, backend="torch")

    def through_the_reference(x, w, a, b, bias):
        return reference.lora_linear(x, w, a, b, scaling=1.7, bias=bias, dropout_p=p, seed=3)

    assert torch.autograd.gradcheck(through_the_function, inputs)
    assert torch.autograd.gradcheck(through_the_reference, inputs)
    assert torch.autograd.gradgradcheck(through_the_reference, inputs)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_reference_gradients_are_the_derivatives(p):
    problem = make_problem((3, 4), 6, 5, 2, torch.float64, "cpu", bias=True, dropout_p=p)
    problem = with_mask(problem, "triton", 1)
    leaves = {n: getattr(problem, n).requires_grad_() for n in ("x", "lora_A", "lora_B", "bias", "weight")}
    y = reference.forward(
        problem.x, problem.weight, problem.lora_A, problem.lora_B, problem.bias, problem.scaling, problem.keep, p
    )
    dx, d_a, d_b, dbias, dw = torch.autograd.grad(y, list(leaves.values()), problem.dy)
    truth = numerics.exact(problem)
    for name, value in dict(y=y, dx=dx, d_lora_A=d_a, d_lora_B=d_b, dbias=dbias).items():
        torch.testing.assert_close(truth[name], value)
    torch.testing.assert_close(reference.grad_weight(problem.dy, problem.x), dw)


def test_torch_func_takes_the_reference_when_asked():
    t = draw("cpu")

    def loss(a):
        return call(t | {"lora_A": a}, "torch").square().sum()

    a = t["lora_A"].clone().requires_grad_()
    (expected,) = torch.autograd.grad(call(t | {"lora_A": a}, "torch").square().sum(), a)
    torch.testing.assert_close(torch.func.grad(loss)(t["lora_A"]), expected)
