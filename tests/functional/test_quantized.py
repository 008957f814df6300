"""Calls over quantised weights: the numbers of the dense W, and nothing of its size between forward and backward."""

import collections

import pytest
import torch
import torch.nn.functional as F
from quantized_samples import FORMATS, Call, weight

from lora_kernels import lora_linear, lora_projections, reference, torch_backend

KINDS = ("linear", "projections", "mlp")


def same(found, expected, exact=True):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == other.dtype
            assert torch.equal(one, other) if exact else torch.allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("form", "backend"),
    [(form, backend) for form in FORMATS for backend in ("torch", "reference")]
    + [(form, "triton") for form in ("nf4 nested", "fp8 block")],  # the kernel's own tests have every format
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_of_the_dense_weight(form, kind, backend, device):
    call = Call(kind, form, torch.float32, device, backend)
    same(call.run(call.weights), call.run(call.dense()))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_fp32_adapters_and_dropout(dtype, kind, backend, device):
    call = Call(kind, "nf4 nested", dtype, device, backend, adapters=torch.float32, p=0.3)
    same(call.run(call.weights), call.run(call.dense()))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_recompute_dequantises_gate_and_up_once_more(backend, device, counts):
    call = Call("mlp", "nf4", torch.float32, device, backend, recompute=True)
    expected = call.run(call.dense())
    counts.clear()
    same(call.run(call.weights), expected)
    assert [counts[id(w.packed)] for w in call.weights] == [3, 3, 2]


@pytest.fixture
def counts(monkeypatch):
    """How often each packed tensor was dequantised."""
    from lora_kernels import kernels

    made = collections.Counter()
    for module in (torch_backend, kernels):

        def spy(weight, *args, _dequantize=module.dequantize, **kwargs):
            made[id(weight.packed)] += 1
            return _dequantize(weight, *args, **kwargs)

        monkeypatch.setattr(module, "dequantize", spy)
    return made


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_dequantisations_a_weight_and_step(kind, backend, device, counts):
    call = Call(kind, "nf4", torch.float32, device, backend)
    call.run(call.weights)
    each = {"linear": [2], "projections": [4, 2], "mlp": [2, 2, 2]}[kind]  # projections read the first weight twice
    assert [counts[id(w.packed)] for w in call.weights[: len(each)]] == each


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_dense_is_saved_and_storage_is_saved_as_it_is(kind, backend, device):
    call, saved = Call(kind, "nf4 nested", torch.float32, device, backend), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call.call(call.weights)
    sizes = {w.shape.numel() for w in call.weights}
    assert not [t for t in saved if t.is_floating_point() and t.numel() in sizes]
    places = {t.data_ptr() for t in saved}
    for w in call.weights[: {"linear": 1, "projections": 2, "mlp": 3}[kind]]:
        assert {t.data_ptr() for t in w.tensors()} <= places


def test_parameters_keep_their_identity(device):
    """So that hooks for offloading, which leave parameters where they are, do so."""
    call, saved = Call("linear", "nf4", torch.float32, device, "torch"), []
    call.weights[0] = call.weights[0].with_tensors(
        [torch.nn.Parameter(call.weights[0].packed, requires_grad=False), *call.weights[0].tensors()[1:]]
    )
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call.call(call.weights)
    assert any(t is call.weights[0].packed for t in saved)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("case", ["rank 0", "p = 1", "no adapter"])
def test_the_base_alone_saves_nothing_dense(case, backend, device):
    torch.manual_seed(0)
    w = weight("nf4", (40, 48), device)
    x = torch.randn(9, 48, device=device, requires_grad=True)
    bias = torch.randn(40, device=device, requires_grad=True)
    A, B = torch.randn(4, 48, device=device, requires_grad=True), torch.randn(40, 4, device=device, requires_grad=True)
    if case == "rank 0":
        A, B = (t.detach().requires_grad_() for t in (A[:0], B[:, :0]))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        if case == "no adapter":
            y, _ = lora_projections(x, [w, w], [None, (A, B)], biases=[bias, None], backend=backend)
        else:
            y = lora_linear(x, w, A, B, bias=bias, dropout_p=float(case == "p = 1"), backend=backend)
    assert not [t for t in saved if t.is_floating_point() and t.numel() == w.shape.numel()]
    dense = reference.dequantize(w)
    torch.testing.assert_close(y, F.linear(x, dense, bias))
    dx, dbias = torch.autograd.grad(y, (x, bias), torch.ones_like(y))
    torch.testing.assert_close(dx, torch.ones_like(y) @ dense)
    torch.testing.assert_close(dbias, torch.full_like(bias, 9))


