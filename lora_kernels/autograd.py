r"""LoRA's forward and backward as six products over three contractions, and the one autograd Function.

    forward    s  = scaling · D(x) Aᵀ               shrink
               y  = x Wᵀ + s Bᵀ + bias              matmul_expand
    backward   ds = scaling · keep_scale · dy B     shrink   \ shrink_wgrad: both from one read of dy
               dB = dyᵀ s                           wgrad    /
               dx = dy W + keep · (ds A)            matmul_expand
               dA = dsᵀ (keep · x)                  wgrad

The contractions come from a backend (`plan.contractions`); this file knows none of them. Dropout's factor
`keep_scale` rides in the two shrinks with the scaling, on their accumulators, so everything else sees a 0/1 mask.
Saved for backward: x, W, A and B as they were given, s (M·r elements) and, with dropout, the mask; and of these only
what the gradients that were asked for need. Adapters wider than x are rounded to its dtype in each pass: for few rows
the rounded copies would be more than all else that is saved. No input is ever written.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from lora_kernels import plan
from lora_kernels.dropout import keep_scale

__all__ = ["LoRALinearFunction", "forward"]


def forward(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None,
    scaling: float, dropout_p: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Compute y `[*, out]`, and what backward needs of the way there: s `[M, r]` and the backend's mask."""
    ops, rows = plan.contractions(backend), _rows(x)
    s, keep = ops.shrink(rows, _as(lora_A, x.dtype), scaling * keep_scale(dropout_p), dropout_p)
    y = ops.matmul_expand([(rows, weight), (s, _as(lora_B, x.dtype))], bias)
    return y if rows is x else y.view(*x.shape[:-1], weight.shape[0]), s, keep


class LoRALinearFunction(torch.autograd.Function):
    """`forward` with a backward. Differentiable once; a second time raises."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None,
        scaling: float, dropout_p: float, backend: str,
    ) -> Tensor:  # fmt: skip
        """Compute y and save for backward what the gradients that are needed need."""
        ctx.adapter_dtypes = lora_A.dtype, lora_B.dtype
        y, s, keep = forward(x, weight, lora_A, lora_B, bias, scaling, dropout_p, backend)
        need_x, need_weight, need_A, need_B, _ = ctx.needs_input_grad[:5]
        ctx.save_for_backward(
            x if need_A or need_weight else None,
            weight if need_x else None,
            lora_A if need_x else None,
            lora_B if need_x or need_A else None,
            s if need_B else None,
            keep if need_x or need_A else None,
        )
        ctx.alpha, ctx.backend, ctx.x_shape = scaling * keep_scale(dropout_p), backend, x.shape
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients that `ctx.needs_input_grad` asks for, each in its parameter's dtype."""
        device = dy.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):  # it would round what is to be an fp32 sum
                return _backward_once(ctx, dy)
        # the guard against a second differentiation takes as long as three small operators: only where one may come
        return _backward_once(ctx, dy) if torch.is_grad_enabled() else _backward(ctx, dy)


def _backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, lora_A, lora_B, s, keep = ctx.saved_tensors
    need_x, need_weight, need_A, need_B, need_bias = ctx.needs_input_grad[:5]
    ops, dy = plan.contractions(ctx.backend), _rows(dy)
    dx = dweight = d_lora_A = d_lora_B = dbias = None
    lora_A, lora_B = (None if t is None else _as(t, dy.dtype) for t in (lora_A, lora_B))
    if need_B and (need_x or need_A):
        ds, d_lora_B = ops.shrink_wgrad(dy, s, lora_B, ctx.alpha, ctx.adapter_dtypes[1])
    elif need_B:
        d_lora_B = ops.wgrad(dy, s, ctx.adapter_dtypes[1])
    elif need_x or need_A:
        ds, _ = ops.shrink(dy, lora_B.t(), ctx.alpha)
    if need_x:
        dx = ops.matmul_expand([(dy, weight.t()), (ds, lora_A.t())], keep=keep)
        dx = dx if len(ctx.x_shape) == 2 else dx.view(ctx.x_shape)
    if need_A:
        d_lora_A = ops.wgrad(ds, _rows(x), ctx.adapter_dtypes[0], keep)
    if need_weight:
        dweight = torch.mm(dy.t(), _rows(x))
    if need_bias:
        dbias = dy.sum(0)
    return dx, dweight, d_lora_A, d_lora_B, dbias, None, None, None


_backward_once = once_differentiable(_backward)


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype == dtype else t.to(dtype)


def _rows(t: Tensor) -> Tensor:
    """View `[*, features]` as `[M, features]`; copies only where no view exists."""
    return t if t.dim() == 2 else t.reshape(t.shape[:-1].numel(), t.shape[-1])
