"""Hold what the compiled kernels do to stored budgets, a file for each Triton version; exit status 1 if one is broken.

    python tests/emulator/counters.py [--arch sm_80 sm_90] [--quick]        holds a fixed set of launches
    python tests/emulator/counters.py --renew [--why REASON]                 stores what they do now
    python tests/emulator/counters.py --lines REGEX                          shows launches by line of their kernels

Of each launch, by exact count: instructions may grow by a twentieth; products by tensor cores, bytes and sectors may
not grow; bytes are those of the formula in `lora_kernels.bench.cost.traffic`; and operands of 16 bits on 16 bytes pass over
the banks of shared memory as few times as can be, except where the budget says why not.
"""

import argparse
import importlib.metadata
import json
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

__all__ = ["broken", "main", "renewed"]

TESTS = Path(__file__).resolve().parent.parent
ARCHES = "sm_80", "sm_90"
# instructions: a compiler's mood
_GROWTH = 1.05
# a tile of fewer words than lanes, as of a mask, is read by several of them
_READ = 1.08


def broken(now: dict[str, dict], stored: dict[str, dict]) -> Iterator[str]:
    """Say which budgets launches break.

    Args:
        now: Figures by a launch's name.
        stored: Likewise.
    """
    for name, figures in now.items():
        if name not in stored:
            yield f"{name}: no budget is stored"
            continue
        yield from (f"{name}: {wrong}" for wrong in (*_unfit(figures, stored[name]), *_grown(figures, stored[name])))


def _unfit(now: dict, stored: dict) -> Iterator[str]:
    """What no budget allows."""
    if now["formula"]:
        read, written = now["formula"]
        if not read <= now["read"] <= _READ * read:
            yield f"reads {now['read']} bytes, by the formula {read}"
        if now["written"] != written:
            yield f"writes {now['written']} bytes, by the formula {written}"
    if now["aligned"] and "why" not in stored:
        over = [
            f"{kind} {passes} passes of {fewest}" for kind, (passes, fewest) in now["passes"].items() if passes > fewest
        ]
        if over:
            yield f"shared memory: {', '.join(over)}, and the budget does not say why"


def _grown(now: dict, stored: dict) -> Iterator[str]:
    """What grew."""
    for what in ("instructions", "products", "read", "written", "sectors"):
        most = stored[what] * (_GROWTH if what == "instructions" else 1)
        if now[what] > most:
            yield f"{what} {now[what]}, stored {stored[what]}"
    for kind, (passes, fewest) in now["passes"].items():
        was = _ratio(*stored["passes"].get(kind, (1, 1)))
        if _ratio(passes, fewest) > was * _GROWTH:
            yield f"{kind} passes {_ratio(passes, fewest):.2f} times the fewest, stored {was:.2f}"


def _ratio(passes: int, fewest: int) -> float:
    return passes / fewest


def renewed(now: dict[str, dict], stored: dict[str, dict], why: str = "") -> dict[str, dict]:
    """What to store: what launches do now, in place of all that is stored of their architectures.

    A reason for more passes than the fewest is kept while it is needed; `why` is for launches that have none.
    """
    arches = {name.split()[0] for name in now}
    kept = {name: figures for name, figures in stored.items() if name.split()[0] not in arches}
    for name, figures in now.items():
        over = figures["aligned"] and any(passes > fewest for passes, fewest in figures["passes"].values())
        reason = stored.get(name, {}).get("why", why)
        kept[name] = figures | ({"why": reason} if over and reason else {})
    return dict(sorted(kept.items()))


def run(arch: str, quick: bool) -> tuple[dict[str, dict], dict[str, dict]]:
    """Figures and counters of each launch on an architecture, by name; in a process of its own."""
    import torch

    from emulator import counting, emulator
    from lora_kernels.kernels._imagined import GPUS

    torch.set_num_threads(1)
    emu = emulator.Emulator(arch, GPUS[arch].num_sms)
    found = [one for case in (counting.QUICK if quick else counting.CASES) for one in counting.count(emu, arch, case)]
    return {one.name: one.figures for one in found}, {one.name: one.counters for one in found}


def _all(args: argparse.Namespace) -> tuple[dict[str, dict], dict[str, dict]]:
    figures, counters = {}, {}
    for arch in args.arch:
        # an emulator is of one architecture, and one a process; Triton's threads survive no fork
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            for mine, more in zip((figures, counters), pool.submit(run, arch, args.quick).result(), strict=True):
                mine.update(more)
    return figures, counters


def _show(counters: dict[str, dict], pattern: str) -> None:
    """Print what each line of the kernels does, the widest detour over shared memory first."""
    for name, counted in counters.items():
        if not re.search(pattern, name):
            continue
        print(name)
        for place, (passes, fewest, requests, sectors) in sorted(
            counted["lines"].items(), key=lambda line: line[1][1] - line[1][0]
        ):
            print(f"    {place:60} {passes:9} passes of {fewest:9} {sectors:9} sectors of {requests:8} requests")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=ARCHES, choices=ARCHES)
    parser.add_argument("--quick", action="store_true", help="a few launches of every kernel")
    parser.add_argument("--budgets", type=Path, default=TESTS / "budgets", metavar="FOLDER")
    parser.add_argument("--renew", action="store_true", help="store what launches do now")
    parser.add_argument("--why", default="", help="with --renew: why some pass over shared memory more than they must")
    parser.add_argument("--lines", metavar="REGEX", help="show the launches of this name by line of their kernels")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all counters of all launches")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.renew and args.quick:
        parser.error("--renew stores every launch: not with --quick")
    figures, counters = _all(args)
    triton = ".".join(importlib.metadata.version("triton").split(".")[:2])
    path = args.budgets / f"counters-{triton}.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if args.json:
        args.json.write_text(json.dumps(counters), encoding="utf-8")
    if args.lines:
        _show(counters, args.lines)
    if args.renew:
        stored = renewed(figures, stored, args.why)
        lines = [f"{json.dumps(name)}: {json.dumps(kept)}" for name, kept in stored.items()]
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        print(f"wrote {path}")
    wrong = list(broken(figures, stored))
    print(*wrong, sep="\n", end="\n" if wrong else "")
    print(f"{len(figures)} launches of kernels compiled by Triton {triton}, {len(wrong)} broken budgets")
    return 1 if wrong or not figures else 0


if __name__ == "__main__":
    # this file's folder, in which `emulator` is a module and not the package, makes room for the package's
    sys.path[0] = str(TESTS)
    sys.exit(main())
