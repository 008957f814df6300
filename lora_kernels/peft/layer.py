"""One forward of a PEFT LoRA layer: read the layer's state at this call, and compute it fused or by PEFT's forward.

    y = x Wᵀ + bias + Σᵢ scalingᵢ · Dᵢ(x) Aᵢᵀ Bᵢᵀ        i: the active adapters that this layer has

The three forms are: "fused" computes base and low-rank terms in one pass, if `bases` knows the base layer. "low-rank"
adds the low-rank terms to the result that the base layer computes itself (hooked, quantised in another way, another
class).
"stock" is PEFT's own forward, for any layer that `read` does not recognise; `reasons` has the words for the cause. No
state is kept between calls, because PEFT, its users and hot-swapping replace modules, parameters and scalings at any
time.

`read` runs at every call, so it looks into the modules' dictionaries: `nn.Module.__getattr__` alone would cost more
than all of `read`. `read` does not call the adapters' modules, so anything that needs these calls (hooks, sharding,
offloading) sends the layer to PEFT's forward.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from lora_kernels.autograd.common import autocast_off, autocasts
from lora_kernels.constants import HALF
from lora_kernels.functional import lora_add, lora_linear
from lora_kernels.passes.layer import Projection
from lora_kernels.peft.bases import bare, base_of
from lora_kernels.peft.forwards import (
    call_replacement,
    is_called_plainly,
    is_in_force,
    is_ours,
    members_are_own,
    parts_are_own,
    replacement,
)

__all__ = [
    "accelerated_forward", "dtypes_fit", "is_dense", "is_function_mode_active", "is_plain_variant",
    "is_traced", "projection", "read",
]  # fmt: skip

# A, B, scaling and dropout_p.
Term = tuple[Tensor, Tensor, float, float]

_STRIDED = torch.strided
# With B frozen, MiCA computes the same as plain LoRA.
_PLAIN_VARIANTS = ("MiCALinearVariant",)


def accelerated_forward(stock: Callable[..., Tensor], backend: str) -> Any:
    """Make a forward that takes the fused path if possible, and otherwise calls `stock`; it needs a `mark`.

    Args:
        stock: The forward of a PEFT layer class.
        backend: Backend for `lora_linear`.
    """

    @functools.wraps(stock)
    def forward(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if (other := replacement(forward)) is stock:
            return stock(self, x, *args, **kwargs)
        if other is not None:
            called, y = call_replacement(other, forward, self, x, *args, **kwargs)
            if called:
                return y
        terms = None if args or kwargs else read(self, x)
        if terms is None:
            return stock(self, x, *args, **kwargs)
        return _compute(self.__dict__["_modules"]["base_layer"], x, terms, backend)

    return forward


def read(layer: nn.Module, x: Tensor) -> list[Term] | None:
    """Return the low-rank terms of a call, or None if PEFT's own forward has to serve the call.

    Args:
        layer: A layer of one of the classes in `known`.
        x: The layer's input.
    """
    if not is_dense(x) or is_traced() or not parts_are_own() or not members_are_own(type(layer)):
        return None
    fields = layer.__dict__
    try:
        if fields["_disable_adapters"] or fields["merged_adapters"]:
            return None
        modules, scalings, variants = fields["_modules"], fields["scaling"], fields["lora_variant"]
        active, casting = fields["_active_adapter"], fields["cast_input_dtype_enabled"]
    except KeyError:
        # This PEFT has another layout.
        return None
    lora_As, lora_Bs = modules["lora_A"].__dict__["_modules"], modules["lora_B"].__dict__["_modules"]
    dropouts = modules["lora_dropout"].__dict__["_modules"]
    terms: list[Term] = []
    for name in (active,) if isinstance(active, str) else active:
        if name not in lora_As:
            continue
        lora_A, lora_B, dropout, scaling = lora_As[name], lora_Bs[name], dropouts[name], scalings[name]
        if variants and name in variants and not is_plain_variant(variants[name]):
            return None
        if not (bare(lora_A, nn.Linear) and bare(lora_B, nn.Linear)):
            return None
        kind = type(dropout)
        if (kind is not nn.Dropout and kind is not nn.Identity) or not bare(dropout, kind):
            return None
        dropout_p = dropout.p if kind is nn.Dropout and dropout.training else 0.0
        own_A, own_B = lora_A.__dict__["_parameters"], lora_B.__dict__["_parameters"]
        A, B = own_A.get("weight"), own_B.get("weight")
        if type(A) is not nn.Parameter or type(B) is not nn.Parameter:
            return None
        if A.layout is not _STRIDED or B.layout is not _STRIDED:
            return None
        if own_A.get("bias") is not None or own_B.get("bias") is not None or not dtypes_fit(x, A, B):
            return None
        if not casting and A.dtype is not x.dtype:
            return None
        if type(scaling) is not float and not isinstance(scaling, (int, float)):
            if type(scaling) not in (Tensor, nn.Parameter) or scaling.dim():
                return None
            # Scale on the device, because to read the number would wait for the GPU.
            A, scaling = _scale_adapter(A, scaling), 1.0
        elif not -math.inf < scaling < math.inf:
            return None
        terms.append((A, B, scaling, dropout_p))
    return terms or None


def projection(layer: nn.Module, x: Tensor) -> tuple[Projection, torch.dtype | None] | None:
    """Return a layer as a projection of x and the dtype of `base_of`, or None if the layer has to be called.

    Args:
        layer: A patched PEFT layer, or a layer without an adapter.
        x: The layer's input.
    """
    base: nn.Module
    terms: list[Any] | None
    base, terms = layer, None
    if not is_ours(type(layer).forward):
        terms = [(None, None, 1.0, 0.0)] if is_dense(x) and parts_are_own() and not is_traced() else None
    elif is_in_force(type(layer).forward) and bare(layer, type(layer)) and is_called_plainly(type(layer)):
        base, terms = layer.__dict__["_modules"]["base_layer"], read(layer, x)
    if terms is not None and len(terms) > 1:
        terms = _join_terms(terms)
    if terms is None or len(terms) > 1 or (found := base_of(base, x)) is None:
        return None
    (A, B, scaling, dropout_p), (weight, bias, dtype) = terms[0], found
    return Projection(weight, A, B, bias, scaling, dropout_p), dtype


def is_dense(x: Any) -> bool:
    """Return whether x is a plain tensor in strided memory, neither sparse nor nested."""
    return type(x) is Tensor and x.layout is _STRIDED and not x.is_nested


def is_traced() -> bool:
    """Return whether a transform, tracer, mode or global hook needs PyTorch's own functions, or every module's call."""
    return (
        torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()
        or forward_ad._current_level >= 0
        or (torch._C._len_torch_function_stack() > 0 and is_function_mode_active())
        or _has_any_global_hook()
    )


def is_function_mode_active() -> bool:
    """Return whether a mode may replace PyTorch's functions; the mode of a default device does not."""
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())


