"""Run `lora-kernels verify` of every dtype at once and merge the results: `python -m bench.verifying --json FILE`.

Each dtype has a process of its own, because checking waits for the compiler and the host more than for the GPU. Each
process writes its results so far every few cases, and the merged file is written anew each time. Other options are
passed on to `verify`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_kernels.constants import DTYPES
from lora_kernels.measure.machine import write_json

__all__ = ["main", "merged"]

# after an interrupt the processes have so long to write; the battery kills them all 10 s after its interrupt
_GRACE_S = 8.0


def merged(results: Sequence[dict[str, Any]], missing: Sequence[str]) -> dict[str, Any]:
    """Merge the results of several dtypes into one.

    Args:
        results: The results that `verify` wrote, one per dtype; with `--emulate` they name no device, seed or notes,
            and say what was executed.
        missing: Dtypes for which `verify` wrote no result.
    """
    same = {
        name: results[0][name] for name in ("device", "emulated", "seed", "quick") if results and name in results[0]
    }
    counts = {name: sum(result.get(name, 0) for result in results) for name in ("passed", "failed", "not_run")}
    lists = {name: [line for result in results for line in result.get(name, ())] for name in ("notes", "executed")}
    summary = [result["summary"] for result in results] + [f"{dtype}: no result" for dtype in missing]
    return {
        "command": "verify", **same, **{name: list(dict.fromkeys(lines)) for name, lines in lists.items()},
        "summary": "\n".join(summary), **counts, "missing": list(missing),
        "cases": [case for result in results for case in result["cases"]],
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Verify every dtype and return the largest exit status of the processes."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.verifying", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json", required=True, type=Path, metavar="FILE", help="written anew every few cases of a dtype"
    )
    args, options = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        files = {dtype: Path(folder) / f"{dtype}.json" for dtype in DTYPES}
        running = {
            dtype: subprocess.Popen(
                [sys.executable, "-m", "lora_kernels", "verify", "--dtype", dtype, "--json", str(file), *options]
            )
            for dtype, file in files.items()
        }

        # an interrupt reaches the processes as well, and each then writes its results so far
        def write() -> None:
            there = {dtype: json.loads(file.read_text()) for dtype, file in files.items() if file.exists()}
            write_json(args.json, merged(list(there.values()), [dtype for dtype in DTYPES if dtype not in there]))

        written: list[int] | None = None
        try:
            while True:
                ended = all([process.poll() is not None for process in running.values()])
                found = [file.stat().st_mtime_ns for file in files.values() if file.exists()]
                if found != written:
                    write()
                    written = found
                if ended:
                    break
                time.sleep(0.1)
        except KeyboardInterrupt:
            until = time.monotonic() + _GRACE_S
            while time.monotonic() < until and any(process.poll() is None for process in running.values()):
                time.sleep(0.1)
            write()
            return 130
    return max(abs(process.returncode) for process in running.values())


if __name__ == "__main__":
    sys.exit(main())
