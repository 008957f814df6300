"""What tests of registered operators share: a compiler that remembers nothing, and modes that see operators go by."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    # graphs kept on disk are those that the operators were traced to when they were compiled
    with torch._functorch.config.patch(enable_autograd_cache=False):
        yield
    torch.compiler.reset()


class Watch(TorchDispatchMode):
    """Lets everything through and remembers it, with its arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    @property
    def seen(self):
        return [func for func, _ in self.calls]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def taken(op, run):
    """The arguments that an operator is last called with while something runs."""
    with Watch() as mode:
        run()
    return tuple(detached(a) for a in [args for func, args in mode.calls if func is op][-1])


def detached(value):
    if isinstance(value, (list, tuple)):
        return [detached(v) for v in value]
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def assert_same(got, expected):
    for value, exact in zip(got, expected, strict=True):
        assert exact.any()
        torch.testing.assert_close(value, exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())
