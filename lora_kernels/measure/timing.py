"""How `bench` takes a time: one provider after the other, round after round, medians of many.

On a GPU a call lies between two CUDA events, after a spin was queued: the host is ahead, so that what is measured is
the device. The host's own time to issue the call is taken beside it, and how long the spin was: a call that takes the
host longer is timed with gaps in it (`host_bound`). On a CPU a call lies between two readings of
`perf_counter`, or, where PyTorch has one thread (OMP_NUM_THREADS=1), of that thread's own CPU time: no other process
stretches it. What the caches hold before a call is one of `CACHES`: nothing of it, because a buffer larger than any of
them was written and read ("flush"); nothing of it, because calls take turns over more copies of their operands than fit
("rotate"); or whatever the call before left there ("warm").
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "CACHES", "PASSES", "Calls", "Sample", "clock", "copies_for", "cpu_timer", "graphed", "host_bound",
    "measure_peaks", "rotated", "schedule", "summary", "time_all",
]  # fmt: skip

PASSES = ("forward", "backward", "both")
CACHES = ("flush", "rotate", "warm")
_WARM_UP = 3
_FLUSH_BYTES = 1 << 28  # several times the L2 cache of any GPU there is
_MOST_COPIES = 64
_SPIN_CYCLES = 6_000_000  # about three milliseconds, longer than the host takes to issue one call
_HOST_SHARE = 0.8  # of the spin, from which on the host may not have been ahead


@dataclass(frozen=True)
class Calls:
    """What is timed of a provider.

    Attributes:
        forward: Computes y, recording what backward needs.
        backward: Computes the gradients from what `forward` returned; None of a single launch, which has one pass.
    """

    forward: Callable[[], Any]
    backward: Callable[[Any], Any] | None = None

    def whole(self) -> Any:
        """Run all there is, forward and backward."""
        state = self.forward()
        return state if self.backward is None else self.backward(state)

    def split(self, name: str) -> tuple[Callable[[], Any], Any]:
        """The untimed preparation and the timed part of a pass."""
        if name == "forward":
            return (lambda: None), (lambda _: self.forward())
        if name == "backward":
            return self.forward, self.backward
        return (lambda: None), (lambda _: self.whole())


class Sample(NamedTuple):
    """One timed call, in seconds: what it took, and on a GPU what it took the host and how far that was ahead."""

    seconds: float
    host: float | None = None
    spin: float | None = None


Measure = Callable[[Callable[[], Any], Callable[[Any], Any]], Sample]


def clock(device: torch.device, flush: bool | None = None) -> Measure:
    """A function of a preparation and a call: times the call.

    Args:
        device: Where the calls run.
        flush: Whether a buffer larger than the caches takes their place before each call; on a GPU by default.
    """
    flush = device.type == "cuda" if flush is None else flush
    buffer = torch.empty(_FLUSH_BYTES // 4 if flush else 0, device=device)
    total = torch.empty((), device=device)

    def fill_caches() -> None:
        """Put the buffer into the caches; read last, for lines that were written would be stored during the call."""
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
        kept = call(state)  # held until after the end, so that freeing is not timed
        host = time.perf_counter() - began
        end.record()
        end.synchronize()
        del kept
        return Sample(start.elapsed_time(end) * 1e-3, host, before.elapsed_time(start) * 1e-3)

    return measure


def cpu_timer() -> Callable[[], float]:
    """The clock a CPU's times are read from; its name says which."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def copies_for(size: int) -> int:
    """How many copies of operands of `size` bytes to rotate so that none is in a cache when its turn comes again."""
    return min(_MOST_COPIES, 1 - (-_FLUSH_BYTES // max(size, 1)))


def rotated(copies: Sequence[Calls], turn: Iterator[int]) -> Calls:
    """The same calls over one copy of the operands after the other; a backward stays with its forward's copy.

    Args:
        copies: One for each copy of the operands.
        turn: Counts up; shared by all who read the same copies, or one would find what another has just read.
    """

    def forward() -> Any:
        calls = copies[next(turn) % len(copies)]
        return calls, calls.forward()

    if copies[0].backward is None:
        return Calls(forward)
    return Calls(forward, lambda state: state[0].backward(state[1]))


def schedule(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Who is timed when: all once a round, and each round begun by the next, so that no place in line is fixed."""
    for i in range(rounds):
        first = i % len(names) if names else 0
        yield from ((i, name) for name in (*names[first:], *names[:first]))


def time_all(
    calls: dict[str, Calls], passes: Sequence[str], rounds: int, measure: Measure,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, dict[str, Any]]]:  # fmt: skip
    """Time every provider in turn.

    Args:
        calls: Provider name to what is timed.
        passes: Which of `PASSES`.
        rounds: Timed calls of each.
        measure: See `clock`.
        tick: Called after each provider's turn.

    Returns:
        Provider name to pass to `summary` of the seconds.
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
    """Median and spread of the seconds, medians of the rest."""
    seconds, *others = zip(*samples, strict=True)
    host, spin = (None if None in taken else statistics.median(taken) for taken in others)
    q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return {
        "median": median, "q1": q1, "q3": q3, "min": min(seconds), "max": max(seconds), "n": len(seconds),
        "host_median": host, "spin_median": spin,
    }  # fmt: skip


def host_bound(taken: dict[str, Any]) -> bool:
    """Whether a time, as `summary` gives it, may be the host's: issuing the call took about as long as the spin."""
    host, spin = taken.get("host_median"), taken.get("spin_median")
    return host is not None and spin is not None and host > _HOST_SHARE * spin


def graphed(calls: Calls) -> Calls:
    """The same work replayed from CUDA graphs: forward and backward, each captured once."""
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
        return kept  # holding the outputs keeps the graphs' memory

    return Calls(forward.replay, replay_backward)


def measure_peaks(device: torch.device, dtype: torch.dtype, measure: Measure) -> dict[str, Any]:
    """What this machine reaches on its best day, measured here and now: a large matmul, and a large copy."""
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
