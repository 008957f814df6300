"""Quantise weights in plain PyTorch, for `verify` and `bench`: nearest values, in the formats of `QuantizedWeight`."""

import torch
from torch import Tensor

from lora_kernels.quantized import Nested, QuantizedWeight
from lora_kernels.quantized.sources import nf4_code

__all__ = ["FORMATS", "changeable", "quantise", "write"]

# bitsandbytes' values of FP4 (functional.py, get_4bit_type): a sign bit, and 12 times the magnitude of the other three.
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
# the largest e4m3 number
_E4M3_MAX = 448.0
_BLOCK, _FP8_BLOCK = 64, 128
FORMATS = ("nf4", "fp4", "fp8", "int8")


def quantise(weight: Tensor, kind: str, *, nested: bool = True, block: int | None = None) -> QuantizedWeight:
    """Quantise W `[out, in]` to the nearest stored values.

    Args:
        weight: A matrix.
        kind: One of `FORMATS`.
        nested: Whether the scales of 4 bits are quantised as well, as QLoRA's double quantisation does.
        block: Weights for a scale of 4 bits, 64 if None; the rows and columns for a scale of fp8, 128 if None.
    """
    w = weight.detach().float()
    if kind == "fp8":
        return _fp8(w, weight.dtype, block or _FP8_BLOCK)
    if kind == "int8":
        most = w.abs().amax(1).clamp_(min=torch.finfo(torch.float32).tiny)
        return QuantizedWeight.from_int8((w * (127 / most[:, None])).round_().to(torch.int8), most, weight.dtype)
    block = block or _BLOCK
    code = nf4_code(w.device).clone() if kind == "nf4" else _fp4_code(w.device)
    scale, inner = _absmax(w.view(-1), block), None
    if nested:
        scale, inner = _nest(scale)
    absmax = scale if inner is None else inner.code[scale.long()] * _each(inner.absmax, 256, scale) + inner.offset
    # a block of zeros has the scale 0, and any code
    shares = w.view(-1) / _each(absmax, block, w).clamp(min=torch.finfo(torch.float32).tiny)
    nibbles = _nearest(code, shares)
    nibbles = torch.cat((nibbles, nibbles.new_zeros(nibbles.numel() % 2)))
    packed = (nibbles[::2] * 16 + nibbles[1::2]).to(torch.uint8).view(-1, 1)
    return QuantizedWeight(kind, packed, weight.shape, weight.dtype, scale, block, code, inner)


def changeable(weight: QuantizedWeight) -> list[Tensor]:
    """Return the tensors that `write` changes."""
    inner = () if weight.nested is None else (weight.nested.absmax, weight.nested.offset)
    return [weight.packed, *(inner if inner else (weight.scale,))]


def write(weight: QuantizedWeight, w: Tensor) -> None:
    """Write a matrix of zeros and ones, which all formats hold exactly, into a stored weight."""
    if weight.code is None:
        weight.packed.copy_(w.to(weight.packed.dtype))
        # int8 is divided by 127
        weight.scale.fill_(127 if weight.format == "int8" else 1)
        return
    zero, one = (int((weight.code == value).nonzero()[0]) for value in (0.0, 1.0))
    nibbles = torch.where(w.reshape(-1) == 1, one, zero)
    nibbles = torch.cat((nibbles, nibbles.new_zeros(nibbles.numel() % 2)))
    weight.packed.view(-1).view(torch.uint8)[: len(nibbles) // 2] = (nibbles[::2] * 16 + nibbles[1::2]).to(torch.uint8)
    if weight.nested is None:
        weight.scale.fill_(1)
    else:
        weight.nested.absmax.zero_()
        weight.nested.offset.fill_(1)


def _fp8(w: Tensor, dtype: torch.dtype, block: int) -> QuantizedWeight:
    """Quantise to e4m3 with a scale for each square block."""
    (out_features, in_features), sides = w.shape, [-(-size // block) for size in w.shape]
    padded = w.new_zeros(sides[0] * block, sides[1] * block)
    padded[:out_features, :in_features] = w
    most = padded.view(sides[0], block, sides[1], block).abs().amax((1, 3))
    scale = (most / _E4M3_MAX).clamp_(min=torch.finfo(torch.float32).tiny)
    each = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)[:out_features, :in_features]
    return QuantizedWeight.from_fp8((w / each).to(torch.float8_e4m3fn), scale, (block, block), dtype)


def _fp4_code(device: torch.device) -> Tensor:
    magnitudes = torch.tensor(_FP4, device=device) / max(_FP4)
    return torch.cat((magnitudes, -magnitudes))


def _absmax(flat: Tensor, block: int) -> Tensor:
    """Return the greatest absolute value of each block; the last block may be short."""
    short = torch.cat((flat, flat.new_zeros(-flat.numel() % block)))
    return short.view(-1, block).abs().amax(1)


def _each(scale: Tensor, block: int, like: Tensor) -> Tensor:
    """Return the scale of each element."""
    return scale.repeat_interleave(block)[: like.numel()]


def _nest(absmax: Tensor) -> tuple[Tensor, Nested]:
    """Quantise scales to bytes: evenly spaced values of [-1, 1], times a scale for each 256, plus the mean."""
    offset = absmax.mean()
    inner = _absmax(absmax - offset, 256)
    code = torch.linspace(-1, 1, 256, device=absmax.device)
    shares = (absmax - offset) / _each(inner, 256, absmax).clamp(min=torch.finfo(torch.float32).tiny)
    return _nearest(code, shares).to(torch.uint8), Nested(code, inner, offset, 256)


def _nearest(code: Tensor, values: Tensor) -> Tensor:
    """Return the index of the code nearest to each value."""
    ordered, places = code.sort()
    return places[torch.bucketize(values, (ordered[1:] + ordered[:-1]) / 2)]
