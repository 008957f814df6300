"""Check both backends against float64 on this machine: outputs, gradients, layouts, dropout, determinism.

Every case runs a layer, or queries, keys and values, or a gated MLP, forward and backward. Two rules apply to each
output (lora_kernels.verify.numerics; lora_kernels.verify.numerics_mlp for a gated MLP):
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
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor

from lora_kernels import plan
from lora_kernels.console import on_stdout
from lora_kernels.constants import DTYPES
from lora_kernels.measure import machine
from lora_kernels.plan import model
from lora_kernels.verify import block_matrix, emulate, numerics
from lora_kernels.verify.block_matrix import BlockCase
from lora_kernels.verify.numerics import Finding, Problem
from lora_kernels.verify.problems import every_other, make_problem, run_problem, same_bits, storages, with_mask

__all__ = ["Case", "Result", "add_arguments", "draw", "lay_out", "run"]

LAYOUTS = (
    "contiguous", "x transposed", "x sliced", "W transposed", "dy expanded", "x 4-D", "bias", "fp32 adapters",
    "all sliced",
)  # fmt: skip
_LEGEND = """\
rule 1, rule 2: the share of the limit that the worst output used; up to 1 passes.
Blocks: r8/0/3 are ranks of their layers, 0 none; p is the largest; fp32 after a name is the adapters'."""
# cases between two writes of the results so far
_WRITE_EVERY = 10
_QUICK_LAYOUTS = ("x transposed", "x 4-D", "bias", "all sliced")
_OPERANDS = ("x", "weight", "lora_A", "lora_B", "dy", "bias")


@dataclass(frozen=True)
class Case:
    """One line of the table: M, K and N are the rows, inputs and outputs of the layer."""

    backend: str
    dtype: str
    m: int
    k: int
    n: int
    r: int
    layout: str = "contiguous"
    p: float = 0.0
    # form of the large products, see `lora_kernels.plan.model`; the torch backend ignores it
    form: str = "fused"

    def shape(self) -> str:
        """Format the shape as the table shows it."""
        return f"{self.m}x{self.k}x{self.n} r{self.r}"


@dataclass(frozen=True)
class Result:
    """The outcome of a case.

    Attributes:
        ok: Whether every check held.
        rule_1: Largest share of rule 1's limit that any output used.
        rule_2: Largest share of rule 2's limit; None if no output is large enough.
        message: What is wrong, or "".
        findings: The findings of all outputs.
    """

    ok: bool
    rule_1: float
    rule_2: float | None
    message: str
    findings: list[Finding]


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
        failed, summary = (
            sum(not result.ok for result in results),
            _summary(cases, results, time.perf_counter() - start),
        )
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


def _select(args: argparse.Namespace, device: torch.device) -> tuple[list[Case | BlockCase], list[str]]:
    """Return the cases that the options select, and notes on those that cannot run."""
    cases, notes = [], []
    for backend in ("triton", "torch") if args.backend is None else (args.backend,):
        for dtype in DTYPES if args.dtype is None else (args.dtype,):
            problem = "" if backend == "torch" else _kernels_problem(device, dtype)
            if problem:
                notes.append(problem)
            else:
                for matrix in (_matrix, block_matrix.matrix):
                    cases += matrix(backend, dtype, device.type == "cuda", args.quick)
    return cases, list(dict.fromkeys(notes))


def _kernels_problem(device: torch.device, dtype: str) -> str:
    """Return why the kernels cannot be verified on a device in a dtype, or ""; on a CPU, turn the interpreter on."""
    if device.type == "cpu":
        if not plan.interpreting() and "triton" in sys.modules:
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


