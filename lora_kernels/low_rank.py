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

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from lora_kernels import plan
from lora_kernels.dropout import keep_scale

__all__ = ["LoRAAddFunction", "forward"]


def forward(
    base: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout_p: float, backend: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute y `[M, out]` in base's dtype, and what backward needs: s `[M, r]` and the backend's mask."""
    rows, rows_of_base = _rows(x), _rows(base)
    lora_A, lora_B = lora_A.to(x.dtype), lora_B.to(x.dtype)
    s, keep = plan.contractions(backend).shrink(rows, lora_A, scaling * keep_scale(dropout_p), dropout_p)
    if base.dtype == x.dtype:
        y = torch.addmm(rows_of_base, s, lora_B.t())
    else:  # summed in the wider of the two and rounded once, as PyTorch promotes
        y = (rows_of_base + torch.mm(s, lora_B.t())).to(base.dtype)
    return y, s, keep  # no view of y: autograd lets nobody write to a view that a Function returns


class LoRAAddFunction(torch.autograd.Function):
    """`forward` with a backward. Differentiable once; a second time raises."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, base: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor,
        scaling: float, dropout_p: float, backend: str,
    ) -> Tensor:  # fmt: skip
        """Compute y `[M, out]` and save for backward what the gradients that are needed need."""
        y, s, keep = forward(base, x, lora_A, lora_B, scaling, dropout_p, backend)
        _, need_x, need_A, need_B = ctx.needs_input_grad[:4]
        ctx.save_for_backward(
            x if need_A else None,
            lora_A if need_x else None,
            lora_B if need_x or need_A else None,
            s if need_B else None,
            keep if need_x or need_A else None,
        )
        ctx.alpha, ctx.backend, ctx.dtype = scaling * keep_scale(dropout_p), backend, x.dtype
        ctx.base_shape, ctx.x_shape = base.shape, x.shape
        ctx.adapter_dtypes = lora_A.dtype, lora_B.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients that `ctx.needs_input_grad` asks for, each in its tensor's dtype."""
        device_type = dy.device.type
        if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):  # every dtype was settled in forward
                return _backward(ctx, dy)
        return _backward(ctx, dy)


def _backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, lora_A, lora_B, s, keep = ctx.saved_tensors
    need_base, need_x, need_A, need_B = ctx.needs_input_grad[:4]
    ops, rows = plan.contractions(ctx.backend), _rows(dy.to(ctx.dtype))
    x = None if x is None else _rows(x)  # a copy, where one is needed, comes before the launches that overlap
    dx = d_lora_A = d_lora_B = ds = None
    if need_x or need_A:
        lora_B = lora_B.to(ctx.dtype)
        if need_B:
            ds, d_lora_B = ops.shrink_wgrad(rows, s, lora_B, ctx.alpha, ctx.adapter_dtypes[1])
        else:
            ds, _ = ops.shrink(rows, lora_B.t(), ctx.alpha)
    elif need_B:
        d_lora_B = ops.wgrad(rows, s, ctx.adapter_dtypes[1])
    if need_x:
        dx = _masked_product(ctx.backend, ds, lora_A.to(ctx.dtype), keep).view(ctx.x_shape)
    if need_A:
        d_lora_A = ops.wgrad(ds, x, ctx.adapter_dtypes[0], keep)
    return dy.view(ctx.base_shape) if need_base else None, dx, d_lora_A, d_lora_B, None, None, None


def _masked_product(backend: str, ds: Tensor, lora_A: Tensor, keep: Tensor | None) -> Tensor:
    """Compute keep · (ds A), `[M, in]`; the mask is a backend's own."""
    if keep is None:
        return torch.mm(ds, lora_A)
    return plan.contractions(backend).matmul_expand([(ds, lora_A.t())], keep=keep)


def _rows(t: Tensor) -> Tensor:
    """View `[*, features]` as `[M, features]`; copies where no view exists, or where one stands for its negative."""
    t = t.resolve_neg()
    return t if t.dim() == 2 else t.reshape(t.shape[:-1].numel(), t.shape[-1])
