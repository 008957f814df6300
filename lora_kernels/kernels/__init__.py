"""The three contractions on the GPU, a Triton kernel and a launcher each, and two of them at once.

Importing this loads Triton.
"""

from lora_kernels.kernels._launch import describe_path
from lora_kernels.kernels.matmul_expand import matmul_expand
from lora_kernels.kernels.shrink import shrink
from lora_kernels.kernels.shrink_wgrad import shrink_wgrad
from lora_kernels.kernels.wgrad import wgrad

__all__ = ["describe_path", "matmul_expand", "shrink", "shrink_wgrad", "wgrad"]
