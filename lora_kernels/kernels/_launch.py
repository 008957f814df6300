"""What the launchers share on the host: the device guard, precision, and options that Triton must not default."""

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

from lora_kernels.kernels._configs import descriptor_path

__all__ = [
    "arrivals", "capability", "dependent_launch", "describe_path", "launch_options", "num_sms", "on_device",
    "precision", "thin_rows", "uses_tf32",
]  # fmt: skip

_COUNTERS = 1 << 16  # int32; 256 KiB a stream
_INTERPRETER_SMS = 3  # few, so that the persistent loop goes round more than once in tests


def on_device(t: Tensor) -> contextlib.AbstractContextManager:
    """Launch on the tensor's GPU, which need not be the current one."""
    if t.is_cuda and t.device.index != torch.cuda.current_device():
        return torch.cuda.device(t.device)
    return contextlib.nullcontext()


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


def capability(device: torch.device) -> tuple[int, int] | None:
    """CUDA compute capability of a device, None for anything but an NVIDIA GPU."""
    return imagined.capability if imagined else _capability(device)


@functools.cache
def _num_sms(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETER_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


def thin_rows(like: Tensor, rank: int) -> Tensor:
    """Allocate `[M, rank]` for the rows and in the dtype of `like`, each on 16 bytes: a TMA descriptor can read it."""
    pad = 16 // like.element_size()
    return like.new_empty(like.shape[0], -(-rank // pad) * pad)[:, :rank]


def dependent_launch(device: torch.device) -> bool:
    """Whether a launch may overlap the end of the one before it (programmatic dependent launch, sm_90 and later)."""
    return (capability(device) or (0, 0)) >= (9, 0)


def launch_options(dependent: bool) -> dict[str, bool]:
    """Options of every launch; with `dependent` it may come up before the launch in front of it has ended."""
    # Triton 3.10 flips the default of the first; results must not change with it. Other GPUs have no second.
    return {"enable_fp_fusion": True, "launch_pdl": True} if dependent else {"enable_fp_fusion": True}


def arrivals(device: torch.device, count: int) -> Tensor:
    """Return `count` counters at 0 for `last_to_arrive`, int32, which leaves them at 0.

    Launches of one stream follow one another, so they share a buffer that is zeroed once, as cuBLAS keeps a workspace
    for each stream. A CUDA graph may be replayed on any stream and gets counters of its own, zeroed at each replay.
    """
    if device.type != "cuda" or count > _COUNTERS or torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    return _stream_counters(device, torch.cuda.current_stream(device).cuda_stream)[:count]


@functools.lru_cache(maxsize=64)
def _stream_counters(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(_COUNTERS, dtype=torch.int32, device=device)


def describe_path(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """How `matmul_expand` loads its tiles on a device for a dtype, "tma" or "pointer", and why."""
    tma, reason = descriptor_path(capability(device), dtype)
    return "tma" if tma else "pointer", reason
