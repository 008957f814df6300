"""Cases of groups of rows, as the experts of a mixture: exact integers, so results are the truth bit for bit.

What belongs to a group may not depend on where the rows of others end, so groups end within tiles, fill them, have one
row or none, and rows of no group follow.
"""

import itertools
from collections.abc import Iterator

import torch
from samples.exact_groups import COUNTS, Groups
from torch import Tensor

from emulator.cases import Case, precision_of_products
from emulator.exact import unequal
from lora_kernels import lora_grouped_linear, plan
from lora_kernels.constants import DTYPES
from lora_kernels.kernels._configs import matmul_configs

__all__ = ["grid", "layer", "quick", "table"]

_MANY = ([3, 0, 17, 1, 64, 0, 33, 5], 10)
# Their gradients are split: sums of several parts beside sums of one.
_LONG = ([300, 0, 20, 130], 14)


def layer(dtype, counts, k, n, r, adapters=1, precision="ieee", place=None, **more) -> Case:
    """A layer of groups, forward and backward: y, dx, dA, dB and the gradients of W and of the bias.

    Args:
        dtype: "bf16", "fp16" or "fp32".
        counts: Rows of each group, and rows of no group.
        k: in_features.
        n: out_features.
        r: Rank.
        adapters: How often the adapter is there; the second gives the same again.
        precision: "ieee" or "tf32".
        place: Of the large products' tile.
        more: As in `Groups.draw`; with `trained`, W and the bias require gradients.
    """
    trained = more.pop("trained", False)

    def launched() -> tuple[Groups, dict[str, Tensor]]:
        groups = Groups.draw(*counts, k, n, r, DTYPES[dtype], factor=1, **more)
        t = groups.tensors
        leaves = {name: t[name].detach().requires_grad_() for name in ("x", "weight", "bias")}
        leaves["weight"].requires_grad_(trained)
        leaves["bias"].requires_grad_(trained)
        pairs = [[t[name].detach().requires_grad_() for name in ("lora_A", "lora_B")] for _ in range(adapters)]
        how = dict(scaling=[1.0] * adapters, bias=leaves["bias"], backend="triton")
        with plan.force_form("fused", place), precision_of_products(precision):
            y = lora_grouped_linear(
                leaves["x"], leaves["weight"], [a for a, _ in pairs], [b for _, b in pairs], groups.offsets, **how
            )
            y.backward(t["dy"])
        got = {"y": y.detach(), "dx": leaves["x"].grad, "d_lora_A": pairs[-1][0].grad, "d_lora_B": pairs[-1][1].grad}
        if trained:
            got |= {"dweight": leaves["weight"].grad, "dbias": leaves["bias"].grad}
        return groups, got

    def judge() -> str:
        groups, got = launched()
        want = {name: groups.truth[name].double() for name in got}
        if adapters > 1:
            # Each adapter adds its low-rank term to y and to dx once more.
            x, weight, bias, dy = (groups.tensors[name].double() for name in ("x", "weight", "bias", "dy"))
            for group, (first, end) in enumerate(itertools.pairwise(groups.offsets.tolist())):
                here = slice(first, end)
                for name, base in (("y", x[here] @ weight[group].T + bias[group]), ("dx", dy[here] @ weight[group])):
                    want[name][here] = base + adapters * (want[name][here] - base)
        return unequal(got, want)

    words = [f"{adapters} adapters"] * (adapters > 1) + [precision] * (precision != "ieee") + ["trained"] * trained
    words += [name.replace("_", " ") for name, on in more.items() if on]
    words += [] if place is None else [f"tile{place}"]
    rows = "+".join(map(str, counts[0])) + f" and {counts[1]}"
    return Case(" ".join([f"grouped {dtype} {rows} x{k}x{n} r{r}", *words]), judge, lambda: launched())


def quick() -> Iterator[Case]:
    """Each kernel of groups once, with and without descriptors."""
    yield layer("bf16", _MANY, 96, 80, 16)
    yield layer("bf16", COUNTS["uneven"], 72, 56, 3, expert_minor=True, transposed=True)
    yield layer("fp32", COUNTS["uneven"], 64, 48, 16)
    yield layer("bf16", _LONG, 64, 48, 16)


def table(arch: str) -> Iterator[Case]:
    """Every dtype, kind of groups, layout, rank and tile."""
    for dtype, (kind, counts) in itertools.product(DTYPES, COUNTS.items()):
        yield layer(dtype, counts, 96, 80, 16, expert_minor=kind == "uneven")
    for dtype in DTYPES:
        yield layer(dtype, _MANY, 64, 96, 40)
        yield layer(dtype, _MANY, 41, 47, 3, trained=True)
        yield layer(dtype, _LONG, 144, 208, 8, transposed=True, expert_minor=True)
        yield layer(dtype, _LONG, 144, 80, 64, adapters=2)
        yield layer(dtype, ([1] * 40, 0), 64, 64, 16)
    yield layer("fp32", _MANY, 96, 80, 16, precision="tf32")
    yield layer("fp32", _LONG, 96, 80, 40, precision="tf32", trained=True)
    hopper = arch != "sm_80"
    for place in range(len(matmul_configs(torch.bfloat16, hopper, False, grouped=True))):
        yield layer("bf16", ([150, 0, 7, 129], 5), 208, 272, 16, place=place, transposed=place % 2 == 1)
    for place in range(4):
        yield layer("fp16", ([150, 0, 7], 5), 135, 201, 16, place=place)


def grid() -> Iterator[Case]:
    """Calls on both sides of each threshold of the rules."""
    for each, r, k in itertools.product((1, 9, 70), (4, 17, 65), (64, 136)):
        counts = ([each, 0, 2 * each, 1], 3)
        for dtype, adapters in itertools.product(("bf16", "fp32"), (1, 2)):
            yield layer(dtype, counts, k, 2 * k, r, adapters=adapters)
        yield layer("fp32", counts, k, 2 * k, r, precision="tf32")
