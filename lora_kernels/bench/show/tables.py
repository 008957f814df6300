"""What `bench` and the generated page say of measured cases: rows, ratios and geometric means, then tables by rich."""

import math
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from lora_kernels.console import SplitTable
from lora_kernels.measure import timing

__all__ = [
    "SPEEDUPS", "case_table", "host_bound", "host_bound_words", "labels_of", "last_pass", "median_ms", "mib",
    "overview", "pass_name", "plain", "quotient", "shape_words", "show_speedups", "speedups", "sweep_table",
    "unsteady", "unsteady_words", "with_spread",
]  # fmt: skip

SPEEDUPS = "Speed of lora_kernels over the others (geometric mean; above 1 is faster)"
_PASS_NAMES = {"forward": "forward", "backward": "backward", "both": "forward + backward"}
_OF_LEVEL = {("kernel", "forward"): "one launch", ("model", "both"): "training step"}
_DASH = "-"
_OF_HOST = "(host)"
_UNSTEADY = 0.5  # of the median
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
    "split",
)


def mib(size: int | None) -> str:
    """Bytes as MiB; what is little shows that it is not nothing."""
    if size is None:
        return _DASH
    return f"{size / 2**20:.1f}" if size == 0 or size >= 10 * 2**20 else f"{size / 2**20:.2g}"


def median_ms(case: dict[str, Any], name: str, which: str = "both") -> float | None:
    """A provider's median in milliseconds; None where it was not timed."""
    taken = case["providers"].get(name, {}).get("seconds", {}).get(which)
    return None if taken is None else taken["median"] * 1e3


def shape_words(case: dict[str, Any], times: str = " x ", plus: str = " + ") -> str:
    """A case's shape: rows x in x out, of several projections out + out."""
    shape = case["shape"]
    widths = plus.join(map(str, (shape["n"], *shape.get("others", ()))))
    return times.join((str(shape["m"]), str(shape["k"]), widths))


def case_title(case: dict[str, Any]) -> str:
    """A case in words: rows x in x out, then what else it is."""
    label = f" ({case['shape']['label']})" if case["shape"]["label"] else ""
    what = {"qkv": "Queries, keys and values: ", "mlp": "Gated MLP: "}.get(case["level"], "")
    return f"{what}{shape_words(case)}{label}, r={case['r']}, p={case['p']:g}, {case['dtype']}"


def last_pass(cases: list[dict[str, Any]]) -> str:
    """The pass that tables of many cases show: both if it was timed."""
    rows = [row for case in cases for row in case["providers"].values()]
    return next((w for w in ("both", "backward", "forward") if any(w in row["seconds"] for row in rows)), "both")


def pass_name(cases: list[dict[str, Any]]) -> str:
    """`last_pass` in words."""
    which = last_pass(cases)
    return _OF_LEVEL.get((cases[0]["level"], which), _PASS_NAMES[which])


def labels_of(cases: list[dict[str, Any]]) -> dict[str, str]:
    """Provider name to label, in the order of the tables; one that could not be built has none but its name."""
    rows = [item for case in cases for item in case["providers"].items()]
    found = dict.fromkeys(name for name, _ in rows)
    return {name: max((r["label"] for n, r in rows if n == name), key=lambda label: label != name) for name in found}


def own(name: str) -> str:
    """Which of this package's rows a provider is compared with: the one whose adapters are as wide."""
    return "ours_fp32" if "fp32" in name else "ours"


