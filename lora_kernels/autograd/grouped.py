"""A Function and operators for a linear layer of each group of rows, as in `linear`.

    lora_kernels::grouped_linear            y; chooses a backend, calls grouped_linear_forward
    lora_kernels::grouped_linear_forward    y and the s: a pure function of its arguments, differentiable once
    lora_kernels::grouped_linear_backward   dx, dW, dbias, each dA and dB: the derivative of grouped_linear_forward

The operators run `passes.grouped.forward` and `backward`. The offsets are a tensor for all of them, so a graph that a
compiler or a CUDA graph has recorded holds for any sizes of the groups.

The adapters of a layer are one list for the operators, A and B of each. The tensors that backward takes of them have
Nones, so they are packed (see `packing`). The s are side by side in one result.
"""

import itertools
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
    guard_backward,
    is_exporting_to_onnx,
    plain_scaling,
    register,
    register_flops,
)
from lora_kernels.passes import grouped as grouped_pass
from lora_kernels.passes.grouped import Needed, SavedAdapter
from lora_kernels.passes.layer import by_layer

__all__ = [
    "LoRAGroupedLinearFunction", "by_reference", "grouped_linear", "grouped_linear_backward", "grouped_linear_forward",
]  # fmt: skip

# Tensors given for each adapter, A and B; and those saved, A, B and s.
_PAIR, _SAVED = 2, len(SavedAdapter._fields)

