"""The registered operators: PyTorch's own checks of them, the eager path's numbers, and what dispatch modes see."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels import autograd, lora_linear, plan
from lora_kernels.verify.problems import make_problem

BACKENDS = ["torch", "triton"]
PROBABILITIES = [0.0, 0.3]
NEEDED = [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
M, K, N, R = 10, 12, 9, 3
LAID_OUT = {
    "contiguous": lambda rows, cols, device: torch.randn(rows, cols, device=device),
    "sliced": lambda rows, cols, device: torch.randn(rows, cols + 4, device=device)[:, 2:-2],
    "transposed": lambda rows, cols, device: torch.randn(cols, rows, device=device).t(),
}


def operands(device, dtype=torch.float32, adapters=None, batch=(2, 5)):
    q = make_problem(batch, K, N, R, dtype, device, adapter_dtype=adapters, bias=True)
    return [q.x, q.weight, q.lora_A, q.lora_B, q.bias]


def draw(x, p, backend):
    return plan.contractions(backend).draw_noise(x) if p else None


@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_linear(backend, p, device):
    tensors = [t.requires_grad_() for t in operands(device)]
    # two runs draw two masks, so only without dropout may they be compared
    checks = ["test_schema", "test_autograd_registration"] + ([] if p else ["test_aot_dispatch_dynamic"])
    opcheck(autograd.linear.linear, (*tensors, 2.0, p, backend), test_utils=checks)


@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_linear_forward(backend, p, device):
    tensors = [t.requires_grad_() for t in operands(device)]
    opcheck(autograd.linear.linear_forward, (*tensors, draw(tensors[0], p, backend), 2.0, p, backend))


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("needed", NEEDED, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_linear_backward(backend, needed, adapters, device):
    x, weight, a, b, bias = operands(device, torch.bfloat16, adapters)
    need_x, need_A, need_B = needed
    y, s, keep = autograd.linear.linear_forward(x, weight, a, b, bias, draw(x, 0.3, backend), 2.0, 0.3, backend)
    opcheck(
        autograd.linear.linear_backward,
        (
            torch.randn_like(y), x if need_A else None, weight if need_x else None, a if need_x else None,
            b if need_x or need_A else None, s if need_B else None, keep if need_x or need_A else None,
            2.0, backend, adapters, adapters, list(needed),
        ),
        test_utils=["test_schema", "test_autograd_registration", "test_faketensor"],
    )  # fmt: skip


@pytest.mark.parametrize("form", ["beta1", "padded", "joint"])
def test_the_fake_shapes_hold_for_every_form_of_the_large_products(form, device):
    tensors = [t.requires_grad_() for t in operands(device)]
    with plan.force_form("fused" if form == "joint" else form):
        y, s, keep = autograd.linear.linear_forward(*tensors, None, 2.0, 0.0, "triton")
    with plan.force_form("beta1" if form == "padded" else form):
        args = (y.detach(), *tensors[:4], s, keep, 2.0, "triton", torch.float32, torch.float32, [True] * 3)
        opcheck(autograd.linear.linear_backward, tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args))


@pytest.mark.parametrize(
    ("of_x", "of_dy"),
    [
        ("contiguous", "contiguous"), pytest.param("sliced", "transposed", marks=pytest.mark.slow),
        pytest.param("transposed", "sliced", marks=pytest.mark.slow),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["fused", "beta1", "padded", "joint", "torch"])
def test_dA_and_dB_are_contiguous_as_the_fake_kernel_promises(form, of_x, of_dy, device):
    backend = "torch" if form == "torch" else "triton"
    _, weight, a, b, bias = operands(device)
    x, dy = LAID_OUT[of_x](M, K, device), LAID_OUT[of_dy](M, N, device)
    with plan.force_form("fused" if form == "torch" else form):
        _, s, keep = autograd.linear.linear_forward(x, weight, a, b, bias, None, 2.0, 0.0, backend)
        args = dy, x, weight, a, b, s, keep, 2.0, backend, torch.float32, torch.float32, [True] * 3
        real = autograd.linear.linear_backward(*args)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in args]
        promised = autograd.linear.linear_backward(*fakes)
    for name, found, fake in zip(("dx", "dA", "dB"), real, promised, strict=True):
        assert (found.shape, found.stride(), found.dtype) == (fake.shape, fake.stride(), fake.dtype), name
        assert fake.is_contiguous(), name


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_operators_give_what_the_eager_path_gives(backend, p, adapters, device):
    tensors = [t.requires_grad_() for t in operands(device, torch.bfloat16, adapters)]
    x, weight, a, b, bias = tensors
    torch.manual_seed(3)
    expected = lora_linear(x, weight, a, b, scaling=1.5, bias=bias, dropout_p=p, backend=backend)
    dy = torch.randn_like(expected)
    torch.manual_seed(3)
    y = autograd.linear.linear(*tensors, 1.5, p, backend)
    assert torch.equal(y, expected)
    function, _ = expected.grad_fn.next_functions[0]  # under the view of its rows
    assert "LoRALinearFunction" in function.name()
    wanted = torch.autograd.grad(expected, tensors, dy)
    got = torch.autograd.grad(y, tensors, dy)
    assert all(map(torch.equal, got, wanted))
    assert [g.dtype for g in got] == [t.dtype for t in tensors]


def test_only_what_is_needed_is_saved(device):
    x, weight, a, b, bias = operands(device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        autograd.linear.linear(x, weight, a, b.requires_grad_(), bias, 2.0, 0.0, "torch")
    assert saved == [(M, R)]


def test_double_backward_of_the_operators_raises(device):
    x, weight, a, b, bias = operands(device)
    x.requires_grad_()
    y = autograd.linear.linear(x, weight, a, b, bias, 2.0, 0.0, "torch")
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y).requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match=r"twice.*backend=\"reference\""):
        dx.sum().backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # PyTorch's own, at its first forward-mode call
def test_forward_mode_is_refused_or_takes_the_reference(device):
    x, weight, a, b, _ = operands(device)
    tangent = torch.randn_like(a)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(a, tangent)
        with pytest.raises(RuntimeError, match="forward-mode AD"):
            lora_linear(x, weight, dual, b, backend="triton")
        y = lora_linear(x, weight, dual, b, scaling=2.0)
        moved = torch.autograd.forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(moved, 2 * x @ tangent.T @ b.T)


@pytest.mark.parametrize("backend", BACKENDS)
def test_flops_are_counted(backend, device):
    x, weight, a, b, bias = operands(device)
    for t in (x, a, b):
        t.requires_grad_()
    thin = 2 * M * R * (K + N)
    with FlopCounterMode(display=False) as counter:
        y = lora_linear(x, weight, a, b, bias=bias, backend=backend)
    assert counter.get_total_flops() == 2 * M * K * N + thin
    with FlopCounterMode(display=False) as counter:
        lora_linear(x, weight, a, b, bias=bias, backend=backend).sum().backward()
    assert counter.get_total_flops() == 2 * (2 * M * K * N + thin) + thin
    for needed, flops in [(x, 2 * M * K * N + thin), (a, thin), (b, 2 * M * R * N)]:
        inputs = [t.detach().requires_grad_(t is needed) for t in (x, weight, a, b, bias)]
        y = autograd.linear.linear(*inputs, 2.0, 0.0, backend)
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        assert counter.get_total_flops() == flops


def test_a_counter_made_before_the_formulas_are_there_gets_them(device, monkeypatch):
    monkeypatch.delitem(flop_counter.flop_registry, autograd.linear.linear_forward.overloadpacket, raising=False)
    x, weight, a, b, _ = operands(device)
    with FlopCounterMode(display=False) as counter:
        lora_linear(x, weight, a, b)
    assert counter.get_total_flops() == 2 * M * K * N + 2 * M * R * (K + N)


@pytest.mark.parametrize("p", PROBABILITIES)
def test_fake_tensors_give_shapes_and_strides(p, device):
    with FakeTensorMode() as mode:
        x, weight, a, b, bias = (mode.from_tensor(t) for t in operands(device))
        y = lora_linear(x, weight, a, b, bias=bias, dropout_p=p)
    assert (y.shape, y.stride(), y.dtype) == ((2, 5, N), (5 * N, N, 1), torch.float32)


def test_a_plain_call_takes_no_operator(device, monkeypatch):
    """Which costs tens of microseconds; and a call under a mode takes one."""

    def refuse(*args):
        raise AssertionError("an operator was called")

    monkeypatch.setattr(autograd.linear, "linear", refuse)
    tensors = [t.requires_grad_() for t in operands(device)]
    lora_linear(*tensors[:4]).sum().backward()
    with torch.no_grad():
        lora_linear(*tensors[:4])
    with pytest.raises(AssertionError, match="an operator was called"), FlopCounterMode(display=False):
        lora_linear(*tensors[:4])
