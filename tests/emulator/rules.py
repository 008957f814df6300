"""The cases that reach every tile and flag that the rules can choose, found by asking the launchers themselves.

A grid of calls on both sides of each threshold of the rules is launched dry, a fraction of a millisecond each, and
the fewest that cover all that was seen become cases. Widths are 64 and more: the tiles that narrower layers are cut to
are in the table alone. MLPs with no element next to another are left out, because Triton takes minutes over some of their kernels.
"""

import itertools
from collections.abc import Iterator

from emulator import exact, grouped, stored
from emulator.cases import Case, block, layer
from emulator.launches import recorded
from lora_kernels import plan
from lora_kernels.kernels import _imagined

__all__ = ["covering", "features"]

_RANKS = 4, 17, 33, 65
_ROWS = 1, 17, 33, 70


def _calls() -> Iterator[Case]:
    """The grid, the cheapest first."""
    for (m, k), r, p in itertools.product(itertools.product((*_ROWS, 300), (64, 136, 264)), _RANKS, (0.0, 0.1)):
        n = 2 * k
        for dtype in ("bf16", "fp32"):
            yield layer(dtype, m, k, n, r, p=p)
            yield layer(dtype, m, k, n, r, "all strided", p)
        yield layer("fp16", m, k, n, r, "fp32 adapters", p)
        for strided in (False, True):
            yield exact.projections("fp32", m, k, (n,), (r,), (0.5 if p else 0.0,), "tf32", strided=strided)
    for m, k, r, strided in itertools.product(_ROWS, (64, 136), _RANKS, (False, True)):
        for p in (0.0, 0.1):
            for dtype in ("bf16", "fp32"):
                yield block(dtype, m, k, (136, 48, 48), (r, r, r), (p, p, p), strided=strided)
                yield block(dtype, m, k, (136, 48, 48), (r, r, r), (p, 0.0, 3 * p), strided=strided, bias=True)
                if not strided:
                    yield block(dtype, m, k, (136,), (r, r, r), (p, p, p), "silu")
            yield block("fp16", m, k, (136, 48, 48), (r, r, r), (p, 0.0, p), strided=strided, fp32_adapters=True)
            if not strided:
                yield block("fp16", m, k, (136,), (r, r, r), (p, p, p), "silu", fp32_adapters=True)
            ps = (0.5, 0.0, 0.5) if p else (0.0,)
            yield exact.projections("fp32", m, k, (136, 48, 48), (r, r, r), ps, "tf32", strided=strided)
        yield exact.mlp("fp32", m, k, 136, r, "tf32")
    yield from stored.grid()
    yield from grouped.grid()
    for place, p in itertools.product(range(8), (0.0, 0.1)):
        yield layer("bf16", 300, 264, 528, 16, p=p, place=place)
        yield layer("fp16", 300, 136, 264, 16, "all sliced", p, place=place)
        yield exact.projections("fp32", 150, 136, (264,), (16,), (0.5 if p else 0.0,), "tf32", place=place)


def features(case: Case, gpu: _imagined.ImaginedGPU) -> set[tuple]:
    """The tiles and flags of the kernels that a case launches on a GPU, seen without launching any."""
    with _imagined.imagine(gpu), recorded(dry=True) as seen:
        plan.forget()
        case.launch()
    return set().union(*(one.features() for one in seen))


def covering(gpu: _imagined.ImaginedGPU, done: set[tuple]) -> tuple[list[Case], set[tuple]]:
    """The cases that reach what the rules can choose and `done` lacks, and all that there is to reach."""
    reached = [(case, features(case, gpu)) for case in _calls()]
    everything = set().union(*(found for _, found in reached))
    left, chosen = everything - done, []
    while left:
        case, found = max(reached, key=lambda one: len(one[1] & left))
        chosen.append(case)
        left -= found
    return chosen, everything
