"""`lora-kernels verify --emulate`: execute the kernels compiled for a GPU on a machine without that GPU.

Triton compiles the same code as on that GPU, and its own launcher lays out the launches. The emulator of the checkout
(`tests/emulator`, built by a C++ compiler) executes the PTX.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

from lora_kernels.console import on_stdout
from lora_kernels.measure import machine

__all__ = ["ARCHES", "run"]

ARCHES = ("sm_80", "sm_90")
_CHECKOUT = Path(__file__).resolve().parents[2]
_LEGEND = """\
Executed is the PTX that Triton compiles for {arch}, launch by launch, as on a GPU: layouts, fragments of the tensor
cores, copies that land as late as the program allows, barriers, dependent launches. ldmatrix, cp and the like are
passes over the banks of shared memory, over the fewest possible.
Not what ptxas makes of it (registers, spills, SASS), nor how tensor cores round inside a sum, nor time; and not the
tcgen05 of sm_100. A GPU has the last word: lora-kernels verify on one."""


def run(args: argparse.Namespace) -> int:
    """Execute the cases that the options select; return 0 if all are right, 1 if any is wrong, 2 if none can run."""
    console, start = on_stdout(), time.perf_counter()
    if problem := _problem(args):
        console.print(f"lora-kernels verify --emulate: {problem}", style="red")
        return 2
    console.print(_LEGEND.format(arch=args.emulate), style="dim", highlight=False)
    cases, last, status = [], {}, [0]
    for line in _results(args, status):
        if "name" in line:
            _print(console, line)
            cases.append(line)
        else:
            last = line
    if status[0] not in (0, 1):
        console.print("The emulator ended early, see above.", style="red")
        return 2
    if not cases:
        console.print("These options leave nothing to execute.", style="red")
        return 2
    seconds, failed = time.perf_counter() - start, sum(bool(case["wrong"]) for case in cases)
    late = ", the others not run for lack of time" if seconds > 60 * args.minutes else ""
    console.print(*last["executed"], *last["lacking"], sep="\n", style="dim")
    summary = f"{len(cases) - failed} passed, {failed} failed{late} in {seconds:.1f} s, {args.emulate} emulated"
    console.print(summary, style="bold red" if failed else "bold green")
    if args.json:
        machine.write_json(
            args.json,
            dict(command="verify", emulated=args.emulate, quick=args.quick, summary=summary,
                 passed=len(cases) - failed, failed=failed, cases=cases, **last),
        )  # fmt: skip
    return status[0]


def _problem(args: argparse.Namespace) -> str:
    """Return why nothing can be executed and what to do about it, or ""."""
    if args.backend == "torch" or args.device not in (None, "cpu"):
        return "it executes the kernels, on this machine's CPU; leave out --backend torch and --device."
    if not (_CHECKOUT / "tests" / "emulator" / "run.py").exists():
        return (
            f"the emulator is in the project's sources, and {_CHECKOUT} has no tests/emulator: "
            "clone the repository and run this in an environment with `pip install -e .` of it."
        )
    question = "from emulator import build; print(build.missing())"
    asked = subprocess.run([sys.executable, "-c", question], env=_environment(), capture_output=True, text=True)
    if asked.returncode:
        return asked.stderr.strip().splitlines()[-1]
    if missing := asked.stdout.strip():
        return f"{missing}: install one, such as Debian's g++ or conda's gxx."
    return ""


def _results(args: argparse.Namespace, status: list[int]) -> Iterator[dict]:
    """Yield the result of each case as it ends; `status[0]` receives the emulator's exit status."""
    jobs = min(len(os.sched_getaffinity(0)), 8)
    command = [sys.executable, str(_CHECKOUT / "tests" / "emulator" / "run.py"), "--jsonl", "--arch", args.emulate]
    command += ["--jobs", str(jobs), "--first", str(args.seed + 1), "--minutes", str(args.minutes)]
    command += ["--quick"] if args.quick else []
    command += ["--filter", rf"\b{re.escape(args.dtype)} \d"] if args.dtype else []
    with subprocess.Popen(command, env=_environment(), stdout=subprocess.PIPE, text=True) as process:
        yield from map(json.loads, process.stdout)
    status[0] = process.returncode


def _environment() -> dict[str, str]:
    """Return the environment of the emulator's processes, where kernels are compiled and not interpreted."""
    stock = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, [stock.get("PYTHONPATH"), str(_CHECKOUT / "tests"), str(_CHECKOUT)]))
    return stock | {"PYTHONPATH": path}


def _print(console: Console, case: dict) -> None:
    line = Text(f"{case['arch']} {case['name']:60} {case['summary']} ")
    line.append("FAIL", "bold red") if case["wrong"] else line.append("pass", "green")
    console.print(line)
    for wrong in case["wrong"]:
        console.print(Text("  " + wrong, "red"))
