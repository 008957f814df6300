"""What the Functions and operators of all operations share."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

__all__ = [
    "autocast_off", "autocasts", "backward_products", "differentiate_again", "gradient", "gradients", "plain_scaling",
    "register_flops",
]  # fmt: skip

_NOTHING = contextlib.nullcontext()


def autocast_off(dy: Tensor) -> contextlib.AbstractContextManager:
    """A context for backward: every dtype was settled in forward, and autocast would settle it anew."""
    device_type = dy.device.type
    return torch.autocast(device_type, enabled=False) if autocasts(device_type) else _NOTHING


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for a type of device."""
    # of these two it is known, and asking takes as long as a small check
    available = device_type in ("cuda", "cpu") or torch.amp.is_autocast_available(device_type)
    return available and torch.is_autocast_enabled(device_type)


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


def gradients(adapters: Sequence[tuple[Tensor, Tensor] | None]) -> list[tuple[Tensor | None, Tensor | None]]:
    """Gradients of these adapters to add to in place; of two that are the same none, since a launch adds to all."""
    found = [(None, None) if pair is None else tuple(map(gradient, pair)) for pair in adapters]
    places = [g.data_ptr() for pair in found for g in pair if g is not None]
    return found if len(set(places)) == len(places) else [(None, None)] * len(found)


def plain_scaling(lora_A: Tensor, scaling: float) -> tuple[Tensor, float]:
    """A and the scaling as a plain number: one that a compiler has made a symbol is multiplied into A."""
    if isinstance(scaling, torch.SymFloat):
        return lora_A.to(torch.promote_types(lora_A.dtype, torch.float32)) * scaling, 1.0
    return lora_A, scaling


def differentiate_again(ctx: FunctionCtx, *_: Tensor | None) -> None:
    """Refuse: the derivative has none of its own."""
    raise RuntimeError(
        "lora_linear: trying to differentiate twice a function that was marked with @once_differentiable; "
        "lora_kernels.reference.lora_linear differentiates any number of times."
    )


def backward_products(inner: int, cols: int, rank: int, need_x: bool, need_A: bool, need_B: bool) -> int:
    """Multiplications a row of a layer's backward: for dx, dA, dB and, for the first two, ds."""
    thin = rank * (inner * (need_x + need_A) + cols * (need_B + (need_x or need_A)))
    return inner * cols * need_x + thin


def register_flops(formulas: dict[Any, Callable[..., int]]) -> None:
    """Tell PyTorch's FLOP counter the formulas. Not at import: importing the counter loads Triton."""
    from torch.utils import flop_counter
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    packets = {operator.overloadpacket: formula for operator, formula in formulas.items()}
    for operator, formula in packets.items():
        if operator not in flop_counter.flop_registry:
            flop_counter.register_flop_formula(operator)(formula)
    for mode in _get_current_dispatch_mode_stack():  # one that is counting already has its own copy of the table
        counter = getattr(mode, "counter", None)
        if isinstance(counter, flop_counter.FlopCounterMode):
            for operator in packets:
                counter.flop_registry.setdefault(operator, flop_counter.flop_registry[operator])
