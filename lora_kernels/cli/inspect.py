"""Compile every kernel for several GPUs, none of which has to be present, and report on and check its machine code.

The launchers themselves run for an imagined GPU of each architecture, on shapes that reach every tile of the rules, so
the kernels are those that a call on that GPU would compile. Each kernel is held to budgets: no spills, tensor cores fed
by descriptors and waited for once a K step, wide loads, 64-bit offsets, IEEE fp32. The exit status is 1 if a budget is
broken.

The results are compiled properties, not performance.
"""

import argparse
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lora_kernels.console import DASH, SplitTable, on_stdout
from lora_kernels.constants import DTYPES
from lora_kernels.inspect.compiled import CASES, QUICK, compile_case, problem
from lora_kernels.inspect.kernel import Case, Kernel
from lora_kernels.inspect.stored import budget_file, regressions, renew
from lora_kernels.measure import machine

__all__ = ["add_arguments", "run"]

_ARCHES = ("sm_80", "sm_90", "sm_100", "gfx942")
_LEGEND = """\
Flags: rows: adapters of one x; in, masks, out: products, masked ones, results; where a launch has more than a layer's.
/SM: programs that a multiprocessor holds. K loop: instructions, and waits (w) for the tensor cores; -: none uses them.
Loads and stores: bits of the widest, +: narrower ones as well. All of it is in the JSON file.
Compiled properties, not performance."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lora-kernels inspect`."""
    parser.add_argument("--arch", choices=_ARCHES, nargs="+", default=_ARCHES, help="only for these (default: all)")
    parser.add_argument("--kernel", choices=("shrink", "matmul_expand", "wgrad", "dequantize"), help="only this kernel")
    parser.add_argument("--dtype", choices=DTYPES, help="only this dtype")
    parser.add_argument("--quick", action="store_true", help="a few shapes for every kernel")
    parser.add_argument("--jobs", type=int, metavar="N", help="compile in so many processes (default: one a core)")
    parser.add_argument(
        "--budgets", metavar="FOLDER", help="hold registers, shared memory and loops to the file of this Triton in it"
    )
    parser.add_argument("--renew", action="store_true", help="write that file in place of holding to it")


def run(args: argparse.Namespace) -> int:
    """Compile and check the kernels; return 0 if every budget holds, 1 if one is broken, 2 if none can be compiled."""
    console = on_stdout()
    wrong = problem() or _option_problem(args)
    if wrong:
        console.print(f"lora-kernels inspect: {wrong}", style="red")
        return 2
    kernels = [kernel for kernel in _compile(args) if args.kernel in (None, kernel.name)]
    for arch in args.arch:
        console.print(_table(arch, [kernel for kernel in kernels if kernel.arch == arch]))
    console.print(_LEGEND, style="dim")
    bad = [f"{kernel}: {'; '.join(kernel.broken)}" for kernel in kernels if kernel.broken]
    triton = machine.version_of("triton")
    if args.budgets:
        bad += _hold(console, kernels, args, triton)
    for line in bad:
        console.print(line, style="red")
    summary = f"{len(kernels)} kernels compiled by Triton {triton}, {len(bad)} broken budgets."
    console.print(summary, style="bold red" if bad else "bold green")
    if args.json:
        machine.write_json(
            args.json, dict(command="inspect", summary=summary, broken=bad, kernels=[asdict(k) for k in kernels])
        )
    return 1 if bad else 0


def _option_problem(args: argparse.Namespace) -> str:
    """Return what is wrong with the options, or ""."""
    if args.jobs is not None and args.jobs < 1:
        return f"--jobs {args.jobs} is not at least 1."
    if args.renew and not args.budgets:
        return "--renew needs --budgets FOLDER."
    if args.renew and (args.quick or args.kernel or args.dtype):
        return "--renew stores every kernel: not with --quick, --kernel or --dtype."
    return ""


