"""Bytes that `lora_add` and its rivals move: the formulas of `cost.layer` without the base layer.

y = base + s Bᵀ reads base and writes y where a layer has a product; dx is the low-rank term alone, dbase is dy itself.
`torch.addmm` copies base before it sums into the copy: two launches.
"""

from collections.abc import Callable

from lora_kernels.bench.cost import layer as layer_cost
from lora_kernels.bench.cost.layer import Cost, Size

__all__ = ["COSTS", "flops"]


def flops(m: int, k: int, n: int, r: int) -> tuple[int, int]:
    """Return the FLOPs of forward (s and its product) and of backward (ds, dx, dA and dB)."""
    base, whole = (layer_cost.flops(m, k, n, rank) for rank in (0, r))
    return whole[0] - base[0], whole[1] - base[1]


def _sum(z: Size) -> tuple[int, ...]:
    """Return the bytes of y by `torch.addmm` out of place: the copy of base, and the product added to it."""
    return 2 * z.y, z.s + z.b + 2 * z.y


def _peft(z: Size, dropout: bool) -> Cost:
    """Cost PEFT's launches without the base product, the base's dx and the final sum."""
    whole = layer_cost.COSTS["peft"](z, dropout)
    return Cost(whole.forward[1:], whole.backward[:-2])


def _addmm(z: Size, dropout: bool) -> Cost:
    dropping, masking = ((2 * z.x + z.mask,),) * 2 if dropout else ((), ())
    return Cost(
        (*dropping, z.x + z.a + z.s, *_sum(z)),
        (z.y + z.b + z.s, z.s + z.a + z.x, *masking, z.s + z.x + z.a, z.y + z.s + z.b),
    )


def _kernels(z: Size, dropout: bool) -> Cost:
    """Cost this package's kernels; the library computes y, and dx without dropout."""
    bits, wide_a = z.bits if dropout else 0, z.wide.a
    dx = z.s + (wide_a if dropout else z.a) + z.x + bits
    return Cost(
        (z.x + wide_a + z.s + bits, *layer_cost.copy_of_B(z), *_sum(z)),
        (*layer_cost.from_dy(z, z.wide.b), *layer_cost.copy_of_A(z, dropout), dx, z.s + z.x + wide_a + bits),
    )


def _operators(z: Size, dropout: bool) -> Cost:
    """Cost the torch backend, which keeps the mask and makes the dropped copy of x twice."""
    draw, drop_x = ((z.mask,), (2 * z.x + z.mask,)) if dropout else ((), ())
    # Each pass casts the adapters once.
    casts = (z.wide.a + z.a, z.wide.b + z.b) if z.mixed else ()
    return Cost(
        (*casts, *draw, *drop_x, z.x + z.a + z.s, *_sum(z)),
        (
            *casts, z.y + z.b + z.s, z.s + z.a + z.x, *drop_x, *drop_x, z.s + z.x + z.wide.a, z.y + z.s + z.wide.b,
        ),
    )  # fmt: skip


COSTS: dict[str, Callable[[Size, bool], Cost]] = {
    "peft": _peft, "addmm": _addmm, "triton": _kernels, "torch": _operators,
}  # fmt: skip
