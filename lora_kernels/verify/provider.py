"""Providers: implementations that compute a problem, to be judged and timed."""

import enum
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_kernels.verify.block_problems import BlockProblem
from lora_kernels.verify.grouped_problems import GroupedProblem
from lora_kernels.verify.numerics import Problem

__all__ = ["Provider", "Rounding"]


class Rounding(enum.Enum):
    """Where a provider rounds, which decides its error rule."""

    # As the kernels: `numerics`' rules without `split`.
    KERNELS = enum.auto()
    # As PyTorch's operators: `numerics`' rules with `split`.
    OPERATORS = enum.auto()
    # At places of its own: an rms error of at most twice that of PyTorch's operators.
    OWN = enum.auto()


@dataclass(frozen=True)
class Provider:
    """An implementation of the layer or of a block that can be timed.

    Attributes:
        label: Its name in the tables; a dtype in it is that of the adapters.
        problem: The problem it computes; the adapters may be wider than the case's.
        forward: Computes y from the leaves, for a block the tuple of its outputs.
        leaves: Gradient name (dx, d_lora_A, d_lora_B, dbias; for a block see `block_problems.leaves_of`, for layers of
            groups `grouped_problems.grouped_leaves`) to the tensor that it is the gradient of.
        rounding: Where it rounds. An MLP is always held to the rule of `Rounding.OWN`.
        cost: Its formula in `cost.layer.COSTS`, for `lora_add` in `cost.add.COSTS`, for a block in `cost.block.COSTS`;
            "" where a compiler chooses its launches or no formula is written.
    """

    label: str
    problem: Problem | BlockProblem | GroupedProblem
    forward: Callable[[], Tensor | tuple[Tensor, ...]]
    leaves: dict[str, Tensor] = field(default_factory=dict)
    rounding: Rounding = Rounding.OWN
    cost: str = ""

    def backward(self, ys: Tensor | tuple[Tensor, ...], dys: tuple[Tensor, ...] | None = None) -> tuple[Tensor, ...]:
        """Return the gradients of the leaves, in their order, for `dys` or else for the problem's own.

        Args:
            ys: What `forward` returned.
            dys: The upstream gradient of each output, of a layer a tuple of one.
        """
        return torch.autograd.grad(ys, tuple(self.leaves.values()), self.problem.dys if dys is None else dys)
