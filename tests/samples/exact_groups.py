"""Groups of rows with an expert each: exact integers, and maps of tiles made in Python."""

from dataclasses import dataclass

import torch
from oracles import exact

__all__ = ["COUNTS", "Groups", "tiles"]

# Rows of each group, and rows of no group behind them.
COUNTS = {
    "one": ([37], 0),
    "one of none": ([0], 5),
    "uneven": ([1, 0, 70, 17], 9),
    "all on one": ([0, 0, 90, 0], 0),
    "around a tile": ([63, 64, 65, 0, 16, 15, 17, 1], 20),
    "none": ([0, 0, 0], 12),
}


@dataclass
class Groups:
    """Exact-integer operands of groups of rows as tensors of one dtype, and what they must give, int64.

    Attributes:
        offsets: `[G + 1]`.
        rows: All rows, those of no group as well.
        tensors: x, dy, weight, lora_A, lora_B and bias.
        truth: y, dx, s, ds, d_lora_A, d_lora_B and dweight.
    """

    offsets: torch.Tensor
    rows: int
    tensors: dict[str, torch.Tensor]
    truth: dict[str, torch.Tensor]

    @classmethod
    def draw(cls, counts, tail, k, n, r, dtype, device="cpu", factor=2, transposed=False, expert_minor=False, seed=0):
        cases = [exact.draw(rows, k, n, r, factor, seed=seed + i) for i, rows in enumerate(counts)]
        of_none = exact.draw(tail, k, n, r, seed=seed + 1000)

        def rows_of(name: str) -> torch.Tensor:
            return torch.cat([getattr(case, name) for case in (*cases, of_none)])

        def stack(name: str) -> torch.Tensor:
            return torch.stack([getattr(case, name) for case in cases])

        tensors = {name: rows_of(name) for name in ("x", "dy")}
        tensors |= {name: stack(name) for name in ("weight", "lora_A", "lora_B", "bias")}
        tensors = {name: t.to(device, dtype) for name, t in tensors.items()}
        # What rows of no group hold must reach nothing.
        for name in ("x", "dy"):
            tensors[name][sum(counts) :] = torch.nan
        if transposed:
            tensors["weight"] = tensors["weight"].mT.contiguous().mT
        if expert_minor:
            tensors["lora_B"] = tensors["lora_B"].permute(1, 2, 0).contiguous().permute(2, 0, 1)
        truths = [case.truth() for case in cases]
        truth = {
            name: torch.cat([*(one[name] for one in truths), torch.zeros(tail, width, dtype=torch.int64)])
            for name, width in (("y", n), ("dx", k))
        }
        truth |= {name: torch.stack([one[name] for one in truths]) for name in ("d_lora_A", "d_lora_B", "dbias")}
        truth["dweight"] = torch.stack([case.dy.T @ case.x for case in cases])
        truth["s"] = torch.cat([factor * (case.x @ case.lora_A.T) for case in cases])
        truth["ds"] = torch.cat([factor * (case.dy @ case.lora_B) for case in cases])
        offsets = torch.tensor([0, *counts]).cumsum(0).to(device)
        return cls(offsets, sum(counts) + tail, tensors, truth)


def tiles(counts: list[int], tail: int, block: int) -> list[tuple[int, int, int]]:
    """Return the entries of the map of tiles of up to `block` rows, with those of no rows."""
    entries, empty, first = [], [], 0
    for group, rows in enumerate([*counts, tail]):
        end = first + rows
        entries += [(group, row, min(row + block, end)) for row in range(first, end, block)]
        empty += [] if rows or group == len(counts) else [(group, first, first)]
        first = end
    capacity = -(-first // block) + len(counts) + 1
    return entries + empty + [(-1, 0, 0)] * (capacity - len(entries) - len(empty))
