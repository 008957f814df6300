"""A Function and operators for several projections of one x, as in `linear`.

    lora_kernels::projections            each y; chooses a backend, draws the noise of all masks, calls ..._forward
    lora_kernels::projections_forward    each y, the s, the masks: a pure function of its arguments, differentiable once
    lora_kernels::projections_backward   dx, each dA and dB: the derivative of projections_forward

The operators run `passes.projections.forward` and `backward`. They choose the form of the large products at run time,
because the form depends on the number of rows: a graph holds for every batch. As in `linear`, the operators do not
compose small calls on a CPU.

The tensors of all projections are one list (see `packing`): those given, or in backward dy and those saved for each.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels import plan
from lora_kernels.autograd import packing
from lora_kernels.autograd.common import (
    Context,
    autocast_off,
    backward_products,
    by_reference,
    gradients,
    guard_backward,
    is_exporting_to_onnx,
    register,
    register_flops,
)
from lora_kernels.autograd.stored import given, join_all, no_gradients, save_tensors, saved_tensors, shape_of
from lora_kernels.dropout import keep_scale
from lora_kernels.passes import projections as projections_pass
from lora_kernels.passes.layer import GIVEN, SAVED, Part, Projection, by_layer, rows, tensors_to_save

__all__ = ["LoRAProjectionsFunction", "projections", "projections_backward", "projections_forward"]

# Tensors of each projection in backward: dy, and those saved.
_EACH = 1 + SAVED

_library = torch.library.Library("lora_kernels", "FRAGMENT")
for _schema in (
    "projections(Tensor x, Tensor[] weights, Tensor?[] lora_As, Tensor?[] lora_Bs, Tensor?[] biases, "
    "Scalar[] scalings, float[] dropout_ps, str backend, Tensor[]? tables=None, str[]? forms=None) -> Tensor[]",
    "projections_forward(Tensor x, Tensor[] tensors, int[] places, Tensor? noise, float[] scalings, "
    "float[] dropout_ps, str backend, Tensor[]? tables=None, str[]? forms=None) "
    "-> (Tensor[] ys, Tensor s, Tensor[] keeps)",
    "projections_backward(Tensor? x, Tensor[] tensors, int[] places, float[] alphas, str backend, ScalarType dtype, "
    "bool need_x, bool[] need_As, Tensor[]? tables=None, str[]? forms=None) -> Tensor[]",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


class LoRAProjectionsFunction(torch.autograd.Function):
    """Run the forward and backward passes. Differentiable once; a second differentiation raises."""

    @staticmethod
    def forward(
        ctx: Context, x: Tensor, backend: str, numbers: Sequence[tuple[float, float, bool]],
        *tensors: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Compute each y `[M, outᵢ]` and save the tensors that the needed gradients take.

        Args:
            ctx: The context.
            x: `[*, in]`.
            backend: "triton" or "torch".
            numbers: scaling and dropout_p of each projection, and whether backward may add to its gradients itself.
            tensors: weight, lora_A, lora_B and bias of the first projection, of the second, and so on.
        """
        groups = zip(by_layer(tensors), numbers, strict=True)
        # A type checker does not know the length of a slice.
        projections = [Projection(*four, scaling, p) for four, (scaling, p, _) in groups]  # type: ignore[call-arg]
        ys, shrunk, keeps = projections_pass.forward(x, projections, backend)
        need_x, needs = ctx.needs_input_grad[0], by_layer(ctx.needs_input_grad[3:])
        saved = [x if any(need_weight or need_A for need_weight, need_A, _, _ in needs) else None]
        for q, s, keep, (_, need_A, need_B, _) in zip(projections, shrunk, keeps, needs, strict=True):
            saved += tensors_to_save(q.weight, q.lora_A, q.lora_B, s, keep, need_x, need_A, need_B)
        save_tensors(ctx, saved)
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.x_shape = backend, x.shape
        ctx.accumulate = [
            (q.lora_A, q.lora_B) if added else None for q, (_, _, added) in zip(projections, numbers, strict=True)
        ]
        ctx.numbers = [
            # A projection with an A has a B.
            (q.alpha, None if q.lora_A is None else (q.lora_A.dtype, q.lora_B.dtype), need_A)  # type: ignore[union-attr]
            for q, (_, need_A, _, _) in zip(projections, needs, strict=True)
        ]
        return tuple(ys)

    @staticmethod
    def backward(ctx: Context, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        """Compute the gradients that `ctx.needs_input_grad` asks for, each in the dtype of its tensor."""
        adapters = [None if dy is None else pair for dy, pair in zip(dys, ctx.accumulate, strict=True)]
        into = gradients(ctx, adapters)
        with autocast_off(next(dy for dy in dys if dy is not None)):
            return _backward(ctx, into, *dys)


@guard_backward("lora_projections")
def _backward(
    ctx: Context, into: Sequence[tuple[Tensor | None, Tensor | None]], *dys: Any
) -> tuple[Tensor | None, ...]:  # fmt: skip
    need_x, needs = ctx.needs_input_grad[0], by_layer(ctx.needs_input_grad[3:])
    x: Any
    x, *flat = saved_tensors(ctx)
    saved = by_layer(flat, SAVED)
    # A copy, if needed, comes before the launches, because the launches overlap.
    x = None if x is None else rows(x)
    there = [i for i, dy in enumerate(dys) if dy is not None]
    parts = [
        Part(rows(dys[i]), *saved[i], *into[i], *ctx.numbers[i])  # type: ignore[call-arg]
        for i in there
    ]
    dx, low_rank = projections_pass.backward(x, parts, need_x, ctx.backend)
    grads: list[Sequence[Tensor | None]] = [(None,) * GIVEN] * len(dys)
    for i, part, own in zip(there, parts, low_rank, strict=True):
        need_weight, _, _, need_bias = needs[i]
        dweight = torch.mm(part.dy.t(), x) if need_weight else None
        grads[i] = dweight, *own, part.dy.sum(0) if need_bias else None
    return dx.view(ctx.x_shape) if need_x else None, None, None, *itertools.chain.from_iterable(grads)


def _projections(
    x: Tensor, weights: Sequence[Tensor], lora_As: Sequence[Tensor | None], lora_Bs: Sequence[Tensor | None],
    biases: Sequence[Tensor | None], scalings: Sequence[float], dropout_ps: Sequence[float], backend: str,
    tables: Sequence[Tensor] | None = None, forms: Sequence[str] | None = None,
) -> list[Tensor]:  # fmt: skip
    """Compute each y `[*, outᵢ]` from arguments that `functional` has checked and cast; `dropout_ps` are below 1."""
    if is_exporting_to_onnx():
        return by_reference(x, join_all(weights, tables, forms), lora_As, lora_Bs, biases, scalings, dropout_ps)
    register_flops({projections_forward: _forward_flops, projections_backward: _backward_flops})
    layers = weights, lora_As, lora_Bs, biases, scalings
    backend, tensors, places, numbers = packing.prepare("lora_projections", x, *layers, backend, forms)
    noise = packing.draw(x, backend, lora_As, dropout_ps)
    stored = given(tables, forms)
    return projections_forward(x, tensors, places, noise, numbers, dropout_ps, backend, *stored)[0]


def _projections_forward(
    x: Tensor, tensors: Sequence[Tensor], places: Sequence[int], noise: Tensor | None, scalings: Sequence[float],
    dropout_ps: Sequence[float], backend: str, tables: Sequence[Tensor] | None = None,
    forms: Sequence[str] | None = None,
) -> tuple[list[Tensor], Tensor, list[Tensor]]:  # fmt: skip
    """Compute each y `[*, outᵢ]`, the s side by side, `[M, ·]`, and the backend's mask of each projection with dropout.

    Args:
        x: `[*, in]`.
        tensors: W, A, B and bias of each projection without the Nones; shapes and dtypes as in `linear`.
        places: Place of each tensor in the full list, see `packing`.
        noise: Result of the backend's `draw_noise(x, count)` for all masks, or None.
        scalings: For each projection, multiplies the low-rank term.
        dropout_ps: For each projection, the probability of dropping an element.
        backend: "triton" or "torch".
        tables: The further tensors of quantised W, see `stored`.
        forms: For each projection the numbers of a quantised W, "" for a plain one; empty if all are plain.
    """
    entries, flat = packing.entries(tensors, places, scalings, dropout_ps, tables, forms), rows(x)
    ys, shrunk, keeps = projections_pass.forward(flat, entries, backend, noise)
    s = packing.side_by_side(flat, shrunk, backend)
    return [y.view(*x.shape[:-1], y.shape[1]) for y in ys], s, [keep for keep in keeps if keep is not None]


def _projections_backward(
    x: Tensor | None, tensors: Sequence[Tensor], places: Sequence[int], alphas: Sequence[float], backend: str,
    dtype: torch.dtype, need_x: bool, need_As: Sequence[bool], tables: Sequence[Tensor] | None = None,
    forms: Sequence[str] | None = None,
) -> list[Tensor]:  # fmt: skip
    """Compute dx `[*, in]` if needed, then the needed dA and dB of each projection, in `dtype`.

    Args:
        x: `[*, in]`, if a dA is needed.
        tensors: dy, W, A, B, s and mask of each projection that has a dy, without those that no gradient takes.
        places: Place of each tensor in the full list, see `packing`.
        alphas: scaling · keep_scale of each projection.
        backend: "triton" or "torch".
        dtype: The dtype of dA and dB.
        need_x: Whether dx is needed.
        need_As: For each projection, whether dA is needed; dB is needed if s is given.
        tables: As in `_projections_forward`.
        forms: As in `_projections_forward`.
    """
    saved = packing.unpack_layers(tensors, places, len(alphas), tables, forms, _EACH, 1)
    x, shape = None if x is None else rows(x), saved[0][0].shape[:-1]
    parts = [
        Part(rows(dy), *own, None, None, alpha, (dtype, dtype), need_A)  # type: ignore[call-arg]
        for (dy, *own), alpha, need_A in zip(saved, alphas, need_As, strict=True)
    ]
    dx, grads = projections_pass.backward(x, parts, need_x, backend)
    # `_fake_backward` promises contiguous results.
    results = [g.contiguous() for own in grads for g in own if g is not None]
    return results if dx is None else [dx.contiguous().view(*shape, dx.shape[1]), *results]


def _fake_forward(x, tensors, places, noise, scalings, dropout_ps, backend, tables=None, forms=None):
    entries = packing.entries(tensors, places, scalings, dropout_ps, tables, forms)
    contractions = plan.contractions(backend)
    rows = x.new_empty(math.prod(x.shape[:-1]), x.shape[-1])
    s = rows.new_empty(rows.shape[0], sum(packing.pitches(packing.ranks(entries), x.dtype, backend)))
    masks = [contractions.outputs(rows, 0, q.dropout_p)[1] for q in entries if q.lora_A is not None and q.dropout_p > 0]
    return [x.new_empty(*x.shape[:-1], q.weight.shape[0]) for q in entries], s, masks


def _fake_backward(x, tensors, places, alphas, backend, dtype, need_x, need_As, tables=None, forms=None):
    results: list[Tensor] = []
    groups = packing.unpack_layers(tensors, places, len(alphas), tables, forms, _EACH, 1)
    for i, (dy, weight, _, lora_B, s, _) in enumerate(groups):
        if need_x and not results:
            results.append(dy.new_empty(*dy.shape[:-1], weight.shape[1]))
        if need_As[i]:
            results.append(dy.new_empty(lora_B.shape[1], x.shape[-1], dtype=dtype))
        if s is not None:
            results.append(dy.new_empty(dy.shape[-1], s.shape[1], dtype=dtype))
    return results


def _save(ctx: Context, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, tensors, places, _, scalings, dropout_ps, backend, tables, forms = inputs
    _, s, keeps = output
    # During forward, `needs_input_grad` has a flat entry for each tensor of a list.
    need_x, *flags = ctx.needs_input_grad[: 1 + len(tensors)]
    needs, drawn = packing.needs_by_layer(flags, places, len(scalings)), iter(keeps)
    saved: list[Tensor | None] = []
    entries = packing.entries(tensors, places, scalings, dropout_ps, tables, forms)
    for q, (_, need_A, _, _) in zip(entries, needs, strict=True):
        keep = next(drawn) if q.lora_A is not None and q.dropout_p > 0 else None
        # One tensor has the s of all projections.
        saved += tensors_to_save(q.weight, q.lora_A, q.lora_B, None, keep, need_x, need_A, False)
    need_rows = any(need_weight or need_A for need_weight, need_A, _, _ in needs)
    need_s = any(need_B for _, _, need_B, _ in needs)
    save_tensors(ctx, [x if need_rows else None, s if need_s else None, *saved])
    ctx.of_stored = no_gradients(tables, forms)
    ctx.mark_non_differentiable(s)
    ctx.set_materialize_grads(False)
    ctx.alphas = [scaling * keep_scale(p) for scaling, p in zip(scalings, dropout_ps, strict=True)]
    ctx.ranks, ctx.backend, ctx.places = packing.ranks(entries), backend, places
    ctx.dtypes, ctx.widest = [t.dtype for t in tensors], packing.widest(x, entries)


def _differentiate(ctx: Context, dys: Sequence[Tensor | None], *_: Any) -> tuple[Any, ...]:
    there = [dy for dy in dys if dy is not None]
    if not there:
        return None, [None] * len(ctx.dtypes), *(None,) * 5, *ctx.of_stored
    with autocast_off(there[0]):
        dx, grads = _gradients(ctx, dys)
    return dx, packing.gradients_of(grads, ctx.places, ctx.dtypes), *(None,) * 5, *ctx.of_stored


def _gradients(ctx: Context, dys: Sequence[Tensor | None]) -> tuple[Tensor | None, list[Tensor | None]]:
    """Compute dx, and a gradient or None for each of the four tensors of each projection."""
    x, s, *saved = saved_tensors(ctx)
    need_x, flags = ctx.needs_input_grad[:2]
    needs = packing.needs_by_layer(flags, ctx.places, len(dys))
    shrunk = [None] * len(dys) if s is None else packing.columns(s, ctx.ranks, ctx.backend)
    groups, alphas, need_As = [], [], []
    for i, (dy, own) in enumerate(zip(dys, by_layer(saved, SAVED), strict=True)):
        weight, lora_A, lora_B, _, keep = own
        _, need_A, need_B, _ = needs[i]
        if dy is not None:
            groups.append((dy, weight, lora_A, lora_B, shrunk[i] if need_B else None, keep))
            alphas.append(ctx.alphas[i])
            need_As.append(need_A)
    results = iter(())
    if need_x or any(need_A or need_B for _, need_A, need_B, _ in needs):
        tensors, places, tables, forms = packing.pack_layers(groups, 1)
        how = alphas, ctx.backend, ctx.widest, need_x, need_As, *given(tables, forms)
        results = iter(projections_backward(x if any(need_As) else None, tensors, places, *how))
    dx = next(results) if need_x else None
    grads: list[Tensor | None] = []
    for dy, (need_weight, need_A, need_B, need_bias) in zip(dys, needs, strict=True):
        if dy is None:
            grads += [None] * GIVEN
            continue
        dweight = torch.mm(rows(dy).t(), rows(x)) if need_weight else None
        low_rank = [next(results) if need else None for need in (need_A, need_B)]
        grads += [dweight, *low_rank, rows(dy).sum(0) if need_bias else None]
    return dx, grads


projections, projections_forward, projections_backward = register(
    _library, "projections", composed=_projections, forward=_projections_forward, backward=_projections_backward,
    fake_forward=_fake_forward, fake_backward=_fake_backward, save=_save, differentiate=_differentiate,
)  # fmt: skip


def _forward_flops(
    x, tensors, places, noise, scalings, dropout_ps, backend, tables=None, forms=None, **_: Any
) -> int:  # fmt: skip
    """Count 2 M (K N + r K + r N) FLOPs for each projection; the arguments are shapes."""
    return packing.forward_flops(x, tensors, places, len(scalings), forms)


def _backward_flops(
    x, tensors, places, alphas, backend, dtype, need_x: bool, need_As: list[bool], tables=None, forms=None, **_: Any
) -> int:  # fmt: skip
    """Count FLOPs of each projection: 2 M K N + 2 M r K for dx, 2 M r K for dA, 2 M r N for each of dB and ds.

    The arguments are shapes.
    """
    total = 0
    groups = packing.unpack(tensors, places, len(alphas), _EACH)
    for (dy, weight, _, lora_B, s, _), need_A, form in zip(groups, need_As, forms or [""] * len(groups), strict=True):
        rank, inner = (lora_B or s or (0, 0))[1], shape_of(weight, form)[1] if need_x else x[-1] if need_A else 0
        total += backward_products(inner, dy[-1], rank, need_x, need_A, s is not None)
    return 2 * math.prod(groups[0][0][:-1]) * total
