"""`lora_add`: check, apply autocast, choose a backend, call it."""

import torch
from torch import Tensor

from lora_kernels import autograd, passes, plan, reference
from lora_kernels.autograd.common import autocasts
from lora_kernels.functional import checks
from lora_kernels.functional.gate import (
    as_number,
    check_transforms,
    is_proxy,
    is_watched,
    nothing,
    record,
    takes_reference,
    wait_for,
    without_autocast,
)

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
    if type(x) is not Tensor or type(base) is not Tensor:
        for t in (x, base):
            if is_proxy(t):
                how = dict(scaling=scaling, dropout_p=dropout_p, backend=backend)
                return record(t, lora_add, base, x, lora_A, lora_B, **how)
        base, x = wait_for(base), wait_for(x)
    device_type = x.device.type if isinstance(x, Tensor) else "cpu"
    autocast = autocasts(device_type) and isinstance(x, Tensor) and x.is_floating_point() and x.itemsize <= 4
    if autocast:
        x = x.to(torch.get_autocast_dtype(device_type))
    checks.check_add(base, x, lora_A, lora_B, scaling, dropout_p)
    # Autocast allows any dtype of the adapters.
    if not autocast:
        checks.check_dtypes(x, x, lora_A, lora_B, None, call="lora_add")
        return _add(base, x, lora_A, lora_B, scaling, dropout_p, backend)
    with without_autocast(device_type):
        return _add(base, x, lora_A, lora_B, scaling, dropout_p, backend)


def _add(
    base: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout_p: float, backend: str
) -> Tensor:
    """Choose a backend for a checked call, and call it."""
    if takes_reference(backend):
        check_transforms("lora_add", backend)
        a, b = lora_A.to(x.dtype), lora_B.to(x.dtype)
        return reference.lora_add(base, x, a, b, scaling=scaling, dropout_p=dropout_p)
    rank = lora_A.shape[0]
    if dropout_p == 1 or rank == 0:
        # Raise if `backend` is not a known name.
        plan.choose(x.device, x.dtype, rank, True, backend, "lora_add")
        return base + nothing(lora_A, lora_B).to(base.dtype)
    if is_watched():
        return autograd.add.add(
            base, x, lora_A, lora_B, as_number(scaling), as_number(dropout_p), plan.requested_backend(backend)
        )  # fmt: skip
    scaling, dropout_p = float(scaling), float(dropout_p)
    backend = plan.choose(x.device, x.dtype, rank, x.numel() == 0 or base.numel() == 0, backend, "lora_add")
    args = (base, x, lora_A, lora_B, scaling, dropout_p, backend)
    if torch.is_grad_enabled() and any(t.requires_grad for t in args[:4]):
        y = autograd.add.LoRAAddFunction.apply(*args)
    else:
        y = passes.add.forward(*args)[0]
    return y.view(base.shape)
