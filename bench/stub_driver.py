"""Triton's own CUDA launcher, linked with a driver that launches nothing: `stub_driver.c`.

All code above the driver runs as on a GPU: Triton lays out the arguments, has the driver encode the descriptors, and
calls it to launch. Use the stub in a process of its own, without Triton's interpreter; it needs the C compiler that
Triton needs.
"""

import contextlib
import ctypes
import os
import pathlib
import subprocess
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import triton
from triton.backends.nvidia import driver as nvidia

from lora_kernels.kernels._imagined import GPUS, imagine

__all__ = ["Asked", "StubDriver", "launching"]

_SOURCE = pathlib.Path(__file__).with_name("stub_driver.c")


class Asked(NamedTuple):
    """A launch that Triton requested from the driver."""

    kernel: str
    grid: tuple[int, ...]
    threads: int
    shared: int
    dependent: bool


class _Launch(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_char_p), ("grid", ctypes.c_uint * 3), ("threads", ctypes.c_uint),
        ("shared", ctypes.c_uint), ("dependent", ctypes.c_int),
    ]  # fmt: skip


class StubDriver:
    """A driver that records the launches and descriptors that Triton requests, and launches nothing.

    Raises:
        RuntimeError: The process has loaded a real driver.
    """

    def __init__(self) -> None:
        # the folder lives as long as this object
        self._folder = tempfile.TemporaryDirectory()
        library = os.path.join(self._folder.name, "libcuda.so.1")
        headers = os.path.join(os.path.dirname(nvidia.__file__), "include")
        command = [os.environ.get("CC", "gcc"), "-O2", "-shared", "-fPIC", "-I", headers, str(_SOURCE), "-o", library]
        subprocess.run([*command, "-Wl,-soname,libcuda.so.1"], check=True)
        self.stub = ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
        # the name resolves to the library that was loaded first
        if not hasattr(ctypes.CDLL("libcuda.so.1"), "stub_launch"):
            raise RuntimeError("StubDriver: a real libcuda.so.1 is loaded; make the stub first, in a new process.")
        self.stub.stub_launch.restype = ctypes.POINTER(_Launch)
        triton.knobs.nvidia.libcuda_path = self._folder.name

    @property
    def count(self) -> int:
        """Number of launches so far."""
        return self.stub.stub_launched()

    @property
    def launched(self) -> list[Asked]:
        """Every launch so far, in order."""
        every = [self.stub.stub_launch(i).contents for i in range(self.count)]
        return [Asked(a.kernel.decode(), tuple(a.grid), a.threads, a.shared, bool(a.dependent)) for a in every]

    @property
    def encoded(self) -> int:
        """Number of descriptors encoded so far."""
        return self.stub.stub_encoded()


@contextlib.contextmanager
def launching(gpu: str = "sm_90") -> Iterator[list]:
    """Imagine a GPU (`imagine`) whose launches go through Triton's launcher; a `StubDriver` must exist."""
    with imagine(GPUS[gpu], nvidia.CudaLauncher) as launched:
        triton.runtime.driver.active.utils = nvidia.CudaUtils()
        yield launched
