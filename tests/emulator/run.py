"""Run the project's compiled kernels in the emulator: a line a case, exit status 1 if any is wrong.

    python tests/emulator/run.py [--arch sm_80 sm_90] [--quick | --full] [--filter REGEX] [--modes late random early]

`--quick` runs each kernel and way once, late; by default it is the table, late and random; `--full` adds every tile and
flag that the rules can choose, and the early mode. With another Triton: `PYTHONPATH=FOLDER python tests/emulator/run.py`.
"""

import argparse
import collections
import itertools
import json
import math
import os
import re
import selectors
import sys
import time
import traceback
from collections.abc import Callable, Iterator

TESTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ARCHES = "sm_80", "sm_90"
MODES = {"early": 0, "late": 1, "random": 2}


def summary(launches: list[dict]) -> str:
    """Counters of a case in a few words."""
    total = collections.Counter()
    for launch in launches:
        total.update({key: value for key, value in launch.items() if isinstance(value, int)})
    words = [f"{len(launches)} launches", f"{total['instructions'] / 1e6:.2f}M instructions"]
    for name in ("lds", "sts", "ldmatrix", "stmatrix", "cp"):
        if total[f"ideal_{name}"]:
            words.append(f"{name} x{total[f'waves_{name}'] / total[f'ideal_{name}']:.2f}")
    if total["overlapped"]:
        words.append(f"{total['overlapped']} overlapped")
    if total["divergent"]:
        words.append(f"{total['divergent']} divergent")
    return ", ".join(words)


def examine(emu, args: argparse.Namespace, judge: Callable[[], str]) -> tuple[list[str], set[str], list[dict]]:
    """Run a case in every mode with every seed: what is wrong, what is worth a note, and counters."""
    wrong, notes, launches = [], set(), []
    for mode, seed in itertools.product(args.modes, range(args.first, args.first + args.seeds)):
        if mode == "early" and seed > args.first:
            continue
        emu.set(mode=MODES[mode], seed=seed, resident=1 + seed * 5 % 9, registers=args.registers)
        try:
            message = judge()
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
        emu.drain()
        seen = emu.problems()
        notes.update(re.sub(r".*?: note: ", "", line) for line in seen if ": note: " in line)
        found = [message] * bool(message) + [line for line in seen if ": note: " not in line]
        wrong += [f"[{mode} {seed}] {line}" for line in found[: args.lines]]
        launches += emu.launches()
    return wrong, notes, launches


def examine_serialised(emu, args, judge, asked: set[int]) -> tuple[list[str], set[str], list[dict]]:
    """Likewise; what is wrong by PTX alone is run again as ptxas makes it, which waits for some wgmma one by one."""
    wrong, notes, launches = examine(emu, args, judge)
    if wrong and (serial := emu.serialise(asked)):
        notes.add(f"ptxas waits for each wgmma of {', '.join(serial)}; as PTX alone it is wrong: {wrong[0][:200]}")
        wrong, more, launches = examine(emu, args, judge)
        notes |= more
    return wrong, notes, launches


def child(args: argparse.Namespace, arch: str, share: int) -> int:
    """Run a share of the cases of one architecture in this process, and print what became of each, as JSON."""
    import torch

    from emulator import emulator, launches, rules, table

    emu = emulator.Emulator(arch, sms=args.sms, path=args.path)
    torch.set_num_threads(1)
    cases, everything = list((table.quick if args.quick else table.table)(arch)), set()
    if args.full:
        done = set().union(*(rules.features(case, emu.gpu) for case in cases))
        more, everything = rules.covering(emu.gpu, done)
        cases += more
        everything |= done
    part, parts = args.share
    chosen = [case for case in cases if re.search(args.filter, case.name)]
    chosen = chosen[part + parts * share :: parts * args.jobs]
    asked: set[int] = set()
    with emu.running(), launches.recorded() as seen:
        for case in chosen:
            if time.time() > args.end:
                break
            begun, used = time.time(), time.process_time()
            wrong, notes, counters = examine_serialised(emu, args, case.judge, asked)
            if args.counters:
                with open(args.counters, "a") as file:
                    file.writelines(json.dumps({"arch": arch, "case": case.name} | each) + "\n" for each in counters)
            took = f"{time.process_time() - used:.1f}s of {time.time() - begun:.1f}s"
            line = dict(
                arch=arch, name=case.name, wrong=wrong, notes=sorted(notes), summary=summary(counters), took=took
            )
            print(json.dumps(line), flush=True)
    kinds = set(seen)
    covered = set().union(*(one.features() for one in kinds))
    ended = dict(
        arch=arch, tiles=sorted({one.tile() for one in kinds}), covered=sorted(map(repr, covered)),
        everything=sorted(map(repr, everything)), missing=launches.missing_tiles(kinds, tma=arch != "sm_80"),
    )  # fmt: skip
    print(json.dumps(ended), flush=True)
    return 0


def show(line: dict) -> None:
    """Print what became of a case."""
    status = "WRONG" if line["wrong"] else "ok"
    noted = [f"(note: {note})" for note in line["notes"]]
    head = f"{status:5} {line['arch']} {line['name']}: {line['summary']} {line['took']}"
    print(head, *line["wrong"], *noted, sep="\n      ", flush=True)


