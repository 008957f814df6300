"""A Function for eager calls of the LoRA linear layer, and registered operators.

    lora_kernels::linear            y; chooses a backend, draws the noise of dropout, calls linear_forward
    lora_kernels::linear_forward    y, s, keep: a pure function of its arguments, differentiable once
    lora_kernels::linear_backward   dx, dA, dB: the derivative of linear_forward

The Function and the operators run the same passes, `passes.linear.forward` and `backward` over a backend's
contractions, so the numbers are the same. An operator also has a name, shapes without values (fake), a FLOP formula and
an autograd formula. An operator costs some tens of microseconds per call, so plain eager calls use the Function.

`linear` is composite: a compiler traces through it, with its own symbols for sizes and numbers, and keeps the other two
operators in the graph. Two tasks stay outside of `linear_forward` and `linear_backward`:

    randomness   PyTorch's own operators draw the noise, because compilers and checkpointing preserve their order and
                 state. `linear_forward` gives the same result for the same noise.
    scaling      A scaling that a compiler has made symbolic is multiplied into A by a tensor operation, so that no
                 value of the scaling is compiled in. A plain number stays a number and costs nothing.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels import plan
from lora_kernels.autograd.common import (
    Context,
    autocast_off,
    backward_products,
    by_reference,
    contiguous,
    fake_gradients,
    gradient,
    guard_backward,
    is_exporting_to_onnx,
    plain_scaling,
    register,
    register_flops,
    save,
)
from lora_kernels.autograd.noise import draw_noise
from lora_kernels.autograd.stored import given, join, no_gradients, saved_tensors, shape_of, split
from lora_kernels.dropout import keep_scale
from lora_kernels.passes import linear as linear_pass
from lora_kernels.passes.layer import Weight, rows

__all__ = ["LoRALinearFunction", "linear", "linear_backward", "linear_forward"]

_library = torch.library.Library("lora_kernels", "FRAGMENT")
_library.define(
    "linear(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, "
    "Scalar scaling, float dropout_p, str backend, int[2] dropout_shard=[0, 1], Tensor[]? tables=None, str form='') "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "linear_forward(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, Tensor? noise, "
    "float scaling, float dropout_p, str backend, Tensor[]? tables=None, str form='') "
    "-> (Tensor y, Tensor s, Tensor keep)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "linear_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor? lora_A, Tensor? lora_B, Tensor? s, Tensor? keep, "
    "float alpha, str backend, ScalarType dtype_A, ScalarType dtype_B, bool[3] needed, "
    "Tensor[]? tables=None, str form='') -> (Tensor dx, Tensor d_lora_A, Tensor d_lora_B)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


class LoRALinearFunction(torch.autograd.Function):
    """Run the forward and backward passes. Differentiable once; a second differentiation raises."""

    @staticmethod
    def forward(
        ctx: Context, x: Tensor, weight: Weight, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None,
        settings: tuple[float, float, str, bool, Tensor | None],
    ) -> Tensor:  # fmt: skip
        """Compute y `[M, out]` and save the tensors that the needed gradients take.

        `settings` are scaling, dropout_p, backend, accumulate_grad and the noise of the mask, None to draw it; they are
        one argument, because PyTorch looks at each.
        """
        scaling, dropout_p, backend, accumulate_grad, noise = settings
        ctx.accumulate = (lora_A, lora_B) if accumulate_grad else (None, None)
        y, s, keep = linear_pass.forward(x, weight, lora_A, lora_B, bias, scaling, dropout_p, backend, noise)
        alpha = scaling * keep_scale(dropout_p)
        save(ctx, x, weight, lora_A, lora_B, s, keep, alpha, backend, ctx.needs_input_grad[:4])
        ctx.x_shape = x.shape
        return y

    @staticmethod
    def backward(ctx: Context, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients that `ctx.needs_input_grad` asks for, each in the dtype of its parameter."""
        lora_A, lora_B = ctx.accumulate
        into = gradient(ctx, lora_A), gradient(ctx, lora_B)
        with autocast_off(dy):
            return _backward(ctx, into, dy)