def _matrix(backend: str, dtype: str, on_gpu: bool, quick: bool) -> list[Case]:
    """List the cases of a backend and a dtype."""
    fast = backend == "torch" or on_gpu
    if backend == "torch":
        shapes, base = _TORCH_SHAPES, (96, 160, 224, 8)
    elif on_gpu:
        shapes, base = _GPU_SHAPES, (1000, 1024, 1536, 16)
    else:
        shapes, base = _INTERPRETER_SHAPES, (40, 48, 56, 8)
    layouts = [layout for layout in LAYOUTS[1:] if layout != "fp32 adapters" or dtype != "fp32"]
    if quick:
        first, second = shapes[0], shapes[3]
        cases = [Case(backend, dtype, *shape, p=p) for shape, p in ((first, 0.0), (first, 0.1), (second, 0.1))]
        cases += [Case(backend, dtype, *base, layout, 0.1) for layout in _QUICK_LAYOUTS]
        return cases if backend == "torch" else [*cases, Case(backend, dtype, *base, p=0.1, form="beta1")]
    cases = [Case(backend, dtype, *shape, p=p) for shape in shapes for p in (0.0, 0.1)]
    cases += [Case(backend, dtype, *base, layout, p) for layout in layouts for p in ((0.0, 0.1) if fast else (0.1,))]
    cases += [Case(backend, dtype, *base, p=p) for p in (0.5, 0.999)]
    # with a mask, dx cannot be "padded" but y can
    if backend == "triton":
        cases += [Case(backend, dtype, *base, p=p, form=form) for form in model.NAMES[1:] for p in (0.0, 0.1)]
    return cases


_GPU_SHAPES = (
    (4096, 4096, 4096, 16), (1, 1, 1, 1), (2048, 4096, 1024, 8),  # last: k or v of Llama-3-8B
    (777, 1111, 1333, 17), (1, 4096, 4096, 16), (129, 255, 513, 3),
    (512, 4096, 14336, 64), (1024, 2048, 2048, 128), (333, 1000, 264, 24),
    (512, 14336, 4096, 16), (256, 1024, 1024, 256), (4095, 511, 257, 1),
)  # fmt: skip
_INTERPRETER_SHAPES = (
    (64, 64, 64, 16), (1, 1, 1, 1), (17, 33, 65, 3),
    (65, 63, 100, 17), (1, 96, 72, 8), (72, 40, 48, 24),
    (24, 40, 32, 128), (33, 72, 40, 64), (16, 16, 24, 256),
)  # fmt: skip
_TORCH_SHAPES = (
    (256, 512, 384, 16), (1, 1, 1, 1), (257, 129, 511, 3),
    (1, 512, 768, 8), (128, 1024, 256, 64), (100, 72, 1000, 17),
    (200, 256, 256, 128), (64, 1536, 384, 24), (96, 128, 192, 256),
)  # fmt: skip


# One case: draw it, run it twice, hold it to the rules


def lay_out(problem: Problem, layout: str) -> Problem:
    """Give a problem's tensors the strides that a layout names; values change in "dy expanded" alone."""
    if layout == "x transposed":
        return replace(problem, x=problem.x.mT.contiguous().mT)
    if layout == "x sliced":
        return replace(problem, x=_slice_of_nans(problem.x))
    if layout == "W transposed":
        return replace(problem, weight=problem.weight.mT.contiguous().mT)
    # as the backward of y.sum(0) gives dy: all rows share one row's memory
    if layout == "dy expanded":
        return replace(problem, dy=problem.dy[:1].expand_as(problem.dy))
    if layout == "all sliced":
        return replace(problem, **{name: _slice_of_nans(getattr(problem, name)) for name in _OPERANDS[:-1]})
    if layout == "all strided":
        return replace(problem, **{name: every_other(getattr(problem, name)) for name in _OPERANDS[:-1]})
    return problem


def _slice_of_nans(t: Tensor) -> Tensor:
    """Copy t into a larger buffer of NaNs, off by one element in each dimension, so that stray accesses show."""
    buffer = t.new_full([size + 3 for size in t.shape], float("nan"))
    return buffer[tuple(slice(1, 1 + size) for size in t.shape)].copy_(t)


