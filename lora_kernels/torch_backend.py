"""The three contractions in PyTorch's own operators: the "torch" backend, for CPUs and whatever Triton cannot run.

Same functions and same meaning as the launchers in `lora_kernels.kernels`; see there for the formulas. What sets
this apart from the slow chain is that sums are accumulated in place, the scaling rides in a matmul's alpha, no
dropped copy of x outlives the call that needs it, and the mask is one byte an element from PyTorch's own generator.

A CPU has two more needs. It makes its passes over x and dy a block of rows at a time, so that what lies between two
operators (a dropped block, a widened block) is still in the cache, and never so large that the C library takes fresh
pages for it from the system, which costs more than the pass. And where PyTorch has no fast 16-bit product, which is
on every x86 without AVX-512, it multiplies in fp32, tile by tile, and rounds once: there its own 16-bit product is 5
to 60 times slower.

And calls too small to be worth a Function in Python, whose two halves cost as much as twenty small operators, are
composed of operators that PyTorch differentiates itself: `composes` and `composed`.
"""

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.activations import After, Before, activated, gradients
from lora_kernels.dropout import keep_scale, threshold

__all__ = [
    "activate_shrink",
    "activation_wgrad",
    "composed",
    "composes",
    "draw_mask",
    "draw_noise",
    "matmul_expand",
    "matmul_expand_all",
    "outputs",
    "shrink",
    "shrink_all",
    "shrink_wgrad",
    "thin_pitch",
    "wgrad",
    "wgrad_all",
]

_BLOCK = 1 << 17  # elements of x or dy at a time: half a megabyte in fp32
_DRAWN = 1 << 19  # elements of a mask at a time
_SMALL = 1 << 16  # elements of x or y up to which `composed` is the faster one
_LEAST_ROWS = 64  # of a block; fewer would spend their time on the sum they are added to
_TILE = 1024, 1 << 20  # rows of y, and elements of the weight, widened at a time
_HALF = (torch.bfloat16, torch.float16)


def draw_mask(shape: torch.Size, dropout_p: float, device: torch.device, noise: Tensor | None = None) -> Tensor:
    """Draw a dropout mask, uint8, 1 where kept, or make it of the `noise` that was drawn.

    Kept with the probability 1 - threshold(p) / 65536, like the kernels' mask. One 64-bit draw decides four elements,
    which on a CPU is several times faster than `bernoulli_`, one draw an element; and it multiplies by bytes several
    times faster than by bools.
    """
    drop, numel = threshold(dropout_p), shape.numel()
    if drop == 65536:  # more than int16 can compare with
        return torch.zeros(shape, dtype=torch.uint8, device=device)
    if noise is not None or numel <= _DRAWN or device.type != "cpu":
        words = _words(numel, device) if noise is None else noise.view(torch.int16)[:numel]
        return words.ge(drop - 32768).view(shape).view(torch.uint8)
    keep = torch.empty(numel, dtype=torch.uint8)
    for part in keep.split(_DRAWN):  # the words of a single draw, a part at a time
        torch.ge(_words(part.numel(), device), drop - 32768, out=part)
    return keep.view(shape)


