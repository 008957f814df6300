"""What a forward reaches by names: members of its classes, globals, attributes of modules and classes; with values.

A forward that was recognised may change without any change of its own: a method that it calls is replaced, or a base
class's forward that it reaches by `super()`, a helper of its file, `F.silu`. So all that its code names is kept with
its value, and compared by identity at each call. What can change and stay the same object (a list, a dictionary, an
object with a state of its own) cannot be compared in this way.
"""

import dis
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["Names", "is_fixed", "names_of"]

# What a namespace, by a name, had as its value.
_Read = tuple[Mapping[str, Any], str, Any]
_FIXED = (
    bool, int, float, str, type(None), torch.dtype, type, types.ModuleType, types.FunctionType, types.MethodType,
    types.BuiltinFunctionType, property, staticmethod, classmethod, torch.jit.ScriptFunction,
    torch._ops.OpOverload, torch._ops.OpOverloadPacket,
)  # fmt: skip


def is_fixed(value: Any) -> bool:
    """Return whether a value is a constant, a function, a class or a file, and not an object that can change."""
    if isinstance(value, functools.partial):
        return all(map(is_fixed, (value.func, *value.args, *value.keywords.values())))
    return isinstance(value, _FIXED)


class Names:
    """The names that a forward reaches, with their values.

    Attributes:
        loose: A name whose value can change and stay the same object, "" if there is none.
    """

    def __init__(self, forward: Callable[..., Any], kind: type) -> None:
        self._reads = list(_reads(forward, kind, set()))
        self.loose = next((name for _, name, value in self._reads if not is_fixed(value)), "")

    def still(self) -> bool:
        """Return whether each name still has its value."""
        return all(space.get(name) is value for space, name, value in self._reads)


_known: dict[tuple[Callable[..., Any], type], Names] = {}


def names_of(forward: Callable[..., Any], kind: type) -> Names:
    """Return the names that a forward of a class reaches; the same object as long as their values are the same."""
    found = _known.get((forward, kind))
    if found is None or not found.still():
        found = _known[forward, kind] = Names(forward, kind)
    return found


def _reads(function: Any, kind: type, seen: set[Any]) -> Iterator[_Read]:
    function = getattr(function, "__func__", function)
    wrapped, code = getattr(function, "__wrapped__", None), getattr(function, "__code__", None)
    if wrapped is not None and wrapped not in seen:
        yield from _reads(wrapped, kind, seen)
    if code is None or function in seen:
        return
    seen.add(function)
    names, own = set(_names(code)), function.__globals__
    for owner in kind.__mro__:
        if owner in nn.Module.__mro__:
            continue
        for name in names & vars(owner).keys():
            value = vars(owner)[name]
            yield vars(owner), name, value
            yield from _inner_reads(value, kind, seen)
    # An attribute may have the name of a global.
    for name in set(_globals(code)) & own.keys():
        value = own[name]
        yield own, name, value
        if isinstance(value, (types.ModuleType, type)):
            for attribute in names & vars(value).keys():
                yield vars(value), attribute, vars(value)[attribute]
        else:
            yield from _inner_reads(value, kind, seen)


def _inner_reads(value: Any, kind: type, seen: set[Any]) -> Iterator[_Read]:
    """Yield what a function, the function of a property or of a static or class method reaches in turn."""
    value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    # A function of PyTorch is replaced as a whole.
    if isinstance(value, types.FunctionType) and not (value.__module__ or "").startswith("torch."):
        yield from _reads(value, kind, seen)


def _globals(code: types.CodeType) -> Iterator[str]:
    """Yield the globals that a function and its inner functions and classes load."""
    yield from (one.argval for one in dis.get_instructions(code) if one.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _globals(constant)


def _names(code: types.CodeType) -> Iterator[str]:
    """Yield the names in a function's code and in that of its inner functions."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
