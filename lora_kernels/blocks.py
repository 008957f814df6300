"""Layers that belong together, `lora_projections`, `lora_qkv`, `lora_mlp`: check, autocast, choose a backend, call."""

import itertools
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lora_kernels import mlp, mlp_ops, plan, projection_ops, projections
from lora_kernels.functional import checks
from lora_kernels import torch_backend
from lora_kernels.activations import activated
from lora_kernels.autograd import autocasts
from lora_kernels.functional import arrived, as_autocast, as_number, compute, transforming, watched
from lora_kernels.projections import Projection

__all__ = ["lora_mlp", "lora_projections", "lora_qkv"]

_AT_ONCE = 4  # projections of one launch
_QKV = ("q", "k", "v")


def lora_projections(
    x: Tensor, weights: Sequence[Tensor], adapters: Sequence[tuple[Tensor, Tensor] | None], *,
    biases: Sequence[Tensor | None] | None = None, scaling: float | Sequence[float] = 1.0,
    dropout_p: float | Sequence[float] = 0.0, backend: str = "auto", accumulate_grad: bool | Sequence[bool] = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Apply several linear layers with low-rank adapters to one input, in the launches of one layer.

    yᵢ = x Wᵢᵀ + scalingᵢ · Dᵢ(x) Aᵢᵀ Bᵢᵀ + biasᵢ, where each Dᵢ is inverted dropout with a mask of its own.
    Equivalent to: `tuple(lora_linear(x, weights[i], *adapters[i], ...) for i in range(n))`, but forward reads x once
    for all sᵢ and computes all yᵢ in one launch, and backward sums dx in one accumulator and reads x once for all dAᵢ.

    Args:
        x: Activations, `[*, in_features]`; as in `lora_linear`.
        weights: W of each projection, `[out_featuresᵢ, in_features]`.
        adapters: (lora_A `[rᵢ, in_features]`, lora_B `[out_featuresᵢ, rᵢ]`) of each, or None where it has none.
        biases: `[out_featuresᵢ]` or None of each; None if there are none.
        scaling: Multiplies the low-rank term: a number for all, or one for each.
        dropout_p: As in `lora_linear`: a number for all, or one for each.
        backend: As in `lora_linear`.
        accumulate_grad: As in `lora_linear`: one for all, or one for each.

    Returns:
        Each y, `[*, out_featuresᵢ]`, as `lora_linear` returns it.

    Raises:
        TypeError, ValueError, RuntimeError: As `lora_linear`, naming the projection.

    Numerics: as `lora_linear`, and dx is rounded once. Where large products are left to the vendor's library (see
    `lora_kernels.plan.model`) and for a few elements on a CPU, it is `lora_linear` n times.

    Source: Hu et al. 2021, arXiv:2106.09685.
    """
    return _projected(
        "lora_projections", x, weights, adapters, biases, scaling, dropout_p, backend, accumulate_grad=accumulate_grad
    )


def lora_qkv(
    x: Tensor, weights: Sequence[Tensor], adapters: Sequence[tuple[Tensor, Tensor] | None], *,
    biases: Sequence[Tensor | None] | None = None, scaling: float | Sequence[float] = 1.0,
    dropout_p: float | Sequence[float] = 0.0, backend: str = "auto", accumulate_grad: bool | Sequence[bool] = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Project x to queries, keys and values: `lora_projections` of three, (Wq, Wk, Wv).

    With grouped-query attention Wk and Wv have fewer rows than Wq. Arguments, result and errors are those of
    `lora_projections`.
    """
    return _projected("lora_qkv", x, weights, adapters, biases, scaling, dropout_p, backend, 3, accumulate_grad)


