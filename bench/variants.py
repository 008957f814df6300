"""Time variants of the kernels, each with one place changed, beside the package as it is.

    python -m bench.variants --json FILE [--only NAME ...]

Each variant is a copy of the package with one text replaced, and a run of `lora-kernels bench` by that copy. The
unchanged package runs first and last, so that a drift of the machine shows. The file is rewritten after each variant.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lora_kernels
from lora_kernels.measure.machine import write_json

__all__ = ["VARIANTS", "Variant", "copied", "main"]

PACKAGE = Path(lora_kernels.__file__).parent


@dataclass(frozen=True)
class Variant:
    """A change of one text in the package.

    Attributes:
        file: Path of the file in the package.
        text: The text to replace, which the file has exactly once.
        other: The replacement.
    """

    file: str
    text: str
    other: str


VARIANTS = {
    "as it is": None,
    "no dependent launches": Variant(
        "kernels/_launch.py", "return (capability(device) or (0, 0)) >= (9, 0)", "return False"
    ),
    "flattened loop over tiles": Variant(
        "kernels/matmul_expand.py", "tl.num_programs(0), flatten=False)", "tl.num_programs(0), flatten=True)"
    ),
    "264 programs for split sums": Variant("kernels/_configs.py", "PROGRAMS = 256", "PROGRAMS = 264"),
    "528 programs for split sums": Variant("kernels/_configs.py", "PROGRAMS = 256", "PROGRAMS = 528"),
    "as it is, again": None,
}
_TIMED = (
    "--shape", "8192x4096x4096", "--dtype", "bf16", "--p", "0", "0.1", "--providers", "frozen", "ours", "--no-compile",
    "--rounds", "15",
)  # fmt: skip
_TINY = (
    "--shape", "64x48x40", "--dtype", "bf16", "--p", "0.1", "--providers", "frozen", "ours", "--no-compile",
    "--rounds", "2", "--device", "cpu",
)  # fmt: skip


def copied(variant: Variant | None, folder: Path) -> Path:
    """Copy the package into a folder, and apply a variant to the copy.

    Raises:
        ValueError: The file does not have the variant's text exactly once.
    """
    copy = folder / PACKAGE.name
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    if variant:
        source = (copy / variant.file).read_text(encoding="utf-8")
        if source.count(variant.text) != 1:
            raise ValueError(f"{variant.text!r} is not once in {variant.file}: renew the table")
        (copy / variant.file).write_text(source.replace(variant.text, variant.other), encoding="utf-8")
    return copy


def _measure(variant: Variant | None, options: tuple[str, ...]) -> dict[str, Any]:
    """Measure medians of forward, backward and both, in seconds, by case and provider; or return the problem."""
    with tempfile.TemporaryDirectory() as folder:
        copied(variant, Path(folder))
        file = Path(folder) / "result.json"
        paths = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "lora_kernels", "bench", "--json", str(file), *options]
        ran = subprocess.run(
            command, cwd=folder, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
        )  # fmt: skip
        if not file.exists():
            return {"problem": (ran.stderr.splitlines() or ["it wrote nothing"])[-1], "cases": []}
        cases = json.loads(file.read_text(encoding="utf-8"))["cases"]
    found = [
        {"p": case["p"]} | {
            name: {which: taken["median"] for which, taken in row["seconds"].items()} or row["reason"]
            for name, row in case["providers"].items()
        }
        for case in cases
    ]  # fmt: skip
    return {"problem": "", "cases": found}


def _line(name: str, found: dict[str, Any]) -> str:
    """Describe a variant's result in one line."""
    if found["problem"]:
        return f"{name}: {found['problem']}"
    words = []
    for case in found["cases"]:
        ours, frozen = (case.get(provider) for provider in ("ours", "frozen"))
        if isinstance(ours, dict) and isinstance(frozen, dict):
            ratio = ours["both"] / frozen["both"]
            words.append(f"p={case['p']:g} {ours['both'] * 1e3:.3f} ms, {ratio:.3f} of the floor")
        else:
            words.append(f"p={case['p']:g} {ours}")
    return f"{name}: {'; '.join(words)}"


def main(argv: list[str] | None = None) -> int:
    """Time the variants and print a line for each; return 1 if one could not be timed, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.variants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", required=True, type=Path, metavar="FILE", help="written anew after each")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on a CPU: no figures")
    args = parser.parse_args(argv)
    done: dict[str, Any] = {}
    for name in args.only:
        done[name] = _measure(VARIANTS[name], _TINY if args.rehearse else _TIMED)
        print(_line(name, done[name]), flush=True)
        write_json(args.json, {"command": "variants", "complete": len(done) == len(args.only), "variants": done})
    return int(any(found["problem"] for found in done.values()))


if __name__ == "__main__":
    sys.exit(main())
