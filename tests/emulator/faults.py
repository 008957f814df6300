"""Check the emulator: plant faults in the PTX of kernels, one at a time, and see which are noticed.

    python tests/emulator/faults.py [--arch sm_80 sm_90] [--kind REGEX] [--case REGEX] [--most 4] [--json FILE]

Of each kind of fault `--most` are planted, chosen by `--seed` and spread over the kernels of cases whose results are
exact, so that one wrong bit is noticed. Each runs in a process of its own, late, at random and early, until it is
noticed. A fault is noticed by wrong results or by what the emulator says. What is missed is judged (`judged.py`); exit
status 1 if that finds no reason, or if six faults of a kind (three, if sm_90 alone has that kind) are judged by silence
alone and not one is noticed.
"""

import argparse
import collections
import concurrent.futures
import json
import multiprocessing
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

TESTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ARCHES = "sm_80", "sm_90"
# a program that takes more turns of warps than any case ten times over does not end; nor does a process of ten minutes
TURNS, SECONDS = 400_000, 600.0
# beginnings of the kinds of fault that kernels of sm_90 alone can have
ON_SM_90 = "TMA", "mbarrier", "wgmma", "grid", "fence.proxy"
# so many faults of a kind, all silent, are no chance
ENOUGH, LEAST = 6, 3


class Target(NamedTuple):
    """A kernel, the case it was found in, its PTX, the faults that it can have, and notes of the case without any."""

    case: Any
    module: int
    kernel: str
    source: str
    faults: list
    notes: set[str]


class Result(NamedTuple):
    """What became of a fault.

    Attributes:
        arch: Where.
        case: The name of the case.
        kernel: The kernel's name.
        kind: The kind of fault.
        line: Of the PTX.
        was: The statement in its place.
        noticed: How it was noticed, or "".
        judged: Why it need not be, or "".
    """

    arch: str
    case: str
    kernel: str
    kind: str
    line: int
    was: str
    noticed: str
    judged: str


def chosen_cases() -> list:
    """Cases with exact results that have every kind of kernel."""
    from emulator import exact

    masked = (0.5,)
    return [
        # edges that fill no tile, everywhere
        exact.projections("bf16", 100, 152, (216,), (16,)),
        # a tile of the large products, many to a program; dropout; sums over rows that are split, ds of many programs
        exact.projections("bf16", 300, 216, (536,), (16,), masked, place=0),
        # few rows: a shrink that is split
        exact.projections("bf16", 16, 1096, (536,), (16,), masked),
        exact.projections("bf16", 600, 72, (56,), (12,), accumulate=True),
        exact.projections("bf16", 100, 104, (88, 56, 40), (16, 8, 3), (0.5, 0.0, 0.5), accumulate=True),
        exact.mlp("fp16", 70, 104, 88, 12),
        exact.projections("fp32", 70, 100, (84,), (12,), masked),
        exact.projections("fp32", 70, 100, (84,), (12,), masked, precision="tf32"),
        exact.projections("bf16", 70, 100, (83,), (5,), masked, strided=True),
    ]


def settings() -> Iterator[dict[str, int]]:
    """Orders in which a fault is run until it is noticed."""
    from emulator.emulator import EARLY, LATE, RANDOM

    for seed, mode in enumerate((LATE, RANDOM, EARLY, LATE, RANDOM), 1):
        yield dict(mode=mode, seed=seed, resident=1 + seed * 5 % 9)


def more_settings() -> Iterator[dict[str, int]]:
    """Others, with long and short turns of warps."""
    for seed in range(6, 14):
        yield dict(mode=1 + seed % 2, seed=seed, resident=1 + seed % 8, quantum=(1, 8, 64)[seed % 3])


def attempt(emu, judge: Callable[[], str], options: dict[str, int], known: set[str]) -> str:
    """Run a case once: what is wrong, or ""; a note is nothing wrong if it is known from the kernels as they are."""
    emu.set(**options)
    try:
        wrong = judge()
    except Exception as error:
        wrong = f"{type(error).__name__}: {error}"
    emu.drain()
    seen = {re.sub(r"^\d+ x ", "", line) for line in emu.problems()}
    return "; ".join([wrong] * bool(wrong) + sorted(seen - known))


