"""Bytes that it takes to make a dense W of a stored one, launch by launch; the model is that of `cost.layer`.

    nf4, fp4    half a byte a weight, a scale for each 64; nested: a byte a scale, and an fp32 number for each 256
    fp8         a byte a weight, an fp32 scale for each block of 128 x 128
    int8        a byte a weight, an fp32 scale for each row

This package reads all of it and writes W in one launch. bitsandbytes has three for nested scales: it writes the scales
in fp32, adds their mean, then writes W. PyTorch's operators write an fp32 copy, multiply it, and cast it.
"""

import math

from lora_kernels.bench.cost.layer import Cost

__all__ = ["launches", "over"]

_FP32 = 4
# weights for a scale of 4 bits; scales for a scale of theirs
_BLOCK, _NESTED = 64, 256
_FP8_BLOCK = 128


def launches(
    kind: str, out_features: int, in_features: int, by: str = "ours", element: int = 2, nested: bool = True
) -> tuple[int, ...]:
    """Return the bytes of each launch that makes W `[out, in]` once.

    Args:
        kind: "nf4", "fp4", "fp8" or "int8".
        out_features: Rows of W.
        in_features: Columns of W.
        by: "ours", "bitsandbytes" (4 bits alone) or "operators" (8 bits alone).
        element: Bytes an element of the dense W.
        nested: Whether the scales of 4 bits are quantised.
    """
    weights = out_features * in_features
    written = weights * element
    if kind in ("nf4", "fp4"):
        packed, scales = (weights + 1) // 2, -(-weights // _BLOCK)
        if not nested:
            return (packed + _FP32 * scales + written,)
        inner = _FP32 * -(-scales // _NESTED)
        if by == "bitsandbytes":
            return scales + inner + _FP32 * scales, 2 * _FP32 * scales, packed + _FP32 * scales + written
        return (packed + scales + inner + written,)
    sides = math.ceil(out_features / _FP8_BLOCK), math.ceil(in_features / _FP8_BLOCK)
    scale = _FP32 * (math.prod(sides) if kind == "fp8" else out_features)
    if by == "operators":
        wide = _FP32 * weights
        return weights + wide, 2 * wide + scale, *((wide + written,) if element != _FP32 else ())
    return (weights + scale + written,)


def over(cost: Cost, made: tuple[int, ...]) -> Cost:
    """Add the launches `made`, which make every W of a call once, to forward and again to backward."""
    return Cost((*made, *cost.forward), (*made, *cost.backward), cost.base)
