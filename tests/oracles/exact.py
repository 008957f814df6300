"""Exact integers: inputs so small that every sum and product is exact in any of the dtypes, so results are bitwise.

x in [-2, 2], W, A, B, dy in [-1, 1], scaling a power of two, 1/(1-p) a power of two. The truth is int64 arithmetic
written out here, with no help from the library.
"""

from dataclasses import dataclass

import torch


@dataclass
class ExactCase:
    """Inputs of one call as int64 tensors, and what they must give."""

    x: torch.Tensor
    weight: torch.Tensor
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    bias: torch.Tensor
    dy: torch.Tensor
    factor: int  # scaling / (1 - p), a whole number
    keep: torch.Tensor

    def truth(self) -> dict[str, torch.Tensor]:
        x_d, dy = self.x * self.keep, self.dy
        s = self.factor * (x_d @ self.lora_A.T)
        ds = self.factor * (dy @ self.lora_B)
        return {
            "y": self.x @ self.weight.T + s @ self.lora_B.T + self.bias,
            "dx": dy @ self.weight + (ds @ self.lora_A) * self.keep,
            "d_lora_A": ds.T @ x_d,
            "d_lora_B": dy.T @ s,
            "dbias": dy.sum(0),
        }


def draw(rows: int, k: int, n: int, r: int, factor: int = 1, keep: torch.Tensor | None = None, seed: int = 0):
    """Draw a case `x [rows, k]`, `W [n, k]`, rank r; sparse enough that 8-bit significands hold every result."""
    generator = torch.Generator().manual_seed(seed)

    def integers(*shape: int, most: int = 1, density: float = 1.0) -> torch.Tensor:
        values = torch.randint(-most, most + 1, shape, generator=generator)
        return values * (torch.rand(shape, generator=generator) < density)

    # about ten terms a sum: results stay under 2^8 with room, and no operand is all zero
    few = lambda terms: min(1.0, 10 / max(terms, 1))  # noqa: E731
    return ExactCase(
        x=integers(rows, k, most=2, density=few(k)),
        weight=integers(n, k, density=0.5),
        lora_A=integers(r, k, density=0.3),
        lora_B=integers(n, r, density=min(1.0, 2 / r)),
        bias=integers(n, most=3),
        dy=integers(rows, n, density=min(1.0, 4 / max(n, 1), 6 / max(rows, 1) + 0.05)),
        factor=factor,
        keep=torch.ones(rows, k, dtype=torch.bool) if keep is None else keep,
    )
