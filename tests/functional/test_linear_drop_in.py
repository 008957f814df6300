"""What code written for nn.Linear does to a layer, its inputs and its output, in surroundings that it does not expect."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lora_kernels import LoRALinear, lora_linear, reference

BACKENDS = ("torch", "triton")
both = pytest.mark.parametrize("backend", BACKENDS)
all_ways = pytest.mark.parametrize("backend", [*BACKENDS, pytest.param("torch", marks=pytest.mark.small, id="small")])


def tensors(*batch, k=16, n=24, r=4, dtype=torch.float32, adapters=None, device="cpu"):
    generator = torch.Generator().manual_seed(3)

    def draw(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator).div(shape[-1] ** 0.5).to(dtype).to(device).requires_grad_()

    adapters = adapters or dtype
    return draw(*batch, k), draw(n, k).detach(), draw(r, k, dtype=adapters), draw(n, r, dtype=adapters)


@all_ways
@pytest.mark.parametrize("batch", [(6,), (2, 3), ()], ids=str)
def test_the_output_may_be_written(batch, backend, device):
    """Residual sums and in-place activations come right after it."""
    x, w, a, b = tensors(*batch, device=device)

    def gradients(written):
        y = lora_linear(x, w, a, b, backend=backend)
        y = torch.relu_(y.add_(1)) if written else torch.relu(y + 1)
        return torch.autograd.grad(y.sum(), [x, a, b])

    for ours, theirs in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_layer_before_an_in_place_activation():
    model = nn.Sequential(LoRALinear(16, 24), nn.ReLU(inplace=True))
    model(torch.randn(2, 3, 16)).sum().backward()
    assert model[0].lora_B.grad is not None


@both
@pytest.mark.parametrize(
    "where",
    [
        "around backward",
        pytest.param("around both", marks=pytest.mark.slow),
        pytest.param("around forward", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(("dtype", "adapters"), [(torch.float32, None), (torch.float16, torch.float32)], ids=str)
def test_autocast_around_backward_changes_nothing(dtype, adapters, where, backend, device):
    """The gradients are those of a backward outside of it, in every bit: dtypes are settled in forward."""
    x, w, a, b = tensors(300, dtype=dtype, adapters=adapters, device=device)

    def gradients(forward, backward):
        with torch.autocast(device, torch.bfloat16, enabled=forward):
            y = lora_linear(x, w, a, b, backend=backend)
        with torch.autocast(device, torch.bfloat16, enabled=backward):
            return torch.autograd.grad(y, [x, a, b], torch.ones_like(y))

    forward = where != "around backward"
    for ours, theirs in zip(gradients(forward, where != "around forward"), gradients(forward, False), strict=True):
        assert torch.equal(ours, theirs)


@all_ways
def test_a_whole_dropped_term_is_zero_whatever_the_adapters_hold(backend, device):
    x, w, a, b = tensors(5, k=64, r=16, dtype=torch.float16, device=device)
    with torch.no_grad():
        a.fill_(60000)  # a sum of them is inf in float16
        b[0, 0] = math.inf
    y = lora_linear(x, w, a, b, dropout_p=1.0, backend=backend)
    assert torch.equal(y, nn.functional.linear(x, w))
    for gradient in torch.autograd.grad(y.sum(), [a, b]):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@all_ways
def test_a_view_that_stands_for_its_negative(backend, device):
    x, w, a, b = tensors(6, device=device)
    negative = torch.complex(torch.zeros_like(x.detach()), -x.detach()).conj().imag
    assert negative.is_neg()
    y = lora_linear(negative, w, a, b, backend=backend)
    torch.testing.assert_close(y, lora_linear(negative.clone(), w, a, b, backend=backend))
    dy = torch.complex(torch.zeros_like(y.detach()), -y.detach()).conj().imag
    ours = torch.autograd.grad(y, [a, b], dy)
    theirs = torch.autograd.grad(lora_linear(negative, w, a, b, backend=backend), [a, b], dy.clone())
    assert all(torch.equal(o, t) for o, t in zip(ours, theirs, strict=True))


@all_ways
@pytest.mark.parametrize("number", [2, np.float32(2), np.float64(2), np.int64(2)], ids=lambda n: type(n).__name__)
def test_any_number_scales(number, backend, device):
    x, w, a, b = tensors(6, device=device)
    expected = reference.lora_linear(x, w, a, b, scaling=2.0)
    torch.testing.assert_close(lora_linear(x, w, a, b, scaling=number, backend=backend), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (dict(scaling=torch.tensor(2.0)), r"scaling must be a number, got Tensor tensor\(2\.\)\. Use float\(scaling\)"),
        (dict(scaling="2"), "scaling must be a number, got str '2'"),
        (dict(dropout_p="a"), "dropout_p must be a number, got str 'a'"),
    ],
)
def test_what_is_no_number(bad, words):
    with pytest.raises(TypeError, match=words):
        lora_linear(*tensors(6), **bad)