def coverage(ended: list[dict], arch: str) -> tuple[list[str], list[str]]:
    """Which tiles of an architecture were executed in all shares, in lines, and which tiles and flags were not."""
    shares = [one for one in ended if one["arch"] == arch]
    covered = set().union(*(one["covered"] for one in shares))
    everything = set().union(*(one["everything"] for one in shares))
    missing = set.intersection(*(set(one["missing"]) for one in shares))
    tiles = collections.defaultdict(set)
    for kernel, tile in itertools.chain(*(one["tiles"] for one in shares)):
        tiles[kernel].add(tile)
    lines = [
        f"{arch} {kernel}, {len(tiles[kernel])} tiles: {' '.join(sorted(tiles[kernel]))}" for kernel in sorted(tiles)
    ]
    if not everything:
        return lines, []
    lines.append(f"{arch}: {len(everything & covered)} of {len(everything)} tiles and flags that the rules can choose")
    return lines, sorted(f"never executed on {arch}: {one}" for one in (everything - covered) | missing)


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=ARCHES, choices=ARCHES)
    parser.add_argument("--quick", action="store_true", help="each kernel and way once, in the late mode")
    parser.add_argument("--full", action="store_true", help="every tile and flag of the rules as well, in all modes")
    parser.add_argument("--filter", default="", help="regular expression that a case's name holds")
    parser.add_argument("--modes", nargs="+", choices=MODES, help="when asynchronous work takes effect")
    parser.add_argument("--seeds", type=int, default=1, help="how many orders of warps, CTAs and asynchronous work")
    parser.add_argument("--first", type=int, default=1, help="the first of the seeds")
    parser.add_argument("--lines", type=int, default=6, help="of what is wrong, of a case, mode and seed")
    parser.add_argument("--registers", action="store_true", help="wgmma reads an A in registers as late as it may")
    parser.add_argument("--jobs", type=int, default=1, help="processes an architecture")
    parser.add_argument("--share", type=_share, default=(0, 1), metavar="I/N", help="only every N-th case, from I on")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no case after this long")
    parser.add_argument("--jsonl", action="store_true", help="print JSON, a line a case")
    parser.add_argument("--sms", type=int, default=3, help="multiprocessors of the imagined GPU")
    parser.add_argument("--path", default=os.path.dirname(TESTS), help="the checkout whose kernels are run")
    parser.add_argument("--counters", help="append a line of JSON a launch to this file")
    return parser


def _share(text: str) -> tuple[int, int]:
    part, parts = map(int, text.split("/"))
    if not 0 <= part < parts:
        raise argparse.ArgumentTypeError(f"{text} is no share: 0/2 and 1/2 are the halves")
    return part, parts


def results(args: argparse.Namespace) -> Iterator[dict]:
    """What became of each case as it ends, and of each process what it covered; a process that dies raises.

    Raises:
        RuntimeError: The emulator cannot be built, or a process died.
    """
    args.modes = args.modes or (["late"] if args.quick else ["late", "random", "early"][: 2 + args.full])
    args.end = time.time() + 60 * args.minutes
    sys.path[:0] = [TESTS, args.path]
    from emulator import build, emulator, rules, table  # noqa: F401 all that is imported is imported once

    build.build()
    shares = [_fork(lambda arch=arch, i=i: child(args, arch, i)) for arch in args.arch for i in range(args.jobs)]
    for line in _lines([pipe for _, pipe in shares]):
        yield json.loads(line)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid, _ in shares]
    if any(statuses):
        raise RuntimeError(f"processes ended with {statuses}")


def main() -> int:
    """Run the command."""
    args = parser().parse_args()
    args.path = os.path.abspath(args.path)
    begun, cases, ended = time.time(), [], []
    for line in results(args):
        if "name" in line:
            print(json.dumps(line), flush=True) if args.jsonl else show(line)
            cases.append(line)
        else:
            ended.append(line)
    executed, lacking = zip(*(coverage(ended, arch) for arch in args.arch), strict=True)
    late = time.time() > args.end
    part = args.filter or args.share[1] > 1 or late
    executed, lacking = [*itertools.chain(*executed)], [] if part else [*itertools.chain(*lacking)]
    failed = sum(bool(case["wrong"]) for case in cases)
    if args.jsonl:
        print(json.dumps(dict(executed=executed, lacking=lacking)))
    else:
        if late:
            print("the time was up before all cases had run: what else was to be executed is not judged")
        print(*executed, *lacking, f"{len(cases)} cases, {failed} wrong, {time.time() - begun:.0f}s", sep="\n")
    return 1 if failed or lacking or not cases else 0


def _fork(run: Callable[[], int]) -> tuple[int, int]:
    """Run a function in a child process; its number, and what it prints."""
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return pid, read
    os.dup2(write, 1)
    status = 3
    try:
        status = run()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def _lines(pipes: list[int]) -> Iterator[str]:
    """Lines of several processes as they come."""
    selector, begun = selectors.DefaultSelector(), {pipe: b"" for pipe in pipes}
    for pipe in pipes:
        selector.register(pipe, selectors.EVENT_READ)
    while selector.get_map():
        for key, _ in selector.select():
            data = os.read(key.fd, 1 << 16)
            if not data:
                selector.unregister(key.fd)
            *lines, begun[key.fd] = (begun[key.fd] + data).split(b"\n")
            yield from (line.decode() for line in lines)


if __name__ == "__main__":
    sys.path.pop(0)  # this file's folder, in which `emulator` is a module and not the package
    try:
        sys.exit(main())
    except RuntimeError as error:
        print(f"{sys.argv[0]}: {error}", file=sys.stderr)
        sys.exit(2)
