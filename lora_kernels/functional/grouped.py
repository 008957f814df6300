"""`lora_grouped_linear`: check, apply autocast, choose a backend, call it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels import autograd, passes, plan
from lora_kernels.autograd.common import autocasts
from lora_kernels.functional.checks_grouped import check_grouped, check_grouped_dtypes, listed
from lora_kernels.functional.gate import (
    as_autocast,
    as_number,
    check_backend_runs,
    check_transforms,
    is_proxy,
    is_watched,
    nothing,
    record,
    takes_reference,
    wait_for,
    without_autocast,
)  # fmt: skip

__all__ = ["lora_grouped_linear"]

_CALL = "lora_grouped_linear"


def lora_grouped_linear(
    x: Tensor, weight: Tensor, lora_A: Tensor | Sequence[Tensor], lora_B: Tensor | Sequence[Tensor], offsets: Tensor, *,
    scaling: float | Sequence[float] = 1.0, bias: Tensor | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Apply to each group of rows, as the tokens of an expert, a linear layer of its own with a low-rank adapter.

    y_e = x_e W_eᵀ + scaling · x_e A_eᵀ B_eᵀ + bias_e, with x_e the rows `offsets[e]` to `offsets[e + 1]` of x. No B A
    is formed and no gradient of the size of W unless W requires grad. The host reads no offset, so nothing waits for
    the device (the PyTorch backend on a CPU reads them, and in float64 on a GPU).

    Args:
        x: Activations, `[S, in_features]`, rows sorted by group; any strides; bfloat16, float16, float32, or float64
            (PyTorch backend).
        weight: W, `[E, out_features, in_features]`, one matrix for each group; any strides, so a stack
            `[E, in_features, out_features]` is passed as `stack.mT`. Usually frozen; if W requires grad, backward
            computes its gradient.
        lora_A: A, `[E, r, in_features]`, r >= 0, in x's dtype, or in float32 over a 16-bit x. A float32 A is rounded to
            x's dtype for the products, and its gradient is float32. Or a sequence of up to 4 such, of adapters that are
            added; an empty one computes the base layers alone.
        lora_B: B, `[E, out_features, r]`, in a dtype as A, or a sequence of such; any strides, so PEFT's B of experts
            is passed as `weight.view(out_features, r, E).permute(2, 0, 1)`.
        offsets: `[E + 1]`, int32 or int64, on x's device: rows `offsets[e]` to `offsets[e + 1]` belong to group e.
            offsets[0] is 0, and they never decrease; the values are not checked, because that would wait for the
            device. Rows from offsets[E] on belong to no group: their y and dx are 0, and they reach no other gradient.
        scaling: Multiplies the low-rank term, or a sequence of one number for each adapter. A run-time number: no value
            recompiles.
        bias: `[E, out_features]` or None.
        backend: As in `lora_linear`.

    Returns:
        y, `[S, out_features]`, contiguous, in x's dtype, or autocast's inside `torch.autocast`.

    Raises:
        TypeError: A dtype, a mix of dtypes, or a kind of tensor is not supported; `scaling` is not a number.
        ValueError: Shapes, devices, numbers of adapters, `scaling` or `backend` do not fit.
        RuntimeError: As in `lora_linear`.

    Numerics: As in `lora_linear`, group by group. The gradients of a group without rows are exactly 0.

    Source: Hu et al. 2021, arXiv:2106.09685, for the experts of a mixture (Shazeer et al. 2017, arXiv:1701.06538).
    """
    if type(x) is not Tensor:
        if is_proxy(x):
            how = dict(scaling=scaling, bias=bias, backend=backend)
            return record(x, lora_grouped_linear, x, weight, lora_A, lora_B, offsets, **how)
        x = wait_for(x)
    device_type = x.device.type if isinstance(x, Tensor) else "cpu"
    autocast, adapters_fit = autocasts(device_type), False
    if autocast:
        # A quantised weight is refused below.
        x, weight, bias, adapters_fit = as_autocast(device_type, x, weight, bias)  # type: ignore[assignment]
    lora_As, lora_Bs, scalings = listed(lora_A, lora_B, scaling)
    check_grouped(x, weight, lora_As, lora_Bs, offsets, bias, scalings, isinstance(lora_A, Tensor))
    # Autocast allows any dtype of the adapters.
    if not adapters_fit:
        check_grouped_dtypes(x, weight, lora_As, lora_Bs, bias, isinstance(lora_A, Tensor))
    if autocast:
        with without_autocast(device_type):
            return _compute(x, weight, lora_As, lora_Bs, offsets, bias, scalings, backend)
    return _compute(x, weight, lora_As, lora_Bs, offsets, bias, scalings, backend)


def _compute(
    x: Tensor, weight: Tensor, lora_As: Sequence[Tensor], lora_Bs: Sequence[Tensor], offsets: Tensor,
    bias: Tensor | None, scalings: Sequence[float], backend: str,
) -> Tensor:  # fmt: skip
    """Choose a backend for a checked call, and call it."""
    if takes_reference(backend):
        check_transforms(_CALL, backend)
        return autograd.grouped.by_reference(x, weight, lora_As, lora_Bs, offsets, bias, scalings)
    # Adapters of rank 0 add nothing, and get their empty gradients.
    adding = [i for i, lora_A in enumerate(lora_As) if lora_A.shape[1]]
    empty = [nothing(A, B) for A, B in zip(lora_As, lora_Bs, strict=True) if not A.shape[1]]
    lora_As, lora_Bs, scalings = ([each[i] for i in adding] for each in (lora_As, lora_Bs, scalings))  # type: ignore
    if is_watched():
        backend = plan.requested_backend(backend)
        check_backend_runs(_CALL, x, [weight], lora_As, backend)
        numbers = list(map(as_number, scalings))
        y = autograd.grouped.grouped_linear(x, weight, lora_As, lora_Bs, offsets, bias, numbers, backend)
    else:
        rank = max((lora_A.shape[1] for lora_A in lora_As), default=1)
        chosen = plan.choose(x.device, x.dtype, rank, x.numel() == 0 or weight.numel() == 0, backend, _CALL)
        y = _plain(x, weight, list(zip(lora_As, lora_Bs, strict=True)), offsets, bias, scalings, chosen)
    for zero in empty:
        y = y + zero.to(y.dtype) if zero.requires_grad else y
    return y


def _plain(
    x: Tensor, weight: Tensor, adapters: Sequence[tuple[Tensor, Tensor]], offsets: Tensor, bias: Tensor | None,
    scalings: Sequence[float], backend: str,
) -> Tensor:  # fmt: skip
    """Compute by a Function if a gradient may be needed."""
    scalings = tuple(map(float, scalings))
    flat = [t for pair in adapters for t in pair]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, *flat)):
        return autograd.grouped.LoRAGroupedLinearFunction.apply(x, weight, offsets, bias, (scalings, backend), *flat)
    return passes.grouped.forward(x, weight, adapters, offsets, bias, scalings, backend)[0]
