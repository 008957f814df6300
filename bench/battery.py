"""Everything a GPU can tell us, in one call of under nine minutes.

    python -m bench.battery --out bench/results/<gpu>

checks the kernels, then times and weighs them, the most telling first, each result written to its own JSON file as
soon as it is there. What does not fit into the time is skipped and said to be, in summary.json. Steps are processes of
their own: one that fails or hangs costs its own results and no others.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_kernels.cli._machine import write_json

__all__ = ["Step", "main", "plan_steps", "run_steps"]

ROOT = Path(__file__).resolve().parent.parent
_RESERVE_S = 10.0  # for the summary, and for a step that is slow to die
_LEAST_S = 15.0  # a step with less than this left is not begun: it would only load PyTorch
_GRACE_S = 20.0  # between the last case that `bench` begins and the end of its time
_BLOCKS = ("qkv", "mlp", "layer")
_TAIL = 40  # lines of a step's output that the summary keeps


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        name: What it is called in the summary.
        command: Arguments after `python`; "{file}" and "{minutes}" are filled in.
        cap_s: The most seconds it may take.
        fine: Exit statuses that mean success.
    """

    name: str
    command: tuple[str, ...]
    cap_s: float
    fine: tuple[int, ...] = (0,)

    @property
    def file(self) -> str | None:
        """The file it writes."""
        return f"{self.name}.json" if "{file}" in self.command else None


def plan_steps(rehearse: bool) -> list[Step]:
    """The steps in order of what they are worth."""
    cli = ("-m", "lora_kernels")
    # addopts: the project's own spread tests over processes, which one GPU does not want. The rest: a plugin or a
    # package that is missing there must not keep the other tests from running
    tests = (
        "-m", "pytest", "-m", "gpu", "-q", "-o", "addopts=--strict-markers", "--tb=short",
        "-W", "ignore::pytest.PytestConfigWarning", "--continue-on-collection-errors",
    )  # fmt: skip
    if rehearse:
        tiny = ("--quick", "--no-compile", "--device", "cpu", "--rounds", "2", "--dtype", "bf16")
        return [
            Step("gpu_tests", (*tests, "--collect-only"), 60, fine=(0, 5)),  # 5: no such tests
            Step("verify", (*cli, "verify", "--quick", "--json", "{file}", "--minutes", "{minutes}"), 120),
            Step("llama-8b", _bench(*tiny, "--p", "0", "0.1"), 120),
            Step("blocks", _bench("--block", *_BLOCKS, *tiny, "--p", "0.1"), 120),
            Step("kernels", _bench("--level", "kernel", *tiny, "--p", "0", "0.1"), 120),
            Step("model", _bench("--level", "model", *tiny, "--p", "0.1"), 120),
            Step("lorafusion", _bench(*tiny, "--m", "16", "32", "--p", "0.1"), 120),
            Step("large", _bench(*tiny, "--memory-only"), 120),
        ]
    both, lean = ("--dtype", "bf16", "--p", "0", "0.1"), ("--no-compile", "--rounds", "15")
    llama = ("--preset", "llama-8b")
    # compiling takes longer than all else: it is done of layers and blocks, the most telling of which come first
    return [
        Step("gpu_tests", tests, 80),
        Step("verify", (*cli, "verify", "--json", "{file}", "--minutes", "{minutes}"), 90),
        Step("llama-8b", _bench(*llama, *both), 150),
        Step("blocks", _bench("--block", *_BLOCKS, *llama, *both, "--rounds", "15"), 100),
        Step("kernels", _bench("--level", "kernel", *llama, *both, "--rounds", "15"), 40),
        Step("model", _bench("--level", "model", *llama, *both, "--no-compile", "--rounds", "10"), 50),
        Step("lorafusion", _bench("--preset", "lorafusion", "--m", "2048", "4096", "6144", "8192", *both, *lean), 90),
        Step("large", _bench("--preset", "large", *both, *lean), 90),
    ]


def _bench(*options: str) -> tuple[str, ...]:
    return ("-m", "lora_kernels", "bench", "--json", "{file}", "--minutes", "{minutes}", *options)


def run_steps(steps: Sequence[Step], out: Path, minutes: float, rehearsal: bool = False) -> list[dict[str, Any]]:
    """Run steps until the time is up; `summary.json` is written anew after each, to be there whatever happens."""
    end = time.monotonic() + minutes * 60 - _RESERVE_S
    records: list[dict[str, Any]] = []
    for step in steps:
        limit = min(step.cap_s, end - time.monotonic())
        if limit < _LEAST_S:
            record = {"name": step.name, "state": "skipped", "why": "out of time"}
        else:
            print(f"{step.name}: at most {limit:.0f} s ...", flush=True)
            record = _run(step, out, limit)
        print(f"{step.name}: {record['state']}" + (f", {record['seconds']:.0f} s" if "seconds" in record else ""))
        records.append(record)
        write_json(out / "summary.json", {
            "command": "battery", "rehearsal": rehearsal, "minutes": minutes, "complete": len(records) == len(steps),
            "steps": records,
        })  # fmt: skip
    return records


def _run(step: Step, out: Path, limit: float) -> dict[str, Any]:
    file = out / step.file if step.file else None
    if file:
        file.unlink(missing_ok=True)  # what lies there afterwards is this run's
    fill = {"{file}": str(file), "{minutes}": f"{max(limit - _GRACE_S, _LEAST_S) / 60:.3f}"}
    command = [sys.executable, *(fill.get(part, part) for part in step.command)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    began, timed_out = time.monotonic(), False
    # a session of its own, so that its children (compilers, test workers) can be ended with it
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    ) as process:  # fmt: skip
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            timed_out = True
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
        except BaseException:  # an interrupted battery leaves nothing running
            os.killpg(process.pid, signal.SIGKILL)
            raise
    ok = process.returncode in step.fine
    return {
        "name": step.name, "state": "out of time" if timed_out else "ok" if ok else "failed",
        "exit_status": process.returncode, "seconds": round(time.monotonic() - began, 1),
        "file": step.file if file and file.exists() else None, "command": " ".join(("python", *step.command)),
        "output": output.splitlines()[-_TAIL:],
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run the battery; 0 if no step failed, 1 if one did, 2 without a GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.battery", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the JSON files go, 8 at most")
    parser.add_argument("--minutes", type=float, default=8.5, help="all of it ends within this, 8.5 by default")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps alone")
    parser.add_argument("--rehearse", action="store_true", help="the same steps on a CPU with tiny shapes: no figures")
    args = parser.parse_args(argv)
    if not args.rehearse and not torch.cuda.is_available():
        print("bench.battery: there is no CUDA GPU here; --rehearse tries the steps on a CPU", file=sys.stderr)
        return 2
    steps = plan_steps(args.rehearse)
    unknown = set(args.only or ()) - {step.name for step in steps}
    if unknown:
        parser.error(f"no such step: {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in steps)}")
    # `timeout` and schedulers end a process by SIGTERM, which would end this one alone: a step has its own session
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    chosen = [step for step in steps if not args.only or step.name in args.only]
    try:
        records = run_steps(chosen, out, args.minutes, args.rehearse)
    finally:
        signal.signal(signal.SIGTERM, before)
    return 1 if any(record["state"] in ("failed", "out of time") for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
