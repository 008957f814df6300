"""PEFT models made fast in place, and adapters of `LoRALinear` in PEFT's own files.

    patch_peft(model)        every LoRA layer of a PEFT model takes the fused path where it can, with those that belong
                             together in one call; says where it cannot
    unpatch_peft(model)      undo it
    explain(model)           tables of its LoRA layers and blocks: how each is computed, and the exact reason
    accelerated()            all PEFT models, those built later as well, while in the `with` block
    accelerate(on=True)      the same until switched off
    swap_linear(model, ...)  put `LoRALinear` layers into a model, in PEFT's words; `merge_and_unload` takes them out
    save_adapter, load_adapter   adapter_model.safetensors and adapter_config.json, as PEFT writes and reads them

Importing this imports neither PEFT nor safetensors; the first call that needs one does.
"""

from lora_kernels.peft.adapters import load_adapter, save_adapter
from lora_kernels.peft.patching import accelerate, accelerated, patch_peft, unpatch_peft
from lora_kernels.peft.reasons import BlockReport, LayerReport, Report, explain
from lora_kernels.peft.swap import merge_and_unload, swap_linear

__all__ = [
    "BlockReport", "LayerReport", "Report", "accelerate", "accelerated", "explain", "load_adapter", "merge_and_unload",
    "patch_peft", "save_adapter", "swap_linear", "unpatch_peft",
]  # fmt: skip
