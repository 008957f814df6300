"""A call of our layer less one part after the other, for `bench.host --parts` to time beside the whole.

What a stage lacks is replaced by its results of one call: first Triton's launcher, then the passes as well, then the
plans as well. So the parts that the stages differ by sum to the whole, and each is timed where it belongs, with the
caches as the call leaves them. Two smaller parts are timed alone, by the same arguments as in the call.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch.overrides import TorchFunctionMode
from triton.backends.nvidia import driver as nvidia

from bench.host_tables import ALLOCATION, AROUND, ENCODING, PASSES, PLANS
from lora_kernels import plan

__all__ = ["Part", "parts_of"]

Call = Callable[[], Any]


class Part(NamedTuple):
    """A function to time, and the context to time it in."""

    call: Call
    during: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


class _Recorded(NamedTuple):
    arguments: tuple[Any, ...]
    result: Any


@contextlib.contextmanager
def _replaced(owner: Any, name: str, by: Any) -> Iterator[None]:
    real = getattr(owner, name)
    setattr(owner, name, by)
    try:
        yield
    finally:
        setattr(owner, name, real)


def _record(owner: Any, name: str, call: Call) -> list[_Recorded]:
    """Run a call; return every call of a function within it."""
    real, found = getattr(owner, name), []

    def recorded(*arguments: Any) -> Any:
        result = real(*arguments)
        found.append(_Recorded(arguments, result))
        return result

    with _replaced(owner, name, recorded):
        call()
    return found


def _without_launches(call: Call) -> Part:
    return Part(call, lambda: _replaced(nvidia.CudaLauncher, "__call__", lambda *_: None))


def _without_passes(call: Call) -> Part:
    real, results = plan.run, itertools.cycle([one.result for one in _record(plan, "run", call)])

    def known(*_: Any) -> Any:
        return next(results)

    def run(backend: str, _: Any, *arguments: Any) -> Any:
        return real(backend, known, *arguments)

    return Part(call, lambda: _replaced(plan, "run", run))


def _without_plans(call: Call) -> Part:
    results = itertools.cycle([one.result for one in _record(plan, "run", call)])
    return Part(call, lambda: _replaced(plan, "run", lambda *_: next(results)))


class _Allocations(TorchFunctionMode):
    """Records what is allocated; a mode below this one would see the registered operators of our layers alone."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Call] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), func.__name__
        if name in ("empty", "empty_like", "empty_strided", "new_empty"):
            layout = tuple(out.shape), out.stride()
            self.found.append(functools.partial(torch.empty_strided, *layout, dtype=out.dtype, device=out.device))
        elif name == "zeros":
            self.found.append(functools.partial(torch.zeros, tuple(out.shape), dtype=out.dtype, device=out.device))
        return out


def _allocations(call: Call) -> Part:
    real, mode = plan.run, _Allocations()

    # the mode begins within the pass, because autograd leaves it for a backward
    def run(*arguments: Any) -> Any:
        with mode:
            return real(*arguments)

    with _replaced(plan, "run", run):
        call()
    return Part(_all(mode.found))


def _encoding(call: Call) -> Part:
    utils = triton.runtime.driver.active.utils
    encode = utils.fill_tma_descriptor_tiled
    recorded = _record(utils, "fill_tma_descriptor_tiled", call)
    return Part(_all([functools.partial(encode, *one.arguments) for one in recorded]))


def _all(calls: list[Call]) -> Call:
    """Return a function that makes several calls."""

    def run() -> None:
        for call in calls:
            call()

    return run


_PARTS = {
    AROUND: _without_plans, PLANS: _without_passes, PASSES: _without_launches,
    ALLOCATION: _allocations, ENCODING: _encoding,
}  # fmt: skip


def parts_of(row: dict[str, Call]) -> dict[str, dict[str, Part]]:
    """Return the stages and parts of a row: name to pass to the function to time."""
    return {name: {which: part(call) for which, call in row.items()} for name, part in _PARTS.items()}
