"""The three contractions in PyTorch's own operators: the "torch" backend, for CPUs and whatever Triton cannot run.

Same functions and same meaning as the launchers in `lora_kernels.kernels`; see there for the formulas. What sets
this apart from the slow chain is that sums are accumulated in place, the scaling rides in a matmul's alpha, no
dropped copy of x outlives the call that needs it, and the mask is one byte an element from PyTorch's own generator.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels.dropout import threshold

__all__ = ["draw_mask", "draw_noise", "matmul_expand", "outputs", "shrink", "shrink_wgrad", "wgrad"]

_CHUNK = 4096  # summed terms upcast at a time where a half-precision product must come out in fp32


def draw_mask(shape: torch.Size, dropout_p: float, device: torch.device, noise: Tensor | None = None) -> Tensor:
    """Draw a dropout mask, bool, True where kept, or make it of the `noise` that was drawn.

    Kept with the probability 1 - threshold(p) / 65536, like the kernels' mask.
    """
    drop, numel = threshold(dropout_p), shape.numel()
    if drop == 65536:  # more than int16 can compare with
        return torch.zeros(shape, dtype=torch.bool, device=device)
    noise = _words(numel, device) if noise is None else noise
    keep = torch.empty(numel, dtype=torch.uint8, device=device)
    return torch.ge(noise.view(torch.int16)[:numel], drop - 32768, out=keep).view(shape).view(torch.bool)


def draw_noise(x: Tensor) -> Tensor:
    """Draw what decides the mask of x, from the device's default torch generator: 16 bits an element, in int64."""
    return _words(x.numel(), x.device)


def _words(numel: int, device: torch.device) -> Tensor:
    # one draw for four elements: on a CPU several times faster than `bernoulli_`, one draw an element
    return torch.empty(-(-numel // 4), dtype=torch.int64, device=device).random_(-(2**63), None)


def outputs(x: Tensor, rank: int, dropout_p: float) -> tuple[Tensor, Tensor | None]:
    """Allocate what `shrink` returns, s `[M, R]` and keep `[M, K]`, for shapes and strides alone."""
    return x.new_empty(x.shape[0], rank), x.new_empty(x.shape, dtype=torch.bool) if dropout_p > 0 else None


def shrink(
    x: Tensor, a: Tensor, alpha: float, dropout_p: float = 0.0, *, noise: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Compute s = alpha · (x · keep) aᵀ, `[M, R]`, and draw keep, bool `[M, K]`, when `dropout_p` > 0.

    With `noise`, from an earlier `draw_noise(x)`, nothing is drawn: a pure function.
    """
    keep = None
    if dropout_p > 0:
        keep = draw_mask(x.shape, dropout_p, x.device, noise)
        x = x * _factors(keep)
    return _thin_product(x, a.t(), alpha, x.dtype), keep


def matmul_expand(
    sources: Sequence[tuple[Tensor, Tensor]], bias: Tensor | None = None, keep: Tensor | None = None
) -> Tensor:
    """Compute y = Σᵢ pᵢ qᵢᵀ + bias, `[M, N]`; `keep` (bool `[M, N]`) masks the last product."""
    (p, q), *rest = sources
    y = torch.mm(p, q.t()) if bias is None else torch.addmm(bias, p, q.t())
    masked = rest.pop() if keep is not None else None
    for p, q in rest:
        y.addmm_(p, q.t())
    if masked is not None:
        p, q = masked
        y.add_(torch.mm(p, q.t()).mul_(_factors(keep)))
    return y


def wgrad(
    left: Tensor, right: Tensor, out_dtype: torch.dtype, keep: Tensor | None = None, *,
    into: Tensor | None = None, ready: bool = False,
) -> Tensor | None:  # fmt: skip
    """Compute g = leftᵀ (right · keep), `[C, D]`, in `out_dtype` without rounding it to a narrower one first.

    With `into`, g is added to that and nothing is returned. `ready` is for kernels, which may begin early.
    """
    if keep is not None:
        right = right * _factors(keep)
    if into is not None and left.dtype == out_dtype:
        into.addmm_(left.t(), right)
        return None
    g = _thin_product(left.t(), right, 1.0, out_dtype)
    if into is None:
        return g
    into.add_(g)
    return None


def shrink_wgrad(
    dy: Tensor, s: Tensor, lora_B: Tensor, alpha: float, out_dtype: torch.dtype, into: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Compute ds = alpha · dy B, `[M, r]`, and dB = dyᵀ s, `[out, r]`, in `out_dtype`, or add it to `into`."""
    return shrink(dy, lora_B.t(), alpha)[0], wgrad(dy, s, out_dtype, into=into)


def _thin_product(left: Tensor, right: Tensor, alpha: float, out_dtype: torch.dtype) -> Tensor:
    """Compute alpha · left @ right, rounded once, to `out_dtype`."""
    if out_dtype == left.dtype:
        if alpha == 1:
            return torch.mm(left, right)
        # alpha rides inside the product; with beta=0 the first argument is not read
        return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=alpha)
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=out_dtype).mul_(alpha)
    product = torch.mm(left[:, :_CHUNK].float(), right[:_CHUNK].float())
    for k in range(_CHUNK, left.shape[1], _CHUNK):
        product.addmm_(left[:, k : k + _CHUNK].float(), right[k : k + _CHUNK].float())
    return (product if alpha == 1 else product.mul_(alpha)).to(out_dtype)


def _factors(keep: Tensor) -> Tensor:
    """The mask as bytes of 0 and 1: a CPU multiplies by bytes several times faster than by bools."""
    return keep.view(torch.uint8)
