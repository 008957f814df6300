"""Each operation for PyTorch's autograd: an eager Function and registered operators, both over `passes`."""

from lora_kernels.autograd import add, linear, mlp, projections

__all__ = ["add", "linear", "mlp", "projections"]
