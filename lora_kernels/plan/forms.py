"""In which form the large products are done: fused, or the vendor's library with the thin products around it.

On a GPU a product takes the form that `model` says, or the one that `lora-kernels tune` measured (`tuned`).
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.plan import model, tuned
from lora_kernels.plan.backend import contractions
from lora_kernels.plan.model import Product

__all__ = ["Form", "expander", "expander_all", "forced", "forget", "form", "fuses", "repeat", "rule", "stacks"]


class Form(NamedTuple):
    """How a large product is done: a strategy of `lora_kernels.plan.model`, and for "fused" a tile's place, or None."""

    strategy: str
    place: int | None = None


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
    if backend == "torch":
        return "operators", contractions(backend).matmul_expand
    ops = contractions("triton")
    if not rank:
        return "library", ops.library
    (rows, inner), device, dtype = p.shape, p.device, p.dtype
    product = Product(rows, inner, cols, rank, dtype.itemsize, masked, backward)
    chosen = _chosen(device, dtype, product, ops.uses_tf32(dtype))
    return chosen.strategy, ops.strategy(*chosen)


def _chosen(device: torch.device, dtype: torch.dtype, product: Product, tf32: bool) -> Form:
    chosen = _forced if _forced is not None else form(device, dtype, product, tf32)
    return chosen if chosen.strategy in model.allowed(product) else Form("fused")


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
    if backend == "torch":
        return "operators", contractions(backend).matmul_expand_all
    ops = contractions("triton")
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
    gpu = model.limits(contractions("triton").capability(device), dtype, tf32)
    return Form(model.best_of_several(product, sources, gpu))


def stacks(backend: str, dy: Tensor, adapters: Sequence[Tensor]) -> bool:
    """Whether the thin products of several A `[r, K]` in one dx should be one; operators gain nothing by it."""
    if backend == "torch" or not adapters:
        return False
    ranks, dtype = tuple(a.shape[0] for a in adapters), dy.dtype
    copied = all(a.dtype != dtype for a in adapters)
    k_step = 64 if contractions("triton").describe_path(dy.device, dtype)[0] == "tma" else 32  # of the large tiles
    return model.stacks(dy.shape[0], adapters[0].shape[1], ranks, dtype.itemsize, copied, k_step)


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
    return Form(model.best(product, model.limits(contractions("triton").capability(device), dtype, tf32)))


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
    return contractions("triton").repeat(pass_, _forced, backend, *arguments)
