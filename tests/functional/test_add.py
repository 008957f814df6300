"""lora_add: the low-rank term over a given base result, in both backends, to the accuracy rules."""

import contextlib
import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels import reference
from lora_kernels.dropout import keep_scale
from lora_kernels.functional import lora_add, lora_linear
from lora_kernels.verify import numerics

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def case(dtype, device="cpu", lead=(5, 7), k=33, n=19, r=5, adapters=None):
    g = torch.Generator().manual_seed(0)
    x, base = torch.randn(*lead, k, generator=g), torch.randn(*lead, n, generator=g)
    a, b = torch.randn(r, k, generator=g) / 4, torch.randn(n, r, generator=g)
    return [t.to(device, dtype if i < 2 else adapters or dtype).requires_grad_() for i, t in enumerate((base, x, a, b))]


def gradients(call, tensors, dy):
    y = call(*tensors)
    return {"y": y.detach()} | dict(zip(("dbase", "dx", "dA", "dB"), torch.autograd.grad(y, tensors, dy), strict=True))


def keep_of(tensors, backend, p):
    """The mask that a call of a given seed used, told by a call whose y is its dropped x."""
    _base, x, *_ = tensors
    k = x.shape[-1]
    eye = torch.eye(k, dtype=x.dtype, device=x.device)
    return lora_add(torch.zeros_like(x), torch.ones_like(x), eye, eye, dropout_p=p, backend=backend) != 0


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("adapters", [None, torch.float32], ids=["same", "fp32 adapters"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_against_float64(backend, dtype, adapters, p, device):
    dtype = DTYPES[dtype]
    tensors = case(dtype, device, adapters=adapters)
    keep = None
    if p:
        torch.manual_seed(5)
        keep = keep_of(tensors, backend, p)
        assert 0.4 < keep.float().mean() < 0.8
    dy = torch.randn_like(tensors[0])
    torch.manual_seed(5)
    actual = gradients(lambda *t: lora_add(*t, scaling=0.7, dropout_p=p, backend=backend), tensors, dy)
    rounded = [t.detach().to(dtype).double().requires_grad_() for t in tensors]

    def formula(base, x, a, b):
        x = x if keep is None else torch.where(keep, x, 0) * keep_scale(p)
        return base + 0.7 * x @ a.T @ b.T

    exact = gradients(formula, rounded, dy.double())
    for name, t in actual.items():
        dtypes = {"dA": tensors[2].dtype, "dB": tensors[3].dtype}
        assert t.dtype == dtypes.get(name, dtype), name
        error = numerics.rms(t.double() - exact[name]) / numerics.rms(exact[name])
        assert error <= numerics.unit_roundoff(dtype) * (2 if dtype.itemsize == 2 else 8), name
    assert torch.equal(actual["dbase"], dy)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_it_is_lora_linear_less_the_base(backend, device):
    _base, x, a, b = (t.detach() for t in case(torch.float32, device))
    weight = torch.randn(19, 33, device=device)
    torch.manual_seed(1)
    whole = lora_linear(x, weight, a, b, scaling=2.0, dropout_p=0.3, backend=backend)
    torch.manual_seed(1)
    parts = lora_add(x @ weight.T, x, a, b, scaling=2.0, dropout_p=0.3, backend=backend)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "wanted", [(w, x, a, b) for w in (0, 1) for x in (0, 1) for a in (0, 1) for b in (0, 1)], ids=str
)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_only_the_gradients_that_are_asked_for(wanted, p):
    tensors = case(torch.float32)
    torch.manual_seed(0)
    expected = torch.autograd.grad(lora_add(*tensors, dropout_p=p).sum(), tensors)
    for t, want in zip(tensors, wanted, strict=True):
        t.requires_grad_(bool(want))
    torch.manual_seed(0)
    y = lora_add(*tensors, dropout_p=p)
    assert y.requires_grad == any(wanted)
    if not any(wanted):
        return
    y.sum().backward()
    for t, want, value in zip(tensors, wanted, expected, strict=True):
        assert (t.grad is not None) == bool(want)
        if want:
            torch.testing.assert_close(t.grad, value)


def test_saved_for_backward_is_thin():
    tensors = case(torch.bfloat16, adapters=torch.float32, lead=(64,))
    base, _x, _a, _b = tensors
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_add(*tensors)
    own = {t.data_ptr() for t in tensors}
    assert base.data_ptr() not in {t.data_ptr() for t in saved}
    assert sum(t.numel() for t in saved if t.data_ptr() not in own) == 64 * 5  # s


def test_a_base_of_another_dtype_keeps_it():
    base, x, a, b = case(torch.bfloat16)
    wide = base.detach().float().requires_grad_()
    actual = gradients(lora_add, [wide, x, a, b], torch.ones(5, 7, 19))
    assert actual["y"].dtype == actual["dbase"].dtype == torch.float32
    assert actual["dx"].dtype == torch.bfloat16
    expected = wide + (x.float() @ a.float().T) @ b.float().T
    torch.testing.assert_close(actual["y"], expected.detach(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("mode", [contextlib.nullcontext, functools.partial(FlopCounterMode, display=False)])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_an_fp32_base_and_its_gradient_are_never_rounded(backend, mode, device):
    """A 16-bit x beside it, as under a quantised layer that computes in fp32: with nothing to add, y is base."""
    base, x, a, b = case(torch.bfloat16, device)
    base = (base.detach().float() + 2**-12).requires_grad_()
    dy = torch.randn(base.shape, device=device)
    with mode():
        y = lora_add(base, x, a, torch.zeros_like(b), backend=backend)
        y.backward(dy)
    assert torch.equal(y, base)
    assert torch.equal(base.grad, dy)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_sum_over_a_16_bit_base_is_rounded_once(backend, device):
    """1 + 2^-10 is added to 256: the sum lies above the middle of two bf16 neighbours, with a rounded term on it."""
    base = torch.full((4, 8), 256.0, dtype=torch.bfloat16, device=device)
    x, a = torch.ones(4, 8, device=device), torch.full((1, 8), 0.125, device=device)
    b = torch.full((8, 1), 1 + 2.0**-10, device=device)
    assert torch.equal(lora_add(base, x, a, b, backend=backend), torch.full_like(base, 258))


def test_inputs_are_not_written():
    tensors = case(torch.float32)
    copies = [t.detach().clone() for t in tensors]
    lora_add(*tensors, dropout_p=0.5).sum().backward()
    assert all(torch.equal(t, copy) for t, copy in zip(tensors, copies, strict=True))


@pytest.mark.parametrize("lead", [(), (0,), (3, 0), (2, 3, 4)], ids=str)
def test_any_leading_dims(lead):
    tensors = case(torch.float32, lead=lead)
    dy = torch.ones(*lead, 19)
    actual, expected = (gradients(f, tensors, dy) for f in (lora_add, reference.lora_add))
    for name, t in actual.items():
        torch.testing.assert_close(t, expected[name])


@pytest.mark.parametrize(("r", "p"), [(0, 0.0), (5, 1.0)])
def test_nothing_to_add_gives_zero_gradients(r, p):
    tensors = case(torch.float32, r=r)
    y = lora_add(*tensors, dropout_p=p)
    assert torch.equal(y, tensors[0])
    y.sum().backward()
    assert tensors[2].grad.shape == (r, 33)
    assert not tensors[2].grad.any()


def test_double_backward_raises():
    tensors = case(torch.float32)
    (dx,) = torch.autograd.grad(lora_add(*tensors).square().sum(), tensors[1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when dynamo is first imported
def test_transforms_fake_tensors_and_compile():
    base, x, a, b = (t.detach() for t in case(torch.float32))
    gradient = torch.func.grad(lambda a: lora_add(base, x, a, b, backend="torch").sum())(a)
    torch.testing.assert_close(gradient, (b.sum(0)[:, None] * x.sum((0, 1))))
    with pytest.raises(RuntimeError, match=r"does not support torch\.func transforms"):
        torch.func.grad(lambda a: lora_add(base, x, a, b, backend="triton").sum())(a)
    with FakeTensorMode():
        assert lora_add(torch.empty(2, 6), torch.empty(2, 3), torch.empty(4, 3), torch.empty(6, 4)).shape == (2, 6)
    compiled = torch.compile(lora_add, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(base, x, a, b, scaling=0.5), lora_add(base, x, a, b, scaling=0.5))


FAULTS = {
    "base": (dict(base=torch.zeros(5, 6, 19)), ValueError, r"base must be .* got \(5, 6, 19\) for x of \(5, 7, 33\)"),
    "scalar base": (
        dict(base=torch.zeros(()), x=torch.zeros(33)),
        ValueError,
        r"base must be .* got \(\) for x of \(33,\)",
    ),
    "x": (dict(x=torch.zeros(5, 7, 32)), ValueError, r"lora_A is \(5, 33\) but must be \(r, 32\) to match x"),
    "lora_A": (dict(lora_A=torch.zeros(33, 5)), ValueError, r"Did you pass lora_A transposed\?"),
    "swapped": (
        dict(lora_A=torch.zeros(19, 5), lora_B=torch.zeros(5, 33)),
        ValueError,
        r"lora_A and lora_B seem to be swapped",
    ),
    "swapped, of rank in_features": (
        dict(lora_A=torch.zeros(19, 33), lora_B=torch.zeros(33, 33)),
        ValueError,
        r"lora_B is \(33, 33\) but must be \(19, 19\): out_features x rank\. lora_A and lora_B seem to be swapped",
    ),
    "lora_B": (dict(lora_B=torch.zeros(5, 19)), ValueError, r"lora_B is \(5, 19\) but must be \(19, 5\): out_features"),
    "device": (dict(lora_B=torch.zeros(19, 5, device="meta")), ValueError, r"x is on cpu, lora_B on meta"),
    "kind of x": (dict(x=[1.0]), TypeError, r"x must be a torch\.Tensor, got list"),
    "kind": (dict(base=[1.0]), TypeError, r"base must be a torch\.Tensor, got list"),
    "dtype": (dict(base=torch.zeros(5, 7, 19, dtype=torch.int32)), TypeError, r"base has dtype torch\.int32"),
    "mix": (dict(lora_A=torch.zeros(5, 33).half()), TypeError, r"x is float32 but lora_A is float16"),
    "p": (dict(dropout_p=1.5), ValueError, r"dropout_p must be in \[0, 1\], got 1\.5"),
    "scaling": (dict(scaling=float("nan")), ValueError, r"scaling must be finite, got nan"),
    "backend": (dict(backend="cuda"), ValueError, r"backend='cuda' is not one of"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault(fault):
    changes, kind, text = FAULTS[fault]
    given = (
        dict(zip(("base", "x", "lora_A", "lora_B"), (t.detach() for t in case(torch.float32)), strict=True)) | changes
    )
    with pytest.raises(kind, match=text) as caught:
        lora_add(**given)
    assert fault == "backend" or str(caught.value).startswith("lora_add: ")
