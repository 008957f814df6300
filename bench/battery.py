"""Everything a GPU can tell us, in one call of under nine minutes.

    python -m bench.battery --out bench/results/<gpu>            correctness, then times and memory of every level
    python -m bench.battery --first --out bench/results/<gpu>    a first run: correctness, races and graphs, the kernels
                                                                 beside the library, variants, and what time is left for

compiles all kernels in parallel, checks them, then times and weighs them, the most telling first. Each result is
written to its own file as soon as it is there, and log.txt holds what every step prints as it prints it: a run that is
cut at any moment leaves what it had. What does not fit into the time is skipped and said to be, in summary.json. Steps
are processes of their own: one that fails or hangs costs its own results and no others. `--rehearse` takes the same way
on a CPU with tiny shapes, compiled kernels in the emulator of tests/emulator where it can: no figures.
"""

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import steps
from bench.processes import Log, run_together
from bench.steps import Stage
from lora_kernels.measure.machine import write_json

__all__ = ["main", "run_stages"]

_RESERVE_S = 15.0  # for the summary, and for a step that is slow to die
_LEAST_S = 15.0  # a stage with less than this left is not begun: it would only load PyTorch


def run_stages(
    stages: Sequence[Stage], out: Path, minutes: float, rehearsal: bool = False
) -> list[dict[str, Any]]:  # fmt: skip
    """Run stages until the time is up; `summary.json` is written anew after each, to be there whatever happens."""
    end, total = time.monotonic() + minutes * 60 - _RESERVE_S, sum(map(len, stages))
    records: list[dict[str, Any]] = []
    log = Log(out / "log.txt")
    try:
        for stage in stages:
            left, names = end - time.monotonic(), ", ".join(step.name for step in stage)
            if left < _LEAST_S:
                found = [{"name": step.name, "state": "skipped", "why": "out of time"} for step in stage]
            else:
                most = min(left, max(step.cap_s for step in stage))
                print(f"{names}: at most {most:.0f} s ...", flush=True)
                found = run_together(stage, out, left, log)
            for record in found:
                seconds = f", {record['seconds']:.0f} s" if "seconds" in record else ""
                print(f"{record['name']}: {record['state']}{seconds}", flush=True)
            records += found
            write_json(out / "summary.json", {
                "command": "battery", "rehearsal": rehearsal, "minutes": minutes, "complete": len(records) == total,
                "steps": records,
            })  # fmt: skip
    finally:
        log.close()
    return records


def main(argv: list[str] | None = None) -> int:
    """Run the battery; 0 if no step failed, 1 if one did, 2 without a GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.battery", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the files go")
    parser.add_argument("--first", action="store_true", help="the steps of a first run on a GPU, in their order")
    parser.add_argument("--minutes", type=float, default=8.5, help="all of it ends within this, 8.5 by default")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps alone")
    parser.add_argument("--rehearse", action="store_true", help="the same steps on a CPU with tiny shapes: no figures")
    args = parser.parse_args(argv)
    if not args.rehearse and not torch.cuda.is_available():
        print("bench.battery: there is no CUDA GPU here; --rehearse tries the steps on a CPU", file=sys.stderr)
        return 2
    stages = (steps.first if args.first else steps.everything)(args.rehearse)
    known = [step.name for stage in stages for step in stage]
    unknown = set(args.only or ()) - set(known)
    if unknown:
        parser.error(f"no such step: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    # `timeout` and schedulers end a process by SIGTERM, which would end this one alone: a step has its own session.
    # And a shell has what it runs in the background ignore SIGINT, which the steps would inherit.
    handlers = {
        signal.SIGTERM: lambda number, frame: sys.exit(128 + number), signal.SIGINT: signal.default_int_handler,
    }  # fmt: skip
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    chosen = [tuple(step for step in stage if not args.only or step.name in args.only) for stage in stages]
    try:
        records = run_stages([stage for stage in chosen if stage], out, args.minutes, args.rehearse)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 1 if any(record["state"] in ("failed", "out of time") for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
