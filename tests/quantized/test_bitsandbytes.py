"""4-bit weights have the bits that bitsandbytes makes of them: reference, operators, and the kernel, interpreted."""

import itertools

import pytest
import torch
from torch import nn

from lora_kernels import reference
from lora_kernels.constants import DTYPES
from lora_kernels.quantized import QuantizedWeight

bnb = pytest.importorskip("bitsandbytes")

# Blocks that go on from row to row, short last blocks, an odd number of weights, one row, one column, more than a
# program's 4096 weights.
SHAPES = [(64, 128), (7, 48), (33, 101), (130, 66), (1, 96), (96, 1), (5, 7), (1, 1)]
STORAGE = [torch.uint8, torch.bfloat16, torch.float16, torch.float32]
STATES = list(itertools.product(("nf4", "fp4"), (False, True), (32, 64, 128, 4096)))


@pytest.fixture(autouse=True, scope="module")
def eager():
    """bitsandbytes compiles its operators for odd shapes, once for each kind."""
    with torch.compiler.set_stance("force_eager"):
        yield


def quantise(format, nested, block, shape, dtype=torch.float32, storage=torch.uint8):
    """A weight as bitsandbytes quantises it on a CPU, or None where its storage has no such number of bytes."""
    if (-(-shape[0] * shape[1] // 2)) % storage.itemsize:
        return None
    generator = torch.Generator().manual_seed(shape[0] + block)
    values = torch.randn(shape, generator=generator).to(dtype)
    packed, state = bnb.functional.quantize_4bit(
        values, blocksize=block, compress_statistics=nested, quant_type=format, quant_storage=storage
    )
    packed = bnb.nn.Params4bit(packed, requires_grad=False, quant_state=state, bnb_quantized=True)
    return QuantizedWeight.from_bitsandbytes(packed)


def theirs(weight, dtype):
    """What bitsandbytes makes of a weight, in a dtype."""
    state = weight.packed.quant_state
    state.dtype = dtype
    # a packed weight of one byte is taken for a transposed one
    return bnb.functional.dequantize_4bit(weight.packed.data, state).reshape(weight.shape)


@pytest.mark.parametrize(("format", "nested", "block"), STATES)
def test_formula_and_operators(format, nested, block):
    compared = 0
    for shape, dtype, storage in itertools.product(SHAPES, DTYPES.values(), STORAGE):
        weight = quantise(format, nested, block, shape, dtype, storage)
        if weight is None:
            continue
        assert (weight.format, weight.dtype, weight.packed.dtype) == (format, dtype, storage)
        for out in DTYPES.values():
            expected = theirs(weight, out)
            for actual in (reference.dequantize(weight, out), weight.dequantize(out, "torch")):
                assert actual.shape == shape
                assert actual.is_contiguous()
                assert torch.equal(actual, expected), (shape, dtype, storage, out)
                compared += 1
    assert compared > 200


@pytest.mark.parametrize("storage", [torch.uint8, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize(("format", "nested", "block"), STATES)
def test_kernel(format, nested, block, storage, device):
    for shape, dtype in itertools.product(SHAPES if storage == torch.uint8 else [(64, 128), (8, 60)], DTYPES.values()):
        weight = quantise(format, nested, block, shape, torch.bfloat16, storage)
        expected = theirs(weight, dtype)
        on_device = weight.with_tensors([t.to(device) for t in weight.tensors()])
        assert torch.equal(on_device.dequantize(dtype, "triton").cpu(), expected), (shape, dtype)


@pytest.mark.parametrize("part", [2, 64, 100, 1 << 12])
def test_parts_of_operators_join(part, monkeypatch):
    from lora_kernels.quantized import operators

    monkeypatch.setitem(operators._PART, "cpu", part)
    for nested, shape, dtype in itertools.product((False, True), ((33, 101), (70, 64)), DTYPES.values()):
        weight = quantise("nf4", nested, 64, shape)
        assert torch.equal(weight.dequantize(dtype, "torch"), theirs(weight, dtype))


@pytest.mark.parametrize("threads", [1, 2])
def test_bytes_that_divide_by_none_of_the_threads(threads):
    """A gather has a thread for a row of bytes, and the number of bytes may be odd."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for shape, nested, dtype in itertools.product(
            ((1, 2), (3, 2), (127, 2), (64, 96)), (False, True), DTYPES.values()
        ):
            weight = quantise("fp4", nested, 64, shape)
            assert torch.equal(weight.dequantize(dtype, "torch"), theirs(weight, dtype))
    finally:
        torch.set_num_threads(before)


def linear(**changes):
    """A `Linear4bit` with its weight quantised."""
    more = dict(bias=False, compute_dtype=torch.bfloat16, quant_type="nf4") | changes
    return bnb.nn.Linear4bit(96, 80, **more).to("cpu")


def test_a_layer_is_taken_as_it_is():
    layer = linear()
    assert layer.weight.quant_state is None or layer.weight.bnb_quantized
    weight = QuantizedWeight.from_bitsandbytes(layer)
    assert weight.packed is layer.weight
    assert weight.scale is layer.weight.quant_state.absmax
    assert weight.nested.offset is layer.weight.quant_state.offset
    assert (weight.shape, weight.out_features, weight.in_features) == ((80, 96), 80, 96)
    assert (weight.format, weight.block, weight.dtype) == ("nf4", 64, torch.float32)
    assert torch.equal(weight.dequantize(), bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state))


def test_a_layer_under_fsdp1_has_the_state():
    layer = linear()
    expected, state = QuantizedWeight.from_bitsandbytes(layer).dequantize(), layer.weight.quant_state
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    assert layer.quant_state is state
    assert torch.equal(QuantizedWeight.from_bitsandbytes(layer).dequantize(), expected)


def of_state(**changes):
    def change(layer):
        for name, value in changes.items():
            setattr(layer.weight.quant_state, name, value)
        return layer

    return change


def not_yet(layer):
    return bnb.nn.Linear4bit(96, 80)


def of_old(layer):
    layer.weight.quant_state = [layer.weight.quant_state.absmax, (80, 96), torch.float16, 64, None, "nf4"]
    return layer


def trained(layer):
    layer.weight = nn.Parameter(layer.weight.data.float(), requires_grad=True)
    return layer


def other_nesting(layer):
    layer.weight.quant_state.state2.blocksize = 128
    return layer


def half_nested(layer):
    layer.weight.quant_state.state2.dtype = torch.float16
    return layer


def of_int8(layer):
    return bnb.nn.Linear8bitLt(96, 80, has_fp16_weights=False).to("cpu")


REFUSED = {
    "not quantised yet": (not_yet, ValueError, r"quant_state is None: the weight is not quantised yet"),
    "a list": (of_old, ValueError, r"quant_state is a list, as bitsandbytes before 0\.43 wrote"),
    "packed for a CPU": (of_state(packing_format_for_cpu=True), ValueError, "packing_format_for_cpu"),
    "[in, out]": (of_state(shape=torch.Size((96, 80))), ValueError, r"shape is \(96, 80\) and the layer's .* \(80, 96\)"),
    "no shape": (of_state(shape=None), ValueError, r"quant_state\.shape is None"),
    "nested blocks": (other_nesting, ValueError, r"nested\.blocksize is 128; supported: 256"),
    "nested half": (half_nested, ValueError, r"state2\.dtype is torch\.float16"),
    "trained": (trained, ValueError, r"packed requires grad; a quantised weight is frozen"),
    "int8": (of_int8, TypeError, r"an LLM\.int8 weight, .*from_int8\(CB, SCB\)"),
    "no layer": (lambda layer: 3, TypeError, "expected a Linear4bit or its weight, got int"),
    "another type": (of_state(quant_type="int4"), ValueError, "format='int4' is not one of: nf4, fp4"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(case):
    spoil, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        QuantizedWeight.from_bitsandbytes(spoil(linear()))
