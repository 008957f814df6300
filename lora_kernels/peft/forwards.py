"""Which forward of a class is in force: the one that its own library defines, ours over it, or one that others set.

Libraries replace forwards on classes (LongLoRA, llm-foundry, Unsloth) at any time. So a forward of ours names the
function that it stands for, and each call compares that function with the one in force.
"""

import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

__all__ = [
    "at_work", "call_replacement", "class_forward", "describe", "is_called_plainly", "is_defined_by", "is_in_force",
    "is_ours", "mark", "members_are_own", "parts_are_own", "replaced_member", "replaced_part", "replacement",
    "stock_forward",
]  # fmt: skip


_PARTS: tuple[Any, ...] = (nn.Linear, nn.Dropout, nn.Identity)
# What PyTorch defines for the parts, once that has been seen in force; in the order of `parts_are_own`.
_own: tuple[Any, ...] = (None,) * 7

# What the forward of PEFT's layers calls and reads of its class on the way that ours computes.
_MEMBERS = ("_check_forward_args", "_cast_input_dtype", "active_adapters", "disable_adapters", "merged")
# What PEFT defines for these, once that has been seen in force.
_own_members: tuple[Any, ...] = (None,) * 5

# The forward of ours that is set on each class itself and computes; others may have wrapped it, or keep an earlier one.
at_work: dict[type, Any] = {}


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
            itself, and computes only while it is `at_work`.
    """
    forward._lora_kernels_mark = _Mark(forward, stock, cls)
    return forward


def class_forward(cls: type[nn.Module]) -> Any:
    """Return the forward of a class, or None for the classes of `torch.jit`, whose modules alone have one."""
    return getattr(cls, "forward", None)


def is_ours(forward: Any) -> bool:
    """Return whether a forward is one of ours, and not a function that wraps one."""
    own = getattr(forward, "_lora_kernels_mark", None)
    return own is not None and own.forward is forward


def stock_forward(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward behind one of ours; return any other forward as it is."""
    return forward._lora_kernels_mark.stock if is_ours(forward) else forward  # type: ignore[attr-defined]


def is_in_force(forward: Any) -> bool:
    """Return whether a forward is ours, and computes what it stands for."""
    return is_ours(forward) and replacement(forward) is None


def replacement(forward: Any) -> Callable[..., Any] | None:
    """Return the forward to call in place of one of ours, or None.

    It is the one that others have set on the class behind ours; or the stock forward, if ours was set on the class
    itself and that has ended.
    """
    _, stock, cls = forward._lora_kernels_mark
    if cls is None:
        return None if forward in at_work.values() else stock
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


# A compiler does not find the globals of a function to be those of its module.
is_defined_by._dynamo_marked_constant = True  # type: ignore[attr-defined]


def parts_are_own() -> bool:
    """Return whether a call of nn.Linear, nn.Dropout or nn.Identity, the parts of LoRA layers, runs PyTorch's own code.

    Others may set forward, `__call__` or `_call_impl` of these classes, or `F.linear` or `F.dropout`.
    """
    # Every call of a layer asks, so the usual answer takes comparisons alone.
    linear, dropout, identity, f_linear, f_dropout, call, impl = _own
    return (
        nn.Linear.forward is linear and nn.Dropout.forward is dropout and nn.Identity.forward is identity
        and F.linear is f_linear and F.dropout is f_dropout
        and nn.Linear.__call__ is call and nn.Dropout.__call__ is call and nn.Identity.__call__ is call
        and nn.Linear._call_impl is impl and nn.Dropout._call_impl is impl and nn.Identity._call_impl is impl
    ) or replaced_part() is None  # fmt: skip


def replaced_part() -> tuple[str, Any] | None:
    """Return what a call of the parts of LoRA layers runs and others have set: its name and the function; or None."""
    global _own
    for kind in _PARTS:
        if not is_defined_by(kind.forward, kind):
            return f"the forward of nn.{kind.__name__}", kind.forward
        for name in ("__call__", "_call_impl"):
            current, own = getattr(kind, name), getattr(nn.Module, name)
            if current is not own or getattr(current, "__globals__", None) is not vars(torch.nn.modules.module):
                return f"nn.{kind.__name__}.{name}", current
    if F.linear is not torch._C._nn.linear:
        return "torch.nn.functional.linear", F.linear
    if getattr(F.dropout, "__globals__", None) is not vars(F):
        return "torch.nn.functional.dropout", F.dropout
    _own = *(kind.forward for kind in _PARTS), F.linear, F.dropout, nn.Module.__call__, nn.Module._call_impl
    return None


def members_are_own(kind: Any) -> bool:
    """Return whether what PEFT's forward calls and reads of a layer's class is PEFT's own code.

    A subclass may have its own `_cast_input_dtype` or `active_adapters`, and others may set one on PEFT's classes.
    """
    check, cast, active, disabled, merged = _own_members
    return (
        kind._check_forward_args is check and kind._cast_input_dtype is cast and kind.active_adapters is active
        and kind.disable_adapters is disabled and kind.merged is merged
    ) or replaced_member(kind) is None  # fmt: skip


def replaced_member(kind: type) -> tuple[str, Any] | None:
    """Return the member that PEFT's forward calls or reads of a class and others have set: name, function; or None."""
    global _own_members
    for name in _MEMBERS:
        owner = next(cls for cls in kind.__mro__ if name in vars(cls))
        member = vars(owner)[name]
        function, module = getattr(member, "fget", member), sys.modules.get(owner.__module__)
        own = owner.__module__.startswith("peft.") and getattr(function, "__globals__", None) is vars(module)
        if not own or function.__qualname__ != f"{owner.__qualname__}.{name}":
            return name, function
    _own_members = tuple(getattr(kind, name) for name in _MEMBERS)
    return None


def is_called_plainly(kind: type[nn.Module]) -> bool:
    """Return whether a call of a module of a class is nn.Module's, and not one of the class's own."""
    return kind.__call__ is nn.Module.__call__ and kind._call_impl is nn.Module._call_impl


def describe(forward: Any) -> str:
    """Return the words for a forward that others have set: where its code is defined, whatever it is named after."""
    code, module = getattr(forward, "__code__", None), getattr(forward, "__globals__", {}).get("__name__", "")
    name = getattr(code, "co_qualname", getattr(forward, "__qualname__", type(forward).__name__))
    return f"{module}.{name}" if module else name


# Seen now, because a compiler that traces a first call could not look these up.
replaced_part()
