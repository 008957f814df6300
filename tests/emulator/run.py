"""Run the project's compiled kernels in the emulator: one line a case, exit status 1 if any is wrong.

python tests/emulator/run.py [--arch sm_80 sm_90] [--filter REGEX] [--modes late random early] [--seeds 1] [--full] [--jobs 2]
"""

import argparse
import collections
import itertools
import json
import os
import re
import selectors
import sys
import time
from collections.abc import Callable, Iterator

MODES = {"early": 0, "late": 1, "random": 2}
TESTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


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


def examine(emu, args: argparse.Namespace, run: Callable[[], str]) -> tuple[list[str], set[str], list[dict]]:
    """Run a case in every mode with every seed: what is wrong, what is worth a note, and counters."""
    wrong, notes, launches = [], set(), []
    for mode, seed in itertools.product(args.modes, range(args.first, args.first + args.seeds)):
        if mode == "early" and seed > args.first:
            continue
        emu.set(mode=MODES[mode], seed=seed, resident=1 + seed * 5 % 9, registers=args.registers)
        try:
            message = run()
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
        emu.drain()
        seen = emu.problems()
        notes.update(re.sub(r".*?: note: ", "", line) for line in seen if ": note: " in line)
        found = [message] * bool(message) + [line for line in seen if ": note: " not in line]
        wrong += [f"[{mode} {seed}] {line}" for line in found[: args.lines]]
        launches += emu.launches()
    return wrong, notes, launches


def child(args: argparse.Namespace, arch: str, share: int) -> int:
    """Run a share of the cases of one architecture in this process."""
    import torch

    from emulator import cases, emulator

    emu = emulator.Emulator(arch, sms=args.sms, path=args.path)
    torch.set_num_threads(1)
    chosen = [case for case in cases.cases(arch, args.full) if re.search(args.filter, case[0])][share :: args.jobs]
    failed, asked = 0, set()
    with emu.running():
        for name, run in chosen:
            begun, used = time.time(), time.process_time()
            wrong, notes, launches = examine(emu, args, run)
            if wrong and (serial := emu.serialise(asked)):
                notes.add(
                    f"ptxas waits for each wgmma of {', '.join(serial)}; as PTX alone it is wrong: {wrong[0][:200]}"
                )
                wrong, more, _ = examine(emu, args, run)
                notes |= more
            failed += bool(wrong)
            if args.counters:
                with open(args.counters, "a") as file:
                    file.writelines(json.dumps({"arch": arch, "case": name} | each) + "\n" for each in launches)
            status = "WRONG" if wrong else "ok"
            took = f"{time.process_time() - used:.1f}s of {time.time() - begun:.1f}s"
            noted = [f"(note: {note})" for note in sorted(notes)]
            print(f"{status:5} {arch} {name}: {summary(launches)} {took}", *wrong, *noted, sep="\n      ", flush=True)
    print(f"#{len(chosen)} {failed}", flush=True)
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["sm_80", "sm_90"])
    parser.add_argument("--filter", default="", help="regular expression that a case's name holds")
    parser.add_argument("--modes", nargs="+", default=["late", "random"], choices=("early", "late", "random"))
    parser.add_argument("--seeds", type=int, default=1, help="how many orders of warps, CTAs and asynchronous work")
    parser.add_argument("--first", type=int, default=1, help="the first of the seeds")
    parser.add_argument("--full", action="store_true", help="more dtypes, tiles and layouts")
    parser.add_argument("--lines", type=int, default=6, help="of what is wrong, of a case, mode and seed")
    parser.add_argument("--registers", action="store_true", help="wgmma reads an A in registers as late as it may")
    parser.add_argument("--jobs", type=int, default=1, help="processes an architecture")
    parser.add_argument("--sms", type=int, default=3, help="multiprocessors of the imagined GPU")
    parser.add_argument("--path", default=".", help="the project's checkout")
    parser.add_argument("--counters", help="append a line of JSON a launch to this file")
    args = parser.parse_args()
    args.path = os.path.abspath(args.path)
    sys.path[:1] = [TESTS, args.path]  # in the place of this file's folder
    from emulator import build, cases, emulator  # noqa: F401 all that is imported is imported once

    build.build()
    begun, done, failed = time.time(), 0, 0
    shares = [_fork(lambda arch=arch, i=i: child(args, arch, i)) for arch in args.arch for i in range(args.jobs)]
    for line in _lines([pipe for _, pipe in shares]):
        if line.startswith("#"):
            counts = [int(word) for word in line[1:].split()]
            done, failed = done + counts[0], failed + counts[1]
        else:
            print(line, flush=True)
    for pid, _ in shares:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status not in (0, 1):
            print(f"WRONG a process ended with {status}")
            failed += 1
    print(f"{done} cases, {failed} wrong, {time.time() - begun:.0f}s")
    return 1 if failed else 0


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
    sys.exit(main())
