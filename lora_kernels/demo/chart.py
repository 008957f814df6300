"""Draw the demo's losses as text for the terminal, and as a PNG if matplotlib is installed."""

import importlib.util
from pathlib import Path

from rich.text import Text

__all__ = ["Curves", "draw_png", "draw_text"]

# Name of a curve to its steps and losses.
Curves = dict[str, list[tuple[int, float]]]
# name: marker in the terminal, colour in the terminal, colour in the PNG, line style in the PNG
_LOOKS = {
    "prose, training": ("•", "cyan", "#0072B2", "-"),
    "code, adapting": ("+", "yellow", "#D55E00", "-"),
    "prose, held out": ("", "", "#0072B2", "--"),
    "code, held out": ("", "", "#D55E00", "--"),
}


def draw_text(curves: Curves, width: int, height: int = 10) -> Text:
    """Draw the curves that have a terminal marker, `width` columns wide; each column shows a mean."""
    shown = {name: points for name, points in curves.items() if _LOOKS[name][0] and points}
    columns = {name: _columns(points, _last_step(shown), width - 7) for name, points in shown.items()}
    values = [value for column in columns.values() for value in column.values()]
    low, high = min(values), max(values)
    grid: list[list[tuple[str, str]]] = [[(" ", "")] * (width - 7) for _ in range(height)]
    for name, column in columns.items():
        for x, value in column.items():
            y = round((high - value) / ((high - low) or 1) * (height - 1))
            grid[y][x] = _LOOKS[name][:2]
    chart = Text()
    for y, row in enumerate(grid):
        label = high - (high - low) * y / (height - 1)
        chart.append(f"{label:5.2f} ┤" if y % 3 == 0 else "      │", "dim")
        for marker, colour in row:
            chart.append(marker, colour)
        chart.append("\n")
    chart.append("      └" + "─" * (width - 7) + "\n       ", "dim")
    for name in shown:
        chart.append(f"{_LOOKS[name][0]} {name}   ", _LOOKS[name][1])
    return chart


def draw_png(curves: Curves, path: Path, frozen_at: int, caption: str) -> bool:
    """Draw all curves to a PNG file; return False without matplotlib.

    Args:
        curves: The curves.
        path: The file.
        frozen_at: The step at which the base was frozen; a line marks it.
        caption: The machine and versions of the run.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        _, _, colour, style = _LOOKS[name]
        steps, losses = zip(*points, strict=True)
        if style == "-":
            axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(steps, _smooth(losses), color=colour, label=name)
        else:
            axes.plot(steps, losses, color=colour, linestyle=style, marker="o", markersize=3.5, label=name)
    axes.axvline(frozen_at, color="0.5", linewidth=1)
    axes.annotate(
        "base frozen,\nadapters added", (frozen_at, 0.97), xycoords=("data", "axes fraction"), xytext=(5, 0),
        textcoords="offset points", va="top", fontsize=9, color="0.3",
    )  # fmt: skip
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a byte")
    axes.set_title("Trained on prose, then adapted to code with LoRA", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    axes.legend(frameon=False)
    figure.supxlabel(caption, fontsize=7, color="0.4")
    figure.savefig(path, dpi=130)
    return True


def _last_step(curves: Curves) -> int:
    return max(step for points in curves.values() for step, _ in points)


def _columns(points: list[tuple[int, float]], last_step: int, width: int) -> dict[int, float]:
    """Return the mean of the points that fall in each column."""
    groups: dict[int, list[float]] = {}
    for step, value in points:
        groups.setdefault(min(step * width // (last_step + 1), width - 1), []).append(value)
    return {x: sum(values) / len(values) for x, values in groups.items()}


def _smooth(values: tuple[float, ...], keep: float = 0.9) -> list[float]:
    """Compute the exponential moving average that starts at the first value."""
    smooth = [values[0]]
    for value in values[1:]:
        smooth.append(keep * smooth[-1] + (1 - keep) * value)
    return smooth