def lora_mlp(
    x: Tensor, gate: Projection | None, up: Projection, down: Projection, *,
    activation: str = "silu", recompute: bool = False, backend: str = "auto",
    accumulate_grad: bool | Sequence[bool] = False,
) -> Tensor:  # fmt: skip
    """Apply a gated MLP whose layers may have low-rank adapters.

    y = down(a(gate(x)) · up(x)), or down(a(up(x))) without a gate. Each layer is computed as `lora_linear` computes it,
    with a dropout mask of its own. An MLP of two layers, such as GPT-2's or one with squared ReLU, has no gate:

        up, down = Projection(w_up, a_up, b_up), Projection(w_down, a_down, b_down)
        y = lora_mlp(x, None, up, down, activation="gelu_tanh")

    Args:
        x: Activations, `[*, in_features]`; as in `lora_linear`.
        gate: weight `[hidden, in_features]`, lora_A, lora_B, bias, scaling and dropout_p of the gate, as `lora_linear`
            takes them; lora_A and lora_B None for no adapter. Or None for an MLP without a gate.
        up: Likewise, weight `[hidden, in_features]`.
        down: Likewise, weight `[out_features, hidden]`.
        activation: a: "silu" (SwiGLU), "gelu" (GEGLU), "gelu_tanh" (GEGLU, approximated) or "relu2" (squared ReLU).
        recompute: Compute gate(x) and up(x) once more in backward rather than keep them: `2 · hidden` elements a row
            less, for about half of the MLP's forward pass more.
        backend: As in `lora_linear`.
        accumulate_grad: As in `lora_linear`: one for all layers, or one for each.

    Returns:
        y, `[*, out_features]`, as `lora_linear` returns it.

    Raises:
        TypeError, ValueError, RuntimeError: As `lora_linear`, naming the layer; widths do not fit each other,
            `activation` is none of these.

    Saved for backward: x, gate(x), up(x), and of each layer s and the mask.

    Numerics: as `lora_linear`; gate(x), up(x), h = a(gate(x)) · up(x) and the gradients of all three are rounded once.
    For a few elements on a CPU it is `lora_projections`, PyTorch's own activation and `lora_linear`, which save h as
    well.

    Source: Shazeer 2020, arXiv:2002.05202 (SwiGLU, GEGLU); So et al. 2021, arXiv:2109.08668 (squared ReLU).
    """
    layers = {name: q for name, q in (("gate", gate), ("up", up), ("down", down)) if name != "gate" or q is not None}
    checks.check_mlp(layers, activation)
    checks.check_flag("lora_mlp", "accumulate_grad", accumulate_grad, "layer")
    added = accumulate_grad if isinstance(accumulate_grad, (list, tuple)) else [accumulate_grad] * len(layers)
    if len(added) != len(layers):
        raise ValueError(f"lora_mlp: accumulate_grad is for {len(added)} layers and there are {len(layers)}.")
    x = arrived(x)
    device_type = x.device.type if isinstance(x, Tensor) else "cpu"
    if not autocasts(device_type):
        return _mlp(x, layers, activation, recompute, backend, added, [False] * len(layers))
    x, entries, fits = _cast(device_type, x, layers.values())
    with torch.autocast(device_type, enabled=False):  # all is cast; it would round fp32 sums on their way
        return _mlp(x, dict(zip(layers, entries, strict=True)), activation, recompute, backend, added, fits)


def _cast(
    device_type: str, x: Tensor, entries: Iterable[Projection]
) -> tuple[Tensor, list[Projection], list[bool]]:  # fmt: skip
    """Cast as autocast casts, x once for all; and tell of each whether its adapters may be of another dtype."""
    cast, fits = [], []
    for q in entries:
        x, weight, bias, fit = as_autocast(device_type, x, q.weight, q.bias)
        cast.append(q._replace(weight=weight, bias=bias))
        fits.append(fit)
    return x, cast, fits


def _mlp(
    x: Tensor, layers: dict[str, Projection], activation: str, recompute: bool, backend: str, added: Sequence[bool],
    adapters_fit: list[bool],
) -> Tensor:  # fmt: skip
    """Check each layer; compute all in shared passes, or one after the other."""
    checks.check_backend("lora_mlp", backend, plan.BACKENDS)
    *before, down = layers.values()
    _check_each("lora_mlp", x, [*list(layers)[:-1]], before, adapters_fit[:-1], [*before, down])
    shape = *x.shape[:-1], before[0].weight.shape[0]
    h = x.new_empty_strided(shape, (0,) * len(shape))  # of its shape in name alone
    _check_each("lora_mlp", h, ["down"], [down], adapters_fit[-1:], [*before, down])
    chosen = _fused_backend(x, [*before, down], backend)
    if chosen is None:

        def composed(x: Tensor) -> Tensor:
            gate, up = (*_joined(x, before, backend, added[:-1], adapters_fit[:-1]), None)[:2]
            return _alone(activated(gate, up, activation), down, backend, adapters_fit[-1], added[-1])

        again = recompute and torch.is_grad_enabled() and not transforming()  # transforms take no saved-tensor hooks
        return checkpoint(composed, x, use_reentrant=False) if again else composed(x)
    if watched():
        return mlp_ops.mlp(x, *_arguments([*before, down]), activation, recompute, chosen)
    entries = list(map(_with_floats, (*before, down)))
    tensors = list(itertools.chain.from_iterable(q[:4] for q in entries))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors)):
        numbers = tuple((q.scaling, q.dropout_p, into) for q, into in zip(entries, added, strict=True))
        y = mlp.LoRAMLPFunction.apply(x, chosen, activation, recompute, numbers, *tensors)
    else:
        y, *_ = mlp.forward(x, entries[:-1], entries[-1], activation, chosen)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


