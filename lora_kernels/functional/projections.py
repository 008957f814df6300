"""`lora_projections` and `lora_qkv`: check, apply autocast, choose a backend, call it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels import autograd, passes, plan, torch_backend
from lora_kernels.autograd.common import autocasts
from lora_kernels.autograd.stored import given, split_all
from lora_kernels.constants import MAX_OUTPUTS
from lora_kernels.functional import checks
from lora_kernels.functional.base import base
from lora_kernels.functional.gate import (
    BACKENDS,
    as_number,
    cast,
    check_backend_runs,
    is_proxy,
    is_watched,
    record,
    takes_reference,
    wait_for,
    without_autocast,
)
from lora_kernels.functional.linear import compute
from lora_kernels.passes.layer import GIVEN, Adapted, Projection, Weight
from lora_kernels.quantized import QuantizedWeight

__all__ = [
    "alone", "arguments", "check_each", "is_small", "lora_projections", "lora_qkv", "project", "project_jointly",
    "with_floats",
]  # fmt: skip

_QKV = ("q", "k", "v")


def lora_projections(
    x: Tensor, weights: Sequence[Weight], adapters: Sequence[tuple[Tensor, Tensor] | None], *,
    biases: Sequence[Tensor | None] | None = None, scaling: float | Sequence[float] = 1.0,
    dropout_p: float | Sequence[float] = 0.0, backend: str = "auto", accumulate_grad: bool | Sequence[bool] = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Apply several linear layers with low-rank adapters to one input, in the launches of one layer.

    yᵢ = x Wᵢᵀ + scalingᵢ · Dᵢ(x) Aᵢᵀ Bᵢᵀ + biasᵢ, where each Dᵢ is inverted dropout with a mask of its own.
    Equivalent to: `tuple(lora_linear(x, weights[i], *adapters[i], ...) for i in range(n))`, but forward reads x once
    for all sᵢ and computes all yᵢ in one launch, and backward sums dx in one accumulator and reads x once for all dAᵢ.

    Args:
        x: Activations, `[*, in_features]`; as in `lora_linear`.
        weights: W of each projection, `[out_featuresᵢ, in_features]`, a tensor or a `QuantizedWeight`.
        adapters: (lora_A `[rᵢ, in_features]`, lora_B `[out_featuresᵢ, rᵢ]`) of each projection, or None for no adapter.
        biases: `[out_featuresᵢ]` or None for each projection; None for no biases at all.
        scaling: Multiplies the low-rank term: a number for all, or one for each.
        dropout_p: As in `lora_linear`: a number for all, or one for each.
        backend: As in `lora_linear`.
        accumulate_grad: As in `lora_linear`: one bool for all, or one for each.

    Returns:
        Each y, `[*, out_featuresᵢ]`, as `lora_linear` returns it.

    Raises:
        TypeError, ValueError, RuntimeError: As `lora_linear`, naming the projection.

    Numerics: as `lora_linear`, and dx is rounded once. Where the vendor's library computes the large products (see
    `lora_kernels.plan.model`), and for a few elements on a CPU, they are those of `lora_linear` n times.

    Source: Hu et al. 2021, arXiv:2106.09685.
    """
    return _check_and_project(
        "lora_projections", x, weights, adapters, biases, scaling, dropout_p, backend, accumulate_grad=accumulate_grad
    )


