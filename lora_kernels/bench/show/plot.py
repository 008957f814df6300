"""The pictures of `bench --plot` and of the generated page: time as a ratio to the floor's, with one tick per case.

Layers have one line per provider; blocks, launches and models have bars. The floor is the frozen layer, block or model;
for a single launch the floor is PyTorch's operators for the same work.
"""

import importlib.util
from pathlib import Path
from typing import Any

from lora_kernels.bench.show.tables import labels_of, last_pass, median_ms, pass_name, shape_words

__all__ = ["missing_requirement", "plot"]


def missing_requirement() -> str:
    """Return why no plot can be drawn, or ""."""
    if importlib.util.find_spec("matplotlib") is None:
        return "pictures need matplotlib: pip install 'matplotlib>=3.8'"
    return ""


def plot(cases: list[dict[str, Any]], caption: str, path: str) -> None:
    """Draw the time of the cases' last pass over the floor's, and write the picture to `path`."""
    # imported here because matplotlib is optional and slow to import
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(max(6.0, 0.45 * len(cases) + 4), 4.5), layout="constrained")
    which, level = last_pass(cases), cases[0]["level"]
    floor = "operators" if level == "kernel" else "frozen"
    labels = labels_of(cases)
    for place, (name, label) in enumerate(labels.items()):
        both = [(i, median_ms(case, name, which), median_ms(case, floor, which)) for i, case in enumerate(cases)]
        points = [(i, taken / of_floor) for i, taken, of_floor in both if taken and of_floor]
        if points and level == "layer":
            ours = name == "ours"
            axes.plot(
                *zip(*points, strict=True), marker="o", markersize=4, label=label,
                linewidth=2.5 if ours else 1.0, zorder=3 if ours else 2,
            )  # fmt: skip
        elif points:
            width = 0.8 / len(labels)
            where = [i + (place - (len(labels) - 1) / 2) * width for i, _ in points]
            axes.bar(where, [height for _, height in points], width, label=label)
    axes.set_xticks(range(len(cases)), [_tick(case) for case in cases], rotation=60, ha="right", fontsize=7)
    axes.set_ylabel(f"{pass_name(cases)} over that of: {labels.get(floor, floor)}", fontsize=8)
    axes.set_title(caption, fontsize=7)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=7)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _tick(case: dict[str, Any]) -> str:
    """Format a case for the axis."""
    if "model" in case:
        what = f"{case['model']['hidden']}/{case['model']['intermediate']}, {case['tokens']} tokens"
    else:
        name = case.get("launch", case["shape"]["label"] if "floor_bytes" in case else "")
        what = f"{name} {shape_words(case, 'x', '+')}".strip()
    return f"{what} r={case['r']} p={case['p']:g}"
