"""Check both backends against float64 on this machine: outputs, gradients, layouts, dropout, determinism.

Every case runs a layer, or queries, keys and values, or a gated MLP, or the layers of experts, forward and backward.
Two rules apply to each output (lora_kernels.verify.numerics; lora_kernels.verify.numerics_mlp for a gated MLP):
  rule 1   every element within its own a-priori error bound
  rule 2   large outputs: rms error at most twice that of PyTorch's operators, or at most that of one long sum
The table shows how much of each limit the worst output used; 1 and below passes. A case must also give the same bits
twice, leave its inputs unchanged, and drop exactly the elements that its backend's dropout rule selects.

On a GPU the kernels run on real shapes. Without a GPU they run on small shapes in Triton's interpreter, where bfloat16
cannot be checked because the interpreter multiplies its raw bit patterns. --emulate executes the compiled kernels of a
GPU that this machine does not have. The exit status is 1 if any case fails.
"""

import argparse
import importlib.util
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from lora_kernels import plan
from lora_kernels.console import DASH, on_stdout
from lora_kernels.constants import DTYPES
from lora_kernels.measure import machine
from lora_kernels.verify import emulate
from lora_kernels.verify.matrix import AnyCase, Result, examine, matrix

__all__ = ["add_arguments", "run"]

