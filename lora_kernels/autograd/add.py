"""A Function and operators for the low-rank term over a base result, as in `linear`.

    lora_kernels::add            y; chooses a backend, draws the noise of dropout, calls add_forward
    lora_kernels::add_forward    y, s, keep: a pure function of its arguments, differentiable once
    lora_kernels::add_backward   dx, dA, dB: the derivative of add_forward; base's gradient is dy

The operators run `passes.add.forward` and `backward`. Without them a compiler, or a policy of selective checkpointing,
would see other operators than a plain call runs, and those operators draw other masks from the same seed.
"""

import math
from typing import Any

import torch
from torch import Tensor

from lora_kernels import plan, reference
from lora_kernels.autograd.common import (
    Context,
    autocast_off,
    contiguous,
    fake_gradients,
    guard_backward,
    is_exporting_to_onnx,
    plain_scaling,
    register,
    register_flops,
    save,
)
from lora_kernels.autograd.noise import draw_noise
from lora_kernels.dropout import keep_scale
from lora_kernels.passes import add as add_pass
from lora_kernels.passes.layer import rows

__all__ = ["LoRAAddFunction", "add", "add_backward", "add_forward"]

_library = torch.library.Library("lora_kernels", "FRAGMENT")
for _schema in (
    "add(Tensor base, Tensor x, Tensor lora_A, Tensor lora_B, Scalar scaling, float dropout_p, str backend) -> Tensor",
    "add_forward(Tensor base, Tensor x, Tensor lora_A, Tensor lora_B, Tensor? noise, float scaling, float dropout_p, "
    "str backend) -> (Tensor y, Tensor s, Tensor keep)",
    "add_backward(Tensor dy, Tensor? x, Tensor? lora_A, Tensor? lora_B, Tensor? s, Tensor? keep, float alpha, "
    "str backend, ScalarType dtype, ScalarType dtype_A, ScalarType dtype_B, bool[3] needed) "
    "-> (Tensor dx, Tensor d_lora_A, Tensor d_lora_B)",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


class LoRAAddFunction(torch.autograd.Function):
    """Run the forward and backward passes. Differentiable once; a second differentiation raises."""

    @staticmethod
    def forward(
        ctx: Context, base: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor,
        scaling: float, dropout_p: float, backend: str,
    ) -> Tensor:  # fmt: skip
        """Compute y `[M, out]` and save the tensors that the needed gradients take."""
        y, s, keep = add_pass.forward(base, x, lora_A, lora_B, scaling, dropout_p, backend)
        _keep(ctx, x, lora_A, lora_B, s, keep, scaling * keep_scale(dropout_p), backend)
        ctx.base_shape, ctx.x_shape = base.shape, x.shape
        return y

    @staticmethod
    @guard_backward("lora_add")
    def backward(ctx: Context, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients that `ctx.needs_input_grad` asks for, each in the dtype of its tensor."""
        with autocast_off(dy):
            return _backward(ctx, dy)


def _keep(
    ctx: Context, x: Tensor, lora_A: Tensor, lora_B: Tensor, s: Tensor, keep: Tensor | None, alpha: float,
    backend: str,
) -> None:  # fmt: skip
    """Save the tensors that the needed gradients take. No gradient takes base, and the operation has no W."""
    _, need_x, need_A, need_B = ctx.needs_input_grad[:4]
    save(ctx, x, None, lora_A, lora_B, s, keep, alpha, backend, (need_x, False, need_A, need_B))
    ctx.dtype = x.dtype


def _backward(ctx: Context, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, _, lora_A, lora_B, s, keep = ctx.saved_tensors
    need_base, *needed = ctx.needs_input_grad[:4]
    # Copies, if any, come before the launches, because the launches overlap.
    flat, x = rows(dy.to(ctx.dtype)), None if x is None else rows(x)
    dx, d_lora_A, d_lora_B = add_pass.backward(
        flat, x, lora_A, lora_B, s, keep, ctx.alpha, ctx.backend, ctx.adapter_dtypes, needed
    )
    dbase = dy.view(ctx.base_shape) if need_base else None
    return dbase, None if dx is None else dx.view(ctx.x_shape), d_lora_A, d_lora_B, None, None, None


def _add(
    base: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout_p: float, backend: str
) -> Tensor:
    """Compute y `[*, out]` from arguments that `functional.lora_add` has checked and cast."""
    if is_exporting_to_onnx():
        a, b = lora_A.to(x.dtype), lora_B.to(x.dtype)
        return reference.lora_add(base, x, a, b, scaling=scaling, dropout_p=dropout_p)
    register_flops({add_forward: _forward_flops, add_backward: _backward_flops})
    # `int` compiles the rank into a graph; all other sizes may vary.
    rank = int(lora_A.shape[0])
    backend = plan.choose(x.device, x.dtype, rank, x.numel() == 0 or base.numel() == 0, backend, "lora_add")
    noise = draw_noise(x, torch.empty(0, device=x.device), backend) if dropout_p > 0 else None
    lora_A, scaling = plain_scaling(lora_A, scaling)
    return add_forward(base, x, lora_A, lora_B, noise, scaling, dropout_p, backend)[0]


def _add_forward(
    base: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, noise: Tensor | None,
    scaling: float, dropout_p: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Compute y `[*, out]` in base's dtype, s `[M, r]` and the backend's mask, None without dropout."""
    y, s, keep = add_pass.forward(base, x, lora_A, lora_B, scaling, dropout_p, backend, noise)
    return y.view(base.shape), s, keep


def _add_backward(
    dy: Tensor, x: Tensor | None, lora_A: Tensor | None, lora_B: Tensor | None, s: Tensor | None, keep: Tensor | None,
    alpha: float, backend: str, dtype: torch.dtype, dtype_A: torch.dtype, dtype_B: torch.dtype, needed: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Compute those of dx `[*, in]` in `dtype`, dA and dB that are needed, and return None for the others."""
    shape = (*dy.shape[:-1], -1 if lora_A is None else lora_A.shape[1])
    dy, x = rows(dy.to(dtype)), None if x is None else rows(x)
    gradients = add_pass.backward(dy, x, lora_A, lora_B, s, keep, alpha, backend, (dtype_A, dtype_B), needed)
    return contiguous(gradients, shape)


def _fake_forward(base, x, lora_A, lora_B, noise, scaling, dropout_p, backend):
    rows = x.new_empty(math.prod(x.shape[:-1]), x.shape[-1])
    s, keep = plan.contractions(backend).outputs(rows, lora_A.shape[0], dropout_p)
    return base.new_empty(base.shape), s, keep


def _fake_backward(dy, x, lora_A, lora_B, s, keep, alpha, backend, dtype, dtype_A, dtype_B, needed):
    inner = None if lora_A is None else lora_A.shape[1]
    return fake_gradients(dy, x, inner, lora_B, s, dtype, dtype_A, dtype_B, needed)


def _save(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor | None]) -> None:
    _, x, lora_A, lora_B, _, scaling, dropout_p, backend = inputs
    _, s, keep = output
    _keep(ctx, x, lora_A, lora_B, s, keep, scaling * keep_scale(dropout_p), backend)
    ctx.mark_non_differentiable(s)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Context, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 8
    with autocast_off(dy):
        return _gradients(ctx, dy)


def _gradients(ctx: Context, dy: Tensor) -> tuple[Tensor | None, ...]:
    need_base, *needed = ctx.needs_input_grad[:4]
    gradients = (None,) * 3
    if any(needed):
        x, _, *saved = ctx.saved_tensors
        gradients = add_backward(dy, x, *saved, ctx.alpha, ctx.backend, ctx.dtype, *ctx.adapter_dtypes, needed)
    return dy if need_base else None, *gradients, None, None, None, None


add, add_forward, add_backward = register(
    _library, "add", composed=_add, forward=_add_forward, backward=_add_backward,
    fake_forward=_fake_forward, fake_backward=_fake_backward, save=_save, differentiate=_differentiate,
)  # fmt: skip


def _forward_flops(base, x, lora_A, lora_B, *_: Any, **__: Any) -> int:
    """Count 2 M r (K + N) FLOPs; the arguments are shapes."""
    return 2 * math.prod(x[:-1]) * lora_A[0] * (x[-1] + base[-1])


def _backward_flops(
    dy, x, lora_A, lora_B, s, keep, alpha, backend, dtype, dtype_A, dtype_B, needed: list[bool], **_: Any
) -> int:  # fmt: skip
    """Count 2 M r K FLOPs for each of dx and dA, 2 M r N for each of dB and ds; the arguments are shapes."""
    need_x, need_A, need_B = needed
    inner = lora_A[1] if need_x else x[-1] if need_A else 0
    thin = inner * (need_x + need_A) + dy[-1] * (need_B + (need_x or need_A))
    return 2 * math.prod(dy[:-1]) * (lora_B or s)[1] * thin
