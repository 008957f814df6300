"""The three contractions on the GPU: a Triton kernel and a launcher each, fused pairs of them, and hybrids with cuBLAS.

Importing this package loads Triton.
"""

from lora_kernels.kernels._launch import (
    Slot,
    capability,
    describe_path,
    run_pass,
    state,
    thin_pitch,
    uses_tf32,
)
from lora_kernels.kernels.activation_wgrad import activation_wgrad
from lora_kernels.kernels.dequantize import dequantize
from lora_kernels.kernels.hybrid import strategy
from lora_kernels.kernels.matmul_expand import matmul_expand, matmul_expand_all
from lora_kernels.kernels.segments import segments
from lora_kernels.kernels.shrink import activate_shrink, draw_noise, outputs, shrink, shrink_all
from lora_kernels.kernels.shrink_wgrad import shrink_wgrad, stack
from lora_kernels.kernels.wgrad import wgrad, wgrad_all

__all__ = [
    "Slot", "activate_shrink", "activation_wgrad", "capability", "dequantize", "describe_path",
    "draw_noise",
    "matmul_expand", "matmul_expand_all", "outputs", "run_pass", "segments", "shrink", "shrink_all", "shrink_wgrad",
    "stack", "state", "strategy", "thin_pitch", "uses_tf32", "wgrad", "wgrad_all",
]  # fmt: skip
