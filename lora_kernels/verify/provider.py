"""What is judged and timed: something that computes a problem, and what it is held to."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_kernels.verify.block_problems import BlockProblem
from lora_kernels.verify.numerics import Problem

__all__ = ["BlockProvider", "Provider"]


@dataclass(frozen=True)
class Provider:
    """Something that can be timed.

    Attributes:
        label: For the tables; a dtype in it is the adapters'.
        problem: What it computes; its adapters may be wider than the case's.
        forward: Computes y from the leaves.
        leaves: Output name (dx, d_lora_A, d_lora_B, dbias) to the tensor whose gradient that is.
        rule: What it is held to: "kernel" and "operators" are `numerics.check` without and with `split`; "peer" is
            an rms error of at most twice that of PyTorch's operators.
        cost: Its formula in `cost.layer.COSTS` or, of `lora_add`, in `cost.add.COSTS`; "" where its launches are a
            compiler's choice.
    """

    label: str
    problem: Problem
    forward: Callable[[], Tensor]
    leaves: dict[str, Tensor] = field(default_factory=dict)
    rule: str = "peer"
    cost: str = ""

    def backward(self, y: Tensor, dy: Tensor | None = None) -> tuple[Tensor, ...]:
        """The gradients of the leaves, in their order, from `dy` or else the problem's own."""
        return torch.autograd.grad(y, tuple(self.leaves.values()), self.problem.dy if dy is None else dy)


@dataclass(frozen=True)
class BlockProvider:
    """A block that can be timed.

    Attributes:
        label: For the tables; a dtype in it is the adapters'.
        problem: What it computes; its adapters may be wider than the case's.
        forward: Computes the outputs from the leaves.
        leaves: Gradient's name to the tensor whose gradient that is.
        rule: What projections are held to: "kernel" and "operators" are `numerics`' rules without and with `split`;
            "peer" is an rms error of at most twice that of PyTorch's operators, which an MLP is held to whoever it is.
        cost: Its formula in `cost.block.COSTS`; "" where its launches are a compiler's choice or none is written.
    """

    label: str
    problem: BlockProblem
    forward: Callable[[], tuple[Tensor, ...]]
    leaves: dict[str, Tensor] = field(default_factory=dict)
    rule: str = "peer"
    cost: str = ""

    def backward(self, ys: tuple[Tensor, ...], dys: tuple[Tensor, ...] | None = None) -> tuple[Tensor, ...]:
        """The gradients of the leaves, in their order, from `dys` or else the problem's own."""
        return torch.autograd.grad(ys, tuple(self.leaves.values()), self.problem.dys if dys is None else dys)
