"""FLOPs and memory traffic of a call, launch by launch, by arithmetic alone.

The model: every launch reads each of its operands once and writes each result once, and nothing survives in a cache
between launches. The model is a lower bound of a chain of launches, so it compares chains, not kernels. Not counted:
the bias and its gradient, random numbers, and the partial sums of split reductions.

    X = M·K, Y = M·N, W = N·K, A = r·K, B = N·r, S = M·r elements;  a mask is a byte an element, or a bit where packed
"""

from collections.abc import Callable
from dataclasses import dataclass

from lora_kernels.constants import ONE_READ_RANK

__all__ = [
    "COSTS", "Cost", "Size", "copy_of_A", "copy_of_B", "floor", "flops", "from_dy", "lorafusion", "split_minimum",
    "unsloth",
]  # fmt: skip


@dataclass(frozen=True)
class Size:
    """Bytes of every tensor of one call.

    Args:
        m: Rows of x.
        k: in_features.
        n: out_features.
        r: Rank.
        element: Bytes an element of x and W.
        adapter: Bytes an element of A and B; `element` if 0.
    """

    m: int
    k: int
    n: int
    r: int
    element: int = 2
    adapter: int = 0

    @property
    def x(self) -> int:
        """Return the bytes of x, and of dx."""
        return self.m * self.k * self.element

    @property
    def y(self) -> int:
        """Return the bytes of y, and of dy."""
        return self.m * self.n * self.element

    @property
    def w(self) -> int:
        """Return the bytes of W."""
        return self.n * self.k * self.element

    @property
    def a(self) -> int:
        """Return the bytes of A, and of dA, in x's dtype."""
        return self.r * self.k * self.element

    @property
    def b(self) -> int:
        """Return the bytes of B, and of dB, in x's dtype."""
        return self.n * self.r * self.element

    @property
    def s(self) -> int:
        """Return the bytes of s, and of ds."""
        return self.m * self.r * self.element

    @property
    def mask(self) -> int:
        """Return the bytes of a dropout mask with one byte per element."""
        return self.m * self.k

    @property
    def bits(self) -> int:
        """Return the bytes of a dropout mask with one bit per element, in rows of whole 32-bit words."""
        return self.m * 4 * -(-self.k // 32)

    @property
    def base(self) -> int:
        """Return the bytes of a product with W: x, W and y, or dy, W and dx."""
        return self.x + self.w + self.y

    @property
    def mixed(self) -> bool:
        """Return whether the adapters are wider than x."""
        return self.adapter not in (0, self.element)

    @property
    def wide(self) -> "Size":
        """Return the same call with all tensors in the adapters' dtype."""
        return Size(self.m, self.k, self.n, self.r, self.adapter or self.element)


@dataclass(frozen=True)
class Cost:
    """Bytes of each launch, in order, and of the two launches with a layer's base products, y and dx."""

    forward: tuple[int, ...]
    backward: tuple[int, ...]
    base: tuple[int, int] = (0, 0)

    @property
    def total(self) -> int:
        """Return the bytes of forward and backward."""
        return sum(self.forward) + sum(self.backward)

    @property
    def launches(self) -> int:
        """Return the number of launches of forward and backward."""
        return len(self.forward) + len(self.backward)


def flops(m: int, k: int, n: int, r: int) -> tuple[int, int]:
    """Count the FLOPs of forward (y, s and its product) and of backward (ds, dx in two parts, dA, dB).

    Rank 0 is no adapter.
    """
    base, low_rank = 2 * m * k * n, 2 * m * r * (k + n)
    return base + low_rank, base + 2 * low_rank


def _frozen_layer(z: Size, dropout: bool) -> Cost:
    return Cost((z.base,), (z.base,), (z.base, z.base))


def _peft(z: Size, dropout: bool) -> Cost:
    """Cost `result + B(A(dropout(x.to(A.dtype)))) * scaling`, `.to(result.dtype)`, and its backward by autograd."""
    v = z.wide
    dropping = (2 * v.x + v.mask,) if dropout else ()
    into, back = ((z.x + v.x,), (v.y + z.y,)) if z.mixed else ((), ())
    forward = (z.base, *into, *dropping, v.x + v.a + v.s, v.s + v.b + v.y, 2 * v.y, z.y + 2 * v.y, *back)
    widen_and_narrow = (z.y + v.y, v.y + z.y) if z.mixed else ()
    low_rank = (2 * v.y, v.y + v.b + v.s, v.y + v.s + v.b, v.s + v.a + v.x, v.s + v.x + v.a)
    narrow = (v.x + z.x,) if z.mixed else ()
    return Cost(
        forward, (*widen_and_narrow, *low_rank, *dropping, *narrow, z.base, 3 * z.x), (z.base, z.base)
    )  # fmt: skip


def _addmm(z: Size, dropout: bool) -> Cost:
    """Cost the best chain of library calls: the low-rank product accumulated in place, s kept for backward."""
    dropping = (2 * z.x + z.mask,) if dropout else ()
    into_dx = (z.s + z.a + z.x, 3 * z.x + z.mask) if dropout else (z.s + z.a + 2 * z.x,)
    return Cost(
        (z.base, *dropping, z.x + z.a + z.s, z.s + z.b + 2 * z.y),
        (z.y + z.b + z.s, z.base, *into_dx, z.s + z.x + z.a, z.y + z.s + z.b),
        (z.base, z.base),
    )


def unsloth(z: Size) -> Cost:
    """Cost Unsloth's chain, which has no dropout and computes x Aᵀ and dy B twice (unsloth/kernels/fast_lora.py)."""
    shrink_x, shrink_dy = z.x + z.a + z.s, z.y + z.b + z.s
    d_a, d_b = z.s + z.x + z.a, z.y + z.s + z.b
    return Cost(
        (z.base, shrink_x, z.s + z.b + 2 * z.y),
        (shrink_dy, d_a, shrink_x, d_b, z.base, shrink_dy, z.s + z.a + 2 * z.x),
        (z.base, z.base),
    )


def lorafusion(z: Size, dropout: bool) -> Cost:
    """Cost LoRAFusion's launches (arXiv:2510.00206): dropped x and a byte mask stored, ds and dB by fp32 atomics."""
    dropping, mask = ((2 * z.x + z.mask,), z.mask) if dropout else ((), 0)
    ds32, db32 = z.m * z.r * 4, z.n * z.r * 4
    expands = z.base + z.s + z.b, z.base + z.s + z.a + mask
    return Cost(
        (*dropping, z.x + z.a + z.s, expands[0]),
        (ds32, db32, z.y + z.b + z.s + ds32 + db32, ds32 + z.s, db32 + z.b, z.s + z.x + z.a, expands[1]),
        expands,
    )


def _split(z: Size, dropout: bool) -> Cost:
    """Cost LoRAFusion's scheme without atomics: ds and dB by this package's launches, the mask packed for dx."""
    dropping, packing = ((2 * z.x + z.mask,), (2 * z.a, z.mask + z.bits)) if dropout else ((), ())
    expands = z.base + z.s + z.b, z.base + z.s + z.a + (z.bits if dropout else 0)
    return Cost(
        (*dropping, z.x + z.a + z.s, expands[0]),
        (*from_dy(z, z.b), *packing, expands[1], z.s + z.x + z.a),
        expands,
    )


def from_dy(z: Size, b: int) -> tuple[int, ...]:
    """Cost ds and dB: one read of dy at small ranks, two at larger ones; B and dB take `b` bytes each."""
    one_read = z.r <= ONE_READ_RANK
    return (z.y + b + z.s + z.s + b,) if one_read else (z.y + b + z.s, z.y + z.s + b)


def copy_of_A(z: Size, dropout: bool) -> tuple[int, ...]:
    """Cost the copy of A in x's dtype for dx; with dropout, as in all other launches, A is rounded as it is read."""
    return (z.wide.a + z.a,) if z.mixed and not dropout else ()


def copy_of_B(z: Size) -> tuple[int, ...]:
    """Cost the copy of B in x's dtype for y."""
    return (z.wide.b + z.b,) if z.mixed else ()


def _kernels(z: Size, dropout: bool) -> Cost:
    """Cost this package's kernels: shrink, expand; in backward ds and dB (`from_dy`), expand, wgrad."""
    bits, wide_a, wide_b = z.bits if dropout else 0, z.wide.a, z.wide.b
    expands = z.base + z.s + z.b, z.base + z.s + (wide_a if dropout else z.a) + bits
    return Cost(
        (*copy_of_B(z), z.x + wide_a + z.s + bits, expands[0]),
        (*copy_of_A(z, dropout), *from_dy(z, wide_b), expands[1], z.s + z.x + wide_a + bits),
        expands,
    )


def _operators(z: Size, dropout: bool) -> Cost:
    """Cost the torch backend, which keeps the mask and makes the dropped copy of x twice."""
    drop_x = (2 * z.x + z.mask,) if dropout else ()
    draw = (z.mask,) if dropout else ()
    # Each pass casts the adapters once.
    casts = (z.wide.a + z.a, z.wide.b + z.b) if z.mixed else ()
    into_dx = (z.s + z.a + z.x, 2 * z.x + z.mask, 3 * z.x) if dropout else (z.s + z.a + 2 * z.x,)
    return Cost(
        (*casts, *draw, *drop_x, z.x + z.a + z.s, z.base, z.s + z.b + 2 * z.y),
        (
            *casts, z.y + z.b + z.s, z.base, *into_dx, *drop_x,
            z.s + z.x + z.wide.a, z.y + z.s + z.wide.b,
        ),
        (z.base, z.base),
    )  # fmt: skip


def split_minimum(z: Size) -> Cost:
    """Cost the minimum with s and ds in memory: one read of dy for ds and dB, one of x for dA; any dropout."""
    expands = z.base + z.s + z.b, z.base + z.s + z.a
    return Cost(
        (z.x + z.a + z.s, expands[0]),
        (z.y + z.b + z.s + z.s + z.b, z.s + z.x + z.a, expands[1]),
        expands,
    )


def floor(z: Size) -> Cost:
    """Cost each large tensor once a pass, which no chain of launches does; backward must read x again for dA."""
    forward, backward = z.base + z.a + z.b, z.base + z.x + 2 * (z.a + z.b)
    return Cost((forward,), (backward,), (forward, backward))


COSTS: dict[str, Callable[[Size, bool], Cost]] = {
    "frozen": _frozen_layer, "peft": _peft, "addmm": _addmm, "split": _split, "triton": _kernels, "torch": _operators,
    "unsloth": lambda z, dropout: unsloth(z),
}  # fmt: skip
