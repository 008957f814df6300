"""Compile every kernel for GPUs that need not be there, and read from the machine code what the compiler made of it.

The launchers themselves run, for an imagined GPU of each architecture, on shapes that reach every tile of the rules:
what is compiled is what a call would compile there. Each kernel is held to budgets: no spills, tensor cores fed by
descriptors and waited for once a K step, wide loads, 64-bit offsets, IEEE fp32. The exit status is 1 if one is broken.

These are compiled properties, not performance.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lora_kernels import plan
from lora_kernels.cli import _machine
from lora_kernels.cli._binary import Facts, read
from lora_kernels.cli._budget import broken

__all__ = ["CASES", "Case", "Kernel", "add_arguments", "compile_case", "run"]

ARCHES = ("sm_80", "sm_90", "sm_100", "gfx942")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_SHARED_PER_SM = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024, "gfx942": 64 * 1024}


@dataclass(frozen=True)
class Case:
    """A layer whose forward and backward are launched: M rows, in_features K, out_features N, rank."""

    m: int
    k: int
    n: int
    r: int
    dtype: str = "bf16"
    p: float = 0.0
    bias: bool = False
    strided: bool = False
    tf32: bool = False


# each line reaches tiles or flags that no other does
CASES = (
    Case(8192, 4096, 4096, 16, bias=True), Case(8192, 4096, 4096, 16, p=0.1), Case(8192, 4096, 4096, 32),
    Case(8192, 4096, 4096, 64, p=0.1), Case(512, 1024, 1024, 16), Case(512, 1024, 1024, 16, p=0.1),
    Case(16, 4096, 4096, 16), Case(16, 4096, 4096, 16, p=0.1), Case(8192, 4096, 4096, 16, "fp16", p=0.1),
    Case(2048, 1024, 1024, 16, "fp32", bias=True), Case(2048, 1024, 1024, 16, "fp32", p=0.1),
    Case(2048, 1024, 1024, 64, "fp32", p=0.1), Case(2048, 1024, 1024, 16, "fp32", p=0.1, tf32=True),
    Case(2048, 1024, 1024, 16, strided=True), Case(2048, 1024, 1024, 16, p=0.1, strided=True),
    Case(2048, 1024, 1024, 16, "fp32", p=0.1, strided=True),
)  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel: what it is, what it is made of, and which budgets it breaks."""

    arch: str
    name: str
    dtype: str
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    strided: bool
    facts: Facts
    broken: tuple[str, ...] = ()

    def label(self) -> str:
        """Tile and flags as the table shows them."""
        tile = "x".join(str(v) for k, v in self.constants.items() if k in _TILE)
        flags = [word for name, word in _FLAGS.items() if self.constants.get(name)]
        return " ".join([tile, *flags, *(["strided"] if self.strided else [])])


