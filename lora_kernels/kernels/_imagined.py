"""An imagined GPU: launches compile their kernels for a GPU that this machine does not have, and run nothing.

The launchers run on CPU tensors as they would on a GPU's tensors: they pick the GPU's tiles, and Triton binds and
specialises the real arguments and compiles the kernel. No binary is loaded. So each binary is the one that a call
compiles on the real GPU, and no signature is written by hand. `lora-kernels inspect` and the tests use this module, in
a process of their own, because Triton keeps one driver a process.

The driver has the methods that Triton's `JITFunction.run` and `CompiledKernel` call (3.6 to 3.9). Source: Triton's
own third_party drivers (interface).
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

from lora_kernels.kernels import _launch

__all__ = ["GPUS", "DryLaunch", "ImaginedGPU", "imagine"]


# Compare by identity, because every launch hashes the GPU as part of a key.
@dataclass(frozen=True, eq=False)
class ImaginedGPU:
    """The properties of a GPU that a launcher and Triton read.

    Args:
        arch: "sm_90" or "gfx942".
        num_sms: Multiprocessors, or compute units.
        shared: Most bytes of shared memory of a program.
        shared_per_sm: Bytes of shared memory of a multiprocessor.
        index: A device number of its own, under which Triton keeps the compiled kernels.
    """

    arch: str
    num_sms: int
    shared: int
    shared_per_sm: int
    index: int

    @property
    def capability(self) -> tuple[int, int] | None:
        """Return the CUDA compute capability; None on AMD."""
        return divmod(int(self.arch[3:]), 10) if self.arch.startswith("sm_") else None

    @property
    def target(self) -> GPUTarget:
        """Return the target that Triton compiles for."""
        if self.capability:
            return GPUTarget("cuda", int(self.arch[3:]), 32)
        return GPUTarget("hip", self.arch, 64 if self.arch.startswith("gfx9") else 32)


# An A100, an H200, a B200 and an MI300X.
# Sources: NVIDIA's CUDA C++ Programming Guide, compute capabilities; AMD's CDNA3 guide.
GPUS = {
    gpu.arch: gpu
    for gpu in (
        ImaginedGPU("sm_80", 108, 166_912, 167_936, 0),
        ImaginedGPU("sm_90", 132, 232_448, 233_472, 1),
        ImaginedGPU("sm_100", 148, 232_448, 233_472, 2),
        ImaginedGPU("gfx942", 304, 65_536, 65_536, 3),
    )
}


class DryLaunch(NamedTuple):
    """A launch that did not happen: Triton's `CompiledKernel`, and the number of programs of the launch."""

    kernel: Any
    programs: int


@contextlib.contextmanager
def imagine(gpu: ImaginedGPU, launcher: Callable[[Any, Any], Callable] | None = None) -> Iterator[list[DryLaunch]]:
    """Launch on an imagined GPU; yield a list that receives every launch, in order.

    Args:
        gpu: The GPU.
        launcher: Takes a kernel's source and metadata and returns a function to call at a launch; by default that
            function does nothing.
    """
    launched: list[DryLaunch] = []
    run = triton.JITFunction.run

    def run_and_record(self: triton.JITFunction, *args: object, grid: tuple[int, ...], **kwargs: object) -> object:
        kernel = run(self, *args, grid=grid, **kwargs)
        launched.append(DryLaunch(kernel, math.prod(grid)))
        return kernel

    triton.runtime.driver.set_active(_Driver(gpu, launcher or _no_launcher))
    triton.JITFunction.run, _launch.imagined = run_and_record, gpu
    try:
        yield launched
    finally:
        triton.JITFunction.run, _launch.imagined = run, None


def _no_launcher(source: object, metadata: object) -> Callable:
    return lambda *args: None


class _Driver:
    """The part of Triton's driver that a launch uses."""

    def __init__(self, gpu: ImaginedGPU, launcher: Callable[[Any, Any], Callable]) -> None:
        self.gpu, self.launcher_cls, self.utils = gpu, launcher, _Utils(gpu)

    def get_current_device(self) -> int:
        return self.gpu.index

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.gpu.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class _Utils:
    """The part of a driver's `utils` that Triton calls; refuses the descriptors that the hardware would refuse."""

    def __init__(self, gpu: ImaginedGPU) -> None:
        self.gpu = gpu

    def get_device_properties(self, device: int) -> dict[str, int]:
        # The limit of shared memory is out of reach, so that `inspect` reports a kernel that takes too much.
        return dict(
            max_shared_mem=1 << 30, max_num_regs=65_536, multiprocessor_count=self.gpu.num_sms,
            warpSize=self.gpu.target.warp_size,
        )  # fmt: skip

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        # The values are module, function, registers, spills and most threads.
        return 1, 1, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def fill_tma_descriptor(self, pointer, swizzle, elem_size, elem_type, block_size, shape, strides, padding):
        if any(n % 16 for n in (pointer, *(stride * elem_size for stride in strides[:-1]))):
            raise ValueError(f"a descriptor at {pointer:#x} with strides {strides} is not on 16 bytes")
        if min(shape) <= 0 or not all(0 < size <= 256 for size in block_size):
            raise ValueError(f"a descriptor of shape {shape} in blocks of {block_size}")
        return Descriptor()

    fill_tma_descriptor_tiled = fill_tma_descriptor


class Descriptor:
    """A stand-in for the tensor map that a GPU's driver would make."""