def lora_qkv(
    x: Tensor, weights: Sequence[Weight], adapters: Sequence[tuple[Tensor, Tensor] | None], *,
    biases: Sequence[Tensor | None] | None = None, scaling: float | Sequence[float] = 1.0,
    dropout_p: float | Sequence[float] = 0.0, backend: str = "auto", accumulate_grad: bool | Sequence[bool] = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Project x to queries, keys and values: `lora_projections` with the three weights (Wq, Wk, Wv).

    With grouped-query attention Wk and Wv have fewer rows than Wq. Arguments, result and errors are those of
    `lora_projections`.
    """
    # `_check_and_project` has checked that there are three projections.
    return _check_and_project(  # type: ignore[return-value]
        "lora_qkv", x, weights, adapters, biases, scaling, dropout_p, backend, 3, accumulate_grad
    )


def _check_and_project(
    call: str, x: Tensor, weights: Sequence[Weight], adapters: Sequence[tuple[Tensor, Tensor] | None],
    biases: Sequence[Tensor | None] | None, scaling: float | Sequence[float], dropout_p: float | Sequence[float],
    backend: str, expected: int | None = None, accumulate_grad: bool | Sequence[bool] = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Check the lists, and project."""
    each = {"biases": biases, "scaling": scaling, "dropout_p": dropout_p, "accumulate_grad": accumulate_grad}
    lists = {name: value for name, value in each.items() if isinstance(value, (list, tuple))}
    count = checks.check_counts(call, weights, adapters, expected, **lists)
    checks.check_flag(call, "accumulate_grad", accumulate_grad, "projection")
    *numbers, added = (lists.get(name, (each[name],) * count) for name in each)
    entries = [
        Projection(weight, *(pair or (None, None)), *rest)
        for weight, pair, *rest in zip(weights, adapters, *numbers, strict=True)
    ]
    return project(call, x, entries, backend, added)


def project(
    call: str, x: Tensor, entries: list[Projection], backend: str, added: Sequence[bool]
) -> tuple[Tensor, ...]:  # fmt: skip
    """Cast for autocast, check, and compute each projection; `added` has `accumulate_grad` of each."""
    if type(x) is not Tensor:
        if is_proxy(x):
            return record(x, project, call, x, entries, backend, added)
        x = wait_for(x)
    device_type = x.device.type if isinstance(x, Tensor) else "cpu"
    autocast, adapters_fit = autocasts(device_type), [False] * len(entries)
    if autocast:
        x, entries, adapters_fit = cast(device_type, x, entries)
    checks.check_backend(call, backend, BACKENDS)
    check_each(call, x, range(len(entries)), entries, adapters_fit, entries)
    if autocast:
        with without_autocast(device_type):
            return project_jointly(call, x, entries, backend, added)
    return project_jointly(call, x, entries, backend, added)


def check_each(
    call: str, x: Tensor, layers: Sequence[str | int], entries: list[Projection], adapters_fit: list[bool],
    together: list[Projection],
) -> None:  # fmt: skip
    """Check the projections of a call that read x; `layers` are their names, or their indices in the lists."""
    for layer, q, fits in zip(layers, entries, adapters_fit, strict=True):
        # These are the caller's arguments, unchecked so far.
        lora_A: Any
        lora_B: Any
        lora_A, lora_B = _no_adapter(x, q.weight) if q.lora_A is q.lora_B is None else (q.lora_A, q.lora_B)
        where = f"{call}: {_projection_name(call, layer)}"
        checks.check_call(x, q.weight, lora_A, lora_B, q.bias, q.scaling, q.dropout_p, where)
        if not fits:
            checks.check_dtypes(x, q.weight, lora_A, lora_B, q.bias, where, layer, together)


def _projection_name(call: str, layer: str | int) -> str:
    """Return the name of one projection in messages, where `layer` is a name or an index in the lists."""
    if isinstance(layer, str):
        return layer
    return _QKV[layer] if call == "lora_qkv" else f"projection {layer}"


def project_jointly(
    call: str, x: Tensor, entries: list[Projection], backend: str, added: Sequence[bool], chosen: str | None = None
) -> tuple[Tensor, ...]:
    """Compute together the checked projections that can share launches, and each other projection alone.

    `chosen` is the backend that computes each alone, if the call has chosen so.
    """
    ys: dict[int, Tensor] = {}
    shared = None
    if chosen is None:
        shared, chosen = _backends(call, x, entries, backend)
    if shared is not None:
        # Leave out adapters that add nothing: `alone` gives them gradients of 0.
        joining = [i for i, q in enumerate(entries) if q.lora_A is None or (q.lora_A.shape[0] and q.dropout_p < 1)]
        for first in range(0, len(joining), MAX_OUTPUTS):
            places = joining[first : first + MAX_OUTPUTS]
            computed = _together(x, [entries[i] for i in places], shared, [added[i] for i in places])
            ys.update(zip(places, computed, strict=True))
    return tuple(
        ys[i] if i in ys else alone(call, x, q, backend, added[i], chosen) for i, q in enumerate(entries)
    )  # fmt: skip


def _backends(call: str, x: Tensor, entries: list[Projection], backend: str) -> tuple[str | None, str | None]:
    """Return the backend of the shared launches, None for no such launches, and that of projections computed alone.

    The second is None where each projection chooses: without a choice for all, and under a compiler or a dispatch mode.
    There the first is the requested backend, because the operators choose later, from the sizes that they see.
    """
    if takes_reference(backend):
        return None, None
    adapted: list[Adapted] = [q for q in entries if q.lora_A is not None and q.lora_A.shape[0]]
    if len(entries) < 2 or not adapted or checks.is_sharded(x):
        return None, None
    if is_watched():
        backend = plan.requested_backend(backend)
        check_backend_runs(call, x, [q.weight for q in entries], [q.lora_A for q in adapted], backend)
        return backend, None
    widths, rank = [q.weight.shape[0] for q in entries], max(q.lora_A.shape[0] for q in adapted)
    chosen = plan.choose(x.device, x.dtype, rank, x.numel() == 0 or 0 in widths, backend, call)
    small = chosen == "torch" and all(is_small(x, q) for q in adapted)
    return None if small else chosen, chosen


def _together(x: Tensor, entries: list[Projection], backend: str, added: list[bool]) -> list[Tensor]:
    """Compute several projections in the same launches, by a Function if a gradient may be needed."""
    if is_watched():
        plain, stored = arguments(entries)
        return autograd.projections.projections(x, *plain, backend, *stored)
    entries = list(map(with_floats, entries))
    tensors = [t for q in entries for t in q[:GIVEN]]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors)):
        numbers = tuple((q.scaling, q.dropout_p, into) for q, into in zip(entries, added, strict=True))
        ys = autograd.projections.LoRAProjectionsFunction.apply(x, backend, numbers, *tensors)
    else:
        ys, _, _ = passes.projections.forward(x, entries, backend)
    return [y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1]) for y in ys]


