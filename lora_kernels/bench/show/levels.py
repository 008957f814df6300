"""The tables that `bench` prints: of launches and of models here, of layers in `show.tables`."""

from typing import Any

from rich.console import Console, Group
from rich.text import Text

from lora_kernels.bench.show.tables import (
    case_table,
    dtype_words,
    labels_of,
    last_pass,
    median_ms,
    mib,
    plain,
    quotient,
    show_speedups,
    sweep_table,
    with_spread,
)  # fmt: skip
from lora_kernels.console import DASH, SplitTable
from lora_kernels.measure.presets import PROJECTIONS

__all__ = [
    "KERNEL_HEADING", "SHAPED", "kernel_row", "kernel_table", "model_table", "model_title", "passes_of", "show",
]  # fmt: skip

# Levels whose cases are shapes.
SHAPED = ("layer", "qkv", "mlp", "experts")
# Up to this many cases have a table each; more cases have one row each.
_FULL_UP_TO = 3
_MEMORY = (
    "saved: held for backward beyond x and the parameters; peak: the most of forward + backward, over what was there"
)
_BUSY = "A share of peak is above 100 %: the machine was busier when its peak was measured."

KERNEL_HEADING = (
    "result", "kernel", "rows x in x out", "r", "p", "base ms", "ours ms", "operators ms", "ours / base",
    "operators / ours", "GB/s", "of copy", "TFLOP/s", "of peak",
)  # fmt: skip


def kernel_row(case: dict[str, Any]) -> list[str]:
    """Format a launch in the columns of `KERNEL_HEADING`; rates are of this package's launch."""
    shape, rows = case["shape"], case["providers"]
    taken = {name: row["seconds"].get("forward") for name, row in rows.items()}
    ours = taken.get("ours")
    rates = [DASH] * 4
    if ours:
        rates = [
            plain(ours["bytes_per_second"] / 1e9, 4), _percent(ours["of_copy"]),
            plain(ours["flops_per_second"] / 1e12, 3), _percent(ours["of_peak"]),
        ]  # fmt: skip
    return [
        case["launch"], case["kernel"], f"{shape['m']} x {shape['k']} x {shape['n']}", str(case["r"]), f"{case['p']:g}",
        *(with_spread(taken.get(name)) for name in ("base", "ours", "operators")),
        quotient(median_ms(case, "ours", "forward"), median_ms(case, "base", "forward")),
        quotient(median_ms(case, "operators", "forward"), median_ms(case, "ours", "forward")), *rates,
    ]  # fmt: skip


def kernel_table(cases: list[dict[str, Any]]) -> Group:
    """Build a table with one launch per row."""
    ours = labels_of(cases).get("ours", "lora_kernels")
    table = SplitTable(title=Text(f"single launches: {ours} beside PyTorch's operators for the same work"), names=5)
    for i, heading in enumerate(KERNEL_HEADING):
        table.add_column(heading, justify="left" if i < 3 else "right", no_wrap=True)
    for case in cases:
        table.add_row(*kernel_row(case))
    note = "  base: the large product alone, by the library; rates are of our launch, by the bytes it has to move"
    return Group(table, Text(note, style="dim"), *_reasons(cases))


def model_title(case: dict[str, Any]) -> str:
    """Describe a model in words."""
    d = case["model"]
    name = f"{d['name']} (transformers, PEFT), " if d.get("name") else ""
    layers = f"{d['layers']} layer{'s' * (d['layers'] != 1)}"
    depth = f"{layers}, vocabulary {d['vocab']}" if case["level"] == "model" else "One decoder layer"
    width = f"hidden {d['hidden']}, {d['heads']}/{d['kv_heads']} heads, MLP {d['intermediate']}"
    targets = tuple(case.get("targets", PROJECTIONS))
    where = "" if targets == PROJECTIONS else f" on {' '.join(targets)}"
    return (
        f"{name}{depth}: {width}; {d['batch']} x {d['seq']} tokens, r={case['r']}{where}, p={case['p']:g}, "
        f"{dtype_words(case)}"
    )


def passes_of(case: dict[str, Any]) -> dict[str, str]:
    """Return the timed passes, each with its name at this level."""
    names = {"forward": "forward", "backward": "backward", "both": "forward + backward"}
    if case["level"] == "model":
        names |= {"backward": "backward + AdamW", "both": "training step"}
    timed = {which for row in case["providers"].values() for which in row["seconds"]}
    return {which: name for which, name in names.items() if which in timed}


def model_table(case: dict[str, Any]) -> Group:
    """Build a table with one provider per row."""
    passes = passes_of(case)
    last = list(passes)[-1:]
    table = SplitTable(title=model_title(case))
    table.add_column("", no_wrap=True)
    for heading in (*(f"{name} ms" for name in passes.values()), "/ floor", "tokens/s", "saved MiB", "peak MiB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in case["providers"].items():
        taken = [row["seconds"].get(which) for which in passes]
        end = row["seconds"].get(last[0]) if last else None
        table.add_row(
            Text(row["label"]), *map(with_spread, taken), quotient(end["to_floor"], 1.0) if end else DASH,
            plain(end["tokens_per_second"], 4) if end else DASH, mib(row.get("saved_bytes")),
            mib(row["peak_bytes"]) if row.get("peak_bytes") is not None else "n/a",
            style="bold" if name == "ours" else "",
        )  # fmt: skip
    return Group(table, *_reasons([case]))


def show(console: Console, cases: list[dict[str, Any]], full: bool) -> None:
    """Print the tables and the mean speedups of a run; many layers or blocks are one row each, unless `full`."""
    shares: list[float | None] = []
    for level in dict.fromkeys(case["level"] for case in cases):
        of_level = [case for case in cases if case["level"] == level]
        if level == "kernel":
            console.print(kernel_table(of_level))
            shares += [_of_peak(case, "ours", "forward") for case in of_level]
        elif level in SHAPED and not full and len(of_level) > _FULL_UP_TO:
            console.print(sweep_table(of_level))
        else:
            for case in of_level:
                console.print(case_table(case) if level in SHAPED else model_table(case))
                if level in SHAPED:
                    shares += [_of_peak(case, name, last_pass([case])) for name in case["providers"]]
    show_speedups(console, cases)
    if any(case["level"] != "kernel" for case in cases):
        console.print(_MEMORY, style="dim")
    if any((share or 0) > 1 for share in shares):
        console.print(_BUSY, style="yellow")


def _of_peak(case: dict[str, Any], name: str, which: str) -> float | None:
    return case["providers"].get(name, {}).get("seconds", {}).get(which, {}).get("of_peak")


def _reasons(cases: list[dict[str, Any]]) -> list[Text]:
    said = (f"  {row['label']}: {row['reason']}" for c in cases for row in c["providers"].values() if row["reason"])
    return [Text(line, style="yellow") for line in dict.fromkeys(said)]


def _percent(share: float | None) -> str:
    return DASH if share is None else f"{share:.0%}"
