"""The three contractions in PyTorch's own operators: the "torch" backend, for CPUs and all that Triton cannot run.

The functions have the meaning of the launchers in `lora_kernels.kernels`; see there for the formulas. Unlike in the
slow chain of operators, sums accumulate in place, a matmul's alpha does the scaling, no dropped copy of x outlives the
call that needs the copy, and the mask takes one byte per element, from PyTorch's own generator.

On a CPU, passes over x and dy take a block of rows at a time. So an intermediate result (a dropped block, a widened
block) stays in the cache, and is never so large that the C library requests fresh pages from the system, which costs
more than the pass. Where PyTorch has no fast 16-bit product, that is on every x86 without AVX-512, a product is
computed in fp32, tile by tile, and rounded once, because PyTorch's own 16-bit product is 5 to 60 times slower there.

Small calls do not pay for a Function in Python, whose two halves cost as much as twenty small operators. Such calls are
composed of operators that PyTorch differentiates itself: `composes` and `linear_by_operators`.

Contractions marked by `by_segments` take `segments` as well: then each group of rows has operands of its own, as
`torch_segments` says.
"""

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.activations import After, Before, activated, gradients
from lora_kernels.constants import HALF
from lora_kernels.dropout import keep_scale, threshold
from lora_kernels.quantized.operators import dequantize
from lora_kernels.torch_segments import by_segments, segments

__all__ = [
    "activate_shrink", "activation_wgrad", "composes", "dequantize", "draw_mask", "draw_noise", "linear_by_operators",
    "matmul_expand", "matmul_expand_all", "outputs", "segments", "shrink", "shrink_all", "shrink_wgrad", "thin_pitch",
    "wgrad", "wgrad_all",
]  # fmt: skip

# Elements of x or dy per block: a megabyte in fp32.
_BLOCK = 1 << 18
# Elements of a mask per draw.
_DRAWN = 1 << 19
# `linear_by_operators` is faster up to this number of elements of x or y.
_SMALL = 1 << 16
# Least rows of a block; with fewer rows, updates of the sum would take most of the time.
_LEAST_ROWS = 64
# Rows of y, and elements of the weight, that are widened at a time.
_TILE = 1024, 1 << 20


