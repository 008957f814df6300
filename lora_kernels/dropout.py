"""The dropout rule: the few numbers that the kernels and the reference must agree on.

Dropout acts on the input of the low-rank path only. Element `(m, k)` of an `[M, K]` input belongs to
byte `j = 4 * m * ceil(K / 32) + k // 8` of a packed mask and to bit `k % 8` of that byte. Rows are whole
words of 32 bits, lowest byte first. One call of Philox4x32-10 with the seed as key and `j` as counter returns
four 32-bit words: eight 16-bit halves, low half first. Half `k % 8` decides the element:

    keep(m, k)  <=>  half >= threshold(p),      threshold(p) = round(p * 65536), at most 65535 below p = 1

So one call decides eight elements and fills exactly one byte of the mask. Kept elements are scaled by
`keep_scale(p) = 65536 / (65536 - threshold(p))`, the exact inverse of the probability of being kept. So the
expectation over seeds is the input itself for every p below 1.

The kernels draw the mask by this rule in `kernels/_device.keep_bits`, which `shrink` calls. PyTorch's operators draw a
mask of their own in `torch_backend.draw_mask`. `autograd/noise.py` draws only the kernels' seeds, or the random words
of `draw_mask`.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox), doi:10.1145/2063384.2063405.
"""

import torch
from torch import Tensor

__all__ = ["PHILOX_ROUNDS", "draw_seed", "drop_probability", "keep_scale", "threshold"]

PHILOX_ROUNDS = 10
_STEPS = 1 << 16


def threshold(p: float) -> int:
    """Return the 16-bit threshold below which an element is dropped: `p` in steps of 1/65536, below 1 if `p` is."""
    return round(p * _STEPS) if p == 1 else min(round(p * _STEPS), _STEPS - 1)


def drop_probability(p: float) -> float:
    """Return the probability with which an element is dropped: `p` in steps of 1/65536, below 1 if `p` is."""
    return threshold(p) / _STEPS


def keep_scale(p: float) -> float:
    """Return the factor of kept elements: 1 / P(keep); 0 when no element is kept (p = 1)."""
    # Return early without dropout, because every call takes this path.
    if p == 0:
        return 1.0
    kept = _STEPS - threshold(p)
    return _STEPS / kept if kept else 0.0


def draw_seed(device: torch.device | str, count: int = 1) -> Tensor:
    """Draw seeds, an int64 tensor of `count` elements, from the device's own default torch generator.

    The seeds stay on the device, so there is no synchronisation, and every replay of a CUDA graph draws a new mask.
    `torch.manual_seed` and `torch.utils.checkpoint` govern the seeds as they govern `torch.nn.functional.dropout`.
    """
    return torch.empty(count, dtype=torch.int64, device=device).random_()