def _compile(args: argparse.Namespace) -> list[Kernel]:
    """Compile the cases in several processes; each kernel is listed once, under the first case that launches it."""
    cases = [case for case in (QUICK if args.quick else CASES) if args.dtype in (None, case.dtype)]
    tasks = [(case, arch) for arch in args.arch for case in cases]
    bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    kernels: dict[tuple[str, str], Kernel] = {}
    with Progress(*bar, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("compiling", total=len(tasks))
        for (case, arch), found in zip(tasks, _results(tasks, args.jobs), strict=True):
            for kernel in found:
                kernels.setdefault((arch, kernel.hash), kernel)
            progress.update(task, advance=1, description=f"{arch} {case}")
    return list(kernels.values())


def _results(tasks: list[tuple[Case, str]], jobs: int | None) -> Iterator[list[Kernel]]:
    jobs = min(jobs or len(os.sched_getaffinity(0)), len(tasks))
    if jobs == 1:
        yield from map(_task, tasks)
        return
    # spawn, because Triton's threads do not survive a fork
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_task, tasks)


# by architecture: the kernels that this process has read already
_seen: dict[str, set[str]] = {}


def _task(task: tuple[Case, str]) -> list[Kernel]:
    case, arch = task
    return compile_case(case, arch, _seen.setdefault(arch, set()))


def _hold(console: Console, kernels: list[Kernel], args: argparse.Namespace, triton: str) -> list[str]:
    """Hold the kernels to the stored budgets, or store theirs as the new budgets."""
    path = budget_file(args.budgets, triton)
    if args.renew:
        renew(kernels, path)
        console.print(f"Wrote {path}.")
        return []
    if not path.exists():
        console.print(f"There is no {path}: only the rules were held.", style="yellow")
        return []
    over = list(regressions(kernels, path))
    if over:
        arches = f" --arch {' '.join(args.arch)}" if args.arch != _ARCHES else ""
        console.print(f"If this is meant: lora-kernels inspect{arches} --budgets {args.budgets} --renew")
    return over


# header, justification, and a kernel's cell
_COLUMNS: tuple[tuple[str, str, Callable[[Kernel], Any]], ...] = (
    ("dtype", "left", lambda k: k.case.dtype),
    ("pass", "left", lambda k: "bwd" if k.backward else "fwd"),
    ("tile", "left", lambda k: k.tile),
    ("flags", "left", lambda k: k.flags),
    ("warps", "right", lambda k: k.num_warps),
    ("stages", "right", lambda k: k.num_stages),
    ("regs", "right", lambda k: k.facts.registers),
    ("spills", "right", lambda k: k.facts.spills or DASH),
    ("smem", "right", lambda k: f"{k.facts.shared / 1024:.0f}K"),
    ("/SM", "right", lambda k: k.facts.per_sm),
    ("tensor cores", "left", lambda k: _first(k.facts.mma)),
    ("TMA", "right", lambda k: k.facts.tma_loads or DASH),
    ("K loop", "right", lambda k: _loop(k)),
    ("loads", "left", lambda k: _first(k.facts.loads)),
    ("stores", "left", lambda k: _first(k.facts.stores)),
    ("", "left", lambda k: "[red]BAD[/red]" if k.broken else "ok"),
)
# leading columns, the kernel's included, that tell one row from another
_NAMES = 5


def _table(arch: str, kernels: list[Kernel]) -> Table:
    table = SplitTable(title=f"\n{arch}", title_style="table.title", show_edge=False, names=_NAMES)
    table.add_column("kernel", no_wrap=True)
    for header, justify, _ in _COLUMNS:
        table.add_column(header, justify=justify, no_wrap=True)
    above = None
    for kernel in sorted(kernels, key=lambda k: (k.name, k.case.dtype, k.case.strided, k.sides, k.flags, k.backward)):
        if above not in (None, kernel.name):
            table.add_section()
        name = kernel.name if kernel.name != above else ""
        table.add_row(name, *(str(cell(kernel)) for _, _, cell in _COLUMNS))
        above = kernel.name
    return table


def _loop(kernel: Kernel) -> str:
    loop = kernel.facts.loop
    if loop is None:
        return DASH
    return f"{loop.instructions}/{loop.waits}w" if kernel.arch == "sm_90" else str(loop.instructions)


def _first(found: dict[Any, int]) -> str:
    """Format the first entry, with "+" if there are more."""
    return f"{next(iter(found))}{'+' if len(found) > 1 else ''}" if found else DASH
