"""Choose the backend that serves a call, and load the backend.

"triton" runs the fused kernels, "torch" the same contractions in PyTorch's own operators (`torch_backend`).
The first call that needs a property of a device queries the device, and nothing does so earlier.
"""

import functools
import importlib
import importlib.util
import logging
import os
import re
from typing import Any, Literal, NamedTuple, overload

import torch

from lora_kernels.constants import DTYPES, REFERENCE
from lora_kernels.plan.interface import Contractions, Kernels

__all__ = [
    "BACKENDS", "MAX_RANK", "Choice", "automatic", "choose", "contractions", "is_interpreting", "requested_backend",
    "triton_problem",
]  # fmt: skip

BACKENDS = ("auto", "triton", "torch")
# The largest rank that the shipped tile configs are made for.
MAX_RANK = 512
_OLDEST_CAPABILITY = (8, 0)
# Major capability that needs the fences, and Triton's first version that has them: see docs/traps.md.
_FENCELESS, _FENCES_SINCE = 10, (3, 7, 1)
_KERNEL_DTYPES = tuple(DTYPES.values())
_log = logging.getLogger("lora_kernels")


class Choice(NamedTuple):
    """A backend, "triton" or "torch", and the reason in words."""

    backend: str
    reason: str


def choose(
    device: torch.device, dtype: torch.dtype, rank: int, empty: bool, requested: str, call: str = "lora_linear"
) -> str:
    """Choose the backend for a call.

    Args:
        device: The device of the tensors.
        dtype: The dtype of the computation.
        rank: r.
        empty: Whether M, N, K or r is 0. Then nothing is launched, and PyTorch's operators give the right answer.
        requested: The caller's "auto", "triton" or "torch".
        call: Name of the call in error messages.

    Raises:
        ValueError: `requested` is not a known name, or the rank is too large for "triton".
        RuntimeError: "triton" was requested and cannot run; the message says why.
        TypeError: "triton" was requested for a dtype that the kernels do not have.
    """
    if requested == "torch" or (empty and requested in BACKENDS):
        return "torch"
    return _choose(device, dtype, rank, requested_backend(requested), call).backend


def requested_backend(backend: str) -> str:
    """Return the requested backend, or the value of LORA_KERNELS_BACKEND if "auto" was requested."""
    return _environment_backend() if backend == "auto" else backend


# As torch.compiler.assume_constant_result, which would import the compiler. The returned string becomes part of a
# compiled graph and of the graph's key in the disk cache.
requested_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _choose(device: torch.device, dtype: torch.dtype, rank: int, requested: str, call: str) -> Choice:
    if requested not in BACKENDS:
        raise ValueError(f"{call}: backend={requested!r} is not one of: {', '.join((*BACKENDS, REFERENCE))}.")
    choice = Choice("torch", "it was asked for") if requested == "torch" else automatic(device, dtype, rank)
    if requested == "auto" and choice.backend == "torch" and device.type == "cuda":
        _log.info('lora_kernels: %s; using backend="torch". Set LORA_KERNELS_BACKEND=torch to silence.', choice.reason)
    if requested == "triton" and choice.backend == "torch":
        if device.type == "cpu" and not is_interpreting():
            raise RuntimeError(f'{call}: backend="triton" needs CUDA tensors (x is on cpu).')
        if rank > MAX_RANK:
            raise ValueError(f'{call}: rank {rank} exceeds {MAX_RANK}, the largest tuned; use backend="torch".')
        if dtype not in _KERNEL_DTYPES:
            raise TypeError(
                f'{call}: backend="triton" has no {str(dtype).removeprefix("torch.")}; '
                'supported: bfloat16, float16, float32. Use backend="torch".'
            )
        if device.type != "cpu":
            raise RuntimeError(f'{call}: backend="triton" cannot run: {choice.reason}.')
        return Choice("triton", "Triton's interpreter was asked for")
    return choice


def automatic(device: torch.device, dtype: torch.dtype, rank: int = 16) -> Choice:
    """Return the backend that "auto" selects on a device for a dtype and a rank, and the reason."""
    if device.type != "cuda":
        return Choice("torch", f"Triton does not compile for {device.type}")
    problem = triton_problem()
    if problem:
        return Choice("torch", problem)
    if is_interpreting():
        return Choice("torch", "TRITON_INTERPRET=1 is set: kernels would run in the slow NumPy interpreter")
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        have = ".".join(map(str, capability))
        if capability < _OLDEST_CAPABILITY:
            return Choice("torch", f"the kernels need compute capability 8.0 and this GPU has {have}")
        if capability[0] == _FENCELESS and (installed := _triton_version()) < _FENCES_SINCE:
            needed, found = (".".join(map(str, version)) for version in (_FENCES_SINCE, installed))
            reason = f"compute capability {have} needs Triton {needed}, older ones miss a fence, and this is {found}"
            return Choice("torch", reason)
    if dtype not in _KERNEL_DTYPES:
        return Choice("torch", f"the kernels have no {str(dtype).removeprefix('torch.')}")
    if rank > MAX_RANK:
        return Choice("torch", f"rank {rank} exceeds {MAX_RANK}, the largest tuned")
    return Choice("triton", "the fused kernels")


@functools.cache
def triton_problem() -> str:
    """Import Triton; return the reason if the import fails, else an empty string."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton not importable ({error})"
    return ""


def _triton_version() -> tuple[int, ...]:
    """Return the version of the imported Triton as numbers."""
    return tuple(map(int, re.findall(r"\d+", importlib.import_module("triton").__version__)[:3]))


def is_interpreting() -> bool:
    """Return whether kernels run in Triton's interpreter on CPU tensors, for tests and `lora-kernels verify`."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@overload
def contractions(backend: Literal["triton"]) -> Kernels: ...


@overload
def contractions(backend: str) -> Contractions: ...


@functools.cache
def contractions(backend: str) -> Any:
    """Return the module that has `shrink`, `matmul_expand` and `wgrad` for a backend; "triton" loads Triton."""
    return importlib.import_module({"triton": "lora_kernels.kernels", "torch": "lora_kernels.torch_backend"}[backend])


@functools.cache
def _environment_backend() -> str:
    value = os.environ.get("LORA_KERNELS_BACKEND", "auto")
    if value not in BACKENDS:
        raise ValueError(f"LORA_KERNELS_BACKEND={value!r} is not one of: {', '.join(sorted(BACKENDS))}.")
    return value
