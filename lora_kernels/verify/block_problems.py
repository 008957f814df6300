"""Blocks to check: projections of one x, and the gated MLP; their float64 truth and their error rules.

    projections    yᵢ = layerᵢ(x)                              q, k, v
    MLP            y  = down(act(gate(x)) · up(x))             gate, up, down

Each projection is held to `numerics.check`, and the shared dx to `numerics.check_shared_dx`. Peers round an MLP at
places of their own, which an elementwise bound cannot know; `judge.check_rms` therefore compares their rms error with
that of PyTorch's operators. `verify` holds this package's MLP to `numerics_mlp.check`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels import reference
from lora_kernels.passes.layer import Projection
from lora_kernels.quantized import QuantizedWeight
from lora_kernels.verify import numerics, numerics_mlp
from lora_kernels.verify.numerics import Finding, Problem
from lora_kernels.verify.numerics_mlp import ACTIVATIONS
from lora_kernels.verify.stored import quantise

__all__ = [
    "BlockProblem", "Keeps", "check_projections", "compose", "leaves_of", "outputs", "quantised", "wrong_weights",
]  # fmt: skip

# layer to its dropout mask, bool of its input's shape
Keeps = Mapping[str, Tensor]
AnyProblem = TypeVar("AnyProblem", bound="Problem | BlockProblem")


@dataclass(frozen=True)
class BlockProblem:
    """One call of a block and the gradients that flow back into it.

    Attributes:
        x: `[M, in]`. The block computes in its dtype.
        layers: Name to weight, adapter, scaling and dropout; for an MLP: gate, up and down.
        dys: The upstream gradient of each output.
        activation: One of `numerics_mlp.ACTIVATIONS`; "" for projections of x.
        stored: Name to a quantised weight as it is stored; the weight in `layers` is then its dense W.
    """

    x: Tensor
    layers: dict[str, Projection]
    dys: tuple[Tensor, ...]
    activation: str = ""
    stored: Mapping[str, QuantizedWeight] = field(default_factory=dict)

    @property
    def kept_layers(self) -> dict[str, Projection]:
        """Return the layers as a call takes them: with quantised weights where they are stored so."""
        return {name: q._replace(weight=self.stored.get(name, q.weight)) for name, q in self.layers.items()}

    @property
    def adapted_layers(self) -> dict[str, Projection]:
        """Return the layers with an adapter."""
        return {name: q for name, q in self.layers.items() if q.lora_A is not None}

    @property
    def ys(self) -> tuple[str, ...]:
        """Return the names of the outputs."""
        return ("y",) if self.activation else tuple(f"y {name}" for name in self.layers)

    @property
    def rank(self) -> int:
        """Return the largest rank, 0 without adapters."""
        return max((q.lora_A.shape[0] for q in self.adapted_layers.values()), default=0)

    @property
    def terms_summed(self) -> int:
        """Return the n of rule 2 (see `numerics.terms`) for each output."""
        rows, weights = self.x.shape[0], [q.weight.shape for q in self.layers.values()]
        if self.activation:
            return numerics_mlp.terms(rows, *weights[-2:], self.rank)
        return rows + self.x.shape[1] + sum(n + 2 * self.rank for n, _ in weights)

    def without_adapters(self) -> "BlockProblem":
        """Return the same block without adapters."""
        bare = {name: Projection(q.weight, bias=q.bias) for name, q in self.layers.items()}
        return replace(self, layers=bare)

    def with_adapters_in(self, dtype: torch.dtype) -> "BlockProblem":
        """Return the same block with its adapters cast to `dtype`."""
        wide = {
            name: q if q.lora_A is None else q._replace(lora_A=q.lora_A.to(dtype), lora_B=q.lora_B.to(dtype))
            for name, q in self.layers.items()
        }
        return replace(self, layers=wide)


def quantised(problem: AnyProblem, kind: str, nested: bool = True, block: int | None = None) -> AnyProblem:
    """Store the weights of a problem as `stored.quantise` does; its dense weights become those of the reference."""
    dtype = problem.x.dtype
    stored = {name: quantise(q.weight, kind, nested=nested, block=block) for name, q in problem.layers.items()}
    dense = {name: reference.dequantize(weight, dtype) for name, weight in stored.items()}
    if isinstance(problem, Problem):
        return replace(problem, weight=dense[""], stored=stored)
    layers = {name: q._replace(weight=dense[name]) for name, q in problem.layers.items()}
    return replace(problem, layers=layers, stored=stored)


def wrong_weights(problem: Problem | BlockProblem, backend: str) -> list[str]:
    """Say which stored weights a backend does not dequantise to the dense W, bit for bit."""
    messages = []
    for name, weight in problem.stored.items():
        expected = problem.layers[name].weight
        actual = weight.dequantize(expected.dtype, backend)
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.itemsize]
        if wrong := int((actual.view(bits) != expected.view(bits)).sum()):
            what = f"W of {name}" if name else "W"
            messages.append(f"{what} dequantised differs from the reference in {wrong} of {actual.numel()} elements")
    return messages


def compose(problem: BlockProblem, x: Tensor, apply: Callable[[str, Tensor], Tensor]) -> tuple[Tensor, ...]:
    """Compute the block's outputs; `apply(name, input)` computes one layer."""
    if not problem.activation:
        return tuple(apply(name, x) for name in problem.layers)
    gate, up, down = problem.layers
    return (apply(down, ACTIVATIONS[problem.activation](apply(gate, x)) * apply(up, x)),)


