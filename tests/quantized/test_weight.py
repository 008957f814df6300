"""`QuantizedWeight`: frozen, its tensors the very ones that it was given, and each part checked once, by name."""

import copy
import dataclasses
import importlib
import math

import pytest
import torch
from emulator import drawn

from lora_kernels import reference
from lora_kernels.quantized import Nested, QuantizedWeight

NF4 = dict(shape=(33, 101), block=64, nested=True)


def nf4(**changes):
    """A weight with changed fields."""
    return dataclasses.replace(drawn.draw("nf4", **NF4), **changes)


def test_it_is_frozen_and_equal_to_itself_alone():
    weight = nf4()
    with pytest.raises(dataclasses.FrozenInstanceError):
        weight.packed = torch.empty(3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        weight.more = 3
    assert weight == weight
    assert weight != nf4()
    assert len({weight, weight, nf4()}) == 2
    assert (weight.out_features, weight.in_features, weight.shape) == (33, 101, (33, 101))
    assert weight.requires_grad is False
    assert weight.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("weight", "count"),
    [(nf4(), 6), (drawn.draw("fp4", (4, 6), 2), 3), (drawn.draw("fp8", (4, 6), (2, 2)), 2)],
    ids=["nested", "fp4", "fp8"],
)
def test_tensors_in_a_fixed_order_make_the_weight_again(weight, count):
    tensors = weight.tensors()
    assert len(tensors) == count
    assert tensors[0] is weight.packed
    assert tensors[1] is weight.scale
    again = weight.with_tensors(tensors)
    assert all(left is right for left, right in zip(again.tensors(), tensors, strict=True))
    for field in ("format", "shape", "dtype", "block"):
        assert getattr(again, field) == getattr(weight, field)
    assert drawn.same(again.dequantize(), weight.dequantize())
    assert not weight.with_tensors([torch.zeros_like(t) for t in tensors]).dequantize().any()
    assert weight.dequantize().nan_to_num().any()
    assert drawn.same(copy.deepcopy(weight).dequantize(), weight.dequantize())


def test_a_parameter_stays_that_parameter():
    kept = torch.nn.Parameter(nf4().packed, requires_grad=False)
    assert nf4(packed=kept).packed is kept
    assert nf4(packed=kept).tensors()[0] is kept


def test_its_dtype_is_the_default():
    for dtype in (torch.float16, torch.bfloat16):
        weight = nf4(dtype=dtype)
        assert weight.dequantize().dtype == dtype
        assert reference.dequantize(weight).dtype == dtype
        assert torch.equal(weight.dequantize(), weight.dequantize(dtype, "torch"))
    assert weight.dequantize(torch.float64).dtype == torch.float64


def test_nf4_in_parts_has_the_values_of_the_paper():
    packed = torch.arange(256, dtype=torch.uint8)
    weight = QuantizedWeight.nf4(packed, torch.ones(8), shape=(4, 128))
    values = weight.dequantize(torch.float32, "torch").view(-1)
    assert values[0] == -1
    assert values[-1] == 1
    assert values.unique().numel() == 16
    # 0x1F: the first weight is in the high nibble
    assert values[2 * 0x1F] == values.unique()[1]
    assert values[2 * 0x1F + 1] == 1


def test_an_empty_weight():
    for shape in ((0, 8), (8, 0)):
        weight = QuantizedWeight.nf4(torch.empty(0, dtype=torch.uint8), torch.empty(0), shape=shape)
        eight = QuantizedWeight.from_fp8(torch.empty(shape, dtype=torch.float8_e4m3fn), torch.ones(()))
        for one in (weight, eight):
            assert one.dequantize().shape == shape
            assert reference.dequantize(one).shape == shape


def test_a_backend_that_cannot_is_named():
    with pytest.raises(ValueError, match=r"QuantizedWeight\.dequantize: backend='cuda' is not one of"):
        nf4().dequantize(backend="cuda")
    with pytest.raises(TypeError, match=r'QuantizedWeight\.dequantize: backend="triton" has no float64'):
        nf4().dequantize(torch.float64, "triton")