_TILE = ("BLOCK_M", "BLOCK_N", "BLOCK_W", "BLOCK_T", "BLOCK_K", "BLOCK_R")
_FLAGS = {"USE_TMA": "tma", "HAS_BIAS": "bias", "HAS_KEEP": "masked", "HAS_DROPOUT": "dropout", "HAS_SHRINK": "shrinks",
          "IS_SPLIT": "split"}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lora-kernels inspect`."""
    parser.add_argument("--arch", choices=ARCHES, nargs="+", default=ARCHES, help="only for these (default: all)")
    parser.add_argument("--kernel", choices=("shrink", "matmul_expand", "wgrad"), help="only this kernel")
    parser.add_argument("--dtype", choices=_DTYPES, help="only this dtype")


def run(args: argparse.Namespace) -> int:
    """Compile and read; 0 if every budget holds, 1 if one is broken, 2 if nothing can be compiled."""
    console = Console(highlight=False)
    problem = _problem()
    if problem:
        console.print(problem, style="red")
        return 2
    cases = [case for case in CASES if args.dtype in (None, case.dtype)]
    bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    kernels: list[Kernel] = []
    with Progress(*bar, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("compiling", total=len(args.arch) * len(cases))
        for arch in args.arch:
            seen: set[str] = set()
            for case in cases:
                progress.update(task, description=f"{arch} {case.dtype} {case.m}x{case.k}x{case.n}")
                kernels += compile_case(case, arch, seen, args.kernel)
                progress.advance(task)
    for arch in args.arch:
        console.print(_table(arch, [kernel for kernel in kernels if kernel.arch == arch]))
    bad = [kernel for kernel in kernels if kernel.broken]
    for kernel in bad:
        console.print(
            f"{kernel.arch} {kernel.name} {kernel.dtype} {kernel.label()}: {'; '.join(kernel.broken)}", style="red"
        )
    summary = f"{len(kernels)} kernels compiled by Triton {_machine.version_of('triton')}, {len(bad)} break a budget."
    console.print(summary, style="bold red" if bad else "bold green")
    console.print("Compiled properties, not performance.")
    if args.json:
        _machine.write_json(
            args.json, dict(command="inspect", summary=summary, broken=len(bad), kernels=[asdict(k) for k in kernels])
        )
    return 1 if bad else 0


def _problem() -> str:
    """Why nothing can be compiled in this process, or ""."""
    if "triton" in sys.modules and plan.interpreting():
        return "Triton was imported with its interpreter; run this in a process of its own."
    os.environ.pop("TRITON_INTERPRET", None)  # Triton reads it when it is imported, which is later than this
    return plan.triton_problem()


def compile_case(case: Case, arch: str, seen: set[str], only: str | None = None) -> Iterator[Kernel]:
    """Launch a layer's forward and backward on an imagined GPU, and read each kernel not yet in `seen`."""
    from lora_kernels.kernels._imagined import GPUS, imagine

    precision = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if case.tf32 else "ieee"
    try:
        with imagine(GPUS[arch]) as launched:
            _layer(case)
    finally:
        torch.backends.cuda.matmul.fp32_precision = precision
    for compiled in launched:
        name = compiled.name.strip("_").removesuffix("_kernel")
        if compiled.hash in seen or only not in (None, name):
            continue
        seen.add(compiled.hash)
        names = compiled.src.fn.arg_names
        constants = {
            names[path[0]]: value
            for path, value in compiled.src.constants.items()
            if len(path) == 1 and names[path[0]].isupper() and len(names[path[0]]) > 1
        }
        kernel = Kernel(
            arch, name, case.dtype, constants, compiled.metadata.num_warps, compiled.metadata.num_stages, case.strided,
            read(compiled, _SHARED_PER_SM[arch]),
        )  # fmt: skip
        yield replace(kernel, broken=tuple(broken(kernel, GPUS[arch].shared)))


def _layer(case: Case) -> None:
    """Forward and backward on tensors that are allocated and never touched."""
    from lora_kernels.autograd import LoRALinearFunction

    def make(*shape: int, grad: bool = True) -> torch.Tensor:
        dtype = _DTYPES[case.dtype]
        if case.strided:  # no element next to the other, and nothing on 16 bytes
            return torch.empty(*shape[:-1], 2 * shape[-1] + 3, dtype=dtype)[..., 1:-2:2].requires_grad_(grad)
        return torch.empty(shape, dtype=dtype, requires_grad=grad)

    x, weight = make(case.m, case.k), make(case.n, case.k, grad=False)
    lora_A, lora_B = make(case.r, case.k), make(case.n, case.r)
    bias = make(case.n, grad=False) if case.bias else None
    y = LoRALinearFunction.apply(x, weight, lora_A, lora_B, bias, 2.0, case.p, "triton")
    y.backward(torch.empty_like(y))


def _table(arch: str, kernels: list[Kernel]) -> Table:
    table = Table(title=arch, title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("kernel", "dtype", "tile and flags"):
        table.add_column(name)
    for name in ("warps", "regs", "spill", "shared", "/SM", "tensor cores", "TMA", "async", "K loop", "waits", "loads"):
        table.add_column(name, justify="right")
    table.add_column("")
    for kernel in sorted(kernels, key=lambda k: (k.name, k.dtype, k.label())):
        f = kernel.facts
        loop = (str(f.loop.instructions), str(f.loop.waits)) if f.loop else ("-", "-")
        table.add_row(
            kernel.name, kernel.dtype, kernel.label(), str(kernel.num_warps), str(f.registers), str(f.spills),
            f"{f.shared / 1024:.0f}K", "-" if f.per_sm is None else str(f.per_sm),
            " ".join(f"{count}x {name}" for name, count in f.mma.items()) or "-", str(f.tma_loads), str(f.async_copies),
            *loop, " ".join(f"{width}:{count}" for width, count in sorted(f.loads.items())),
            "BROKEN" if kernel.broken else "ok",
        )  # fmt: skip
    return table