def speedups(cases: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of this package over each other provider: geometric mean, worst and best of the cases that have both times."""
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
    """`speedups` in words, a provider a line: its label and the figures."""
    labels, lines = labels_of(cases), []
    for name, s in speedups(cases).items():
        spread = f" (worst {s['worst']:.3f}x, best {s['best']:.3f}x of {s['cases']})" if s["cases"] > 1 else ""
        lines.append((labels[name], f"{s['geometric_mean']:.3f}x{spread}"))
    return lines


def case_table(case: dict[str, Any]) -> Group:
    """All there is to say of one case, a provider a row; what was not timed says why underneath."""
    rows = list(case["providers"].values())
    passes = [which for which in ("forward", "backward", "both") if any(which in row["seconds"] for row in rows)]
    columns = [(f"{which} ms", [with_spread(row["seconds"].get(which)) for row in rows]) for which in passes]
    if passes:
        ratios = [_ratios(row["seconds"].get(passes[-1])) for row in rows]
        columns += zip(("/ floor", "TFLOP/s", "of peak"), zip(*ratios, strict=True), strict=True)
        hosts = [row["seconds"].get(passes[-1], {}).get("host_median") for row in rows]
        if any(host is not None for host in hosts):
            columns.append(("host us", [_DASH if host is None else f"{host * 1e6:.0f}" for host in hosts]))
    columns += [
        ("moved* MiB", [mib(_moved(row)) for row in rows]),
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


def _moved(row: dict[str, Any]) -> int | None:
    return row["model"]["forward_bytes"] + row["model"]["backward_bytes"] if "model" in row else None


def sweep_table(cases: list[dict[str, Any]]) -> Group:
    """One row a case, one pass, the most telling columns alone."""
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
            *(_DASH if value is None else f"{value:.3f}" for value in found.values()),
            quotient(ours, found.get("frozen")), quotient(found.get("peft"), ours), _saved_beside_peft(case),
        )  # fmt: skip
        reasons |= dict.fromkeys(f"{r['label']}: {r['reason']}" for r in case["providers"].values() if r["reason"])
    return Group(table, *(Text(f"  {reason}", style="yellow") for reason in reasons))


def _saved_beside_peft(case: dict[str, Any]) -> str:
    """What this package holds for backward over what PEFT does, at the same dtypes."""
    ours, peft = (case["providers"].get(name, {}).get("saved_bytes") for name in ("ours", "peft"))
    return quotient(ours, peft or None)


def show_speedups(console: Console, cases: list[dict[str, Any]]) -> None:
    """Print the means over the cases of a run."""
    lines = overview(cases)
    if lines:
        grid = Table.grid(padding=(0, 2))
        for label, figures in lines:
            grid.add_row(Text(f"  over {label}"), figures)
        console.print(f"{SPEEDUPS}, {pass_name(cases)}", style="bold")
        console.print(grid)


def unsteady(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The times whose middle half spans more than `_UNSTEADY` of their median: a ratio of such times means nothing."""
    return [
        {"case": i, "provider": name, "pass": which, "spread": spread}
        for i, case in enumerate(cases)
        for name, row in case["providers"].items()
        for which, taken in row["seconds"].items()
        if (spread := (taken["q3"] - taken["q1"]) / taken["median"]) > _UNSTEADY
    ]


def unsteady_words(cases: list[dict[str, Any]], remedy: str = "") -> str:
    """`unsteady` in words, with what helps; or ""."""
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
    """The times that may be the host's and not the GPU's, see `timing.host_bound`."""
    return [
        {"case": i, "provider": name, "pass": which, "host": taken["host_median"]}
        for i, case in enumerate(cases)
        for name, row in case["providers"].items()
        for which, taken in row["seconds"].items()
        if timing.host_bound(taken)
    ]


def host_bound_words(cases: list[dict[str, Any]]) -> str:
    """`host_bound` in words, or ""."""
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
    """A median in milliseconds and half its interquartile range, marked where it may be the host's."""
    if taken is None:
        return _DASH
    spread = (taken["q3"] - taken["q1"]) / 2 / taken["median"]
    return f"{taken['median'] * 1e3:.3f} ±{spread:.0%}" + (f" {_OF_HOST}" if timing.host_bound(taken) else "")


def _ratios(taken: dict[str, Any] | None) -> list[str]:
    if taken is None:
        return [_DASH] * 3
    return [
        quotient(taken["to_floor"], 1.0),
        plain(taken["flops_per_second"] / 1e12, 3),
        _DASH if taken["of_peak"] is None else f"{taken['of_peak']:.0%}",
    ]


def plain(number: float, digits: int) -> str:
    """A number in at least so many digits and without an exponent, but for the smallest."""
    return f"{number:.0f}" if number >= 10 ** (digits - 1) else f"{number:.{digits}g}"


def quotient(over: float | None, under: float | None) -> str:
    """One number over another, or a dash."""
    return _DASH if over is None or under is None else f"{over / under:.3f}"
