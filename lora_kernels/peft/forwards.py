"""Which forward of a class is in force: the one that its own library defines, ours over it, or one that others set.

Libraries replace forwards on classes (LongLoRA, llm-foundry, Unsloth) at any time. So a forward of ours names the
function that it stands for, and each call compares that function with the one in force.
"""

import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

__all__ = [
    "call_replacement", "describe", "is_defined_by", "is_in_force", "is_ours", "mark", "parts_are_own", "replaced_part",
    "replacement", "stock_forward",
]  # fmt: skip


_PARTS: tuple[Any, ...] = (nn.Linear, nn.Dropout, nn.Identity)
# The forwards that torch.nn defines for the parts, once they have been seen in force.
_own: tuple[Any, ...] = (None, None, None)


class _Mark(NamedTuple):
    """What a forward of ours stands for. The mark names its owner, because `functools.wraps` copies it to others."""

    forward: Any
    stock: Callable[..., Any]
    cls: type | None


class _Entered(threading.local):
    """The modules whose replaced forwards this thread is in, each with our forward that called the replacement."""

    def __init__(self) -> None:
        self.calls: set[tuple[int, Any]] = set()


_entered = _Entered()


def mark(forward: Any, stock: Callable[..., Any], cls: type | None) -> Any:
    """Mark a forward as ours, which stands for `stock`, and return it.

    Args:
        forward: Our forward.
        stock: The forward that ours computes faster.
        cls: The class whose forward `stock` is, if ours is the forward of a subclass; None if ours is set on the class
            itself, where a later one takes its place.
    """
    forward._lora_kernels_mark = _Mark(forward, stock, cls)
    return forward


def is_ours(forward: Any) -> bool:
    """Return whether a forward is one of ours, and not a function that wraps one."""
    own = getattr(forward, "_lora_kernels_mark", None)
    return own is not None and own.forward is forward


def stock_forward(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward behind one of ours; return any other forward as it is."""
    return forward._lora_kernels_mark.stock if is_ours(forward) else forward  # type: ignore[attr-defined]


def is_in_force(forward: Any) -> bool:
    """Return whether a forward is ours, and the class still has the forward that ours stands for."""
    return is_ours(forward) and replacement(forward) is None


def replacement(forward: Any) -> Callable[..., Any] | None:
    """Return the forward that others have set on the class behind one of ours, or None."""
    _, stock, cls = forward._lora_kernels_mark
    if cls is None:
        return None
    current = cls.forward
    return None if current is stock or stock_forward(current) is stock else current


def call_replacement(
    other: Callable[..., Any], forward: Any, module: nn.Module, *args: Any, **kwargs: Any
) -> tuple[bool, Any]:
    """Call the forward that has replaced the one which ours stands for; return whether it was called, and its result.

    It is not called where it has called ours itself: others may have taken our forward from a module's class, wrapped
    it and set it on the class of their library. There ours is what they expect the class's own forward to be.
    """
    key = id(module), forward
    if type(module).forward is not forward or key in _entered.calls:
        return False, None
    _entered.calls.add(key)
    try:
        return True, other(module, *args, **kwargs)
    finally:
        _entered.calls.discard(key)


def is_defined_by(forward: Any, cls: type) -> bool:
    """Return whether a forward is the one in the body of a class, and not one that was set on the class later.

    A function that was set is defined in another module or under another name. A function that `functools.wraps` has
    renamed still reads the globals of the module that defines it.
    """
    module = sys.modules.get(cls.__module__)
    return getattr(forward, "__qualname__", "") == f"{cls.__qualname__}.forward" and getattr(
        forward, "__globals__", None
    ) is getattr(module, "__dict__", forward)


def parts_are_own() -> bool:
    """Return whether nn.Linear, nn.Dropout and nn.Identity, the parts of LoRA layers, have their own forwards."""
    # Every call of a layer asks, so the usual answer takes three comparisons.
    linear, dropout, identity = _own
    return (
        nn.Linear.forward is linear and nn.Dropout.forward is dropout and nn.Identity.forward is identity
    ) or replaced_part() is None  # fmt: skip


def replaced_part() -> type[nn.Module] | None:
    """Return a class of torch.nn that is a part of LoRA layers and has a forward that others set on it, or None."""
    global _own
    replaced = next((kind for kind in _PARTS if not is_defined_by(kind.forward, kind)), None)
    if replaced is None:
        _own = tuple(kind.forward for kind in _PARTS)
    return replaced


def describe(forward: Any) -> str:
    """Return the words for a forward that others have set: where its code is defined, whatever it is named after."""
    code, module = getattr(forward, "__code__", None), getattr(forward, "__globals__", {}).get("__name__", "")
    name = getattr(code, "co_qualname", getattr(forward, "__qualname__", type(forward).__name__))
    return f"{module}.{name}" if module else name
