"""The three contractions on the GPU: one Triton kernel and one launcher each. Importing this loads Triton."""

from lora_kernels.kernels._launch import describe_path
from lora_kernels.kernels.matmul_expand import matmul_expand
from lora_kernels.kernels.shrink import shrink
from lora_kernels.kernels.wgrad import wgrad

__all__ = ["describe_path", "matmul_expand", "shrink", "wgrad"]
