"""Contractions over groups of rows in PyTorch's own operators, where each group has operands of its own.

    offsets  [G + 1]   rows offsets[g] to offsets[g + 1] belong to group g; rows from offsets[G] on belong to none

    shrink_all          s_g  = alpha · x_g a_gᵀ          a `[G, R, K]`
    matmul_expand_all   y_g  = Σᵢ p_ig q_igᵀ + bias_g    q `[G, N, K]`, bias `[G, N]`; 0 in rows of no group
    shrink_wgrad        ds_g = alpha · dy_g B_g,  dB_g = dy_gᵀ s_g
    wgrad, wgrad_all    g_g  = left_gᵀ right_g           `[G, C, D]`; 0 for a group without rows

On a CPU the rows of a group go to the function of `torch_backend` that computes a single group, so numerics and blocks
are the same; reading the offsets there waits for nothing. On a GPU that would wait for the device, once a contraction,
so there the products are PyTorch's `grouped_mm`, which reads the offsets on the device. (In other dtypes than bfloat16
and on some GPUs `grouped_mm` itself reads them on the host; it has no float64, whose groups are computed one by one.)
It has no factor, adds to no sum, and has one dtype for operands and result. So s and ds are rounded before and after
they are scaled, every product of a sum is rounded, and the operands of a gradient in fp32 are widened first. It leaves
what lies in memory in rows of no group, and asks for rows that begin every 16 bytes.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Segments", "by_segments", "segments"]

# Bytes between the beginnings of two rows are a multiple of this in the operands of `grouped_mm`.
_ALIGNED = 16


class Segments(NamedTuple):
    """Where the rows of each group lie.

    Attributes:
        offsets: `[G + 1]`, the first row of each group, and the row behind the last group.
        rows: M, rows of no group included.
    """

    offsets: Tensor
    rows: int

    @property
    def groups(self) -> int:
        """Return the number of groups."""
        return self.offsets.shape[0] - 1

    def filled(self) -> Iterator[tuple[int, slice]]:
        """Iterate over the groups that have rows, and their rows."""
        ends = self.offsets.tolist() if self.rows else []
        for group, (first, end) in enumerate(itertools.pairwise(ends)):
            if first < end:
                yield group, slice(first, end)


def segments(offsets: Tensor, rows: int, slot: None = None) -> Segments:
    """Return where the rows of each group lie.

    Args:
        offsets: `[G + 1]`, int32 or int64.
        rows: M.
        slot: Not used.
    """
    return Segments(offsets, rows)


def by_segments(contraction: Callable) -> Callable:
    """Let a contraction of one group take `segments`, and compute all groups then."""
    one_by_one, together = _OVER_GROUPS[contraction.__name__]

    @functools.wraps(contraction)
    def call(*operands: Any, segments: Segments | None = None, **options: Any) -> Any:
        if segments is None:
            return contraction(*operands, **options)
        # What only the kernels use.
        for name in ("slot", "ready"):
            options.pop(name, None)
        if _takes_grouped_mm(operands):
            return together(segments, *operands, **options)
        return one_by_one(contraction, segments, *operands, **options)

    return call


def _takes_grouped_mm(operands: Any) -> bool:
    """Return whether `grouped_mm` computes all groups; the first tensor among the operands is of rows."""
    tensors = list(_tensors(operands))
    return (
        tensors[0].is_cuda
        and all(t.numel() and t.dtype != torch.float64 for t in tensors if t.is_floating_point())
        and hasattr(F, "grouped_mm")
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    """Iterate over the tensors in nested sequences."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)


# One group after the other, by the contraction of a single group.


def _shrink_all(
    contraction: Callable, segments: Segments, x: Tensor, rows: Sequence[tuple[Tensor, float, float]]
) -> tuple[list[Tensor], list[None]]:
    shrunk = [x.new_zeros(segments.rows, a.shape[1]) for a, _, _ in rows]
    for group, own in segments.filled():
        parts, _ = contraction(x[own], [(a[group], alpha, p) for a, alpha, p in rows])
        for s, part in zip(shrunk, parts, strict=True):
            s[own] = part
    return shrunk, [None] * len(rows)


def _matmul_expand_all(
    contraction: Callable, segments: Segments,
    outputs: Sequence[tuple[Sequence[tuple[Tensor, Tensor]], Tensor | None]],
) -> list[Tensor]:  # fmt: skip
    ys = [sources[0][0].new_zeros(segments.rows, sources[0][1].shape[1]) for sources, _ in outputs]
    for group, own in segments.filled():
        of_group = [
            ([(p[own], q[group]) for p, q in sources], None if bias is None else bias[group])
            for sources, bias in outputs
        ]
        for y, part in zip(ys, contraction(of_group), strict=True):
            y[own] = part
    return ys


