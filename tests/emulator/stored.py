"""Cases of weights in storage of 4 and 8 bits: what the compiled kernel makes of random bytes is the formula's, to the bit."""

import itertools
from collections.abc import Iterator

import torch
from oracles import stored

from emulator.cases import Case
from lora_kernels import reference
from lora_kernels.constants import DTYPES
from lora_kernels.kernels import dequantize

__all__ = ["grid", "quick", "table"]

_E8M0 = torch.float8_e8m0fnu


def weight(dtype: str, format: str, shape: tuple[int, int], block, **more) -> Case:
    """A weight of random bytes; `more` as in `stored.draw`."""

    def launch() -> torch.Tensor:
        return dequantize(stored.draw(format, shape, block, **more), DTYPES[dtype])

    def judge() -> str:
        got, want = launch(), reference.dequantize(stored.draw(format, shape, block, **more), DTYPES[dtype])
        if stored.same(got, want):
            return ""
        wrong = ~((got == want) | (got.isnan() & want.isnan()))
        at = tuple(int(i) for i in wrong.nonzero()[0])
        return f"W{list(at)} is {got[at].item():g}, by the formula {want[at].item():g}; {int(wrong.sum())} of {wrong.numel()}"

    words = [str(value).removeprefix("torch.") for name, value in more.items() if name != "nested"]
    words += ["nested"] if more.get("nested") else []
    size = f"{block[0]}x{block[1]}" if isinstance(block, tuple) else block
    return Case(" ".join([f"stored {dtype} {format} {shape[0]}x{shape[1]} blocks {size}", *words]), judge, launch)


def quick() -> Iterator[Case]:
    """Each format once."""
    yield weight("bf16", "nf4", (72, 96), 64, nested=True)
    yield weight("fp32", "fp8", (40, 300), (16, 128))
    yield weight("fp16", "int8", (40, 97), (1, 97))


def table() -> Iterator[Case]:
    """Every dtype, flag and kind of block."""
    for dtype in DTYPES:
        # more than a program, nested scales of more than one block of their own, and storage that ends within a program
        yield weight(dtype, "nf4", (130, 132), 32, nested=True)
        yield weight(dtype, "fp4", (33, 101), 64)
        yield weight(dtype, "nf4", (70, 160), 4096, nested=True, storage=torch.bfloat16)
        yield weight(dtype, "nf4", (9, 50), 20)
        yield weight(dtype, "fp4", (1, 3), 64)
        yield weight(dtype, "fp8", (200, 304), (128, 128))
        yield weight(dtype, "fp8", (33, 101), (33, 101), scales=torch.bfloat16)
        yield weight(dtype, "fp8", (6, 5000), (1, 5000), scales=torch.float16)
        yield weight(dtype, "fp8", (40, 96), (32, 32), scales=_E8M0)
        yield weight(dtype, "int8", (7, 4400), (1, 4400))


def grid() -> Iterator[Case]:
    """Rows of every length that has a tile of its own, in every format."""
    for dtype, inner in itertools.product(("bf16", "fp32"), (200, 500, 1000, 2000, 4000)):
        for nested in (False, True):
            yield weight(dtype, "nf4", (1, inner), 64, nested=nested)
        yield weight(dtype, "fp8", (2, inner), (1, inner))
        yield weight(dtype, "fp8", (2, inner), (1, 96), scales=_E8M0)
        yield weight(dtype, "int8", (2, inner), (1, inner))
