r"""A linear layer with adapters for each group of rows, as the experts of a mixture: the products of `linear` by group.

    forward    s_ie  = scalingᵢ · x_e A_ieᵀ                  shrink           one read of x for all adapters
               y_e   = x_e W_eᵀ + Σᵢ s_ie B_ieᵀ + bias_e     matmul_expand    one accumulator, one store
    backward   ds_ie = scalingᵢ · dy_e B_ie                  shrink   \ shrink_wgrad: both from one read of dy,
               dB_ie = dy_eᵀ s_ie                            wgrad    / a launch for each adapter
               dx_e  = dy_e W_e + Σᵢ ds_ie A_ie              matmul_expand
               dA_ie = ds_ieᵀ x_e                            wgrad            one read of x for all adapters
               dW_e  = dy_eᵀ x_e,  dbias_e = dy_eᵀ 1         wgrad

x `[S, in]` and y `[S, out]` are sorted by group e, W is `[E, out, in]`, A `[E, r, in]` and B `[E, out, r]`. The offsets
stay on the device: `ops.segments` makes of them what the contractions of a pass read. Rows of no group get zeros in y
and dx, and reach no other gradient. The gradients of a group without rows are zero.

Where neither rows nor columns of a B_e are adjacent, a pass copies B once, because no tile of such a B can be loaded at
once. PEFT's B is such, with the experts side by side. The copy is small beside W.

Saved for backward: x, W, A and B as given, the offsets, and the sᵢ (S·Σrᵢ elements); of these only the tensors that the
needed gradients take.

Source: Hu et al. 2021, arXiv:2106.09685.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels import plan
from lora_kernels.passes.layer import Kept, as_dtype, readable

__all__ = ["Needed", "SavedAdapter", "backward", "forward"]


class SavedAdapter(NamedTuple):
    """The tensors of one adapter that backward needs.

    Attributes:
        lora_A: A, `[E, r, in]`, if dx is needed.
        lora_B: B, `[E, out, r]`, if dx or dA is needed.
        s: `[S, r]`, if dB is needed.
    """

    lora_A: Kept
    lora_B: Kept
    s: Kept


class Needed(NamedTuple):
    """Which gradients are needed: of x, of W, of the bias, and of A and B of each adapter."""

    x: bool
    weight: bool
    bias: bool
    lora_As: tuple[bool, ...]
    lora_Bs: tuple[bool, ...]


def forward(
    x: Tensor, weight: Tensor, adapters: Sequence[Sequence[Tensor]], offsets: Tensor, bias: Tensor | None,
    scalings: Sequence[float], backend: str,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Compute y `[S, out]`, and for backward the s `[S, rᵢ]` of each adapter (A, B)."""
    return plan.run(backend, _forward_pass, (tuple(scalings),), x, weight, tuple(adapters), offsets, bias)


