"""Budgets that were stored: what each kernel took when it was last looked at, a file for each Triton version.

The rules of `budgets` say what no kernel may do; these notice what is allowed and still a step back: more registers,
more shared memory, a longer K loop. Kernels go by name, dtype, tile and flags; of those that agree in all of them, as
forward and backward may, the largest figures count.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from lora_kernels.inspect.compiled import Kernel

__all__ = ["budget_file", "regressions", "renew"]

_REGISTERS, _LOOP = 8, 0.1  # a register allocator's mood, and a loop's length, a tenth more of it
_FIGURES = ("registers", "shared", "loop")


def budget_file(folder: str | Path, triton: str) -> Path:
    """The file of a Triton version, such as `3.9.json`."""
    return Path(folder, ".".join(triton.split(".")[:2]) + ".json")


def regressions(kernels: Sequence[Kernel], path: Path) -> Iterator[str]:
    """Name every kernel that takes more than is stored, or of which nothing is stored.

    Args:
        kernels: What was compiled now. Architectures of which nothing at all is stored are passed over.
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
    """Store what the kernels take, in place of all that is stored of their architectures; a line for each."""
    arches = {kernel.arch for kernel in kernels}
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    kept = {name: figures for name, figures in old.items() if name.split()[0] not in arches}
    lines = [f"{json.dumps(name)}: {figures}" for name, figures in sorted({**kept, **_figures(kernels)}.items())]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _figures(kernels: Sequence[Kernel]) -> dict[str, list[int]]:
    """Registers a thread, bytes of shared memory, and instructions of the K loop (0: none), by kernel."""
    figures: dict[str, list[int]] = {}
    for kernel in kernels:
        facts = kernel.facts
        now = [facts.registers, facts.shared, facts.loop.instructions if facts.loop else 0]
        figures[str(kernel)] = list(map(max, now, figures.get(str(kernel), now)))
    return figures
