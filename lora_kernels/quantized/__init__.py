"""Frozen weights as they are stored, in 4 or 8 bits: what they are, where they come from, and their values.

`QuantizedWeight` stands where a weight `[out, in]` does: weights of bitsandbytes (NF4, FP4), FP8 weights with scales by
tensor, row or block, and int8 weights with scales by row. `lora_kernels.kernels.dequantize` has the formulas.
"""

from lora_kernels.quantized.weight import Nested, QuantizedWeight

__all__ = ["Nested", "QuantizedWeight"]
