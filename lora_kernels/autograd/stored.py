"""Quantised weights between forward and backward, and as arguments of operators: their tensors, never a dense W.

A `QuantizedWeight` is no tensor. So what saves it saves its tensors, the very ones that the layer has, and an operator
takes them one by one: the packed tensor in the place of W, the others (`tables`) in a list, and the numbers in a string
(`form`), which is empty for a plain W.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels.passes.layer import Weight
from lora_kernels.quantized import QuantizedWeight

__all__ = ["join", "join_all", "keep", "kept", "shape_of", "split", "split_all"]


def keep(ctx: Any, tensors: Sequence[Any]) -> None:
    """Save tensors for backward, among them weights of either kind, and Nones."""
    ctx.stored = ()
    places = [i for i, t in enumerate(tensors) if isinstance(t, QuantizedWeight)]
    if places:
        tensors, (packed, tables, forms) = list(tensors), split_all([tensors[i] for i in places])
        for i, t in zip(places, packed, strict=True):
            tensors[i] = t
        tensors += tables
        ctx.stored = places, len(tables), forms
    ctx.save_for_backward(*tensors)


def kept(ctx: Any) -> Sequence[Any]:
    """Return what `keep` has saved."""
    tensors = ctx.saved_tensors
    if not ctx.stored:
        return tensors
    places, count, forms = ctx.stored
    found = list(tensors[:-count])
    for i, weight in zip(places, join_all([found[i] for i in places], tensors[-count:], forms), strict=True):
        found[i] = weight
    return found


def split(weight: Weight) -> tuple[Tensor, list[Tensor], str]:
    """Return the tensor in the place of W, the tables and the form."""
    if isinstance(weight, Tensor):
        return weight, [], ""
    packed, *tables = weight.tensors()
    return packed, tables, weight.form


def join(tensor: Tensor, tables: Sequence[Tensor], form: str) -> Weight:
    """Undo `split`."""
    return QuantizedWeight.from_form(form, (tensor, *tables)) if form else tensor


def split_all(weights: Sequence[Weight]) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """Return the tensors in the places of several W, all tables, and the forms."""
    tensors, tables, forms = [], list[Tensor](), []
    for weight in weights:
        tensor, own, form = split(weight)
        tensors.append(tensor)
        tables += own
        forms.append(form)
    return tensors, tables, forms


def join_all(tensors: Sequence[Tensor], tables: Sequence[Tensor], forms: Sequence[str]) -> list[Weight]:
    """Undo `split_all`."""
    rest = iter(tables)
    return [
        join(tensor, [next(rest) for _ in range(count_tables(form))], form)
        for tensor, form in zip(tensors, forms, strict=True)
    ]  # fmt: skip