@guard_backward("lora_linear")
def _backward(
    ctx: Context, into: tuple[Tensor | None, Tensor | None], dy: Tensor
) -> tuple[Tensor | None, ...]:  # fmt: skip
    x: Any
    x, weight, lora_A, lora_B, s, keep = saved_tensors(ctx)
    need_x, need_weight, need_A, need_B, need_bias = ctx.needs_input_grad[:5]
    dy, x = rows(dy), None if x is None else rows(x)
    dx, d_lora_A, d_lora_B = linear_pass.backward(
        dy, x, weight, lora_A, lora_B, s, keep, ctx.alpha, ctx.backend, ctx.adapter_dtypes,
        (need_x, need_A, need_B), into,
    )  # fmt: skip
    dweight = torch.mm(dy.t(), x) if need_weight else None
    dbias = dy.sum(0) if need_bias else None
    if dx is not None and len(ctx.x_shape) != 2:
        dx = dx.view(ctx.x_shape)
    return dx, dweight, d_lora_A, d_lora_B, dbias, None


def _linear(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None,
    scaling: float, dropout_p: float, backend: str, dropout_shard: Sequence[int] = (0, 1),
    tables: Sequence[Tensor] | None = None, form: str = "",
) -> Tensor:  # fmt: skip
    """Compute y `[*, out]` from arguments that `functional.lora_linear` has checked and cast; see `_linear_forward`."""
    if is_exporting_to_onnx():
        return by_reference(x, [join(weight, tables, form)], [lora_A], [lora_B], [bias], [scaling], [dropout_p])[0]
    register_flops({linear_forward: _forward_flops, linear_backward: _backward_flops})
    # `int` compiles the rank into a graph; all other sizes may vary.
    rank = int(lora_A.shape[0])
    empty = x.numel() == 0 or shape_of(weight.shape, form)[0] == 0
    backend = plan.choose(x.device, x.dtype, rank, empty, backend, "lora_linear")
    noise = None
    if dropout_p > 0:
        noise = draw_noise(x, torch.empty(0, device=x.device), backend, dropout_shard)
    lora_A, scaling = plain_scaling(lora_A, scaling)
    return linear_forward(x, weight, lora_A, lora_B, bias, noise, scaling, dropout_p, backend, *given(tables, form))[0]


