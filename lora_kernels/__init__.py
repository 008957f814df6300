"""Fused LoRA for PyTorch: y = x Wᵀ + scaling · dropout(x) Aᵀ Bᵀ + bias, forward and backward.

`lora_linear` is the function, `LoRALinear` the module, `reference` the same in plain PyTorch.
"""

from lora_kernels import reference
from lora_kernels._version import __version__
from lora_kernels.functional import lora_linear
from lora_kernels.modules import LoRALinear

__all__ = ["LoRALinear", "__version__", "lora_linear", "reference"]
