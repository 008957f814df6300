"""What a forward reaches by names: members of its classes, globals, attributes of modules and classes; with values.

A forward that was recognised may change without any change of its own: a method that it calls is replaced, or a base
class's forward that it reaches by `super()`, a helper of its file, `F.silu`. So all that its code names is kept with
its value, and compared by identity at each call.
"""

import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

__all__ = ["Names", "names_of"]

# What a namespace, by a name, had as its value.
_Read = tuple[Mapping[str, Any], str, Any]


class Names:
    """The names that a forward reaches, with their values."""

    def __init__(self, forward: Callable[..., Any], kind: type) -> None:
        self._reads = list(_reads(forward, kind, set()))

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
    for name in names & own.keys():
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


def _names(code: types.CodeType) -> Iterator[str]:
    """Yield the names in a function's code and in that of its inner functions."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
