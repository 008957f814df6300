"""Dequantise in PyTorch's operators: the "torch" backend's `dequantize`.

W is made part by part, so that what lies between stays in a CPU's cache. A byte of 4-bit storage is looked up whole, as
a pair of values, because a lookup costs as much for 8 bytes as for 4.
"""

from typing import Any

import torch
from torch import Tensor

from lora_kernels.quantized.checks import FOUR_BITS

__all__ = ["dequantize"]

# Weights of a part: four megabytes in fp32 on a CPU; elsewhere so many that few operators are launched.
_PART = {"cpu": 1 << 20}
_ELSEWHERE = 1 << 24
# Rows of a part, for threads to share.
_ROWS = 64
# 1 / 127 as bitsandbytes has it, in fp32
_PER_127 = 1 / 127


def dequantize(weight: Any, dtype: torch.dtype, slot: None = None) -> Tensor:
    """Compute W of a `QuantizedWeight`, contiguous `[out, in]`, in `dtype`; see `lora_kernels.kernels.dequantize`."""
    w = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if w.numel():
        part = _PART.get(weight.device.type, _ELSEWHERE)
        (_four_bits if weight.format in FOUR_BITS else _eight_bits)(weight, w, part)
    return w


def _four_bits(weight: Any, w: Tensor, part: int) -> None:
    """Write W = code[nibble] · absmax[i // block] into w."""
    block, numel = weight.block, w.numel()
    codes, flat, absmax = weight.packed.detach().view(-1).view(torch.uint8), w.view(-1), _absmax(weight)
    pairs = torch.cartesian_prod(weight.code, weight.code).view(torch.int64).view(1, -1)
    # fp32 pairs of whole bytes are looked up in place
    in_place = w.dtype == torch.float32 and numel % 2 == 0
    step = max(1, part // block) * block
    for start in range(0, numel, step):
        end = min(start + step, numel)
        index = codes[start // 2 : (end + 1) // 2].long()
        # a gather has a thread for each row at most
        rows = min(_ROWS, index.numel() & -index.numel())
        found = flat[start:end] if in_place else torch.empty(2 * index.numel(), dtype=torch.float32, device=w.device)
        shape = rows, index.numel() // rows
        torch.gather(pairs.expand(rows, -1), 1, index.view(shape), out=found.view(torch.int64).view(shape))
        values, full, first = found[: end - start], (end - start) // block, start // block
        if full:
            values[: full * block].view(full, block).mul_(absmax[first : first + full, None])
        # the last block may be short
        if full * block < end - start:
            values[full * block :].mul_(absmax[-1])
        if not in_place:
            flat[start:end].copy_(values)


def _absmax(weight: Any) -> Tensor:
    """Compute the scales of the blocks, fp32; nested: code[scale[b]] · absmax[b // blocksize] + offset."""
    scale, nested = weight.scale.view(-1), weight.nested
    if nested is None:
        return scale
    absmax = nested.code.view(-1).index_select(0, scale.int())
    inner = nested.absmax.view(-1).repeat_interleave(
        nested.blocksize, output_size=nested.absmax.numel() * nested.blocksize
    )
    return absmax.mul_(inner[: absmax.numel()]).add_(nested.offset.view(()))


def _eight_bits(weight: Any, w: Tensor, part: int) -> None:
    """Write W = packed · scale[n // rows, k // columns] into w, and for int8 the quotient by 127."""
    (out_features, in_features), (rows, columns) = weight.shape, weight.block
    packed, scale = weight.packed.detach(), weight.scale.detach().float().view(-(-out_features // rows), -1)
    # `[blocks of rows, in]`, or one column that is broadcast
    across = scale if scale.shape[1] == 1 else scale.repeat_interleave(columns, 1)[:, :in_features]
    step = max(1, part // in_features)
    row = torch.arange(out_features, device=weight.device).div_(rows, rounding_mode="floor")
    for start in range(0, out_features, step):
        values = packed[start : start + step].float().mul_(across.index_select(0, row[start : start + step]))
        w[start : start + step] = values.mul_(_PER_127) if weight.format == "int8" else values
