"""Which of PEFT's layer classes can be accelerated: those whose forward is `base(x) + Σ scaling · B A dropout(x)`."""

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from lora_kernels import plan
from lora_kernels.functional import checks
from lora_kernels.peft.layer import stock_forward

__all__ = [
    "check_backend", "check_model", "check_not_peft", "classes", "is_supported", "lora_layer", "multihead_attention",
]  # fmt: skip

# Read from PEFT 0.19 to 0.21: where they differ (cast, clone, when the sum is rounded) it is within one rounding.
_CLASSES = (
    ("layer", "Linear"),
    ("bnb", "Linear8bitLt"), ("bnb", "Linear4bit"), ("gptq", "GPTQLoraLinear"), ("awq", "AwqLoraLinear"),
    ("aqlm", "AqlmLoraLinear"), ("eetq", "EetqLoraLinear"), ("hqq", "HqqLoraLinear"),
    ("torchao", "TorchaoLoraLinear"), ("inc", "IncLoraLinear"),
)  # fmt: skip


def lora_layer() -> type[Any]:
    """PEFT's mix-in that all LoRA layers share.

    Raises:
        ImportError: PEFT is not installed.
    """
    return _peft("layer").LoraLayer


def multihead_attention() -> type[Any]:
    """PEFT's layer that merges its adapters around the call of `nn.MultiheadAttention`."""
    return _peft("layer").MultiheadAttention


@functools.cache
def classes() -> tuple[type[nn.Module], ...]:
    """Those of the known classes that this PEFT has; some exist only where their quantisation library does."""
    found = (getattr(_peft(module, required=module == "layer"), name, None) for module, name in _CLASSES)
    return tuple(cls for cls in found if cls is not None)


def is_supported(cls: type) -> bool:
    """Whether a class computes with the forward of a known one, its own or inherited."""
    return any(_forward(cls) is _forward(other) for other in classes())


def check_model(call: str, model: nn.Module) -> None:
    """Refuse what holds no layers.

    Raises:
        TypeError: Not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{call}: model must be a torch.nn.Module, got {type(model).__name__}.")


def check_not_peft(call: str, model: nn.Module) -> None:
    """Refuse a model with PEFT's LoRA layers, whose parts are linear layers as well; PEFT is not imported for it.

    Raises:
        ValueError: It has one; the message names it.
    """
    module = sys.modules.get("peft.tuners.lora.layer")  # not imported so far, there is no layer of its making
    kind = module.LoraLayer if module else ()
    name = next((name for name, layer in model.named_modules() if isinstance(layer, kind)), None)
    if name is not None:
        raise ValueError(
            f"{call}: the model has PEFT LoRA layers ({name or 'it is one'}), in whose parts no others are put. "
            "To make those fast as they are: lora_kernels.patch_peft(model)."
        )


def check_backend(call: str, backend: str) -> None:
    """Refuse what `lora_linear` would refuse at the first call.

    Raises:
        ValueError: Not a backend.
    """
    checks.check_backend(call, backend, plan.BACKENDS)


def _forward(cls: Any) -> Callable[..., Any]:
    return stock_forward(cls.forward)


def _peft(module: str, required: bool = True) -> Any:
    try:
        return importlib.import_module(f"peft.tuners.lora.{module}")
    except ImportError as error:
        if not required:
            return None
        raise ImportError(f"lora_kernels.peft needs PEFT 0.19 or later: pip install 'peft>=0.19' ({error}).") from error
