"""Shrink and wgrad of one operand: ds = alpha · dy B and dB = dyᵀ s, from one read of dy where that pays.

At small ranks it is one launch of the wgrad kernel, whose tiles of dy serve both products. At larger ones the fp32
parts of ds weigh as much as a second read of dy, and it is two launches.
"""

import torch
from torch import Tensor

from lora_kernels.kernels._configs import shrink_wgrad_pays
from lora_kernels.kernels._launch import thin_rows
from lora_kernels.kernels.shrink import shrink
from lora_kernels.kernels.wgrad import wgrad

__all__ = ["shrink_wgrad"]


def shrink_wgrad(
    dy: Tensor, s: Tensor, lora_B: Tensor, alpha: float, out_dtype: torch.dtype, into: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Compute ds = alpha · dy B, `[M, r]`, in the dtype of dy, and dB = dyᵀ s, `[out, r]`, in `out_dtype`.

    With `into`, dB is added to that and None stands in its place.
    """
    if not shrink_wgrad_pays(s.shape[1]):
        return shrink(dy, lora_B.t(), alpha)[0], wgrad(dy, s, out_dtype, into=into)
    ds = thin_rows(dy, s.shape[1])
    return ds, wgrad(dy, s, out_dtype, into=into, shrink=(lora_B, ds, alpha))
