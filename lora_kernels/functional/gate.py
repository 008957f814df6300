"""Helpers at the entry of each call: collectives, autocast, and the detection of transforms, traces and modes."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx

from lora_kernels import plan
from lora_kernels.constants import REFERENCE
from lora_kernels.functional import checks
from lora_kernels.passes.layer import Projection, Weight

__all__ = [
    "BACKENDS", "as_autocast", "as_number", "cast", "check_backend_runs", "check_transforms", "is_proxy",
    "is_transforming", "is_watched", "nothing", "record", "takes_reference",
    "wait_for", "without_autocast",
]  # fmt: skip

# The names that a call may pass as `backend`.
BACKENDS = (*plan.BACKENDS, REFERENCE)


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


def is_proxy(t: object) -> bool:
    """Return whether t stands for a tensor in `torch.fx.symbolic_trace`, which records calls instead of making them."""
    # Proxies of tracers of others are subclasses.
    return any(kind.__module__ == "torch.fx.proxy" and kind.__name__ == "Proxy" for kind in type(t).__mro__)


def record(proxy: Any, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Record a call with a proxy among its arguments as one node of the traced graph; return its result's proxy."""
    return proxy.tracer.create_proxy("call_function", call, arguments, options)


def takes_reference(backend: str) -> bool:
    """Return whether the reference serves a call: the call asks for it, or something needs PyTorch's own operators.

    Only plain operators support `torch.func` transforms and forward-mode AD. `torch.jit.trace`, and the ONNX exporter
    that is made of it, record what runs: on the other paths loops over blocks of these sizes, and no Function at all.
    """
    return backend == REFERENCE or is_transforming()


def is_transforming() -> bool:
    """Return whether a `torch.func` transform, forward-mode AD or `torch.jit.trace` is active."""
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def check_transforms(call: str, backend: str) -> None:
    """Refuse kernels that a call asked for inside a `torch.func` transform, forward-mode AD or `torch.jit.trace`.

    Raises:
        RuntimeError: backend is "triton".
        ValueError: backend is not a known name.
    """
    if backend == "triton":
        raise RuntimeError(
            f'{call}: backend="triton" does not support torch.func transforms, forward-mode AD and torch.jit.trace; '
            'use backend="auto" inside them.'
        )
    checks.check_backend(call, backend, BACKENDS)


def is_watched() -> bool:
    """Return whether a compiler or a dispatch mode has to see an operator.

    Otherwise the plain path serves the call, because it is tens of microseconds faster.
    """
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def check_backend_runs(
    call: str, x: Tensor, weights: Sequence[Weight], lora_As: Sequence[Tensor], backend: str
) -> None:
    """Check, under a dispatch mode, that the backend requested from an operator can run.

    The operator chooses from the sizes that it sees, and raises the same errors, but it cannot name the call.

    Raises:
        ValueError, RuntimeError, TypeError: As `plan.choose`.
    """
    # A compiler traces the operator's own choice.
    if not torch.compiler.is_compiling():
        # The A and W of groups have one dim more, in front.
        rank = max((int(lora_A.shape[-2]) for lora_A in lora_As), default=1)
        empty = x.numel() == 0 or any(0 in weight.shape[:-1] for weight in weights)
        plan.choose(x.device, x.dtype, rank, empty, backend, call)


def as_number(value: float) -> float:
    """Return a number that an operator accepts; a compiler's symbol stays a symbol."""
    return value if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) else float(value)


def as_autocast(
    device_type: str, x: Tensor, weight: Weight, bias: Tensor | None
) -> tuple[Tensor, Weight, Tensor | None, bool]:
    """Cast x, weight and bias as autocast casts for `F.linear`; return them and whether they were cast.

    As in autocast, float64 stays as it is. Adapters are cast later.
    """
    dtype = torch.get_autocast_dtype(device_type)
    if any(isinstance(t, Tensor) and not (t.is_floating_point() and t.itemsize <= 4) for t in (x, weight)):
        return x, weight, bias, False
    # A quantised weight is dequantised into x's dtype.
    weight = weight.to(dtype) if isinstance(weight, Tensor) else weight
    return x.to(dtype), weight, None if bias is None else bias.to(dtype), True


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


def nothing(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """Return 0 with A and B in its graph, so that they get gradients of 0 instead of None."""
    # A sum over no elements is 0 and gives gradients of 0 for any values in A and B.
    return lora_A[:0].sum() + lora_B[:0].sum()
