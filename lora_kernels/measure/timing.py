"""The timer of `bench`: providers take turns, round after round, and the figures are medians of many calls.

On a GPU, two CUDA events enclose a call, after a spin is queued. The host is then ahead, so the events measure the
device. The timer also takes the host's own time to issue the call and the length of the spin, because the time of a
call that takes the host longer than the spin has gaps (`host_bound`). On a CPU, two readings of `perf_counter` enclose
a call. Where PyTorch has one thread (OMP_NUM_THREADS=1), the readings are of that thread's own CPU time, which no other
process stretches.

One of `CACHES` says what the caches hold before a call: none of its operands, because a buffer larger than any cache
was written and read ("flush"); none of its operands, because calls take turns over more copies of them than fit
("rotate"); or the data that the call before left there ("warm").
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "CACHES", "PASSES", "Calls", "Sample", "capture_graphs", "clock", "copies_for", "cpu_timer", "host_bound",
    "measure_peaks", "rotate_copies", "schedule", "summary", "time_all",
]  # fmt: skip

PASSES = ("forward", "backward", "both")
CACHES = ("flush", "rotate", "warm")
_WARM_UP = 3
# The buffer is several times the L2 cache of any GPU.
_FLUSH_BYTES = 1 << 28
_MOST_COPIES = 64
# About three milliseconds, longer than the host takes to issue one call.
_SPIN_CYCLES = 6_000_000
# From this fraction of the spin on, the host may not have been ahead.
_HOST_SHARE = 0.8


@dataclass(frozen=True)
class Calls:
    """The calls of a provider to time.

    Attributes:
        forward: Computes y, and records the tensors that backward needs.
        backward: Computes the gradients from the result of `forward`; None for a single launch, which has one pass.
    """

    forward: Callable[[], Any]
    backward: Callable[[Any], Any] | None = None

    def whole(self) -> Any:
        """Run forward, and backward if there is one."""
        state = self.forward()
        return state if self.backward is None else self.backward(state)

    def split(self, name: str) -> tuple[Callable[[], Any], Any]:
        """Return the untimed preparation and the timed part of a pass."""
        if name == "forward":
            return (lambda: None), (lambda _: self.forward())
        if name == "backward":
            return self.forward, self.backward
        return (lambda: None), (lambda _: self.whole())


class Sample(NamedTuple):
    """Times in seconds: the call; on a GPU also the host's issue time and the spin before the call."""

    seconds: float
    host: float | None = None
    spin: float | None = None


Measure = Callable[[Callable[[], Any], Callable[[Any], Any]], Sample]


def clock(device: torch.device, flush: bool | None = None) -> Measure:
    """Return a function of a preparation and a call that times the call.

    Args:
        device: The device of the calls.
        flush: Whether to fill the caches with a buffer larger than they are before each call; on a GPU by default.
    """
    flush = device.type == "cuda" if flush is None else flush
    buffer = torch.empty(_FLUSH_BYTES // 4 if flush else 0, device=device)
    total = torch.empty((), device=device)

    def fill_caches() -> None:
        """Put the buffer into the caches; read it last, because written lines would be stored during the call."""
        if flush:
            torch.sum(buffer.zero_(), dim=0, out=total)

    if device.type != "cuda":

        def measure_cpu(prepare: Callable[[], Any], call: Callable[[Any], Any]) -> Sample:
            now = cpu_timer()
            state = prepare()
            fill_caches()
            began = now()
            kept = call(state)
            seconds = now() - began
            del kept
            return Sample(seconds)

        return measure_cpu
    before, start, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))

    def measure(prepare: Callable[[], Any], call: Callable[[Any], Any]) -> Sample:
        state = prepare()
        fill_caches()
        before.record()
        torch.cuda._sleep(_SPIN_CYCLES)
        start.record()
        began = time.perf_counter()
        # Hold the result until after the end, so that its release is not timed.
        kept = call(state)
        host = time.perf_counter() - began
        end.record()
        end.synchronize()
        del kept
        return Sample(start.elapsed_time(end) * 1e-3, host, before.elapsed_time(start) * 1e-3)

    return measure


