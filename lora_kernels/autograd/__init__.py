"""How PyTorch sees each operation: an eager Function and registered operators, side by side, over `passes`."""

from lora_kernels.autograd import add, linear, mlp, projections

__all__ = ["add", "linear", "mlp", "projections"]
