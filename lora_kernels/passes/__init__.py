"""Forward and backward passes as contractions: the formulas, without autograd and without Triton.

Each operation has a file, and `layer` has the types that passes take. The contractions come from a backend
(`plan.contractions`).
"""

from lora_kernels.passes import add, grouped, layer, linear, mlp, projections

__all__ = ["add", "grouped", "layer", "linear", "mlp", "projections"]