def is_plain_variant(variant: Any) -> bool:
    """Return whether a `LoraVariant` computes the same as plain LoRA in its forward."""
    return type(variant).__name__ in _PLAIN_VARIANTS


def dtypes_fit(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> bool:
    """Return whether the dtypes fit: adapters as x, fp32 over a 16-bit x, or up to 32-bit floats under autocast.

    With these dtypes PEFT would compute in x's dtype or a wider one.
    """
    dtype, a, b = x.dtype, lora_A.dtype, lora_B.dtype
    if a is b and (a is dtype or (a is torch.float32 and dtype in HALF)):
        return dtype.is_floating_point
    return autocasts(x.device.type) and all(t.is_floating_point() and t.itemsize <= 4 for t in (x, lora_A, lora_B))


def _compute(base: nn.Module, x: Tensor, terms: list[Term], backend: str) -> Tensor:
    if len(terms) > 1:
        terms = _join_terms(terms)
    (A, B, scaling, dropout_p), *others = terms
    found = base_of(base, x)
    if found is not None:
        weight, bias, dtype = found
        wide = x if dtype is None else x.to(dtype)
        y = lora_linear(wide, weight, A, B, scaling=scaling, bias=bias, dropout_p=dropout_p, backend=backend)
        # A quantised layer returns x's dtype, inside autocast as well.
        y = y if dtype is None else y.to(x.dtype)
    else:
        y = base(x)
        if not is_dense(y):
            return _add_plainly(y, x, terms)
        y = lora_add(y, x, A, B, scaling=scaling, dropout_p=dropout_p, backend=backend)
    # Each of the other terms draws a mask of its own.
    for A, B, scaling, dropout_p in others:
        y = lora_add(y, x, A, B, scaling=scaling, dropout_p=dropout_p, backend=backend)
    return y


def _add_plainly(y: Tensor, x: Tensor, terms: list[Term]) -> Tensor:
    """Add the terms to a base result that is no plain dense tensor, as PEFT's own forward does."""
    for A, B, scaling, dropout_p in terms:
        dropped = F.dropout(x.to(A.dtype), dropout_p) if dropout_p else x.to(A.dtype)
        y = y + F.linear(F.linear(dropped, A), B) * scaling
    return y


def _join_terms(terms: list[Term]) -> list[Term]:
    """Join the terms without dropout: adapters side by side are one adapter whose rank is the sum of the ranks."""
    plain = [term for term in terms if not term[3]]
    if len(plain) < 2:
        return terms
    scaling = plain[0][2]
    if any(other != scaling for _, _, other, _ in plain):
        plain = [(_scale_adapter(A, other), B, 1.0, 0.0) for A, B, other, _ in plain]
        scaling = 1.0
    # Autocast to one half of the floats refuses to join tensors of the other half.
    with autocast_off(plain[0][0]):
        lora_A, lora_B = torch.cat([A for A, *_ in plain]), torch.cat([B for _, B, *_ in plain], 1)
    return [(lora_A, lora_B, scaling, 0.0), *(term for term in terms if term[3])]


def _scale_adapter(lora_A: Tensor, scaling: Tensor | float) -> Tensor:
    """Multiply A by its scaling; a 16-bit A in fp32, so that the product is rounded once."""
    return (lora_A.float() if lora_A.dtype in HALF else lora_A) * scaling
