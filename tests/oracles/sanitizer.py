"""Watch every load and store of a kernel in Triton's interpreter.

For each launch: every load hits a logical element of an input (strides honoured, so the gap between the rows of a
slice is out of bounds), every store hits an output, each output element is stored exactly once (twice is a race on a
GPU, never is stale memory). What a launch writes itself is not there to be read, but for the parts of a split sum, and
of those only what has been stored, and for a gradient that is added to. Counters of arrivals start at 0 and end at 0. A
32-bit sum or product that overflows is an error as well. Tuples of arguments and TMA descriptors count as the tensors in them.
"""

import dataclasses
import inspect
import operator
from collections.abc import Iterable

import numpy as np
import torch

OUTPUTS = {
    "_shrink_kernel": {"s_ptrs", "keep_ptrs", "parts_ptr", "h_ptr"},
    "_matmul_expand_kernel": {"y0", "y1", "y2", "y3"},
    "_dequantize_kernel": {"w_ptr"},
    "_segments_kernel": {"table_ptr"},
    "_wgrad_kernel": {"g_ptrs", "ds_ptrs", "g_parts_ptr", "ds_parts_ptr", "dgate_ptr", "dup_ptr"},
}
PARTS = {"parts_ptr", "g_parts_ptr", "ds_parts_ptr"}
COUNTERS = "arrivals_ptr"
MASKS = "keep_ptrs"


class MemoryFault(AssertionError):
    """A kernel touched what it must not, or left something out."""


class Launch:
    """What one launch may touch, and what it did."""

    def __init__(self, kernel: str, arguments: dict[str, object]) -> None:
        self.kernel, self.loads = kernel, 0
        self.moved = {"touched": 0, "issued": 0, "stored": 0, "parts": 0, "parts_read": 0}  # bytes
        self.bytes_seen = set()
        self.tensors = {name: t for name, value in arguments.items() for t in _tensors(value)}
        written = OUTPUTS.get(kernel, set())
        self.counters = self.tensors.pop(COUNTERS, None)
        unread = {*written, COUNTERS} - ({"g_ptrs"} if any(arguments.get("ACCUMULATE") or ()) else set())
        self.readable = _logical(arguments, [name for name in arguments if name not in unread])
        self.writable = _logical(arguments, written)
        self.parts = np.isin(self.writable, _logical(arguments, written & PARTS))
        self.stores = np.zeros(self.writable.size, np.int64)
        self.spared = _spared(arguments, written, self.writable, self.parts)

    def load(self, addresses: np.ndarray, size: int) -> None:
        self.loads += addresses.size
        own = np.isin(addresses, self.writable[self.parts & (self.stores > 0)])
        self.moved["parts_read"] += int(own.sum()) * size
        self.moved["issued"] += int((~own).sum()) * size
        if state.log is not None:
            fresh = set(addresses[~own].tolist()) - self.bytes_seen
            self.bytes_seen |= fresh
            self.moved["touched"] += len(fresh) * size
        self._positions("load outside the inputs", self.readable, addresses[~own])

    def store(self, addresses: np.ndarray, size: int) -> None:
        parts = int(np.isin(addresses, self.writable[self.parts]).sum())
        self.moved["parts"] += parts * size
        self.moved["stored"] += (addresses.size - parts) * size
        addresses = addresses[~self._counts(addresses)]
        positions = self._positions("store outside the outputs", self.writable, addresses)
        self.stores += np.bincount(positions, minlength=self.stores.size)

    def finish(self) -> None:
        if self.counters is not None and self.counters.count_nonzero():
            raise MemoryFault(f"{self.kernel}: {self.counters.count_nonzero()} counters of arrivals not left at 0")
        for what, bad in (("more than once", self.stores > 1), ("never", (self.stores == 0) & ~self.spared)):
            if bad.any():
                raise MemoryFault(f"{self.kernel}: {bad.sum()} of {bad.size} output elements stored {what}")

    def _counts(self, addresses: np.ndarray) -> np.ndarray:
        if self.counters is None:
            return np.zeros(addresses.shape, bool)
        first = self.counters.data_ptr()
        return (addresses >= first) & (addresses < first + self.counters.nbytes)

    def _positions(self, what: str, allowed: np.ndarray, addresses: np.ndarray) -> np.ndarray:
        positions = np.searchsorted(allowed, addresses)
        inside = positions < allowed.size
        inside[inside] = allowed[positions[inside]] == addresses[inside]
        if not inside.all():
            raise MemoryFault(f"{self.kernel}: {what}, {(~inside).sum()} lanes, {self._near(addresses[~inside][0])}")
        return positions

    def _near(self, address: int) -> str:
        def distance(name: str) -> int:
            return abs(int(address) - self.tensors[name].data_ptr())

        name = min(self.tensors, key=distance)
        t = self.tensors[name]
        offset = (int(address) - t.data_ptr()) / t.element_size()
        return f"near {name} {tuple(t.shape)} strides {t.stride()}, element offset {offset:g}"