def cpu_timer() -> Callable[[], float]:
    """Return the clock of CPU times; the name of the function says which clock it is."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def copies_for(size: int) -> int:
    """Return how many copies of operands of `size` bytes to rotate, so that none is still cached at its next turn."""
    return min(_MOST_COPIES, 1 - (-_FLUSH_BYTES // max(size, 1)))


def rotate_copies(copies: Sequence[Calls], turn: Iterator[int]) -> Calls:
    """Return calls that rotate over copies of the operands; a backward stays with its forward's copy.

    Args:
        copies: The calls on each copy of the operands.
        turn: Counts up. All calls that read the same copies share it, because otherwise one call would find in the
            caches a copy that another has just read.
    """

    def forward() -> Any:
        calls = copies[next(turn) % len(copies)]
        return calls, calls.forward()

    if copies[0].backward is None:
        return Calls(forward)
    return Calls(forward, lambda state: state[0].backward(state[1]))


def schedule(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Yield the order of timed calls: each name once a round, and each round begins with the next name, to be fair."""
    for i in range(rounds):
        first = i % len(names) if names else 0
        yield from ((i, name) for name in (*names[first:], *names[:first]))


def time_all(
    calls: dict[str, Calls], passes: Sequence[str], rounds: int, measure: Measure,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, dict[str, Any]]]:  # fmt: skip
    """Time every provider in turn.

    Args:
        calls: The calls to time, by provider name.
        passes: Some of `PASSES`.
        rounds: Timed calls of each pass of each provider.
        measure: A function that `clock` returns.
        tick: A function to call after each provider's turn.

    Returns:
        The `summary` of the seconds, by provider name and pass.
    """
    samples: dict[str, dict[str, list[Sample]]] = {}
    for name in calls:
        samples[name] = {which: [] for which in passes}
        for _ in range(_WARM_UP):
            calls[name].whole()
    for _, name in schedule(tuple(calls), rounds):
        for which in passes:
            samples[name][which].append(measure(*calls[name].split(which)))
        tick()
    return {name: {which: summary(taken) for which, taken in of.items()} for name, of in samples.items()}


def summary(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return the median and the spread of the seconds, and the medians of the other times."""
    seconds, *others = zip(*samples, strict=True)
    host, spin = (None if None in taken else statistics.median(taken) for taken in others)
    q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return {
        "median": median, "q1": q1, "q3": q3, "min": min(seconds), "max": max(seconds), "n": len(seconds),
        "host_median": host, "spin_median": spin,
    }  # fmt: skip


def host_bound(taken: dict[str, Any]) -> bool:
    """Return whether a time of `summary` may be the host's: the call took about as long to issue as the spin lasts."""
    host, spin = taken.get("host_median"), taken.get("spin_median")
    return host is not None and spin is not None and host > _HOST_SHARE * spin


def capture_graphs(calls: Calls) -> Calls:
    """Return calls that replay the same work from CUDA graphs: forward and backward, each captured once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            calls.whole()
    torch.cuda.current_stream().wait_stream(stream)
    forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(forward):
        y = calls.forward()
    if calls.backward is None:
        return Calls(lambda: (forward.replay(), y))  # type: ignore[func-returns-value]
    with torch.cuda.graph(backward, pool=forward.pool()):
        kept = calls.backward(y)

    def replay_backward(_: Any) -> Any:
        backward.replay()
        # A reference to the outputs keeps the graphs' memory.
        return kept

    return Calls(forward.replay, replay_backward)


def measure_peaks(device: torch.device, dtype: torch.dtype, measure: Measure) -> dict[str, Any]:
    """Measure the peak rates that this machine reaches now: a large matmul, and a large copy."""
    size, numel = (8192, 1 << 28) if device.type == "cuda" else (1024, 1 << 24)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    matmul = min(_repeat(measure, lambda: a @ b))
    source, target = (torch.zeros(numel, dtype=torch.int32, device=device) for _ in range(2))
    copy = min(_repeat(measure, lambda: target.copy_(source)))
    return {
        "matmul_flops_per_second": 2 * size**3 / matmul,
        "matmul": f"{size}x{size}x{size} {str(dtype).removeprefix('torch.')}, best of 10, measured in this run",
        "copy_bytes_per_second": 8 * numel / copy,
        "copy": f"{4 * numel / 2**20:.0f} MiB read and written, best of 10, measured in this run",
    }


def _repeat(measure: Measure, work: Callable[[], Tensor], times: int = 10) -> list[float]:
    for _ in range(_WARM_UP):
        work()
    return [measure(lambda: None, lambda _: work())[0] for _ in range(times)]
