r"""LoRA's forward and backward as six products over three contractions, and the one autograd Function.

    forward    s  = scaling · D(x) Aᵀ               shrink
               y  = x Wᵀ + s Bᵀ + bias              matmul_expand
    backward   ds = scaling · keep_scale · dy B     shrink   \ shrink_wgrad: both from one read of dy
               dB = dyᵀ s                           wgrad    /
               dx = dy W + keep · (ds A)            matmul_expand
               dA = dsᵀ (keep · x)                  wgrad

The contractions come from a backend (`plan.contractions`); this file knows none of them. A pass is called by way of
`plan.repeat`, which may take its steps by notes: it depends on its arguments and on nothing else. Dropout's factor
`keep_scale` rides in the two shrinks with the scaling, on their accumulators, so everything else sees a 0/1 mask.
Saved for backward: x, W, A and B as they were given, s (M·r elements) and, with dropout, the mask; and of these only
what the gradients that were asked for need. fp32 adapters over a 16-bit x are rounded to its dtype as they are read,
and where that cannot be, in a copy of the pass: for few rows copies would be more than all else that is saved. No input
is ever written.
"""

import contextlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from lora_kernels import plan
from lora_kernels.dropout import keep_scale

__all__ = [
    "LoRALinearFunction",
    "autocast_off",
    "autocasts",
    "backward",
    "forward",
    "from_dy",
    "gradient",
    "readable",
    "rows",
    "save",
]

_NOTHING = contextlib.nullcontext()


