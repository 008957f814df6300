"""Which forward of a class is in force: the one that its own library defines, ours over it, or one that others set.

Libraries replace forwards on classes (LongLoRA, llm-foundry, Unsloth) at any time. So a forward of ours names the
function that it stands for, and each call compares that function with the one in force.
"""

import sys
from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = [
    "describe", "is_defined_by", "is_in_force", "mark", "parts_are_own", "replaced_part", "replacement",
    "stock_forward",
]  # fmt: skip


_PARTS: tuple[Any, ...] = (nn.Linear, nn.Dropout, nn.Identity)
# The forwards that torch.nn defines for the parts, once they have been seen in force.
_own: tuple[Any, ...] = (None, None, None)


def mark(forward: Any, stock: Callable[..., Any], cls: type | None) -> Any:
    """Mark a forward as ours, which stands for `stock`, and return it.

    Args:
        forward: Our forward.
        stock: The forward that ours computes faster.
        cls: The class whose forward `stock` is, if ours is the forward of a subclass; None if ours is set on the class
            itself, where a later one takes its place.
    """
    forward._lora_kernels_stock, forward._lora_kernels_of = stock, cls
    return forward


def stock_forward(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward behind one of ours; return any other forward as it is."""
    return getattr(forward, "_lora_kernels_stock", forward)


def is_in_force(forward: Any) -> bool:
    """Return whether a forward is ours, and the class still has the forward that ours stands for."""
    stock = stock_forward(forward)
    return stock is not forward and replacement(forward) is None


def replacement(forward: Any) -> Callable[..., Any] | None:
    """Return the forward that others have set on the class behind one of ours, or None."""
    cls = getattr(forward, "_lora_kernels_of", None)
    if cls is None:
        return None
    current, stock = cls.forward, forward._lora_kernels_stock
    return None if current is stock or stock_forward(current) is stock else current


def is_defined_by(forward: Any, cls: type) -> bool:
    """Return whether a forward is the one in the body of a class, and not one that was set on the class later.

    A function that was set is defined in another module or under another name. A function that `functools.wraps` has
    renamed still reads the globals of the module that defines it.
    """
    module = sys.modules.get(cls.__module__)
    return (
        getattr(forward, "__qualname__", "") == f"{cls.__qualname__}.forward"
        and getattr(forward, "__globals__", None) is getattr(module, "__dict__", forward)
        and not hasattr(forward, "__wrapped__")
    )


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
    """Return the words for a forward that others have set."""
    module, name = getattr(forward, "__module__", ""), getattr(forward, "__qualname__", type(forward).__name__)
    return f"{module}.{name}" if module else name
