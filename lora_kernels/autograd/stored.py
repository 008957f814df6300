"""Quantised weights between forward and backward, and as arguments of operators: their tensors, never a dense W.

A `QuantizedWeight` is no tensor. So what saves it saves its tensors, the very ones that the layer has, and an operator
takes them one by one: the packed tensor in the place of W, the others (`tables`) in a list, and the numbers in a string
(`form`), which is empty for a plain W.
"""

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lora_kernels.passes.layer import Weight
from lora_kernels.quantized.weight import QuantizedWeight, count_tables, shape_of_form

__all__ = [
    "given",
    "join",
    "join_all",
    "no_gradients",
    "save_tensors",
    "saved_tensors",
    "shape_of",
    "split",
    "split_all",
]


def save_tensors(ctx: Any, tensors: Sequence[Any]) -> None:
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


def saved_tensors(ctx: Any) -> Sequence[Any]:
    """Return what `save_tensors` has saved."""
    tensors = ctx.saved_tensors
    if not ctx.stored:
        return tensors
    places, count, forms = ctx.stored
    found = list(tensors[:-count])
    for i, weight in zip(places, join_all([found[i] for i in places], tensors[-count:], forms), strict=True):
        found[i] = weight
    return found


def given(tables: Sequence[Tensor] | None, forms: str | Sequence[str] | None) -> tuple[Any, ...]:
    """Return the last arguments of an operator: the tables and forms, or nothing if all weights are plain tensors."""
    return (tables, forms) if forms and any(forms) else ()


def no_gradients(tables: Sequence[Tensor] | None, forms: str | Sequence[str] | None) -> tuple[Any, ...]:
    """Return the gradients of what `given` returned: PyTorch asks for one of each argument that was given."""
    return ([None] * len(tables or ()), None) if forms and any(forms) else ()


def split(weight: Weight | None) -> tuple[Any, list[Tensor], str]:
    """Return the tensor in the place of W, the tables and the form."""
    if not isinstance(weight, QuantizedWeight):
        return weight, [], ""
    packed, *tables = weight.tensors()
    return packed, tables, weight.form


def join(tensor: Any, tables: Sequence[Tensor] | None, form: str) -> Any:
    """Undo `split`."""
    return QuantizedWeight.from_form(form, (tensor, *(tables or ()))) if form else tensor


def shape_of(shape: Sequence[int], form: str) -> Sequence[int]:
    """Return W's shape, where the tensor in the place of W has the given one."""
    return shape_of_form(form) if form else shape


def split_all(weights: Sequence[Weight | None]) -> tuple[list[Any], list[Tensor], list[str]]:
    """Return the tensors in the places of several W, the tables of all, and the forms."""
    parts = list(map(split, weights))
    return [t for t, _, _ in parts], [table for _, own, _ in parts for table in own], [form for *_, form in parts]


def join_all(tensors: Sequence[Any], tables: Sequence[Tensor] | None, forms: Sequence[str] | None) -> Sequence[Any]:
    """Undo `split_all`; without forms all weights are plain tensors."""
    if not tables or not forms:
        return tensors
    rest = iter(tables)
    return [
        join(tensor, tuple(itertools.islice(rest, count_tables(form))), form)
        for tensor, form in zip(tensors, forms, strict=True)
    ]
