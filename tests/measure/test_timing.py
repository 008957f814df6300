"""The clocks of the benchmark: what is timed and what is not, in which order, and from which copies of the operands."""

import itertools
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels.measure import timing

CPU = torch.device("cpu")


class Operators(TorchDispatchMode):
    """Tells the name of each operator that PyTorch runs."""

    def __init__(self, tell):
        super().__init__()
        self.tell = tell

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.tell(func.__name__)
        return func(*args, **(kwargs or {}))


class Clock:
    """A clock that stands still until somebody moves it, so that no machine is too slow."""

    now = 0

    def __call__(self):
        return self.now

    def take(self, seconds):
        self.now += seconds


@pytest.fixture
def clocks(monkeypatch):
    """What times on a CPU: the clock of the wall, and that of the thread."""
    made = SimpleNamespace(perf_counter=Clock(), thread_time=Clock())
    monkeypatch.setattr(timing, "time", made)
    return made


def test_rounds_are_interleaved_and_begun_by_each_in_turn():
    order = list(timing.schedule("abc", 4))
    rounds = ["".join(name for i, name in order if i == which) for which in range(4)]
    assert rounds == ["abc", "bca", "cab", "abc"]


def test_backward_is_timed_without_its_forward():
    log, timed = [], []
    calls = {
        name: timing.Calls(lambda n=name: log.append(f"{n}.f") or n, lambda y: log.append(f"{y}.b")) for name in "ab"
    }

    def measure(prepare, call):
        state = prepare()
        before = len(log)
        call(state)
        timed.append(log[before:])
        return timing.Sample(float(len(timed)))

    taken = timing.time_all(calls, timing.PASSES, 2, measure)
    one = [["{}.f"], ["{}.b"], ["{}.f", "{}.b"]]
    assert timed == [[step.format(name) for step in steps] for name in "abba" for steps in one]
    assert log[:6] == ["a.f", "a.b"] * 3  # warm-up, before anything is timed
    assert taken["b"]["forward"]["n"] == 2
    assert taken["b"]["forward"]["median"] == (4 + 7) / 2


def test_summary_is_median_and_quartiles():
    taken = timing.summary([timing.Sample(s) for s in (5.0, 1.0, 2.0, 4.0, 100.0)])
    assert (taken["q1"], taken["median"], taken["q3"], taken["min"], taken["max"]) == (2, 4, 5, 1, 100)
    assert taken["host_median"] is taken["spin_median"] is None
    one = timing.summary([timing.Sample(3.0, 0.5, 0.6)])
    assert (one["median"], one["host_median"], one["spin_median"]) == (3, 0.5, 0.6)


@pytest.mark.parametrize(("host", "spin", "bound"), [(0.9, 1.0, True), (0.7, 1.0, False), (None, None, False)])
def test_a_call_that_the_host_takes_long_to_issue_is_told(host, spin, bound):
    assert timing.host_bound(timing.summary([timing.Sample(2.0, host, spin)] * 3)) is bound


def test_cpu_clock_times_the_call_alone(monkeypatch, clocks):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    wall = clocks.perf_counter
    taken = timing.clock(CPU)(lambda: wall.take(20), lambda _: wall.take(1))
    assert taken.seconds == 1
    assert taken.host is taken.spin is None


def test_a_flush_is_not_timed(monkeypatch, clocks):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(timing, "_FLUSH_BYTES", 64)
    wall, done = clocks.perf_counter, []
    measure = timing.clock(CPU, flush=True)
    with Operators(lambda name: done.append(name) or wall.take(20)):
        taken = measure(lambda: None, lambda _: done.append("called") or wall.take(1))
    assert done[0] == "zero_.default"
    assert done[-1] == "called"
    assert taken.seconds == 1


def test_one_thread_is_timed_by_its_own_clock(monkeypatch, clocks):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)

    def work(_):
        clocks.perf_counter.take(20)  # what another process takes
        clocks.thread_time.take(1)

    assert timing.clock(CPU)(lambda: None, work).seconds == 1
    monkeypatch.undo()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert timing.cpu_timer() is time.thread_time


def test_gpu_clock_reads_what_it_has_written_and_lets_the_host_ahead(monkeypatch):
    """A GPU's caches, spin and events, by stand-ins: what is done in which order, and which events time what."""
    done, stock = [], torch.empty

    class Event:
        def __init__(self, enable_timing):
            self.at = None

        def record(self):
            self.at = len(done)
            done.append("event")

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return 1000.0 * (other.at - self.at)

    monkeypatch.setattr(timing, "_FLUSH_BYTES", 64)
    monkeypatch.setattr(torch, "empty", lambda *args, device: stock(*args))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append("spin"))
    measure = timing.clock(SimpleNamespace(type="cuda"))
    with Operators(done.append):
        taken = measure(lambda: done.append("prepared"), lambda _: done.append("called"))
    assert done[:3] == ["prepared", "zero_.default", "sum.IntList_out"]
    assert done[3:] == ["event", "spin", "event", "called", "event"]
    assert (taken.spin, taken.seconds) == (2.0, 2.0)
    assert 0 <= taken.host < 1


def test_so_many_copies_that_none_is_in_a_cache_when_its_turn_comes():
    assert [timing.copies_for(size) for size in (2**30, 2**28, 2**27, 3 * 2**26, 2**22, 1)] == [2, 2, 3, 3, 64, 64]


def test_buffers_take_turns_across_providers_and_backward_stays_with_its_forward():
    log, turn = [], itertools.count()
    calls = [
        timing.rotate_copies(
            [timing.Calls(lambda i=i: log.append(i) or i, lambda y, i=i: log.append((i, y))) for i in range(3)], turn
        )
        for _ in range(2)
    ]
    calls[0].whole()
    first = calls[1].forward()
    calls[0].whole()
    calls[1].backward(first)
    assert log == [0, (0, 0), 1, 2, (2, 2), (1, 1)]
