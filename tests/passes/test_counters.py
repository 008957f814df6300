"""Counters of arrivals, and whatever else a call makes: gone when the call is over, so that any memory pool may own it."""

import gc
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from pass_samples import add, linear, mlp, mlp_made_again, qkv, results
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import lora_kernels.kernels  # noqa: F401  its modules, whose functions of the same names hide them
from lora_kernels.kernels import _launch

SIZE = _launch._COUNTERS


class Made(TorchDispatchMode):
    """Keeps track of the memory of every tensor that an operator gives."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                storage = StorageWeakRef(t.untyped_storage())
                self.storages.setdefault(storage.cdata, (storage, str(func), list(t.shape)))
        return out

    def alive(self):
        return [(name, shape) for storage, name, shape in self.storages.values() if not storage.expired()]


@pytest.mark.slow
@pytest.mark.parametrize("make", [linear, add, qkv, mlp, mlp_made_again], ids=lambda f: f.__name__)
def test_no_tensor_outlives_a_call(make, device):
    """Nor by a plan. A graph's memory pool may own what a call makes, and gives it to others."""
    for i in range(3):
        with Made() as made:
            kept = results(make, device, torch.bfloat16, torch.float32, 0.3, seed=i)
        assert len(made.storages) > 5
        assert made.alive(), "what is held is seen"
        del kept
        gc.collect()
        assert made.alive() == [], i


@pytest.fixture
def zeros(monkeypatch):
    """A GPU's allocator, by CPU tensors: references to whatever counters it gave out."""
    given, stock = [], torch.zeros

    def zeros(*args, device, **kwargs):
        t = stock(*args, **kwargs)
        given.append(weakref.ref(t))
        return t

    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    return given


def ask(*counts):
    """Ask for counters of a GPU, as launches do one after the other."""
    return [_launch.arrivals(torch.device("cuda"), count) for count in counts]


def test_counters_of_a_gpu_die_with_their_launch(zeros):
    counters = ask(3, 5)
    assert len(zeros) == 2
    assert [t.numel() for t in counters] == [3, 5]
    del counters
    assert [reference() for reference in zeros] == [None, None]


def test_the_launches_of_a_pass_share_counters_that_die_with_it(zeros):
    def launches():
        first, second = ask(3, 5)
        return first is second and first.numel() == SIZE and not first.any()

    assert _launch.run_pass(launches)
    assert len(zeros) == 1
    assert zeros[0]() is None


def test_a_launch_of_more_has_counters_of_its_own(zeros):
    assert [t.numel() for t in _launch.run_pass(ask, SIZE, SIZE + 1, 1)] == [SIZE, SIZE + 1, SIZE]


def test_a_pass_within_a_pass_has_its_own(zeros):
    """An inner pass has counters of its own, because the outer launches may overlap its launches."""

    def outer():
        before, (inner,), after = ask(1), _launch.run_pass(ask, 1), ask(1)
        return before[0] is after[0] is not inner

    assert _launch.run_pass(outer)


def test_counters_die_with_a_pass_that_fails(zeros):
    def fails():
        ask(1)
        raise ValueError("no memory")

    with pytest.raises(ValueError, match="no memory"):
        _launch.run_pass(fails)
    assert zeros[0]() is None
    assert ask(4)[0].numel() == 4


@pytest.fixture
def order(monkeypatch):
    """What a call issues on sm_90, in order; nothing is launched."""
    seen, stock = [], _launch._zeros

    def forget():
        for module in ("shrink", "matmul_expand", "wgrad"):
            sys.modules[f"lora_kernels.kernels.{module}"]._settle.cache_clear()

    def zeros(device, count):
        seen.append("zeros")
        return stock(device, count)

    def launched(launch, *arguments):
        seen.append("early" if launch.flags.get("READY") else launch.kernel.__name__)

    monkeypatch.setattr(_launch, "_zeros", zeros)
    monkeypatch.setattr(_launch, "dependent_launch", lambda device: True)
    monkeypatch.setattr(_launch.Launch, "__call__", launched)
    forget()
    yield seen
    forget()


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks at launches in the interpreter")
@pytest.mark.parametrize("make", [linear, qkv, mlp], ids=lambda f: f.__name__)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_counters_are_zeroed_before_the_launches_that_overlap(make, p, device, order):
    """A memset between dx and dA would be what dA waits for."""
    results(make, device, torch.bfloat16, torch.bfloat16, p, seed=1)
    early = order.index("early")
    assert order.count("early") == 1
    assert order[early - 1] == "_matmul_expand_kernel"
    assert order.count("zeros") == 1, "one memset for all launches of a backward pass"
    assert order.index("zeros") < early - 1