def forward(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None,
    scaling: float, dropout_p: float, backend: str, noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Compute y `[M, out]`, and what backward needs of the way there: s `[M, r]` and the backend's mask.

    `noise` decides the mask; drawn here when there is none.
    """
    alpha = scaling * keep_scale(dropout_p)
    return plan.repeat(backend, _forward_pass, rows(x), weight, lora_A, lora_B, bias, alpha, dropout_p, noise)


def _forward_pass(
    backend: str, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, alpha: float,
    dropout_p: float, noise: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    lora_B = _as(lora_B, x.dtype)  # copies come before the launches, which overlap
    s, keep = plan.contractions(backend).shrink(x, readable(lora_A, x.dtype), alpha, dropout_p, noise=noise)
    _, expand = plan.expander(backend, x, weight.shape[0], lora_A.shape[0], masked=False, backward=False)
    y = expand([(x, weight), (s, lora_B)], bias)
    return y, s, keep  # no view of y: autograd lets nobody write to a view that a Function returns


def backward(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, lora_A: Tensor | None, lora_B: Tensor | None,
    s: Tensor | None, keep: Tensor | None, alpha: float, backend: str,
    adapter_dtypes: tuple[torch.dtype, torch.dtype], needed: Sequence[bool],
    into: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Compute dx `[M, in]`, dA and dB, as far as they are `needed`, from what they need.

    dx needs W, A, B and the mask; dA needs x, B and the mask; dB needs s. dy is `[M, out]` and x `[M, in]`: a copy,
    where `rows` has to make one, comes before the launches, which overlap. `alpha` is scaling · keep_scale. dA and dB
    come in `adapter_dtypes`, or are added to `into`, and then are None.
    """
    return plan.repeat(
        backend, _backward_pass, dy, x, weight, lora_A, lora_B, s, keep, alpha, adapter_dtypes, needed, into
    )  # fmt: skip


def _backward_pass(
    backend: str, dy: Tensor, x: Tensor | None, weight: Tensor | None, lora_A: Tensor | None, lora_B: Tensor | None,
    s: Tensor | None, keep: Tensor | None, alpha: float, adapter_dtypes: tuple[torch.dtype, torch.dtype],
    needed: Sequence[bool], into: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    need_x, need_A, _ = needed
    dx, ds, d_lora_B, how = from_dy(
        dy, weight, lora_A, lora_B, s, keep, alpha, backend, adapter_dtypes[1], needed, into[1]
    )  # fmt: skip
    d_lora_A = None
    if need_A:
        ready = need_x and how == "fused"
        d_lora_A = plan.contractions(backend).wgrad(ds, x, adapter_dtypes[0], keep, into=into[0], ready=ready)
    return dx, d_lora_A, d_lora_B


def from_dy(
    dy: Tensor, weight: Tensor | None, lora_A: Tensor | None, lora_B: Tensor | None, s: Tensor | None,
    keep: Tensor | None, alpha: float, backend: str, dtype_B: torch.dtype, needed: Sequence[bool],
    into: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, str | None]:  # fmt: skip
    """Compute what `backward` computes without x: dx, ds, dB, and the form that dx took. `needed`: dx, ds, dB."""
    (need_x, need_ds, need_B), ops = needed, plan.contractions(backend)
    lora_A, lora_B = (None if t is None else readable(t, dy.dtype) for t in (lora_A, lora_B))
    dx = d_lora_B = how = expand = ds = None
    if need_x:
        how, expand = plan.expander(backend, dy, weight.shape[1], lora_B.shape[1], keep is not None, True)
        lora_A = _as(lora_A, dy.dtype) if keep is None else lora_A  # before the launches, too
    if how == "joint":
        dx, ds = expand(dy, weight, lora_A, lora_B, alpha, keep)
    elif need_B and (need_x or need_ds):
        ds, d_lora_B = ops.shrink_wgrad(dy, s, lora_B, alpha, dtype_B, into)
    elif need_x or need_ds:
        ds, _ = ops.shrink(dy, lora_B.t(), alpha)
    if need_x and how != "joint":
        dx = expand([(dy, weight.t()), (ds, lora_A.t())], keep=keep)
    if need_B and (how == "joint" or ds is None):
        d_lora_B = ops.wgrad(dy, s, dtype_B, into=into)
    return dx, ds, d_lora_B, how


class LoRALinearFunction(torch.autograd.Function):
    """`forward` with a backward. Differentiable once; a second time raises."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None,
        scaling: float, dropout_p: float, backend: str, accumulate_grad: bool = False,
        noise: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Compute y `[M, out]` and save for backward what the gradients that are needed need."""
        ctx.accumulate = (lora_A, lora_B) if accumulate_grad else (None, None)
        y, s, keep = forward(x, weight, lora_A, lora_B, bias, scaling, dropout_p, backend, noise)
        save(ctx, x, weight, lora_A, lora_B, s, keep, scaling * keep_scale(dropout_p), backend)
        ctx.x_shape = x.shape
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients that `ctx.needs_input_grad` asks for, each in its parameter's dtype."""
        into = tuple(map(gradient, ctx.accumulate))
        with autocast_off(dy):
            # the guard against a second differentiation takes as long as three small operators: only where one may come
            return _backward_once(ctx, into, dy) if torch.is_grad_enabled() else _backward(ctx, into, dy)


def save(
    ctx: FunctionCtx, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, s: Tensor, keep: Tensor | None,
    alpha: float, backend: str,
) -> None:  # fmt: skip
    """Keep for backward what the gradients of x, W, A and B need, as far as they are needed."""
    need_x, need_weight, need_A, need_B = ctx.needs_input_grad[:4]
    ctx.save_for_backward(
        x if need_A or need_weight else None,
        weight if need_x else None,
        lora_A if need_x else None,
        lora_B if need_x or need_A else None,
        s if need_B else None,
        keep if need_x or need_A else None,
    )
    ctx.alpha, ctx.backend = alpha, backend
    ctx.adapter_dtypes = lora_A.dtype, lora_B.dtype


def autocast_off(dy: Tensor) -> contextlib.AbstractContextManager:
    """A context for backward: every dtype was settled in forward, and autocast would settle it anew."""
    device_type = dy.device.type
    return torch.autocast(device_type, enabled=False) if autocasts(device_type) else _NOTHING


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for a type of device."""
    # of these two it is known, and asking takes as long as a small check
    available = device_type in ("cuda", "cpu") or torch.amp.is_autocast_available(device_type)
    return available and torch.is_autocast_enabled(device_type)


def _backward(
    ctx: FunctionCtx, into: tuple[Tensor | None, Tensor | None], dy: Tensor
) -> tuple[Tensor | None, ...]:  # fmt: skip
    x, weight, lora_A, lora_B, s, keep = ctx.saved_tensors
    need_x, need_weight, need_A, need_B, need_bias = ctx.needs_input_grad[:5]
    dy, x = rows(dy), None if x is None else rows(x)
    dx, d_lora_A, d_lora_B = backward(
        dy, x, weight, lora_A, lora_B, s, keep, ctx.alpha, ctx.backend, ctx.adapter_dtypes,
        (need_x, need_A, need_B), into,
    )  # fmt: skip
    dweight = torch.mm(dy.t(), x) if need_weight else None
    dbias = dy.sum(0) if need_bias else None
    if dx is not None and len(ctx.x_shape) != 2:
        dx = dx.view(ctx.x_shape)
    return dx, dweight, d_lora_A, d_lora_B, dbias, None, None, None, None, None


_backward_once = once_differentiable(_backward)


def gradient(adapter: Tensor | None) -> Tensor | None:
    """The gradient to add to in place, where the engine would do no more than that: a plain one, and nobody listens.

    None in grad mode, where backward is differentiated and the engine adds out of place. `once_differentiable` hides
    that mode from what it wraps: call this outside.
    """
    grad = None if adapter is None or not adapter.is_leaf or torch.is_grad_enabled() else adapter.grad
    if grad is None or grad.layout is not torch.strided or grad.is_neg():
        return None
    if torch._debug_has_internal_overlap(grad) == 1:  # elements in one place, which the engine refuses to write to
        return None
    if adapter._backward_hooks or getattr(adapter, "_post_accumulate_grad_hooks", None):
        return None
    torch.autograd.graph.increment_version(grad)
    return grad


def readable(adapter: Tensor, dtype: torch.dtype) -> Tensor:
    """An adapter that contractions in `dtype` can read: of that, or in fp32, which they round as they read it."""
    return adapter if adapter.dtype in (dtype, torch.float32) else adapter.to(dtype)


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype == dtype else t.to(dtype)


def rows(t: Tensor) -> Tensor:
    """View `[*, features]` as `[M, features]`; copies where no view exists."""
    # not Size.numel, which makes a number of a compiler's symbol
    return t if t.dim() == 2 else t.reshape(math.prod(t.shape[:-1]), t.shape[-1])