def _fused_backend(x: Tensor, entries: list[Projection], backend: str) -> str | None:
    """The backend that computes an MLP in shared passes; None where its layers are computed one after the other.

    Where something watches, the one that was asked for, as in `_shared_backend`.
    """
    adapted = [q for q in entries if q.lora_A is not None]
    if not adapted or transforming() or checks.is_sharded(x):
        return None
    if any(q.dropout_p == 1 or not q.lora_A.shape[0] for q in adapted):  # adds nothing, and gets gradients of 0
        return None
    empty = x.numel() == 0 or any(q.weight.numel() == 0 for q in entries)
    if watched():
        return None if empty else plan.overridden(backend)
    chosen = plan.choose(x.device, x.dtype, max(q.lora_A.shape[0] for q in adapted), empty, backend, "lora_mlp")
    small = chosen == "torch" and all(torch_backend.composes(x, q.weight, q.lora_A, q.lora_B) for q in adapted)
    return None if small or empty else chosen


def _projected(
    call: str, x: Tensor, weights: Sequence[Tensor], adapters: Sequence[tuple[Tensor, Tensor] | None],
    biases: Sequence[Tensor | None] | None, scaling: float | Sequence[float], dropout_p: float | Sequence[float],
    backend: str, expected: int | None = None, accumulate_grad: bool | Sequence[bool] = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Check, cast for autocast, and project."""
    each = {"biases": biases, "scaling": scaling, "dropout_p": dropout_p, "accumulate_grad": accumulate_grad}
    lists = {name: value for name, value in each.items() if isinstance(value, (list, tuple))}
    count = checks.check_counts(call, weights, adapters, expected, **lists)
    checks.check_flag(call, "accumulate_grad", accumulate_grad, "projection")
    *numbers, added = (lists.get(name, (each[name],) * count) for name in each)
    entries = [
        Projection(weight, *(pair or (None, None)), *rest)
        for weight, pair, *rest in zip(weights, adapters, *numbers, strict=True)
    ]
    x = arrived(x)
    device_type = x.device.type if isinstance(x, Tensor) else "cpu"
    if not autocasts(device_type):
        return _checked(call, x, entries, backend, added, [False] * count)
    x, entries, fits = _cast(device_type, x, entries)
    with torch.autocast(device_type, enabled=False):  # all is cast; it would round fp32 sums on their way
        return _checked(call, x, entries, backend, added, fits)


def _checked(
    call: str, x: Tensor, entries: list[Projection], backend: str, added: Sequence[bool], adapters_fit: list[bool]
) -> tuple[Tensor, ...]:
    """Check each projection and compute them."""
    checks.check_backend(call, backend, plan.BACKENDS)
    _check_each(call, x, range(len(entries)), entries, adapters_fit, entries)
    return _joined(x, entries, backend, added, adapters_fit)


def _check_each(
    call: str, x: Tensor, layers: Sequence[str | int], entries: list[Projection], adapters_fit: list[bool],
    together: list[Projection],
) -> None:  # fmt: skip
    """Check some projections of a call, those that read x; `layers` are their names, or places in the lists."""
    for layer, q, fits in zip(layers, entries, adapters_fit, strict=True):
        lora_A, lora_B = _no_adapter(q.weight) if q.lora_A is q.lora_B is None else (q.lora_A, q.lora_B)
        try:
            checks.check_call(x, q.weight, lora_A, lora_B, q.bias, q.scaling, q.dropout_p)
            if not fits:
                checks.check_dtypes(x, q.weight, lora_A, lora_B, q.bias, layer=layer, together=together)
        except (TypeError, ValueError) as error:
            raise type(error)(str(error).replace("lora_linear:", f"{call}: {_named(call, layer)}:", 1)) from None


def _named(call: str, layer: str | int) -> str:
    """What a message calls one projection of a call, whose arguments it names by their places in the lists."""
    if isinstance(layer, str):
        return layer
    return _QKV[layer] if call == "lora_qkv" else f"projection {layer}"


def _joined(
    x: Tensor, entries: list[Projection], backend: str, added: Sequence[bool], adapters_fit: list[bool]
) -> tuple[Tensor, ...]:
    """Compute those that can share launches together, the others on their own."""
    ys: dict[int, Tensor] = {}
    chosen = _shared_backend(x, entries, backend)
    if chosen is not None:  # not for those that add nothing: their adapters get gradients of 0 on the way alone
        joining = [i for i, q in enumerate(entries) if q.lora_A is None or (q.lora_A.shape[0] and q.dropout_p < 1)]
        for first in range(0, len(joining), _AT_ONCE):
            places = joining[first : first + _AT_ONCE]
            computed = _together(x, [entries[i] for i in places], chosen, [added[i] for i in places])
            ys.update(zip(places, computed, strict=True))
    return tuple(ys[i] if i in ys else _alone(x, q, backend, adapters_fit[i], added[i]) for i, q in enumerate(entries))


def _shared_backend(x: Tensor, entries: list[Projection], backend: str) -> str | None:
    """The backend that computes projections in shared launches; None where each is better off alone.

    Where something watches, the one that was asked for: the operators choose, and with sizes that they can see.
    """
    adapted = [q for q in entries if q.lora_A is not None and q.lora_A.shape[0]]
    if len(entries) < 2 or not adapted or transforming() or checks.is_sharded(x):
        return None
    if watched():
        return plan.overridden(backend)
    widths, rank = [q.weight.shape[0] for q in entries], max(q.lora_A.shape[0] for q in adapted)
    chosen = plan.choose(x.device, x.dtype, rank, x.numel() == 0 or 0 in widths, backend, "lora_projections")
    if chosen == "torch" and all(torch_backend.composes(x, q.weight, q.lora_A, q.lora_B) for q in adapted):
        return None
    return chosen


def _together(x: Tensor, entries: list[Projection], backend: str, added: list[bool]) -> list[Tensor]:
    """Several projections in the same launches, with a Function where a gradient may be asked for."""
    if watched():
        return projection_ops.projections(x, *_arguments(entries), backend)
    entries = list(map(_with_floats, entries))
    tensors = list(itertools.chain.from_iterable(q[:4] for q in entries))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors)):
        numbers = tuple((q.scaling, q.dropout_p, into) for q, into in zip(entries, added, strict=True))
        ys = projections.LoRAProjectionsFunction.apply(x, backend, numbers, *tensors)
    else:
        ys, _, _ = projections.forward(x, entries, backend)
    return [y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1]) for y in ys]


def _with_floats(q: Projection) -> Projection:
    if type(q.scaling) is type(q.dropout_p) is float:  # to replace takes as long as all checks of a layer
        return q
    return q._replace(scaling=float(q.scaling), dropout_p=float(q.dropout_p))


def _arguments(entries: list[Projection]) -> tuple[list, ...]:
    """What operators take of each: weights, lora_As, lora_Bs, biases, scalings, dropout_ps."""
    *tensors, scalings, ps = map(list, zip(*entries, strict=True))
    return *tensors, [*map(as_number, scalings)], [*map(as_number, ps)]


def _alone(x: Tensor, q: Projection, backend: str, adapters_fit: bool, added: bool = False) -> Tensor:
    if q.lora_A is None:
        return F.linear(x, q.weight, q.bias)
    how = q.scaling, q.dropout_p, backend, added, (0, 1)
    return compute(x, q.weight, q.lora_A, q.lora_B, q.bias, *how, adapters_fit)


def _no_adapter(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Adapters of rank 0, for checks; of something that is no matrix, that itself, which the checks then name."""
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return weight, weight
    return weight[:0], weight[:, :0]
