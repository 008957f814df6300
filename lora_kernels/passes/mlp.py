r"""A gated MLP: the products of `linear` and `projections`, with the activation computed inside neighbouring passes.

    forward    g, u  = gate(x), up(x)                      as `projections` computes them: 2 launches
               h     = a(g) · u,  s = α D(h) A_dᵀ          shrink: one pass of g and u, which writes h
               y     = h W_dᵀ + s B_dᵀ + bias              matmul_expand
    backward   ds    = α dy B_d,  dB_d = dyᵀ s             shrink_wgrad: one read of dy
               dh    = dy W_d + keep · (ds A_d)            matmul_expand
               du    = dh · a(g),  dg = dh · u · a'(g)     \
               dA_d  = dsᵀ (keep · h)                       | wgrad: one pass of g, u and dh that computes h again;
               ds_g  = α dg B_g,  dB_g = dgᵀ s_g            | a shrink each for ds_g and ds_u at ranks above 16
               ds_u  = α du B_u,  dB_u = duᵀ s_u           /
               dx, dA_g, dA_u                              as `projections` computes them: 2 launches

Nine launches. Saved for backward: x, g, u, the s and the masks. With `recompute` g and u are not saved, and backward
computes them again from x and the s. In addition backward holds dh, dg and du, two of the three at a time, and up to
rank 32 the fp32 parts of ds_g and ds_u, one for every 128 columns: at rank 16 in bf16 together half as large as dh. No
input except `into` is written.

Source: Shazeer 2020, arXiv:2002.05202; Hu et al. 2021, arXiv:2106.09685. Recomputing h in backward: Liger's SwiGLU
(idea; there g and u are overwritten). No code was taken.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels import plan
from lora_kernels.activations import After, Before
from lora_kernels.passes import linear, projections
from lora_kernels.passes.layer import (
    GIVEN,
    Kept,
    Part,
    Projection,
    SavedLayer,
    dense,
    readable,
    rows,
    tensors_to_save,
)

__all__ = ["differentiate", "forward", "reads_outs", "to_save"]


def forward(
    x: Tensor, before: Sequence[Projection], down: Projection, activation: str, backend: str,
    noise: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, list[Tensor], list[Tensor | None], list[Tensor | None]]:  # fmt: skip
    """Compute y `[M, out]`, and the tensors for backward.

    Args:
        x: `[*, in]`.
        before: Gate and up, or up alone.
        down: The layer after the activation.
        activation: Name of the activation.
        backend: "triton" or "torch".
        noise: Result of `draw_noise(x, count)` for the masks of `before`, and of `draw_noise(h)` for the mask of
            `down`; in place of a None, this function draws the noise.

    Returns:
        y; the outputs of `before`, `[M, hidden]`; s and the mask of each layer, or None.
    """
    return plan.run(backend, _forward_pass, (activation,), rows(x), before, down, noise)


def _forward_pass(
    steps: plan.Steps, activation: str, x: Tensor, before: Sequence[Projection], down: Projection,
    noise: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor, list[Tensor], list[Tensor | None], list[Tensor | None]]:  # fmt: skip
    # `before` has at least one layer, so that `gate` is never None.
    gate: Any
    # Copies come before the launches, because the launches overlap.
    lora_B: Any = None if down.lora_B is None else down.lora_B.to(x.dtype)
    outs, shrunk, keeps = projections.forward_pass(steps.part("before"), x, before, noise[0])
    rows_of_down = [] if down.lora_A is None else [(readable(down.lora_A, x.dtype), down.alpha, down.dropout_p)]
    gate, up = (*outs, None)[:2]
    weight = dense(steps, down.weight, x.dtype)
    h, s, keep = steps.ops.activate_shrink(gate, up, activation, rows_of_down, noise=noise[1], slot=steps["h"])
    sources = [(h, weight), *((one, lora_B) for one in s)]
    rank = s[0].shape[1] if s else 0
    (y,) = steps.expander("y", h, *weight.shape[::-1], rank).compute([(sources, down.bias)])
    return y, outs, [*shrunk, *(s or (None,))], [*keeps, *(keep or (None,))]


def _backward(
    steps: plan.Steps, dy: Tensor, x: Kept, outs: Sequence[Tensor], layers: Sequence[SavedLayer], need_x: bool,
    activation: str,
) -> tuple[Tensor | None, list[Tensor | None]]:  # fmt: skip
    """Compute dx `[M, in]` if needed, and the needed gradients of weight, lora_A, lora_B and bias of each layer.

    Args:
        steps: The steps of a plan.
        dy: `[M, out]`.
        x: `[M, in]`, if a gradient of a weight or of an A before the activation is needed.
        outs: The outputs of gate and up, or of up alone, if they are needed.
        layers: Gate and up, or up alone; and down.
        need_x: Whether dx is needed.
        activation: Name of the activation.
    """
    ops, (*before, down) = steps.ops, layers
    need_weight, need_A, _, need_bias = down.needs
    need_dh = need_x or any(any(q.needs) for q in before)
    dh, ds, d_lora_B = _through_down(steps.part("down"), dy, down, need_dh)
    dweight = d_lora_A = None
    gate: Any
    gate, up = (*outs, None)[:2] if outs else (None, None)
    if need_weight or (need_A and not need_dh):
        h, _, _ = ops.activate_shrink(gate, up, activation, [], slot=steps["h"])
        dweight = torch.mm(dy.t(), h) if need_weight else None
        if not need_dh:
            how = {"into": down.into_A, "slot": steps["dA"]}
            d_lora_A = ops.wgrad(ds, h, down.dtypes[0], down.keep, **how) if need_A else None
    grads: list[Tensor | None] = []
    dx = None
    if need_dh:
        after = After(ds, down.dtypes[0], down.keep, down.into_A) if need_A else None
        asked = [_request(q, need_x, dy.dtype) for q in before]
        wides, d_lora_A, made = ops.activation_wgrad(
            gate, up, dh, activation, after, *asked, slot=steps["dg, du"]
        )  # fmt: skip
        del dh
        parts = [
            Part(
                wide, q.weight, q.lora_A, q.lora_B, q.s, q.keep, q.into_A, q.into_B, q.alpha, q.dtypes, q.needs[1]
            )
            for wide, q in zip(wides, before, strict=True)
        ]  # fmt: skip
        dx, low_rank = projections.backward_pass(steps.part("before"), need_x, parts, x, made)
        for wide, q, own in zip(wides, before, low_rank, strict=True):
            of_weight, _, _, of_bias = q.needs
            grads += [torch.mm(wide.t(), x) if of_weight else None, *own, wide.sum(0) if of_bias else None]
    else:
        grads += [None] * GIVEN * len(before)
    return dx, [*grads, dweight, d_lora_A, d_lora_B, dy.sum(0) if need_bias else None]


def differentiate(
    dy: Tensor, x: Kept, layers: Sequence[SavedLayer], outs: Sequence[Tensor], need_x: bool, activation: str,
    backend: str,
) -> tuple[Tensor | None, list[Tensor | None]]:  # fmt: skip
    """Compute dx `[M, in]` if needed, and the needed gradients of weight, lora_A, lora_B and bias of each layer.

    The tensors come from `to_save`. The outputs of gate and up are computed again if they were not saved.

    Args:
        dy: `[M, out]`.
        x: `[M, in]`, if x was saved.
        layers: Gate and up, or up alone; and down.
        outs: The outputs of gate and up, if they were saved.
        need_x: Whether dx is needed.
        activation: Name of the activation.
        backend: "triton" or "torch".
    """
    return plan.run(backend, _differentiate_pass, (need_x, activation), dy, x, layers, outs)


def _differentiate_pass(
    steps: plan.Steps, need_x: bool, activation: str, dy: Tensor, x: Kept, layers: Sequence[SavedLayer],
    outs: Sequence[Tensor],
) -> tuple[Tensor | None, list[Tensor | None]]:  # fmt: skip
    if not outs and reads_outs(need_x, [q.needs for q in layers]):
        before = [Projection(q.weight, None, q.lora_B, q.bias) for q in layers[:-1]]
        again = steps.part("again")
        outs = projections.expand(again, x, projections.with_dense(again, before, x), [q.s for q in layers[:-1]])
    return _backward(steps, dy, x, outs, layers, need_x, activation)


def to_save(
    x: Tensor, layers: Sequence[Projection], outs: Sequence[Tensor], shrunk: Sequence[Tensor | None],
    keeps: Sequence[Tensor | None], need_x: bool, all_needs: Sequence[Sequence[bool]], recompute: bool,
) -> list[Tensor | None]:  # fmt: skip
    """List the tensors for `differentiate`: x, those of each layer, and the outputs of gate and up unless `recompute`.

    Those of a layer are weight, lora_A, lora_B, s, mask and bias, None if no gradient in `all_needs` takes the tensor.
    """
    need_outs, need_dh = reads_outs(need_x, all_needs), need_x or any(map(any, all_needs[:-1]))
    # To compute the outputs of gate and up again, backward needs their inputs.
    again = recompute and need_outs
    saved: list[Tensor | None] = []
    need_rows = again
    for i, (q, s, keep, needs) in enumerate(zip(layers, shrunk, keeps, all_needs, strict=True)):
        (need_weight, need_A, need_B, _), is_down = needs, i == len(layers) - 1
        into, made_again = need_dh if is_down else need_x, again and not is_down
        need_rows |= not is_down and (need_weight or need_A)
        saved += tensors_to_save(q.weight, q.lora_A, q.lora_B, s, keep, into, need_A, need_B, made_again)
        saved.append(q.bias if made_again else None)
    return [x if need_rows else None, *saved, *(outs if need_outs and not again else ())]


def reads_outs(need_x: bool, all_needs: Sequence[Sequence[bool]]) -> bool:
    """Return whether backward reads the outputs of gate and up: for earlier gradients, and for dW and dA of down."""
    return need_x or any(map(any, all_needs[:-1])) or any(all_needs[-1][:2])


def _through_down(steps: plan.Steps, dy: Tensor, down: SavedLayer, need_dh: bool) -> tuple[Kept, Kept, Tensor | None]:
    """Compute dh, ds and dB of down from dy."""
    _, need_A, need_B, _ = down.needs
    if down.dtypes is None:  # no adapter
        if not need_dh:
            return None, None, None
        form = steps.expander("dx", dy, *down.weight.shape, 0, False, True)
        return form.compute([([(dy, dense(steps, down.weight, dy.dtype).t())], None)])[0], None, None
    dh, ds, d_lora_B, _ = linear.from_dy(
        steps, dy, down.weight, down.lora_A, down.lora_B, down.s, down.keep, down.alpha, down.dtypes[1],
        (need_dh, need_A, need_B), down.into_B,
    )  # fmt: skip
    # Some forms leave padding between the rows of dh.
    return None if dh is None else dh.contiguous(), ds, d_lora_B


def _request(q: SavedLayer, need_x: bool, dtype: torch.dtype) -> Before | None:
    """Return the request for ds and dB of a layer before the activation, to be computed with its dy."""
    _, need_A, need_B, _ = q.needs
    if q.dtypes is None or not (need_x or need_A or need_B):
        return None
    lora_B = readable(q.lora_B, dtype) if need_x or need_A else None
    return Before(q.s if need_B else None, lora_B, q.alpha, q.dtypes[1], q.into_B)
