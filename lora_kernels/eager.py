"""The three contractions in PyTorch's own operators: the "torch" backend, for CPUs and whatever Triton cannot run.

Same functions and same meaning as the launchers in `lora_kernels.kernels`; see there for the formulas. What sets
this apart from the slow chain is that sums are accumulated in place, the scaling rides in a matmul's alpha, no
dropped copy of x outlives the call that needs it, and the mask is one byte an element from PyTorch's own generator.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels.dropout import threshold

__all__ = ["draw_mask", "matmul_expand", "shrink", "wgrad"]

_CHUNK_ROWS = 1024  # rows upcast at a time where a half-precision product must come out in fp32


def draw_mask(shape: torch.Size, dropout_p: float, device: torch.device) -> Tensor:
    """Draw a dropout mask, bool, True where kept, from the device's default torch generator."""
    return torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(1 - threshold(dropout_p) / 65536)


def shrink(x: Tensor, a: Tensor, alpha: float, dropout_p: float = 0.0) -> tuple[Tensor, Tensor | None]:
    """Compute s = alpha · (x · keep) aᵀ, `[M, R]`, and draw keep, bool `[M, K]`, when `dropout_p` > 0."""
    keep = None
    if dropout_p > 0:
        keep = draw_mask(x.shape, dropout_p, x.device)
        x = x * keep
    return torch.addmm(x.new_zeros(()), x, a.t(), beta=0, alpha=alpha), keep


def matmul_expand(
    sources: Sequence[tuple[Tensor, Tensor]], bias: Tensor | None = None, keep: Tensor | None = None
) -> Tensor:
    """Compute y = Σᵢ pᵢ qᵢᵀ + bias, `[M, N]`; `keep` (bool `[M, N]`) masks the last product."""
    (p, q), *rest = sources
    y = torch.mm(p, q.t()) if bias is None else torch.addmm(bias, p, q.t())
    for p, q in rest[: len(rest) - (keep is not None)]:
        y.addmm_(p, q.t())
    if keep is not None:
        p, q = rest[-1]
        y.add_(torch.mm(p, q.t()).mul_(keep))
    return y


def wgrad(left: Tensor, right: Tensor, out_dtype: torch.dtype, keep: Tensor | None = None) -> Tensor:
    """Compute g = leftᵀ (right · keep), `[C, D]`, in `out_dtype` without rounding it to a narrower one first."""
    if keep is not None:
        right = right * keep
    if out_dtype == left.dtype:
        return torch.mm(left.t(), right)
    if left.is_cuda:
        return torch.mm(left.t(), right, out_dtype=out_dtype)
    g = torch.zeros(left.shape[1], right.shape[1], dtype=out_dtype, device=left.device)
    for rows in zip(left.split(_CHUNK_ROWS), right.split(_CHUNK_ROWS), strict=True):
        g.addmm_(*(t.to(out_dtype) if i else t.to(out_dtype).t() for i, t in enumerate(rows)))
    return g
