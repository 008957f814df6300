"""The public functions: each checks its arguments, applies autocast, chooses a backend and calls the backend.

The layers below check no arguments.
"""

from lora_kernels.functional.add import lora_add
from lora_kernels.functional.grouped import lora_grouped_linear
from lora_kernels.functional.linear import lora_linear
from lora_kernels.functional.mlp import lora_mlp
from lora_kernels.functional.projections import lora_projections, lora_qkv

__all__ = ["lora_add", "lora_grouped_linear", "lora_linear", "lora_mlp", "lora_projections", "lora_qkv"]
