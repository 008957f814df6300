r"""The low-rank term alone, over a base result that something else computed: four products, one autograd Function.

    forward    s  = scaling · D(x) Aᵀ               shrink
               y  = base + s Bᵀ                     one product that begins with base (beta = 1)
    backward   ds = scaling · keep_scale · dy B     shrink   \ shrink_wgrad: both from one read of dy
               dB = dyᵀ s                           wgrad    /
               dx = keep · (ds A)                   one thin product, masked as it is stored
               dA = dsᵀ (keep · x)                  wgrad
               dbase = dy

For base layers that only they themselves can compute: quantised ones, hooked ones, ones of another class. As in
`autograd`, the contractions come from a backend, and x, A, B, s and the mask are saved as far as gradients need them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from lora_kernels import plan
from lora_kernels.autograd import autocast_off, readable, rows
from lora_kernels.dropout import keep_scale

__all__ = ["LoRAAddFunction", "backward", "forward", "save"]


def forward(
    base: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout_p: float, backend: str,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Compute y `[M, out]` in base's dtype, and what backward needs: s `[M, r]` and the backend's mask.

    `noise` decides the mask; drawn here when there is none.
    """
    alpha = scaling * keep_scale(dropout_p)
    return plan.repeat(backend, _forward_pass, rows(base), rows(x), lora_A, lora_B, alpha, dropout_p, noise)


def _forward_pass(
    backend: str, base: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, alpha: float, dropout_p: float,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    s, keep = plan.contractions(backend).shrink(x, readable(lora_A, x.dtype), alpha, dropout_p, noise=noise)
    lora_B = lora_B.to(x.dtype)
    if base.dtype == x.dtype:
        y = torch.addmm(base, s, lora_B.t())
    else:  # summed in the wider of the two and rounded once, as PyTorch promotes
        y = (base + torch.mm(s, lora_B.t())).to(base.dtype)
    return y, s, keep  # no view of y: autograd lets nobody write to a view that a Function returns


def backward(
    dy: Tensor, x: Tensor | None, lora_A: Tensor | None, lora_B: Tensor | None, s: Tensor | None, keep: Tensor | None,
    alpha: float, backend: str, adapter_dtypes: tuple[torch.dtype, torch.dtype], needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Compute dx `[M, in]`, dA and dB, as far as they are `needed`, from what they need.

    dx needs A, B and the mask; dA needs x, B and the mask; dB needs s. dy is `[M, out]` in x's dtype, x `[M, in]`.
    `alpha` is scaling · keep_scale. dA and dB come in `adapter_dtypes`.
    """
    return plan.repeat(backend, _backward_pass, dy, x, lora_A, lora_B, s, keep, alpha, adapter_dtypes, needed)


def _backward_pass(
    backend: str, dy: Tensor, x: Tensor | None, lora_A: Tensor | None, lora_B: Tensor | None, s: Tensor | None,
    keep: Tensor | None, alpha: float, adapter_dtypes: tuple[torch.dtype, torch.dtype], needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    (need_x, need_A, need_B), ops = needed, plan.contractions(backend)
    dx = d_lora_A = d_lora_B = ds = None
    if need_x or need_A:
        lora_B = readable(lora_B, dy.dtype)
        if need_B:
            ds, d_lora_B = ops.shrink_wgrad(dy, s, lora_B, alpha, adapter_dtypes[1])
        else:
            ds, _ = ops.shrink(dy, lora_B.t(), alpha)
    elif need_B:
        d_lora_B = ops.wgrad(dy, s, adapter_dtypes[1])
    if need_x:
        if keep is None:
            dx = torch.mm(ds, lora_A.to(dy.dtype))
        else:
            dx = ops.matmul_expand([(ds, readable(lora_A, dy.dtype).t())], keep=keep)
    if need_A:
        d_lora_A = ops.wgrad(ds, x, adapter_dtypes[0], keep)
    return dx, d_lora_A, d_lora_B


class LoRAAddFunction(torch.autograd.Function):
    """`forward` with a backward. Differentiable once; a second time raises."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, base: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor,
        scaling: float, dropout_p: float, backend: str,
    ) -> Tensor:  # fmt: skip
        """Compute y `[M, out]` and save for backward what the gradients that are needed need."""
        y, s, keep = forward(base, x, lora_A, lora_B, scaling, dropout_p, backend)
        save(ctx, x, lora_A, lora_B, s, keep, scaling * keep_scale(dropout_p), backend)
        ctx.base_shape, ctx.x_shape = base.shape, x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients that `ctx.needs_input_grad` asks for, each in its tensor's dtype."""
        with autocast_off(dy):
            return _backward(ctx, dy)


def save(
    ctx: FunctionCtx, x: Tensor, lora_A: Tensor, lora_B: Tensor, s: Tensor, keep: Tensor | None, alpha: float,
    backend: str,
) -> None:  # fmt: skip
    """Keep for backward what the gradients of x, A and B need, as far as they are needed: of base nothing is."""
    _, need_x, need_A, need_B = ctx.needs_input_grad[:4]
    ctx.save_for_backward(
        x if need_A else None,
        lora_A if need_x else None,
        lora_B if need_x or need_A else None,
        s if need_B else None,
        keep if need_x or need_A else None,
    )
    ctx.alpha, ctx.backend, ctx.dtype = alpha, backend, x.dtype
    ctx.adapter_dtypes = lora_A.dtype, lora_B.dtype


def _backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, *saved = ctx.saved_tensors
    need_base, *needed = ctx.needs_input_grad[:4]
    flat, x = rows(dy.to(ctx.dtype)), None if x is None else rows(x)  # copies, if any, before launches that overlap
    dx, d_lora_A, d_lora_B = backward(flat, x, *saved, ctx.alpha, ctx.backend, ctx.adapter_dtypes, needed)
    dbase = dy.view(ctx.base_shape) if need_base else None
    return dbase, None if dx is None else dx.view(ctx.x_shape), d_lora_A, d_lora_B, None, None, None
