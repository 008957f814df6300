"""A GPU that is not there: launches go as far as they can without one, and what was compiled for them is kept.

The launchers run on CPU tensors as they would on a GPU's: they pick the tiles for it, Triton binds and specialises the
real arguments and compiles the kernel, and nothing is loaded. So what is compiled is what a call compiles on the real
GPU, with no signature written by hand. For `lora-kernels inspect` and the tests; in a process of its own, because
Triton keeps one driver a process.

The driver's methods are those that Triton's `JITFunction.run` and `CompiledKernel` call (3.6 to 3.9). Source: Triton's
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

__all__ = ["GPUS", "ImaginedGPU", "Launch", "imagine"]


@dataclass(frozen=True, eq=False)  # itself and no other: it is part of a key at every launch
class ImaginedGPU:
    """What a launcher and Triton ask of a GPU.

    Args:
        arch: "sm_90" or "gfx942".
        num_sms: Multiprocessors, or compute units.
        shared: Most bytes of shared memory of a program.
        shared_per_sm: Bytes of shared memory of a multiprocessor.
        index: A device number of its own, under which Triton keeps what it compiled.
    """

    arch: str
    num_sms: int
    shared: int
    shared_per_sm: int
    index: int

    @property
    def capability(self) -> tuple[int, int] | None:
        """CUDA compute capability; None on AMD."""
        return divmod(int(self.arch[3:]), 10) if self.arch.startswith("sm_") else None

    @property
    def target(self) -> GPUTarget:
        """What Triton compiles for."""
        if self.capability:
            return GPUTarget("cuda", int(self.arch[3:]), 32)
        return GPUTarget("hip", self.arch, 64)


# an A100, an H200, a B200 and an MI300X; NVIDIA's CUDA C++ Programming Guide, compute capabilities; AMD's CDNA3 guide
GPUS = {
    gpu.arch: gpu
    for gpu in (
        ImaginedGPU("sm_80", 108, 166_912, 167_936, 0),
        ImaginedGPU("sm_90", 132, 232_448, 233_472, 1),
        ImaginedGPU("sm_100", 148, 232_448, 233_472, 2),
        ImaginedGPU("gfx942", 304, 65_536, 65_536, 3),
    )
}


class Launch(NamedTuple):
    """A launch that did not happen: Triton's `CompiledKernel`, and how many programs it would have had."""

    kernel: Any
    programs: int


@contextlib.contextmanager
def imagine(gpu: ImaginedGPU, launcher: Callable[[Any, Any], Callable] | None = None) -> Iterator[list[Launch]]:
    """Launch on an imagined GPU; yields a list that gets every launch, in order.

    Args:
        gpu: The GPU.
        launcher: Made from a kernel's source and metadata and called in place of a launch; by default nothing happens.
    """
    launched: list[Launch] = []
    run = triton.JITFunction.run

    def recorded(self: triton.JITFunction, *args: object, grid: tuple[int, ...], **kwargs: object) -> object:
        kernel = run(self, *args, grid=grid, **kwargs)
        launched.append(Launch(kernel, math.prod(grid)))
        return kernel

    triton.runtime.driver.set_active(_Driver(gpu, launcher or _no_launcher))
    triton.JITFunction.run, _launch.imagined = recorded, gpu
    try:
        yield launched
    finally:
        triton.JITFunction.run, _launch.imagined = run, None


def _no_launcher(source: object, metadata: object) -> Callable:
    return lambda *args: None


class _Driver:
    """As much of Triton's driver as a launch asks for."""

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
    """What Triton asks a driver about a device and a binary, and of a descriptor what the hardware would refuse."""

    def __init__(self, gpu: ImaginedGPU) -> None:
        self.gpu = gpu

    def get_device_properties(self, device: int) -> dict[str, int]:
        return dict(  # shared memory without end: a kernel that takes too much is to be reported, not to be refused
            max_shared_mem=1 << 30, max_num_regs=65_536, multiprocessor_count=self.gpu.num_sms,
            warpSize=self.gpu.target.warp_size,
        )  # fmt: skip

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, most threads

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
    """Stands for the tensor map that a GPU's driver would make."""
