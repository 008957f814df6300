r"""The low-rank term alone, over a given base result: four products.

    forward    s  = scaling · D(x) Aᵀ               shrink
               y  = base + s Bᵀ                     one product that begins with base (beta = 1)
    backward   ds = scaling · keep_scale · dy B     shrink   \ shrink_wgrad: both from one read of dy
               dB = dyᵀ s                           wgrad    /
               dx = keep · (ds A)                   one thin product, masked as it is stored
               dA = dsᵀ (keep · x)                  wgrad
               dbase = dy

This serves base layers that only the layer itself can compute: quantised layers, layers with hooks, layers of another
class. As in `linear`, the contractions come from a backend. Of x, A, B, s and the mask, only those that the needed
gradients take are saved.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels import plan
from lora_kernels.dropout import keep_scale
from lora_kernels.passes.layer import Kept, readable, rows

__all__ = ["backward", "forward"]


def forward(
    base: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout_p: float, backend: str,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Compute y `[M, out]` in base's dtype, and for backward s `[M, r]` and the backend's mask.

    `noise` decides the mask; with None, this function draws the noise.
    """
    alpha = scaling * keep_scale(dropout_p)
    return plan.run(backend, _forward_pass, (alpha, dropout_p), rows(x), rows(base), lora_A, lora_B, noise)


def _forward_pass(
    steps: plan.Steps, alpha: float, dropout_p: float, x: Tensor, base: Tensor, lora_A: Tensor, lora_B: Tensor,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    s, keep = steps.ops.shrink(x, readable(lora_A, x.dtype), alpha, dropout_p, noise=noise, slot=steps["s"])
    lora_B = lora_B.to(x.dtype)
    if base.dtype == x.dtype:
        y = torch.addmm(base, s, lora_B.t())
    else:
        # PyTorch's promotion sums in the wider of the two dtypes; the sum is rounded once.
        y = (base + torch.mm(s, lora_B.t())).to(base.dtype)
    # Do not return a view of y, because autograd forbids in-place writes to a view that a Function returns.
    return y, s, keep


def backward(
    dy: Tensor, x: Kept, lora_A: Kept, lora_B: Kept, s: Kept, keep: Tensor | None, alpha: float, backend: str,
    adapter_dtypes: tuple[torch.dtype, torch.dtype], needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Compute those of dx `[M, in]`, dA and dB that are `needed`.

    dx needs A, B and the mask; dA needs x, B and the mask; dB needs s. dy is `[M, out]` in x's dtype, x `[M, in]`.
    `alpha` is scaling · keep_scale. `adapter_dtypes` are the dtypes of dA and dB.
    """
    settings = alpha, adapter_dtypes, tuple(needed)
    return plan.run(backend, _backward_pass, settings, dy, x, lora_A, lora_B, s, keep)


def _backward_pass(
    steps: plan.Steps, alpha: float, adapter_dtypes: tuple[torch.dtype, torch.dtype], needed: tuple[bool, bool, bool],
    dy: Tensor, x: Kept, lora_A: Kept, lora_B: Kept, s: Kept, keep: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    (need_x, need_A, need_B), ops = needed, steps.ops
    ds: Kept = None
    dx = d_lora_A = d_lora_B = None
    if need_x or need_A:
        lora_B = readable(lora_B, dy.dtype)
        if need_B:
            ds, d_lora_B = ops.shrink_wgrad(dy, s, lora_B, alpha, adapter_dtypes[1], slot=steps["ds"])
        else:
            ds, _ = ops.shrink(dy, lora_B.t(), alpha, slot=steps["ds"])
    elif need_B:
        d_lora_B = ops.wgrad(dy, s, adapter_dtypes[1], slot=steps["dB"])
    if need_x:
        if keep is None:
            dx = torch.mm(ds, lora_A.to(dy.dtype))
        else:
            dx = ops.matmul_expand([(ds, readable(lora_A, dy.dtype).t())], keep=keep, slot=steps["dx"])
    if need_A:
        d_lora_A = ops.wgrad(ds, x, adapter_dtypes[0], keep, slot=steps["dA"])
    return dx, d_lora_A, d_lora_B
