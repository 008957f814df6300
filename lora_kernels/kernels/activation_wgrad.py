"""The backward pass of an activation, with the gradients of the adapters next to it, from one read of g, u and dh.

    du = dh · a(g),  dg = dh · u · a'(g)          stored, for the dx of the layers before
    dA = dsᵀ (keep · h)                           of the layer after; h = a(g) · u is made again, not stored
    dsᵢ = alphaᵢ · dgᵢ Bᵢ,  dBᵢ = dgᵢᵀ sᵢ         of the layers before, dgᵢ one of dg and du

One launch of the wgrad kernel has a row for each of the up to three products. At ranks above 16 each ds comes from a
shrink of its own, because its parts would weigh as much as another read.
"""

from torch import Tensor

from lora_kernels.activations import After, Before
from lora_kernels.kernels._activation import Activation
from lora_kernels.kernels._configs import shrink_wgrad_pays
from lora_kernels.kernels._launch import Slot
from lora_kernels.kernels.shrink import shrink
from lora_kernels.kernels.wgrad import DGATE, DUP, ThinProduct, settle

__all__ = ["activation_wgrad"]


def activation_wgrad(
    gate: Tensor, up: Tensor | None, dh: Tensor, activation: str, after: After | None, *before: Before | None,
    slot: Slot | None = None,
) -> tuple[list[Tensor], Tensor | None, list[tuple[Tensor | None, Tensor | None]]]:  # fmt: skip
    """Compute dg and du from dh, `[M, W]`, and the adapters' ds, dA and dB, in one pass.

    Args:
        gate: g, `[M, W]`.
        up: u, `[M, W]`, or None where h = a(g).
        dh: `[M, W]`, contiguous. The caller gives its memory up, because the last of dg and du may be written there.
        activation: "silu", "gelu", "gelu_tanh" or "relu2".
        after: Operands of dA, or None.
        *before: Operands of ds and dB of the gate and, if there is one, of the up projection; None for neither.
        slot: A place of a plan that keeps the settled launches, or None.

    Returns:
        dg and, with `up`, du; dA `[r, W]` or None; for each of `before` ds `[M, r]` and dB `[W, r]`, or None. A result
        that was added to a gradient is None.
    """
    rows, width = gate.shape
    ranks = [t.shape[1] for one in before if one for t in one[:2] if t is not None]
    # Reuse the memory of dh only where one program reads each tile of dh. Above 64 columns of a thin operand, several
    # programs read the same dh.
    reused = max([*ranks, after.ds.shape[1] if after else 0], default=0) <= 64
    wides = [gate.new_empty(rows, width) for _ in before[1:]] + [dh if reused else gate.new_empty(rows, width)]
    products = []
    if after is not None:
        products.append(ThinProduct(after.ds, after.out_dtype, True, after.keep, after.into))
    for one, which in zip(before, (DGATE, DUP), strict=False):
        if one is not None and one.s is not None:
            b = one.lora_B if shrink_wgrad_pays(one.s.shape[1], activated=True) else None
            products.append(ThinProduct(one.s, one.out_dtype, False, None, one.into, b, None, one.alpha, which))
    a = Activation(activation, up, dh, wides[0], wides[1] if up is not None else None)
    settled = (slot and slot.settled) or settle(slot, gate, products, a)
    thins, _, _, keeps, intos, bs, dss, alphas, _ = zip(*products, strict=True) if products else _NO_PRODUCT
    made = iter(zip(*settled(gate, thins, keeps, intos, bs, dss, alphas, a), strict=True))
    dA = next(made)[0] if after is not None else None
    results: list[tuple[Tensor | None, Tensor | None]] = []
    for i, (one, wide) in enumerate(zip(before, wides, strict=True)):
        dB, ds = next(made) if one is not None and one.s is not None else (None, None)
        if ds is None and one is not None and one.lora_B is not None:
            ds = shrink(wide, one.lora_B.t(), one.alpha, slot=slot.part(i) if slot else None)[0]
        results.append((ds, dB))
    return wides, dA, results


# In place of the fields of products.
_NO_PRODUCT = None, (), (), None, (), None, (), None, ()
