"""What a pass asks for, noted once and asked for again.

Of the time that the host takes for a pass over few rows, most goes to deciding: which tile, which strides, what to
allocate. For tensors of a kind the answer is always the same list of steps: PyTorch's operators, allocations most of
all, and launches. A `Recorder` watches a pass and notes them, a `Recording` takes them with other tensors of that kind.

A recording has registers: first the tensors that it is called with, then constants and whatever the steps make. A step
is a function, the registers of its arguments, one for its result, and those that nobody reads after it: what was made
for a pass is freed as soon as in the pass itself.
"""

import functools
import math
import operator
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Recorder", "Recording", "call", "noting", "record"]

_aten = torch.ops.aten
_ALLOCATIONS = {
    _aten.empty.memory_format, _aten.empty_strided.default, _aten.new_empty.default, _aten.new_empty_strided.default,
}  # fmt: skip


class Recording:
    """The steps of a pass.

    Args:
        steps: Function, places of its arguments, place of its result, and places to empty, of each.
        rest: What the registers behind the tensors begin with.
        result: The place of the result.
    """

    def __init__(
        self, steps: Sequence[tuple[Callable, Sequence[int], int, Sequence[int]]], rest: list[Any], result: int
    ) -> None:
        self.steps = [(function, _getter(places), at, tuple(done)) for function, places, at, done in steps]
        self.rest, self.result = rest, result

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        """Take every step."""
        registers = [*tensors, *self.rest]
        for function, arguments, at, done in self.steps:
            registers[at] = function(*arguments(registers))
            for place in done:
                registers[place] = None
        return registers[self.result]


class _Memory(NamedTuple):
    """Where a register's tensor lies, known beyond its end: it is not held, so that a pass takes no more memory."""

    place: int
    address: int
    storage: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class Recorder(TorchDispatchMode):
    """Notes the steps of a pass that runs inside it, for `record`.

    Args:
        tensors: All that the pass is given.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.steps: list[tuple[Callable, list[int], int]] = []
        self.count = self.given = 0  # registers, and those that are given
        self.objects: dict[int, tuple[weakref.ref, int]] = {}  # by id: an object and its register
        self.memory: list[_Memory] = []
        self.constants: dict[Any, int] = {}
        self.inside = False  # a step of ours, whose own operators are no steps
        for t in tensors:
            self._register(t)
        self.given = len(tensors)
        addresses = {t.data_ptr() for t in tensors}
        self.problem = "" if len(addresses) == len(tensors) else "two tensors at one address: which is meant?"

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run an operator of PyTorch's and note it, unless it makes views: those are noted when they are used."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.inside or _is_view(func, args, out):
            return out
        if func in _ALLOCATIONS:
            make = partial(torch.empty_strided, out.shape, out.stride(), dtype=out.dtype, device=out.device)
            self._note(make, (), out)
        elif out is None or isinstance(out, Tensor):
            function = partial(_by_name, func, tuple(kwargs)) if kwargs else func
            self._note(function, (*args, *kwargs.values()), out)
        else:
            self.problem = self.problem or f"{func} gives no tensor"
        return out

    def call(self, function: Callable, arguments: Sequence[Any], by_address: bool) -> Any:
        """Call a function and note it as a step, whatever it does; `by_address` if it takes no more of a tensor."""
        self.inside = True
        try:
            out = function(*arguments)
        finally:
            self.inside = False
        self._note(function, arguments, out, by_address)
        return out

    def recording(self, result: Any) -> Recording | str:
        """The recording of a pass with this result, or why it cannot be repeated."""
        at = self._tried(result)
        if at is None:
            return self.problem
        constants = {place: value for (_, value), place in self.constants.items()}
        lasting = {*range(self.given), *constants, at}
        last = {place: i for i, (_, places, made) in enumerate(self.steps) for place in (*places, made)}
        steps = [
            (*step, [place for place, end in last.items() if end == i and place not in lasting])
            for i, step in enumerate(self.steps)
        ]
        return Recording(steps, [constants.get(place) for place in range(self.given, self.count)], at)

    def _note(self, function: Callable, arguments: Sequence[Any], out: Any, by_address: bool = False) -> None:
        places = self._tried(arguments, by_address, each=True)
        if places is not None:
            written_to = out is None or self._known(out) is not None
            self._step(function, places, None if written_to else out)

    def _tried(self, value: Any, by_address: bool = False, each: bool = False) -> Any:
        """The place of a value, or those of `each` in it; None where that cannot be said."""
        if not self.problem:
            try:
                return [self._place(v, by_address) for v in value] if each else self._place(value, by_address)
            except _CannotRepeatError as error:
                self.problem = str(error)
        return None

    def _step(self, function: Callable, places: list[int], out: Any, of: int | None = None) -> int:
        """Note a step; its result's register. `of` is the one that has what the result is a view of."""
        at = self._register(out, of is None)
        self.steps.append((function, places, at))
        return at

    def _register(self, value: Any = None, fresh: bool = True) -> int:
        place, self.count = self.count, self.count + 1
        if value is not None:
            self.objects[id(value)] = weakref.ref(value), place
        if isinstance(value, Tensor):
            memory = _Memory(
                place, value.data_ptr(), value.untyped_storage().data_ptr(), value.storage_offset(), value.shape,
                value.stride(), value.dtype,
            )  # fmt: skip
            if fresh:  # what the pass had there before is gone
                self.memory = [m for m in self.memory if m.place < self.given or m.storage != memory.storage]
            self.memory.append(memory)
        return place

    def _known(self, value: Any) -> int | None:
        reference, place = self.objects.get(id(value), (None, None))
        return place if reference is not None and reference() is value else None

    def _place(self, value: Any, by_address: bool) -> int:
        """The register that has a value when its turn comes."""
        place = self._known(value)
        if place is not None:
            return place
        if isinstance(value, Tensor):
            return self._place_of_view(value, by_address)
        if isinstance(value, (tuple, list)):
            if type(value) not in (tuple, list):
                raise _CannotRepeatError(f"a {type(value).__name__} is not known to it")
            places = [self._place(v, by_address) for v in value]
            if type(value) is list or any(place not in self.constants.values() for place in places):
                return self._step(_list if type(value) is list else _tuple, places, None)
        key = type(value), value
        if key not in self.constants:
            self.constants[key] = self._register()
        return self.constants[key]

    def _place_of_view(self, t: Tensor, by_address: bool) -> int:
        """The register of a tensor like a view, or that of one made here of the tensor that it is a view of."""
        if not t.numel():
            raise _CannotRepeatError("an empty view, which is nowhere")
        storage = t.untyped_storage().data_ptr()
        # not of tensors that were given, which may share their memory with any other, unless it begins where they do
        near = [
            m
            for m in self.memory
            if m.storage == storage and m.dtype == t.dtype and (m.place >= self.given or m.address == t.data_ptr())
        ]
        for m in near:
            alike = m.shape == t.shape and m.strides == t.stride()
            if m.address == t.data_ptr() and (alike or (by_address and math.prod(m.shape) == t.numel())):
                return m.place  # or a transpose of it, whose address is the same
        if not near:
            raise _CannotRepeatError(f"a tensor of {list(t.shape)} comes from nowhere")
        view = partial(_view, t.shape, t.stride(), t.storage_offset() - near[0].offset)
        return self._step(view, [near[0].place], t, of=near[0].place)


