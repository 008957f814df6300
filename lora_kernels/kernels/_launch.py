"""What the launchers share on the host: settled launches, the device guard, precision, workspace.

A launcher runs in two halves. What follows from shapes, strides, alignment and dtype (`Facts`) is settled once and
kept: the tile, the grid, every integer argument, every flag. What is left to each call are allocations, pointers and
run-time numbers, because on few rows the host is what takes the time.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lora_kernels.kernels._configs import SHARED, descriptor_path
from lora_kernels.kernels._replay import call

__all__ = [
    "Facts", "Launch", "arrivals", "capability", "dependent_launch", "describe_path", "facts", "launch_options",
    "num_sms", "precision", "run_pass", "shared_per_sm", "thin_columns", "thin_pitch", "thin_rows", "uses_tf32",
]  # fmt: skip

_runtime = triton.knobs.runtime
_COUNTERS = 1 << 14  # int32, of a pass; at rank 512 a launch over 100,000 columns asks for about as many
_ROCM_SHARED = 65_536  # CDNA3's; PyTorch for ROCm need not say
_INTERPRETER_SMS = 3  # few, so that the persistent loop goes round more than once in tests


class Facts(NamedTuple):
    """All that a launch depends on of a tensor, but for where it lies."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    aligned: bool

    def t(self) -> "Facts":
        """The facts of the transpose."""
        return self._replace(shape=self.shape[::-1], strides=self.strides[::-1])

    def rows_on_16_bytes(self) -> bool:
        """Whether a TMA descriptor can read it: rows of contiguous elements, no two the same, all on 16 bytes."""
        (_, cols), (stride, unit) = self.shape, self.strides
        return unit == 1 and stride >= cols and stride * self.dtype.itemsize % 16 == 0 and self.aligned


_tuple = tuple.__new__


def facts(t: Tensor | None) -> Facts | None:
    """The facts of a tensor."""
    # not Facts(...), which takes as long as all that it is given
    return None if t is None else _tuple(Facts, (t.shape, t.stride(), t.dtype, not t.data_ptr() % 16))


class Launch:
    """A kernel with its grid, integers and flags; a call adds tensors and run-time numbers.

    The first call goes through Triton, which looks at every argument to find or compile the binary. Whoever makes a
    `Launch` promises that they will say the same each time, on the same device, so later calls go to that binary's
    launcher directly, as those of PyTorch's Inductor do; by way of Triton while a profiler listens to launches.

    Args:
        kernel: The Triton function. Its parameters are tensors, run-time floats, integers and flags, in this order.
        grid: One to three numbers of programs.
        integers: The integer arguments, in order; tuples are arguments that are tuples.
        flags: The `constexpr` arguments by name, in order.
        options: Warps, stages and the like.
        device: Where it is launched, whichever device is the current one.
    """

    def __init__(
        self, kernel: Any, grid: Sequence[int], integers: Sequence[Any], flags: dict[str, Any], options: dict[str, Any],
        device: torch.device,
    ) -> None:  # fmt: skip
        self.kernel, self.grid, self.integers, self.device = kernel, (*grid, 1, 1)[:3], tuple(integers), device
        self.flags, self.options = flags, options
        self._rest = (*self.integers, *flags.values())
        self._settled: tuple[Any, ...] | None = None

    def __call__(self, *arguments: Any) -> None:
        """Launch on the device's current stream."""
        call(self.now, *arguments, by_address=True)

    def now(self, *arguments: Any) -> None:
        """Launch, and leave no note of it."""
        if self.device.type == "cuda" and self.device.index != torch.cuda.current_device():
            with torch.cuda.device(self.device):
                self.now(*arguments)
            return
        if self._settled is None:
            compiled = self.kernel[self.grid](*arguments, *self.integers, **self.flags, **self.options)
            if compiled is not None:  # the interpreter has nothing to keep
                driver = triton.runtime.driver.active
                settled = compiled.run, compiled.function, compiled.packed_metadata, driver.get_current_stream
                # in one store, for other threads; the first is what keeps the binary loaded
                self._settled = compiled[self.grid], *settled, driver.get_current_device()
            return
        launch, run, function, metadata, stream_of, device = self._settled
        # hooks are chains, empty ones where nobody listens; of any other kind Triton has to know what to make
        if getattr(_runtime.launch_enter_hook, "calls", True) or getattr(_runtime.launch_exit_hook, "calls", True):
            launch(*arguments, *self._rest)
        else:
            run(*self.grid, stream_of(device), function, metadata, None, None, None, *arguments, *self._rest)


