"""Contractions over groups of rows in PyTorch's own operators, where each group has operands of its own.

    offsets  [G + 1]   rows offsets[g] to offsets[g + 1] belong to group g; rows from offsets[G] on belong to none

    shrink_all          s_g  = alpha · x_g a_gᵀ          a `[G, R, K]`
    matmul_expand_all   y_g  = Σᵢ p_ig q_igᵀ + bias_g    q `[G, N, K]`, bias `[G, N]`; 0 in rows of no group
    shrink_wgrad        ds_g = alpha · dy_g B_g,  dB_g = dy_gᵀ s_g
    wgrad, wgrad_all    g_g  = left_gᵀ right_g           `[G, C, D]`; 0 for a group without rows

The rows of a group go to the function of `torch_backend` that computes a single group, so numerics and blocks are the
same. It reads the offsets on the host: on a CPU that waits for nothing.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Segments", "by_segments", "segments"]


class Segments(NamedTuple):
    """Where the rows of each group lie.

    Attributes:
        ends: The first row of each group, and the row behind the last group.
        rows: M, rows of no group included.
    """

    ends: list[int]
    rows: int

    @property
    def groups(self) -> int:
        """Return the number of groups."""
        return len(self.ends) - 1

    def filled(self) -> Iterator[tuple[int, slice]]:
        """Iterate over the groups that have rows, and their rows."""
        for group in range(self.groups):
            first, end = self.ends[group : group + 2]
            if first < end:
                yield group, slice(first, end)


def segments(offsets: Tensor, rows: int, slot: None = None) -> Segments:
    """Return where the rows of each group lie.

    Args:
        offsets: `[G + 1]`, int32 or int64.
        rows: M.
        slot: Not used.
    """
    return Segments(offsets.tolist(), rows)


def by_segments(contraction: Callable) -> Callable:
    """Let a contraction of one group take `segments`, and compute each group then by the contraction itself."""
    over_groups = _OVER_GROUPS[contraction.__name__]

    @functools.wraps(contraction)
    def call(*operands: Any, segments: Segments | None = None, **options: Any) -> Any:
        if segments is None:
            return contraction(*operands, **options)
        # What only the kernels use.
        for name in ("slot", "ready"):
            options.pop(name, None)
        return over_groups(contraction, segments, *operands, **options)

    return call


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


_OVER_GROUPS: dict[str, Callable] = {
    "matmul_expand_all": _matmul_expand_all,
    "shrink_all": _shrink_all,
    "shrink_wgrad": _shrink_wgrad,
    "wgrad": _wgrad,
    "wgrad_all": _wgrad_all,
}
