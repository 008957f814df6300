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
    """Compute y `[M, out]`, and what backward needs of the way there: s `[M, r]` and the backend's mask."""
    ops, rows = plan.contractions(backend), _rows(x)
    s, keep = ops.shrink(rows, _as(lora_A, x.dtype), scaling * keep_scale(dropout_p), dropout_p)
    _, expand = plan.expander(backend, rows, weight.shape[0], lora_A.shape[0], masked=False, backward=False)
    y = expand([(rows, weight), (s, _as(lora_B, x.dtype))], bias)
    return y, s, keep  # no view of y: autograd lets nobody write to a view that a Function returns


class LoRALinearFunction(torch.autograd.Function):
    """`forward` with a backward. Differentiable once; a second time raises."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None,
        scaling: float, dropout_p: float, backend: str, accumulate_grad: bool = False,
    ) -> Tensor:  # fmt: skip
        """Compute y `[M, out]` and save for backward what the gradients that are needed need."""
        ctx.accumulate = (lora_A, lora_B) if accumulate_grad else (None, None)
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
        device_type = dy.device.type
        if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):  # every dtype was settled in forward
                return _backward_once(ctx, dy)
        # the guard against a second differentiation takes as long as three small operators: only where one may come
        return _backward_once(ctx, dy) if torch.is_grad_enabled() else _backward(ctx, dy)


def _backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, lora_A, lora_B, s, keep = ctx.saved_tensors
    need_x, need_weight, need_A, need_B, need_bias = ctx.needs_input_grad[:5]
    ops, dy = plan.contractions(ctx.backend), _rows(dy)
    x = None if x is None else _rows(x)  # a copy, where one is needed, comes before the launches that overlap
    lora_A, lora_B = (None if t is None else _as(t, dy.dtype) for t in (lora_A, lora_B))
    dx = dweight = d_lora_A = d_lora_B = dbias = None
    into_A, into_B = (_gradient(adapter) for adapter in ctx.accumulate)
    how = expand = ds = None
    if need_x:
        how, expand = plan.expander(ctx.backend, dy, weight.shape[1], lora_B.shape[1], keep is not None, True)
    if how == "joint":
        dx, ds = expand(dy, weight, lora_A, lora_B, ctx.alpha, keep)
    elif need_B and (need_x or need_A):
        ds, d_lora_B = ops.shrink_wgrad(dy, s, lora_B, ctx.alpha, ctx.adapter_dtypes[1], into_B)
    elif need_x or need_A:
        ds, _ = ops.shrink(dy, lora_B.t(), ctx.alpha)
    if need_x and how != "joint":
        dx = expand([(dy, weight.t()), (ds, lora_A.t())], keep=keep)
    if need_A:
        d_lora_A = ops.wgrad(ds, x, ctx.adapter_dtypes[0], keep, into=into_A, ready=how == "fused")
    if need_B and (how == "joint" or ds is None):
        d_lora_B = ops.wgrad(dy, s, ctx.adapter_dtypes[1], into=into_B)
    if need_weight:
        dweight = torch.mm(dy.t(), x)
    if need_bias:
        dbias = dy.sum(0)
    if dx is not None and len(ctx.x_shape) != 2:
        dx = dx.view(ctx.x_shape)
    return dx, dweight, d_lora_A, d_lora_B, dbias, None, None, None, None


_backward_once = once_differentiable(_backward)


def _gradient(adapter: Tensor | None) -> Tensor | None:
    """The gradient to add to in place, where the engine would do no more than add: a plain one, and nobody listens."""
    grad = None if adapter is None or not adapter.is_leaf else adapter.grad
    if grad is None or grad.layout is not torch.strided:
        return None
    if adapter._backward_hooks or getattr(adapter, "_post_accumulate_grad_hooks", None):
        return None
    torch.autograd.graph.increment_version(grad)
    return grad


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype == dtype else t.to(dtype)


def _rows(t: Tensor) -> Tensor:
    """View `[*, features]` as `[M, features]`; copies where no view exists, or where one stands for its negative."""
    t = t.resolve_neg()
    return t if t.dim() == 2 else t.reshape(t.shape[:-1].numel(), t.shape[-1])
