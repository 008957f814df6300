"""Tables of measured cases for `bench` and the generated page: rows, ratios, geometric means, and rich tables."""

import math
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from lora_kernels.console import DASH, SplitTable
from lora_kernels.measure import timing

__all__ = [
    "SPEEDUPS",
    "case_table",
    "dtype_words",
    "host_bound",
    "host_bound_words",
    "labels_of",
    "last_pass",
    "median_ms",
    "mib",
    "overview",
    "pass_name",
    "plain",
    "quotient",
    "shape_words",
    "show_speedups",
    "speedups",
    "sweep_table",
    "unsteady",
    "unsteady_words",
    "with_spread",
]  # fmt: skip

SPEEDUPS = "Speed of lora_kernels over the others (geometric mean; above 1 is faster)"
_PASS_NAMES = {"forward": "forward", "backward": "backward", "both": "forward + backward"}
_OF_LEVEL = {("kernel", "forward"): "one launch", ("model", "both"): "training step"}
_OF_HOST = "(host)"
# A time is unsteady if its interquartile range exceeds this share of its median.
_UNSTEADY = 0.5
_SWEEP_RATIOS = ("ours / floor", "PEFT / ours", "saved: ours / PEFT")
_SWEEP_COLUMNS = (
    "frozen",
    "ours",
    "per_layer",
    "peft",
    "peft_fp32",
    "peft_compiled",
    "peft_fp32_compiled",
    "addmm",
    "unsloth",
    "peft_once",
    "split",
    "split_best",
)


def mib(size: int | None) -> str:
    """Format bytes as MiB; small sizes keep two digits, so that they do not show as 0."""
    if size is None:
        return DASH
    return f"{size / 2**20:.1f}" if size == 0 or size >= 10 * 2**20 else f"{size / 2**20:.2g}"


def median_ms(case: dict[str, Any], name: str, which: str = "both") -> float | None:
    """Return a provider's median in milliseconds; None if it was not timed."""
    taken = case["providers"].get(name, {}).get("seconds", {}).get(which)
    return None if taken is None else taken["median"] * 1e3


def shape_words(case: dict[str, Any], times: str = " x ", plus: str = " + ") -> str:
    """Format a case's shape: rows x in x out, with out + out for several projections."""
    shape = case["shape"]
    widths = plus.join(map(str, (shape["n"], *shape.get("others", ()))))
    return times.join((str(shape["m"]), str(shape["k"]), widths))


def case_title(case: dict[str, Any]) -> str:
    """Describe a case in words: block, rows x in x out, label, rank, p and dtype."""
    label = f" ({case['shape']['label']})" if case["shape"]["label"] else ""
    what = {"qkv": "Queries, keys and values: ", "mlp": "Gated MLP: "}.get(case["level"], "")
    if case["level"] == "experts":
        what = f"{case['shape']['experts']} experts, {case['shape']['top_k']} a token: "
    return f"{what}{shape_words(case)}{label}, r={case['r']}, p={case['p']:g}, {dtype_words(case)}"


def dtype_words(case: dict[str, Any]) -> str:
    """Format the dtype of a case, and the format of its frozen weights if they are quantised."""
    return case["dtype"] + (f" over {case['quantise'].upper()}" if case.get("quantise") else "")


def last_pass(cases: list[dict[str, Any]]) -> str:
    """Return the pass that tables of many cases show: "both" if it was timed, else "backward", else "forward"."""
    rows = [row for case in cases for row in case["providers"].values()]
    return next((w for w in ("both", "backward", "forward") if any(w in row["seconds"] for row in rows)), "both")


def pass_name(cases: list[dict[str, Any]]) -> str:
    """Return `last_pass` in words."""
    which = last_pass(cases)
    return _OF_LEVEL.get((cases[0]["level"], which), _PASS_NAMES[which])


def labels_of(cases: list[dict[str, Any]]) -> dict[str, str]:
    """Map provider names to labels, in the tables' order; a provider that could not be built keeps its name."""
    rows = [item for case in cases for item in case["providers"].items()]
    found = dict.fromkeys(name for name, _ in rows)
    return {name: max((r["label"] for n, r in rows if n == name), key=lambda label: label != name) for name in found}


def own(name: str) -> str:
    """Return the row of this package that a provider is compared with: the row with adapters of the same width."""
    return "ours_fp32" if "fp32" in name else "ours"