def targets(emu, args: argparse.Namespace) -> list[Target]:
    """The kernels of all cases as they are, which run right, and the faults that can be planted in each."""
    from emulator import planted

    found, seen = [], set()
    for case in chosen_cases():
        if not re.search(args.case, case.name):
            continue
        first, notes = emu.lib.emu_modules(), set()
        for options in settings():
            said = attempt(emu, case.judge, options, notes)
            notes.update(re.split("; (?=_)", said) if said else ())
        wrong = [note for note in notes if ": note: " not in note]
        assert not wrong, f"{case.name} is wrong with no fault in it: {wrong}"
        for module in range(first, emu.lib.emu_modules()):
            source = emu.lib.emu_source(module).decode()
            kernel = re.search(r"\.entry _?(\w+?)(?:_kernel)?\(", source)[1]
            if source in seen or not re.search(args.kernel, kernel):
                continue
            seen.add(source)
            reached = set(map(int, emu.lib.emu_reached(module).decode().split()))
            faults = [one for one in planted.faults(source, reached) if re.search(args.kind, one.kind)]
            found.append(Target(case, module, kernel, source, faults, notes))
    return found


def spread(found: list[Target], most: int, seed: int) -> list[tuple[Target, Any]]:
    """Of each kind so many faults, one after the other from each kernel that has some."""
    chosen, kinds = [], dict.fromkeys(one.kind for target in found for one in target.faults)
    for kind in kinds:
        draw = random.Random(f"{seed} {kind}")
        heaps = [[(target, one) for one in target.faults if one.kind == kind] for target in found]
        heaps = [heap for heap in heaps if heap]
        for heap in heaps:
            draw.shuffle(heap)
        draw.shuffle(heaps)
        turns = [heap[k] for k in range(most) for heap in heaps if k < len(heap)]
        chosen += turns[:most]
    draw = random.Random(seed)
    draw.shuffle(chosen)
    return chosen


