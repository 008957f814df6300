"""Measure on this GPU which form of each large product is fastest, and store the choice for every later call.

The fused kernel can compute y and dx in one of several tiles; the vendor's library can compute them with the thin
product around it. By default a rule chooses by arithmetic on the shape. This command checks every form against float64
and times the forms in turn with a cold cache. A form other than the rule's is stored only if its quartiles are below
the rule's. Choices apply to this GPU, this dtype, these versions, and to nearby rows and ranks.

  lora-kernels tune                                     llama-8b's projections, r = 16, with and without dropout
  lora-kernels tune --shape 8192x4096x4096 --r 16 64    your own: rows x in_features x out_features
  lora-kernels tune --show                              what is stored, and where
"""

import argparse
import contextlib
import functools
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from lora_kernels import plan
from lora_kernels.bench.cases import tune as tune_case
from lora_kernels.bench.cases.layer import Settings
from lora_kernels.bench.cases.tune import Time
from lora_kernels.console import DASH, SplitTable, on_stdout
from lora_kernels.constants import DTYPES
from lora_kernels.measure import timing
from lora_kernels.measure.machine import caption, machine, write_json
from lora_kernels.measure.presets import PRESETS, Shape, parse_shape, with_rows
from lora_kernels.plan import tuned

__all__ = ["add_arguments", "run", "tune"]

