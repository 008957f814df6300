"""Helpers at the entry of each call: collectives, autocast, and the detection of transforms and dispatch modes."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx

from lora_kernels import plan
from lora_kernels.passes.layer import Projection

__all__ = [
    "as_autocast", "as_number", "base_only", "cast", "check_backend_runs", "is_transforming", "is_watched", "nothing",
    "wait_for", "without_autocast",
]  # fmt: skip


class _Wait(torch.autograd.Function):
    """Wait for a collective and keep the graph, because autograd does not record the tensor's own `wait`."""

    @staticmethod
    def forward(ctx: FunctionCtx, t: Any) -> Tensor:
        t = t.wait()
        return t.view_as(t)

    @staticmethod
    def backward(ctx: FunctionCtx, dt: Tensor) -> Tensor:
        return dt


def wait_for(t: Tensor) -> Tensor:
    """Wait for t if t is the pending result of a collective, as PyTorch's tensor-parallel styles return; return t."""
    return _Wait.apply(t) if type(t).__name__ == "AsyncCollectiveTensor" else t


def is_transforming() -> bool:
    """Return whether a `torch.func` transform or forward-mode AD is active; only plain operators support them."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_watched() -> bool:
    """Return whether a compiler or a dispatch mode has to see an operator.

    Otherwise the plain path serves the call, because it is tens of microseconds faster.
    """
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def check_backend_runs(
    call: str, x: Tensor, weights: Sequence[Tensor], lora_As: Sequence[Tensor], backend: str
) -> None:
    """Check, under a dispatch mode, that the backend requested from an operator can run.

    The operator chooses from the sizes that it sees, and raises the same errors, but it cannot name the call.

    Raises:
        ValueError, RuntimeError, TypeError: As `plan.choose`.
    """
    # A compiler traces the operator's own choice.
    if not torch.compiler.is_compiling():
        rank = max(int(lora_A.shape[0]) for lora_A in lora_As)
        empty = x.numel() == 0 or any(weight.shape[0] == 0 for weight in weights)
        plan.choose(x.device, x.dtype, rank, empty, backend, call)


def as_number(value: float) -> float:
    """Return a number that an operator accepts; a compiler's symbol stays a symbol."""
    return value if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) else float(value)


def as_autocast(
    device_type: str, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    """Cast x, weight and bias as autocast casts for `F.linear`; return them and whether they were cast.

    As in autocast, float64 stays as it is. Adapters are cast later.
    """
    dtype = torch.get_autocast_dtype(device_type)
    if any(isinstance(t, Tensor) and not (t.is_floating_point() and t.itemsize <= 4) for t in (x, weight)):
        return x, weight, bias, False
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), True


def without_autocast(device_type: str) -> torch.autocast:
    """Return a context without autocast for a call whose operands are cast, because autocast would round fp32 sums."""
    return torch.autocast(device_type, enabled=False)


def cast(
    device_type: str, x: Tensor, entries: Iterable[Projection]
) -> tuple[Tensor, list[Projection], list[bool]]:  # fmt: skip
    """Cast as autocast casts, x once for all; return for each projection whether its adapters may differ in dtype."""
    cast, fits = [], []
    for q in entries:
        x, weight, bias, fit = as_autocast(device_type, x, q.weight, q.bias)
        cast.append(q._replace(weight=weight, bias=bias))
        fits.append(fit)
    return x, cast, fits


def base_only(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the base layer alone, and let the adapters get gradients of 0 instead of None."""
    y = F.linear(x, weight, bias)
    zero = nothing(lora_A, lora_B)
    return y + zero.to(y.dtype) if zero.requires_grad else y


def nothing(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """Return 0 with A and B in its graph, so that they get gradients of 0 instead of None."""
    # A sum over no elements is 0 and gives gradients of 0 for any values in A and B.
    return lora_A[:0].sum() + lora_B[:0].sum()