class _CannotRepeatError(Exception):
    """A step of a pass cannot be told by the tensors that the pass was given."""


class _Noting(threading.local):
    recorder: Recorder | None = None


_noting = _Noting()


def noting() -> bool:
    """Whether a pass is being noted in this thread."""
    return _noting.recorder is not None


def record(pass_: Callable, arguments: Sequence[Any], tensors: Sequence[Tensor]) -> tuple[Any, Recording | str]:
    """Run a pass; its result, and its recording, or why it cannot be repeated.

    Args:
        pass_: A function of tensors and of what they are of, and of nothing else that changes.
        arguments: Its arguments.
        tensors: Every tensor in them, in order.
    """
    recorder = _noting.recorder = Recorder(tensors)
    try:
        with recorder:
            result = pass_(*arguments)
    finally:
        _noting.recorder = None
    return result, recorder.recording(result)


def call(function: Callable, *arguments: Any, by_address: bool = False) -> Any:
    """Call a function of ours, as a step of the pass if one is being noted."""
    recorder = _noting.recorder
    return function(*arguments) if recorder is None else recorder.call(function, arguments, by_address)


def _is_view(function: Any, arguments: Sequence[Any], out: Any) -> bool:
    """Whether an operator has made views and no more. One that may, such as `to`, can be seen to make a copy."""
    if not _may_view(function):
        return False
    first = out[0] if isinstance(out, (tuple, list)) else out
    return first.untyped_storage().data_ptr() == arguments[0].untyped_storage().data_ptr()


@functools.cache
def _may_view(function: Any) -> bool:
    aliases = [result.alias_info for result in function._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def _getter(places: Sequence[int]) -> Callable[[list[Any]], Sequence[Any]]:
    if len(places) > 1:
        return operator.itemgetter(*places)
    return operator.itemgetter(slice(places[0], places[0] + 1) if places else slice(0))  # that of one is no sequence


def _tuple(*items: Any) -> tuple[Any, ...]:
    return items


def _list(*items: Any) -> list[Any]:
    return [*items]


def _by_name(function: Callable, names: tuple[str, ...], *arguments: Any) -> Any:
    count = len(arguments) - len(names)
    return function(*arguments[:count], **dict(zip(names, arguments[count:], strict=True)))


def _view(shape: Sequence[int], strides: Sequence[int], offset: int, base: Tensor) -> Tensor:
    return torch.as_strided(base, shape, strides, base.storage_offset() + offset)
