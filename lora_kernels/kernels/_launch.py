"""Host functions that the launchers share: settled launches, the device guard, precision, workspace.

A launcher runs in two halves. The first half settles and keeps everything that depends on shapes, strides, alignment
and dtype (`Facts`) alone: the tile, the grid, every integer argument, every flag. Each call only adds allocations,
pointers and run-time numbers, because on few rows the host takes most of the time.
"""

import functools
import math
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lora_kernels.kernels._configs import LEAST_SHARED, SHARED, descriptor_path

__all__ = [
    "Facts", "Launch", "Slot", "allocator", "arrivals", "capability", "dependent_launch", "describe_path", "facts",
    "launch_options", "new_facts", "new_rows", "num_sms", "precision", "run_pass", "shared_per_sm", "state",
    "thin_pitch", "thin_rows", "uses_tf32",
]  # fmt: skip

_runtime = triton.knobs.runtime
# Counters of a pass, int32. A wgrad in tiles of 64 x 64 at rank 512 over 100,000 columns takes about as many.
_COUNTERS = 1 << 14
# The number is small, so that the persistent loop runs more than one round in tests.
_INTERPRETER_SMS = 3


class Facts(NamedTuple):
    """The properties of a tensor that a launch depends on; of its address, the alignment to 16 bytes alone."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    aligned: bool

    def t(self) -> "Facts":
        """Return the facts of the transpose."""
        return self._replace(shape=self.shape[::-1], strides=self.strides[::-1])

    def matrix(self) -> "Facts":
        """Return the facts of one matrix of a stack `[G, rows, columns]`; it is aligned if all of them are."""
        pitch = self.strides[0] * self.dtype.itemsize
        aligned = self.aligned and (self.shape[0] == 1 or (pitch > 0 and pitch % 16 == 0))
        return Facts(self.shape[1:], self.strides[1:], self.dtype, aligned)

    def by_element(self) -> bool:
        """Return whether Triton loads a tile element by element: none is adjacent, or rows are not on 16 elements."""
        (_, cols), (pitch, unit) = self.shape, self.strides
        return 1 not in self.strides or (unit == 1 and not (self.aligned and pitch % 16 == cols % 16 == 0))

    def rows_on_16_bytes(self) -> bool:
        """Return whether a TMA descriptor can read the tensor: contiguous, distinct rows, each on 16 bytes."""
        (_, cols), (stride, unit) = self.shape, self.strides
        return unit == 1 and stride >= cols and stride * self.dtype.itemsize % 16 == 0 and self.aligned


_tuple = tuple.__new__


def facts(t: Tensor | None) -> Facts | None:
    """Return the facts of a tensor, None for None."""
    # `tuple.__new__` skips NamedTuple's Python-level `__new__`, because this runs for every tensor of every launch.
    return None if t is None else _tuple(Facts, (t.shape, t.stride(), t.dtype, not t.data_ptr() % 16))


def new_facts(shape: tuple[int, int], dtype: torch.dtype) -> Facts:
    """Return the facts of a matrix that `allocator` allocates."""
    return Facts(shape, (shape[1], 1), dtype, True)


class Launch:
    """A kernel with its grid, integers and flags; a call adds tensors and run-time numbers.

    The first call goes through Triton, which inspects every argument to find or compile the binary. The creator of a
    `Launch` promises that every later call selects the same binary on the same device. So later calls go directly to
    the launcher of that binary, as in PyTorch's Inductor. While a profiler has hooks on launches, calls go through
    Triton's own runner.

    Args:
        kernel: The Triton function. Its parameters are tensors, run-time floats, integers and flags, in this order.
        grid: One to three numbers of programs.
        integers: The integer arguments, in order; a tuple stands for one argument that is a tuple.
        flags: The `constexpr` arguments by name, in order.
        options: Warps, stages and the like.
        device: The device of the launch, which need not be the current one.
    """

    def __init__(
        self, kernel: Any, grid: Sequence[int], integers: Sequence[Any], flags: dict[str, Any], options: dict[str, Any],
        device: torch.device,
    ) -> None:  # fmt: skip
        self.kernel, self.grid, self.integers, self.device = kernel, (*grid, 1, 1)[:3], tuple(integers), device
        self._index = device.index if device.type == "cuda" else None
        self.flags, self.options = flags, options
        self._rest = (*self.integers, *flags.values())
        self._settled: tuple[Any, ...] | None = None

    def __call__(self, *arguments: Any) -> None:
        """Launch on the device's current stream."""
        if self._index is not None and self._index != torch.cuda.current_device():
            with torch.cuda.device(self.device):
                self(*arguments)
            return
        if self._settled is None:
            compiled = self.kernel[self.grid](*arguments, *self.integers, **self.flags, **self.options)
            # The interpreter returns None and has no binary to keep.
            if compiled is not None:
                driver = triton.runtime.driver.active
                settled = compiled.run, compiled.function, compiled.packed_metadata, driver.get_current_stream
                # One store publishes the tuple to other threads. Its first element keeps the binary loaded.
                self._settled = compiled[self.grid], *settled, driver.get_current_device()
            return
        launch, run, function, metadata, stream_of, device = self._settled
        # Launch hooks are HookChains, whose `calls` is empty unless a profiler registered. With a profiler, or with a
        # hook of another type, use Triton's runner, which builds the launch metadata.
        if getattr(_runtime.launch_enter_hook, "calls", True) or getattr(_runtime.launch_exit_hook, "calls", True):
            launch(*arguments, *self._rest)
        else:
            run(*self.grid, stream_of(device), function, metadata, None, None, None, *arguments, *self._rest)


