"""Shrink and wgrad of one operand: ds = alpha · dy B and dB = dyᵀ s, from one read of dy where that pays.

At small ranks, one launch of the wgrad kernel computes both, because its tiles of dy serve both products. At larger
ranks there are two launches, because the fp32 parts of ds weigh as much as a second read of dy.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels.kernels._configs import shrink_wgrad_pays
from lora_kernels.kernels._launch import Slot
from lora_kernels.kernels._wgrad_config import WgradConfig
from lora_kernels.kernels.segments import Segments
from lora_kernels.kernels.shrink import shrink_all
from lora_kernels.kernels.wgrad import ThinProduct, settle, wgrad

__all__ = ["shrink_wgrad", "stack"]


def shrink_wgrad(
    dy: Tensor, s: Tensor, lora_B: Tensor, alpha: float, out_dtype: torch.dtype, into: Tensor | None = None,
    ds: Tensor | None = None, config: WgradConfig | None = None, slot: Slot | None = None,
    segments: Segments | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Compute ds = alpha · dy B, `[M, r]`, in the dtype of dy, and dB = dyᵀ s, `[out, r]`, in `out_dtype`.

    Args:
        dy: `[M, out]`.
        s: `[M, r]`.
        lora_B: B, `[out, r]`.
        alpha: Multiplies ds.
        out_dtype: Dtype of dB.
        into: A tensor to which dB is added; None is then returned for dB.
        ds: A result of `stack` to write ds to, or None; only for ranks up to 32, which `stack` serves.
        config: Tile of the one launch to use instead of the rule's.
        slot: A place of a plan that keeps the settled launches; all its calls must have tensors of one kind.
        segments: The groups of the rows; B is then a stack `[G, out, r]`, and so is dB.
    """
    settled = slot and slot.settled
    if not settled:
        if not config and not shrink_wgrad_pays(s.shape[1]):
            if ds is None:
                of_ds, of_dB = (slot.part("ds"), slot.part("dB")) if slot else (None, None)
                (ds,), _ = shrink_all(dy, ((lora_B.mT, alpha, 0.0),), slot=of_ds, segments=segments)
                return ds, wgrad(dy, s, out_dtype, into=into, slot=of_dB, segments=segments)
            raise ValueError(f"shrink_wgrad: ds is for ranks that one read of dy serves, and rank {s.shape[1]} is not.")
        product = ThinProduct(s, out_dtype, False, None, into, lora_B, ds)
        settled = settle(slot, dy, (product,), config=config, segments=segments)
    (d_lora_B,), (ds,) = settled(dy, (s,), (None,), (into,), (lora_B,), (ds,), (alpha,), segments=segments)
    return ds, d_lora_B


def stack(dy: Tensor, adapters: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], Tensor]:
    """Allocate the ds of several adapters side by side and stack their A, for dx += ds A of all in one product.

    Args:
        dy: `[M, *]`.
        adapters: A `[rᵢ, K]` of each, in any dtypes; each rank is a multiple of 16 bytes in the dtype of dy.

    Returns:
        ds `[M, Σrᵢ]` in the dtype of dy; its columns `[M, rᵢ]`, for `shrink_wgrad` to fill; all A `[Σrᵢ, K]`.
    """
    ranks = [a.shape[0] for a in adapters]
    ds, lora_A = dy.new_empty(dy.shape[0], sum(ranks)), dy.new_empty(sum(ranks), adapters[0].shape[1])
    return ds, list(ds.split(ranks, 1)), torch.cat(adapters, out=lora_A)