def leaves_of(problem: BlockProblem, cast: Callable[[Tensor], Tensor] = lambda t: t) -> dict[str, Tensor]:
    """Return the tensors that need gradients, by the gradient's name: x, and each adapter's A and B."""
    leaves = {"dx": problem.x}
    for name, q in problem.adapted_layers.items():
        leaves |= {f"dA {name}": q.lora_A, f"dB {name}": q.lora_B}
    return {name: cast(t.detach()).requires_grad_() for name, t in leaves.items()}


def outputs(problem: BlockProblem, keeps: Keeps, dtype: torch.dtype) -> dict[str, Tensor]:
    """Compute outputs and gradients by PyTorch's operators in `dtype`, from inputs rounded to x's dtype.

    In float64 the result is the truth, in x's own dtype the yardstick.
    """
    narrow = problem.x.dtype
    leaves = leaves_of(problem, lambda t: t.to(narrow).to(dtype))

    def apply(name: str, x: Tensor) -> Tensor:
        q = problem.layers[name]
        bias = None if q.bias is None else q.bias.to(dtype)
        if q.lora_A is None:
            return F.linear(x, q.weight.to(dtype), bias)
        pair = leaves[f"dA {name}"], leaves[f"dB {name}"]
        return reference.forward(x, q.weight.to(dtype), *pair, bias, q.scaling, keeps.get(name), q.dropout_p)

    ys = compose(problem, leaves["dx"], apply)
    gradients = torch.autograd.grad(ys, tuple(leaves.values()), [dy.to(dtype) for dy in problem.dys])
    return {name: t.detach() for name, t in zip((*problem.ys, *leaves), (*ys, *gradients), strict=True)}


def check_projections(actual: dict[str, Tensor], problem: BlockProblem, keeps: Keeps, split: bool) -> list[Finding]:
    """Hold each projection to rules 1 and 2 on its own, and their dx as a sum.

    Args:
        actual: Output name to tensor.
        problem: The block that was computed.
        keeps: The masks used.
        split: See `numerics.bounds`.
    """
    found, problems = [], []
    for (name, q), y, dy in zip(problem.layers.items(), problem.ys, problem.dys, strict=True):
        pair = (q.weight[:0], q.weight[:, :0]) if q.lora_A is None else (q.lora_A, q.lora_B)
        one = Problem(problem.x, q.weight, *pair, dy, q.bias, q.scaling, q.dropout_p, keeps.get(name))
        own = {"y": y, "d_lora_A": f"dA {name}", "d_lora_B": f"dB {name}"}
        names = {which: called for which, called in own.items() if called in actual}
        outcome = {which: actual[called] for which, called in names.items()}
        for finding in numerics.check(outcome, one, numerics.eager(one), split):
            called = names[finding.name]
            found.append(replace(finding, name=called, message=finding.message.replace(finding.name, called, 1)))
        problems.append(one)
    eagers = [numerics.eager(one)["dx"] for one in problems]
    return [*found, numerics.check_shared_dx(actual["dx"], problems, eagers, split)]