def _shrink_wgrad(
    contraction: Callable, segments: Segments, dy: Tensor, s: Tensor, lora_B: Tensor, alpha: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    ds, d_lora_B = s.new_zeros(s.shape), lora_B.new_zeros(lora_B.shape, dtype=out_dtype)
    for group, own in segments.filled():
        ds[own], d_lora_B[group] = contraction(dy[own], s[own], lora_B[group], alpha, out_dtype)
    return ds, d_lora_B


def _wgrad(
    contraction: Callable, segments: Segments, left: Tensor, right: Tensor, out_dtype: torch.dtype
) -> Tensor:  # fmt: skip
    g = left.new_zeros(segments.groups, left.shape[1], right.shape[1], dtype=out_dtype)
    for group, own in segments.filled():
        g[group] = contraction(left[own], right[own], out_dtype)
    return g


def _wgrad_all(
    contraction: Callable, segments: Segments, rows: Sequence[tuple[Tensor, torch.dtype, None]], right: Tensor
) -> list[Tensor]:
    gs = [right.new_zeros(segments.groups, left.shape[1], right.shape[1], dtype=dtype) for left, dtype, _ in rows]
    for group, own in segments.filled():
        parts = contraction([(left[own], dtype, None) for left, dtype, _ in rows], right[own])
        for g, part in zip(gs, parts, strict=True):
            g[group] = part
    return gs


# All groups together, by PyTorch's `grouped_mm`.


def _shrink_all_together(
    segments: Segments, x: Tensor, rows: Sequence[tuple[Tensor, float, float]]
) -> tuple[list[Tensor], list[None]]:
    shrunk = [_product(segments, x, a.to(x.dtype).mT).mul_(alpha) for a, alpha, _ in rows]
    return shrunk, [None] * len(rows)


def _matmul_expand_all_together(
    segments: Segments, outputs: Sequence[tuple[Sequence[tuple[Tensor, Tensor]], Tensor | None]]
) -> list[Tensor]:
    row = torch.arange(segments.rows, device=segments.offsets.device)
    ys = []
    for sources, bias in outputs:
        (p, q), *rest = sources
        y = _product(segments, p, q.mT)
        for p, q in rest:
            y += _product(segments, p, q.mT)
        if bias is not None:
            group = torch.searchsorted(segments.offsets[1:], row, right=True)
            y += bias.index_select(0, group.clamp_(max=segments.groups - 1))
        ys.append(y.masked_fill_((row >= segments.offsets[-1]).unsqueeze(1), 0).contiguous())
    return ys


def _shrink_wgrad_together(
    segments: Segments, dy: Tensor, s: Tensor, lora_B: Tensor, alpha: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    ds = _product(segments, dy, lora_B.to(dy.dtype)).mul_(alpha)
    return ds, _wgrad_together(segments, dy, s, out_dtype)


def _wgrad_together(segments: Segments, left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
    left, right = (t.to(torch.promote_types(t.dtype, out_dtype)) for t in (left, right))
    g = F.grouped_mm(_aligned(left).mT, _aligned(right), offs=segments.offsets[1:].int())
    empty = segments.offsets.diff() <= 0
    g = g[:, : left.shape[1], : right.shape[1]].masked_fill_(empty.view(-1, 1, 1), 0)
    return g.to(out_dtype).contiguous()


def _wgrad_all_together(
    segments: Segments, rows: Sequence[tuple[Tensor, torch.dtype, None]], right: Tensor
) -> list[Tensor]:
    return [_wgrad_together(segments, left, right, dtype) for left, dtype, _ in rows]


def _product(segments: Segments, left: Tensor, right: Tensor) -> Tensor:
    """Compute left_g right_g of each group, `[M, N]`, from left `[M, K]` and right `[G, K, N]`."""
    product = F.grouped_mm(_aligned(left), _aligned(right), offs=segments.offsets[1:].int())
    return product[:, : right.shape[2]]


def _aligned(t: Tensor) -> Tensor:
    """Return t as `grouped_mm` takes it: its dims but that of rows padded by zeros to a multiple of 16 bytes."""
    unit = _ALIGNED // t.element_size()
    padding = [-size % unit for size in reversed(t.shape[1:])]
    if any(padding):
        return F.pad(t, [n for size in padding for n in (0, size)])
    *others, first, second = sorted(t.stride(), reverse=True)
    fits = 1 in t.stride()[-2:] and second == 1 and all(stride % unit == 0 for stride in (*others, first))
    return t if fits and t.data_ptr() % _ALIGNED == 0 else t.clone(memory_format=torch.contiguous_format)


_OVER_GROUPS: dict[str, tuple[Callable, Callable]] = {
    "matmul_expand_all": (_matmul_expand_all, _matmul_expand_all_together),
    "shrink_all": (_shrink_all, _shrink_all_together),
    "shrink_wgrad": (_shrink_wgrad, _shrink_wgrad_together),
    "wgrad": (_wgrad, _wgrad_together),
    "wgrad_all": (_wgrad_all, _wgrad_all_together),
}
