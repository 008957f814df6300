"""What a call passes on its way in: collectives, autocast, transforms and modes that watch."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx

from lora_kernels.passes.layer import Projection

__all__ = ["arrived", "as_autocast", "as_number", "base_only", "cast", "nothing", "transforming", "watched"]


class _Wait(torch.autograd.Function):
    """Wait for a collective; the tensor's own `wait` gives one that autograd knows nothing of."""

    @staticmethod
    def forward(ctx: FunctionCtx, t: Any) -> Tensor:
        t = t.wait()
        return t.view_as(t)

    @staticmethod
    def backward(ctx: FunctionCtx, dt: Tensor) -> Tensor:
        return dt


def arrived(t: Tensor) -> Tensor:
    """The result of a collective that may be on its way, as PyTorch's tensor-parallel styles return it; else t."""
    return _Wait.apply(t) if type(t).__name__ == "AsyncCollectiveTensor" else t


def transforming() -> bool:
    """Whether a `torch.func` transform or forward-mode AD is at work, which only plain operators can serve."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def watched() -> bool:
    """Whether a compiler or a dispatch mode has to see an operator; the plain path is tens of microseconds faster."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def as_number(value: float) -> float:
    """A number that an operator takes; a compiler's symbol is left one."""
    return value if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) else float(value)


def as_autocast(
    device_type: str, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    """Cast as autocast casts for `F.linear`; float64 is left alone, as there. Adapters are cast inside."""
    dtype = torch.get_autocast_dtype(device_type)
    if any(isinstance(t, Tensor) and not (t.is_floating_point() and t.itemsize <= 4) for t in (x, weight)):
        return x, weight, bias, False
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), True


def cast(
    device_type: str, x: Tensor, entries: Iterable[Projection]
) -> tuple[Tensor, list[Projection], list[bool]]:  # fmt: skip
    """Cast as autocast casts, x once for all; and tell of each whether its adapters may be of another dtype."""
    cast, fits = [], []
    for q in entries:
        x, weight, bias, fit = as_autocast(device_type, x, q.weight, q.bias)
        cast.append(q._replace(weight=weight, bias=bias))
        fits.append(fit)
    return x, cast, fits


def base_only(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None) -> Tensor:
    """The base layer alone, with zero gradients for the adapters rather than none."""
    y = F.linear(x, weight, bias)
    zero = nothing(lora_A, lora_B)
    return y + zero.to(y.dtype) if zero.requires_grad else y


def nothing(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """0, to which both adapters belong: so they get gradients of 0 rather than none."""
    return lora_A[:0].sum() + lora_B[:0].sum()  # of no elements: 0 whatever the adapters hold, and so the gradients