def speedups(cases: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Compute this package's speedup over each other provider, from the cases that have both times.

    Each is given as geometric mean, worst, best and number of cases.
    """
    out, which = {}, last_pass(cases)
    for name in dict.fromkeys(name for case in cases for name in case["providers"]):
        if name in ("ours", "ours_fp32"):
            continue
        pairs = [(median_ms(case, name, which), median_ms(case, own(name), which)) for case in cases]
        ratios = [theirs / ours for theirs, ours in pairs if theirs is not None and ours is not None]
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            out[name] = {"geometric_mean": mean, "worst": min(ratios), "best": max(ratios), "cases": len(ratios)}
    return out


def overview(cases: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Format `speedups` in words, one line per provider: its label and the figures."""
    labels, lines = labels_of(cases), []
    for name, s in speedups(cases).items():
        spread = f" (worst {s['worst']:.3f}x, best {s['best']:.3f}x of {s['cases']})" if s["cases"] > 1 else ""
        lines.append((labels[name], f"{s['geometric_mean']:.3f}x{spread}"))
    return lines


def case_table(case: dict[str, Any]) -> Group:
    """Build the full table of one case, with one provider per row and the reasons of untimed providers below."""
    rows = list(case["providers"].values())
    passes = [which for which in ("forward", "backward", "both") if any(which in row["seconds"] for row in rows)]
    columns = [(f"{which} ms", [with_spread(row["seconds"].get(which)) for row in rows]) for which in passes]
    if passes:
        ratios = [_ratios(row["seconds"].get(passes[-1])) for row in rows]
        columns += zip(("/ floor", "TFLOP/s", "of peak"), zip(*ratios, strict=True), strict=True)
        hosts = [row["seconds"].get(passes[-1], {}).get("host_median") for row in rows]
        if any(host is not None for host in hosts):
            columns.append(("host us", [DASH if host is None else f"{host * 1e6:.0f}" for host in hosts]))
    columns += [
        ("moved* MiB", [mib(_moved_bytes(row)) for row in rows]),
        ("saved MiB", [mib(row.get("saved_bytes")) for row in rows]),
        ("peak MiB", [mib(row["peak_bytes"]) if row.get("peak_bytes") is not None else "n/a" for row in rows]),
    ]
    table = SplitTable(title=case_title(case))
    table.add_column("", no_wrap=True)
    for heading, _ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for i, (name, row) in enumerate(case["providers"].items()):
        cells = (column[i] for _, column in columns)
        table.add_row(Text(row["label"]), *cells, style="bold" if name == "ours" else "")
    if "floor_bytes" in case:
        least = f"{mib(case['floor_bytes'])} if frozen and each large tensor once a pass"
    else:
        least = f"{mib(case['split_minimum_bytes'])} is the least with s in memory"
    work = sum(case["flops"].values()) / 1e9
    note = (
        f"  * by arithmetic, forward + backward, each launch moving its operands once: {least}; {plain(work, 4)} GFLOP"
    )
    reasons = [Text(f"  {row['label']}: {row['reason']}", style="yellow") for row in rows if row["reason"]]
    return Group(table, Text(note, style="dim"), *reasons)


def _moved_bytes(row: dict[str, Any]) -> int | None:
    return row["model"]["forward_bytes"] + row["model"]["backward_bytes"] if "model" in row else None


def sweep_table(cases: list[dict[str, Any]]) -> Group:
    """Build a table with one case per row: one pass, and only the most informative columns."""
    which = last_pass(cases)
    names = [n for n in _SWEEP_COLUMNS if any(median_ms(case, n, which) is not None for case in cases)]
    labels = labels_of(cases)
    table = SplitTable(title=f"{pass_name(cases)}, ms", names=3)
    for heading in ("rows x in x out", "r", "p", *(labels[n] for n in names), *_SWEEP_RATIOS):
        is_shape = heading.startswith("rows")
        table.add_column(Text(heading), justify="left" if is_shape else "right", no_wrap=is_shape)
    reasons: dict[str, None] = {}
    for case in cases:
        found = {name: median_ms(case, name, which) for name in names}
        ours = median_ms(case, "ours", which)
        table.add_row(
            shape_words(case, "x", "+"), str(case["r"]), f"{case['p']:g}",
            *(DASH if value is None else f"{value:.3f}" for value in found.values()),
            quotient(ours, found.get("frozen")), quotient(found.get("peft"), ours), _saved_beside_peft(case),
        )  # fmt: skip
        reasons |= dict.fromkeys(f"{r['label']}: {r['reason']}" for r in case["providers"].values() if r["reason"])
    return Group(table, *(Text(f"  {reason}", style="yellow") for reason in reasons))


def _saved_beside_peft(case: dict[str, Any]) -> str:
    """Return the ratio of bytes held for backward, this package's over PEFT's, at the same dtypes."""
    ours, peft = (case["providers"].get(name, {}).get("saved_bytes") for name in ("ours", "peft"))
    return quotient(ours, peft or None)


def show_speedups(console: Console, cases: list[dict[str, Any]]) -> None:
    """Print the mean speedups over the cases of a run."""
    lines = overview(cases)
    if lines:
        grid = Table.grid(padding=(0, 2))
        for label, figures in lines:
            grid.add_row(Text(f"  over {label}"), figures)
        console.print(f"{SPEEDUPS}, {pass_name(cases)}", style="bold")
        console.print(grid)


def unsteady(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """List the times whose interquartile range exceeds `_UNSTEADY` of their median; ratios of them mean nothing."""
    return [
        {"case": i, "provider": name, "pass": which, "spread": spread}
        for i, case in enumerate(cases)
        for name, row in case["providers"].items()
        for which, taken in row["seconds"].items()
        if (spread := (taken["q3"] - taken["q1"]) / taken["median"]) > _UNSTEADY
    ]


def unsteady_words(cases: list[dict[str, Any]], remedy: str = "") -> str:
    """Describe `unsteady` in words, followed by the remedy; "" if all times are steady."""
    found = unsteady(cases)
    if not found:
        return ""
    worst = max(found, key=lambda one: one["spread"])
    label = cases[worst["case"]]["providers"][worst["provider"]]["label"]
    total = sum(len(row["seconds"]) for case in cases for row in case["providers"].values())
    return (
        f"Unsteady: in {len(found)} of {total} times the middle half of the rounds spans more than {_UNSTEADY:.0%} of "
        f"the median; ratios of those mean nothing. Worst: {label}, {_PASS_NAMES[worst['pass']]}, "
        f"{worst['spread']:.0%}.{remedy}"
    )


def host_bound(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """List the times that may be the host's and not the GPU's, see `timing.host_bound`."""
    return [
        {"case": i, "provider": name, "pass": which, "host": taken["host_median"]}
        for i, case in enumerate(cases)
        for name, row in case["providers"].items()
        for which, taken in row["seconds"].items()
        if timing.host_bound(taken)
    ]


def host_bound_words(cases: list[dict[str, Any]]) -> str:
    """Describe `host_bound` in words, or ""."""
    found = host_bound(cases)
    if not found:
        return ""
    labels = labels_of(cases)
    names = ", ".join(dict.fromkeys(labels[one["provider"]] for one in found))
    return (
        f"{len(found)} times are marked {_OF_HOST}: issuing the call took the host about as long as it was ahead, so "
        f"they may be the host's and not the GPU's ({names}). --cuda-graph times the GPU alone."
    )


def with_spread(taken: dict[str, Any] | None) -> str:
    """Format a median in milliseconds and half its interquartile range, marked if the time may be the host's."""
    if taken is None:
        return DASH
    spread = (taken["q3"] - taken["q1"]) / 2 / taken["median"]
    return f"{taken['median'] * 1e3:.3f} ±{spread:.0%}" + (f" {_OF_HOST}" if timing.host_bound(taken) else "")


def _ratios(taken: dict[str, Any] | None) -> list[str]:
    if taken is None:
        return [DASH] * 3
    return [
        quotient(taken["to_floor"], 1.0),
        plain(taken["flops_per_second"] / 1e12, 3),
        DASH if taken["of_peak"] is None else f"{taken['of_peak']:.0%}",
    ]


def plain(number: float, digits: int) -> str:
    """Format a number with at least `digits` digits; only very small numbers get an exponent."""
    return f"{number:.0f}" if number >= 10 ** (digits - 1) else f"{number:.{digits}g}"


def quotient(over: float | None, under: float | None) -> str:
    """Format one number over another, or a dash if either is missing."""
    return DASH if over is None or under is None else f"{over / under:.3f}"
