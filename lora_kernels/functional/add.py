"""`lora_add`: check, apply autocast, choose a backend, call it."""

import torch
from torch import Tensor

from lora_kernels import autograd, passes, plan, reference
from lora_kernels.autograd.common import autocasts
from lora_kernels.functional import checks
from lora_kernels.functional.gate import arrived, as_number, nothing, transforming, watched

__all__ = ["lora_add"]


def lora_add(
    base: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, *,
    scaling: float = 1.0, dropout_p: float = 0.0, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Add a low-rank adapter to the result of a base layer that only the layer itself can compute.

    y = base + scaling · D(x) Aᵀ Bᵀ. The base may be a quantised layer, a layer with hooks, or a layer that has an
    adapter already.

    Args:
        base: The base layer's result, `[*, out_features]`; only read, never written.
        x: The base layer's input, `[*, in_features]`; as in `lora_linear`.
        lora_A: A, `[r, in_features]`; as in `lora_linear`.
        lora_B: B, `[out_features, r]`.
        scaling: Multiplies the low-rank term.
        dropout_p: As in `lora_linear`.
        backend: As in `lora_linear`.

    Returns:
        y, `[*, out_features]`, in base's dtype. The low-rank term is computed in x's dtype, or in autocast's.

    Raises:
        TypeError, ValueError, RuntimeError: As `lora_linear`.
    """
    base, x = arrived(base), arrived(x)
    device_type = x.device.type if isinstance(x, Tensor) else "cpu"
    autocast = autocasts(device_type)
    if autocast and isinstance(x, Tensor) and x.is_floating_point() and x.itemsize <= 4:
        x = x.to(torch.get_autocast_dtype(device_type))
        # All operands are cast already, and autocast would round fp32 sums on the way.
        with torch.autocast(device_type, enabled=False):
            return _checked_add(base, x, lora_A, lora_B, scaling, dropout_p, backend, True)
    return _checked_add(base, x, lora_A, lora_B, scaling, dropout_p, backend, False)


def _checked_add(
    base: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout_p: float, backend: str,
    adapters_fit: bool,
) -> Tensor:  # fmt: skip
    """Check, choose a backend, and call it; `adapters_fit` says that autocast allows any dtype of the adapters."""
    checks.check_add(base, x, lora_A, lora_B, scaling, dropout_p)
    if not adapters_fit:
        checks.check_dtypes(x, x, lora_A, lora_B, None, call="lora_add")
    if transforming():
        checks.check_transforms(backend, "lora_add")
        a, b = lora_A.to(x.dtype), lora_B.to(x.dtype)
        return reference.lora_add(base, x, a, b, scaling=scaling, dropout_p=dropout_p)
    rank = lora_A.shape[0]
    if dropout_p == 1 or rank == 0:
        # Raise if `backend` is not a known name.
        plan.choose(x.device, x.dtype, rank, True, backend, "lora_add")
        return base + nothing(lora_A, lora_B).to(base.dtype)
    if watched():
        return autograd.add.add(
            base, x, lora_A, lora_B, as_number(scaling), as_number(dropout_p), plan.overridden(backend)
        )  # fmt: skip
    scaling, dropout_p = float(scaling), float(dropout_p)
    backend = plan.choose(x.device, x.dtype, rank, x.numel() == 0 or base.numel() == 0, backend, "lora_add")
    args = (base, x, lora_A, lora_B, scaling, dropout_p, backend)
    if torch.is_grad_enabled() and any(t.requires_grad for t in args[:4]):
        y = autograd.add.LoRAAddFunction.apply(*args)
    else:
        y = passes.add.forward(*args)[0]
    return y.view(base.shape)
