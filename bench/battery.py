"""Check and time everything on a GPU, in one call of under nine minutes.

    python -m bench.battery --out bench/results/<gpu>            correctness, then times and memory of every level
    python -m bench.battery --first --out bench/results/<gpu>    a first run: correctness, races and graphs, the kernels
                                                                 beside the library, variants; layers and blocks in the
                                                                 time left

The battery compiles all kernels in parallel, checks them, then measures times and memory, the most informative steps
first. Each result is written to its own file at once, and log.txt receives the output of every step as it is printed,
so a run that is cut at any moment keeps its results so far. Steps that do not fit into the time are skipped, and
summary.json lists them as skipped. Each step is a process of its own: a step that fails or hangs loses only its own
results. `--rehearse` runs the same steps on a CPU with tiny shapes and gives no figures: `verify` and `races` execute
compiled kernels in the emulator of tests/emulator, and no other step runs kernels.
"""

import argparse
import signal
import sys
import tarfile
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

# kept back for the summary, and for a step that is slow to end
_RESERVE_S = 15.0
# a stage with less time left is skipped, because it would only load PyTorch
_LEAST_S = 15.0


def run_stages(
    stages: Sequence[Stage], out: Path, minutes: float, rehearsal: bool = False
) -> list[dict[str, Any]]:  # fmt: skip
    """Run stages until the time is up; `summary.json` is rewritten after each, so that it exists after any failure."""
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
            _pack(out)
    finally:
        log.close()
    return records


def _pack(out: Path) -> None:
    """Put all files of a run into one, because some machines hand back a few files alone."""
    partial = out / ".results.tar.gz"
    with tarfile.open(partial, "w:gz") as archive:
        for path in sorted(out.glob("[!.]*")):
            if path.is_file() and path.name != "results.tar.gz":
                archive.add(path, path.name)
    partial.replace(out / "results.tar.gz")


def main(argv: list[str] | None = None) -> int:
    """Run the battery; return 0 if no step failed, 1 if one did, 2 without a GPU."""
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
    # `timeout` and schedulers end a process by SIGTERM. By default SIGTERM would end this process alone, because each
    # step has its own session. A shell makes background processes ignore SIGINT, which the steps would inherit.
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
