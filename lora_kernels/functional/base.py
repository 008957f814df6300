"""The base layer of a checked call alone: where there is no adapter, and where the adapter adds nothing."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels import autograd, passes, plan, reference
from lora_kernels.autograd.stored import split
from lora_kernels.functional.gate import is_watched, nothing, takes_reference
from lora_kernels.passes.layer import Projection, Weight

__all__ = ["base", "base_only"]


def base(call: str, x: Tensor, weight: Weight, bias: Tensor | None, backend: str) -> Tensor:
    """Compute y = x Wᵀ + bias, `[*, out]`; a quantised W is dequantised in forward, and again in backward."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    if takes_reference(backend):
        return F.linear(x, reference.dequantize(weight, x.dtype), bias)
    if is_watched():
        packed, tables, form = split(weight)
        how = [None], [None], [bias], [1.0], [0.0], plan.requested_backend(backend), tables, [form]
        return autograd.projections.projections(x, [packed], *how)[0]
    chosen = plan.choose(x.device, x.dtype, 1, x.numel() == 0 or 0 in weight.shape, backend, call)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        numbers = ((1.0, 0.0, False),)
        (y,) = autograd.projections.LoRAProjectionsFunction.apply(x, chosen, numbers, weight, None, None, bias)
    else:
        (y,), _, _ = passes.projections.forward(x, [Projection(weight, bias=bias)], chosen)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


def base_only(
    call: str, x: Tensor, weight: Weight, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, backend: str
) -> Tensor:  # fmt: skip
    """Compute `base`, and let the adapters get gradients of 0 instead of None."""
    y, zero = base(call, x, weight, bias, backend), nothing(lora_A, lora_B)
    return y + zero.to(y.dtype) if zero.requires_grad else y
