"""Linear layers of other libraries whose weight is a `QuantizedWeight`: recognise them, and read the weight.

Classes are told by their names, so that no library has to be there. A subclass counts as its base.

    bitsandbytes   Linear4bit    NF4 and FP4: the weight has a `quant_state`
    transformers   FP8Linear     FP8 e4m3: `weight`, `weight_scale_inv`, and `block_size`
"""

from typing import Any

from lora_kernels.quantized.weight import QuantizedWeight

__all__ = ["BITSANDBYTES", "FP8", "kind_of", "read"]

BITSANDBYTES = ("bitsandbytes.nn.modules", "Linear4bit")
FP8 = ("transformers.integrations.finegrained_fp8", "FP8Linear")


def kind_of(layer: object) -> type[Any] | None:
    """Return the known class that a layer is of, or None."""
    known = BITSANDBYTES, FP8
    return next((kind for kind in type(layer).__mro__ if (kind.__module__, kind.__qualname__) in known), None)


def read(layer: Any) -> QuantizedWeight:
    """Return the weight of a layer that has the fields of a known one.

    Raises:
        TypeError, ValueError: As `QuantizedWeight.from_bitsandbytes` and `from_fp8`.
    """
    if hasattr(layer, "weight_scale_inv"):
        return QuantizedWeight.from_fp8(layer.weight, layer.weight_scale_inv, layer.block_size)
    return QuantizedWeight.from_bitsandbytes(layer)
