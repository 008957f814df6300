"""Check the instrument: plant faults in the PTX of kernels, one at a time, and see which are noticed.

python tests/emulator/faults.py [--arch sm_80] [--kind REGEX] [--kernel REGEX] [--most 8]
"""

import argparse
import collections
import os
import random
import re
import sys

TESTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def sites(text: str) -> list[tuple[str, str, str]]:
    """Faults of a kernel: kind, where, and the text with it."""
    lines, found = text.split("\n"), []

    def put(kind: str, at: int, *new: str) -> None:
        found.append(
            (kind, f"line {at + 1}: {lines[at].strip()[:60]}", "\n".join([*lines[:at], *new, *lines[at + 1 :]]))
        )

    removed = {
        "no cp.async wait": r"^\s*cp\.async\.wait_group", "no barrier": r"^\s*bar\.sync", "no mbarrier wait": r"bra\.uni waitLoop",
        "no wgmma wait": r"^\s*wgmma\.wait_group", "no wgmma fence": r"^\s*wgmma\.fence", "no proxy fence": r"^\s*fence\.proxy\.async",
        "no grid wait": r"^\s*griddepcontrol\.wait", "no bulk wait": r"^\s*cp\.async\.bulk\.wait_group", "no commit": r"^\s*cp\.async\.commit_group",
        "no wgmma commit": r"^\s*wgmma\.commit_group", "no expect": r"mbarrier\.arrive\.expect_tx", "no bulk commit": r"^\s*cp\.async\.bulk\.commit",
    }  # fmt: skip
    for i, line in enumerate(lines):
        for kind, pattern in removed.items():
            if re.search(pattern, line):
                put(kind, i)
        if "cp.async.wait_group" in line:
            n = int(re.search(r"(\d+);", line)[1])
            put("cp.async waits for one less", i, line.replace(f"{n};", f"{n + 1};"))
        if "wgmma.wait_group" in line:
            n = int(re.search(r"(\d+);", line)[1])
            put("wgmma waits for one less", i, line.replace(f"{n};", f"{n + 1};"))
        if "mma.sync" in line:
            m = re.search(r"\{ (%r\d+), (%r\d+), (%r\d+), (%r\d+) \}, \{ (%r\d+), (%r\d+), (%r\d+), (%r\d+) \}", line)
            if m and m[6] != m[7]:
                put("two mma registers swapped", i, line[: m.start(6)] + m[7] + ", " + m[6] + line[m.end(7) :])
        if "ldmatrix" in line:
            put(
                "ldmatrix turned" if ".trans" not in line else "ldmatrix not turned",
                i,
                line.replace(".trans", "") if ".trans" in line else line.replace(".shared.b16", ".trans.shared.b16"),
            )
        if "4611686293305294848" in line:
            put("another swizzle", i, line.replace("4611686293305294848", str(4611686293305294848 + (1 << 62))))
        if ".acq_rel" in line:
            put("a relaxed atomic", i, line.replace(".acq_rel", ".relaxed"))
        if re.search(r"cp\.async\.c[ag].*, (%r\d+);", line):
            put("cp.async reads all bytes", i, re.sub(r", %r\d+;", ";", line))
        if "@%p" in line and re.search(r"(ld|st)\.global", line):
            put("a global access without its mask", i, re.sub(r"@%p\d+ ", "", line))
        if "setp.lt.s64" in line:
            put("le for lt", i, line.replace("setp.lt", "setp.le"))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sm_80")
    parser.add_argument("--kind", default="")
    parser.add_argument("--kernel", default="")
    parser.add_argument("--most", type=int, default=8, help="of one kind in one kernel")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--path", default=".")
    args = parser.parse_args()
    sys.path[0] = TESTS
    from emulator import emulator

    emu = emulator.Emulator(args.arch, path=args.path)
    import torch

    from emulator import cases

    torch.set_num_threads(1)
    chosen = [
        cases.layer("bf16", 300, 608, 208, 16, p=0.1, place=2),
        cases.layer("bf16", 300, 208, 608, 16, layout="bias", place=1),
    ]
    seen, table = set(), collections.defaultdict(lambda: [0, 0])
    with emu.running():
        for run in (case.judge for case in chosen):
            emu.set(mode=emulator.LATE, seed=1)
            first = emu.lib.emu_modules()
            message = run()
            emu.drain()
            assert not message, message
            assert not [line for line in emu.problems() if ": note: " not in line]
            for index in range(first, emu.lib.emu_modules()):
                source = emu.lib.emu_source(index).decode()
                kernel = re.search(r"\.entry (\w+)", source)[1]
                if source in seen or not re.search(args.kernel, kernel):
                    continue
                seen.add(source)
                by_kind = collections.defaultdict(list)
                for fault in sites(source):
                    by_kind[fault[0]].append(fault)
                for kind, faults in by_kind.items():
                    if not re.search(args.kind, kind):
                        continue
                    random.Random(0).shuffle(faults)
                    for _, where, text in faults[: args.most]:
                        if not emu.lib.emu_replace(index, text.encode()):
                            continue
                        noticed = ""
                        for seed in range(args.seeds):
                            emu.set(mode=emulator.LATE if seed % 2 == 0 else emulator.RANDOM, seed=seed + 1)
                            try:
                                noticed = run()
                            except Exception as error:
                                noticed = f"{type(error).__name__}: {error}"
                            emu.drain()
                            noticed = "; ".join(
                                [noticed, *(line for line in emu.problems() if ": note: " not in line)]
                            ).strip("; ")
                            if noticed:
                                break
                        table[kind][0] += 1
                        table[kind][1] += bool(noticed)
                        if not noticed or args.verbose:
                            print(
                                f"{'noticed' if noticed else 'MISSED'} {kernel} {kind}, {where} {noticed[:160] if args.verbose else ''}",
                                flush=True,
                            )
                    emu.lib.emu_replace(index, source.encode())
                emu.set(mode=emulator.LATE, seed=1)
                assert not run(), "the kernel is as it was"
    for kind, (planted, noticed) in sorted(table.items()):
        print(f"{noticed:3} of {planted:3} noticed: {kind}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
