"""Base layers whose product is computed with the low-rank term: plain, 4-bit and FP8 linear layers.

    nn.Linear                     its weight
    bitsandbytes' Linear4bit      NF4 and FP4, dequantised once a pass. Outside autocast, a layer with a `compute_dtype`
                                  other than x's dtype is called: PEFT computes the low-rank term in x's dtype
    transformers' FP8Linear       dequantised once a pass; x is not quantised, as it is in the layer's own forward, so y
                                  is more exact and not the same

Few rows without gradients, as in generation, go to the layer's own kernel, which reads a quantised weight where it
lies: the dense W of a pass would take more time than the product. Other quantised layers are called, and the low-rank
term is added to their result.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.autograd.common import autocasts
from lora_kernels.constants import DTYPES, HALF
from lora_kernels.passes.layer import Weight
from lora_kernels.peft.forwards import describe, is_called_plainly, is_defined_by
from lora_kernels.quantized import layers

__all__ = ["FEW_ROWS", "bare", "base_of", "quantized_base", "storage"]

# Without gradients and below so many rows, a layer's own kernel is faster than a dense W and a product: bitsandbytes'
# own measurements on H100 put the crossover at 16 to 64 rows (bitsandbytes-foundation/bitsandbytes#1949).
FEW_ROWS = 64
_STRIDED = torch.strided
# By parts of their names, quantised layers that are called, and why.
_PACKED = ": no pass reads weights packed as its are"
_CALLED = {
    "8bitLt": ": LLM.int8 quantises x as well, so its product is x Wᵀ of no W",
    "Quant": _PACKED, "WQLinear": _PACKED, "HQQ": _PACKED, "Eetq": _PACKED,
}  # fmt: skip

# W, the bias, and the dtype in which a quantised layer computes; None for that of x.
Base = tuple[Weight, Tensor | None, torch.dtype | None]


def bare(module: nn.Module, kind: type) -> bool:
    """Return whether a module is exactly of a class, and has no hooks or replaced forward that need a call.

    Parametrised and fully sharded modules have a class of their own; accelerate replaces `forward` on the instance.
    """
    fields = module.__dict__
    return type(module) is kind and not (
        fields["_forward_hooks"] or fields["_forward_pre_hooks"]
        or fields["_backward_hooks"] or fields["_backward_pre_hooks"]
        or "forward" in fields
    )  # fmt: skip


def base_of(base: nn.Module, x: Tensor) -> Base | None:
    """Return what a pass takes of a base layer, or None if the layer has to be called.

    Args:
        base: The base layer of an adapter.
        x: The layer's input.
    """
    # Subclasses do not count, because quantised layers subclass `nn.Linear`.
    if not bare(base, nn.Linear):
        found = quantized_base(base, x)
        return None if isinstance(found, str) else found
    own, dtype = base.__dict__["_parameters"], x.dtype
    if "weight" not in own or "bias" not in own:
        return None
    for t in (own["weight"], own["bias"]):
        if t is None:
            continue
        if type(t) is not nn.Parameter or t.layout is not _STRIDED:
            return None
        if not (t.dtype is dtype or autocasts(x.device.type)):
            return None
    return own["weight"], own["bias"], None


def quantized_base(base: Any, x: Tensor | None) -> Base | str:
    """Return what a pass takes of a quantised base layer, or in words why the layer has to be called.

    Args:
        base: The base layer of an adapter.
        x: The layer's input, or None to leave out what depends on a call.
    """
    kind = layers.kind_of(base)
    if kind is None:
        name = type(base).__name__
        why = next((why for part, why in _CALLED.items() if part in name), "")
        # Other tuners call their layers Linear as well.
        full = f"{type(base).__module__}.{name}" if name == "Linear" else name
        return f"is a {full}, not a plain nn.Linear{why}"
    if "forward" in vars(base):
        return "has its forward replaced on the instance"
    if not bare(base, type(base)):
        return "has a hook"
    if not is_defined_by(type(base).forward, kind):
        return f"has a class whose forward was replaced by {describe(type(base).forward)}"
    if not is_called_plainly(type(base)):
        return "has a class whose call was replaced"
    try:
        weight = layers.read(base)
    except (TypeError, ValueError) as error:
        return f"cannot be read: {error}"
    if x is None:
        return weight, base.bias, None
    dtype = _work_dtype(base, x)
    if isinstance(dtype, str):
        return dtype
    few = not (base.training or torch.is_grad_enabled()) and x.numel() < FEW_ROWS * x.shape[-1]
    if few and (kind.__name__ == layers.BITSANDBYTES[1] or x.is_cuda):
        return f"has a kernel of its own for fewer than {FEW_ROWS} rows without gradients"
    bias = base.bias
    return weight, bias if bias is None or bias.dtype is dtype else bias.to(dtype), dtype


def storage(base: Any) -> str:
    """Return how a pass reads the weight of a base layer that it computes, "" for a plain weight."""
    return "" if type(base) is nn.Linear else f"{layers.read(base).format.upper()}, dequantised a pass"


def _work_dtype(base: Any, x: Tensor) -> torch.dtype | str:
    """Return the dtype in which a quantised layer computes a call, or why a pass cannot compute in the same."""
    own = getattr(base, "compute_dtype", None) or x.dtype
    if autocasts(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        if x.dtype.is_floating_point and x.itemsize <= 4 and (own is dtype or own is torch.float32):
            return dtype
        return f"computes in {_name(own)}, inside autocast to {_name(dtype)} and with x in {_name(x.dtype)}"
    if own is x.dtype and own in DTYPES.values():
        return own
    hint = ": inside torch.autocast one pass computes both" if x.dtype is torch.float32 and own in HALF else ""
    return f"computes in {_name(own)}, and x is {_name(x.dtype)}{hint}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
