"""FLOPs and memory traffic of blocks: projections of one x, and the gated MLP. The model is that of `cost.layer`.

    H = M·hidden elements, the size of gate, up and their product h;  a chain of operators adds up the dx of each layer

The activation by PyTorch's operators is a = act(g), h = a·u; then da = dh·u, du = dh·a, dg = act'(g) da.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from lora_kernels.bench.cost import layer as layer_cost
from lora_kernels.bench.cost.layer import Cost, Size
from lora_kernels.plan import model

__all__ = ["COSTS", "BlockSize", "flops", "mlp", "projections"]


@dataclass(frozen=True)
class BlockSize:
    """The sizes of a block's layers.

    Args:
        inputs: Projections of one x; for an MLP, gate and up.
        down: The layer of an MLP that reads the product of gate and up, or None.
    """

    inputs: tuple[Size, ...]
    down: Size | None = None

    @property
    def layers(self) -> tuple[Size, ...]:
        """Return all layers."""
        return self.inputs if self.down is None else (*self.inputs, self.down)

    @property
    def x(self) -> int:
        """Return the bytes of x, and of dx."""
        return self.inputs[0].x

    @property
    def h(self) -> int:
        """Return the bytes of h, of g, of u and of the gradient of each; 0 without an activation."""
        return 0 if self.down is None else self.down.x


def projections(m: int, k: int, widths: tuple[int, ...], r: int, element: int = 2, adapter: int = 0) -> BlockSize:
    """Build a block of several layers of one x `[m, k]`."""
    return BlockSize(tuple(Size(m, k, n, r, element, adapter) for n in widths))


def mlp(m: int, k: int, hidden: int, r: int, element: int = 2, adapter: int = 0) -> BlockSize:
    """Build the block of a gated MLP of x `[m, k]`."""
    pair = projections(m, k, (hidden, hidden), r, element, adapter)
    return BlockSize(pair.inputs, Size(m, hidden, k, r, element, adapter))


def flops(block: BlockSize, r: int) -> tuple[int, int]:
    """Count the FLOPs of forward and of backward without those of the activation; rank 0 is no adapter."""
    forward, backward = zip(*(layer_cost.flops(z.m, z.k, z.n, r) for z in block.layers), strict=True)
    return sum(forward), sum(backward)


def _each(layer: Callable[[Size, bool], Cost]) -> Callable[[BlockSize, bool], Cost]:
    """Cost every layer on its own, the activation by PyTorch's operators, the sum of dx by autograd."""

    def cost(b: BlockSize, dropout: bool) -> Cost:
        costs, h = [layer(z, dropout) for z in b.layers], b.h
        activation = ((2 * h, 3 * h), (3 * h, 3 * h, 3 * h)) if h else ((), ())
        sums = (3 * b.x,) * (len(b.inputs) - 1)
        return Cost(
            (*itertools.chain.from_iterable(one.forward for one in costs), *activation[0]),
            (*itertools.chain.from_iterable(one.backward for one in costs), *activation[1], *sums),
        )

    return cost


def _unsloth(b: BlockSize, dropout: bool) -> Cost:
    """Cost Unsloth's LoRA_QKV and LoRA_MLP: chains of calls that add to dx in place, an activation kernel each way."""
    costs, h = [layer_cost.unsloth(z) for z in b.layers], b.h
    # the base products after the first add to dx, and so read it
    read_again = (len(b.inputs) - 1) * b.x
    backward = list(itertools.chain.from_iterable(one.backward for one in costs))
    # Launch 4 has the base product.
    backward[4] += read_again
    # the backward kernel computes h again, besides dg and du
    activation = ((3 * h,), (6 * h,)) if h else ((), ())
    return Cost(
        (*itertools.chain.from_iterable(one.forward for one in costs), *activation[0]), (*backward, *activation[1])
    )


def _ours(b: BlockSize, dropout: bool) -> Cost:
    """Cost this package's launches: x read once for all sᵢ, all yᵢ and all dAᵢ, dx summed in one accumulator.

    In an MLP the shrink of down also computes h, and one pass over g, u and dh computes dg, du, dA of down, and ds and
    dB of gate and up.
    """
    z, down = b.inputs, b.down
    bits = sum(one.bits for one in z) if dropout else 0
    s_bytes, a_bytes, wide_a = sum(one.s for one in z), sum(one.a for one in z), sum(one.wide.a for one in z)
    copies_of_B = tuple(itertools.chain.from_iterable(layer_cost.copy_of_B(one) for one in b.layers))
    copies_of_A = tuple(itertools.chain.from_iterable(layer_cost.copy_of_A(one, dropout) for one in b.layers))
    stacks = model.stacks(z[0].m, z[0].k, tuple(one.r for one in z), z[0].element, bool(copies_of_A))
    if stacks and down is None and not dropout and not copies_of_A:
        # A side by side, for one product in dx in place of several
        copies_of_A = (2 * a_bytes,)
    y = b.x + sum(one.w + one.y + one.s + one.b for one in z)
    dx = b.x + sum(one.w + one.y for one in z) + s_bytes + (wide_a if dropout else a_bytes) + bits
    d_a = b.x + s_bytes + wide_a + bits
    s = b.x + wide_a + s_bytes + bits
    if down is None:
        from_dys = tuple(itertools.chain.from_iterable(layer_cost.from_dy(one, one.wide.b) for one in z))
        return Cost((*copies_of_B, s, y), (*copies_of_A, *from_dys, dx, d_a))
    h, down_bits = b.h, down.bits if dropout else 0
    s_down = 3 * h + down.wide.a + down.s + down_bits
    dh = down.base + down.s + (down.wide.a if dropout else down.a) + down_bits
    through = 5 * h + down.s + down.wide.a + down_bits + sum(2 * one.s + 2 * one.wide.b for one in z)
    return Cost(
        (*copies_of_B, s, y, s_down, down.base + down.s + down.b),
        (*copies_of_A, *layer_cost.from_dy(down, down.wide.b), dh, through, dx, d_a),
    )


def _floor(b: BlockSize, dropout: bool) -> Cost:
    """Cost the frozen block with each large tensor once a pass.

    The weights that share x count as one, and the activation is part of the products.
    """
    wide, h = b.x + sum(z.w + z.y for z in b.inputs), b.h
    if b.down is None:
        return Cost((wide,), (wide,))
    return Cost((wide + h, b.down.base), (b.down.base - h + 4 * h, wide))


COSTS: dict[str, Callable[[BlockSize, bool], Cost]] = {
    **{name: _each(layer_cost.COSTS[name]) for name in ("frozen", "peft", "addmm", "triton", "torch")},
    "unsloth": _unsloth, "lorafusion": _each(layer_cost.lorafusion), "ours": _ours, "floor": _floor,
}  # fmt: skip