def uses_tf32(dtype: torch.dtype) -> bool:
    """Whether products of `dtype` may be rounded to TF32: only fp32, and only as PyTorch is told."""
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def precision(t: Tensor) -> str:
    """The `input_precision` of a dot over operands like `t`."""
    return "tf32" if uses_tf32(t.dtype) else "ieee"


imagined: Any = None  # an ImaginedGPU stands in for every device while launches are only compiled, see `_imagined`


def num_sms(device: torch.device) -> int:
    """Multiprocessors of a device."""
    return imagined.num_sms if imagined else _num_sms(device)


def shared_per_sm(device: torch.device) -> int:
    """Bytes of shared memory of a multiprocessor of a device."""
    return imagined.shared_per_sm if imagined else _shared_per_sm(device)


def capability(device: torch.device) -> tuple[int, int] | None:
    """CUDA compute capability of a device, None for anything but an NVIDIA GPU."""
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
    return getattr(properties, "shared_memory_per_multiprocessor", 0) or _ROCM_SHARED


@functools.cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


def thin_pitch(rank: int, dtype: torch.dtype) -> int:
    """Elements from one row to the next of `thin_rows`."""
    pad = 16 // dtype.itemsize
    return -(-rank // pad) * pad


def thin_rows(like: Tensor, rank: int) -> Tensor:
    """Allocate `[M, rank]` for the rows and in the dtype of `like`, each on 16 bytes: a TMA descriptor can read it."""
    pitch = thin_pitch(rank, like.dtype)
    rows = like.new_empty(like.shape[0], pitch)
    return rows if pitch == rank else rows[:, :rank]


def thin_columns(like: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """Allocate `thin_rows` of several ranks side by side, in one buffer."""
    if len(ranks) == 1:
        return [thin_rows(like, ranks[0])]
    pitches = [thin_pitch(rank, like.dtype) for rank in ranks]
    columns = like.new_empty(like.shape[0], sum(pitches)).split(pitches, 1)
    return [part if part.shape[1] == rank else part[:, :rank] for part, rank in zip(columns, ranks, strict=True)]


def dependent_launch(device: torch.device) -> bool:
    """Whether a launch may overlap the end of the one before it (programmatic dependent launch, sm_90 and later)."""
    return (capability(device) or (0, 0)) >= (9, 0)


def launch_options(dependent: bool) -> dict[str, bool]:
    """Options of every launch; with `dependent` it may come up before the launch in front of it has ended."""
    # Triton 3.10 flips the default of the first; results must not change with it. Other GPUs have no second.
    return {"enable_fp_fusion": True, "launch_pdl": True} if dependent else {"enable_fp_fusion": True}


class _Pass(threading.local):
    """The pass that this thread is in, and the counters that its launches share."""

    running = False
    counters: Tensor | None = None


_pass = _Pass()


def run_pass(function: Callable, *arguments: Any) -> Any:
    """Call a function whose launches all follow one another on one stream: they share their counters.

    One memset serves them all, and comes before the launches that overlap. A pass within a pass has its own.
    """
    outer = _pass.running, _pass.counters
    _pass.running, _pass.counters = True, None
    try:
        return function(*arguments)
    finally:
        _pass.running, _pass.counters = outer


def arrivals(device: torch.device, count: int) -> Tensor:
    """Return `count` counters or more at 0 for `last_to_arrive`, int32, which leaves them at 0.

    No counter outlives the pass it was made for. PyTorch may have put a CUDA graph's memory pool in the allocator's
    place without a capture that one could ask for, as Inductor does where it warms up, and what lies there is given to
    others once the pass is over.
    """
    if not _pass.running or count > _COUNTERS:
        return call(_zeros, device, count)
    if _pass.counters is None:
        _pass.counters = call(_zeros, device, _COUNTERS)
    return _pass.counters


def _zeros(device: torch.device, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)


def describe_path(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """How `matmul_expand` loads its tiles on a device for a dtype, "tma" or "pointer", and why."""
    tma, reason = descriptor_path(capability(device), dtype)
    return "tma" if tma else "pointer", reason
