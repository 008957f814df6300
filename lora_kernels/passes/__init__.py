"""Forward and backward as contractions: the formulas, without autograd and without Triton.

A file an operation; `layer` has the values that passes take. The contractions come from a backend
(`plan.contractions`).
"""

from lora_kernels.passes import add, layer, linear, mlp, projections

__all__ = ["add", "layer", "linear", "mlp", "projections"]
