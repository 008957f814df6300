"""The tables of `bench.host` and what docs/benchmarks.md says of them, from its JSON file alone."""

from typing import Any

__all__ = [
    "ALLOCATION", "AROUND", "ENCODING", "PASSES", "PLANS", "command", "host_table", "host_words", "parts_table",
    "parts_words",
]  # fmt: skip

_PASSES = {"forward": "forward", "both": "forward + backward"}
_OURS = "lora_kernels"
# Parts of a call, each timed with those before it; the launcher's time is what the whole call has above the last.
AROUND, PLANS, PASSES = "module, checks, autograd.Function", "kinds of tensors, plan lookup", "passes"
_LAUNCHER = "Triton's launcher"
# timed alone; they are within the passes and the launcher
ALLOCATION, ENCODING = "of it, allocation", "of it, encoding of descriptors"
_MEASURED = (AROUND, PLANS, PASSES, ALLOCATION, ENCODING)

Table = tuple[list[str], list[list[str]]]


def _us(taken: dict[str, Any]) -> str:
    median, q1, q3 = (taken[name] * 1e6 for name in ("median", "q1", "q3"))
    return f"{median:.0f} ({q1:.0f} to {q3:.0f})"


def host_table(content: dict[str, Any]) -> Table:
    """Tabulate microseconds of a call; return heading and lines.

    Beside each are the ratio to a linear layer's and, where another tree was timed, its time and the ratio to it.
    """
    rows, against = content["rows"], content.get("against")
    heading, lines = [""], [[name] for name in rows]
    for which, words in _PASSES.items():
        heading += [f"{words}, µs", *([f"{against['commit']}, µs", "ratio"] if against else []), "to nn.Linear"]
        for line, (name, row) in zip(lines, rows.items(), strict=True):
            median = row[which]["median"]
            line.append(_us(row[which]))
            if against:
                before = against["rows"][name][which]
                line += [_us(before), f"{median / before['median']:.2f}"]
            line.append(f"{median / rows['nn.Linear'][which]['median']:.1f}")
    return heading, lines


def parts_table(content: dict[str, Any]) -> Table:
    """Tabulate the parts of a call of our layer: microseconds, and the share of the whole; return heading and lines."""
    whole, parts = content["rows"][_OURS], content["parts"]
    columns = {}
    for which in _PASSES:
        around, plans, passes, allocation, encoding, total = (
            row[which]["median"] for row in (*(parts[name] for name in _MEASURED), whole)
        )
        columns[which] = {
            AROUND: around, PLANS: plans - around, PASSES: passes - plans, ALLOCATION: allocation,
            _LAUNCHER: total - passes, ENCODING: encoding, "the whole call": total,
        }  # fmt: skip
    heading = ["", *(word for words in _PASSES.values() for word in (f"{words}, µs", "share"))]
    return heading, [
        [name, *(cell for of in columns.values() for cell in _share(of[name], of["the whole call"]))]
        for name in columns["both"]
    ]


def _share(part: float, total: float) -> tuple[str, str]:
    return f"{part * 1e6:.0f}", f"{part / total:.0%}"


def command(content: dict[str, Any]) -> str:
    """Return the command that measures this again."""
    against = content.get("against")
    tree = f"git worktree add ../before {against['commit'].split()[0]} && " if against else ""
    options = " --against ../before" * bool(against) + " --parts" * ("parts" in content)
    return f"{tree}python -m bench.host{options}"


def host_words(content: dict[str, Any]) -> str:
    """Say how the times of `host_table` were taken."""
    words = (
        f"`{command(content)}`, {content['rounds']} rounds in turn: what it takes a CPU to issue a call, with "
        "the quartiles. Ours is a bf16 layer down to a driver that launches nothing; the others are PyTorch's fp32 "
        "operators on tensors of the CPU so small that they compute next to nothing. On a GPU all take longer, by what "
        "its driver and its allocator take. *bound* is an `autograd.Function` that allocates and saves as much as "
        "LoRA's and launches nothing; *Q/K/V* are three layers of one x."
    )
    if "against" not in content:
        return words
    return (
        f"{words} Columns named {content['against']['commit']} are of that commit, timed in the same rounds in a "
        f"process of its own, as this tree ({content['commit']}) was; *ratio* is this tree's time to that commit's. "
        "Rows that hold nothing of ours show by how much two processes differ."
    )


def parts_words() -> str:
    """Say how the times of `parts_table` were taken."""
    return (
        "**What is left.** The parts of a call of our layer: the medians of calls that lack one part after the other, "
        "in the same rounds as the whole. Without Triton's launcher, the passes decide, allocate and launch nothing; "
        "without the passes, their plans are looked up alone; without the plans, the module, its checks and "
        "`autograd.Function` are left. A part's time is what one such call takes above the next, so the parts sum to "
        "the whole. Allocation and encoding (Triton has the driver encode each descriptor at each launch) are timed "
        "alone, with the call's own arguments."
    )
