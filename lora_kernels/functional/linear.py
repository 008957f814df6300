"""`lora_linear`: check, apply autocast, choose a backend, call it."""

import torch
from torch import Tensor

from lora_kernels import autograd, passes, plan, reference, torch_backend
from lora_kernels.autograd.common import autocasts
from lora_kernels.autograd.noise import draw_shard
from lora_kernels.functional import checks
from lora_kernels.functional.gate import arrived, as_autocast, as_number, base_only, transforming, watched

__all__ = ["compute", "lora_linear"]


def lora_linear(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, *,
    scaling: float = 1.0, bias: Tensor | None = None, dropout_p: float = 0.0, backend: str = "auto",
    accumulate_grad: bool = False, dropout_shard: tuple[int, int] = (0, 1),
) -> Tensor:  # fmt: skip
    """Apply a linear layer with a low-rank adapter, in one fused pass.

    y = x Wᵀ + scaling · D(x) Aᵀ Bᵀ + bias, where D is inverted dropout. B A is never formed, nor D(x) stored
    (but by small calls on a CPU, of up to 65,536 elements).

    Args:
        x: Activations, `[*, in_features]`: any leading dims, any strides; bfloat16, float16, float32, or float64
            (PyTorch backend).
        weight: W, `[out_features, in_features]`. Usually frozen; if it requires grad it gets its gradient.
        lora_A: A, `[r, in_features]`, r >= 0; x's dtype, or float32 over a 16-bit x (PEFT's default), in which case
            it is rounded to x's dtype for the products and its gradient is float32.
        lora_B: B, `[out_features, r]`; likewise.
        scaling: Multiplies the low-rank term; `lora_alpha / r` in PEFT. A run-time number: no value recompiles.
        bias: `[out_features]` or None.
        dropout_p: Probability of dropping an element of the low-rank path's input, resolved to 1/65536. Applied
            whenever > 0, as in `torch.nn.functional.scaled_dot_product_attention`: pass 0 in evaluation. At 1 the
            low-rank term is zero. The mask comes from the device's torch generator.
        backend: "triton" for the fused kernels, "torch" for PyTorch's operators, "auto" for Triton on GPUs that can
            run it and PyTorch otherwise; the environment variable LORA_KERNELS_BACKEND overrides "auto".
        accumulate_grad: Let backward add the gradients of `lora_A` and `lora_B` to their `.grad` itself, where there is
            one and no hook listens: a launch and a pass less for each when gradients are accumulated. Only for
            `y.backward()`: `torch.autograd.grad` would see none, and gradients would be added all the same. Without
            effect where the engine would not add in place, as with `create_graph=True`.
        dropout_shard: (i, n) where x is the i-th of n equal shards of the features: the generator is drawn from for all
            n, and the i-th gets its mask. Ranks that were seeded alike drop independent elements and stay alike.

    Returns:
        y, `[*, out_features]`, contiguous, in x's dtype, or autocast's inside `torch.autocast`.

    Raises:
        TypeError: A dtype, a mix of dtypes, or a kind of tensor that is not supported; `scaling` or `dropout_p` that is
            no number, `accumulate_grad` that is neither True nor False.
        ValueError: Shapes, devices, `scaling`, `dropout_p` or `backend` that do not fit.
        RuntimeError: backend="triton" where it cannot run, a `torch.func` transform or forward-mode AD, or, from
            backward, a second differentiation (use `lora_kernels.reference.lora_linear` for that; small calls on a CPU
            can be differentiated again).

    Numerics: fp32 accumulation; s = scaling D(x) Aᵀ, its gradient, and each output are rounded once (the torch
    backend, and a hybrid with the vendor's library, round one part of a sum on its own as well). In float16, s must
    fit float16's range.

    Source: Hu et al. 2021, arXiv:2106.09685.
    """
    if type(x) is not Tensor:
        x = arrived(x)
    how = scaling, dropout_p, backend, accumulate_grad, dropout_shard
    device_type = x.device.type if isinstance(x, Tensor) else "cpu"
    if autocasts(device_type):
        x, weight, bias, adapters_fit = as_autocast(device_type, x, weight, bias)
        with torch.autocast(device_type, enabled=False):  # all is cast; it would round fp32 sums on their way
            return compute(x, weight, lora_A, lora_B, bias, *how, adapters_fit)
    return compute(x, weight, lora_A, lora_B, bias, *how, False)


def compute(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, scaling: float, dropout_p: float,
    backend: str, accumulate_grad: bool, dropout_shard: tuple[int, int], adapters_fit: bool,
) -> Tensor:  # fmt: skip
    """Check, choose a backend, and call it; `adapters_fit` where autocast makes up for their dtypes."""
    checks.check_call(x, weight, lora_A, lora_B, bias, scaling, dropout_p)
    if type(accumulate_grad) is not bool:
        checks.check_flag("lora_linear", "accumulate_grad", accumulate_grad)
    if not adapters_fit:
        checks.check_dtypes(x, weight, lora_A, lora_B, bias)
    if dropout_shard != (0, 1):
        checks.check_shard(dropout_shard)
    if transforming():
        checks.check_transforms(backend)
        return reference.lora_linear(
            x, weight, lora_A.to(x.dtype), lora_B.to(x.dtype), scaling=scaling, bias=bias, dropout_p=dropout_p
        )
    rank = lora_A.shape[0]
    adds_nothing = dropout_p == 1 or rank == 0
    sharded = type(x) is not Tensor and checks.is_sharded(x)
    if sharded:
        checks.check_sharded(dropout_p)
        from lora_kernels.autograd import sharding  # noqa: F401  registers its rules; not before there are DTensors
    if sharded or watched():
        backend = plan.overridden(backend)
        if adds_nothing:
            return base_only(x, weight, lora_A, lora_B, bias)
        return autograd.linear.linear(
            x, weight, lora_A, lora_B, bias, as_number(scaling), as_number(dropout_p), backend, dropout_shard
        )
    scaling, dropout_p = float(scaling), float(dropout_p)
    empty = x.numel() == 0 or weight.shape[0] == 0
    backend = plan.choose(x.device, x.dtype, rank, empty or rank == 0, backend)
    if adds_nothing:
        return base_only(x, weight, lora_A, lora_B, bias)
    noise = draw_shard(x, backend, dropout_shard) if dropout_p > 0 and dropout_shard[1] > 1 else None
    if backend == "torch" and not accumulate_grad and torch_backend.composes(x, weight, lora_A, lora_B):
        return torch_backend.composed(x, weight, lora_A, lora_B, bias, scaling, dropout_p, noise)
    args = (x, weight, lora_A, lora_B, bias, scaling, dropout_p, backend)
    trained = x.requires_grad or lora_A.requires_grad or lora_B.requires_grad or weight.requires_grad
    if torch.is_grad_enabled() and (trained or (bias is not None and bias.requires_grad)):
        y = autograd.linear.LoRALinearFunction.apply(*args, accumulate_grad, noise)
    else:
        y = passes.linear.forward(*args, noise)[0]
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])
