"""Facts that several floors must agree on."""

import torch

__all__ = ["DTYPES", "HALF", "MAX_ADAPTERS", "MAX_OUTPUTS", "ONE_READ_RANK", "REFERENCE"]

# The dtypes of the kernels, by their short names.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HALF = (torch.bfloat16, torch.float16)
# Outputs that one launch of `matmul_expand` computes at most, because its signature has so many.
MAX_OUTPUTS = 4
# Adapters that one layer adds at most: with its weight they are the sources of a sum, of which a launch takes eight.
MAX_ADAPTERS = 4
# Up to this rank ds and dB come from one read of dy. Above, the parts of ds weigh as much as a second read.
ONE_READ_RANK = 32
# What a call passes as its backend to be computed by the formulas of `reference`, which are no backend.
REFERENCE = "reference"