def test_few_elements_are_no_reason_to_save_a_dense_weight(device, monkeypatch):
    monkeypatch.setattr(torch_backend, "_SMALL", 1 << 16)
    for kind in KINDS:
        call, saved = Call(kind, "nf4", torch.float32, device), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            call.call(call.weights)
        sizes = {w.shape.numel() for w in call.weights}
        assert not [t for t in saved if t.is_floating_point() and t.numel() in sizes]
        same(call.run(call.weights), call.run(call.dense()), exact=False)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_decides_the_dtype(kind, device):
    call = Call(kind, "fp8 block", torch.float32, device, "torch")
    dense = [w.dequantize(torch.bfloat16, "torch") for w in call.weights]
    with torch.autocast(device, torch.bfloat16):
        found, expected = call.call(call.weights), call.call(dense)
    same(found, expected)
    assert {y.dtype for y in found} == {torch.bfloat16}


@pytest.mark.parametrize("kind", KINDS)
def test_transforms_take_the_reference(kind, device):
    call = Call(kind, "nf4", torch.float32, device)

    def loss(weights):
        def of(x):
            call.x = x
            return sum(y.square().sum() for y in call.call(weights))

        return of

    x = call.x.detach()
    assert torch.equal(torch.func.grad(loss(call.weights))(x), torch.func.grad(loss(call.dense()))(x))


def test_wrong_shapes_and_devices_are_named(device):
    w, x = weight("nf4", (40, 48), device), torch.randn(3, 48, device=device)
    A, B = torch.randn(4, 48, device=device), torch.randn(40, 4, device=device)
    with pytest.raises(ValueError, match=r"x has 47 features in its last dim but weight is \(40, 48\)"):
        lora_linear(x[:, 1:], w, A, B)
    with pytest.raises(ValueError, match=r"lora_B is \(39, 4\) but must be \(40, 4\)"):
        lora_linear(x, w, A, B[1:])
    with pytest.raises(ValueError, match="x is on meta, the quantised weight on"):
        lora_linear(x.to("meta"), w, A.to("meta"), B.to("meta"))
    with pytest.raises(TypeError, match=r"lora_A must be a torch\.Tensor, got QuantizedWeight"):
        lora_linear(x, w, w, B)
    with pytest.raises(
        ValueError, match=r"lora_projections: projection 1: x has 48 features in its last dim but weight is \(48, 40\)"
    ):
        lora_projections(x, [w, weight("nf4", (48, 40), device)], [(A, B), (A, B)])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("form", FORMATS)
def test_a_trace_is_recorded(form, device):
    w, x = weight(form, (40, 48), device), torch.randn(3, 48, device=device)
    A, B = torch.randn(4, 48, device=device), torch.randn(40, 4, device=device)
    traced = torch.jit.trace(lambda x: lora_linear(x, w, A, B), x)
    other = torch.randn_like(x)
    torch.testing.assert_close(traced(other), lora_linear(other, w, A, B))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_bias_alone_gets_its_gradient(backend, device):
    bias = torch.zeros(40, device=device, requires_grad=True)
    x, A, B = torch.randn(9, 48, device=device), torch.zeros(4, 48, device=device), torch.zeros(40, 4, device=device)
    y = lora_linear(x, weight("nf4", (40, 48), device), A, B, bias=bias, dropout_p=1.0, backend=backend)
    y.sum().backward()
    assert torch.equal(bias.grad, torch.full_like(bias, 9))
