"""Strategies for the two large products: the fused kernel, or the vendor's library with the thin product around it.

    y = p₀ q₀ᵀ + Σ_{i>0} keep · (pᵢ qᵢᵀ) + bias        p₀ [M, K] and q₀ [N, K] are the large ones

    strategy   large product    the thin one                                    extra bytes over fused
    fused      our kernel       in the same accumulator                         -
    beta1      the library      first, by our kernel; then added to (beta = 1)  2·M·N·e: y once more out and in
    padded     the library      as more columns of it: [p₀|p₁] [q₀|q₁]ᵀ         2·(M + N)·K·e: two copies
    joint      the library      dy [W|B] gives dy W and dy B, hence ds          2·N·K·e + 2·M·K·e - M·N·e

A fused kernel that is slower than the library by more than these bytes cost is the worse choice, so `plan` chooses by
shape. `padded` cannot mask; `joint` is for backward and brings its own ds.

Sources: beta = 1 over a pre-filled y as TransformerEngine's operation fuser does it; the choice among orders and
forms by shape: Cherniuk et al., RunLoRA, arXiv:2312.03415 (ideas). No code was taken.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lora_kernels.kernels.matmul_expand import Source, matmul_expand, matmul_expand_all

__all__ = ["beta1", "beta1_all", "joint", "library", "padded", "strategy"]

_ALIGN = 8  # elements: rows of a padded operand keep to 16 bytes in 16 bits, which the library's fast kernels want


def beta1(sources: Sequence[Source], bias: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
    """Compute what `matmul_expand` computes: all but the first product by it, then the first added in place."""
    (p, q), *rest = sources
    return matmul_expand(rest, bias, keep).addmm_(p, q.t())


def beta1_all(
    outputs: Sequence[tuple[Sequence[Source], Tensor | None]], masked: Sequence[tuple[Tensor, Tensor, Tensor]] = (),
    wide: int = 1,
) -> list[Tensor]:  # fmt: skip
    """Compute what `matmul_expand_all` computes: all but the `wide` products by it, then these added in place."""
    thin = [(sources[wide:], bias) for sources, bias in outputs]
    adapted = [i for i, (sources, _) in enumerate(thin) if sources or masked]
    ys = dict(zip(adapted, matmul_expand_all([thin[i] for i in adapted], masked, 1), strict=True)) if adapted else {}
    results = []
    for i, (sources, bias) in enumerate(outputs):
        large = list(sources[:wide])
        y = ys[i] if i in ys else library([large.pop(0)], bias)
        for p, q in large:
            y.addmm_(p, q.t())
        results.append(y)
    return results


def library(sources: Sequence[Source], bias: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
    """Compute y = p qᵀ + bias of a single source, which no thin product goes with."""
    ((p, q),) = sources
    return torch.mm(p, q.t()) if bias is None else torch.addmm(bias, p, q.t())


def padded(sources: Sequence[Source], bias: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
    """Compute what `matmul_expand` computes, in one product of operands laid side by side.

    Raises:
        ValueError: There is a mask, which belongs to one product and not to the sum.
    """
    if keep is not None:
        raise ValueError("padded: keep must be None; a mask cannot be applied to one part of a product.")
    p, q = (_side_by_side([pair[side] for pair in sources]) for side in (0, 1))
    return torch.mm(p, q.t()) if bias is None else torch.addmm(bias, p, q.t())


def joint(
    dy: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, alpha: float, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute dx = dy W + keep · (ds A), `[M, in]`, and ds = alpha · dy B, `[M, r]`, from one product dy [W|B].

    The rows of dx are those of the product, r and a few elements apart, unless there is a mask. ds is rounded before
    and after it is scaled.
    """
    both = torch.mm(dy, _side_by_side([weight, lora_B.to(dy.dtype)]))
    (_, inner), rank = weight.shape, lora_B.shape[1]
    dx, ds = both[:, :inner], both[:, inner : inner + rank] * alpha
    if keep is None:
        return dx.addmm_(ds, lora_A.to(dy.dtype)), ds
    return matmul_expand([(ds, lora_A.t())], None, keep).add_(dx), ds


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Lay matrices side by side, `[rows, Σ cols]`, with columns of zeros up to a multiple of `_ALIGN`."""
    missing = -sum(t.shape[1] for t in parts) % _ALIGN
    return torch.cat([*parts, parts[0].new_zeros(parts[0].shape[0], missing)], 1)


def strategy(name: str, place: int | None = None) -> Callable[..., Tensor]:
    """What computes a large product by a strategy; for "fused" in the tile at `place`, or else the rule's."""
    if name == "fused" and place is not None:
        return functools.partial(matmul_expand, config=place)
    return _STRATEGIES[name]


_STRATEGIES: dict[str, Callable[..., Tensor]] = {
    "fused": matmul_expand, "beta1": beta1, "padded": padded, "joint": joint,
}  # fmt: skip