def draw_noise(x: Tensor, count: int = 1) -> Tensor:
    """Draw what decides `count` masks of x, from the device's default torch generator: 16 bits an element, in int64."""
    if count == 1:
        return _draw(x.numel(), x.device)
    noise = torch.empty(count, -(-x.numel() // 4), dtype=torch.int64, device=x.device)
    for part in noise:  # as many draws as `draw_mask` would make: on a GPU they give others than one of all
        part.random_(-(2**63), None)
    return noise.view(-1)


def _draw(numel: int, device: torch.device) -> Tensor:
    return torch.empty(-(-numel // 4), dtype=torch.int64, device=device).random_(-(2**63), None)


def _words(numel: int, device: torch.device) -> Tensor:
    """Random 16-bit words, int16."""
    words = _draw(numel, device).view(torch.int16)
    return words[:numel] if numel % 4 else words


def composes(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> bool:
    """Whether `composed` should do a call: one dtype, which PyTorch multiplies well on a CPU, and few elements."""
    dtype = x.dtype
    return (
        x.numel() <= _SMALL
        and x.shape[:-1].numel() * weight.shape[0] <= _SMALL
        and dtype == lora_A.dtype == lora_B.dtype
        and dtype not in _HALF
        and x.device.type == "cpu"
    )


def composed(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, scaling: float, dropout_p: float,
    noise: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Compute y, `[*, out]`, of x, `[*, in]`, by operators that PyTorch differentiates, saving a dropped copy of x."""
    dropped = x * draw_mask(x.shape, dropout_p, x.device, noise) if dropout_p > 0 else x
    y, s, alpha = F.linear(x, weight, bias), F.linear(dropped, lora_A), scaling * keep_scale(dropout_p)
    if x.dim() == 2:
        return torch.addmm(y, s, lora_B.t(), alpha=alpha)
    rows = x.shape[:-1].numel()  # -1 would not do where there are none, or no features
    flat = torch.addmm(y.view(rows, y.shape[-1]), s.view(rows, s.shape[-1]), lora_B.t(), alpha=alpha)
    return flat.view(y.shape)


def thin_pitch(rank: int, dtype: torch.dtype) -> int:
    """Elements from one row of an s to the next, which for kernels are more than there are columns."""
    return rank


def outputs(x: Tensor, rank: int, dropout_p: float) -> tuple[Tensor, Tensor | None]:
    """Allocate what `shrink` returns, s `[M, R]` and keep `[M, K]`, for shapes and strides alone."""
    return x.new_empty(x.shape[0], rank), x.new_empty(x.shape, dtype=torch.uint8) if dropout_p > 0 else None


def shrink(
    x: Tensor, a: Tensor, alpha: float, dropout_p: float = 0.0, *, noise: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Compute s = alpha · (x · keep) aᵀ, `[M, R]`, and draw keep, uint8 `[M, K]`, when `dropout_p` > 0.

    With `noise`, from an earlier `draw_noise(x)`, nothing is drawn: a pure function.
    """
    (s,), (keep,) = shrink_all(x, ((a, alpha, dropout_p),), noise=noise)
    return s, keep


def shrink_all(
    x: Tensor, rows: Sequence[tuple[Tensor, float, float]], *, noise: Tensor | None = None
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Compute `shrink` for several adapters (a `[Rᵢ, K]`, alpha, dropout_p) of one x, a block of it at a time.

    `noise` is that of `draw_noise(x, count)`, with a count of the rows that have dropout.
    """
    masks = sum(p > 0 for _, _, p in rows)
    drawn = iter(noise.view(masks, -1)) if noise is not None and masks else itertools.repeat(None)
    keeps = [draw_mask(x.shape, p, x.device, next(drawn)) if p > 0 else None for _, _, p in rows]
    factors = [(_wide(a.to(x.dtype)).t(), alpha) for a, alpha, _ in rows]
    parts: list[list[Tensor]] = [[] for _ in rows]
    for x_m, *keeps_m in _blocks(x, *keeps):
        wide_m = _wide(x_m)
        for part, (right, alpha), keep_m in zip(parts, factors, keeps_m, strict=True):
            part.append(_product(_dropped(wide_m, keep_m), right, alpha, x.dtype))
    return list(map(_joined, parts)), keeps


def matmul_expand(
    sources: Sequence[tuple[Tensor, Tensor]], bias: Tensor | None = None, keep: Tensor | None = None
) -> Tensor:
    """Compute y = Σᵢ pᵢ qᵢᵀ + bias, `[M, N]`; `keep` (uint8 `[M, N]`) masks the last product."""
    if keep is None:
        return _matmul_expand(sources, bias, ())
    *summed, masked = sources
    return _matmul_expand(summed, bias, ((*masked, keep),))


def matmul_expand_all(
    outputs: Sequence[tuple[Sequence[tuple[Tensor, Tensor]], Tensor | None]],
    masked: Sequence[tuple[Tensor, Tensor, Tensor]] = (), wide: int = 1,
) -> list[Tensor]:  # fmt: skip
    """Compute a y `[M, Nₒ]` for each (sources, bias); `masked` (p, q, keep) are products of a single one.

    `wide` is for kernels.
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


def wgrad(
    left: Tensor, right: Tensor, out_dtype: torch.dtype, keep: Tensor | None = None, *,
    into: Tensor | None = None, ready: bool = False,
) -> Tensor | None:  # fmt: skip
    """Compute g = leftᵀ (right · keep), `[C, D]`, in `out_dtype` without rounding it to a narrower one first.

    With `into`, g is added to that and nothing is returned. `ready` is for kernels, which may begin early.
    """
    (total,) = _totals(((left, out_dtype, keep),), right)
    return _delivered(total, out_dtype, into)


def wgrad_all(
    rows: Sequence[tuple[Tensor, torch.dtype, Tensor | None]], right: Tensor, ready: bool = False,
    into: Sequence[Tensor | None] | None = None,
) -> list[Tensor | None]:  # fmt: skip
    """Compute `wgrad` for several (left, dtype, keep) of one right operand, a block of it at a time."""
    into = into or (None,) * len(rows)
    totals = zip(_totals(rows, right), rows, into, strict=True)
    return [_delivered(total, dtype, there) for total, (_, dtype, _), there in totals]


def _totals(rows: Sequence[tuple[Tensor, torch.dtype, Tensor | None]], right: Tensor) -> list[Tensor]:
    totals: list[Any] = [None] * len(rows)
    lefts, dtypes, keeps = zip(*rows, strict=True)
    for right_m, *operands in _blocks(right, *lefts, *keeps):
        wide_m = _wide(right_m)
        for i, dtype in enumerate(dtypes):
            left_m, keep_m = operands[i], operands[len(rows) + i]
            totals[i] = _add_product(totals[i], _wide(left_m), _dropped(wide_m, keep_m), dtype)
    return totals


def shrink_wgrad(
    dy: Tensor, s: Tensor, lora_B: Tensor, alpha: float, out_dtype: torch.dtype, into: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Compute ds = alpha · dy B, `[M, r]`, and dB = dyᵀ s, `[out, r]`, in `out_dtype`, or add it to `into`."""
    total: Any = None
    parts, right = [], _wide(lora_B.to(dy.dtype))
    # sᵀ dy: libraries are up to five times slower at a tall, thin result; for few rows its transposition takes longer
    flipped = dy.shape[0] > 2 * s.shape[1]
    for dy_m, s_m in _blocks(dy, s):
        dy_m, s_m = _wide(dy_m), _wide(s_m)
        parts.append(_product(dy_m, right, alpha, dy.dtype))
        total = _add_product(total, *((s_m, dy_m) if flipped else (dy_m, s_m)), out_dtype)
    return _joined(parts), _delivered(total.t() if flipped else total, out_dtype, into)


def activate_shrink(
    gate: Tensor, up: Tensor | None, activation: str, rows: Sequence[tuple[Tensor, float, float]], *,
    noise: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:  # fmt: skip
    """Compute h = a(gate) · up, `[M, K]`, and `shrink_all` of it."""
    blocks = [activated(gate_m, up_m, activation) for gate_m, up_m in _blocks(gate, up)]
    h = _joined(blocks)
    return h, *(shrink_all(h, rows, noise=noise) if rows else ([], []))


def activation_wgrad(
    gate: Tensor, up: Tensor | None, dh: Tensor, activation: str, after: After | Any, *before: Before | Any
) -> tuple[list[Tensor], Tensor | None, list[tuple[Tensor | None, Tensor | None]]]:
    """Compute dg and, with `up`, du; dA of the layer after; ds and dB of the layers before, as far as asked for.

    `after` and each of `before` are None where nothing is. dA and dB that are added to gradients are not returned.
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
            total = _add_product(total, _wide(ds_m), _dropped(_wide(h_m), keep_m), after.out_dtype)
        for i, (wide_m, one) in enumerate(zip(made, before, strict=True)):
            rest[i].copy_(wide_m)
            s_m, wide_m = rest[len(before) + i], _wide(wide_m)
            if s_m is not None:
                results[i][1] = _add_product(results[i][1], wide_m, _wide(s_m), one.out_dtype)
            if rights[i] is not None:
                parts[i].append(_product(wide_m, rights[i], one.alpha, gate.dtype))
    for result, own, one in zip(results, parts, before, strict=True):
        if own:
            result[0] = _joined(own)
        if result[1] is not None:
            result[1] = _delivered(result[1], one.out_dtype, one.into)
    dA = None if total is None else _delivered(total, after.out_dtype, after.into)
    return wides, dA, [(ds, dB) for ds, dB in results]


def _delivered(total: Tensor, out_dtype: torch.dtype, into: Tensor | None) -> Tensor | None:
    """A sum rounded to `out_dtype`, or added to `into` in the width it has."""
    if into is None:
        return total.to(out_dtype)
    into.add_(total)
    return None


def _matmul_expand_in_fp32(
    sources: Sequence[tuple[Tensor, Tensor]], bias: Tensor | None, masked: Sequence[tuple[Tensor, Tensor, Tensor]]
) -> Tensor:
    """`matmul_expand` with a tile of fp32 sums, rounded once."""
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
    """The same rows of a wide tensor and of others, a block after the other; all at once where it is not on a CPU."""
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
    # alpha rides inside the product; with beta=0 what was there is not read
    return left.new_empty(left.shape[0], right.shape[1]).addmm_(left, right, beta=0, alpha=alpha)


def _add_product(total: Tensor | None, left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Add leftᵀ right to a sum that is as wide as `out_dtype`, or wider."""
    if total is not None:
        return total.addmm_(left.t(), right)
    if left.is_cuda and out_dtype != left.dtype:
        return torch.mm(left.t(), right, out_dtype=out_dtype)
    return torch.mm(left.t(), right)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _wide(t: Tensor) -> Tensor:
    """On a CPU thin products of 16-bit tensors are summed in fp32 throughout: they wait for memory anyway."""
    return t.float() if t.dtype in _HALF and t.device.type == "cpu" else t


def _dropped(t: Tensor, keep: Tensor | None) -> Tensor:
    return t if keep is None else t * keep


@functools.cache
def _slow(dtype: torch.dtype) -> bool:
    """Whether PyTorch has no fast matrix product in this dtype on this CPU."""
    if dtype not in _HALF:
        return False
    if not torch.backends.mkldnn.is_available():
        return True
    ops = torch.ops.mkldnn
    fast = ops._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else ops._is_mkldnn_fp16_supported
    return not fast()