def apart(run: Callable[[], str]) -> str:
    """What a function says in a process of its own, which may die or go on for ever."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)
    process = fork.Process(target=lambda: there.send(run()))
    process.start()
    there.close()
    try:
        return here.recv() if here.poll(SECONDS) else "it does not end"
    except EOFError:
        process.join()
        return f"the process ended with {process.exitcode}"
    finally:
        process.kill()
        process.join()
        process.close()


def plant(emu, target: Target, text: str, orders: list[dict[str, int]]) -> str:
    """Run the case with other PTX of a kernel until something is noticed: what, "" or "refused"."""
    if not emu.lib.emu_replace(target.module, text.encode()):
        return "refused"
    for options in orders:
        if noticed := attempt(emu, target.case.judge, options, target.notes):
            return noticed
    return ""


def judge(emu, target: Target, fault) -> str:
    """Why a fault that was missed changes nothing, or "" where that is not proven."""
    from emulator import judged

    late, _, early, *_ = settings()
    # a value is what it is, late and early; sums of wgmma are there early alone
    orders = [early] if fault.kind.startswith("wgmma") else [late, early]
    for why, programs in judged.proofs(target.source, fault):
        if not any(apart(lambda text=text: plant(emu, target, text, orders)) for text in programs):
            return why
    return judged.ORDERS.get(fault.kind, "")


def work(arch: str, args: argparse.Namespace) -> tuple[list[Result], int]:
    """Plant faults in the kernels of an architecture; the results, and how many were left for want of time."""
    sys.path[:0] = [TESTS, args.path]
    from emulator import emulator, judged

    emu = emulator.Emulator(arch, path=args.path)
    import torch

    torch.set_num_threads(1)
    results = []
    with emu.running():
        emu.set(turns=TURNS)
        found = targets(emu, args)
        chosen = spread(found, args.most, args.seed)
        print(f"{arch}: {len(found)} kernels, {len(chosen)} faults to plant", flush=True)
        for done, (target, fault) in enumerate(chosen):
            if time.time() > args.until:
                return results, len(chosen) - done
            # what only orders is looked at in many orders
            orders = [*settings(), *(more_settings() if fault.kind in judged.ORDERS else ())]
            noticed = apart(lambda: plant(emu, target, fault.text, orders))  # noqa: B023 runs at once
            if noticed == "refused":
                continue
            why = "" if noticed else judge(emu, target, fault)
            result = Result(arch, target.case.name, target.kernel, fault.kind, fault.line, fault.was, noticed, why)
            results.append(result)
            show(result, args.verbose)
    return results, 0


def outcome(one: Result) -> str:
    """What became of a fault: noticed, proven to change nothing, judged by silence alone, or missed."""
    if TESTS not in sys.path:
        sys.path.insert(0, TESTS)
    from emulator import judged

    if one.noticed or not one.judged:
        return "noticed" if one.noticed else "missed"
    return "silent" if one.judged in judged.ORDERS.values() else "proven"


def show(result: Result, verbose: bool) -> None:
    """Print a fault that was missed, or any."""
    if result.noticed and not verbose:
        return
    how = result.noticed[:160] or result.judged
    place = f"{result.arch} {result.kernel} ({result.case}) line {result.line}"
    print(f"{outcome(result):7} {place}: {result.kind}: {result.was[:70]}  {how}", flush=True)


def table(results: list[Result]) -> Iterator[str]:
    """Rates by kind and architecture."""
    cells = collections.defaultdict(collections.Counter)
    for one in results:
        cells[one.kind][one.arch] += 1
        cells[one.kind][one.arch, outcome(one)] += 1
    yield f"{'noticed of planted':42}" + "".join(f"{arch:>10}" for arch in ARCHES) + "   not noticed"
    for kind in sorted(cells):
        count = cells[kind]
        rates = "".join(f"{count[arch, 'noticed']:6}/{count[arch]:<3}" if count[arch] else " " * 10 for arch in ARCHES)
        others = {word: sum(count[arch, word] for arch in ARCHES) for word in ("proven", "silent", "missed")}
        yield f"{kind:42}{rates}   {', '.join(f'{number} {word}' for word, number in others.items() if number)}"
    total = collections.Counter(map(outcome, results))
    yield f"{len(results)} planted: " + ", ".join(
        f"{total[word]} {word}" for word in ("noticed", "proven", "silent", "missed")
    )


def unseen(results: list[Result]) -> list[str]:
    """Kinds of which enough were planted, and of which all were judged by silence.

    Enough are `ENOUGH`, or `LEAST` of a kind that sm_90 alone has, of which half as many are planted.
    """
    words = collections.defaultdict(set)
    for one in results:
        words[one.kind].add(outcome(one))
    counts = collections.Counter(one.kind for one in results)
    enough = {kind: LEAST if kind.startswith(ON_SM_90) else ENOUGH for kind in words}
    return sorted(kind for kind, found in words.items() if counts[kind] >= enough[kind] and found == {"silent"})


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=ARCHES, choices=ARCHES)
    parser.add_argument("--kind", default="", help="regular expression that a kind of fault holds")
    parser.add_argument("--case", default="", help="regular expression that a case's name holds")
    parser.add_argument("--kernel", default="", help="regular expression that a kernel's name holds")
    parser.add_argument("--most", type=int, default=4, help="of one kind on one architecture")
    parser.add_argument("--seed", type=int, default=0, help="which of the faults are planted")
    parser.add_argument("--minutes", type=float, default=12, help="begin no fault after so many")
    parser.add_argument("--json", metavar="FILE", help="write every fault and what became of it")
    parser.add_argument("--verbose", action="store_true", help="a line for those that are noticed as well")
    parser.add_argument("--path", default=os.path.dirname(TESTS), help="the checkout whose kernels are run")
    return parser


def main() -> int:
    """Run the command."""
    args = parser().parse_args()
    begun = time.time()
    args.until, args.path = begun + 60 * args.minutes, os.path.abspath(args.path)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(len(args.arch), mp_context=spawn) as pool:
        ended = list(pool.map(work, args.arch, [args] * len(args.arch)))
    results, left = [one for part, _ in ended for one in part], sum(count for _, count in ended)
    print(*table(results), *(f"nothing was noticed of: {kind}" for kind in unseen(results)), sep="\n")
    print(f"{time.time() - begun:.0f}s" + f"; {left} were left for want of time" * bool(left))
    if args.json:
        with open(args.json, "w") as file:
            json.dump([one._asdict() for one in results], file, indent=1)
    missed = any(not one.noticed and not one.judged for one in results)
    return 1 if not results or missed or unseen(results) else 0


if __name__ == "__main__":
    sys.exit(main())
