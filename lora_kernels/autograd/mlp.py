"""A Function and operators for a gated MLP, as in `linear`.

    lora_kernels::mlp            y; chooses a backend, draws the noise of all masks, calls mlp_forward
    lora_kernels::mlp_forward    y and the tensors for backward: a pure function of its arguments, differentiable once
    lora_kernels::mlp_backward   dx and the gradients of all trained tensors: the derivative of mlp_forward

The operators run `passes.mlp.forward` and `differentiate` for any number of rows, as in `projections`. Layers are gate,
up and down, or up and down. Their tensors are one list (see `packing`), those given or those saved for each layer.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels import plan, reference
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
from lora_kernels.passes import mlp as mlp_pass
from lora_kernels.passes.layer import SAVED_WITH_BIAS, Projection, SavedLayer, by_layer, rows

__all__ = ["LoRAMLPFunction", "mlp", "mlp_backward", "mlp_forward"]

_library = torch.library.Library("lora_kernels", "FRAGMENT")
for _schema in (
    "mlp(Tensor x, Tensor[] weights, Tensor?[] lora_As, Tensor?[] lora_Bs, Tensor?[] biases, "
    "Scalar[] scalings, float[] dropout_ps, str activation, bool recompute, str backend, "
    "Tensor[]? tables=None, str[]? forms=None) -> Tensor",
    "mlp_forward(Tensor x, Tensor[] tensors, int[] places, Tensor? noise, Tensor? noise_down, float[] scalings, "
    "float[] dropout_ps, str activation, bool recompute, str backend, Tensor[]? tables=None, str[]? forms=None) "
    "-> (Tensor y, Tensor[] outs, Tensor s, Tensor s_down, Tensor[] keeps)",
    "mlp_backward(Tensor dy, Tensor? x, Tensor[] outs, Tensor[] tensors, int[] places, float[] alphas, "
    "str activation, str backend, ScalarType dtype, bool need_x, bool[] needs, "
    "Tensor[]? tables=None, str[]? forms=None) -> Tensor[]",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


class LoRAMLPFunction(torch.autograd.Function):
    """Run the forward and backward passes. Differentiable once; a second differentiation raises."""

    @staticmethod
    def forward(
        ctx: Context, x: Tensor, backend: str, activation: str, recompute: bool,
        numbers: Sequence[tuple[float, float, bool]], *tensors: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Compute y `[M, out]` and save the tensors that the needed gradients take.

        Args:
            ctx: The context.
            x: `[*, in]`.
            backend: "triton" or "torch".
            activation: Name of the activation.
            recompute: Whether to save x instead of the outputs of gate and up.
            numbers: scaling and dropout_p of each layer, and whether backward may add to its gradients itself.
            tensors: weight, lora_A, lora_B and bias of gate and up, or of up alone, and of down.
        """
        groups = zip(by_layer(tensors), numbers, strict=True)
        # A type checker does not know the length of a slice.
        layers = [Projection(*four, scaling, p) for four, (scaling, p, _) in groups]  # type: ignore[call-arg]
        *before, down = layers
        y, outs, shrunk, keeps = mlp_pass.forward(x, before, down, activation, backend)
        need_x, all_needs = ctx.needs_input_grad[0], by_layer(ctx.needs_input_grad[5:])
        save_tensors(ctx, mlp_pass.to_save(x, layers, outs, shrunk, keeps, need_x, all_needs, recompute))
        ctx.numbers = [
            # A layer with an A has a B.
            (q.alpha, None if q.lora_A is None else (q.lora_A.dtype, q.lora_B.dtype), needs)  # type: ignore[union-attr]
            for q, needs in zip(layers, all_needs, strict=True)
        ]
        ctx.accumulate = [
            (q.lora_A, q.lora_B) if added else None for q, (_, _, added) in zip(layers, numbers, strict=True)
        ]
        ctx.backend, ctx.activation, ctx.x_shape = backend, activation, x.shape
        return y

    @staticmethod
    def backward(ctx: Context, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients that `ctx.needs_input_grad` asks for, each in the dtype of its tensor."""
        into = gradients(ctx, ctx.accumulate)
        with autocast_off(dy):
            return _backward(ctx, into, dy)


@guard_backward("lora_mlp")
def _backward(
    ctx: Context, into: Sequence[tuple[Tensor | None, Tensor | None]], dy: Tensor
) -> tuple[Tensor | None, ...]:  # fmt: skip
    need_x = ctx.needs_input_grad[0]
    x, *saved = saved_tensors(ctx)
    end = SAVED_WITH_BIAS * len(ctx.numbers)
    layers = [
        SavedLayer(*own, *pair, *numbers)  # type: ignore[call-arg]
        for own, pair, numbers in zip(by_layer(saved[:end], SAVED_WITH_BIAS), into, ctx.numbers, strict=True)
    ]
    dx, grads = mlp_pass.differentiate(
        rows(dy), None if x is None else rows(x), layers, saved[end:], need_x, ctx.activation, ctx.backend
    )
    return None if dx is None else dx.view(ctx.x_shape), None, None, None, None, *grads


def _mlp(
    x: Tensor, weights: Sequence[Tensor], lora_As: Sequence[Tensor | None], lora_Bs: Sequence[Tensor | None],
    biases: Sequence[Tensor | None], scalings: Sequence[float], dropout_ps: Sequence[float], activation: str,
    recompute: bool, backend: str, tables: Sequence[Tensor] | None = None, forms: Sequence[str] | None = None,
) -> Tensor:  # fmt: skip
    """Compute y `[*, out]` from arguments that `functional` has checked and cast; `dropout_ps` are below 1."""
    if is_exporting_to_onnx():
        each: Any = join_all(weights, tables, forms), lora_As, lora_Bs, biases, scalings, dropout_ps
        gate, *up = by_reference(x, *(own[:-1] for own in each))
        h = reference.activated(gate, up[0] if up else None, activation)
        return by_reference(h, *(own[-1:] for own in each))[0]
    register_flops({mlp_forward: _forward_flops, mlp_backward: _backward_flops})
    layers = weights, lora_As, lora_Bs, biases, scalings
    chosen, tensors, places, numbers = packing.prepare("lora_mlp", x, *layers, backend, forms)
    # A placeholder with the shape of h but without its memory.
    h = x.new_empty(1).expand(*x.shape[:-1], shape_of(weights[-1].shape, forms[-1] if forms else "")[1])
    noise = packing.draw(x, chosen, lora_As[:-1], dropout_ps[:-1])
    noise_down = packing.draw(h, chosen, lora_As[-1:], dropout_ps[-1:])
    how = activation, recompute, chosen, *given(tables, forms)
    return mlp_forward(x, tensors, places, noise, noise_down, numbers, dropout_ps, *how)[0]


def _mlp_forward(
    x: Tensor, tensors: Sequence[Tensor], places: Sequence[int], noise: Tensor | None, noise_down: Tensor | None,
    scalings: Sequence[float], dropout_ps: Sequence[float], activation: str, recompute: bool, backend: str,
    tables: Sequence[Tensor] | None = None, forms: Sequence[str] | None = None,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """Compute y `[*, out]`, the outputs of gate and up, their s side by side, the s of down, and the backend's masks.

    Args:
        x: `[*, in]`.
        tensors: W, A, B and bias of each layer without the Nones; shapes and dtypes as in `linear`.
        places: Place of each tensor in the full list, see `packing`.
        noise: Result of the backend's `draw_noise(x, count)` for the masks of gate and up, or None.
        noise_down: Result of its `draw_noise(h)` for the mask of down, or None; h is `[*, hidden]`.
        scalings: For each layer, multiplies the low-rank term.
        dropout_ps: For each layer, the probability of dropping an element.
        activation: Name of the activation.
        recompute: Whether to return no outputs of gate and up, because backward computes them again.
        backend: "triton" or "torch".
        tables: The further tensors of quantised W, see `stored`.
        forms: For each layer the numbers of a quantised W, "" for a plain one; empty if all are plain.
    """
    *before, down = packing.entries(tensors, places, scalings, dropout_ps, tables, forms)
    flat = rows(x)
    y, outs, shrunk, keeps = mlp_pass.forward(flat, before, down, activation, backend, (noise, noise_down))
    s, s_down = (packing.side_by_side(flat, own, backend) for own in (shrunk[:-1], shrunk[-1:]))
    kept = [keep for keep in keeps if keep is not None]
    return y.view(*x.shape[:-1], y.shape[1]), [] if recompute else outs, s, s_down, kept


def _mlp_backward(
    dy: Tensor, x: Tensor | None, outs: Sequence[Tensor], tensors: Sequence[Tensor], places: Sequence[int],
    alphas: Sequence[float], activation: str, backend: str, dtype: torch.dtype, need_x: bool, needs: Sequence[bool],
    tables: Sequence[Tensor] | None = None, forms: Sequence[str] | None = None,
) -> list[Tensor]:  # fmt: skip
    """Compute dx `[*, in]` if needed, then the needed gradients of each layer.

    Args:
        dy: `[*, out]`.
        x: `[*, in]`, if `passes.mlp.to_save` keeps x.
        outs: The outputs of gate and up, if `to_save` keeps them; empty to compute them again.
        tensors: W, A, B, s, mask and bias of each layer that `to_save` keeps.
        places: Place of each tensor in the full list, see `packing`.
        alphas: scaling · keep_scale of each layer.
        activation: Name of the activation.
        backend: "triton" or "torch".
        dtype: The dtype of each dA and dB; other gradients have dy's dtype.
        need_x: Whether dx is needed.
        needs: For each layer, whether the gradients of W, A, B and bias are needed.
        tables: As in `_mlp_forward`.
        forms: As in `_mlp_forward`.
    """
    groups = packing.unpack_layers(tensors, places, len(alphas), tables, forms, SAVED_WITH_BIAS)
    layers = []
    for alpha, group, own in zip(alphas, groups, by_layer(needs), strict=True):
        dtypes = (dtype, dtype) if any(t is not None for t in group[1:4]) else None
        layers.append(SavedLayer(*group, None, None, alpha, dtypes, tuple(own)))  # type: ignore[call-arg]
    flat = None if x is None else rows(x)
    dx, grads = mlp_pass.differentiate(rows(dy), flat, layers, outs, need_x, activation, backend)
    # `_fake_backward` promises contiguous results.
    results = [g.contiguous() for g in grads if g is not None]
    return results if dx is None else [dx.contiguous().view(*dy.shape[:-1], dx.shape[1]), *results]


def _with_weight_shapes(shapes: Sequence[Sequence[Any]], forms: Sequence[str]) -> list[Sequence[Any]]:
    """Return the shapes of the layers' tensors with that of W in the place of the packed tensor's."""
    pairs = zip(shapes, forms or [""] * len(shapes), strict=True)
    return [[own[0] and shape_of(own[0], form), *own[1:]] for own, form in pairs]


def _sizes(dy, x, outs, groups) -> list[tuple[int, int, int]]:
    """Return in, out and rank of each layer from shapes; 0 if no saved tensor has the size."""
    *before, (down, *_) = groups
    inner = next((t[-1] for t in (x, *(weight for weight, *_ in before)) if t), 0)
    inward = [weight[0] for weight, *_ in before if weight]
    hidden = next((n for n in (*(t[-1] for t in (down, *outs) if t), *inward)), 0)
    ends = [(inner, hidden)] * len(before) + [(hidden, dy[-1])]
    low = [lora_A[0] if lora_A else (lora_B or s or (0, 0))[1] for _, lora_A, lora_B, s, *_ in groups]
    return [(*pair, rank) for pair, rank in zip(ends, low, strict=True)]


def _fake_forward(
    x, tensors, places, noise, noise_down, scalings, dropout_ps, activation, recompute, backend, tables=None, forms=None
):  # fmt: skip
    *before, down = packing.entries(tensors, places, scalings, dropout_ps, tables, forms)
    rows, hidden = math.prod(x.shape[:-1]), down.weight.shape[1]
    flat, h = x.new_empty(rows, x.shape[-1]), x.new_empty(rows, hidden)
    s, s_down = (
        x.new_empty(rows, sum(packing.pitches(packing.ranks(own), x.dtype, backend))) for own in (before, [down])
    )
    dropped = [(flat if q is not down else h, q) for q in (*before, down) if q.lora_A is not None and q.dropout_p > 0]
    keeps = [plan.contractions(backend).outputs(wide, 0, q.dropout_p)[1] for wide, q in dropped]
    outs = [] if recompute else [x.new_empty(rows, hidden) for _ in before]
    return x.new_empty(*x.shape[:-1], down.weight.shape[0]), outs, s, s_down, keeps


def _fake_backward(
    dy, x, outs, tensors, places, alphas, activation, backend, dtype, need_x, needs, tables=None, forms=None
):  # fmt: skip
    shapes = packing.unpack([t.shape for t in tensors], places, len(alphas), SAVED_WITH_BIAS)
    shapes = _with_weight_shapes(shapes, forms)
    sizes = _sizes(dy.shape, None if x is None else x.shape, [t.shape for t in outs], shapes)
    results = [dy.new_empty(*dy.shape[:-1], sizes[0][0])] if need_x else []
    for (inner, cols, rank), own in zip(sizes, by_layer(needs), strict=True):
        each = ((cols, inner), dy.dtype), ((rank, inner), dtype), ((cols, rank), dtype), ((cols,), dy.dtype)
        results += [dy.new_empty(shape, dtype=kind) for (shape, kind), need in zip(each, own, strict=True) if need]
    return results


def _save(ctx: Context, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, tensors, places, _, _, scalings, dropout_ps, activation, recompute, backend, tables, forms = inputs
    _, outs, s, s_down, masks = output
    layers, drawn = packing.entries(tensors, places, scalings, dropout_ps, tables, forms), iter(masks)
    # During forward, `needs_input_grad` has a flat entry for each tensor of a list.
    need_x, *flags = ctx.needs_input_grad[: 1 + len(tensors)]
    needs, of = packing.needs_by_layer(flags, places, len(layers)), packing.ranks(layers)
    shrunk = [*packing.columns(s, of[:-1], backend), *packing.columns(s_down, of[-1:], backend)]
    keeps = [next(drawn) if rank and q.dropout_p > 0 else None for q, rank in zip(layers, of, strict=True)]
    save_tensors(ctx, mlp_pass.to_save(x, layers, outs, shrunk, keeps, need_x, needs, recompute))
    ctx.of_stored = no_gradients(tables, forms)
    ctx.mark_non_differentiable(*outs, s, s_down)
    ctx.set_materialize_grads(False)
    ctx.alphas = [scaling * keep_scale(p) for scaling, p in zip(scalings, dropout_ps, strict=True)]
    ctx.activation, ctx.backend, ctx.places = activation, backend, places
    ctx.dtypes, ctx.widest = [t.dtype for t in tensors], packing.widest(x, layers)


def _differentiate(ctx: Context, dy: Tensor | None, *_: Any) -> tuple[Any, ...]:
    dx = None
    grads: list[Tensor | None] = [None] * len(ctx.dtypes)
    if dy is not None:
        with autocast_off(dy):
            dx, grads = _gradients(ctx, dy)
    return dx, grads, *(None,) * 8, *ctx.of_stored


def _gradients(ctx: Context, dy: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
    """Compute dx, and a gradient or None for each of the packed tensors."""
    need_x, flags = ctx.needs_input_grad[:2]
    needs = [need for own in packing.needs_by_layer(flags, ctx.places, len(ctx.alphas)) for need in own]
    x, *saved = saved_tensors(ctx)
    end = SAVED_WITH_BIAS * len(ctx.alphas)
    tensors, places, tables, forms = packing.pack_layers(by_layer(saved[:end], SAVED_WITH_BIAS))
    how = ctx.alphas, ctx.activation, ctx.backend, ctx.widest, need_x, needs, *given(tables, forms)
    results = iter(mlp_backward(dy, x, saved[end:], tensors, places, *how))
    dx = next(results) if need_x else None
    grads = [next(results) if need else None for need in needs]
    return dx, packing.gradients_of(grads, ctx.places, ctx.dtypes)


mlp, mlp_forward, mlp_backward = register(
    _library, "mlp", composed=_mlp, forward=_mlp_forward, backward=_mlp_backward,
    fake_forward=_fake_forward, fake_backward=_fake_backward, save=_save, differentiate=_differentiate,
)  # fmt: skip


def _forward_flops(
    x, tensors, places, noise, noise_down, scalings, dropout_ps, activation, recompute, backend, tables=None,
    forms=None, **_: Any,
) -> int:  # fmt: skip
    """Count 2 M (K N + r K + r N) FLOPs for each layer; the arguments are shapes."""
    return packing.forward_flops(x, tensors, places, len(scalings), forms)


def _backward_flops(
    dy, x, outs, tensors, places, alphas, activation, backend, dtype, need_x: bool, needs: list[bool], tables=None,
    forms=None, **_: Any,
) -> int:  # fmt: skip
    """Count 2 M K N FLOPs per dW, input gradient and recomputed output, 2 M r (K or N) per thin product; of shapes."""
    groups = _with_weight_shapes(packing.unpack(tensors, places, len(alphas), SAVED_WITH_BIAS), forms)
    wanted = by_layer(needs)
    sizes, total = _sizes(dy, x, outs, groups), 0
    again, need_dh = not outs and mlp_pass.reads_outs(need_x, wanted), need_x or any(map(any, wanted[:-1]))
    for i, ((inner, cols, rank), (need_weight, need_A, need_B, _)) in enumerate(zip(sizes, wanted, strict=True)):
        is_down = i == len(sizes) - 1
        total += backward_products(inner, cols, rank, need_dh if is_down else need_x, need_A, need_B)
        total += inner * cols * need_weight + (inner + rank) * cols * (again and not is_down)
    return 2 * math.prod(dy[:-1]) * total
