"""`lora_linear`: check, apply autocast, choose a backend, call it."""

from typing import Any

import torch
from torch import Tensor

from lora_kernels import autograd, passes, plan, torch_backend
from lora_kernels.autograd.common import autocasts, by_reference
from lora_kernels.autograd.noise import draw_shard
from lora_kernels.autograd.stored import given, split
from lora_kernels.autograd.written import watch
from lora_kernels.functional import checks
from lora_kernels.functional.base import base_only
from lora_kernels.functional.gate import (
    as_autocast,
    as_number,
    check_backend_runs,
    check_transforms,
    is_proxy,
    is_watched,
    record,
    takes_reference,
    wait_for,
    without_autocast,
)  # fmt: skip
from lora_kernels.passes.layer import Weight

__all__ = ["compute", "lora_linear"]


def lora_linear(
    x: Tensor, weight: Weight, lora_A: Tensor, lora_B: Tensor, *,
    scaling: float = 1.0, bias: Tensor | None = None, dropout_p: float = 0.0, backend: str = "auto",
    accumulate_grad: bool = False, dropout_shard: tuple[int, int] = (0, 1),
) -> Tensor:  # fmt: skip
    """Apply a linear layer with a low-rank adapter, in one fused pass.

    y = x Wᵀ + scaling · D(x) Aᵀ Bᵀ + bias, where D is inverted dropout. B A is never formed. D(x) is not stored,
    except by small calls on a CPU, of up to 65,536 elements.

    Args:
        x: Activations, `[*, in_features]`: any leading dims, any strides; bfloat16, float16, float32, or float64
            (PyTorch backend).
        weight: W, `[out_features, in_features]`. Usually frozen; if W requires grad, backward computes its gradient.
            A `QuantizedWeight` is dequantised into x's dtype, in forward and again in backward; W is not kept between.
        lora_A: A, `[r, in_features]`, r >= 0, in x's dtype, or in float32 over a 16-bit x (PEFT's default). A float32
            A is rounded to x's dtype for the products, and its gradient is float32.
        lora_B: B, `[out_features, r]`, in a dtype as A.
        scaling: Multiplies the low-rank term; `lora_alpha / r` in PEFT. A run-time number: no value recompiles.
        bias: `[out_features]` or None.
        dropout_p: Probability of dropping an element of the low-rank path's input, resolved to 1/65536. Applied
            whenever > 0, as in `torch.nn.functional.scaled_dot_product_attention`: pass 0 in evaluation. At 1 the
            low-rank term is zero. The mask comes from the device's torch generator.
        backend: "triton" for the fused kernels, "torch" for PyTorch's operators, "auto" for Triton on GPUs that can
            run it and PyTorch otherwise; the environment variable LORA_KERNELS_BACKEND overrides "auto". "reference"
            for the plain formulas of `lora_kernels.reference`, slow and differentiable any number of times; inside
            `torch.func` transforms, forward-mode AD and `torch.jit.trace`, "auto" and "torch" compute by them as well.
        accumulate_grad: Let backward itself add the gradients of `lora_A` and `lora_B` to a `.grad` that exists and has
            no hooks. Gradient accumulation then takes one launch and one pass less for each. The option has no effect
            where the engine would not add in place: with `create_graph=True`, in `torch.autograd.grad`, and for
            adapters that `backward(inputs=...)` leaves out.
        dropout_shard: (i, n) if x is the i-th of n equal shards of the features. The call draws from the generator for
            all n shards, and uses the mask of the i-th. Ranks with the same seed then drop independent elements, and
            their generators stay equal.

    Returns:
        y, `[*, out_features]`, contiguous, in x's dtype, or autocast's inside `torch.autocast`.

    Raises:
        TypeError: A dtype, a mix of dtypes, or a kind of tensor is not supported; `scaling` or `dropout_p` is not a
            number; `accumulate_grad` is not a bool.
        ValueError: Shapes, devices, `scaling`, `dropout_p` or `backend` do not fit.
        RuntimeError: backend="triton" cannot run, also inside a `torch.func` transform, forward-mode AD or
            `torch.jit.trace`; or backward is differentiated again (pass backend="reference" for that; small calls on a
            CPU can be differentiated again). From backward: x, or a weight or adapter that backward needs, was written
            in place after the call; the message names the layer. Nothing is copied, so this is so with dropout, too.

    Numerics: fp32 accumulation; s = scaling D(x) Aᵀ, its gradient, and each output are rounded once. The torch backend,
    and a hybrid with the vendor's library, round one part of a sum on its own as well. In float16, s must fit float16's
    range.

    Source: Hu et al. 2021, arXiv:2106.09685.
    """
    if type(x) is not Tensor:
        if is_proxy(x):
            return record(
                x, lora_linear, x, weight, lora_A, lora_B, scaling=scaling, bias=bias, dropout_p=dropout_p,
                backend=backend, accumulate_grad=accumulate_grad, dropout_shard=dropout_shard,
            )  # fmt: skip
        x = wait_for(x)
    device_type = x.device.type if isinstance(x, Tensor) else "cpu"
    autocast, adapters_fit = autocasts(device_type), False
    if autocast:
        x, weight, bias, adapters_fit = as_autocast(device_type, x, weight, bias)
    checks.check_call(x, weight, lora_A, lora_B, bias, scaling, dropout_p)
    if type(accumulate_grad) is not bool:
        checks.check_flag("lora_linear", "accumulate_grad", accumulate_grad)
    # Autocast allows any dtype of the adapters.
    if not adapters_fit:
        checks.check_dtypes(x, weight, lora_A, lora_B, bias)
    if dropout_shard != (0, 1):
        checks.check_shard(dropout_shard)
    how = scaling, dropout_p, backend, accumulate_grad, dropout_shard
    if autocast:
        with without_autocast(device_type):
            return compute("lora_linear", x, weight, lora_A, lora_B, bias, *how)
    return compute("lora_linear", x, weight, lora_A, lora_B, bias, *how)


