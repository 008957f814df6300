"""Which backend serves a call, and the place that loads it.

"triton" runs the fused kernels, "torch" the same contractions in PyTorch's own operators (`torch_backend`).
Nothing is asked of a device before the first call that needs the answer.
"""

import functools
import importlib
import importlib.util
import logging
import os
import re
from typing import Any, Literal, NamedTuple, overload

import torch

from lora_kernels.plan.interface import Contractions, Kernels

__all__ = [
    "BACKENDS", "MAX_RANK", "Choice", "automatic", "choose", "contractions", "interpreting", "overridden",
    "triton_problem",
]  # fmt: skip

BACKENDS = ("auto", "triton", "torch")
MAX_RANK = 512  # the largest the shipped tile configs are made for
_OLDEST_CAPABILITY = (8, 0)
_FENCELESS, _FENCES_SINCE = 10, (3, 7, 1)  # major capability, and Triton's version: see docs/traps.md
_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_log = logging.getLogger("lora_kernels")


class Choice(NamedTuple):
    """A backend, "triton" or "torch", and the reason in words."""

    backend: str
    reason: str


def choose(
    device: torch.device, dtype: torch.dtype, rank: int, empty: bool, requested: str, call: str = "lora_linear"
) -> str:
    """The backend for a call.

    Args:
        device: Where the tensors are.
        dtype: The dtype computed in.
        rank: r.
        empty: Whether M, N, K or r is 0: there is nothing to launch, PyTorch has the right answer.
        requested: "auto", "triton" or "torch", as the caller said.
        call: Whose name errors have.

    Raises:
        ValueError: `requested` is none of these, or the rank is too large for "triton".
        RuntimeError: "triton" was asked for and cannot run; the message says why.
        TypeError: "triton" was asked for in a dtype it does not have.
    """
    if requested == "torch" or (empty and requested in BACKENDS):
        return "torch"
    return _choose(device, dtype, rank, overridden(requested), call).backend


def overridden(backend: str) -> str:
    """The backend that was asked for; where that is "auto", what LORA_KERNELS_BACKEND says."""
    return _environment_backend() if backend == "auto" else backend


# torch.compiler.assume_constant_result, which would import the compiler: a compiled graph, and the key under which it
# is kept on disk, hold the answer and not the question
overridden._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _choose(device: torch.device, dtype: torch.dtype, rank: int, requested: str, call: str) -> Choice:
    if requested not in BACKENDS:
        raise ValueError(f"{call}: backend={requested!r} is not one of: auto, triton, torch.")
    choice = Choice("torch", "it was asked for") if requested == "torch" else automatic(device, dtype, rank)
    if requested == "auto" and choice.backend == "torch" and device.type == "cuda":
        _log.info('lora_kernels: %s; using backend="torch". Set LORA_KERNELS_BACKEND=torch to silence.', choice.reason)
    if requested == "triton" and choice.backend == "torch":
        if device.type == "cpu" and not interpreting():
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
    """What "auto" takes on a device for a dtype and a rank, and why."""
    if device.type != "cuda":
        return Choice("torch", f"Triton does not compile for {device.type}")
    problem = triton_problem()
    if problem:
        return Choice("torch", problem)
    if interpreting():
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
    """Why Triton cannot be imported, or "" when it can. Imports it."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton not importable ({error})"
    return ""


def _triton_version() -> tuple[int, ...]:
    """The version of Triton that is imported, as numbers."""
    return tuple(map(int, re.findall(r"\d+", importlib.import_module("triton").__version__)[:3]))


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: for tests and `lora-kernels verify`."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@overload
def contractions(backend: Literal["triton"]) -> Kernels: ...


@overload
def contractions(backend: str) -> Contractions: ...


@functools.cache
def contractions(backend: str) -> Any:
    """The module that has `shrink`, `matmul_expand` and `wgrad` for a backend; "triton" loads Triton."""
    return importlib.import_module({"triton": "lora_kernels.kernels", "torch": "lora_kernels.torch_backend"}[backend])


@functools.cache
def _environment_backend() -> str:
    value = os.environ.get("LORA_KERNELS_BACKEND", "auto")
    if value not in BACKENDS:
        raise ValueError(f"LORA_KERNELS_BACKEND={value!r} is not one of: auto, torch, triton.")
    return value