class _State:
    launch: Launch | None = None
    on = True
    launches = 0
    log: list[Launch] | None = None  # a list to collect launches in, with what they moved


state = _State()


def install() -> None:
    """Hook the interpreter, once a process."""
    import triton.runtime.interpreter as interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    if getattr(builder, "_sanitized", False):
        return
    builder._sanitized = True
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(options, debug=True)  # checks int32 arithmetic
    interpreter.interpreter_semantic.binary_op_sanitize_overflow_impl = _check_overflow
    stock_load, stock_store, stock_call = builder.create_masked_load, builder.create_masked_store, executor.__call__

    def lanes(ptrs, mask):
        return ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape).astype(bool)].astype(np.int64)

    def width(ptrs):
        return max(8, ptrs.get_element_ty().primitive_bitwidth) // 8

    def load(self, ptrs, mask, *args, **kwargs):
        if state.launch:
            state.launch.load(lanes(ptrs, mask), width(ptrs))
        return stock_load(self, ptrs, mask, *args, **kwargs)

    def store(self, ptrs, value, mask, *args, **kwargs):
        if state.launch:
            state.launch.store(lanes(ptrs, mask), width(ptrs))
        return stock_store(self, ptrs, value, mask, *args, **kwargs)

    def call(self, *args, **kwargs):
        if not state.on:
            return stock_call(self, *args, **kwargs)
        names = list(inspect.signature(self.fn).parameters)
        state.launch = launch = Launch(self.fn.__name__, dict(zip(names, args, strict=False)) | kwargs)
        state.launches += 1
        try:
            stock_call(self, *args, **kwargs)
        except interpreter.InterpreterError as error:
            if isinstance(error.__cause__, MemoryFault):
                raise error.__cause__ from error
            raise
        finally:
            state.launch = None
        launch.finish()
        if state.log is not None:
            state.log.append(launch)

    builder.create_masked_load, builder.create_masked_store, executor.__call__ = load, store, call


def _check_overflow(left, right, operation) -> None:
    """Raise an error for a sum, difference or product that overflows: Triton's own check, in a tenth of its time."""
    kind = left.type.scalar
    if kind.int_bitwidth >= 64:
        return
    exact = getattr(operator, operation.__name__)(*(each.handle.data.astype(np.int64) for each in (left, right)))
    fits = (exact >= kind.get_int_min_value()) & (exact <= kind.get_int_max_value())
    assert fits.all(), f"int{kind.int_bitwidth} overflow detected for operation {operation.__name__}"


def _tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, tuple):
        return [t for part in value for t in _tensors(part)]
    base = getattr(value, "base", None)  # a TMA descriptor
    return [base] if isinstance(base, torch.Tensor) else []


def _logical(arguments: dict[str, object], names: Iterable[str]) -> np.ndarray:
    """The address of every element of these arguments, sorted."""
    addresses = [_addresses(t, name, arguments) for name in names for t in _tensors(arguments.get(name))]
    return np.unique(np.concatenate(addresses)) if addresses else np.zeros(0, np.int64)


def _addresses(t: torch.Tensor, name: str = "", arguments: dict[str, object] | None = None) -> np.ndarray:
    if name == MASKS and "K" in arguments:
        # the shrink's: of words, written byte by byte, of which those of no element are not
        rows = t.data_ptr() + np.arange(t.shape[0], dtype=np.int64) * t.stride(0) * t.element_size()
        return np.add.outer(rows, np.arange(-(-arguments["K"] // 8))).reshape(-1)
    addresses = np.zeros(1, np.int64) + t.data_ptr()
    for size, stride in zip(t.shape, t.stride(), strict=True):
        addresses = np.add.outer(addresses, np.arange(size, dtype=np.int64) * stride * t.element_size()).reshape(-1)
    return addresses


def _spared(arguments: dict[str, object], written: set[str], writable: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Of groups of rows: what may stay as it is: parts of a sum that has one alone, rows of s of no group."""
    if not arguments.get("GROUPED"):
        return np.zeros(writable.size, bool)
    groups = int(arguments["groups"])
    last = int(_tensors(arguments["table_ptr"])[0][groups])
    of_s = [t[last:] for name in written & {"s_ptrs", "ds_ptrs"} for t in _tensors(arguments.get(name))]
    return parts | np.isin(writable, np.concatenate([_addresses(t) for t in of_s] or [np.zeros(0, np.int64)]))
