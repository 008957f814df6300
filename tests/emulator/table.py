"""The table of cases: a quick set, those that were thought of, and those that reach what the rules can choose beside.

Widths that are multiples of 16 take other ways through Triton than those that are not: descriptors, wide loads.
"""

import itertools
from collections.abc import Iterator

from emulator import exact, grouped, stored
from emulator.cases import Case, block, layer, ungated
from lora_kernels.constants import DTYPES
from lora_kernels.verify.layer_matrix import LAYOUTS

__all__ = ["quick", "table"]

_QKV = (80, 48, 48)


def quick(arch: str) -> Iterator[Case]:
    """Each kernel and each of its ways once, on an architecture."""
    yield layer("bf16", 70, 96, 80, 16, "bias")
    yield layer("bf16", 72, 96, 80, 16, p=0.1)
    yield layer("fp32", 40, 96, 80, 16, p=0.1)
    yield layer("fp16", 72, 96, 80, 16, "fp32 adapters", 0.1)
    yield layer("bf16", 70, 96, 80, 16, "all sliced", 0.1)
    yield layer("bf16", 40, 72, 56, 3, "all strided", 0.1)
    # few rows, sums split over K and over rows
    yield layer("bf16", 24, 144, 208, 16)
    yield layer("bf16", 16, 1100, 208, 16, p=0.1)
    yield layer("bf16", 300, 64, 48, 16)
    # a large tile, more than one to a program
    yield layer("bf16", 300, 208, 304, 16, p=0.1, place=0)
    yield block("bf16", 72, 96, _QKV, (16, 3, 9), (0.1, 0.0, 0.3), bias=True)
    yield block("bf16", 72, 96, (80,), (16, 16, 16), (0.0, 0.0, 0.1), "silu")
    yield ungated("fp32", 40, 64, 48, 16, "gelu_tanh")
    yield exact.projections("bf16", 100, 144, (200,), (16,), accumulate=True)
    yield exact.projections("fp32", 150, 208, (272,), (16,), precision="tf32")
    yield from stored.quick()
    yield from grouped.quick()


def table(arch: str) -> Iterator[Case]:
    """Every kernel, dtype, layout, strategy, activation and tile on an architecture, by what could go wrong."""
    yield from quick(arch)
    yield from _layers()
    yield from _tiles(arch)
    yield from _exact(arch)
    yield from _blocks(arch)
    yield from stored.table()
    yield from grouped.table(arch)


def _layers() -> Iterator[Case]:
    # one shape, so that layouts share the kernels that they do not change
    shape = 72, 96, 88, 16
    for dtype, p in itertools.product(DTYPES, (0.0, 0.1)):
        yield layer(dtype, *shape, p=p)
    for dtype, layout, p in itertools.product(("bf16", "fp32"), (*LAYOUTS[1:], "all strided"), (0.0, 0.1)):
        if layout != "fp32 adapters" or dtype != "fp32":
            yield layer(dtype, *shape, layout, p)
    yield layer("bf16", 72, 96, 88, 32, "fp32 adapters", 0.0)
    yield layer("fp16", 72, 96, 88, 8, "fp32 adapters", 0.0)
    # odd sizes, small and large ranks
    for m, k, n, r in (
        (1, 1, 1, 1),
        (33, 41, 47, 3),
        (129, 255, 130, 3),
        (1, 264, 200, 16),
        (24, 72, 40, 64),
        (40, 144, 96, 128),
    ):
        for dtype in ("bf16", "fp32"):
            yield layer(dtype, m, k, n, r, p=0.1)
    yield layer("fp16", 33, 41, 47, 3, p=0.1)
    yield layer("bf16", 33, 72, 40, 256, p=0.5)
    # few rows: products of which some have too few for wgmma
    for m, p in itertools.product((1, 8, 16, 32, 48), (0.0, 0.1)):
        yield layer("bf16", m, 144, 208, 16, p=p)
    # sums that are split: over K for few rows, over rows for narrow operands
    yield layer("bf16", 16, 2048, 1536, 16, p=0.1)
    yield layer("bf16", 1100, 128, 96, 16, p=0.1)
    yield layer("fp16", 700, 256, 264, 64)
    yield layer("fp32", 200, 640, 64, 8, p=0.1)
    for form, p in itertools.product(("beta1", "padded", "joint"), (0.0, 0.1)):
        yield layer("bf16", 100, 144, 288, 16, p=p, form=form)
        yield layer("fp32", 50, 72, 96, 16, p=p, form=form)