def compute(
    call: str, x: Tensor, weight: Any, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, scaling: float,
    dropout_p: float, backend: str, accumulate_grad: bool, dropout_shard: tuple[int, int], chosen: str | None = None,
) -> Tensor:  # fmt: skip
    """Compute one layer of a checked call; choose a backend, unless the call has `chosen` one for all its layers."""
    if takes_reference(backend):
        check_transforms(call, backend)
        return by_reference(x, [weight], [lora_A], [lora_B], [bias], [scaling], [dropout_p])[0]
    rank = lora_A.shape[0]
    adds_nothing = dropout_p == 1 or rank == 0
    sharded = type(x) is not Tensor and checks.is_sharded(x)
    if sharded:
        checks.check_sharded(dropout_p, call)
        # This import registers the sharding rules, and waits until there are DTensors.
        from lora_kernels.autograd import sharding  # noqa: F401
    if sharded or is_watched():
        backend = plan.requested_backend(backend)
        if adds_nothing:
            return base_only(call, x, weight, lora_A, lora_B, bias, backend)
        check_backend_runs(call, x, [weight], [lora_A], backend)
        tensor, tables, form = split(weight)
        how = as_number(scaling), as_number(dropout_p), backend, dropout_shard, *given(tables, form)
        return autograd.linear.linear(x, tensor, lora_A, lora_B, bias, *how)
    scaling, dropout_p = float(scaling), float(dropout_p)
    if chosen is None:
        empty = x.numel() == 0 or weight.shape[0] == 0
        chosen = plan.choose(x.device, x.dtype, rank, empty or rank == 0, backend, call)
    if adds_nothing:
        return base_only(call, x, weight, lora_A, lora_B, bias, chosen)
    noise = draw_shard(x, chosen, dropout_shard) if dropout_p > 0 and dropout_shard[1] > 1 else None
    small = isinstance(weight, Tensor) and torch_backend.composes(x, weight, lora_A, lora_B)
    if chosen == "torch" and not accumulate_grad and small:
        y = torch_backend.linear_by_operators(x, weight, lora_A, lora_B, bias, scaling, dropout_p, noise)
        if y.requires_grad:
            watch(call, y, x, weight, lora_A, lora_B)
        return y
    trained = x.requires_grad or lora_A.requires_grad or lora_B.requires_grad or weight.requires_grad
    if torch.is_grad_enabled() and (trained or (bias is not None and bias.requires_grad)):
        settings = scaling, dropout_p, chosen, accumulate_grad, noise
        y = autograd.linear.LoRALinearFunction.apply(x, weight, lora_A, lora_B, bias, settings)
    else:
        y, _, _ = passes.linear.forward(x, weight, lora_A, lora_B, bias, scaling, dropout_p, chosen, noise)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])
