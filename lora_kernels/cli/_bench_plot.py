"""The picture of `bench --plot`: time over the frozen layer's, a line a provider, a tick a case."""

import importlib.util
from pathlib import Path
from typing import Any

from lora_kernels.cli._bench_view import PASS_NAMES, labels_of, last_pass

__all__ = ["missing", "plot"]


def missing() -> str:
    """Why there can be no plot, or ""."""
    if importlib.util.find_spec("matplotlib") is None:
        return "--plot needs matplotlib, which the extra `bench` brings: pip install 'lora-kernels[bench]'"
    return ""


def plot(cases: list[dict[str, Any]], caption: str, path: str) -> None:
    """Draw forward + backward over the floor's and write it to `path`."""
    import matplotlib  # heavy, and an extra: loaded only for a picture

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(max(6.0, 0.45 * len(cases) + 4), 4.5), layout="constrained")
    which = last_pass(cases)
    labels = labels_of(cases)
    for name, label in labels.items():
        points = [(i, case["providers"].get(name, {}).get("seconds", {}).get(which)) for i, case in enumerate(cases)]
        points = [(i, taken["to_floor"]) for i, taken in points if taken and taken["to_floor"]]
        if points:
            ours = name == "ours"
            axes.plot(
                *zip(*points, strict=True), marker="o", markersize=4, label=label,
                linewidth=2.5 if ours else 1.0, zorder=3 if ours else 2,
            )  # fmt: skip
    ticks = [f"{c['shape']['m']}x{c['shape']['k']}x{c['shape']['n']} r={c['r']} p={c['p']:g}" for c in cases]
    axes.set_xticks(range(len(cases)), ticks, rotation=60, ha="right", fontsize=7)
    axes.set_ylabel(f"{PASS_NAMES[which]} over the frozen layer's")
    axes.set_title(caption, fontsize=7)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=7)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