# Cases between two writes of the results so far.
_WRITE_EVERY = 10
_LEGEND = """\
rule 1, rule 2: the share of the limit that the worst output used; up to 1 passes.
Blocks: r8/0/3 are ranks of their layers, 0 none; p is the largest; fp32 after a name is the adapters'.
Experts: E8 are eight of them; rows after a + are of none, as expert parallelism has."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lora-kernels verify`."""
    parser.add_argument("--quick", action="store_true", help="a few cases of each kind, some seconds in all")
    parser.add_argument("--device", help="where to run, cuda or cpu (default: cuda if there is one)")
    parser.add_argument("--dtype", choices=DTYPES, help="only this dtype")
    parser.add_argument("--backend", choices=("triton", "torch"), help="only this backend")
    parser.add_argument(
        "--emulate", choices=emulate.ARCHES, help="execute what is compiled for this GPU in the checkout's emulator"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no case after this long")
    parser.add_argument("--seed", type=int, default=0, help="of the numbers and the dropout masks (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Run the cases that the options select.

    Return 0 if all pass, 1 if any fails, 2 if nothing could be run, 130 on Ctrl-C.
    """
    if args.emulate:
        return emulate.run(args)
    console, start = on_stdout(), time.perf_counter()
    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        return _refuse(console, f"--device {args.device}: {str(error).splitlines()[0]}")
    cases, notes = _select(args, device)
    for note in notes:
        console.print(note, style="yellow")
    if not cases:
        return _refuse(console, "These options leave nothing to verify.")

    def write(results: list[Result]) -> str:
        """Write the results so far with --json, and return their summary."""
        failed, summary = sum(not each.ok for each in results), _summary(cases, results, time.perf_counter() - start)
        if args.json:
            records = [asdict(case) | asdict(result) for case, result in zip(cases, results, strict=False)]
            machine.write_json(
                args.json,
                dict(command="verify", device=str(device), seed=args.seed, quick=args.quick, notes=notes,
                     summary=summary, passed=len(results) - failed, failed=failed,
                     not_run=len(cases) - len(results), cases=records),
            )  # fmt: skip
        return summary

    threads = torch.get_num_threads()
    if device.type == "cpu":
        # the products are small: more threads hardly help, and on a busy machine they cost a lot
        torch.set_num_threads(1)
    try:
        results, interrupted = _run_all(console, cases, device, args.seed, start + args.minutes * 60, write)
    finally:
        torch.set_num_threads(threads)
    failed = not all(result.ok for result in results)
    console.print(write(results), style="bold red" if failed else "bold green")
    return 130 if interrupted else int(failed)


def _refuse(console: Console, message: str) -> int:
    console.print(message, style="red")
    return 2


# The cases of each backend on this device


def _select(args: argparse.Namespace, device: torch.device) -> tuple[list[AnyCase], list[str]]:
    """Return the cases that the options select, and notes on those that cannot run."""
    cases, notes = [], []
    for backend in ("triton", "torch") if args.backend is None else (args.backend,):
        for dtype in DTYPES if args.dtype is None else (args.dtype,):
            problem = "" if backend == "torch" else _kernels_problem(device, dtype)
            if problem:
                notes.append(problem)
            else:
                cases += matrix(backend, dtype, device.type == "cuda", args.quick)
    return cases, list(dict.fromkeys(notes))


def _kernels_problem(device: torch.device, dtype: str) -> str:
    """Return why the kernels cannot be verified on a device in a dtype, or ""; on a CPU, turn the interpreter on."""
    if device.type == "cpu":
        if not plan.is_interpreting() and "triton" in sys.modules:
            return "Kernels skipped: Triton was imported without its interpreter; run this in a process of its own."
        if importlib.util.find_spec("triton") is None:
            return "Kernels skipped: Triton is not installed; the torch backend is what runs on this machine."
        have = tuple(tuple(map(int, version.split(".")[:2])) for version in map(metadata.version, ("triton", "numpy")))
        # https://github.com/triton-lang/triton/issues/9171
        if have[0] < (3, 7) and have[1] >= (2, 4):
            return (
                "Kernels skipped: the interpreter of Triton 3.6 needs numpy < 2.4 "
                f'(numpy is {metadata.version("numpy")}): pip install "numpy<2.4", or take a newer Triton.'
            )
        # Triton reads the variable at import, which happens later
        os.environ["TRITON_INTERPRET"] = "1"
        if dtype == "bf16":
            return "bf16 kernels need a GPU to be verified; here they run in fp32 and fp16 in Triton's interpreter."
        return ""
    backend, reason = plan.backend.automatic(device, DTYPES[dtype])
    return "" if backend == "triton" else f"Kernels skipped in {dtype}: {reason}."


def _run_all(
    console: Console, cases: list[AnyCase], device: torch.device, seed: int, end: float,
    write: Callable[[list[Result]], Any],
) -> tuple[list[Result], bool]:  # fmt: skip
    """Run cases until all are done, the time is up or Ctrl-C comes; return the results, and whether Ctrl-C came.

    `write` receives the results so far every few cases.
    """
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True),
    )  # fmt: skip
    console.print(_LEGEND, style="dim")
    console.print(_row("backend", "dtype", "MxKxN r", "layout", "p", "rule 1", "rule 2"), style="bold")
    results = []
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("verifying", total=len(cases))
        for case in cases:
            if time.perf_counter() > end:
                break
            try:
                result = examine(case, device, seed)
            # the results so far are still written
            except KeyboardInterrupt:
                console.print("interrupted", style="yellow")
                return results, True
            # a kernel that does not compile or launch fails its case, not the command
            except Exception as error:
                result = Result(False, float("inf"), None, f"{type(error).__name__}: {error}", [])
            results.append(result)
            _print_result(console, case, result)
            progress.advance(task)
            if len(results) % _WRITE_EVERY == 0:
                write(results)
    return results, False


def _print_result(console: Console, case: AnyCase, result: Result) -> None:
    used = [f"{rule:.2f}" if rule is not None else DASH for rule in (result.rule_1, result.rule_2)]
    line = Text(_row(*_label(case), *used))
    line.append("pass", "green") if result.ok else line.append("FAIL", "bold red")
    console.print(line)
    if result.message:
        console.print(Text("  " + result.message, "red"))


def _label(case: AnyCase) -> tuple[str, str, str, str, str]:
    """Return the case's cells in its line, which are unique within a run."""
    layout = case.layout if case.form == "fused" else case.form
    return case.backend, case.dtype, case.shape(), layout, f"{case.p:g}"


def _row(backend: str, dtype: str, shape: str, layout: str, *numbers: str) -> str:
    # a long shape shifts into the layout's columns, so that most lines fit 80 columns
    what = f"{shape:26} {layout}"
    cells = zip((backend, dtype, what, *numbers), (7, 5, 40, 5, 6, 6), strict=True)
    return "".join(f"{cell:{width}} " for cell, width in cells)


def _summary(cases: list[AnyCase], results: list[Result], seconds: float) -> str:
    failed = sum(not result.ok for result in results)
    worst: dict[str, Any] = {}
    for rule in ("rule_1", "rule_2"):
        used = [
            (getattr(finding, rule), f"{finding.name}, {case.backend} {case.dtype} {case.shape()}")
            for case, result in zip(cases, results, strict=False)
            for finding in result.findings
            if getattr(finding, rule) is not None
        ]
        worst[rule] = DASH if not used else "{:.2f} ({})".format(*max(used))
    late = f", {len(cases) - len(results)} not run for lack of time" if len(results) < len(cases) else ""
    return (
        f"{len(results) - failed} passed, {failed} failed{late} in {seconds:.1f} s\n"
        f"worst use of rule 1: {worst['rule_1']}\nworst use of rule 2: {worst['rule_2']}"
    )
