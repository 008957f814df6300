"""LoRA as modules: a linear layer, Q/K/V, a gated MLP."""

from lora_kernels.modules.blocks import LoRAMLP, LoRAQKV
from lora_kernels.modules.linear import LoRALinear

__all__ = ["LoRALinear", "LoRAMLP", "LoRAQKV"]
