"""Dequantise: a frozen weight from its storage in 4 or 8 bits to `[out, in]`, in one launch.

    nf4, fp4    W[i]    = round(code[nibble i] · absmax[i // block])                i = n · in + k
                absmax  = scale, or nested: code2[scale[b]] · absmax2[b // 256] + offset, rounded twice
    fp8         W[n, k] = round(e4m3(packed[n, k]) · scale[n // rows, k // columns])
    int8        W[n, k] = round(packed[n, k] · scale[n] · (1 / 127))                rounded twice before

    packed  4 bits: ceil(out · in / 2) bytes in any storage dtype, the even i in the high nibble; 8 bits: [out, in]
    scale   fp32, uint8 (nested), and for fp8 also bf16, fp16 or e8m0; contiguous
    code    [16], fp32; code2 [256], absmax2 [ceil(blocks / 256)] and offset [1], fp32
    W       [out, in], contiguous, bf16, fp16 or fp32: rounded once from the fp32 product

Blocks of 4-bit weights are flat: they go on from one row to the next, and the last one may be short. So the kernel
takes 4-bit storage for one row of out · in weights, and 8-bit storage for `out` rows. A program dequantises BLOCK
weights of a row. It reads one scale for each UNIT of them, which lie in one block.

A nibble is looked up by a load: the 64 bytes of the table are one line of the L1 cache, and a weight takes some ten
instructions, where a tree of selects takes 26 and would be slower than the memory. e4m3 is decoded in integers, because
sm_80 has no instruction for that.

Products are not contracted with the sum of a nested scale: `enable_fp_fusion` is off, so that W has the bits that
bitsandbytes computes.

Cost: bound by bandwidth. A weight takes 0.5 bytes (8 bits: 1), 4 / block for its scale (nested: 1 / block), and the
itemsize of W written; a FLOP a weight (int8: two).

Sources: Dettmers et al. 2023, "QLoRA", arXiv:2305.14314 (NF4, nested scales); bitsandbytes 0.50, `csrc` and
`backends/default/ops.py` (layout, order of roundings); Micikevicius et al. 2022, "FP8 formats for deep learning",
arXiv:2209.05433 (e4m3); OCP Microscaling Formats 1.0 (e8m0).
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.kernels import _launch
from lora_kernels.kernels._configs import dequantize_config
from lora_kernels.kernels._launch import Facts, Launch, Slot, allocator, facts
from lora_kernels.quantized import QuantizedWeight

__all__ = ["dequantize"]

_FOUR_BITS = ("nf4", "fp4")


@triton.jit
def _dequantize_kernel(
    w_ptr, packed_ptr, scale_ptr, code_ptr, code2_ptr, absmax2_ptr, offset_ptr, inner, stored, scale_pitch,
    FORMAT: tl.constexpr, NESTED: tl.constexpr, E8M0: tl.constexpr, SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Storage of 4 bits is one row, which may have more programs than a grid's second axis has.
    row, position = (0, tl.program_id(0)) if FORMAT == "4 bits" else (tl.program_id(0), tl.program_id(1))
    if SCALE_ROWS:
        scale_ptr += tl.cast(row // SCALE_ROWS, tl.int64) * scale_pitch
    row, position = tl.cast(row, tl.int64), position.to(tl.int64)
    first, here = position * BLOCK, tl.arange(0, BLOCK)
    # What is left of the row, a program's share at most, so that offsets within a program fit 32 bits.
    left = tl.minimum(inner - first, BLOCK).to(tl.int32)
    unit = tl.arange(0, BLOCK // UNIT)
    block = (unit * 0).to(tl.int64)
    if SCALE_COLUMNS:
        block += first // SCALE_COLUMNS + ((first % SCALE_COLUMNS).to(tl.int32) + unit * UNIT) // SCALE_COLUMNS
    scale = tl.load(scale_ptr + block, mask=unit * UNIT < left, other=0)
    if NESTED:
        # The product and the sum are rounded one after the other.
        scale = tl.load(code2_ptr + scale.to(tl.int32))
        scale *= tl.load(absmax2_ptr + block // 256, mask=unit * UNIT < left, other=0.0)
        scale += tl.load(offset_ptr)
    elif E8M0:
        scale = _e8m0(scale)
    else:
        scale = scale.to(tl.float32)
    start = row * inner + first
    if FORMAT == "4 bits":
        byte = unit[:, None] * (UNIT // 2) + tl.arange(0, UNIT // 2)[None, :]
        bytes_left = tl.minimum(stored - position * (BLOCK // 2), BLOCK // 2).to(tl.int32)
        packed_ptr += position * (BLOCK // 2)
        codes = tl.load(packed_ptr + byte, mask=byte < bytes_left, other=0).to(tl.uint32)
        w = tl.join(tl.load(code_ptr + (codes >> 4)), tl.load(code_ptr + (codes & 15))) * scale[:, None, None]
    else:
        inside = unit[:, None] * UNIT + tl.arange(0, UNIT)[None, :]
        codes = tl.load(packed_ptr + start + inside, mask=inside < left, other=0)
        if FORMAT == "fp8":
            w = _e4m3(codes) * scale[:, None]
        else:
            w = codes.to(tl.float32) * scale[:, None] * (1 / 127)
    tl.store(w_ptr + start + here, tl.reshape(w, (BLOCK,)).to(w_ptr.dtype.element_ty), mask=here < left)


@triton.jit
def _e4m3(codes):
    """Decode bytes to fp32: sign, 4 bits of exponent with a bias of 7, 3 bits of mantissa; 0x7F and 0xFF are NaN."""
    codes = codes.to(tl.int8, bitcast=True).to(tl.int32)
    # The bits of fp32 with the exponent's bias still that of e4m3: 120 too small. Subnormals come out by themselves.
    value = ((codes << 20) & -0x78100000).to(tl.float32, bitcast=True) * 1.329227995784916e36
    # 448 is the largest number
    return tl.where(tl.abs(value) > 448.0, float("nan"), value)


@triton.jit
def _e8m0(codes):
    """Decode bytes to the powers of two 2^(byte − 127), fp32; 0xFF is NaN."""
    codes = codes.to(tl.int32)
    # 2^-127 is a subnormal of fp32
    bits = tl.where(codes == 0, 0x400000, codes << 23)
    return tl.where(codes == 0xFF, 0x7FC00000, bits).to(tl.float32, bitcast=True)


def dequantize(weight: QuantizedWeight, dtype: torch.dtype, slot: Slot | None = None) -> Tensor:
    """Compute W, `[out, in]`, in `dtype`.

    Args:
        weight: The weight, on the device of the launch.
        dtype: bfloat16, float16 or float32.
        slot: A place of a plan that keeps the settled launch; all its calls must have weights of one kind.
    """
    slot = slot or Slot()
    packed, scale = _bytes(weight.packed), weight.scale
    scale = _bytes(scale) if scale.dtype == torch.float8_e8m0fnu else scale
    nested = weight.nested or (None, None, None)
    tensors = (packed, scale, weight.code, *nested[:3])
    settled = slot.settled
    if settled is None:
        kinds = tuple(map(facts, tensors))
        how = weight.format, tuple(weight.shape), weight.block, weight.scale.dtype == torch.float8_e8m0fnu
        settled = slot.keep(_settle(kinds, *how, dtype, weight.device, _launch.imagined))
    w = settled.new_w()
    settled.launch(w, *tensors)
    return w


class SettledDequantize(NamedTuple):
    """A launch for weights of one kind, and the function that allocates W."""

    launch: Launch
    new_w: Any


@functools.lru_cache(maxsize=4096)
def _settle(
    tensors: tuple[Facts | None, ...], format: str, shape: tuple[int, int], block: int | tuple[int, int], e8m0: bool,
    dtype: torch.dtype, device: torch.device, imagined: object,
) -> SettledDequantize:  # fmt: skip
    four_bits = format in _FOUR_BITS
    # rows, and weights of a row, as the kernel takes them; rows and columns of a block
    rows, inner = (1, shape[0] * shape[1]) if four_bits else shape
    block_rows, columns = (1, block) if four_bits else block
    pitch = triton.cdiv(inner, columns)
    config = dequantize_config(inner, columns, four_bits)
    across = triton.cdiv(inner, config.block)
    stored = triton.cdiv(inner, 2) if four_bits else inner
    launch = Launch(
        _dequantize_kernel, (across,) if four_bits else (rows, across), (inner, stored, pitch),
        dict(
            FORMAT="4 bits" if four_bits else format, NESTED=tensors[-1] is not None, E8M0=e8m0,
            SCALE_ROWS=block_rows if block_rows < rows else 0, SCALE_COLUMNS=columns if columns < inner else 0,
            UNIT=config.unit, BLOCK=config.block,
        ),
        dict(num_warps=config.num_warps, num_stages=1, enable_fp_fusion=False), device,
    )  # fmt: skip
    return SettledDequantize(launch, allocator(shape, dtype, device))


def _bytes(t: Tensor) -> Tensor:
    """View contiguous storage as bytes; int8 stays as it is."""
    return t if t.dtype in (torch.uint8, torch.int8) else t.detach().view(torch.uint8)