class Slot:
    """A place of a plan for one contraction's settled launch, which the first call fills and later calls take.

    Attributes:
        settled: The settled launch, None before the first call.
    """

    __slots__ = ("_parts", "settled")

    def __init__(self) -> None:
        self.settled: Any = None
        self._parts: dict[Any, Slot] = {}

    def keep(self, settled: Any) -> Any:
        """Keep a settled launch, and return it."""
        self.settled = settled
        return settled

    def part(self, name: Any) -> "Slot":
        """Return the slot of one launch of a contraction that takes several."""
        found = self._parts.get(name)
        if found is None:
            found = self._parts[name] = Slot()
        return found


def uses_tf32(dtype: torch.dtype) -> bool:
    """Return whether products of `dtype` may use TF32: only fp32, and only where PyTorch's setting allows TF32."""
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def precision(t: Tensor) -> str:
    """Return the `input_precision` of a dot over operands like `t`."""
    return "tf32" if uses_tf32(t.dtype) else "ieee"


# While launches are only compiled, an ImaginedGPU stands in for every device; see `_imagined`.
imagined: Any = None


def state(dtype: torch.dtype) -> Hashable:
    """Return what launches depend on besides their arguments: PyTorch's setting for TF32, and the imagined GPU."""
    return uses_tf32(dtype), imagined


def num_sms(device: torch.device) -> int:
    """Return the number of multiprocessors of a device."""
    return imagined.num_sms if imagined else _num_sms(device)


def shared_per_sm(device: torch.device) -> int:
    """Return the bytes of shared memory of a multiprocessor of a device."""
    return imagined.shared_per_sm if imagined else _shared_per_sm(device)


def capability(device: torch.device) -> tuple[int, int] | None:
    """Return the CUDA compute capability of a device, None for anything but an NVIDIA GPU."""
    return imagined.capability if imagined else _capability(device)


@functools.cache
def _num_sms(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETER_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _shared_per_sm(device: torch.device) -> int:
    if device.type != "cuda":
        return SHARED
    properties = torch.cuda.get_device_properties(device)
    # Some versions of PyTorch for ROCm do not report it.
    return getattr(properties, "shared_memory_per_multiprocessor", 0) or LEAST_SHARED


@functools.cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


def thin_pitch(rank: int, dtype: torch.dtype) -> int:
    """Return the row stride of `thin_rows` in elements."""
    pad = 16 // dtype.itemsize
    return -(-rank // pad) * pad


def thin_rows(like: Tensor, rank: int) -> Tensor:
    """Allocate `[M, rank]` with the rows and dtype of `like`, each row on 16 bytes for a TMA descriptor."""
    pitch = thin_pitch(rank, like.dtype)
    rows = like.new_empty(like.shape[0], pitch)
    return rows if pitch == rank else rows[:, :rank]


def new_rows(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """Return a function that allocates as `thin_rows` does."""
    rows, rank = shape
    pitch = thin_pitch(rank, dtype)
    allocate = allocator((rows, pitch), dtype, device)
    return allocate if pitch == rank else lambda: allocate()[:, :rank]


def allocator(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """Return a function that allocates a contiguous tensor."""
    # `empty_strided` parses its arguments in two thirds of the time of `empty` and `new_empty`.
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return functools.partial(torch.empty_strided, tuple(shape), strides, dtype=dtype, device=device)


def dependent_launch(device: torch.device) -> bool:
    """Return whether a launch may overlap the end of the launch before it (programmatic dependent launch, sm_90 on)."""
    return (capability(device) or (0, 0)) >= (9, 0)


def launch_options(dependent: bool) -> dict[str, bool]:
    """Return the options of a launch; with `dependent` the launch may overlap the end of the launch before it."""
    # Set `enable_fp_fusion`, because Triton 3.10 flips its default and results must not change. GPUs without dependent
    # launches have no `launch_pdl`.
    return {"enable_fp_fusion": True, "launch_pdl": True} if dependent else {"enable_fp_fusion": True}


class _Pass(threading.local):
    """The state of this thread's current pass, and the counters that the launches of the pass share."""

    running = False
    counters: Tensor | None = None


_pass = _Pass()


def run_pass(function: Callable, *arguments: Any) -> Any:
    """Call a function whose launches all follow one another on one stream, so that they share their counters.

    One memset serves all launches and runs before the launches that overlap. A pass within a pass has its own counters.
    """
    outer = _pass.running, _pass.counters
    _pass.running, _pass.counters = True, None
    try:
        return function(*arguments)
    finally:
        _pass.running, _pass.counters = outer


def arrivals(device: torch.device, count: int) -> Tensor:
    """Return `count` counters or more, int32, at 0, for `last_to_arrive`, which leaves them at 0.

    No counter outlives its pass, because its memory may belong to the pool of a CUDA graph. PyTorch may put that pool
    in the allocator's place without a capture that a query would show, as Inductor does for its warm-up, and the pool
    hands the memory to other tensors once the pass is over.
    """
    if not _pass.running or count > _COUNTERS:
        return _zeros(device, count)
    if _pass.counters is None:
        _pass.counters = _zeros(device, _COUNTERS)
    return _pass.counters


def _zeros(device: torch.device, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)


def describe_path(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """Return how `matmul_expand` loads tiles of a dtype on a device, "tma" or "pointer", and the reason."""
    tma, reason = descriptor_path(capability(device), dtype)
    return "tma" if tma else "pointer", reason
