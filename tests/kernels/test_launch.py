"""`Launch`: on which device, and through what."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
import triton

from lora_kernels.kernels._launch import Launch


class Kernel:
    """Stands for a Triton function, and for the binary that it compiles to; notes what is called."""

    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.called = []

    def __getitem__(self, grid):
        def first_or_watched(*args, **kwargs):
            self.called.append(("through Triton", grid, args, kwargs))
            return self

        return first_or_watched

    def run(self, *args):
        self.called.append(("directly", args))


@pytest.fixture
def entered(monkeypatch):
    """Devices that were made current for a launch; streams of the current device change from call to call."""
    entered, streams, current = [], iter(range(100, 200)), [0]

    @contextlib.contextmanager
    def device(which):
        entered.append(which)
        current.append(which.index)
        yield
        current.pop()

    driver = SimpleNamespace(get_current_device=lambda: 1, get_current_stream=lambda index: (index, next(streams)))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=driver))
    return entered


def launch_on(device):
    return Launch(Kernel(), (3,), (7,), {"FLAG": True}, {"num_warps": 4}, torch.device(device))


@pytest.mark.parametrize(("device", "made_current"), [("cuda:0", 0), ("cuda:1", 3), ("cpu", 0)])
def test_every_launch_is_on_its_own_device(entered, device, made_current):
    launch = launch_on(device)
    for _ in range(3):
        launch("x")
    assert entered == [torch.device(device)] * made_current


def test_the_first_goes_through_triton_and_the_others_directly_on_the_stream_of_the_moment(entered):
    launch = launch_on("cuda:0")
    for _ in range(3):
        launch("x")
    first, *others = launch.kernel.called
    assert first == ("through Triton", (3, 1, 1), ("x", 7), {"FLAG": True, "num_warps": 4})
    assert [kind for kind, _ in others] == ["directly"] * 2
    streams = [args[3] for _, args in others]
    assert len(set(streams)) == 2
    for stream, (_, args) in zip(streams, others, strict=True):
        assert args == (3, 1, 1, stream, "function", "metadata", None, None, None, "x", 7, True)


def test_whoever_listens_hears_of_every_launch(entered):
    launch, runtime = launch_on("cuda:0"), triton.knobs.runtime
    launch("x")

    def listen(metadata):
        pass

    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        hook.add(listen)
        launch("x")
        hook.remove(listen)
        launch("x")
    assert [call[0] for call in launch.kernel.called[1:]] == ["through Triton", "directly"] * 2
