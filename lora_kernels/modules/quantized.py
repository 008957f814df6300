"""The quantised weight of a `LoRALinear`: the parameters of the layer that it replaces, as that layer has them.

The parameters are the very ones of the layer, so that the library that made them moves, saves and casts them. The layer
itself is kept as a shell without parameters: `merge_and_unload` fills it again.
"""

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.quantized import layers

__all__ = ["adopt", "fill", "merged_weight", "put", "save_state", "take_state"]

# Between a parameter's name and those of the parts of its quant_state, in bitsandbytes' state dicts.
_STATE = "weight."


def adopt(layer: Any, source: Any) -> None:
    """Give a layer the parameters of a quantised one, frozen, and keep the rest of that one."""
    # Read the weight, so that what cannot be read is refused with nothing changed. transformers makes FP8 weights that
    # require grad, and a weight is read frozen.
    trained = [p for p in source._parameters.values() if p is not None and p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        layers.read(source)
    except (TypeError, ValueError):
        for p in trained:
            p.requires_grad_(True)
        raise
    for name, p in source._parameters.items():
        layer.register_parameter(name, p)
    layer.block_size = getattr(source, "block_size", None)
    # FSDP1 makes plain parameters of weights, and the state of the layer is then the one that is read.
    layer.quant_state = getattr(source, "quant_state", None)
    shell = copy.copy(source)
    shell._parameters = dict.fromkeys(source._parameters)
    # In a list the shell is no child.
    layer._shell = [shell]


def fill(layer: Any) -> nn.Module:
    """Return the layer that was adopted, with the parameters that `layer` has now."""
    shell = copy.copy(layer._shell[0])
    shell._parameters = {name: layer._parameters[name] for name in shell._parameters}
    if layer.quant_state is not None:
        shell.quant_state = getattr(layer.weight, "quant_state", layer.quant_state)
    return shell.train(layer.training)


def merged_weight(layer: Any, update: Tensor) -> nn.Parameter:
    """Return the weight with an update added, quantised again as PEFT does for such a layer.

    Raises:
        TypeError: The weight is FP8, for which neither PEFT nor transformers has a way to merge.
    """
    if hasattr(layer, "weight_scale_inv"):
        raise TypeError("LoRALinear.merge: an FP8 weight cannot take the update; dequantise the model first.")
    warnings.warn(
        "LoRALinear.merge: the sum is quantised again, to 4 bits, and rounded; unmerge() restores the weight exactly.",
        stacklevel=4,
    )
    weight = layer.weight
    dense = layers.read(layer).dequantize(torch.float32).add_(update)
    made = type(weight)(
        dense.to("cpu", weight.quant_state.dtype), requires_grad=False, blocksize=weight.blocksize,
        compress_statistics=weight.compress_statistics, quant_type=weight.quant_type,
        quant_storage=weight.quant_storage,
    )  # fmt: skip
    return made.to(weight.device)


def put(layer: Any, weight: nn.Parameter) -> None:
    """Give a layer another quantised weight, and its state, which is read where FSDP1 makes plain parameters."""
    layer.weight = weight
    layer.quant_state = getattr(weight, "quant_state", None)


def save_state(layer: Any, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
    """Add the parts of a weight's quant_state to a state dict, as bitsandbytes does."""
    state = getattr(layer.weight, "quant_state", None)
    for name, t in state.as_dict(packed=True).items() if state is not None else ():
        destination[f"{prefix}{_STATE}{name}"] = t if keep_vars else t.detach()


def take_state(layer: Any, state_dict: dict[str, Any], prefix: str) -> None:
    """Read the weight that `save_state` has written, and take its keys out of a state dict.

    Raises:
        RuntimeError: The state dict has a packed weight without its quant_state, and the present one would not fit it.
    """
    start = prefix + _STATE
    parts = {key.removeprefix(start): state_dict.pop(key) for key in [*state_dict] if key.startswith(start)}
    packed = state_dict.get(f"{prefix}weight")
    if packed is not None and not parts and not hasattr(layer, "weight_scale_inv"):
        raise RuntimeError(
            f"LoRALinear: the state dict has {prefix}weight, which is packed, and no {start}absmax and the like, "
            "by which it is read. Save the whole state_dict() of the layer."
        )
    if parts and packed is not None:
        kind, device = type(layer.weight), layer.weight.device
        put(layer, kind.from_prequantized(packed, parts, device=device))
