"""FLOPs and memory traffic of LoRA on groups of rows: the layers of a mixture of experts. The model is `cost.layer`'s.

    M rows in all groups together, E experts;  W = E·N·K, A = E·r·K, B = E·N·r elements, every expert counted as read

Routing, the gather of rows, offsets and activations are the same for every form and are not counted, nor are the tiles'
map and the bias.
"""

from collections.abc import Callable
from dataclasses import dataclass

from lora_kernels.bench.cost import layer as layer_cost
from lora_kernels.bench.cost.layer import Cost, Size

__all__ = ["COSTS", "GroupSize", "experts", "flops"]


@dataclass(frozen=True)
class GroupSize(Size):
    """Bytes of every tensor of one call on groups.

    Args:
        experts: E, the number of groups.
        expert_minor: Whether the experts of B lie side by side, as in PEFT's parameters; the kernels read a copy.
    """

    experts: int = 1
    expert_minor: bool = False

    @property
    def w(self) -> int:
        """Return the bytes of the stack of W."""
        return self.experts * super().w

    @property
    def a(self) -> int:
        """Return the bytes of the stack of A, and of dA, in x's dtype."""
        return self.experts * super().a

    @property
    def b(self) -> int:
        """Return the bytes of the stack of B, and of dB, in x's dtype."""
        return self.experts * super().b

    @property
    def wide(self) -> "GroupSize":
        """Return the same call with all tensors in the adapters' dtype."""
        width = self.adapter or self.element
        return GroupSize(self.m, self.k, self.n, self.r, width, 0, self.experts, self.expert_minor)


def experts(
    tokens: int, top_k: int, count: int, hidden: int, inner: int, r: int, element: int = 2, expert_minor: bool = False
) -> tuple[GroupSize, GroupSize]:
    """Build the two stacks of a layer of experts: gate and up as one `[E, 2I, H]`, and down `[E, H, I]`."""
    m = tokens * top_k
    return (
        GroupSize(m, hidden, 2 * inner, r, element, 0, count, expert_minor),
        GroupSize(m, inner, hidden, r, element, 0, count, expert_minor),
    )


def flops(form: str, z: GroupSize) -> tuple[int, int]:
    """Count the FLOPs of forward and of backward of a form in `COSTS`.

    Raises:
        ValueError: If there is no such form.
    """
    if form not in COSTS:
        raise ValueError(f"form is {form!r}, but it must be one of {', '.join(COSTS)}")
    if form == "frozen":
        return layer_cost.flops(z.m, z.k, z.n, 0)
    if form not in ("peft", "peft_once"):
        return layer_cost.flops(z.m, z.k, z.n, z.r)
    base, merge = 2 * z.m * z.k * z.n, 2 * z.experts * z.n * z.k * z.r
    # B A twice in forward; in backward dx, the dense gradient, and its two products with A and B
    return base + (1 if form == "peft_once" else 2) * merge, 2 * base + 2 * merge


def _peft(z: GroupSize, dropout: bool) -> Cost:
    """Cost PEFT 0.21's ParamWrapper: `baddbmm(W, B, A)` of all experts twice, and the dense gradient of W + B A."""
    merge = z.w + z.b + z.a + z.w
    return Cost(
        (merge, merge, z.base),
        (z.base, z.y + z.x + z.w, z.w + z.b + z.a, z.w + z.a + z.b),
        (z.base, z.base),
    )


def _peft_once(z: GroupSize, dropout: bool) -> Cost:
    """Cost the dense form that makes W + B A once a forward."""
    cost = _peft(z, dropout)
    return Cost(cost.forward[1:], cost.backward, cost.base)


def _split(z: GroupSize, dropout: bool) -> Cost:
    """Cost a grouped product with W and two thin ones, then a scale and an add over y; backward by autograd."""
    return Cost(
        (z.base, z.x + z.a + z.s, z.s + z.b + z.y, 2 * z.y, 3 * z.y),
        (2 * z.y, z.y + z.b + z.s, z.y + z.s + z.b, z.s + z.a + z.x, z.s + z.x + z.a, z.base, 3 * z.x),
        (z.base, z.base),
    )


def _split_best(z: GroupSize, dropout: bool) -> Cost:
    """Cost the split form by hand: s and ds are scaled in place, and y and dx are added to in place."""
    return Cost(
        (z.x + z.a + z.s, 2 * z.s, z.base, z.s + z.b + z.y, 3 * z.y),
        (z.y + z.b + z.s, 2 * z.s, z.base, z.s + z.a + z.x, 3 * z.x, z.s + z.x + z.a, z.y + z.s + z.b),
        (z.base, z.base),
    )


def _ours(z: GroupSize, dropout: bool) -> Cost:
    """Cost this package's passes: those of a layer, and in each pass the copy of an expert-minor B."""
    cost = layer_cost.COSTS["triton"](z, False)
    copy = (2 * z.b,) if z.expert_minor else ()
    return Cost((*copy, *cost.forward), (*copy, *cost.backward), cost.base)


COSTS: dict[str, Callable[[GroupSize, bool], Cost]] = {
    "frozen": layer_cost.COSTS["frozen"], "peft": _peft, "peft_once": _peft_once, "split": _split,
    "split_best": _split_best, "ours": _ours,
}  # fmt: skip