def _tiles(arch: str) -> Iterator[Case]:
    """Every large tile, over edges that do not fill one; few multiprocessors, so that persistent programs go round."""
    hopper = arch != "sm_80"
    for place in range(8 if hopper else 4):
        yield layer("bf16", 300, 208, 608, 16, "bias", place=place)
    for place in range(5 if hopper else 4):
        yield layer("bf16", 300, 608, 208, 16, p=0.1, place=place)
        yield layer("bf16", 200, 528, 144, 64, p=0.1, place=place)
        yield layer("fp16", 208, 520, 136, 32, p=0.1, place=place)
    for place in range(4):
        yield layer("bf16", 150, 136, 200, 16, "all sliced", 0.1, place=place)
        yield layer("fp16", 150, 144, 208, 16, "all sliced", 0.0, place=place)
    yield layer("bf16", 200, 144, 272, 16, "W transposed", 0.0, place=0)


def _exact(arch: str) -> Iterator[Case]:
    for dtype in DTYPES:
        yield exact.projections(dtype, 150, 208, (272,), (16,))
        yield exact.projections(dtype, 150, 200, (256, 40, 40), (16, 8, 3), (0.5, 0.0, 0.5), accumulate=True)
        yield exact.projections(dtype, 150, 201, (263,), (5,), (0.5,), strided=True)
    # as many projections as a launch takes
    yield exact.projections("bf16", 150, 200, (256, 40, 40, 72), (16, 8, 3, 5), (0.5, 0.0, 0.5, 0.5), accumulate=True)
    yield exact.projections("fp16", 150, 208, (272, 48, 48, 48), (64, 64, 64, 64), (0.5, 0.5, 0.5, 0.5))
    for place in range(8 if arch != "sm_80" else 4):
        yield exact.projections("bf16", 280, 208, (528,), (16,), place=place)
    for place, p in itertools.product(range(2), (0.0, 0.5)):
        yield exact.projections("fp32", 150, 208, (280,), (16,), (p,), "tf32", place=place)
    yield exact.projections("fp32", 20, 208, (272,), (64,), precision="tf32")
    yield exact.projections("fp32", 150, 201, (263,), (5,), precision="tf32", strided=True)
    yield exact.projections("fp32", 70, 144, (128, 48, 48), (16, 16, 16), (0.5, 0.0, 0.5), "tf32")
    for precision, gated in itertools.product(("ieee", "tf32"), (False, True)):
        yield exact.mlp("fp32", 70, 96, 80, 16, precision, accumulate=True, gated=gated)
    yield exact.mlp("fp16", 70, 96, 80, 16)


def _blocks(arch: str) -> Iterator[Case]:
    m, k, hidden, same = 72, 96, 88, (16, 16, 16)
    for dtype in DTYPES:
        yield block(dtype, m, k, _QKV, same, (0.1, 0.1, 0.1))
        yield block(dtype, m, k, _QKV, same, (0.1, 0.0, 0.3), bias=True)
        yield block(dtype, 16, k, _QKV, same, (0.1, 0.1, 0.1))
        yield block(dtype, m, k, (hidden,), same, (0.1, 0.0, 0.1), "silu")
        yield ungated(dtype, m, k, hidden, 16, "relu2")
    for dtype in ("bf16", "fp32"):
        yield block(dtype, m, k, _QKV, same, (0.0, 0.0, 0.0))
        yield block(dtype, m, k, _QKV, same, (0.0, 0.1, 0.0))
        yield block(dtype, m, k, _QKV, (16, 0, 3), (0.5, 0.0, 0.0), bias=True)
        yield block(dtype, 1, k, _QKV, (16, 3, 9), (0.1, 0.1, 0.1))
        for name in ("silu", "gelu", "gelu_tanh", "relu2"):
            yield block(dtype, m, k, (hidden,), same, (0.1, 0.1, 0.1), name)
        yield block(dtype, m, k, (hidden,), same, (0.0, 0.0, 0.0), "silu", bias=True)
        yield block(dtype, m, k, (72,), (16, 3, 9), (0.3, 0.0, 0.1), "silu")
        yield block(dtype, m, k, (hidden,), (32, 64, 16), (0.0, 0.0, 0.0), "silu")
        yield block(dtype, 16, k, (hidden,), same, (0.0, 0.0, 0.0), "silu")
    for dtype in ("bf16", "fp16"):
        yield block(dtype, m, k, _QKV, (16, 3, 9), (0.1, 0.0, 0.3), fp32_adapters=True)
        yield block(dtype, m, k, (hidden,), same, (0.1, 0.1, 0.1), "silu", fp32_adapters=True)
    for place in range(8 if arch != "sm_80" else 4):
        yield block("bf16", 200, 208, (272, 144, 144), same, (0.0, 0.0, 0.0), place=place)
        yield block("bf16", 200, 208, (272, 144, 144), same, (0.1, 0.1, 0.1), place=place)
    yield block("bf16", 200, 144, (272,), same, (0.1, 0.1, 0.1), "silu")
    yield block("bf16", 150, 144, (128, 64, 64), (64, 64, 64), (0.1, 0.1, 0.1))
    yield block("bf16", 600, 272, (128, 64, 64), same, (0.1, 0.1, 0.1))
