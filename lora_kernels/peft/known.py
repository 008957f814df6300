"""PEFT's layer classes that can be accelerated: their forward computes `base(x) + Σ scaling · B A dropout(x)`."""

import functools
import importlib
import sys
from typing import Any

from torch import nn

from lora_kernels import plan
from lora_kernels.functional import checks
from lora_kernels.peft.forwards import is_defined_by, replaced_member, stock_forward

__all__ = [
    "check_backend", "check_model", "check_no_wrapper", "check_not_peft", "classes", "imported_lora_layer",
    "is_supported", "lora_layer", "multihead_attention", "param_wrapper",
]  # fmt: skip

# From the source of PEFT 0.19 to 0.21. These classes differ (cast, clone, when the sum is rounded) by at most one
# rounding.
_CLASSES = (
    ("layer", "Linear"),
    ("bnb", "Linear8bitLt"), ("bnb", "Linear4bit"), ("gptq", "GPTQLoraLinear"), ("awq", "AwqLoraLinear"),
    ("aqlm", "AqlmLoraLinear"), ("eetq", "EetqLoraLinear"), ("hqq", "HqqLoraLinear"),
    ("torchao", "TorchaoLoraLinear"), ("inc", "IncLoraLinear"),
)  # fmt: skip


def lora_layer() -> type[Any]:
    """Return PEFT's mix-in that all LoRA layers share.

    Raises:
        ImportError: PEFT is not installed.
    """
    return _peft("layer").LoraLayer


def imported_lora_layer() -> tuple[type[Any], ...]:
    """Return `lora_layer` in a tuple, for `isinstance`; () if PEFT is not imported, because no model then has one."""
    module = sys.modules.get("peft.tuners.lora.layer")
    return (module.LoraLayer,) if module else ()


def multihead_attention() -> type[Any]:
    """Return PEFT's layer that merges its adapters around the call of `nn.MultiheadAttention`."""
    return _peft("layer").MultiheadAttention


def param_wrapper() -> Any:
    """Return PEFT's wrapper of a parameter, as of a stack of experts; () if this PEFT has none."""
    return getattr(_peft("layer"), "ParamWrapper", ())


@functools.cache
def classes() -> tuple[type[nn.Module], ...]:
    """Return the known classes that this PEFT has; some classes exist only if their quantisation library does."""
    found = (getattr(_peft(module, required=module == "layer"), name, None) for module, name in _CLASSES)
    # Seen now, because a compiler that traces a first call could not look these up.
    replaced_member(_peft("layer").Linear)
    return tuple(cls for cls in found if cls is not None)


def is_supported(cls: type) -> bool:
    """Return whether a class has the forward that PEFT defines for a known class, its own or inherited."""
    forward = stock_forward(cls.forward)  # type: ignore[attr-defined]
    return any(is_defined_by(forward, other) for other in classes())


def check_model(call: str, model: nn.Module) -> None:
    """Refuse a model that is not a module.

    Raises:
        TypeError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{call}: model must be a torch.nn.Module, got {type(model).__name__}.")


def check_not_peft(call: str, model: nn.Module) -> None:
    """Refuse a model with PEFT's LoRA layers, because their parts are linear layers as well; do not import PEFT.

    Raises:
        ValueError: The model has a PEFT LoRA layer, or a module that PEFT has wrapped; the message names it.
    """
    kinds = imported_lora_layer()
    name = next((name for name, layer in model.named_modules() if isinstance(layer, kinds)), None)
    if name is not None:
        raise ValueError(
            f"{call}: the model has PEFT LoRA layers ({name or 'it is one'}), in whose parts no others are put. "
            "To make those fast as they are: lora_kernels.patch_peft(model)."
        )
    check_no_wrapper(call, model)


def check_no_wrapper(call: str, model: nn.Module) -> None:
    """Refuse a model with modules that PEFT has wrapped to train them; do not import PEFT.

    Raises:
        ValueError: A module is wrapped, for `modules_to_save` or `trainable_token_indices`; the message names it.
    """
    module = sys.modules.get("peft.utils.other")
    kind = getattr(module, "AuxiliaryTrainingWrapper", ())
    for name, wrapper in model.named_modules():
        if isinstance(wrapper, kind):
            raise ValueError(
                f"{call}: {name or 'the model'} is a {type(wrapper).__name__} of PEFT's, which holds a module twice. "
                "Put the module that is trained in its place; swap_linear(..., modules_to_save=[...]) trains it."
            )


def check_backend(call: str, backend: str) -> None:
    """Refuse a backend that `lora_linear` would refuse at the first call.

    Raises:
        ValueError: `backend` is not a known name.
    """
    checks.check_backend(call, backend, plan.BACKENDS)


def _peft(module: str, required: bool = True) -> Any:
    try:
        return importlib.import_module(f"peft.tuners.lora.{module}")
    except ImportError as error:
        if not required:
            return None
        raise ImportError(f"lora_kernels.peft needs PEFT 0.19 or later: pip install 'peft>=0.19' ({error}).") from error