def nested(**changes):
    return nf4().nested._replace(**changes)


def fp8(**changes):
    return dataclasses.replace(drawn.draw("fp8", (33, 101), (16, 32)), **changes)


BYTES = torch.zeros(1667, dtype=torch.uint8)
WRONG = {
    "format": (lambda: nf4(format="int4"), ValueError, "format='int4' is not one of: nf4, fp4, fp8, int8"),
    "dtype": (lambda: nf4(dtype=torch.int8), TypeError, r"dtype is torch\.int8"),
    "three sizes": (lambda: nf4(shape=(3, 11, 101)), ValueError, r"shape must be \(out_features, in_features\)"),
    "no tensor": (lambda: nf4(packed=[1, 2]), TypeError, "packed must be a tensor, got list"),
    "too few bytes": (lambda: nf4(packed=BYTES[:-1].clone()), ValueError, "packed has 1666 bytes and must have 1667"),
    "too many bytes": (lambda: nf4(packed=torch.cat((BYTES, BYTES[:1]))), ValueError, "has 1668 bytes and must have 1667"),
    "storage": (lambda: nf4(packed=BYTES.long()), TypeError, r"packed has dtype torch\.int64; supported: uint8, int8"),
    "gaps": (lambda: nf4(packed=torch.zeros(1667, 2, dtype=torch.uint8)[:, 0]), ValueError, "packed must be contiguous"),
    "trained": (lambda: nf4(packed=torch.zeros(1667).half().requires_grad_()), ValueError, "packed requires grad"),
    "a trained scale": (lambda: fp8(scale=torch.ones(3, 4, requires_grad=True)), ValueError, r"scale \(weight_scale_inv\) requires grad"),
    "another device": (lambda: nf4(code=torch.zeros(16, device="meta")), ValueError, "packed is on cpu, code on meta"),
    "odd blocks": (lambda: nf4(block=63), ValueError, "block=63 must be an even number"),
    "two-sided blocks": (lambda: nf4(block=(1, 64)), TypeError, r"block must be one int for nf4, got \(1, 64\)"),
    "no code": (lambda: nf4(code=None), ValueError, "nf4 needs code, the 16 values"),
    "short code": (lambda: nf4(code=torch.zeros(15)), ValueError, "code has 15 elements and must have 16"),
    "half code": (lambda: nf4(code=torch.zeros(16).half()), TypeError, r"code has dtype torch\.float16; it must be torch\.float32"),
    "absmax": (lambda: nf4(nested=None), TypeError, r"scale \(absmax\) has dtype torch\.uint8; it must be torch\.float32"),
    "blocks": (lambda: nf4(block=128), ValueError, r"scale \(absmax\) has 53 elements and must have 27"),
    "nested blocks": (lambda: nf4(nested=nested(blocksize=64)), ValueError, r"nested\.blocksize is 64; supported: 256"),
    "nested code": (lambda: nf4(nested=nested(code=torch.zeros(16))), ValueError, r"nested\.code has 16 elements and must have 256"),
    "nested absmax": (lambda: nf4(nested=nested(absmax=torch.zeros(2))), ValueError, r"nested\.absmax has 2 elements and must have 1"),
    "nested offset": (lambda: nf4(nested=nested(offset=0.5)), TypeError, r"nested\.offset must be a tensor, got float"),
    "fp8 storage": (lambda: fp8(packed=torch.zeros(33, 101)), TypeError, r"packed \(weight\) has dtype torch\.float32; fp8 is stored in float8_e4m3fn"),
    "fp8 shape": (lambda: fp8(shape=(101, 33)), ValueError, r"packed \(weight\) is \(33, 101\) and shape is \(101, 33\)"),
    "fp8 scale": (lambda: fp8(scale=torch.ones(3, 4).double()), TypeError, r"scale \(weight_scale_inv\) has dtype torch\.float64; supported: float32, bfloat16"),
    "fp8 grid": (lambda: fp8(scale=torch.ones(4, 3)), ValueError, r"scale \(weight_scale_inv\) is \(4, 3\) but must be \(3, 4\)"),
    "fp8 code": (lambda: fp8(code=torch.zeros(16)), ValueError, "fp8 has neither code nor nested"),
    "fp8 block": (lambda: fp8(block=16), TypeError, r"block must be \(rows, columns\) for fp8, got 16"),
    "no block": (lambda: fp8(block=(0, 32)), ValueError, r"block=\(0, 32\) must be at least \(1, 1\)"),
    "e5m2": (
        lambda: QuantizedWeight.from_fp8(torch.zeros(4, 4).to(torch.float8_e5m2), torch.ones(())),
        TypeError, r"packed \(weight\) has dtype torch\.float8_e5m2; fp8 is stored in float8_e4m3fn",
    ),
    "which blocks": (
        lambda: QuantizedWeight.from_fp8(fp8().packed, torch.ones(3, 4)),
        ValueError, r"weight_scale_inv is \(3, 4\), .* name the blocks by block=",
    ),
    "fp8 in three dims": (
        lambda: QuantizedWeight.from_fp8(fp8().packed[None], torch.ones(())), ValueError, r"weight must be \[out, in\]",
    ),
    "fp8 without a scale": (lambda: QuantizedWeight.from_fp8(fp8().packed, 3.0), TypeError, "must be tensors, got Tensor and float"),
    "int8 scale": (
        lambda: QuantizedWeight.from_int8(torch.zeros(4, 6, dtype=torch.int8), torch.ones(6)),
        ValueError, r"scale \(SCB\) is \(6,\) but must be \(4, 1\)",
    ),
    "int8 in fp16": (
        lambda: QuantizedWeight.from_int8(torch.zeros(4, 6, dtype=torch.int8), torch.ones(4).half()),
        TypeError, r"scale \(SCB\) has dtype torch\.float16; supported: float32",
    ),
    "int8 in one dim": (
        lambda: QuantizedWeight.from_int8(torch.zeros(6, dtype=torch.int8), torch.ones(6)),
        ValueError, r"CB must be \[out, in\]",
    ),
    "int8 by None": (
        lambda: QuantizedWeight.from_int8(torch.zeros(4, 6, dtype=torch.int8), None), TypeError, "CB and SCB must be tensors",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_named(case):
    make, error, words = WRONG[case]
    with pytest.raises(error, match=words):
        make()


def test_a_tensor_that_wraps_others_is_refused():
    from torch.testing._internal.two_tensor import TwoTensor

    packed = TwoTensor(nf4().packed, nf4().packed)
    with pytest.raises(TypeError, match="packed is a TwoTensor, which wraps other tensors"):
        nf4(packed=packed)


def test_fake_tensors_are_taken():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        weight = nf4()
        fake = weight.with_tensors([mode.from_tensor(t) for t in weight.tensors()])
        assert fake.dequantize(torch.bfloat16, "torch").shape == (33, 101)


# by format: weights, of which the last program takes a part; blocks
FAR = {
    "nf4": ((3, 2_863_311_632), 64),
    "nf4 nested": ((3, 2_863_311_632), 4096),
    "fp8": ((3, 1_431_655_765), (2, 1 << 30)),
}


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="moves the programs of Triton's interpreter, which a GPU bypasses"
)
@pytest.mark.parametrize("kind", FAR)
def test_offsets_beyond_32_bits(kind, monkeypatch):
    """The last program of a weight of 2^32 elements and more, of which a few pages exist."""
    from oracles import sanitizer
    from oracles.memory import virtual
    from triton.runtime.interpreter import interpreter_builder

    def far(numel, dtype):
        return virtual(1, 1, -(-numel * dtype.itemsize // 4), 1).view(-1).view(dtype)[:numel]

    ((out, inner), block), numel = FAR[kind], math.prod(FAR[kind][0])
    if kind == "fp8":
        packed, scale = far(numel, torch.float8_e4m3fn), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        weight = QuantizedWeight.from_fp8(packed.view(out, inner), scale, block)
        tail = packed[-100:]
        tail.copy_(torch.arange(100) % 8)
        expected = 4.0 * (torch.arange(100) % 8)
    else:
        packed, blocks = far(-(-numel // 2), torch.uint8), -(-numel // block)
        inner_scales = far(-(-blocks // 256), torch.float32)
        code = torch.arange(256).float()
        parts = Nested(code, inner_scales, torch.tensor(1.0)) if kind == "nf4 nested" else None
        absmax = far(blocks, torch.uint8 if parts else torch.float32)
        weight = QuantizedWeight.nf4(
            packed, absmax, shape=(out, inner), blocksize=block, nested=parts, code=torch.arange(16).float()
        )
        # the last 100 weights, in two blocks at most
        packed[-50:], absmax[-3:], inner_scales[-1] = 0x37, 5, 10.0
        expected = torch.tensor([3.0, 7.0]).repeat(50) * (5 if parts is None else 51)
    monkeypatch.setattr(sanitizer.state, "on", False)
    kernel = importlib.import_module("lora_kernels.kernels.dequantize")
    settled, w = kernel._settle, far(numel, torch.float16).view(out, inner)

    def last(*arguments):
        """Settle the launch, but of its last program alone, and into the W that is mapped here."""
        found = settled(*arguments)
        at = tuple(n - 1 for n in found.launch.grid)
        monkeypatch.setattr(
            interpreter_builder, "set_grid_idx", lambda *_: setattr(interpreter_builder, "grid_idx", at)
        )
        found.launch.grid = (1, 1, 1)
        return found._replace(new_w=lambda: w)

    monkeypatch.setattr(kernel, "_settle", last)
    kernel.dequantize(weight, torch.float16)
    assert torch.equal(w.view(-1)[-100:].float(), expected)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda p, s: QuantizedWeight.nf4([1], s, shape=(8, 16)), TypeError, "packed must be a tensor, got list"),
        (lambda p, s: QuantizedWeight.nf4(p, s, shape=5), TypeError, r"shape must be \(out_features, in_features\), got 5"),
        (lambda p, s: QuantizedWeight.nf4(p, s, shape=None), TypeError, "shape must be .*, got None"),
        (lambda p, s: QuantizedWeight.nf4(p, s, shape=(8.0, 16)), ValueError, r"shape must be .*, got \(8.0, 16\)"),
        (lambda p, s: QuantizedWeight.nf4(p, s.byte(), shape=(8, 16), nested=(s, s, s)), TypeError, "got tuple"),
        (lambda p, s: QuantizedWeight.from_fp8(fp8_zeros(), s, block=5), TypeError, r"must be \(rows, columns\).*got 5"),
        (lambda p, s: QuantizedWeight.from_fp8(fp8_zeros(), s, block=(4, 4)), ValueError, r"weight_scale_inv\) is \(2,"),
        (lambda p, s: QuantizedWeight.from_int8(fp8_zeros().to(torch.int8), s), ValueError, r"\(SCB\) is \(2,\)"),
        (lambda p, s: QuantizedWeight.nf4(p, s, shape=(8, 16)).dequantize(torch.int32), TypeError, "dtype is torch.int32"),
        (lambda p, s: QuantizedWeight.nf4(p, s, shape=(8, 16)).dequantize("bf16"), TypeError, "dtype is 'bf16'"),
        (lambda p, s: QuantizedWeight.nf4(p, s, shape=(8, 16)).dequantize(None, "reference"), ValueError,
         "'reference' is not one of: auto, triton, torch[.]"),
    ],
)  # fmt: skip
def test_what_no_constructor_can_read_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call(torch.zeros(64, dtype=torch.uint8), torch.ones(2))


def fp8_zeros():
    return torch.zeros(8, 16).to(torch.float8_e4m3fn)


def test_the_table_of_nf4_serves_calls_after_inference_mode():
    """One table for all weights would stay an inference tensor, which backward cannot save."""
    parts = torch.zeros(64, dtype=torch.uint8), torch.ones(2)
    with torch.inference_mode():
        QuantizedWeight.nf4(*parts, shape=(8, 16))
    assert not QuantizedWeight.nf4(*parts, shape=(8, 16)).code.is_inference()