def _linear_forward(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, noise: Tensor | None,
    scaling: float, dropout_p: float, backend: str, tables: Sequence[Tensor] | None = None, form: str = "",
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Compute y `[*, out]`, s `[M, r]` and the backend's mask, None without dropout.

    Args:
        x: `[*, in]`.
        weight: W, `[out, in]`, in x's dtype, or the packed tensor of a quantised W.
        lora_A: A, `[r, in]`, in x's dtype, or in float32 over a 16-bit x.
        lora_B: B, `[out, r]`, in a dtype as A.
        bias: `[out]`, in x's dtype, or None.
        noise: Result of the backend's `draw_noise(x)`; None without dropout.
        scaling: Multiplies the low-rank term.
        dropout_p: Probability of dropping an element.
        backend: "triton" or "torch".
        tables: The other tensors of a quantised W, see `stored`.
        form: The numbers of a quantised W.
    """
    whole = join(weight, tables, form)
    y, s, keep = linear_pass.forward(x, whole, lora_A, lora_B, bias, scaling, dropout_p, backend, noise)
    return y.view(*x.shape[:-1], whole.shape[0]), s, keep


def _linear_backward(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, lora_A: Tensor | None, lora_B: Tensor | None,
    s: Tensor | None, keep: Tensor | None, alpha: float, backend: str,
    dtype_A: torch.dtype, dtype_B: torch.dtype, needed: list[bool], tables: Sequence[Tensor] | None = None,
    form: str = "",
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Compute those of dx `[*, in]`, dA and dB that are needed, and return None for the others."""
    whole = None if weight is None else join(weight, tables, form)
    shape = (*dy.shape[:-1], -1 if whole is None else whole.shape[1])
    dy, x = rows(dy), None if x is None else rows(x)
    gradients = linear_pass.backward(dy, x, whole, lora_A, lora_B, s, keep, alpha, backend, (dtype_A, dtype_B), needed)
    return contiguous(gradients, shape)


def _fake_forward(x, weight, lora_A, lora_B, bias, noise, scaling, dropout_p, backend, tables=None, form=""):
    rows = x.new_empty(math.prod(x.shape[:-1]), x.shape[-1])
    s, keep = plan.contractions(backend).outputs(rows, lora_A.shape[0], dropout_p)
    return x.new_empty(*x.shape[:-1], shape_of(weight.shape, form)[0]), s, keep


def _fake_backward(
    dy, x, weight, lora_A, lora_B, s, keep, alpha, backend, dtype_A, dtype_B, needed, tables=None, form=""
):  # fmt: skip
    inner = None if weight is None else shape_of(weight.shape, form)[1]
    return fake_gradients(dy, x, inner, lora_B, s, dy.dtype, dtype_A, dtype_B, needed)


def _save(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor | None]) -> None:
    x, weight, lora_A, lora_B, _, _, scaling, dropout_p, backend, tables, form = inputs
    _, s, keep = output
    alpha, whole = scaling * keep_scale(dropout_p), join(weight, tables, form)
    save(ctx, x, whole, lora_A, lora_B, s, keep, alpha, backend, ctx.needs_input_grad[:4])
    ctx.of_stored = no_gradients(tables, form)
    ctx.mark_non_differentiable(s)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Context, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return *(None,) * 9, *ctx.of_stored
    with autocast_off(dy):
        return _gradients(ctx, dy)


def _gradients(ctx: Context, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, *saved = saved_tensors(ctx)
    need_x, need_weight, need_A, need_B, need_bias = ctx.needs_input_grad[:5]
    dx = d_lora_A = d_lora_B = None
    if need_x or need_A or need_B:
        weight, tables, form = split(weight)
        how = ctx.alpha, ctx.backend, *ctx.adapter_dtypes, [need_x, need_A, need_B]
        dx, d_lora_A, d_lora_B = linear_backward(dy, x if need_A else None, weight, *saved, *how, *given(tables, form))
    dweight = torch.mm(rows(dy).t(), rows(x)) if need_weight else None
    dbias = rows(dy).sum(0) if need_bias else None
    return dx, dweight, d_lora_A, d_lora_B, dbias, *(None,) * 4, *ctx.of_stored


linear, linear_forward, linear_backward = register(
    _library, "linear", composed=_linear, forward=_linear_forward, backward=_linear_backward,
    fake_forward=_fake_forward, fake_backward=_fake_backward, save=_save, differentiate=_differentiate,
)  # fmt: skip


def _forward_flops(
    x, weight, lora_A, lora_B, bias, noise, scaling, dropout_p, backend, tables=None, form="", **_: Any
) -> int:  # fmt: skip
    """Count 2 M (K N + r K + r N) FLOPs; the arguments are shapes. A quantised W counts as a plain one."""
    rows, (cols, inner), rank = math.prod(x[:-1]), shape_of(weight, form), lora_A[0]
    return 2 * rows * (inner * cols + rank * (inner + cols))


def _backward_flops(
    dy, x, weight, lora_A, lora_B, s, keep, alpha, backend, dtype_A, dtype_B, needed: list[bool], tables=None, form="",
    **_: Any,
) -> int:  # fmt: skip
    """Count 2 M K N + 2 M r K FLOPs for dx, 2 M r K for dA, 2 M r N for each of dB and ds; the arguments are shapes."""
    need_x, need_A, need_B = needed
    rows, cols = math.prod(dy[:-1]), dy[-1]
    inner = shape_of(weight, form)[1] if need_x else x[-1] if need_A else 0
    return 2 * rows * backward_products(inner, cols, (lora_B or s)[1], need_x, need_A, need_B)
