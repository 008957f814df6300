"""Tables of counts from compiled kernels that were executed without a GPU, read from the stored budgets.

The files are `tests/budgets/counters-<Triton>.json`; `python tests/emulator/counters.py --renew` writes them.
"""

import json
from collections.abc import Iterator
from pathlib import Path

__all__ = ["Budgets", "conflicts", "launches", "reasons", "stored"]

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "budgets"
KIB = 2**10
# Triton's version to launch name to figures
Budgets = dict[str, dict[str, dict]]


def stored(folder: Path = FOLDER) -> Budgets:
    """Load all stored counters, the oldest Triton first.

    Raises:
        FileNotFoundError: No counters are stored.
    """
    files = sorted(folder.glob("counters-*.json"), key=lambda file: [*map(int, _version(file).split("."))])
    if not files:
        raise FileNotFoundError(f"no counters are stored in {folder}")
    return {_version(file): json.loads(file.read_text(encoding="utf-8")) for file in files}


def _version(file: Path) -> str:
    return file.stem.removeprefix("counters-")


def launches(budgets: Budgets, case: str) -> tuple[list[str], list[list[str]]]:
    """Tabulate the launches of a case, such as "sm_90 512x512x512 r=16 bf16 p=0 tile 0"; return head and rows of cells.

    All columns but the ratios by version are those of the newest Triton.
    """
    newest = list(budgets)[-1]
    head = ["launch", "tile", "read, KiB", "formula", "written, KiB", "formula", "sectors / request", "instructions"]
    head += [f"passes / fewest, {triton}" for triton in budgets] + ["passes / 128 bytes"]
    rows = []
    for name, figures in budgets[newest].items():
        if not name.startswith(f"{case}: "):
            continue
        moved, passed = figures["read"] + figures["written"], sum(passes for passes, _ in figures["passes"].values())
        cells = [_kib(figures["read"]), _formula(figures, 0), _kib(figures["written"]), _formula(figures, 1)]
        cells += [_per_request(figures), f"{figures['instructions']:,}"]
        ratios = [_ratio(budgets[triton][name]) if name in budgets[triton] else "-" for triton in budgets]
        rows.append([name.split(": ")[1], figures["tile"], *cells, *ratios, f"{128 * passed / moved:.2f}"])
    return head, rows


def _kib(count: int) -> str:
    return f"{count / KIB:.1f}"


def _formula(figures: dict, way: int) -> str:
    return _kib(figures["formula"][way]) if figures["formula"] else "-"


def _per_request(figures: dict) -> str:
    return f"{figures['sectors'] / figures['requests']:.1f}" if figures["requests"] else "-"


def _ratio(figures: dict) -> str:
    fewest = sum(fewest for _, fewest in figures["passes"].values())
    return f"{sum(passes for passes, _ in figures['passes'].values()) / fewest:.2f}" if fewest else "-"


def conflicts(budgets: Budgets) -> tuple[list[str], list[list[str]]]:
    """Tabulate the largest ratio of passes to the fewest possible, by kernel and operands, architecture and Triton."""
    columns = [(arch, triton) for arch in ("sm_80", "sm_90") for triton in budgets]
    most: dict[tuple[str, str], dict[tuple[str, str], float]] = {}
    for triton, launches in budgets.items():
        for name, figures in launches.items():
            fewest = sum(fewest for _, fewest in figures["passes"].values())
            if fewest:
                row = most.setdefault((name.split()[-1], _operands(name, figures)), {})
                ratio = sum(passes for passes, _ in figures["passes"].values()) / fewest
                column = name.split()[0], triton
                row[column] = max(ratio, row.get(column, 0))
    head = ["kernel", "operands", *(f"{arch}, Triton {triton}" for arch, triton in columns)]
    cells = {key: [f"{row[column]:.2f}" if column in row else "-" for column in columns] for key, row in most.items()}
    return head, [[f"`{kernel}`", operands, *cells[kernel, operands]] for kernel, operands in sorted(cells)]


def _operands(name: str, figures: dict) -> str:
    if figures["aligned"]:
        return "16 bit"
    width = "16 bit" if "fp32 p=" not in name else "TF32" if " tf32" in name else "fp32"
    return f"{width}, strided" if " strided" in name else width


def reasons(budgets: Budgets) -> Iterator[str]:
    """Yield once each reason that a budget gives for more passes than the fewest possible."""
    yield from dict.fromkeys(
        figures["why"] for launches in budgets.values() for figures in launches.values() if "why" in figures
    )
