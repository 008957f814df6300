r"""Several projections of one x, such as Q, K and V: the products of `autograd`, a row for each a launch.

    forward    sᵢ  = scalingᵢ · Dᵢ(x) Aᵢᵀ                shrink           one read of x, a mask and a product for each
               yᵢ  = x Wᵢᵀ + sᵢ Bᵢᵀ + biasᵢ              matmul_expand    one launch for all outputs
    backward   dsᵢ = scalingᵢ · keep_scaleᵢ · dyᵢ Bᵢ     shrink   \ shrink_wgrad: both from one read of dyᵢ, a launch
               dBᵢ = dyᵢᵀ sᵢ                             wgrad    / for each
               dx  = Σᵢ dyᵢ Wᵢ + keepᵢ · (dsᵢ Aᵢ)        matmul_expand    one accumulator, one store
               dAᵢ = dsᵢᵀ (keepᵢ · x)                    wgrad            one read of x

Two launches forward and n + 2 backward, at ranks up to 32. A projection without an adapter has no row in the thin
products. Weights stay where they are: nothing is laid side by side but the sᵢ, and for large M, where there is no
dropout, the dsᵢ and, in a launch more, a copy of the Aᵢ: that is one product in place of several, mostly padding.
Saved for backward: x, the parameters, the sᵢ (M·Σrᵢ elements) and the masks, and of these only what the gradients that
were asked for need. An output that nothing was computed from costs backward nothing.

Source: Hu et al. 2021, arXiv:2106.09685; one LoRA product of x for Q, K and V: Unsloth's `LoRA_QKV` (idea). No code
was taken.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from lora_kernels import plan
from lora_kernels.autograd import autocast_off, gradient, readable, rows
from lora_kernels.dropout import keep_scale

__all__ = ["LoRAProjectionsFunction", "Part", "Projection", "backward", "expand", "forward", "gradients", "shrink"]


class Projection(NamedTuple):
    """One projection: what `lora_linear` takes but x.

    Attributes:
        weight: W, `[out, in]`.
        lora_A: A, `[r, in]`, or None for no adapter.
        lora_B: B, `[out, r]`, or None.
        bias: `[out]` or None.
        scaling: Multiplies the low-rank term.
        dropout_p: Drop probability, below 1.
    """

    weight: Tensor
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    bias: Tensor | None = None
    scaling: float = 1.0
    dropout_p: float = 0.0

    @property
    def alpha(self) -> float:
        """What the accumulators of both shrinks are multiplied by."""
        return self.scaling * keep_scale(self.dropout_p)


class Part(NamedTuple):
    """What backward needs of a projection that a gradient comes back to, as far as gradients are needed.

    Attributes:
        dy: `[M, out]`.
        weight: W, where dx is needed.
        lora_A: A, where dx is needed.
        lora_B: B, where dx or dA is needed.
        s: `[M, r]`, where dB is needed.
        keep: The backend's mask, where there is one and dx or dA is needed.
        alpha: scaling · keep_scale.
        dtypes: Those that dA and dB come in.
        need_A: Whether dA is needed.
        into: Gradients to which dA and dB are added, which then are not returned, or None.
    """

    dy: Tensor
    weight: Tensor | None
    lora_A: Tensor | None
    lora_B: Tensor | None
    s: Tensor | None
    keep: Tensor | None
    alpha: float
    dtypes: tuple[torch.dtype, torch.dtype]
    need_A: bool
    into: tuple[Tensor | None, Tensor | None] = (None, None)


def forward(
    x: Tensor, projections: Sequence[Projection], backend: str, noise: Tensor | None = None
) -> tuple[list[Tensor], list[Tensor | None], list[Tensor | None]]:
    """Compute each y `[M, outᵢ]`, and what backward needs of the way there: each s `[M, rᵢ]` and the backend's mask.

    s and mask are None for a projection without an adapter, and the mask for one without dropout. `noise` decides the
    masks; drawn here when there is none.
    """
    return plan.repeat(backend, _forward_pass, rows(x), projections, noise)


def _forward_pass(
    backend: str, x: Tensor, projections: Sequence[Projection], noise: Tensor | None
) -> tuple[list[Tensor], list[Tensor | None], list[Tensor | None]]:
    projections = [  # copies come before the launches, which overlap
        q if q.lora_B is None or q.lora_B.dtype == x.dtype else q._replace(lora_B=q.lora_B.to(x.dtype))
        for q in projections
    ]
    shrunk, keeps = shrink(x, projections, backend, noise)
    return expand(x, projections, shrunk, backend), shrunk, keeps


def expand(x: Tensor, projections: Sequence[Projection], shrunk: Sequence[Tensor | None], backend: str) -> list[Tensor]:
    """Compute each y of `forward` from x `[M, in]` and each s."""
    cols = sum(q.weight.shape[0] for q in projections)
    rank = max((s.shape[1] for s in shrunk if s is not None), default=0)
    _, expand_all = plan.expander_all(backend, x, x.shape[1], cols, rank, masked=False, backward=False)
    outputs = [
        ([(x, q.weight)] if s is None else [(x, q.weight), (s, q.lora_B.to(x.dtype))], q.bias)
        for q, s in zip(projections, shrunk, strict=True)
    ]
    return expand_all(outputs)


def shrink(
    x: Tensor, projections: Sequence[Projection], backend: str, noise: Tensor | None = None
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Compute each s and mask of `forward` from x `[M, in]`."""
    adapted = [q for q in projections if q.lora_A is not None]
    if not adapted:
        return [None] * len(projections), [None] * len(projections)
    operands = [(readable(q.lora_A, x.dtype), q.alpha, q.dropout_p) for q in adapted]
    of_adapted = zip(*plan.contractions(backend).shrink_all(x, operands, noise=noise), strict=True)
    low_rank = [(None, None) if q.lora_A is None else next(of_adapted) for q in projections]
    return [s for s, _ in low_rank], [keep for _, keep in low_rank]


