"""Which backend serves a call and in which form it does the large products: rules, and the place that loads a backend.

"triton" runs the fused kernels, "torch" the same contractions in PyTorch's own operators (`lora_kernels.eager`).
On a GPU a large product takes the form that `strategy` says, or what `lora-kernels tune` measured (`tuned`). Nothing
is asked of a device before the first call that needs the answer.
"""

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels import strategy, tuned
from lora_kernels.strategy import Product

__all__ = [
    "BACKENDS",
    "MAX_RANK",
    "Choice",
    "Form",
    "choose",
    "contractions",
    "expander",
    "expander_all",
    "forced",
    "forget",
    "form",
    "interpreting",
    "overridden",
    "repeat",
    "rule",
    "stacks",
]

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


class Form(NamedTuple):
    """How a large product is done: a strategy of `lora_kernels.strategy`, and for "fused" a tile's place, or None."""

    strategy: str
    place: int | None = None


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
overridden._dynamo_marked_constant = True


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


def expander(backend: str, p: Tensor, cols: int, rank: int, masked: bool, backward: bool) -> tuple[str, Callable]:
    """The form of a large product, and what computes it from sources, bias and mask, as `matmul_expand` does.

    Args:
        backend: "triton" or "torch".
        p: x or dy, `[M, K]`.
        cols: N.
        rank: r, 0 without an adapter.
        masked: Whether the thin product is masked.
        backward: Whether it is dx.

    Returns:
        The name of the strategy, and the function; `joint` for "joint", which takes other arguments.
    """
    ops = contractions(backend)
    if backend == "torch":
        return "operators", ops.matmul_expand
    if not rank:
        return "library", ops.library
    (rows, inner), device, dtype = p.shape, p.device, p.dtype
    product = Product(rows, inner, cols, rank, dtype.itemsize, masked, backward)
    chosen = _chosen(device, dtype, product, ops.uses_tf32(dtype))
    return chosen.strategy, ops.strategy(*chosen)


def _chosen(device: torch.device, dtype: torch.dtype, product: Product, tf32: bool) -> Form:
    chosen = _forced if _forced is not None else form(device, dtype, product, tf32)
    return chosen if chosen.strategy in strategy.allowed(product) else Form("fused")


def expander_all(
    backend: str, p: Tensor, inner: int, cols: int, rank: int, masked: bool, backward: bool, sources: int = 1
) -> tuple[str, Callable]:
    """The form of the large products of several projections, and what computes them, as `matmul_expand_all` does.

    Args:
        backend: "triton" or "torch".
        p: One of the large operands, `[M, *]`.
        inner: What is summed over by all of them.
        cols: Columns of all results.
        rank: The largest r.
        masked: Whether a thin product is masked.
        backward: Whether it is dx.
        sources: How many large products one result is a sum of.

    Returns:
        "operators", "fused" or "beta1", and the function.
    """
    ops = contractions(backend)
    if backend == "torch":
        return "operators", ops.matmul_expand_all
    product = Product(p.shape[0], inner, cols, rank, p.dtype.itemsize, masked, backward)
    chosen = _forced or _several(p.device, p.dtype, product, sources, ops.uses_tf32(p.dtype))
    if chosen.strategy != "fused":
        return "beta1", ops.beta1_all
    return "fused", functools.partial(ops.matmul_expand_all, config=chosen.place)


@functools.lru_cache(maxsize=4096)
def _several(device: torch.device, dtype: torch.dtype, product: Product, sources: int, tf32: bool) -> Form:
    measured = tuned.lookup(device, dtype, product, tf32) if device.type == "cuda" else None
    if measured is not None:
        return Form(*measured)
    if device.type != "cuda":
        return Form("fused")
    gpu = strategy.limits(contractions("triton").capability(device), dtype, tf32)
    return Form(strategy.best_of_several(product, sources, gpu))


def stacks(backend: str, dy: Tensor, adapters: Sequence[Tensor]) -> bool:
    """Whether the thin products of several A `[r, K]` in one dx should be one; operators gain nothing by it."""
    if backend == "torch" or not adapters:
        return False
    ranks, dtype = tuple(a.shape[0] for a in adapters), dy.dtype
    copied = all(a.dtype != dtype for a in adapters)
    k_step = 64 if contractions(backend).describe_path(dy.device, dtype)[0] == "tma" else 32  # of the large tiles
    return strategy.stacks(dy.shape[0], adapters[0].shape[1], ranks, dtype.itemsize, copied, k_step)


def fuses(backend: str, x: Tensor, weight: Tensor, rank: int, masked: bool) -> bool:
    """Whether a layer's y and dx both come from one accumulator, and so are rounded once; x is `[*, in]`."""
    (cols, inner), rows = weight.shape, x.shape[:-1].numel()
    if backend == "torch" or not rows * cols * inner:
        return False
    like = x.reshape(-1)[:1]  # of the shapes of x and dy in name alone
    forward, _ = expander(backend, like.expand(rows, inner), cols, rank, masked=False, backward=False)
    backward, _ = expander(backend, like.expand(rows, cols), inner, rank, masked=masked, backward=True)
    return forward == backward == "fused"


@functools.lru_cache(maxsize=4096)
def form(device: torch.device, dtype: torch.dtype, product: Product, tf32: bool = False) -> Form:
    """The form of a product on a device: what was measured there, or else what the model says."""
    measured = tuned.lookup(device, dtype, product, tf32) if device.type == "cuda" else None
    return rule(device, dtype, product, tf32) if measured is None else Form(*measured)


def rule(device: torch.device, dtype: torch.dtype, product: Product, tf32: bool = False) -> Form:
    """The form that the model says, whatever was measured."""
    if device.type != "cuda":  # the interpreter, where only the kernels are of interest
        return Form("fused")
    return Form(strategy.best(product, strategy.limits(contractions("triton").capability(device), dtype, tf32)))


@contextlib.contextmanager
def forced(name: str, place: int | None = None) -> Iterator[None]:
    """Take one form for every large product that can have it, "fused" for the others. Not thread-local.

    To check, to measure and to inspect each form.
    """
    global _forced
    before, _forced = _forced, Form(name, place)
    try:
        yield
    finally:
        _forced = before


_forced: Form | None = None


def forget() -> None:
    """Choose every form anew: what was measured has changed."""
    form.cache_clear()
    _several.cache_clear()
    if "lora_kernels.kernels" in sys.modules:
        contractions("triton").forget()


def repeat(backend: str, pass_: Callable, *arguments: Any) -> Any:
    """Call a pass, a function of a backend, tensors and hashable values that computes with `contractions`.

    With "triton" what it asks for is noted when it has been called a few times with tensors of a kind, and taken from
    these notes from then on, which saves the host what it takes to decide; see `kernels.repeat`.
    """
    if backend == "torch":
        return pass_(backend, *arguments)
    return contractions(backend).repeat(pass_, _forced, backend, *arguments)


@functools.cache
def contractions(backend: str) -> ModuleType:
    """The module that has `shrink`, `matmul_expand` and `wgrad` for a backend; "triton" loads Triton."""
    return importlib.import_module({"triton": "lora_kernels.kernels", "torch": "lora_kernels.eager"}[backend])


@functools.cache
def _environment_backend() -> str:
    value = os.environ.get("LORA_KERNELS_BACKEND", "auto")
    if value not in BACKENDS:
        raise ValueError(f"LORA_KERNELS_BACKEND={value!r} is not one of: auto, torch, triton.")
    return value
