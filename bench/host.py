"""Measure how long the host takes to issue a call, without a GPU.

    python -m bench.host --json FILE                                this tree
    python -m bench.host --against CHECKOUT --parts --json FILE     this tree and another's, and the parts of a call

Our bf16 layer runs for an imagined H200: all host code runs, ours and Triton's, down to a driver that launches nothing
(`stub_driver.c`). The other rows are PyTorch's operators on 4 x 8 fp32 tensors of the CPU, which leave next to nothing
to compute. Not measured: the driver's time to launch, PyTorch's path to cuBLAS, its queries of the current device and
stream, its allocator for GPUs, and the handover to autograd's thread. On a GPU every row therefore takes longer, by
some microseconds a launch: our layer has 2 launches forward and 3 backward, PEFT's 5 and more, a linear layer 1 and 1.
`Q/K/V` is three layers of one x, which PEFT runs one after the other and our block together. All rows are timed in
turn, by the CPU time of one thread.

`bound` is the least time of a Python `autograd.Function` that allocates and saves as much as LoRA's and launches
nothing.

`--against` times the same rows with the `lora_kernels` of another checkout, in a process of its own and in the same
rounds: each row is timed in both trees before the next row, and each round begins with the other tree. Rows that hold
nothing of ours show by how much two processes differ.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from bench.host_calls import PARTS, PASSES
from bench.host_tables import command, host_table, parts_table
from bench.processes import ROOT
from lora_kernels.console import on_stdout
from lora_kernels.measure.machine import caption, check_file, machine, write_json
from lora_kernels.measure.timing import Sample, schedule, summary

__all__ = ["Tree", "commit_of", "main", "measure"]

# `lora_kernels` of the tree is imported before `bench` of this file's checkout takes the first place
_BEGIN = "import sys, lora_kernels; sys.path.insert(0, sys.argv[1]); from bench import host_calls; "
_BEGIN += "host_calls.serve(*sys.argv[2:])"


class Tree:
    """A process that times calls of a tree's layers, see `host_calls.serve`.

    Attributes:
        rows: The names of the rows.
        parts: The names of the parts of a call, with `--parts`.
    """

    def __init__(self, path: Path, *options: str) -> None:
        paths = filter(None, (str(path), os.environ.get("PYTHONPATH")))
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {"PYTHONPATH": os.pathsep.join(paths), "LORA_KERNELS_BACKEND": "triton", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BEGIN, str(ROOT), str(path), *options], cwd=path, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        began = self._answer()
        self.rows, self.parts = began["rows"], began["parts"]

    def _answer(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"bench.host: the process of a tree ended with {self._process.wait()}, see above.")
        return json.loads(line)

    def _ask(self, line: str) -> Any:
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._answer()

    def seconds(self, name: str, which: str) -> float:
        """Time a pass of a row."""
        return self._ask(f"{name}\t{which}")

    def launches(self) -> int:
        """End the process; return the number of launches that did not happen."""
        count = self._ask("")
        self.end()
        return count

    def end(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def measure(trees: list[Tree], rounds: int) -> list[dict[str, dict[str, Any]]]:
    """Time a call of each row of each tree in seconds: name to pass to median and spread."""
    samples = [{name: {which: [] for which in PASSES} for name in (*tree.rows, *tree.parts)} for tree in trees]
    names = list(dict.fromkeys(name for of in samples for name in of))
    for i, name in schedule(names, rounds):
        for k in range(len(trees)):
            turn = (i + k) % len(trees)
            for which in PASSES if name in samples[turn] else ():
                samples[turn][name][which].append(Sample(trees[turn].seconds(name, which)))
    return [{name: {which: summary(of[name][which]) for which in PASSES} for name in of} for of in samples]


def commit_of(tree: Path) -> str:
    """Return the commit of a checkout, and whether its `lora_kernels` has changes that are in no commit."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(tree), *words], capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "lora_kernels")
    return (git("rev-parse", "--short=7", "HEAD") or "no commit") + (" with changes" if changed else "")


def _content(rounds: int, against: Path | None, parts: bool) -> tuple[dict[str, Any], int]:
    """Measure; return the content of the JSON file, and how many launches of this tree did not happen."""
    trees: list[Tree] = []
    try:
        trees.append(Tree(ROOT, *([PARTS] if parts else [])))
        if against:
            trees.append(Tree(against))
        taken = measure(trees, rounds)
        launches = trees[0].launches()
    finally:
        for tree in trees:
            tree.end()
    content = {"command": "host", "rounds": rounds, "rows": {name: taken[0][name] for name in trees[0].rows}}
    if parts:
        content["parts"] = {name: taken[0][name] for name in trees[0].parts}
    if against:
        content |= {"commit": commit_of(ROOT), "against": {"commit": commit_of(against), "rows": taken[1]}}
    return content, launches


def _print(title: str, heading: list[str], lines: list[list[str]]) -> None:
    table = Table(title=title)
    for word in heading:
        table.add_column(word, justify="right" if word else "left")
    for line in lines:
        table.add_row(*line)
    on_stdout().print(table)


def main(argv: list[str] | None = None) -> int:
    """Print the tables of host times and, with --json, write them."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.host", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=101, metavar="N", help="rounds (default: %(default)s)")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="time the lora_kernels of this tree as well")
    parser.add_argument("--parts", action="store_true", help="time the parts of a call of our layer as well")
    parser.add_argument("--json", metavar="FILE", help="write what was measured, with the machine, as JSON")
    args = parser.parse_args(argv)
    # the processes of the trees have one thread as well, and the machine is described as theirs
    torch.set_num_threads(1)
    against = args.against and args.against.resolve()
    if against and not (against / "lora_kernels" / "__init__.py").is_file():
        parser.error(f"--against {args.against}: there is no lora_kernels")
    if args.json:
        check_file("--json", args.json)
    content, launches = _content(args.rounds, against, args.parts)
    _print(f"Host time of a call ({launches} launches that did not happen)", *host_table(content))
    if args.parts:
        _print("Parts of a call of our layer", *parts_table(content))
    on_stdout().print(caption(machine()), f"Again: {command(content)} --rounds {args.rounds}", sep="\n", soft_wrap=True)
    if args.json:
        write_json(args.json, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
