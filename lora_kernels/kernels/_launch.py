"""What the launchers share on the host: the device guard, precision, and options that Triton must not default."""

import contextlib
import functools

import torch
from torch import Tensor

from lora_kernels.kernels._configs import descriptor_path

__all__ = ["LAUNCH_OPTIONS", "capability", "describe_path", "num_sms", "on_device", "precision", "uses_tf32"]

# Triton 3.10 flips the default; results must not change with it
LAUNCH_OPTIONS = {"enable_fp_fusion": True}

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


@functools.cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of a device."""
    if device.type != "cuda":
        return _INTERPRETER_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def capability(device: torch.device) -> tuple[int, int] | None:
    """CUDA compute capability of a device, None for anything but an NVIDIA GPU."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


def describe_path(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """How `matmul_expand` loads its tiles on a device for a dtype, "tma" or "pointer", and why."""
    tma, reason = descriptor_path(capability(device), dtype)
    return "tma" if tma else "pointer", reason