def backward(
    x: Tensor | None, parts: Sequence[Part], need_x: bool, backend: str,
    made: Sequence[tuple[Tensor | None, Tensor | None]] | None = None,
) -> tuple[Tensor | None, list[list[Tensor | None]]]:  # fmt: skip
    """Compute dx `[M, in]`, and dA and dB of each part, as far as they are needed. x is `[M, in]`.

    `made` has ds and dB of each where they were made with its dy.
    """
    return plan.repeat(backend, _backward_pass, parts, x, need_x, made)


def _backward_pass(
    backend: str, parts: Sequence[Part], x: Tensor | None, need_x: bool,
    made: Sequence[tuple[Tensor | None, Tensor | None]] | None,
) -> tuple[Tensor | None, list[list[Tensor | None]]]:  # fmt: skip
    ops, dx, how, stack = plan.contractions(backend), None, None, None
    if need_x:
        how, expand_all = _expander(parts, backend)
        # what has to be copied of any A is copied before the launches that overlap
        stack = _stack(parts, backend) if how == "fused" and made is None else None
        rights = [None if stack else _right(part) for part in parts]
    if made is None:
        columns = stack.columns if stack else [None] * len(parts)
        made = [_ds_and_dB(part, backend, column) for part, column in zip(parts, columns, strict=True)]
    if need_x:
        thin, masked = [stack.source] if stack else [], []
        for (ds, _), right, part in zip(made, rights, parts, strict=True):
            if right is not None and part.keep is None:
                thin.append((ds, right))
            elif right is not None:
                masked.append((ds, right, part.keep))
        summed = [(part.dy, part.weight.t()) for part in parts]
        (dx,) = expand_all([([*summed, *thin], None)], masked, wide=len(summed))
    gradients = [[None, d_lora_B] for _, d_lora_B in made]
    for_A = [
        (own, (ds, part.dtypes[0], part.keep), part.into[0])
        for own, (ds, _), part in zip(gradients, made, parts, strict=True)
        if part.need_A
    ]
    if for_A:
        owners, operands, into = zip(*for_A, strict=True)
        for own, d_lora_A in zip(owners, ops.wgrad_all(operands, x, ready=how == "fused", into=into), strict=True):
            own[0] = d_lora_A
    return dx, gradients


def _expander(parts: Sequence[Part], backend: str) -> tuple[str, Callable]:
    """The form of dx, and what computes it."""
    adapted = [part for part in parts if part.lora_A is not None]
    rank = max((part.lora_A.shape[0] for part in adapted), default=0)
    inner, cols = sum(part.dy.shape[1] for part in parts), parts[0].weight.shape[1]
    masked = any(part.keep is not None for part in adapted)
    return plan.expander_all(backend, parts[0].dy, inner, cols, rank, masked, backward=True, sources=len(parts))


def _right(part: Part) -> Tensor | None:
    """The right side of a part's thin product in dx, if it has one."""
    if part.lora_A is None:
        return None
    dtype = part.dy.dtype
    return (part.lora_A.to(dtype) if part.keep is None else readable(part.lora_A, dtype)).t()


class _Stack(NamedTuple):
    """Thin products of dx as one: its source, and where in it the ds of each part goes."""

    source: tuple[Tensor, Tensor]
    columns: list[Tensor | None]


def _stack(parts: Sequence[Part], backend: str) -> _Stack | None:
    """Lay the thin products of dx side by side, where that pays: together they take fewer K steps than each alone."""
    adapted = [part for part in parts if part.lora_A is not None]
    adapters = [part.lora_A for part in adapted]
    if any(part.keep is not None or part.s is None for part in adapted):
        return None
    if not plan.stacks(backend, parts[0].dy, adapters):
        return None
    ds, columns, lora_A = plan.contractions(backend).stack(parts[0].dy, adapters)
    free = iter(columns)
    return _Stack((ds, lora_A.t()), [None if part.lora_A is None else next(free) for part in parts])


