"""Several projections of one x as registered operators, as `ops` has the one layer, and for its reasons.

    lora_kernels::projections            each y; chooses a backend, draws the noise of all masks, calls the next
    lora_kernels::projections_forward    each y, the s, the masks: a pure function of its arguments, differentiable once
    lora_kernels::projections_backward   dx, each dA and dB: its derivative

They run `projections.forward` and `projections.backward`. The form of the large products depends on how many rows there
are, so it is chosen when they run: a graph holds for every batch. Small calls on a CPU are not composed here, as in
`ops`.

PyTorch's autograd for operators sees the tensors of a list, but none of a list that holds a None. So the two take those
that are there in one list, and their places among all: projection i has four, or in backward six, from 4i or 6i on.
"""

import functools
import itertools
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from lora_kernels import autograd, ops, plan
from lora_kernels import projections as products
from lora_kernels.dropout import keep_scale
from lora_kernels.projections import Part, Projection

__all__ = ["projections", "projections_backward", "projections_forward"]

_GIVEN, _SAVED = 4, 6  # weight, lora_A, lora_B, bias; dy, weight, lora_A, lora_B, s, keep

_library = torch.library.Library("lora_kernels", "FRAGMENT")
for _schema in (
    "projections(Tensor x, Tensor[] weights, Tensor?[] lora_As, Tensor?[] lora_Bs, Tensor?[] biases, "
    "Scalar[] scalings, float[] dropout_ps, str backend) -> Tensor[]",
    "projections_forward(Tensor x, Tensor[] tensors, int[] places, Tensor? noise, float[] scalings, "
    "float[] dropout_ps, str backend) -> (Tensor[] ys, Tensor s, Tensor[] keeps)",
    "projections_backward(Tensor? x, Tensor[] tensors, int[] places, float[] alphas, str backend, ScalarType dtype, "
    "bool need_x, bool[] need_As) -> Tensor[]",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def _projections(
    x: Tensor, weights: Sequence[Tensor], lora_As: Sequence[Tensor | None], lora_Bs: Sequence[Tensor | None],
    biases: Sequence[Tensor | None], scalings: Sequence[float], dropout_ps: Sequence[float], backend: str,
) -> list[Tensor]:  # fmt: skip
    """Compute each y `[*, outᵢ]` of arguments that `blocks` has checked and cast; `dropout_ps` are below 1."""
    if "torch.utils.flop_counter" in sys.modules:
        ops.register_flops({projections_forward: _forward_flops, projections_backward: _backward_flops})
    adapted = [i for i, lora_A in enumerate(lora_As) if lora_A is not None]
    rank = max((int(lora_As[i].shape[0]) for i in adapted), default=1)  # compiled in, where all else may vary
    empty = x.numel() == 0 or any(weight.shape[0] == 0 for weight in weights)
    backend = plan.choose(x.device, x.dtype, rank, empty, backend)
    masks, noise = sum(dropout_ps[i] > 0 for i in adapted), None
    if masks:
        noise = ops.draw_noise(x, torch.empty(0, device=x.device), backend, count=masks)
    lora_As, numbers = list(lora_As), [1.0] * len(weights)
    for i in adapted:
        lora_As[i], numbers[i] = ops.plain_scaling(lora_As[i], scalings[i])
    tensors, places = _pack(zip(weights, lora_As, lora_Bs, biases, strict=True))
    return projections_forward(x, tensors, places, noise, numbers, dropout_ps, backend)[0]


def _pack(groups: Iterable[Iterable[Tensor | None]]) -> tuple[list[Tensor], list[int]]:
    """The tensors that are there, and where among all of them."""
    everything = list(itertools.chain.from_iterable(groups))
    places = [place for place, t in enumerate(everything) if t is not None]
    return [everything[place] for place in places], places


def _unpack(tensors: Sequence[Any], places: Sequence[int], count: int, each: int) -> list[list[Any]]:
    """`each` tensors, or what stands for them, of `count` projections, None where there is none."""
    everything: list[Any] = [None] * (count * each)
    for place, t in zip(places, tensors, strict=True):
        everything[place] = t
    return [everything[i * each : (i + 1) * each] for i in range(count)]


def _entries(
    tensors: Sequence[Tensor], places: Sequence[int], scalings: Sequence[float], dropout_ps: Sequence[float]
) -> list[Projection]:
    given = _unpack(tensors, places, len(scalings), _GIVEN)
    return [Projection(*four, *numbers) for four, *numbers in zip(given, scalings, dropout_ps, strict=True)]


def _pitches(entries: Iterable[Projection], dtype: torch.dtype, backend: str) -> list[int]:
    """Columns that each s takes of the one buffer that holds them."""
    pitch = plan.contractions(backend).thin_pitch
    return [pitch(q.lora_A.shape[0], dtype) for q in entries if q.lora_A is not None]


def _projections_forward(
    x: Tensor, tensors: Sequence[Tensor], places: Sequence[int], noise: Tensor | None, scalings: Sequence[float],
    dropout_ps: Sequence[float], backend: str,
) -> tuple[list[Tensor], Tensor, list[Tensor]]:  # fmt: skip
    """Compute each y `[*, outᵢ]`, the s side by side, `[M, ·]`, and the backend's mask of each that has dropout.

    Args:
        x: `[*, in]`.
        tensors: W, A, B and bias of each projection, those that are there; shapes and dtypes as in `ops`.
        places: Where each of these is, of 4 a projection.
        noise: What the backend's `draw_noise(x, count)` drew for all masks, or None.
        scalings: Multiplies the low-rank term, of each.
        dropout_ps: Probability of dropping an element, of each.
        backend: "triton" or "torch".
    """
    entries, flat = _entries(tensors, places, scalings, dropout_ps), autograd.rows(x)
    ys, shrunk, keeps = products.forward(flat, entries, backend, noise)
    s = _side_by_side(flat, [s for s in shrunk if s is not None], _pitches(entries, x.dtype, backend))
    return [y.view(*x.shape[:-1], y.shape[1]) for y in ys], s, [keep for keep in keeps if keep is not None]


def _side_by_side(x: Tensor, shrunk: list[Tensor], pitches: list[int]) -> Tensor:
    """The s as columns of one tensor: results of an operator share no memory, and kernels leave them in one buffer."""
    if not shrunk or shrunk[0].stride(0) != sum(pitches):
        return torch.cat(shrunk, 1) if shrunk else x.new_empty(x.shape[0], 0)
    whole = shrunk[0].as_strided((x.shape[0], sum(pitches)), (sum(pitches), 1))
    for s, columns in zip(shrunk, whole.split(pitches, 1), strict=True):
        if s.shape[1] < columns.shape[1]:  # padding, which nobody wrote
            columns[:, s.shape[1] :] = 0
    return whole


def _projections_backward(
    x: Tensor | None, tensors: Sequence[Tensor], places: Sequence[int], alphas: Sequence[float], backend: str,
    dtype: torch.dtype, need_x: bool, need_As: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Compute dx `[*, in]` if it is needed, and after it dA and dB of each projection as far as they are, in `dtype`.

    Args:
        x: `[*, in]`, where a dA is needed.
        tensors: dy, W, A, B, s and mask of each projection whose dy there is, as far as gradients need them.
        places: Where each of these is, of 6 a projection.
        alphas: scaling · keep_scale of each.
        backend: "triton" or "torch".
        dtype: Of dA and dB.
        need_x: Whether dx is needed.
        need_As: Whether dA of each is; dB is where there is its s.
    """
    saved = _unpack(tensors, places, len(alphas), _SAVED)
    x, shape = None if x is None else autograd.rows(x), saved[0][0].shape[:-1]
    parts = [
        Part(autograd.rows(dy), *five, alpha, (dtype, dtype), need_A)
        for (dy, *five), alpha, need_A in zip(saved, alphas, need_As, strict=True)
    ]
    dx, gradients = products.backward(x, parts, need_x, backend)
    results = [g.contiguous() for own in gradients for g in own if g is not None]  # as the shapes below say
    return results if dx is None else [dx.contiguous().view(*shape, dx.shape[1]), *results]


def _fake_forward(x, tensors, places, noise, scalings, dropout_ps, backend):
    entries, contractions = _entries(tensors, places, scalings, dropout_ps), plan.contractions(backend)
    rows = x.new_empty(math.prod(x.shape[:-1]), x.shape[-1])
    s = rows.new_empty(rows.shape[0], sum(_pitches(entries, x.dtype, backend)))
    masks = [contractions.outputs(rows, 0, q.dropout_p)[1] for q in entries if q.lora_A is not None and q.dropout_p > 0]
    return [x.new_empty(*x.shape[:-1], q.weight.shape[0]) for q in entries], s, masks


def _fake_backward(x, tensors, places, alphas, backend, dtype, need_x, need_As):
    results = []
    for i, (dy, weight, _, lora_B, s, _) in enumerate(_unpack(tensors, places, len(alphas), _SAVED)):
        if need_x and not results:
            results.append(dy.new_empty(*dy.shape[:-1], weight.shape[1]))
        if need_As[i]:
            results.append(dy.new_empty(lora_B.shape[1], x.shape[-1], dtype=dtype))
        if s is not None:
            results.append(dy.new_empty(dy.shape[-1], s.shape[1], dtype=dtype))
    return results


def _save(ctx: FunctionCtx, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, tensors, places, _, scalings, dropout_ps, backend = inputs
    _, s, keeps = output
    need_x, *flags = ctx.needs_input_grad[: 1 + len(tensors)]  # flat, here
    needs, drawn, saved = _unpack(flags, places, len(scalings), _GIVEN), iter(keeps), []
    entries = _entries(tensors, places, scalings, dropout_ps)
    for q, (_, need_A, _, _) in zip(entries, needs, strict=True):
        keep = next(drawn) if q.lora_A is not None and q.dropout_p > 0 else None
        to_ds = need_x or need_A
        saved += [
            q.weight if need_x else None, q.lora_A if need_x else None, q.lora_B if to_ds else None,
            keep if to_ds else None,
        ]  # fmt: skip
    need_rows = any(need_weight or need_A for need_weight, need_A, _, _ in needs)
    ctx.save_for_backward(x if need_rows else None, s if any(need_B for _, _, need_B, _ in needs) else None, *saved)
    ctx.mark_non_differentiable(s)
    ctx.set_materialize_grads(False)
    ctx.alphas = [scaling * keep_scale(p) for scaling, p in zip(scalings, dropout_ps, strict=True)]
    ctx.ranks = [0 if q.lora_A is None else q.lora_A.shape[0] for q in entries]
    ctx.pitches, ctx.backend, ctx.places = _pitches(entries, x.dtype, backend), backend, places
    ctx.dtypes = [t.dtype for t in tensors]
    ctx.dtype = functools.reduce(torch.promote_types, ctx.dtypes)  # the adapters', where any is wider than x


def _differentiate(ctx: FunctionCtx, dys: Sequence[Tensor | None], *_: Any) -> tuple[Any, ...]:
    there = [dy for dy in dys if dy is not None]
    if not there:
        return None, [None] * len(ctx.dtypes), None, None, None, None, None
    with autograd.autocast_off(there[0]):
        dx, grads = _gradients(ctx, dys)
    grads = [None if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)]
    return dx, grads, None, None, None, None, None


def _gradients(ctx: FunctionCtx, dys: Sequence[Tensor | None]) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx, and a gradient or None for each of the tensors."""
    x, s, *saved = ctx.saved_tensors
    need_x, flags = ctx.needs_input_grad[:2]
    needs = _unpack(flags, ctx.places, len(dys), _GIVEN)
    columns = iter(() if s is None else s.split(ctx.pitches, 1))
    groups, alphas, need_As = [], [], []
    for i, dy in enumerate(dys):
        weight, lora_A, lora_B, keep = saved[4 * i : 4 * i + 4]
        _, need_A, need_B, _ = needs[i]
        own = next(columns)[:, : ctx.ranks[i]] if ctx.ranks[i] and s is not None else None
        if dy is not None:
            groups.append((dy, weight, lora_A, lora_B, own if need_B else None, keep))
            alphas.append(ctx.alphas[i])
            need_As.append(bool(need_A))
    results = iter(())
    if need_x or any(need_A or need_B for _, need_A, need_B, _ in needs):
        tensors, places = _pack(groups)
        rows = x if any(need_As) else None
        results = iter(projections_backward(rows, tensors, places, alphas, ctx.backend, ctx.dtype, need_x, need_As))
    dx = next(results) if need_x else None
    grads = []
    for dy, (need_weight, need_A, need_B, need_bias) in zip(dys, needs, strict=True):
        if dy is None:
            grads += [None] * _GIVEN
            continue
        dweight = torch.mm(autograd.rows(dy).t(), autograd.rows(x)) if need_weight else None
        low_rank = [next(results) if need else None for need in (need_A, need_B)]
        grads += [dweight, *low_rank, autograd.rows(dy).sum(0) if need_bias else None]
    return dx, [grads[place] for place in ctx.places]


_library.impl("projections", _projections, "CompositeImplicitAutograd")
_library.impl("projections_forward", _projections_forward, "CompositeExplicitAutograd")
_library.impl("projections_backward", _projections_backward, "CompositeExplicitAutograd")
torch.library.register_fake("lora_kernels::projections_forward", _fake_forward, lib=_library)
torch.library.register_fake("lora_kernels::projections_backward", _fake_backward, lib=_library)
torch.library.register_autograd("lora_kernels::projections_forward", _differentiate, setup_context=_save, lib=_library)
torch.library.register_autograd("lora_kernels::projections_backward", ops.differentiate_again, lib=_library)

projections = torch.ops.lora_kernels.projections.default
projections_forward = torch.ops.lora_kernels.projections_forward.default
projections_backward = torch.ops.lora_kernels.projections_backward.default


def _forward_flops(x, tensors, places, noise, scalings, *_: Any, **__: Any) -> int:
    """2 M (K N + r K + r N) of each, of shapes."""
    total = 0
    for weight, lora_A, _, _ in _unpack(tensors, places, len(scalings), _GIVEN):
        (cols, inner), rank = weight, lora_A[0] if lora_A else 0
        total += inner * cols + rank * (inner + cols)
    return 2 * math.prod(x[:-1]) * total


def _backward_flops(x, tensors, places, alphas, backend, dtype, need_x: bool, need_As: list[bool], **_: Any) -> int:
    """2 M K N + 2 M r K for dx, 2 M r K for dA, 2 M r N for dB and once more for ds, of each, of shapes."""
    total = 0
    groups = _unpack(tensors, places, len(alphas), _SAVED)
    for (dy, weight, _, lora_B, s, _), need_A in zip(groups, need_As, strict=True):
        rank, inner = (lora_B or s or (0, 0))[1], weight[1] if need_x else x[-1] if need_A else 0
        need_ds = lora_B is not None
        total += inner * dy[-1] * need_x + rank * (inner * (need_x + need_A) + dy[-1] * ((s is not None) + need_ds))
    return 2 * math.prod(groups[0][0][:-1]) * total
