"""Choose the form of the large products: fused, or the vendor's library with separate thin products.

On a GPU a product takes the form that `lora-kernels tune` measured (`tuned`), or else the form that `model` chooses.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.plan import model, tuned
from lora_kernels.plan.backend import contractions
from lora_kernels.plan.model import Product

__all__ = [
    "Expander", "Form", "expander", "force_form", "forget", "form", "fuses", "grouped_expander", "override", "rule",
    "stacks",
]  # fmt: skip


class Form(NamedTuple):
    """The form of a large product: a strategy of `lora_kernels.plan.model`, and for "fused" a tile's place or None."""

    strategy: str
    place: int | None = None


class Expander(NamedTuple):
    """A way to compute a large product.

    Attributes:
        name: "operators", "library", or a strategy of `lora_kernels.plan.model`.
        compute: A function like `matmul_expand_all`; with `brings_ds` it is `joint`.
        overlaps: Whether the next launch may overlap the end of this product.
        brings_ds: Whether `compute` takes dy, W, A, B, alpha and the mask, and gives dx and ds.
    """

    name: str
    compute: Callable[..., Any]
    overlaps: bool = False
    brings_ds: bool = False


def expander(
    backend: str, slot: Any, p: Tensor, inner: int, cols: int, rank: int, masked: bool = False, backward: bool = False,
    sources: int = 1, alone: bool = True,
) -> Expander:  # fmt: skip
    """Choose how to compute the large products of a layer or of several projections.

    Args:
        backend: "triton" or "torch".
        slot: The place of a plan for the launch of the products, or None.
        p: One of the large operands, x or dy, `[M, *]`.
        inner: Total length of the sums of all products.
        cols: Columns of all results.
        rank: The largest r, 0 without an adapter.
        masked: Whether a thin product is masked.
        backward: Whether the result is dx.
        sources: Number of large products that one result sums.
        alone: Whether there is one large product in all; "padded" and "joint" can compute only one.
    """
    if backend == "torch":
        return Expander("operators", contractions(backend).matmul_expand_all)
    ops = contractions("triton")
    if alone and not rank:
        return Expander("library", ops.strategy("beta1"))
    product = Product(p.shape[0], inner, cols, rank, p.dtype.itemsize, masked, backward)
    chosen = _forced or form(p.device, p.dtype, product, ops.uses_tf32(p.dtype), sources, alone)
    if alone and chosen.strategy not in model.allowed_strategies(product):
        chosen = Form("fused")
    elif not alone and chosen.strategy != "fused":
        chosen = Form("beta1")
    name, compute = chosen.strategy, functools.partial(ops.strategy(*chosen), slot=slot)
    return Expander(name, compute, overlaps=name == "fused", brings_ds=name == "joint")


def grouped_expander(backend: str, slot: Any) -> Expander:
    """Return the way to compute the large products of groups of rows: always fused, in a forced tile if there is one.

    The libraries' grouped products take no result to add to, so every other form moves the results twice more.
    """
    if backend == "torch":
        return Expander("operators", contractions(backend).matmul_expand_all)
    ops = contractions("triton")
    place = _forced.place if _forced else None
    return Expander("fused", functools.partial(ops.strategy("fused", place), slot=slot), overlaps=True)


def stacks(backend: str, dy: Tensor, adapters: Sequence[Tensor]) -> bool:
    """Return whether to merge the thin products of several A `[r, K]` in one dx; the torch backend gains nothing."""
    if backend == "torch" or not adapters:
        return False
    ranks, dtype = tuple(a.shape[0] for a in adapters), dy.dtype
    copied = all(a.dtype != dtype for a in adapters)
    # The K step of the large tiles.
    k_step = 64 if contractions("triton").describe_path(dy.device, dtype)[0] == "tma" else 32
    return model.stacks(dy.shape[0], adapters[0].shape[1], ranks, dtype.itemsize, copied, k_step)


def fuses(backend: str, x: Tensor, weight: Tensor, rank: int, masked: bool) -> bool:
    """Return whether a layer's y and dx both come from one accumulator, and so are rounded once; x is `[*, in]`."""
    (cols, inner), rows = weight.shape, x.shape[:-1].numel()
    if backend == "torch" or not rows * cols * inner:
        return False
    # Expanded, this one element has the rows of x and dy without their memory.
    like = x.reshape(-1)[:1].expand(rows, 1)
    y = expander(backend, None, like, inner, cols, rank)
    dx = expander(backend, None, like, cols, inner, rank, masked, backward=True)
    return y.name == dx.name == "fused"


@functools.lru_cache(maxsize=4096)
def form(
    device: torch.device, dtype: torch.dtype, product: Product, tf32: bool = False, sources: int = 1, alone: bool = True
) -> Form:
    """Return the form of a product on a device: the measured form, or else the model's choice."""
    measured = tuned.lookup(device, dtype, product, tf32) if device.type == "cuda" else None
    return rule(device, dtype, product, tf32, sources, alone) if measured is None else Form(*measured)


def rule(
    device: torch.device, dtype: torch.dtype, product: Product, tf32: bool = False, sources: int = 1, alone: bool = True
) -> Form:
    """Return the model's choice of form, without regard to measurements."""
    # Other devices run the interpreter, where only the kernels matter.
    if device.type != "cuda":
        return Form("fused")
    gpu = model.limits(contractions("triton").capability(device), dtype, tf32)
    return Form(model.best(product, gpu) if alone else model.best_of_several(product, sources, gpu))


@contextlib.contextmanager
def force_form(name: str, place: int | None = None) -> Iterator[None]:
    """Force one form for every large product that allows it, and "fused" for the others; not thread-local.

    Callers use it to check, measure and inspect each form.
    """
    global _forced
    before, _forced = _forced, Form(name, place)
    try:
        yield
    finally:
        _forced = before


_forced: Form | None = None


def override() -> Form | None:
    """Return the form that `force_form` has set, or None."""
    return _forced


def forget() -> None:
    """Forget the chosen forms, because the measurements have changed."""
    form.cache_clear()
