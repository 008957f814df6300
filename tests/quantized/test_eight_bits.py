"""FP8 weights have the values that transformers makes of them, int8 weights those of bitsandbytes."""

import itertools

import pytest
import torch
from oracles import stored

from lora_kernels import reference
from lora_kernels.constants import DTYPES
from lora_kernels.quantized import QuantizedWeight

BLOCKS = [((128, 384), (128, 128)), ((48, 96), (16, 32)), ((16, 5000), (8, 1000))]
RAGGED = [((130, 300), (128, 128)), ((33, 101), (16, 32)), ((7, 5), (128, 128)), ((10, 4500), (3, 7))]


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers.integrations.finegrained_fp8")


def draw(shape, grid, seed=0):
    """Bytes of every value that is a number, and scales."""
    generator = torch.Generator().manual_seed(seed)
    finite = torch.arange(256, dtype=torch.uint8)
    finite = finite[finite & 0x7F != 0x7F]
    codes = finite[torch.randint(0, len(finite), shape, generator=generator)]
    return codes.view(torch.float8_e4m3fn), torch.rand(grid, generator=generator) / 100 + 1e-4


def check(weight, expected, device):
    """Hold reference, operators and the kernel to W in fp32, rounded once to each dtype."""
    assert expected.dtype == torch.float32
    on_device = weight.with_tensors([t.to(device) for t in weight.tensors()])
    for dtype in DTYPES.values():
        rounded = expected.to(dtype)
        assert torch.equal(reference.dequantize(weight, dtype), rounded), dtype
        assert torch.equal(weight.dequantize(dtype, "torch"), rounded), dtype
        assert torch.equal(on_device.dequantize(dtype, "triton").cpu(), rounded), dtype


@pytest.mark.parametrize(("shape", "block"), BLOCKS + RAGGED, ids=str)
def test_blocks(shape, block, transformers, device):
    codes, scale = draw(shape, (-(-shape[0] // block[0]), -(-shape[1] // block[1])))
    weight = QuantizedWeight.from_fp8(codes, scale, block)
    # what `FP8Linear` has in backward, here in fp32, where neither the scale nor the weight is rounded before
    expected = transformers._dequantize_fp8_weight(codes, scale, list(block), torch.float32)
    check(weight, expected, device)


@pytest.mark.parametrize(("shape", "block"), BLOCKS, ids=str)
def test_blocks_are_those_of_a_checkpoint_that_is_dequantised_as_it_is_loaded(shape, block, transformers):
    codes, scale = draw(shape, (shape[0] // block[0], shape[1] // block[1]))
    weight, read = QuantizedWeight.from_fp8(codes, scale, block), object.__new__(transformers.Fp8Dequantize)
    for dtype in DTYPES.values():
        expected = read._dequantize_one(codes, scale, output_dtype=dtype)
        assert torch.equal(weight.dequantize(dtype, "torch"), expected)
        assert torch.equal(weight.dequantize(dtype, "triton"), expected)


@pytest.mark.parametrize("shape", [(48, 96), (33, 101), (3, 4500)], ids=str)
@pytest.mark.parametrize("form", ["tensor", "one number", "rows", "column of rows"])
def test_rows_and_tensors(shape, form, transformers, device):
    grid = {"tensor": (), "one number": (1,), "rows": shape[:1], "column of rows": (shape[0], 1)}[form]
    codes, scale = draw(shape, grid)
    weight = QuantizedWeight.from_fp8(codes, scale)
    assert weight.block == (shape if form in ("tensor", "one number") else (1, shape[1]))
    across = scale[:, None] if form == "rows" else scale
    check(weight, transformers._dequantize_fp8_weight(codes, across, None, torch.float32), device)


def test_an_fp8_linear_of_transformers(transformers):
    layer = transformers.FP8Linear(300, 200, block_size=(128, 128)).requires_grad_(False)
    codes, scale = draw((200, 300), (2, 3))
    layer.weight.copy_(codes), layer.weight_scale_inv.copy_(scale)
    for block in (None, layer.block_size):
        weight = QuantizedWeight.from_fp8(layer.weight, layer.weight_scale_inv, block)
        assert weight.packed is layer.weight
        assert weight.scale is layer.weight_scale_inv
        assert weight.block == (128, 128)
    assert weight.dequantize().dtype == torch.bfloat16


@pytest.mark.parametrize("scales", [torch.bfloat16, torch.float16, torch.float8_e8m0fnu], ids=str)
@pytest.mark.parametrize("block", [(16, 32), (33, 101), (1, 101)])
def test_scales_of_other_dtypes(scales, block, device):
    weight = stored.draw("fp8", (33, 101), block, scales=scales)
    expected = reference.dequantize(weight, torch.float32)
    grid = weight.scale.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:33, :101]
    assert stored.same(expected, weight.packed.float() * grid)
    on_device = weight.with_tensors([t.to(device) for t in weight.tensors()])
    for dtype in DTYPES.values():
        assert stored.same(weight.dequantize(dtype, "torch"), expected.to(dtype))
        assert stored.same(on_device.dequantize(dtype, "triton").cpu(), expected.to(dtype))


def test_every_byte(device):
    """e4m3 has two NaN and 14 subnormals; E8M0 a NaN, and 2^-127, which is subnormal in fp32."""
    every = torch.arange(256, dtype=torch.uint8)
    codes = every.view(torch.float8_e4m3fn).view(1, 256)
    one = QuantizedWeight.from_fp8(codes, torch.ones(()))
    assert codes.float().isnan().sum() == 2
    powers = QuantizedWeight.from_fp8(torch.ones(256, 16).to(torch.float8_e4m3fn), every.view(torch.float8_e8m0fnu))
    assert powers.dequantize(torch.float32, "torch")[0, 0] == 2.0**-127
    for weight in (one, powers):
        expected = reference.dequantize(weight, torch.float32)
        on_device = weight.with_tensors([t.to(device) for t in weight.tensors()])
        assert stored.same(weight.dequantize(torch.float32, "torch"), expected)
        assert stored.same(on_device.dequantize(torch.float32, "triton").cpu(), expected)
    assert expected[-1].isnan().all()


@pytest.mark.parametrize("shape", [(48, 96), (33, 101), (3, 4500), (1, 1)], ids=str)
def test_int8_rows(shape, device):
    bnb = pytest.importorskip("bitsandbytes")
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    greatest = torch.rand(shape[0], generator=generator) * 3
    weight = QuantizedWeight.from_int8(codes, greatest)
    check(weight, bnb.functional.int8_vectorwise_dequant(codes, greatest), device)


def test_parts_of_operators_join(monkeypatch):
    from lora_kernels.quantized import operators

    for part, (format, block) in itertools.product(
        (1, 100, 5000), (("fp8", (7, 20)), ("fp8", (1, 101)), ("int8", (1, 101)))
    ):
        monkeypatch.setitem(operators._PART, "cpu", part)
        weight = stored.draw(format, (33, 101), block)
        assert stored.same(weight.dequantize(torch.float16, "torch"), reference.dequantize(weight, torch.float16))
