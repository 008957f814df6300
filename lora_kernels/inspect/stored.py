"""Stored budgets: the figures of each kernel at the last renewal, in a file for each Triton version.

The rules of `budgets` catch faults that no kernel may have. Stored budgets catch regressions that break no rule: more
registers, more shared memory, a longer K loop. The key of a kernel is its name, dtype, tile and flags. The largest
figures count where several kernels share a key, as forward and backward may.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from lora_kernels.inspect.kernel import Kernel

__all__ = ["budget_file", "regressions", "renew"]

# Tolerances: 8 registers for the whims of a register allocator, and a tenth of the length of a loop.
_REGISTERS, _LOOP = 8, 0.1
_FIGURES = ("registers", "shared", "loop")


def budget_file(folder: str | Path, triton: str) -> Path:
    """Return the file of a Triton version, for example `3.9.json`."""
    return Path(folder, ".".join(triton.split(".")[:2]) + ".json")


def regressions(kernels: Sequence[Kernel], path: Path) -> Iterator[str]:
    """Name every kernel that exceeds its stored budget or has none.

    Args:
        kernels: The kernels as compiled now. The function skips architectures without any stored budget.
        path: The file.
    """
    stored = json.loads(path.read_text(encoding="utf-8"))
    arches = {name.split()[0] for name in stored}
    for name, now in _figures(kernels).items():
        if name.split()[0] not in arches:
            continue
        if name not in stored:
            yield f"{name}: no budget is stored"
            continue
        registers, shared, loop = stored[name]
        limits = registers + _REGISTERS, shared, int(loop * (1 + _LOOP))
        over = [f"{what} {n}, stored {was}" for what, n, was, most in
                zip(_FIGURES, now, stored[name], limits, strict=True) if n > most]  # fmt: skip
        if over:
            yield f"{name}: {'; '.join(over)}"


def renew(kernels: Sequence[Kernel], path: Path) -> None:
    """Store the figures of the kernels, one a line; they replace all stored figures of the same architectures."""
    arches = {kernel.arch for kernel in kernels}
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    kept = {name: figures for name, figures in old.items() if name.split()[0] not in arches}
    lines = [f"{json.dumps(name)}: {figures}" for name, figures in sorted({**kept, **_figures(kernels)}.items())]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _figures(kernels: Sequence[Kernel]) -> dict[str, list[int]]:
    """Return registers per thread, bytes of shared memory, and instructions of the K loop (0: no loop), by kernel."""
    figures: dict[str, list[int]] = {}
    for kernel in kernels:
        facts = kernel.facts
        now = [facts.registers, facts.shared, facts.loop.instructions if facts.loop else 0]
        figures[str(kernel)] = list(map(max, now, figures.get(str(kernel), now)))
    return figures
