"""What a pass asks for, noted once and asked for again.

For tensors of a kind a pass takes the same steps every time: PyTorch's operators, most of them allocations, and
launches. Between them it decides what to do next, which on few rows is a good part of the host's time. A `Recorder`
watches a pass and notes the steps, a `Recording` takes them with other tensors of that kind.

A recording has registers: first the tensors that it is called with, then constants and whatever the steps make. A step
is a function, the registers of its arguments, one for its result, and those that nobody needs after it: what was made
for a pass is freed as soon as in the pass itself, or sooner.
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

_CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format)
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


class _Step(NamedTuple):
    """A step as it is noted; `lends` says that its result may point to what its arguments hold."""

    function: Callable
    places: list[int]
    at: int
    lends: bool


class _Memory(NamedTuple):
    """Where a tensor lies, of a register or a view of one. It is not held: noting takes no more memory than the pass.

    Attributes:
        place: Its register, or None if nobody has asked for that view yet.
        root: The register that it is a view of, or its own.
        offset: Elements from the beginning of the root's.
        address: Of its first element.
        geometry: Shape, strides and dtype.
    """

    place: int | None
    root: int
    offset: int
    address: int
    geometry: tuple[Any, ...]


class Recorder(TorchDispatchMode):
    """Notes the steps of a pass that runs inside it, for `record`.

    Args:
        tensors: All that the pass is given, each at an address of its own.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.steps: list[_Step] = []
        self.count, self.given = 0, len(tensors)  # of registers
        self.objects: dict[int, tuple[weakref.ref, int]] = {}  # by id: an object and its register
        self.memory: dict[int, list[_Memory]] = {}  # by the address of the storage
        self.constants: dict[int, tuple[int, Any]] = {}  # by id: their register, and they themselves
        self.inside = False  # a step of ours, whose own operators are no steps
        self.problem = ""
        for t in tensors:
            self._register(t)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run an operator of PyTorch's and note it, unless it makes views: those are noted when they are used."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.inside or self.problem:
            return out
        try:
            self._note_operator(func, args, kwargs, out)
        except _CannotRepeatError as error:
            self.problem = str(error)
        return out

    def call(self, function: Callable, arguments: Sequence[Any], by_address: bool) -> Any:
        """Call a function and note it as a step, whatever it does; `by_address` if it takes no more of a tensor."""
        outer, self.inside = self.inside, True
        try:
            out = function(*arguments)
        finally:
            self.inside = outer
        if not (self.inside or self.problem):
            try:
                places = [self._place(v, by_address) for v in arguments]
                # what it gives is its own, though it may have given the same before: nobody knows what it goes by
                self._step(function, places, out, lends=out is not None and not isinstance(out, Tensor))
            except _CannotRepeatError as error:
                self.problem = str(error)
        return out

    def recording(self, result: Any) -> Recording | str:
        """The recording of a pass with this result, or why it cannot be repeated."""
        try:
            at = None if self.problem else self._place(result)
        except _CannotRepeatError as error:
            self.problem = str(error)
        if self.problem:
            return self.problem
        last: dict[int, int] = {}
        for i, step in reversed(list(enumerate(self.steps))):
            needed_until = max(i, last.setdefault(step.at, i) if step.lends else i)
            for place in step.places:
                last[place] = max(needed_until, last.get(place, 0))
            last.setdefault(step.at, i)
        constants = dict(self.constants.values())
        ends: list[list[int]] = [[] for _ in self.steps]
        for place, end in last.items():
            if place >= self.given and place not in constants and place != at:
                ends[end].append(place)
        steps = [(step.function, step.places, step.at, done) for step, done in zip(self.steps, ends, strict=True)]
        return Recording(steps, [constants.get(place) for place in range(self.given, self.count)], at)

    def _note_operator(self, func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        if _is_view(func, args, out):
            root, offset = self._root(args[0])
            for view in out if isinstance(out, (tuple, list)) else (out,):
                if view.dtype == args[0].dtype:
                    self._remember(view, None, root, offset + view.storage_offset() - args[0].storage_offset())
        elif func in _ALLOCATIONS:
            make = partial(torch.empty_strided, out.shape, out.stride(), dtype=out.dtype, device=out.device)
            self._step(make, [], out)
        elif out is None or isinstance(out, Tensor):
            function = partial(_by_name, func, tuple(kwargs)) if kwargs else func
            places = [self._place(v) for v in (*args, *kwargs.values())]
            self._step(function, places, None if _aliases(func) == "written" else out)
        else:
            raise _CannotRepeatError(f"{func} gives no tensor")

    def _step(self, function: Callable, places: list[int], out: Any, lends: bool = False) -> int:
        """Note a step; the register of what it gives."""
        at = self._register(out)
        self.steps.append(_Step(function, places, at, lends))
        return at

    def _register(self, value: Any = None) -> int:
        """A new register for something new, or for nothing that has to be known again."""
        place, self.count = self.count, self.count + 1
        if value is not None:
            self._recognise(value, place)
        if isinstance(value, Tensor):
            storage = value.untyped_storage().data_ptr()  # what the pass had there before is gone
            self.memory[storage] = [m for m in self.memory.get(storage, ()) if m.root < self.given]
            self._remember(value, place, place, 0)
        return place

    def _recognise(self, value: Any, place: int) -> None:
        try:
            self.objects[id(value)] = weakref.ref(value), place
        except TypeError:
            raise _CannotRepeatError(f"a {type(value).__name__} may not be what it was") from None

    def _remember(self, t: Tensor, place: int | None, root: int, offset: int) -> None:
        memory = _Memory(place, root, offset, t.data_ptr(), (t.shape, t.stride(), t.dtype))
        self.memory.setdefault(t.untyped_storage().data_ptr(), []).append(memory)

    def _known(self, value: Any) -> int | None:
        reference, place = self.objects.get(id(value), (None, None))
        return place if reference is not None and reference() is value else None

    def _found(self, t: Tensor, by_address: bool = False) -> _Memory:
        """Where a tensor lies that autograd has put in the place of the one that was noted; the latest that was."""
        found = None
        for m in reversed(self.memory.get(t.untyped_storage().data_ptr(), ())):
            shape, _, dtype = m.geometry
            alike = m.geometry == (t.shape, t.stride(), t.dtype)
            alike = alike or (by_address and dtype == t.dtype and math.prod(shape) == t.numel())  # a transpose, say
            if alike and m.address == t.data_ptr():
                found = found or m
                if m.root != found.root and min(m.root, found.root) < self.given:
                    raise _CannotRepeatError(f"a tensor of {list(t.shape)} may be of either of two that overlap")
        if found is None:
            raise _CannotRepeatError(f"a tensor of {list(t.shape)} comes from nowhere")
        return found

    def _root(self, t: Tensor) -> tuple[int, int]:
        """The register that a tensor is a view of, or its own, and its offset there."""
        place = self._known(t)
        if place is not None:
            return place, 0
        found = self._found(t)
        return found.root, found.offset

    def _place(self, value: Any, by_address: bool = False) -> int:
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
            constants = dict(self.constants.values())
            if type(value) is list or any(place not in constants for place in places):
                return self._step(_list if type(value) is list else _tuple, places, None, lends=True)
        elif not isinstance(value, _CONSTANTS):
            raise _CannotRepeatError(f"a {type(value).__name__} may hold anything")
        if id(value) not in self.constants:
            self.constants[id(value)] = self._register(), value
        return self.constants[id(value)][0]

    def _place_of_view(self, t: Tensor, by_address: bool) -> int:
        """The register of a view, made here if there is none yet; `by_address` perhaps that of a transpose of it."""
        found = self._found(t, by_address)
        if found.place is not None:
            return found.place
        memory = self.memory[t.untyped_storage().data_ptr()]
        if by_address:
            for m in memory:
                if m.place == found.root and m.address == found.address and math.prod(m.geometry[0]) == t.numel():
                    return m.place
        shape, strides, _ = found.geometry
        place = self._step(partial(_view, shape, strides, found.offset), [found.root], None)
        memory.append(found._replace(place=place))
        return place


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
        tensors: Every tensor in them, in order, each at an address of its own.
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
    if _aliases(function) != "viewed":
        return False
    first = out[0] if isinstance(out, (tuple, list)) else out
    return first.untyped_storage().data_ptr() == arguments[0].untyped_storage().data_ptr()


@functools.cache
def _aliases(function: Any) -> str:
    """Whether what an operator gives is what it was given, "written" to or perhaps "viewed", or "" for neither."""
    infos = [result.alias_info for result in function._schema.returns]
    if not any(infos):
        return ""
    return "written" if any(info is not None and info.is_write for info in infos) else "viewed"


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
