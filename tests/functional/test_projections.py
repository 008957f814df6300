"""`lora_projections` and `lora_qkv`: several projections of one x, held to the rules and to `lora_linear` for each."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from projection_samples import BACKENDS, CASES, GROUPED, assert_accurate, draw, run

from lora_kernels import dropout, lora_projections, lora_qkv, plan, reference
from lora_kernels.verify import numerics

ROUNDED = ("dropout", "missing adapters")  # held in 16 bits as well


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("case", "dtype"), [(case, torch.float32) for case in CASES] + [(case, torch.bfloat16) for case in ROUNDED], ids=str
)
def test_rules_1_and_2(case, dtype, backend, device):
    findings = assert_accurate(*draw(CASES[case], dtype, device), backend)
    assert [f.name for f in findings].count("y") == len(CASES[case])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["grouped-query", "some dropout", "missing adapters"])
def test_the_same_as_each_alone(case, backend, device):
    """Small integers, halves kept: every sum is exact, so the two ways agree to the bit, masks and all."""
    share = 0.0 if device == "cuda" else 0.5  # a GPU's generator gives others where it draws several at a time
    case = tuple((n, r, share * bool(p)) for n, r, p in CASES[case])
    block, _ = draw(case, torch.float32, device)
    block.scalings = [2.0] * len(case)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for t in (*block.leaves(), *block.weights, *block.dys):
            t.copy_(torch.randint(-1, 2, t.shape, generator=generator))
    (together, dx), (alone, dx_alone) = (
        run(block, lambda way=way: way(backend)) for way in (block.together, block.alone)
    )
    assert torch.equal(dx, dx_alone)
    for one, other in zip(together, alone, strict=True):
        for name in one:
            assert torch.equal(one[name], other[name]), name


interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter, which a GPU bypasses")
SHRINK, EXPAND, WGRAD = "_shrink_kernel", "_matmul_expand_kernel", "_wgrad_kernel"


@interpreted
@pytest.mark.parametrize(
    ("case", "backward"),
    [
        (GROUPED, [WGRAD] * 3 + [EXPAND, WGRAD]),
        (CASES["dropout"], [WGRAD] * 3 + [EXPAND, WGRAD]),
        (CASES["missing adapters"], [WGRAD, SHRINK, WGRAD, EXPAND, WGRAD]),  # a rank of 40: ds and dB apart
        (CASES["two"], [WGRAD] * 2 + [EXPAND, WGRAD]),
    ],
)  # fmt: skip
def test_two_launches_forward_and_n_plus_two_backward(case, backward, log):
    block, _ = draw(case, torch.float32, "cpu")
    ys = block.together("triton")
    assert [launch.kernel for launch in log] == [SHRINK, EXPAND]
    log.clear()
    torch.autograd.backward(ys, block.dys)
    assert [launch.kernel for launch in log] == backward


@interpreted
def test_what_is_not_asked_for_is_not_computed(log):
    block, _ = draw(CASES["dropout"], torch.float32, "cpu")
    run(block, lambda: block.together("triton"))
    block.x.requires_grad_(False)
    block.adapters[1][0].requires_grad_(False)
    block.adapters[2][1].requires_grad_(False)
    torch.manual_seed(3)
    ys = block.together("triton")
    log.clear()
    leaves = [t for t in block.leaves() if t.requires_grad]
    gradients = torch.autograd.grad(ys, leaves, block.dys)
    # ds and dB; dB alone; ds alone; two dA
    assert [launch.kernel for launch in log] == [WGRAD, WGRAD, SHRINK, WGRAD]
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert torch.equal(gradient, leaf.grad)


@interpreted
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_output_that_nothing_came_of_costs_nothing(backend, log):
    block, _ = draw(GROUPED, torch.float32, "cpu", biased=0)
    _, y, _ = block.together(backend)
    log.clear()
    y.backward(block.dys[1])
    assert len(log) == (3 if backend == "triton" else 0)
    assert all(leaf.grad is None for pair in block.adapters[::2] for leaf in pair)
    ours = block.x.grad
    block.x.grad = None
    block.alone(backend)[1].backward(block.dys[1])
    torch.testing.assert_close(ours, block.x.grad)


def test_nothing_is_launched_or_saved_without_gradients(device):
    block, _ = draw(CASES["dropout"], torch.float32, device)
    torch.manual_seed(1)
    expected = [y.detach() for y in block.together("triton")]
    torch.manual_seed(1)
    with torch.no_grad():
        ys = block.together("triton")
    assert all(not y.requires_grad and torch.equal(y, other) for y, other in zip(ys, expected, strict=True))


def test_saved_for_backward_are_s_and_the_masks(device):
    block, _ = draw(((48, 8, 0.1), (16, 8, 0.1), (16, 8, 0.0)), torch.bfloat16, device, batch=(64,), k=48)
    known = {t.untyped_storage().data_ptr() for t in (*block.leaves(), *block.weights)}
    saved = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in known:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        block.together("triton")
    assert sorted(saved.values()) == [64 * 2 * 4, 64 * 2 * 4, 64 * 3 * 8 * 2]


LAYOUTS = {
    "x transposed": lambda b: b.__dict__.update(x=b.x.detach().t().contiguous().t().requires_grad_()),
    "W transposed": lambda b: b.weights.__setitem__(1, b.weights[1].t().contiguous().t()),
    "dy expanded": lambda b: b.dys.__setitem__(0, b.dys[0][:1].expand_as(b.dys[0])),
    "bias with a stride": lambda b: b.biases.__setitem__(
        0, torch.stack([b.biases[0].detach()] * 2, 1)[:, 0].requires_grad_()
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, device):
    block, problems = draw(CASES["dropout"], torch.float32, device, batch=(29,))
    LAYOUTS[layout](block)
    problems = [
        replace(q, x=block.x, weight=w, dy=dy, bias=bias)
        for q, w, dy, bias in zip(problems, block.weights, block.dys, block.biases, strict=True)
    ]
    assert_accurate(block, problems, "triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp32_adapters_under_autocast_and_without(backend, device):
    block, problems = draw(GROUPED, torch.bfloat16, device, adapter_dtype=torch.float32)
    findings = {f.name: f for f in assert_accurate(block, problems, backend)}
    assert findings["d_lora_A"].rule_1 > 0  # held to fp32's rounding, by dtype
    wide, _ = draw(GROUPED, torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        ys, alone = wide.together(backend), wide.alone(backend)
    assert [y.dtype for y in ys] == [torch.bfloat16] * 3
    for y, other in zip(ys, alone, strict=True):
        torch.testing.assert_close(y, other, rtol=0.02, atol=0.02)
    torch.autograd.backward(ys, [dy.bfloat16() for dy in wide.dys])
    assert wide.x.grad.dtype == wide.adapters[0][0].grad.dtype == torch.float32


@interpreted
def test_a_hybrid_shares_the_thin_products(log):
    """Where the library should do the large products, it adds them to the thin ones, which still share their launches."""
    block, problems = draw(GROUPED, torch.float32, "cpu")
    with plan.force_form("beta1"):
        own, dx = run(block, lambda: block.together("triton"))
    kernels = [launch.kernel for launch in log]
    assert kernels.count(SHRINK) == 1
    assert kernels.count(EXPAND) == 2
    findings = [f for q, outputs in zip(problems, own, strict=True) for f in numerics.check(outputs, q, split=True)]
    findings.append(numerics.check_shared_dx(dx, problems, split=True))
    assert all(f.ok for f in findings), [f.message for f in findings]


def test_all_dropped_rank_0_and_no_rows(device):
    block, _ = draw(((12, 3, 1.0), (10, 4, 0.0), (9, 2, 0.0)), torch.float32, device)
    own, _ = run(block, lambda: block.together("triton"))
    torch.testing.assert_close(own[0]["y"], F.linear(block.x, block.weights[0], block.biases[0]).detach())
    assert not own[0]["d_lora_A"].any()
    assert not own[0]["d_lora_B"].any()
    block.x = block.x.detach()[:0].requires_grad_()
    block.dys = [dy[:0] for dy in block.dys]
    own, dx = run(block, lambda: block.together("triton"))
    assert own[1]["y"].shape == (0, 7, 10)
    assert dx.shape == block.x.shape
    block.adapters = [None] * 3
    block.x = torch.ones(2, 40, device=device)
    assert all(map(torch.equal, block.together("triton"), block.alone("triton")))


@pytest.mark.parametrize("backend", BACKENDS)
def test_differentiable_once_and_the_graph_again(backend, device):
    block, _ = draw(GROUPED, torch.float32, device)
    ys = block.together(backend)
    first, second = (torch.autograd.grad(ys, block.leaves(), block.dys, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    (dx,) = torch.autograd.grad(ys, block.x, [dy.requires_grad_() for dy in block.dys], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.small
def test_small_calls_on_a_cpu_are_composed():
    block, _ = draw(GROUPED, torch.float32, "cpu")
    assert "Projections" not in type(block.together("auto")[0].grad_fn).__name__


def test_queries_keys_and_values(device):
    block, _ = draw(GROUPED, torch.float32, device, biased=0)
    q, k, v = lora_qkv(block.x, block.weights, block.adapters, scaling=2.0, backend="triton")
    assert (q.shape, k.shape, v.shape) == ((5, 7, 48), (5, 7, 16), (5, 7, 24))
    expected = reference.lora_projections(block.x, block.weights, block.adapters, scaling=2.0)
    for y, other in zip((q, k, v), expected, strict=True):
        torch.testing.assert_close(y, other)


def test_the_reference_draws_the_kernels_masks(device):
    block, _ = draw(((16, 4, 0.5), (8, 4, 0.0), (8, 4, 0.25)), torch.float32, device)
    torch.manual_seed(5)
    first, last = dropout.draw_seed(device, 2)
    torch.manual_seed(5)
    ys = block.together("triton")
    expected = reference.lora_projections(
        block.x, block.weights, block.adapters, biases=block.biases, scaling=block.scalings, dropout_p=block.ps,
        seeds=[first, None, last],
    )  # fmt: skip
    for y, other in zip(ys, expected, strict=True):
        torch.testing.assert_close(y, other)


T = torch.ones
WRONG = {
    "not a list": (dict(weights=T(3, 8, 4)), TypeError, "weights must be a list or tuple, one entry a projection"),
    "too few adapters": (dict(adapters=[None]), ValueError, "weights are of 3 projections but adapters of 1"),
    "too many scalings": (dict(scaling=[1.0] * 4), ValueError, "weights are of 3 projections but scaling of 4"),
    "two for Q, K, V": (dict(weights=[T(8, 4)] * 2, adapters=[None] * 2), ValueError, "needs 3 projections, got 2"),
    "half an adapter": (
        dict(adapters=[None, (T(2, 4),), None]),
        TypeError,
        r"adapters\[1\] must be \(lora_A, lora_B\)",
    ),
    "no A": (dict(adapters=[None, (None, T(8, 2)), None]), TypeError, "lora_qkv: k: lora_A must be a torch.Tensor"),
    "A transposed": (dict(adapters=[None, (T(4, 2), T(8, 2)), None]), ValueError, "lora_qkv: k: lora_A is"),
    "another width": (dict(weights=[T(8, 4), T(8, 4), T(8, 5)]), ValueError, "lora_qkv: v: x has 4 features"),
    "dtype": (
        dict(weights=[T(8, 4), T(8, 4).half(), "W"]), TypeError,
        r"^lora_qkv: k: x is float32 but weights\[1\] is float16\..*cast weights\[1\]: weights\[1\]\.to\(x\.dtype\)\.$",
    ),
    "bias's dtype": (
        dict(biases=[None, T(8).half(), None]), TypeError, r"lora_qkv: k: x is float32 but biases\[1\] is .*cast biases\[1\]:"
    ),
    "x's dtype": (dict(x=T(5, 4).half()), TypeError, r"cast x: x\.to\(weights\[0\]\.dtype\)"),
    "A's dtype": (
        dict(adapters=[(T(2, 4).half(), T(8, 2)), None, None]), TypeError, r"x is float32 but adapters\[0\]\[0\] is float16"
    ),
    "dropout": (dict(dropout_p=[0.0, 0.0, 1.5]), ValueError, r"lora_qkv: v: dropout_p must be in \[0, 1\]"),
    "bias": (dict(biases=[None, T(3), None]), ValueError, "lora_qkv: k: bias has 3 elements"),
    "no tensor": (dict(weights=[T(8, 4), "W", T(8, 4)]), TypeError, "lora_qkv: k: weight must be a torch.Tensor"),
    "x": (dict(x=3), TypeError, "lora_qkv: q: x must be a torch.Tensor"),
    "backend": (dict(backend="cuda"), ValueError, "lora_qkv: backend='cuda' is not one of"),
    "rank": (
        dict(adapters=[None, (T(513, 4), T(8, 513)), None], backend="triton"),
        ValueError,
        "lora_qkv: rank 513 exceeds 512",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_errors_name_the_projection(wrong):
    changes, error, message = WRONG[wrong]
    pair = (T(2, 4), T(8, 2))
    given = dict(x=T(5, 4), weights=[T(8, 4)] * 3, adapters=[pair] * 3) | changes
    with pytest.raises(error, match=message):
        lora_qkv(given.pop("x"), given.pop("weights"), given.pop("adapters"), **given)


def test_a_projection_without_a_name_is_named_by_its_place():
    with pytest.raises(ValueError, match=r"^lora_projections: projection 1: x has 4 features"):
        lora_projections(T(5, 4), [T(8, 4), T(8, 5)], [None, None])
    with pytest.raises(TypeError, match=r"^lora_projections: projection 1: x is float32 but weights\[1\] is float16"):
        lora_projections(T(5, 4), [T(8, 4), T(8, 4).half()], [None, None])
