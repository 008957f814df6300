r"""Several projections of one x, such as Q, K and V: the products of `autograd`, a row for each a launch.

    forward    sᵢ  = scalingᵢ · Dᵢ(x) Aᵢᵀ                shrink           one read of x, a mask and a product for each
               yᵢ  = x Wᵢᵀ + sᵢ Bᵢᵀ + biasᵢ              matmul_expand    one launch for all outputs
    backward   dsᵢ = scalingᵢ · keep_scaleᵢ · dyᵢ Bᵢ     shrink   \ shrink_wgrad: both from one read of dyᵢ, a launch
               dBᵢ = dyᵢᵀ sᵢ                             wgrad    / for each
               dx  = Σᵢ dyᵢ Wᵢ + keepᵢ · (dsᵢ Aᵢ)        matmul_expand    one accumulator, one store
               dAᵢ = dsᵢᵀ (keepᵢ · x)                    wgrad            one read of x

Two launches forward and n + 2 backward, at ranks up to 32. A projection without an adapter has no row in the thin
products. Weights stay where they are: nothing is laid side by side but the sᵢ. Saved for backward: x, the parameters,
the sᵢ (M·Σrᵢ elements) and the masks, and of these only what the gradients that were asked for need. An output that
nothing was computed from costs backward nothing.

Source: Hu et al. 2021, arXiv:2106.09685; one LoRA product of x for Q, K and V: Unsloth's `LoRA_QKV` (idea). No code
was taken.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from lora_kernels import plan
from lora_kernels.autograd import autocast_off, rows
from lora_kernels.dropout import keep_scale

__all__ = ["LoRAProjectionsFunction", "Projection", "forward"]


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


def forward(
    x: Tensor, projections: Sequence[Projection], backend: str
) -> tuple[list[Tensor], list[Tensor | None], list[Tensor | None]]:
    """Compute each y `[M, outᵢ]`, and what backward needs of the way there: each s `[M, rᵢ]` and the backend's mask.

    s and mask are None for a projection without an adapter, and the mask for one without dropout.
    """
    ops, flat = plan.contractions(backend), rows(x)
    adapted = [q for q in projections if q.lora_A is not None]
    shrunk = ops.shrink_all(flat, [(q.lora_A.to(x.dtype), q.alpha, q.dropout_p) for q in adapted]) if adapted else ()
    of_adapted = zip(*shrunk, strict=True) if adapted else iter(())
    low_rank = [(None, None) if q.lora_A is None else next(of_adapted) for q in projections]
    outputs = [
        ([(flat, q.weight)] if s is None else [(flat, q.weight), (s, q.lora_B.to(x.dtype))], q.bias)
        for q, (s, _) in zip(projections, low_rank, strict=True)
    ]
    ys = ops.matmul_expand_all(outputs)
    return ys, [s for s, _ in low_rank], [keep for _, keep in low_rank]


class LoRAProjectionsFunction(torch.autograd.Function):
    """`forward` with a backward. Differentiable once; a second time raises."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, backend: str, numbers: Sequence[tuple[float, float]], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Compute each y `[M, outᵢ]` and save for backward what the gradients that are needed need.

        Args:
            ctx: The context.
            x: `[*, in]`.
            backend: "triton" or "torch".
            numbers: scaling and dropout_p of each projection.
            tensors: weight, lora_A, lora_B and bias of the first projection, of the second, and so on.
        """
        projections = [Projection(*tensors[4 * i : 4 * i + 4], *pair) for i, pair in enumerate(numbers)]
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
        ctx.adapter_dtypes = [None if q.lora_A is None else (q.lora_A.dtype, q.lora_B.dtype) for q in projections]
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        """Compute the gradients that `ctx.needs_input_grad` asks for, each in its tensor's dtype."""
        with autocast_off(next(dy for dy in dys if dy is not None)):
            return _backward(ctx, dys)


def _by_projection(flat: Sequence[bool]) -> list[Sequence[bool]]:
    """What is needed of each projection's weight, lora_A, lora_B and bias."""
    return [flat[i : i + 4] for i in range(3, len(flat), 4)]


def _backward(ctx: FunctionCtx, dys: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    ops, need_x, needs = plan.contractions(ctx.backend), ctx.needs_input_grad[0], _by_projection(ctx.needs_input_grad)
    x, *saved = ctx.saved_tensors
    x = None if x is None else rows(x)  # a copy, where one is needed, comes before the launches that overlap
    grads: list[list[Tensor | None]] = [[None] * 4 for _ in dys]
    summed, thin, masked, for_A = [], [], [], []
    for i, dy in enumerate(dys):
        if dy is None:
            continue
        dy, (weight, lora_A, lora_B, s, keep) = rows(dy), saved[5 * i : 5 * i + 5]
        (need_weight, need_A, need_B, need_bias), dtypes = needs[i], ctx.adapter_dtypes[i]
        if dtypes is not None and (need_x or need_A):
            lora_B = lora_B.to(dy.dtype)
            if need_B:
                ds, grads[i][2] = ops.shrink_wgrad(dy, s, lora_B, ctx.alphas[i], dtypes[1])
            else:
                ds, _ = ops.shrink(dy, lora_B.t(), ctx.alphas[i])
            if need_A:
                for_A.append((i, (ds, dtypes[0], keep)))
            if need_x:
                product = (ds, lora_A.to(dy.dtype).t())
                if keep is None:
                    thin.append(product)
                else:
                    masked.append((*product, keep))
        elif need_B:
            grads[i][2] = ops.wgrad(dy, s, dtypes[1])
        if need_x:
            summed.append((dy, weight.t()))
        if need_weight:
            grads[i][0] = torch.mm(dy.t(), x)
        if need_bias:
            grads[i][3] = dy.sum(0)
    dx = None
    if need_x:
        dx = ops.matmul_expand_all([([*summed, *thin], None)], masked, wide=len(summed))[0].view(ctx.x_shape)
    if for_A:
        places, operands = zip(*for_A, strict=True)
        for i, d_lora_A in zip(places, ops.wgrad_all(operands, x, ready=need_x), strict=True):
            grads[i][1] = d_lora_A
    return dx, None, None, *(grad for four in grads for grad in four)