_library = torch.library.Library("lora_kernels", "FRAGMENT")
for _schema in (
    "grouped_linear(Tensor x, Tensor weight, Tensor[] lora_As, Tensor[] lora_Bs, Tensor offsets, Tensor? bias, "
    "Scalar[] scalings, str backend) -> Tensor",
    "grouped_linear_forward(Tensor x, Tensor weight, Tensor[] adapters, Tensor offsets, Tensor? bias, "
    "float[] scalings, str backend) -> (Tensor y, Tensor s)",
    "grouped_linear_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor[] tensors, int[] places, Tensor offsets, "
    "float[] scalings, str backend, ScalarType dtype, bool[3] needed, bool[] need_As, bool[] need_Bs) -> Tensor[]",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


class LoRAGroupedLinearFunction(torch.autograd.Function):
    """Run the forward and backward passes. Differentiable once; a second differentiation raises."""

    @staticmethod
    def forward(
        ctx: Context, x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None,
        settings: tuple[Sequence[float], str], *adapters: Tensor,
    ) -> Tensor:  # fmt: skip
        """Compute y `[S, out]` and save the tensors that the needed gradients take.

        `settings` are the scalings and the backend; `adapters` are A and B of the first, of the second, and so on.
        """
        scalings, backend = settings
        y, shrunk = grouped_pass.forward(x, weight, by_layer(adapters, _PAIR), offsets, bias, scalings, backend)
        need_x, need_weight, _, need_bias, _, *flags = ctx.needs_input_grad
        needed = _needed(need_x, need_weight, need_bias, flags)
        saved = _tensors_to_save(by_layer(adapters, _PAIR), shrunk, needed)
        _save_tensors(ctx, x, weight, saved, offsets, needed)
        ctx.scalings, ctx.backend = scalings, backend
        ctx.dtypes = [t.dtype for t in adapters]
        return y

    @staticmethod
    def backward(ctx: Context, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients that `ctx.needs_input_grad` asks for, each in the dtype of its parameter."""
        with autocast_off(dy):
            return _backward(ctx, dy)


@guard_backward("lora_grouped_linear")
def _backward(ctx: Context, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, *flat, offsets = ctx.saved_tensors
    need_x, need_weight, _, need_bias, _, *flags = ctx.needs_input_grad
    adapters = [SavedAdapter(*saved) for saved in by_layer(flat, _SAVED)]
    dtypes = [(dtype_A, dtype_B) for dtype_A, dtype_B in by_layer(ctx.dtypes, _PAIR)]
    needed = _needed(need_x, need_weight, need_bias, flags)
    dx, dweight, dbias, low_rank = grouped_pass.backward(
        dy, x, weight, adapters, offsets, ctx.scalings, ctx.backend, dtypes, needed
    )
    return dx, dweight, None, dbias, None, *itertools.chain.from_iterable(low_rank)


def _needed(need_x: bool, need_weight: bool, need_bias: bool, flags: Sequence[bool]) -> Needed:
    """Return which gradients are needed; `flags` are those of A and B of each adapter in turn."""
    return Needed(need_x, need_weight, need_bias, tuple(flags[::_PAIR]), tuple(flags[1::_PAIR]))


def _tensors_to_save(
    adapters: Sequence[Sequence[Tensor]], shrunk: Sequence[Tensor | None], needed: Needed
) -> list[Tensor | None]:
    """Select A, B and s of each adapter that the needed gradients take."""
    saved: list[Tensor | None] = []
    for i, ((lora_A, lora_B), s) in enumerate(zip(adapters, shrunk, strict=True)):
        need_ds = needed.x or needed.lora_As[i]
        saved += (lora_A if needed.x else None, lora_B if need_ds else None, s if needed.lora_Bs[i] else None)
    return saved


def _save_tensors(
    ctx: Context, x: Tensor, weight: Tensor, saved: Sequence[Tensor | None], offsets: Tensor, needed: Needed
) -> None:
    need_rows = needed.weight or any(needed.lora_As)
    ctx.save_for_backward(x if need_rows else None, weight if needed.x else None, *saved, offsets)
    # For the error of a tensor that was written in place.
    ctx.offsets_at = 2 + len(saved)


def by_reference(
    x: Tensor, weight: Tensor, lora_As: Sequence[Tensor], lora_Bs: Sequence[Tensor], offsets: Tensor,
    bias: Tensor | None, scalings: Sequence[float],
) -> Tensor:  # fmt: skip
    """Compute y by PyTorch's own operators alone, with adapters in x's dtype."""
    A, B = ([t.to(x.dtype) for t in adapters] for adapters in (lora_As, lora_Bs))
    return reference.lora_grouped_linear(x, weight, A, B, offsets, scaling=list(scalings), bias=bias)


def _grouped_linear(
    x: Tensor, weight: Tensor, lora_As: Sequence[Tensor], lora_Bs: Sequence[Tensor], offsets: Tensor,
    bias: Tensor | None, scalings: Sequence[float], backend: str,
) -> Tensor:  # fmt: skip
    """Compute y `[S, out]` from arguments that `functional` has checked and cast; see `_forward`."""
    if is_exporting_to_onnx():
        return by_reference(x, weight, lora_As, lora_Bs, offsets, bias, scalings)
    register_flops({grouped_linear_forward: _forward_flops, grouped_linear_backward: _backward_flops})
    # `int` compiles the rank into a graph; all other sizes may vary.
    rank = max((int(lora_A.shape[1]) for lora_A in lora_As), default=1)
    empty = x.numel() == 0 or weight.numel() == 0
    backend = plan.choose(x.device, x.dtype, rank, empty, backend, "lora_grouped_linear")
    numbers, adapters = [], []
    for lora_A, lora_B, scaling in zip(lora_As, lora_Bs, scalings, strict=True):
        lora_A, number = plain_scaling(lora_A, scaling)
        adapters += [lora_A, lora_B]
        numbers.append(number)
    return grouped_linear_forward(x, weight, adapters, offsets, bias, numbers, backend)[0]


def _forward(
    x: Tensor, weight: Tensor, adapters: Sequence[Tensor], offsets: Tensor, bias: Tensor | None,
    scalings: Sequence[float], backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute y `[S, out]` and the s side by side, `[S, ·]`.

    Args:
        x: `[S, in]`.
        weight: W, `[E, out, in]`, in x's dtype.
        adapters: A `[E, r, in]` and B `[E, out, r]` of each adapter in turn, in x's dtype, or in float32 over a 16-bit
            x.
        offsets: `[E + 1]`.
        bias: `[E, out]`, in x's dtype, or None.
        scalings: For each adapter, multiplies its term.
        backend: "triton" or "torch".
    """
    y, shrunk = grouped_pass.forward(x, weight, by_layer(adapters, _PAIR), offsets, bias, scalings, backend)
    return y, packing.side_by_side(x, shrunk, backend)


def _differentiated(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, tensors: Sequence[Tensor], places: Sequence[int],
    offsets: Tensor, scalings: Sequence[float], backend: str, dtype: torch.dtype, needed: Sequence[bool],
    need_As: Sequence[bool], need_Bs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Compute those of dx, dW, dbias, and dA and dB of each adapter that are needed.

    Args:
        dy: `[S, out]`.
        x: `[S, in]`, if dW or a dA is needed.
        weight: W, if dx is needed.
        tensors: A, B and s of each adapter, without those that no gradient takes.
        places: Place of each tensor in the full list, see `packing`.
        offsets: `[E + 1]`.
        scalings: For each adapter, multiplies its term.
        backend: "triton" or "torch".
        dtype: The dtype of each dA and dB.
        needed: Whether dx, dW and dbias are needed.
        need_As: For each adapter, whether dA is needed.
        need_Bs: For each adapter, whether dB is needed.
    """
    adapters = [SavedAdapter(*own) for own in packing.unpack(tensors, places, len(scalings), _SAVED)]
    dx, dweight, dbias, low_rank = grouped_pass.backward(
        dy, x, weight, adapters, offsets, scalings, backend, [(dtype, dtype)] * len(adapters),
        Needed(needed[0], needed[1], needed[2], tuple(need_As), tuple(need_Bs)),
    )  # fmt: skip
    # `_fake_backward` promises contiguous results.
    return [g.contiguous() for g in (dx, dweight, dbias, *itertools.chain(*low_rank)) if g is not None]


def _fake_forward(x, weight, adapters, offsets, bias, scalings, backend):
    ranks = [lora_A.shape[1] for lora_A in adapters[::_PAIR]]
    s = x.new_empty(x.shape[0], sum(packing.pitches(ranks, x.dtype, backend)))
    return x.new_empty(x.shape[0], weight.shape[1]), s


def _fake_backward(
    dy, x, weight, tensors, places, offsets, scalings, backend, dtype, needed, need_As, need_Bs
):  # fmt: skip
    need_x, need_weight, need_bias = needed
    groups, cols = offsets.shape[0] - 1, dy.shape[1]
    results = []
    if need_x:
        results.append(dy.new_empty(dy.shape[0], weight.shape[2]))
    if need_weight:
        results.append(dy.new_empty(groups, cols, x.shape[1]))
    if need_bias:
        results.append(dy.new_empty(groups, cols))
    for i, (_, lora_B, s) in enumerate(packing.unpack(tensors, places, len(scalings), _SAVED)):
        if need_As[i]:
            results.append(dy.new_empty(groups, lora_B.shape[2], x.shape[1], dtype=dtype))
        if need_Bs[i]:
            results.append(dy.new_empty(groups, cols, s.shape[1], dtype=dtype))
    return results


def _save(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, adapters, offsets, _, scalings, backend = inputs
    _, s = output
    # During forward, `needs_input_grad` has a flat entry for each tensor of a list.
    need_x, need_weight, *flags = ctx.needs_input_grad
    flags, need_bias = flags[: len(adapters)], flags[len(adapters) + 1]
    needed = _needed(need_x, need_weight, need_bias, flags)
    # One tensor has the s of all adapters.
    saved = _tensors_to_save(by_layer(adapters, _PAIR), [None] * len(scalings), needed)
    _save_tensors(ctx, x, weight, [*saved, s if any(needed.lora_Bs) else None], offsets, needed)
    ctx.mark_non_differentiable(s)
    ctx.set_materialize_grads(False)
    ctx.scalings, ctx.backend, ctx.needed = scalings, backend, needed
    ctx.ranks, ctx.dtypes = [lora_A.shape[1] for lora_A in adapters[::_PAIR]], [t.dtype for t in adapters]


def _differentiate(ctx: Context, dy: Tensor | None, *_: Any) -> tuple[Any, ...]:
    # PyTorch takes an empty list of numbers for one of tensors, and asks for their gradients.
    of_scalings: Any = None if ctx.scalings else []
    if dy is None:
        return None, None, [None] * len(ctx.dtypes), None, None, of_scalings, None
    with autocast_off(dy):
        dx, dweight, dbias, *low_rank = _gradients(ctx, dy)
    return dx, dweight, low_rank, None, dbias, of_scalings, None


def _gradients(ctx: Context, dy: Tensor) -> list[Tensor | None]:
    """Compute dx, dW, dbias, and dA and dB of each adapter, with None for those that are not needed."""
    x, weight, *flat, s, offsets = ctx.saved_tensors
    needed, count = ctx.needed, len(ctx.scalings)
    shrunk = [None] * count if s is None else packing.columns(s, ctx.ranks, ctx.backend)
    adapters = [
        (lora_A, lora_B, shrunk[i] if needed.lora_Bs[i] else None)
        for i, (lora_A, lora_B, _) in enumerate(by_layer(flat, _SAVED))
    ]
    dtype = dy.dtype
    for own in ctx.dtypes:
        dtype = torch.promote_types(dtype, own)
    tensors, places = packing.pack(adapters)
    results = iter(
        grouped_linear_backward(
            dy, x, weight, tensors, places, offsets, ctx.scalings, ctx.backend, dtype,
            [needed.x, needed.weight, needed.bias], list(needed.lora_As), list(needed.lora_Bs),
        )
    )  # fmt: skip
    base = [next(results) if need else None for need in needed[:3]]
    flags = itertools.chain.from_iterable(zip(needed.lora_As, needed.lora_Bs, strict=True))
    return base + [next(results).to(own) if need else None for need, own in zip(flags, ctx.dtypes, strict=True)]


grouped_linear, grouped_linear_forward, grouped_linear_backward = register(
    _library, "grouped_linear", composed=_grouped_linear, forward=_forward, backward=_differentiated,
    fake_forward=_fake_forward, fake_backward=_fake_backward, save=_save, differentiate=_differentiate,
)  # fmt: skip


def _forward_flops(x, weight, adapters, offsets, bias, scalings, backend, **_: Any) -> int:
    """Count 2 S (K N + r K + r N) FLOPs, r being the sum of the ranks; the arguments are shapes."""
    _, cols, inner = weight
    rank = sum(lora_A[1] for lora_A in adapters[::_PAIR])
    return 2 * x[0] * (inner * cols + rank * (inner + cols))


def _backward_flops(
    dy, x, weight, tensors, places, offsets, scalings, backend, dtype, needed: Sequence[bool],
    need_As: Sequence[bool], need_Bs: Sequence[bool], **_: Any,
) -> int:  # fmt: skip
    """Count 2 S K N FLOPs for each of dx and dW, 2 S N for dbias, and for each adapter those of `linear`.

    The arguments are shapes.
    """
    (rows, cols), (need_x, need_weight, need_bias) = dy, needed
    inner = weight[2] if need_x else x[1] if x else 0
    total = inner * cols * (need_x + need_weight) + cols * need_bias
    for i, (_, lora_B, s) in enumerate(packing.unpack(tensors, places, len(scalings), _SAVED)):
        rank = lora_B[2] if lora_B else s[1] if s else 0
        # The base layer's part of dx is counted above.
        total += backward_products(inner, cols, rank, need_x, need_As[i], need_Bs[i]) - inner * cols * need_x
    return 2 * rows * total
