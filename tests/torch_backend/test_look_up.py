"""4-bit weights by operators: on one thread and on several, whole and in parts, the bits are the reference's."""

import itertools

import pytest
import torch

from lora_kernels import reference, torch_backend
from lora_kernels.quantized import QuantizedWeight, operators
from lora_kernels.verify.stored import quantise

# one scale, short last blocks, an odd number of weights, more than 256 scales, several parts
SHAPES = [(1, 1), (5, 7), (3, 100), (96, 64), (300, 129)]


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("part", [operators._PART["cpu"], 512])
def test_the_bits_are_the_reference_s(threads, part, monkeypatch):
    monkeypatch.setitem(operators._PART, "cpu", part)
    called = []
    gather = torch.gather
    monkeypatch.setattr(torch, "gather", lambda *args, **named: called.append(1) or gather(*args, **named))
    for shape, kind, nested, dtype in itertools.product(
        SHAPES, ("nf4", "fp4"), (False, True), (torch.float32, torch.bfloat16, torch.float16)
    ):
        weight = quantise(torch.randn(shape, generator=torch.Generator().manual_seed(1)), kind, nested=nested)
        expected = reference.dequantize(weight, dtype)
        actual = torch_backend.dequantize(weight, dtype)
        assert actual.dtype == dtype
        assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))
    assert bool(called) == (threads > 1)


def test_bytes_after_the_last_weight_are_left(threads):
    weight = quantise(torch.randn(5, 6, generator=torch.Generator().manual_seed(0)), "nf4", nested=False)
    packed = torch.cat((weight.packed.view(-1), weight.packed.new_full((1,), 255))).view(torch.float32)
    wide = QuantizedWeight("nf4", packed, weight.shape, weight.dtype, weight.scale, weight.block, weight.code)
    assert torch.equal(torch_backend.dequantize(wide, torch.float32), torch_backend.dequantize(weight, torch.float32))
