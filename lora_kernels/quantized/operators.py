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
        part = _PART.get(w.device.type, _ELSEWHERE)
        # A parameter of another library may replace PyTorch's functions at a cost, as `Params4bit` does.
        with torch._C.DisableTorchFunctionSubclass():
            (_four_bits if weight.format in FOUR_BITS else _eight_bits)(weight, w, part)
    return w


def _four_bits(weight: Any, w: Tensor, part: int) -> None:
    """Write W = code[nibble] · absmax[i // block] into w."""
    block, numel = weight.block, w.numel()
    codes, flat, absmax = weight.packed.detach().view(torch.uint8).view(-1), w.view(-1), _absmax(weight)
    # A complex number is a pair of fp32 numbers: those of each byte.
    pairs = torch.complex(weight.code.view(16, 1), weight.code.view(16)).view(torch.int64).view(-1)
    # fp32 pairs of whole bytes are looked up in place
    in_place = w.dtype == torch.float32 and numel % 2 == 0
    step = max(1, part // block) * block
    for start in range(0, numel, step):
        end = min(start + step, numel)
        # Slices are left out where they would be the whole: on a CPU they take a good part of a small weight's time.
        whole = end - start == numel
        # a wider storage may end in bytes that are no weights
        exact = whole and codes.numel() == (end + 1) // 2
        found = codes if exact else codes[start // 2 : (end + 1) // 2]
        here = flat if whole else flat[start:end]
        values = here if in_place else torch.empty(2 * found.numel(), dtype=torch.float32, device=w.device)
        _look_up(pairs, found, values.view(torch.int64))
        kept = values if values.numel() == end - start else values[: end - start]
        _scale(kept, absmax if whole else absmax[start // block :], block)
        if not in_place:
            here.copy_(kept)


def _look_up(pairs: Tensor, codes: Tensor, found: Tensor) -> None:
    """Write pairs[codes] into found."""
    if codes.device.type == "cpu" and torch.get_num_threads() == 1:
        # Of these two the faster, but it has one thread alone.
        torch.index_select(pairs, 0, codes.int(), out=found)
        return
    # A gather has a thread for each row at most.
    rows = min(_ROWS, codes.numel() & -codes.numel())
    shape = rows, codes.numel() // rows
    torch.gather(pairs.expand(rows, -1), 1, codes.long().view(shape), out=found.view(shape))


def _scale(values: Tensor, absmax: Tensor, block: int) -> None:
    """Multiply each block of values by its scale, in place; the last block may be short."""
    full, rest = divmod(values.numel(), block)
    if full:
        blocks = values[: full * block] if rest else values
        blocks.view(full, block).mul_(absmax[:full].view(full, 1))
    if rest:
        values[full * block :].mul_(absmax[full])


def _absmax(weight: Any) -> Tensor:
    """Compute the scales of the blocks, fp32; nested: code[scale[b]] · absmax[b // blocksize] + offset."""
    scale, nested = weight.scale.view(-1), weight.nested
    if nested is None:
        return scale
    absmax = nested.code.view(-1).index_select(0, scale.int())
    _scale(absmax, nested.absmax.view(-1), nested.blocksize)
    return absmax.add_(nested.offset.view(()))


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