# shape, rank, drop probability, and the passes that no earlier case covers
Case = tuple[Shape, int, float, tuple[str, ...]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lora-kernels tune`."""
    what = parser.add_argument_group("what is tuned")
    which = what.add_mutually_exclusive_group()
    which.add_argument(
        "--preset",
        choices=[name for name, preset in PRESETS.items() if preset.shapes],
        default="llama-8b",
        help="named shapes (default: llama-8b)",
    )
    which.add_argument("--shape", nargs="+", metavar="MxINxOUT", help="rows x in_features x out_features")
    what.add_argument("--m", type=int, nargs="+", metavar="ROWS", help="other numbers of rows for the same layers")
    what.add_argument("--r", type=int, nargs="+", metavar="RANK", help="ranks; the preset's, or 16")
    what.add_argument(
        "--p",
        type=float,
        nargs="+",
        default=[0.0, 0.1],
        metavar="P",
        help="only whether it is 0 matters (default: both)",
    )
    what.add_argument("--dtype", choices=DTYPES, default="bf16", help="of x and W (default: bf16)")
    how = parser.add_argument_group("how")
    how.add_argument("--rounds", type=int, default=30, help="timed calls of each form (default: 30)")
    how.add_argument("--minutes", type=float, help="begin no case after this many minutes")
    how.add_argument("--dry-run", action="store_true", help="measure and show, store nothing")
    instead = parser.add_argument_group("in place of tuning").add_mutually_exclusive_group()
    instead.add_argument("--show", action="store_true", help="print what is stored")
    instead.add_argument("--clear", action="store_true", help="remove what is stored")


def run(args: argparse.Namespace) -> int:
    """Tune and return the exit status.

    0 if the choices were stored, 1 if a form's results were wrong or storing failed, 2 if the options cannot run here.
    """
    console = on_stdout()
    if args.show or args.clear:
        return _show(console, args) if args.show else _clear(console)
    if not torch.cuda.is_available():
        return _refuse("there is no GPU here, so there is nothing to tune: on a CPU every product has one form")
    device = torch.device("cuda", torch.cuda.current_device())
    timer = functools.partial(timing.time_all, measure=timing.clock(device))
    return tune(args, console, device, torch.cuda.get_device_name(device), timer)


def tune(args: argparse.Namespace, console: Console, device: torch.device, gpu: str, timer: Time) -> int:
    """Tune on a device and store the choices under the name `gpu`; see `run`, and `tune_case.Time` for `timer`."""
    settings = Settings(device, DTYPES[args.dtype], "triton", rounds=args.rounds)
    try:
        cases = _cases(args, settings)
        # raise now if the file cannot be written, not after everything was measured
        _write(args, gpu, [], [], stored=False)
        lock = _tuner_lock()
    except tuned.Busy as error:
        return _refuse(f"somebody tunes on this machine already: {error}; wait for it to end, or end it")
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        return _refuse(str(error))
    with lock:
        rows, skipped, stored = _tune_all(args, settings, gpu, timer, cases)
    for table in _tables(rows):
        console.print(table)
    how = f"median of {args.rounds} rounds of the whole pass, forms taken in turn, L2 overwritten before each call"
    console.print(f"{caption(machine())}\n{how}", style="dim")
    if skipped:
        why = ", ".join(dict.fromkeys(case["why"] for case in skipped))
        console.print(f"{len(skipped)} of {len(cases)} cases were not run: {why}", style="yellow")
    if stored:
        console.print(f"Stored in {tuned.where(gpu)}; calls use it from now on.", style="bold green", soft_wrap=True)
    elif rows:
        console.print("Nothing was stored.", style="bold" if args.dry_run else "bold red")
    wrong = any(form["wrong"] for row in rows for form in row["forms"])
    return 1 if wrong or (rows and not stored and not args.dry_run) else 0


def _tune_all(
    args: argparse.Namespace, settings: Settings, gpu: str, timer: Time, cases: list[Case]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], bool]:
    """Tune case after case, and store each choice at once, so that an early end keeps the finished cases."""
    began, rows, skipped, saved = time.monotonic(), [], [], []
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=len(cases))
        for shape, r, p, passes in cases:
            name = f"{shape} r={r} p={p:g}"

            def tick(doing: str, name: str = name) -> None:
                bar.update(task, description=f"{name}: {doing}")

            why = "out of time" if args.minutes is not None and time.monotonic() - began > args.minutes * 60 else ""
            if not why:
                try:
                    new = tune_case.tune_case(shape, r, p, settings, timer, passes, tick)
                except torch.OutOfMemoryError:
                    why = "out of memory"
            if why:
                skipped.append({"shape": str(shape), "r": r, "p": p, "why": why})
            else:
                rows += new
                choices = {row["key"]: tuple(row["choice"]) for row in new if row["choice"] is not None}
                if choices and not args.dry_run:
                    saved.append(tuned.save(gpu, choices))
                    plan.forget()
            bar.advance(task)
            _write(args, gpu, rows, skipped, bool(saved) and all(saved))
    return rows, skipped, bool(saved) and all(saved)


def _cases(args: argparse.Namespace, settings: Settings) -> list[Case]:
    """List the cases, at the numbers of rows that choices are stored for, with each product once."""
    preset = None if args.shape else PRESETS[args.preset]
    shapes = preset.shapes if preset else tuple(map(parse_shape, args.shape))
    for option, given in (("--r", args.r), ("--m", args.m), ("--rounds", [args.rounds])):
        for value in given or ():
            if value < 1:
                raise ValueError(f"{option} {value}: at least 1 is needed")
    for p in args.p:
        if not 0 <= p < 1:
            raise ValueError(f"--p {p:g}: a dropout probability is at least 0 and below 1")
    if args.m:
        shapes = with_rows(shapes, args.m)
    cases, seen = [], set()
    for shape in shapes:
        for r in args.r or (preset.r if preset else (16,)):
            # raise now if the kernels cannot run
            plan.choose(settings.device, settings.dtype, r, False, "triton")
            for p in args.p:
                bucket = replace(shape, m=tuned.bucket(shape.m))
                new = {w: key for w, key in tune_case.keys(bucket, r, p, settings.dtype).items() if key not in seen}
                seen.update(new.values())
                if new:
                    cases.append((bucket, r, p, tuple(new)))
    return cases


def _tuner_lock() -> contextlib.AbstractContextManager[None]:
    """Take the tuner's lock; without a usable directory there is no lock, and storing reports the reason later."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(tuned.tuning())
        except tuned.Busy:
            raise
        except (OSError, RuntimeError, ValueError):
            pass
        return stack.pop_all()


def _tables(rows: list[dict[str, Any]]) -> Iterator[Table | Text]:
    if not rows:
        return
    table = _table("product", "rule's form", "ms", "fastest form", "ms", "gain", "kept", numbers=("ms", "gain"))
    for row in rows:
        by_form = {form["form"]: form for form in row["forms"]}
        ruled, fastest = by_form[row["rule"]], by_form.get(row["fastest"])
        both = fastest and ruled["seconds"]
        gain = ruled["seconds"]["median"] / fastest["seconds"]["median"] if both else None
        kept = "nothing" if row["choice"] is None else "the rule's" if row["choice"] == row["rule"] else "the fastest"
        table.add_row(
            row["key"], ruled["name"], _ms(ruled), fastest["name"] if fastest else DASH, _ms(fastest),
            DASH if gain is None else f"{gain:.3f}x", kept,
        )  # fmt: skip
    yield table
    reasons = (f"  {row['key']}, {f['name']}: {f['reason']}" for row in rows for f in row["forms"] if f["reason"])
    yield from (Text(reason, "yellow") for reason in dict.fromkeys(reasons))


def _ms(form: dict[str, Any] | None) -> str:
    taken = form and form["seconds"]
    return f"{taken['median'] * 1e3:.4f} ±{(taken['q3'] - taken['q1']) / 2 / taken['median']:.1%}" if taken else DASH


def _table(*headings: str, numbers: tuple[str, ...] = ()) -> Table:
    table = SplitTable(pad_edge=False, padding=(0, 1))
    for heading in headings:
        is_number = heading in numbers
        table.add_column(heading, justify="right" if is_number else "left", no_wrap=is_number)
    return table


def _show(console: Console, args: argparse.Namespace) -> int:
    files = list(tuned.stored_tables())
    for path, stored in files:
        for made_with, choices in stored.choices.items():
            used = "in use" if made_with == tuned.versions() else f"not in use: here is {tuned.versions()}"
            console.print(Text(f"{stored.gpu}, {made_with} ({used})", "bold"), soft_wrap=True)
            table = _table("product", "strategy", "tile's place")
            for key, (name, place) in choices.items():
                table.add_row(key, name, DASH if name != "fused" else "by rule" if place is None else str(place))
            console.print(table)
        console.print(str(path), style="dim", soft_wrap=True)
    if not files:
        console.print("Nothing is stored: the rules choose. `lora-kernels tune` measures.")
    if args.json:
        tables = [{"file": str(path), **table._asdict()} for path, table in files]
        write_json(args.json, {"command": "tune --show", "in_use": tuned.versions(), "tables": tables})
    return 0


def _clear(console: Console) -> int:
    try:
        gone = tuned.clear()
    except (OSError, RuntimeError, ValueError) as error:
        return _refuse(str(error))
    plan.forget()
    console.print("\n".join(f"removed {path}" for path in gone) or "There was nothing to remove.", soft_wrap=True)
    return 0


def _write(args: argparse.Namespace, gpu: str, rows: list, skipped: list, stored: bool) -> None:
    if args.json:
        payload = {"gpu": gpu, "versions": tuned.versions(), "stored": stored, "skipped": skipped, "products": rows}
        write_json(args.json, {"command": "tune", "rounds": args.rounds, "cache": "L2 overwritten"} | payload)


def _refuse(reason: str) -> int:
    print(f"lora-kernels tune: {reason}", file=sys.stderr)
    return 2