def _forward_pass(
    steps: plan.Steps, scalings: Sequence[float], x: Tensor, weight: Tensor,
    adapters: Sequence[Sequence[Tensor]], offsets: Tensor, bias: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    # Copies come before the launches, because the launches overlap.
    rights = [_adjacent(as_dtype, lora_B, x.dtype) for _, lora_B in adapters]
    segments = steps.ops.segments(offsets, x.shape[0], slot=steps["segments"])
    shrunk: list[Tensor] = []
    if adapters:
        rows = [(readable(lora_A, x.dtype), alpha, 0.0) for (lora_A, _), alpha in zip(adapters, scalings, strict=True)]
        shrunk, _ = steps.ops.shrink_all(x, rows, slot=steps["s"], segments=segments)
    sources = [(x, weight), *zip(shrunk, rights, strict=True)]
    (y,) = steps.grouped_expander("y").compute([(sources, bias)], segments=segments)
    return y, shrunk


def backward(
    dy: Tensor, x: Kept, weight: Kept, adapters: Sequence[SavedAdapter], offsets: Tensor, scalings: Sequence[float],
    backend: str, dtypes: Sequence[tuple[torch.dtype, torch.dtype]], needed: Needed,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[tuple[Tensor | None, Tensor | None]]]:  # fmt: skip
    """Compute those of dx `[S, in]`, dW, dbias, and each dA and dB that are `needed`.

    dx needs W and each A and B; a dA needs x and its B; a dB needs its s; dW needs x. dA and dB have the `dtypes` of
    their adapter, dW and dbias that of dy.
    """
    settings = tuple(scalings), tuple(dtypes), needed
    return plan.run(backend, _backward_pass, settings, dy, x, weight, tuple(adapters), offsets)


def _backward_pass(
    steps: plan.Steps, scalings: Sequence[float], dtypes: Sequence[tuple[torch.dtype, torch.dtype]], needed: Needed,
    dy: Tensor, x: Kept, weight: Kept, adapters: Sequence[SavedAdapter], offsets: Tensor,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[tuple[Tensor | None, Tensor | None]]]:  # fmt: skip
    ops, dtype = steps.ops, dy.dtype
    # Copies come before the launches, because the launches overlap.
    rights = [None if q.lora_B is None else _adjacent(readable, q.lora_B, dtype) for q in adapters]
    lefts = [as_dtype(q.lora_A, dtype).mT for q in adapters] if needed.x else []
    ones = dy.new_ones(dy.shape[0], 1) if needed.bias else None
    segments = ops.segments(offsets, dy.shape[0], slot=steps["segments"])
    made = [
        _ds_and_dB(steps, i, dy, right, q.s, scalings[i], dtypes[i][1], needed, segments)
        for i, (q, right) in enumerate(zip(adapters, rights, strict=True))
    ]
    dx = dweight = dbias = None
    overlaps = False
    if needed.x:
        form = steps.grouped_expander("dx")
        overlaps = form.overlaps
        sources = [(dy, weight.mT), *((ds, left) for (ds, _), left in zip(made, lefts, strict=True))]
        (dx,) = form.compute([(sources, None)], segments=segments)
    d_lora_As: list[Tensor | None] = [None] * len(adapters)
    which = [i for i, need in enumerate(needed.lora_As) if need]
    if which:
        rows = [(made[i][0], dtypes[i][0], None) for i in which]
        made_As = ops.wgrad_all(rows, x, ready=overlaps, slot=steps["dA"], segments=segments)
        for i, d_lora_A in zip(which, made_As, strict=True):
            d_lora_As[i] = d_lora_A
    if needed.weight:
        dweight = ops.wgrad(dy, x, dtype, slot=steps["dW"], segments=segments)
    if ones is not None:
        summed = ops.wgrad(dy, ones, dtype, slot=steps["dbias"], segments=segments)
        # One operand of `wgrad`, dy or the ones, may be as wide as the other is thin.
        dbias = None if summed is None else summed.squeeze(2)
    return dx, dweight, dbias, [(d_lora_A, d_lora_B) for d_lora_A, (_, d_lora_B) in zip(d_lora_As, made, strict=True)]


def _ds_and_dB(
    steps: plan.Steps, i: int, dy: Tensor, lora_B: Kept, s: Kept, alpha: float, dtype: torch.dtype,
    needed: Needed, segments: Any,
) -> tuple[Kept, Tensor | None]:  # fmt: skip
    """Compute the needed ones of ds and dB of adapter i."""
    ops, slot, need_ds = steps.ops, steps["ds", i], needed.x or needed.lora_As[i]
    if need_ds and needed.lora_Bs[i]:
        return ops.shrink_wgrad(dy, s, lora_B, alpha, dtype, slot=slot, segments=segments)
    if need_ds:
        (ds,), _ = ops.shrink_all(dy, [(lora_B.mT, alpha, 0.0)], slot=slot, segments=segments)
        return ds, None
    return None, ops.wgrad(dy, s, dtype, slot=slot, segments=segments) if needed.lora_Bs[i] else None


def _adjacent(as_: Any, lora_B: Tensor, dtype: torch.dtype) -> Tensor:
    """Return B as `as_` gives it, or a copy in `dtype` if neither rows nor columns of a B_e are adjacent."""
    if 1 in lora_B.stride()[1:]:
        return as_(lora_B, dtype)
    # One copy lays out and rounds.
    return torch.empty(lora_B.shape, dtype=dtype, device=lora_B.device).copy_(lora_B)