def with_floats(q: Projection) -> Projection:
    """Return a projection whose scaling and dropout_p are Python floats."""
    # `_replace` takes as long as all checks of a layer.
    if type(q.scaling) is type(q.dropout_p) is float:
        return q
    return q._replace(scaling=float(q.scaling), dropout_p=float(q.dropout_p))


def arguments(entries: list[Projection]) -> tuple[tuple[list, ...], tuple[Any, ...]]:
    """Return the arguments of operators: weights to dropout_ps, as lists, and those of quantised weights."""
    weights, *tensors, scalings, ps = map(list, zip(*entries, strict=True))
    plain, tables, forms = split_all(weights)
    return (plain, *tensors, [*map(as_number, scalings)], [*map(as_number, ps)]), given(tables, forms)


def alone(
    call: str, x: Tensor, q: Projection, backend: str, added: bool = False, chosen: str | None = None
) -> Tensor:  # fmt: skip
    """Compute one checked projection alone, by the backend `chosen` for the whole call if there is one."""
    if q.lora_A is None:
        return base(call, x, q.weight, q.bias, chosen or backend)
    how = q.scaling, q.dropout_p, backend, added, (0, 1), chosen
    # A projection with an A has a B.
    return compute(call, x, q.weight, q.lora_A, q.lora_B, q.bias, *how)  # type: ignore[arg-type]


def is_small(x: Tensor, q: Adapted) -> bool:
    """Return whether PyTorch's operators should compute a projection, which would save a dense W of a quantised one."""
    return isinstance(q.weight, Tensor) and torch_backend.composes(x, q.weight, q.lora_A, q.lora_B)


def _no_adapter(x: Tensor, weight: Any) -> tuple[Any, Any]:
    """Return adapters of rank 0 for the checks; return a weight that is no matrix as given, for the checks to name."""
    if isinstance(weight, QuantizedWeight) and isinstance(x, Tensor):
        out_features, in_features = weight.shape
        return x.new_zeros(0, in_features), x.new_zeros(out_features, 0)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return weight, weight
    return weight[:0], weight[:, :0]
