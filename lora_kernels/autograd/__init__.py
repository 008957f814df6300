"""Each operation for PyTorch's autograd: an eager Function and registered operators, both over `passes`."""

from lora_kernels.autograd import add, grouped, linear, mlp, projections

__all__ = ["add", "grouped", "linear", "mlp", "projections"]
