"""Make PEFT models fast in place; read and write adapters of `LoRALinear` in PEFT's own files.

    patch_peft(model)        let every LoRA layer of a PEFT model take the fused path if possible, with layers that
                             belong together in one call; report the layers that cannot
    unpatch_peft(model)      undo `patch_peft`
    explain(model)           print tables of the LoRA layers and blocks: how each is computed, and the exact reason
    accelerated()            accelerate all PEFT models, also those built later, inside a `with` block
    accelerate(on=True)      the same until switched off
    swap_linear(model, ...)  put `LoRALinear` layers into a model, in PEFT's words; `merge_and_unload` removes them
    save_adapter, load_adapter   adapter_model.safetensors and adapter_config.json, as PEFT writes and reads them

An import of this package imports neither PEFT nor safetensors; the first call that needs one of them does.
"""

from lora_kernels.peft.adapters import load_adapter, save_adapter
from lora_kernels.peft.patching import accelerate, accelerated, patch_peft, unpatch_peft
from lora_kernels.peft.report import BlockReport, LayerReport, Report, explain
from lora_kernels.peft.swap import merge_and_unload, swap_linear

__all__ = [
    "BlockReport", "LayerReport", "Report", "accelerate", "accelerated", "explain", "load_adapter", "merge_and_unload",
    "patch_peft", "save_adapter", "swap_linear", "unpatch_peft",
]  # fmt: skip
