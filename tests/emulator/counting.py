"""What a fixed set of launches does, counted: instructions, bytes, sectors, and passes over the banks of shared memory.

The counts follow from shapes, tiles and the compiled code; a launch of other tensors counts the same. Shared memory that
TMA and wgmma pass over is not among them: they take their tiles in swizzles of the hardware's own.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from emulator.cases import precision_of_products
from emulator.emulator import EARLY, Emulator
from emulator.launches import Seen, recorded
from lora_kernels import plan
from lora_kernels.bench.cost import traffic
from lora_kernels.constants import DTYPES
from lora_kernels.inspect.compiled import STORED, _forward
from lora_kernels.inspect.kernel import Case
from lora_kernels.kernels._imagined import GPUS

__all__ = ["CASES", "KINDS", "QUICK", "Counted", "count"]

# by which instruction shared memory is passed over
KINDS = {"ld": "lds", "st": "sts", "ldmatrix": "ldmatrix", "stmatrix": "stmatrix", "cp.async": "cp"}

_LAYER = (512, 512, 512)
_QKV = (128, 128)
_MLP = (256, 256, 512)
QUICK = (
    Case(*_LAYER, 16, place=0), Case(*_LAYER, 16, p=0.1, place=0), Case(16, 1024, 1024, 16, p=0.1),
    Case(256, 512, 512, 16, p=0.1, others=_QKV, place=0), Case(*_MLP, 16, p=0.1, activation="silu", place=0),
    Case(0, 512, 512, 0, storage="nf4 nested"),
)  # fmt: skip
# every kernel and dtype with each of its ways; tiles are filled, in some by fewer rows than they have
CASES = (
    *QUICK,
    Case(1, 1024, 1024, 16), Case(16, 1024, 1024, 64), Case(16, 1024, 512, 16, p=0.1, others=_QKV),
    Case(*_LAYER, 64, "fp16", p=0.1, place=1), Case(*_LAYER, 64, bias=True, place=2),
    Case(*_LAYER, 16, accumulate=True, place=3), Case(*_LAYER, 32, p=0.1, fp32_adapters=True, place=1),
    Case(*_LAYER, 9, p=0.1, place=0), Case(*_LAYER, 16, p=0.1, strided=True),
    Case(256, 512, 512, 16, others=_QKV, place=0), Case(256, 512, 512, 9, p=0.1, others=_QKV, place=0),
    Case(256, 512, 512, 16, p=0.1, others=_QKV, mixed=True, place=0),
    Case(*_MLP, 16, activation="silu", place=0),
    Case(256, 256, 256, 16, "fp32", p=0.1), Case(256, 256, 256, 16, "fp32", p=0.1, tf32=True, place=0),
    Case(128, 128, 256, 16, "fp32", p=0.1, activation="silu"),
    Case(128, 256, 256, 16, "fp32", p=0.1, strided=True),
    *(Case(0, 512, 512, 0, storage=storage) for storage in STORED if storage != "nf4 nested"),
    Case(0, 512, 512, 0, "fp32", storage="nf4 nested"),
)  # fmt: skip


class Counted(NamedTuple):
    """What one launch did.

    Attributes:
        name: Architecture, case, place in the case and kernel: "sm_90 512x512x512 r=16 bf16 p=0 tile 0: 1 shrink".
        figures: What budgets hold: see `counters.py`.
        counters: All that the emulator counted, by its names (`report.cpp`).
    """

    name: str
    figures: dict
    counters: dict


def count(emu: Emulator, arch: str, case: Case) -> Iterator[Counted]:
    """Run a case's forward and backward on tensors that hold nothing, and say what each launch did.

    Raises:
        AssertionError: The emulator noticed that a kernel does what it must not.
    """
    emu.set(mode=EARLY, seed=1, race=0, weak=0)
    emu.launches()
    plan.forget()
    tf32 = precision_of_products("tf32" if case.tf32 else "ieee")
    with tf32, emu.running(), plan.force_form(case.strategy, case.place), recorded() as seen:
        ys = _forward(case)
        torch.autograd.backward(ys, [torch.empty_like(y) for y in ys])
    done, problems = emu.launches(), [line for line in emu.problems() if ": note: " not in line]
    assert not problems, f"{arch} {case}: {problems[0]}"
    formulas = _formulas(case, arch) or itertools.repeat(None, len(done))
    for i, (one, counters, moved) in enumerate(zip(seen, done, formulas, strict=True), 1):
        yield Counted(f"{arch} {case}: {i} {one.kernel}", _figures(case, one, counters, moved), counters)


def _figures(case: Case, one: Seen, counters: dict, moved: traffic.Moved | None) -> dict:
    passes = {kind: [counters[f"waves_{key}"], counters[f"ideal_{key}"]] for kind, key in KINDS.items()}
    by_pointer = "ldg", "stg", "cp"
    return {
        "tile": _tile(one),
        "aligned": one.itemsize == 2 and not case.strided,
        "instructions": counters["instructions"],
        "products": counters.get("mma", 0) + counters.get("wgmma", 0),
        "read": counters["bytes_read"] + counters["tma_read"],
        "written": counters["bytes_written"] + counters["tma_written"],
        "formula": moved and [moved.issued + moved.parts + _seeds(one, counters), moved.stored + moved.parts],
        "requests": sum(counters[f"requests_{way}"] for way in by_pointer),
        "sectors": sum(counters[f"sectors_{way}"] for way in by_pointer),
        "passes": {kind: counts for kind, counts in passes.items() if counts[1]},
    }


def _seeds(one: Seen, counters: dict) -> int:
    """Bytes of seeds read beyond the formula's one for each program: every lane reads them, in one sector."""
    flags = dict(one.flags)
    drawn = flags["ROWS"] if one.kernel == "shrink" and flags["HAS_DROPOUT"] else 0
    return 8 * drawn * counters["ctas"] * (counters["threads"] - 1)


def _tile(one: Seen) -> str:
    sides = dict(one.sides)
    if one.kernel == "dequantize":
        return str(sides["BLOCK"])
    names = {"shrink": "MKR", "matmul_expand": "MNK", "wgrad": "MWT"}[one.kernel]
    return "x".join(str(sides[f"BLOCK_{side}"]) for side in names)


def _formulas(case: Case, arch: str) -> list[traffic.Moved] | None:
    """The formula of each launch of a case, in order; None for what the formulas do not have."""
    if case.strided or case.accumulate or case.tf32 or case.strategy != "fused" or case.fp32_adapters or case.mixed:
        return None
    dtype, gpu = DTYPES[case.dtype], GPUS[arch]
    if case.storage:
        return [_stored(case, dtype.itemsize)]
    tma = arch != "sm_80" and dtype.itemsize == 2
    bias = dtype.itemsize * case.bias
    ways = dtype, case.p > 0, gpu.num_sms, tma
    if case.activation:
        return traffic.mlp(case.m, case.k, case.n, case.k, (case.r,) * 3, *ways, bias, place=case.place)
    if case.others:
        widths = case.n, *case.others
        return traffic.block(case.m, case.k, widths, (case.r,) * len(widths), *ways, bias, place=case.place)
    return traffic.layer(case.m, case.k, case.n, case.r, *ways, bias=bias, place=case.place)


def _stored(case: Case, itemsize: int) -> traffic.Moved:
    blocks = {"fp8 block": (128, 128), "fp8 row": (1, case.k), "int8": (1, case.k)}
    bits, block = (8, blocks[case.storage]) if case.storage in blocks else (4, 64)
    return traffic.dequantize(case.n, case.k, itemsize, bits, block, nested=case.storage == "nf4 nested")
