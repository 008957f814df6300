"""Strategies for the two large products: the fused kernel, or the vendor's library plus the thin product.

    y = p₀ q₀ᵀ + Σ_{i>0} keep · (pᵢ qᵢᵀ) + bias        p₀ [M, K] and q₀ [N, K] are the large ones

    strategy   large product    the thin one                                    extra bytes over fused
    fused      our kernel       in the same accumulator                         -
    beta1      the library      first, by our kernel; then added to (beta = 1)  2·M·N·e: y once more out and in
    padded     the library      as more columns of it: [p₀|p₁] [q₀|q₁]ᵀ         2·(M + N)·K·e: two copies
    joint      the library      dy [W|B] gives dy W and dy B, hence ds          2·N·K·e + 2·M·K·e - M·N·e

`plan` chooses by shape, because a fused kernel is the worse choice where the library is faster by more than these bytes
cost. `padded` cannot mask. `joint` is for backward and computes ds as well. Each function takes a `slot` of a plan,
which keeps the settled launch of its kernel.

Sources: beta = 1 over a pre-filled y, as in TransformerEngine's operation fuser; the choice among orders and forms by
shape: Cherniuk et al., RunLoRA, arXiv:2312.03415 (ideas). No code was taken.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels.kernels._launch import Slot
from lora_kernels.kernels.matmul_expand import Masked, Output, matmul_expand, matmul_expand_all

__all__ = ["beta1", "joint", "padded_product", "strategy"]

# Elements. Rows of a padded 16-bit operand stay on 16 bytes, because the library's fast kernels need that alignment.
_ALIGN = 8


def beta1(
    outputs: Sequence[Output], masked: Sequence[Masked] = (), wide: int = 1, slot: Slot | None = None
) -> list[Tensor]:
    """Compute the results of `matmul_expand_all`: the kernel sums all but the `wide` ones, the library adds these."""
    thin = [(sources[wide:], bias) for sources, bias in outputs]
    adapted = [i for i, (sources, _) in enumerate(thin) if sources or masked]
    made = matmul_expand_all([thin[i] for i in adapted], masked, 1, slot=slot) if adapted else []
    ys = dict(zip(adapted, made, strict=True))
    results = []
    for i, (sources, bias) in enumerate(outputs):
        large = list(sources[:wide])
        y = ys[i] if i in ys else _product(*large.pop(0), bias)
        for p, q in large:
            y.addmm_(p, q.t())
        results.append(y)
    return results


def padded_product(
    outputs: Sequence[Output], masked: Sequence[Masked] = (), wide: int = 1, slot: Slot | None = None
) -> list[Tensor]:
    """Compute the result of `matmul_expand_all` for one output, in one product of operands laid side by side.

    Raises:
        ValueError: There is a mask; a mask applies to one product and not to the sum.
    """
    if masked:
        raise ValueError("padded: there must be no mask; a mask cannot be applied to one part of a product.")
    ((sources, bias),) = outputs
    p, q = (_side_by_side([pair[side] for pair in sources]) for side in (0, 1))
    return [_product(p, q, bias)]


def _product(p: Tensor, q: Tensor, bias: Tensor | None) -> Tensor:
    """Compute p qᵀ + bias by the library."""
    return torch.mm(p, q.t()) if bias is None else torch.addmm(bias, p, q.t())


def joint(
    dy: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, alpha: float, keep: Tensor | None,
    slot: Slot | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute dx = dy W + keep · (ds A), `[M, in]`, and ds = alpha · dy B, `[M, r]`, from one product dy [W|B].

    Without a mask, dx is a view of the product, so its row stride is `in` plus r and a few elements. ds is rounded
    before and after the scaling.
    """
    both = torch.mm(dy, _side_by_side([weight, lora_B.to(dy.dtype)]))
    (_, inner), rank = weight.shape, lora_B.shape[1]
    dx, ds = both[:, :inner], both[:, inner : inner + rank] * alpha
    if keep is None:
        return dx.addmm_(ds, lora_A.to(dy.dtype)), ds
    return matmul_expand([(ds, lora_A.t())], None, keep, slot=slot).add_(dx), ds


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Lay matrices side by side, `[rows, Σ cols]`, with columns of zeros up to a multiple of `_ALIGN`."""
    missing = -sum(t.shape[1] for t in parts) % _ALIGN
    return torch.cat([*parts, parts[0].new_zeros(parts[0].shape[0], missing)], 1)


def strategy(name: str, place: int | None = None) -> Callable[..., Any]:
    """Return the function that computes large products by a strategy; "fused" takes the tile at `place`, if given."""
    if name == "fused" and place is not None:
        return functools.partial(matmul_expand_all, config=place)
    return _STRATEGIES[name]


_STRATEGIES: dict[str, Callable[..., Any]] = {
    "fused": matmul_expand_all, "beta1": beta1, "padded": padded_product, "joint": joint,
}  # fmt: skip