def draw_mask(shape: torch.Size, dropout_p: float, device: torch.device, noise: Tensor | None = None) -> Tensor:
    """Draw a dropout mask, uint8, 1 where kept, or compute the mask from `noise` if given.

    An element is kept with probability 1 - drop_probability(p), like in the kernels' mask. One 64-bit draw decides
    four elements. On a CPU this is several times faster than `bernoulli_` with one draw per element, and a product with
    bytes is several times faster than with bools.
    """
    drop, numel = threshold(dropout_p), shape.numel()
    # The comparison below would need 32768, which int16 does not have.
    if dropout_p == 1:
        return torch.zeros(shape, dtype=torch.uint8, device=device)
    if noise is None and numel <= _DRAWN and shape[-1] % 4 == 0:
        # The same words as below, in the shape of the mask from the start.
        words = _draw((*shape[:-1], shape[-1] // 4), device).view(torch.int16)
        return words.ge(drop - 32768).view(torch.uint8)
    if noise is not None or numel <= _DRAWN or device.type != "cpu":
        words = _words(numel, device) if noise is None else noise.view(torch.int16)[:numel]
        return words.ge(drop - 32768).view(shape).view(torch.uint8)
    keep = torch.empty(numel, dtype=torch.uint8)
    # All parts together are the words of one draw.
    for part in keep.split(_DRAWN):
        torch.ge(_words(part.numel(), device), drop - 32768, out=part)
    return keep.view(shape)


def draw_noise(x: Tensor, count: int = 1) -> Tensor:
    """Draw the noise of `count` masks of x from the device's default torch generator: 16 bits per element, in int64."""
    if count == 1:
        return _draw((-(-x.numel() // 4),), x.device)
    noise = torch.empty(count, -(-x.numel() // 4), dtype=torch.int64, device=x.device)
    # Draw once per mask, like `draw_mask`, because on a GPU one draw for all masks gives other numbers.
    for part in noise:
        part.random_(-(2**63), None)
    return noise.view(-1)


def _draw(shape: Sequence[int], device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device=device).random_(-(2**63), None)


def _words(numel: int, device: torch.device) -> Tensor:
    """Draw random 16-bit words, int16."""
    words = _draw((-(-numel // 4),), device).view(torch.int16)
    return words[:numel] if numel % 4 else words


def composes(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> bool:
    """Return whether `linear_by_operators` should serve a call: on a CPU, few elements, one dtype of fast products."""
    dtype, numel = x.dtype, x.numel()
    out_features, in_features = weight.shape
    return (
        numel <= _SMALL
        and numel * out_features <= _SMALL * in_features
        and dtype == lora_A.dtype == lora_B.dtype
        and dtype not in HALF
        and x.device.type == "cpu"
        # Where W alone takes x, `autograd.written.watch` has no place to look whether x was written.
        and (lora_A.requires_grad or x.requires_grad or not weight.requires_grad)
    )


def linear_by_operators(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, scaling: float, dropout_p: float,
    noise: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Compute y, `[*, out]`, from x, `[*, in]`, by operators that PyTorch differentiates; save a dropped copy of x."""
    if x.dim() != 2 and x.is_contiguous():
        # One view before and one after take less time than those that each operator would make.
        flat = x.view(x.shape[:-1].numel(), x.shape[-1])
        y = linear_by_operators(flat, weight, lora_A, lora_B, bias, scaling, dropout_p, noise)
        return y.view(*x.shape[:-1], y.shape[1])
    dropped = x * draw_mask(x.shape, dropout_p, x.device, noise) if dropout_p > 0 else x
    y, s = F.linear(x, weight, bias), F.linear(dropped, lora_A)
    alpha = scaling * keep_scale(dropout_p) if dropout_p > 0 else scaling
    if x.dim() == 2:
        return torch.addmm(y, s, lora_B.t(), alpha=alpha)
    # A view cannot infer -1 if there are no rows or no features.
    rows = x.shape[:-1].numel()
    flat = torch.addmm(y.view(rows, y.shape[-1]), s.view(rows, s.shape[-1]), lora_B.t(), alpha=alpha)
    return flat.view(y.shape)


def thin_pitch(rank: int, dtype: torch.dtype) -> int:
    """Return the number of elements from one row of an s to the next; the kernels' rows are padded."""
    return rank


def outputs(x: Tensor, rank: int, dropout_p: float) -> tuple[Tensor, Tensor | None]:
    """Allocate the results of `shrink`, s `[M, R]` and keep `[M, K]`, for their shapes and strides."""
    return x.new_empty(x.shape[0], rank), x.new_empty(x.shape, dtype=torch.uint8) if dropout_p > 0 else None


def shrink(
    x: Tensor, a: Tensor, alpha: float, dropout_p: float = 0.0, *, noise: Tensor | None = None, slot: None = None
) -> tuple[Tensor, Tensor | None]:
    """Compute s = alpha · (x · keep) aᵀ, `[M, R]`, and draw keep, uint8 `[M, K]`, when `dropout_p` > 0.

    With `noise`, from an earlier `draw_noise(x)`, the function draws nothing and is pure.
    """
    (s,), (keep,) = shrink_all(x, ((a, alpha, dropout_p),), noise=noise)
    return s, keep


@by_segments
def shrink_all(
    x: Tensor, rows: Sequence[tuple[Tensor, float, float]], *, noise: Tensor | None = None, slot: None = None
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Compute `shrink` for several adapters (a `[Rᵢ, K]`, alpha, dropout_p) of one x, a block of x at a time.

    `noise` is the result of `draw_noise(x, count)`, where count is the number of adapters with dropout.
    """
    masks = sum(p > 0 for _, _, p in rows)
    drawn = iter(noise.view(masks, -1)) if noise is not None and masks else itertools.repeat(None)
    keeps = [draw_mask(x.shape, p, x.device, next(drawn)) if p > 0 else None for _, _, p in rows]
    factors = [(_wide(a.to(x.dtype)).t(), alpha) for a, alpha, _ in rows]
    parts: list[list[Tensor]] = [[] for _ in rows]
    for x_m, *keeps_m in _blocks(x, *keeps):
        wide_m = _wide(x_m)
        for part, (right, alpha), keep_m in zip(parts, factors, keeps_m, strict=True):
            part.append(_product(_drop(wide_m, keep_m), right, alpha, x.dtype))
    return list(map(_concatenate, parts)), keeps


def matmul_expand(
    sources: Sequence[tuple[Tensor, Tensor]], bias: Tensor | None = None, keep: Tensor | None = None,
    slot: None = None,
) -> Tensor:  # fmt: skip
    """Compute y = Σᵢ pᵢ qᵢᵀ + bias, `[M, N]`; `keep` (uint8 `[M, N]`) masks the last product."""
    if keep is None:
        return _matmul_expand(sources, bias, ())
    *summed, masked = sources
    return _matmul_expand(summed, bias, ((*masked, keep),))


@by_segments
def matmul_expand_all(
    outputs: Sequence[tuple[Sequence[tuple[Tensor, Tensor]], Tensor | None]],
    masked: Sequence[tuple[Tensor, Tensor, Tensor]] = (), wide: int = 1, slot: None = None,
) -> list[Tensor]:  # fmt: skip
    """Compute a y `[M, Nₒ]` for each (sources, bias); with `masked` products (p, q, keep) there is a single y.

    Only the kernels use `wide` and, like in the other functions, `slot`.
    """
    return [_matmul_expand(sources, bias, masked) for sources, bias in outputs]


def _matmul_expand(
    sources: Sequence[tuple[Tensor, Tensor]], bias: Tensor | None, masked: Sequence[tuple[Tensor, Tensor, Tensor]]
) -> Tensor:
    masked = [(p, q.to(p.dtype), keep) for p, q, keep in masked]
    if not sources:
        (p, q, keep), *masked = masked
        y = torch.mm(p, q.t()).mul_(keep)
        y = y if bias is None else y.add_(bias)
    else:
        (p, q), *rest = sources
        if p.device.type == "cpu" and _slow(p.dtype):
            return _matmul_expand_in_fp32(sources, bias, masked)
        y = F.linear(p, q, bias)
        for p, q in rest:
            y.addmm_(p, q.t())
    for p, q, keep in masked:
        for y_m, keep_m, p_m in _blocks(y, keep, p):
            y_m.addcmul_(torch.mm(p_m, q.t()), keep_m)
    return y


@by_segments
def wgrad(
    left: Tensor, right: Tensor, out_dtype: torch.dtype, keep: Tensor | None = None, *,
    into: Tensor | None = None, ready: bool = False, slot: None = None,
) -> Tensor | None:  # fmt: skip
    """Compute g = leftᵀ (right · keep), `[C, D]`, in `out_dtype`, without rounding to a narrower dtype first.

    With `into`, add g to `into` and return None. Only the kernels, which may begin early, use `ready`.
    """
    (total,) = _totals(((left, out_dtype, keep),), right)
    return _deliver(total, out_dtype, into)


@by_segments
def wgrad_all(
    rows: Sequence[tuple[Tensor, torch.dtype, Tensor | None]], right: Tensor, ready: bool = False,
    into: Sequence[Tensor | None] | None = None, slot: None = None,
) -> list[Tensor | None]:  # fmt: skip
    """Compute `wgrad` for several (left, dtype, keep) with one right operand, a block of `right` at a time."""
    into = into or (None,) * len(rows)
    totals = zip(_totals(rows, right), rows, into, strict=True)
    return [_deliver(total, dtype, there) for total, (_, dtype, _), there in totals]


def _totals(rows: Sequence[tuple[Tensor, torch.dtype, Tensor | None]], right: Tensor) -> list[Tensor]:
    totals: list[Any] = [None] * len(rows)
    lefts, dtypes, keeps = zip(*rows, strict=True)
    for right_m, *operands in _blocks(right, *lefts, *keeps):
        wide_m = _wide(right_m)
        for i, dtype in enumerate(dtypes):
            left_m, keep_m = operands[i], operands[len(rows) + i]
            totals[i] = _add_product(totals[i], _wide(left_m), _drop(wide_m, keep_m), dtype)
    return totals


@by_segments
def shrink_wgrad(
    dy: Tensor, s: Tensor, lora_B: Tensor, alpha: float, out_dtype: torch.dtype, into: Tensor | None = None,
    slot: None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Compute ds = alpha · dy B, `[M, r]`, and dB = dyᵀ s, `[out, r]`, in `out_dtype`, or add it to `into`."""
    total: Any = None
    parts, right = [], _wide(lora_B.to(dy.dtype))
    # Compute sᵀ dy, because libraries are up to five times slower at a tall, thin result. For few rows the
    # transposition would take longer.
    flipped = dy.shape[0] > 2 * s.shape[1]
    for dy_m, s_m in _blocks(dy, s):
        dy_m, s_m = _wide(dy_m), _wide(s_m)
        parts.append(_product(dy_m, right, alpha, dy.dtype))
        total = _add_product(total, *((s_m, dy_m) if flipped else (dy_m, s_m)), out_dtype)
    return _concatenate(parts), _deliver(total.t() if flipped else total, out_dtype, into)


def activate_shrink(
    gate: Tensor, up: Tensor | None, activation: str, rows: Sequence[tuple[Tensor, float, float]], *,
    noise: Tensor | None = None, slot: None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:  # fmt: skip
    """Compute h = a(gate) · up, `[M, K]`, and `shrink_all` of h."""
    blocks = [activated(gate_m, up_m, activation) for gate_m, up_m in _blocks(gate, up)]
    h = _concatenate(blocks)
    return h, *(shrink_all(h, rows, noise=noise) if rows else ([], []))


def activation_wgrad(
    gate: Tensor, up: Tensor | None, dh: Tensor, activation: str, after: After | Any, *before: Before | Any,
    slot: None = None,
) -> tuple[list[Tensor], Tensor | None, list[tuple[Tensor | None, Tensor | None]]]:  # fmt: skip
    """Compute dg and, with `up`, du; the requested dA of the layer after; the requested ds and dB of the layers before.

    `after` and each of `before` are None if nothing is requested. A dA or dB that is added to a gradient is not
    returned.
    """
    wides, total = [gate.new_empty(gate.shape) for _ in before], None
    results: list[list[Tensor | None]] = [[None, None] for _ in before]
    of_rows = [t for one in before for t in (one.s if one else None,)]
    ds, keep = (after.ds, after.keep) if after else (None, None)
    rights: list[Any] = [_wide(one.lora_B.to(gate.dtype)) if one and one.lora_B is not None else None for one in before]
    parts: list[list[Tensor]] = [[] for _ in before]
    for gate_m, up_m, dh_m, ds_m, keep_m, *rest in _blocks(gate, up, dh, ds, keep, *wides, *of_rows):
        h_m, made = gradients(gate_m, up_m, dh_m, activation)
        if ds_m is not None:
            total = _add_product(total, _wide(ds_m), _drop(_wide(h_m), keep_m), after.out_dtype)
        for i, (wide_m, one) in enumerate(zip(made, before, strict=True)):
            rest[i].copy_(wide_m)
            s_m, wide_m = rest[len(before) + i], _wide(wide_m)
            if s_m is not None:
                results[i][1] = _add_product(results[i][1], wide_m, _wide(s_m), one.out_dtype)
            if rights[i] is not None:
                parts[i].append(_product(wide_m, rights[i], one.alpha, gate.dtype))
    for result, own, one in zip(results, parts, before, strict=True):
        if own:
            result[0] = _concatenate(own)
        if result[1] is not None:
            result[1] = _deliver(result[1], one.out_dtype, one.into)
    dA = None if total is None else _deliver(total, after.out_dtype, after.into)
    return wides, dA, [(ds, dB) for ds, dB in results]


def _deliver(total: Tensor, out_dtype: torch.dtype, into: Tensor | None) -> Tensor | None:
    """Return a sum rounded to `out_dtype`, or add the unrounded sum to `into`."""
    if into is None:
        return total.to(out_dtype)
    into.add_(total)
    return None


def _matmul_expand_in_fp32(
    sources: Sequence[tuple[Tensor, Tensor]], bias: Tensor | None, masked: Sequence[tuple[Tensor, Tensor, Tensor]]
) -> Tensor:
    """Compute `matmul_expand` by tiles of fp32 sums, rounded once."""
    (p, q), *_ = sources
    y = p.new_empty(p.shape[0], q.shape[0])
    rows, cols = _TILE[0], max(1, _TILE[1] // q.shape[1])
    for i in range(0, y.shape[0], rows):
        lefts = [p[i : i + rows].float() for p, *_ in (*sources, *masked)]
        for j in range(0, y.shape[1], cols):
            products = zip(lefts, (q[j : j + cols].float().t() for _, q, *_ in (*sources, *masked)), strict=True)
            left, right = next(products)
            tile = torch.mm(left, right) if bias is None else torch.addmm(bias[j : j + cols].float(), left, right)
            for _, (left, right) in zip(sources[1:], products, strict=False):
                tile.addmm_(left, right)
            for (_, _, keep), (left, right) in zip(masked, products, strict=True):
                tile.addcmul_(torch.mm(left, right), keep[i : i + rows, j : j + cols])
            y[i : i + rows, j : j + cols] = tile
    return y


def _blocks(wide: Tensor, *others: Tensor | None) -> Iterable[tuple[Any, ...]]:
    """Iterate over blocks of the same rows of a wide tensor and of others; one block of all rows if not on a CPU."""
    if wide.numel() <= _BLOCK or wide.device.type != "cpu":
        return ((wide, *others),)
    rows = max(_LEAST_ROWS, _BLOCK // wide.shape[1])
    split = [itertools.repeat(None) if t is None else t.split(rows) for t in (wide, *others)]
    return zip(*split, strict=False)


def _product(left: Tensor, right: Tensor, alpha: float, out_dtype: torch.dtype) -> Tensor:
    """Compute alpha · left @ right, rounded once, to `out_dtype`."""
    if out_dtype != left.dtype:
        return torch.mm(left, right).mul_(alpha).to(out_dtype)
    if alpha == 1:
        return torch.mm(left, right)
    # The product applies alpha. With beta=0 the uninitialised result is not read.
    return left.new_empty(left.shape[0], right.shape[1]).addmm_(left, right, beta=0, alpha=alpha)


def _add_product(total: Tensor | None, left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Add leftᵀ right to a sum in `out_dtype` or a wider dtype."""
    if total is not None:
        return total.addmm_(left.t(), right)
    if left.is_cuda and out_dtype != left.dtype:
        return torch.mm(left.t(), right, out_dtype=out_dtype)
    return torch.mm(left.t(), right)


def _concatenate(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _wide(t: Tensor) -> Tensor:
    """Widen 16-bit tensors to fp32 on a CPU, because thin products are bound by memory there anyway."""
    return t.float() if t.dtype in HALF and t.device.type == "cpu" else t


def _drop(t: Tensor, keep: Tensor | None) -> Tensor:
    return t if keep is None else t * keep


@functools.cache
def _slow(dtype: torch.dtype) -> bool:
    """Return whether PyTorch has no fast matrix product in this dtype on this CPU."""
    if dtype not in HALF:
        return False
    if not torch.backends.mkldnn.is_available():
        return True
    ops = torch.ops.mkldnn
    fast = ops._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else ops._is_mkldnn_fp16_supported
    return not fast()
