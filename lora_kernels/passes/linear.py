r"""LoRA's forward and backward as six products over three contractions.

    forward    s  = scaling · D(x) Aᵀ               shrink
               y  = x Wᵀ + s Bᵀ + bias              matmul_expand
    backward   ds = scaling · keep_scale · dy B     shrink   \ shrink_wgrad: both from one read of dy
               dB = dyᵀ s                           wgrad    /
               dx = dy W + keep · (ds A)            matmul_expand
               dA = dsᵀ (keep · x)                  wgrad

The contractions come from a backend; this file works with any backend. A pass runs by a plan (`plan.run`), which keeps
the form of each large product and each settled launch by name. So what a pass does must depend on its arguments alone.
The two shrinks multiply their accumulators by dropout's factor `keep_scale` and the scaling, so all other products see
a 0/1 mask.

Saved for backward: x, W, A and B as given, s (M·r elements) and, with dropout, the mask; of these only the tensors that
the needed gradients take. fp32 adapters over a 16-bit x are rounded to x's dtype as they are read. Where that is not
possible, the pass rounds a copy and does not save the copy: for few rows the copies would be larger than all other
saved tensors. No input except `into` is ever written.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels import plan
from lora_kernels.dropout import keep_scale
from lora_kernels.passes.layer import Kept, Weight, as_dtype, dense, readable, rows

__all__ = ["backward", "forward", "from_dy"]


def forward(
    x: Tensor, weight: Weight, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None,
    scaling: float, dropout_p: float, backend: str, noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Compute y `[M, out]`, and for backward s `[M, r]` and the backend's mask.

    `noise` decides the mask; with None, this function draws the noise.
    """
    alpha = scaling * keep_scale(dropout_p)
    return plan.run(backend, _forward_pass, (alpha, dropout_p), rows(x), weight, lora_A, lora_B, bias, noise)


def _forward_pass(
    steps: plan.Steps, alpha: float, dropout_p: float, x: Tensor, weight: Weight, lora_A: Tensor, lora_B: Tensor,
    bias: Tensor | None, noise: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    # Copies come before the launches, because the launches overlap.
    lora_B, weight = as_dtype(lora_B, x.dtype), dense(steps, weight, x.dtype)
    s, keep = steps.ops.shrink(x, readable(lora_A, x.dtype), alpha, dropout_p, noise=noise, slot=steps["s"])
    form = steps.expander("y", x, x.shape[1], weight.shape[0], lora_A.shape[0])
    (y,) = form.compute([([(x, weight), (s, lora_B)], bias)])
    # Do not return a view of y, because autograd forbids in-place writes to a view that a Function returns.
    return y, s, keep


def backward(
    dy: Tensor, x: Kept, weight: Kept, lora_A: Kept, lora_B: Kept, s: Kept, keep: Tensor | None, alpha: float,
    backend: str, adapter_dtypes: tuple[torch.dtype, torch.dtype], needed: Sequence[bool],
    into: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Compute those of dx `[M, in]`, dA and dB that are `needed`.

    dx needs W, A, B and the mask; dA needs x, B and the mask; dB needs s. dy is `[M, out]` and x `[M, in]`; the caller
    makes them by `rows`, so that a copy comes before the launches, because the launches overlap. `alpha` is scaling ·
    keep_scale. dA and dB have `adapter_dtypes`, or are added to `into` and returned as None.
    """
    settings = alpha, adapter_dtypes, tuple(needed)
    return plan.run(backend, _backward_pass, settings, dy, x, weight, lora_A, lora_B, s, keep, *into)


def _backward_pass(
    steps: plan.Steps, alpha: float, adapter_dtypes: tuple[torch.dtype, torch.dtype], needed: tuple[bool, bool, bool],
    dy: Tensor, x: Kept, weight: Kept, lora_A: Kept, lora_B: Kept, s: Kept, keep: Tensor | None,
    into_A: Tensor | None, into_B: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    _, need_A, _ = needed
    dx, ds, d_lora_B, overlaps = from_dy(
        steps, dy, weight, lora_A, lora_B, s, keep, alpha, adapter_dtypes[1], needed, into_B
    )  # fmt: skip
    d_lora_A = None
    if need_A:
        d_lora_A = steps.ops.wgrad(
            ds, x, adapter_dtypes[0], keep, into=into_A, ready=overlaps, slot=steps["dA"]
        )  # fmt: skip
    return dx, d_lora_A, d_lora_B


def from_dy(
    steps: plan.Steps, dy: Tensor, weight: Kept, lora_A: Any, lora_B: Any, s: Kept, keep: Tensor | None, alpha: float,
    dtype_B: torch.dtype, needed: Sequence[bool], into: Tensor | None = None,
) -> tuple[Tensor | None, Kept, Tensor | None, bool]:  # fmt: skip
    """Compute those of dx, ds and dB that are `needed`, none of which needs x.

    Return them, and whether the next launch may overlap the end of dx.
    """
    (need_x, need_ds, need_B), ops = needed, steps.ops
    lora_A = None if lora_A is None else readable(lora_A, dy.dtype)
    lora_B = None if lora_B is None else readable(lora_B, dy.dtype)
    ds: Kept = None
    form: Any = None
    dx = d_lora_B = None
    if need_x:
        form = steps.expander("dx", dy, *weight.shape, lora_B.shape[1], keep is not None, True)
        # These copies, too, come before the launches.
        lora_A = as_dtype(lora_A, dy.dtype) if keep is None else lora_A
        weight = dense(steps, weight, dy.dtype)
    joint = form is not None and form.brings_ds
    if joint:
        dx, ds = form.compute(dy, weight, lora_A, lora_B, alpha, keep)
    elif need_B and (need_x or need_ds):
        ds, d_lora_B = ops.shrink_wgrad(dy, s, lora_B, alpha, dtype_B, into, slot=steps["ds"])
    elif need_x or need_ds:
        ds, _ = ops.shrink(dy, lora_B.t(), alpha, slot=steps["ds"])
    if need_x and not joint:
        thin = ds, lora_A.t()
        summed, masked = ([thin], ()) if keep is None else ([], [(*thin, keep)])
        (dx,) = form.compute([([(dy, weight.t()), *summed], None)], masked)
    if need_B and (joint or ds is None):
        d_lora_B = ops.wgrad(dy, s, dtype_B, into=into, slot=steps["dB"])
    return dx, ds, d_lora_B, form is not None and form.overlaps
