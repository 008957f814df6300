"""Fused LoRA for PyTorch: y = x Wᵀ + scaling · dropout(x) Aᵀ Bᵀ + bias, forward and backward.

`patch_peft` makes a PEFT model fast in place, and `explain` says what became of each layer. The functions are
`lora_linear`, `lora_qkv` and `lora_projections` for several projections of one x, `lora_mlp` for a gated MLP, and
`lora_grouped_linear` for experts. The modules are `LoRALinear`, `LoRAQKV` and `LoRAMLP`, with `swap_linear`,
`save_adapter`, `load_adapter` and `merge_and_unload` for models made of them. `reference` computes the same in plain
PyTorch.
"""

from typing import Any

from lora_kernels import reference
from lora_kernels._version import __version__
from lora_kernels.functional import lora_grouped_linear, lora_linear, lora_mlp, lora_projections, lora_qkv
from lora_kernels.modules.blocks import LoRAMLP, LoRAQKV
from lora_kernels.modules.linear import LoRALinear
from lora_kernels.passes.layer import Projection

_FROM_PEFT = (
    "explain", "load_adapter", "merge_and_unload", "patch_peft", "save_adapter", "swap_linear", "unpatch_peft",
)  # fmt: skip

__all__ = [
    "LoRALinear", "LoRAMLP", "LoRAQKV", "Projection", "__version__", "lora_grouped_linear", "lora_linear", "lora_mlp",
    "lora_projections", "lora_qkv", "reference", *_FROM_PEFT,
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Load the names of `lora_kernels.peft` on first access."""
    if name in _FROM_PEFT:
        from lora_kernels import peft

        return getattr(peft, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