def draw(case: Case, device: torch.device, seed: int) -> Problem:
    """Draw the problem of a case, in the case's layout and without the dropout mask."""
    batch = (2, case.m // 4, 2) if case.layout == "x 4-D" else (case.m,)
    problem = make_problem(
        batch, case.k, case.n, case.r, DTYPES[case.dtype], str(device), bias=case.layout == "bias",
        adapter_dtype=torch.float32 if case.layout == "fp32 adapters" else None, dropout_p=case.p, seed=seed,
    )  # fmt: skip
    return lay_out(problem, case.layout)


def _examine(case: Case | BlockCase, device: torch.device, seed: int) -> Result:
    if isinstance(case, BlockCase):
        return _result(*block_matrix.examine(case, DTYPES[case.dtype], device, seed))
    problem = with_mask(draw(case, device, seed), case.backend, seed)
    operands = {name: getattr(problem, name) for name in _OPERANDS if getattr(problem, name) is not None}
    before = storages(operands)
    with plan.forced(case.form):
        actual, again = (run_problem(problem, case.backend, seed) for _ in range(2))
    after = storages(operands)
    messages = [f"{name} was written to" for name in before if not torch.equal(before[name], after[name])]
    messages += [f"{name} differs from run to run" for name in actual if not same_bits(actual[name], again[name])]
    split = case.backend == "torch" or case.form != "fused"
    findings = numerics.check(actual, problem, numerics.eager(problem), split=split)
    return _result(findings, messages)


def _result(findings: list[Finding], messages: list[str]) -> Result:
    messages = [finding.message for finding in findings if not finding.ok] + messages
    rule_2 = max((finding.rule_2 for finding in findings if finding.rule_2 is not None), default=None)
    return Result(not messages, max(finding.rule_1 for finding in findings), rule_2, "; ".join(messages), findings)


def _run_all(
    console: Console, cases: list[Case | BlockCase], device: torch.device, seed: int, end: float,
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
                result = _examine(case, device, seed)
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


def _print_result(console: Console, case: Case | BlockCase, result: Result) -> None:
    used = [f"{rule:.2f}" if rule is not None else "-" for rule in (result.rule_1, result.rule_2)]
    line = Text(_row(*_label(case), *used))
    line.append("pass", "green") if result.ok else line.append("FAIL", "bold red")
    console.print(line)
    if result.message:
        console.print(Text("  " + result.message, "red"))


def _label(case: Case | BlockCase) -> tuple[str, str, str, str, str]:
    """Return the case's cells in its line, which are unique within a run."""
    layout = case.layout if case.form == "fused" else case.form
    return case.backend, case.dtype, case.shape(), layout, f"{case.p:g}"


def _row(backend: str, dtype: str, shape: str, layout: str, *numbers: str) -> str:
    # a long shape shifts into the layout's columns, so that most lines fit 80 columns
    what = f"{shape:26} {layout}"
    cells = zip((backend, dtype, what, *numbers), (7, 5, 40, 5, 6, 6), strict=True)
    return "".join(f"{cell:{width}} " for cell, width in cells)


def _summary(cases: list[Case | BlockCase], results: list[Result], seconds: float) -> str:
    failed = sum(not result.ok for result in results)
    worst: dict[str, Any] = {}
    for rule in ("rule_1", "rule_2"):
        used = [
            (getattr(finding, rule), f"{finding.name}, {case.backend} {case.dtype} {case.shape()}")
            for case, result in zip(cases, results, strict=False)
            for finding in result.findings
            if getattr(finding, rule) is not None
        ]
        worst[rule] = "-" if not used else "{:.2f} ({})".format(*max(used))
    late = f", {len(cases) - len(results)} not run for lack of time" if len(results) < len(cases) else ""
    return (
        f"{len(results) - failed} passed, {failed} failed{late} in {seconds:.1f} s\n"
        f"worst use of rule 1: {worst['rule_1']}\nworst use of rule 2: {worst['rule_2']}"
    )