def _ds_and_dB(part: Part, backend: str, ds: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
    """Compute ds, to where `ds` is if that is said, and dB of a part, as far as they are needed."""
    dy, _, _, lora_B, s, _, alpha, dtypes, _, (_, into) = part
    ops = plan.contractions(backend)
    if lora_B is None:
        return None, None if s is None else ops.wgrad(dy, s, dtypes[1], into=into)
    lora_B = readable(lora_B, dy.dtype)
    if s is None:
        return ops.shrink(dy, lora_B.t(), alpha)[0], None
    there = () if ds is None else (ds,)
    return ops.shrink_wgrad(dy, s, lora_B, alpha, dtypes[1], into, *there)


class LoRAProjectionsFunction(torch.autograd.Function):
    """`forward` with a backward. Differentiable once; a second time raises."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, backend: str, numbers: Sequence[tuple[float, float, bool]],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Compute each y `[M, outᵢ]` and save for backward what the gradients that are needed need.

        Args:
            ctx: The context.
            x: `[*, in]`.
            backend: "triton" or "torch".
            numbers: scaling and dropout_p of each projection, and whether its backward may add to gradients itself.
            tensors: weight, lora_A, lora_B and bias of the first projection, of the second, and so on.
        """
        projections = [Projection(*tensors[4 * i : 4 * i + 4], *pair) for i, (*pair, _) in enumerate(numbers)]
        ys, shrunk, keeps = forward(x, projections, backend)
        need_x, needs = ctx.needs_input_grad[0], _by_projection(ctx.needs_input_grad)
        saved = [x if any(need_weight or need_A for need_weight, need_A, _, _ in needs) else None]
        for q, s, keep, (_, need_A, need_B, _) in zip(projections, shrunk, keeps, needs, strict=True):
            saved += [
                q.weight if need_x else None, q.lora_A if need_x else None, q.lora_B if need_x or need_A else None,
                s if need_B else None, keep if need_x or need_A else None,
            ]  # fmt: skip
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        ctx.alphas, ctx.backend, ctx.x_shape = [q.alpha for q in projections], backend, x.shape
        ctx.accumulate = [
            (q.lora_A, q.lora_B) if added else None for q, (_, _, added) in zip(projections, numbers, strict=True)
        ]
        ctx.adapter_dtypes = [None if q.lora_A is None else (q.lora_A.dtype, q.lora_B.dtype) for q in projections]
        return tuple(ys)

    @staticmethod
    def backward(ctx: FunctionCtx, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        """Compute the gradients that `ctx.needs_input_grad` asks for, each in its tensor's dtype."""
        into = gradients([None if dy is None else pair for dy, pair in zip(dys, ctx.accumulate, strict=True)])
        with autocast_off(next(dy for dy in dys if dy is not None)):
            return _backward(ctx, into, *dys)


def _by_projection(flat: Sequence[bool]) -> list[Sequence[bool]]:
    """What is needed of each projection's weight, lora_A, lora_B and bias."""
    return [flat[i : i + 4] for i in range(3, len(flat), 4)]


@once_differentiable
def _backward(
    ctx: FunctionCtx, into: Sequence[tuple[Tensor | None, Tensor | None]], *dys: Tensor | None
) -> tuple[Tensor | None, ...]:  # fmt: skip
    need_x, needs = ctx.needs_input_grad[0], _by_projection(ctx.needs_input_grad)
    x, *saved = ctx.saved_tensors
    x = None if x is None else rows(x)  # a copy, where one is needed, comes before the launches that overlap
    there = [i for i, dy in enumerate(dys) if dy is not None]
    parts = [
        Part(rows(dys[i]), *saved[5 * i : 5 * i + 5], ctx.alphas[i], ctx.adapter_dtypes[i], needs[i][1], into[i])
        for i in there
    ]
    dx, low_rank = backward(x, parts, need_x, ctx.backend)
    grads: list[Tensor | None] = [None] * 4 * len(dys)
    for i, part, own in zip(there, parts, low_rank, strict=True):
        need_weight, _, _, need_bias = needs[i]
        dweight = torch.mm(part.dy.t(), x) if need_weight else None
        grads[4 * i : 4 * i + 4] = dweight, *own, part.dy.sum(0) if need_bias else None
    return dx.view(ctx.x_shape) if need_x else None, None, None, *grads


def gradients(adapters: Sequence[tuple[Tensor, Tensor] | None]) -> list[tuple[Tensor | None, Tensor | None]]:
    """Gradients of these adapters to add to in place; of two that are the same none, since a launch adds to all."""
    found = [(None, None) if pair is None else tuple(map(gradient, pair)) for pair in adapters]
    places = [g.data_ptr() for pair in found for g in pair if g is not None]
    return found if len(set(places)) == len(places) else [(None, None)] * len(found)
