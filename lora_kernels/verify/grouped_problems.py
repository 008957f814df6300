"""Problems of `lora_grouped_linear`: their float64 truth and their error rules, group by group.

    group e     y_e = x_e W_eᵀ + Σᵢ scalingᵢ · x_e A_ieᵀ B_ieᵀ + bias_e

The rows of a group and its operands are a `numerics.Problem`. Its adapters stand side by side, [scaling₁ A₁; …] and
[B₁ | …], and its scaling is 1. With scalings that are powers of two that is exact, and dAᵢ is scalingᵢ times its rows.
So the bounds of `numerics` hold for each group. Rows of no group, which hold NaN in x and dy, must be exactly 0 in y
and dx, and so must the gradients of a group without rows.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lora_kernels.functional import lora_grouped_linear
from lora_kernels.verify import numerics
from lora_kernels.verify.numerics import Finding, Problem

__all__ = [
    "GROUPED_MM_ROUNDINGS",
    "GroupedProblem",
    "check_grouped",
    "grouped_leaves",
    "grouped_outputs",
    "make_grouped",
    "run_grouped",
]

# Roundings of y and dx by `torch_segments` on a GPU: of the first low-rank product, and of the sum before the bias.
GROUPED_MM_ROUNDINGS = 2


@dataclass(frozen=True)
class GroupedProblem:
    """One call of the layer of groups and the gradient that flows back into it.

    Attributes:
        x: `[S, in]`, rows sorted by group. The layer computes in its dtype.
        weight: `[E, out, in]`.
        lora_As: A of each adapter, `[E, rᵢ, in]`.
        lora_Bs: B of each adapter, `[E, out, rᵢ]`.
        scalings: The scaling of each adapter, a power of two.
        sizes: Rows of each group; further rows of x belong to no group.
        offsets: `[E + 1]`, the sums of the sizes.
        dy: `[S, out]`.
        bias: `[E, out]` or None.

    A problem also reads as a `block_problems.BlockProblem` without layers that drop elements.
    """

    x: Tensor
    weight: Tensor
    lora_As: tuple[Tensor, ...]
    lora_Bs: tuple[Tensor, ...]
    scalings: tuple[float, ...]
    sizes: tuple[int, ...]
    offsets: Tensor
    dy: Tensor
    bias: Tensor | None = None
    activation: ClassVar[str] = ""
    ys: ClassVar[tuple[str, ...]] = ("y",)
    layers: ClassVar[Mapping[str, Problem]] = {}
    stored: ClassVar[Mapping[str, Tensor]] = {}

    @property
    def dys(self) -> tuple[Tensor, ...]:
        """Return the upstream gradient of each output."""
        return (self.dy,)

    @property
    def rank(self) -> int:
        """Return the sum of the ranks."""
        return sum(lora_A.shape[1] for lora_A in self.lora_As)

    @property
    def operands(self) -> dict[str, Tensor]:
        """Return all tensors of the call by name, and dy."""
        tensors = {"x": self.x, "weight": self.weight, "offsets": self.offsets, "dy": self.dy}
        for name, adapters in (("lora_A", self.lora_As), ("lora_B", self.lora_Bs)):
            tensors |= {f"{name}[{i}]": t for i, t in enumerate(adapters)}
        return tensors if self.bias is None else tensors | {"bias": self.bias}

    @property
    def filled(self) -> list[tuple[int, slice]]:
        """Return the groups that have rows, and their rows."""
        ends = self.offsets.tolist()
        return [(e, slice(ends[e], ends[e + 1])) for e, size in enumerate(self.sizes) if size]

    @property
    def terms_summed(self) -> dict[str, int]:
        """Return the n of rule 2 (see `numerics.terms`) for each output, of the largest group."""
        (_, n, k), rows = self.weight.shape, max(self.sizes)
        summed = dict(y=k + 2 * self.rank, dx=n + 2 * self.rank, dbias=rows, dweight=rows)
        for i in range(len(self.lora_As)):
            summed |= {f"d_lora_A[{i}]": rows + n, f"d_lora_B[{i}]": rows + k}
        return summed

    def group(self, e: int, rows: slice) -> Problem:
        """Return the layer of group e, with the adapters side by side."""
        scaled = [scaling * lora_A[e] for scaling, lora_A in zip(self.scalings, self.lora_As, strict=True)]
        bare = self.weight[e][:0], self.weight[e][:, :0]
        lora_A, lora_B = (torch.cat(scaled), torch.cat([t[e] for t in self.lora_Bs], 1)) if scaled else bare
        bias = None if self.bias is None else self.bias[e]
        return Problem(self.x[rows], self.weight[e], lora_A, lora_B, self.dy[rows], bias)


def make_grouped(
    sizes: Sequence[int], in_features: int, out_features: int, ranks: Sequence[int], dtype: torch.dtype, device: str, *,
    beyond: int = 0, adapter_dtype: torch.dtype | None = None, bias: bool = False, seed: int = 0,
) -> GroupedProblem:  # fmt: skip
    """Draw a problem in which every term matters, as `problems.make_problem` does.

    Args:
        sizes: Rows of each group.
        in_features: K.
        out_features: N.
        ranks: Rank of each adapter; the scalings are 2, 1/2, 2, and so on.
        dtype: Dtype of x, weight, bias and dy.
        device: Device of all tensors; the numbers are the same on every device.
        beyond: Rows of no group behind the others; they hold NaN in x and dy.
        adapter_dtype: Dtype of the adapters; `dtype` if None.
        bias: Whether the layer has a bias.
        seed: Seed of the draw.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype).to(device)

    groups, rows, k, n = len(sizes), sum(sizes), in_features, out_features
    adapters = adapter_dtype or dtype
    x, dy = draw(rows + beyond, k), draw(rows + beyond, n)
    x[rows:], dy[rows:] = math.nan, math.nan
    return GroupedProblem(
        x=x,
        weight=draw(groups, n, k, scale=max(k, 1) ** -0.5),
        lora_As=tuple(draw(groups, r, k, scale=max(k, 1) ** -0.5, dtype=adapters) for r in ranks),
        lora_Bs=tuple(draw(groups, n, r, scale=max(r, 1) ** -0.5, dtype=adapters) for r in ranks),
        scalings=tuple((2.0, 0.5)[i % 2] for i in range(len(ranks))),
        sizes=tuple(sizes),
        offsets=torch.tensor([sum(sizes[:e]) for e in range(groups + 1)], dtype=torch.int32, device=device),
        dy=dy,
        bias=draw(groups, n) if bias else None,
    )


def grouped_leaves(problem: GroupedProblem, weight: bool = False) -> dict[str, Tensor]:
    """Return the tensors that need gradients, by the gradient's name; with `weight` that of W as well."""
    leaves = {"dx": problem.x}
    for i, pair in enumerate(zip(problem.lora_As, problem.lora_Bs, strict=True)):
        leaves |= {f"d_lora_{name}[{i}]": t for name, t in zip("AB", pair, strict=True)}
    leaves |= {} if problem.bias is None else {"dbias": problem.bias}
    leaves |= {"dweight": problem.weight} if weight else {}
    return {name: t.detach().requires_grad_() for name, t in leaves.items()}


def run_grouped(problem: GroupedProblem, backend: str, weight: bool = False) -> dict[str, Tensor]:
    """Run the layer forward and backward; return outputs by the names of `grouped_leaves`, and y."""
    leaves = grouped_leaves(problem, weight)
    adapters = range(len(problem.lora_As))
    y = lora_grouped_linear(
        leaves["dx"], leaves.get("dweight", problem.weight), [leaves[f"d_lora_A[{i}]"] for i in adapters],
        [leaves[f"d_lora_B[{i}]"] for i in adapters], problem.offsets, scaling=problem.scalings,
        bias=leaves.get("dbias"), backend=backend,
    )  # fmt: skip
    gradients = torch.autograd.grad(y, tuple(leaves.values()), problem.dy)
    return {"y": y.detach()} | dict(zip(leaves, gradients, strict=True))


def grouped_outputs(problem: GroupedProblem, exact: bool = True) -> dict[str, Tensor]:
    """Compute all outputs: in float64 from the rounded inputs, or by PyTorch's operators in the problem's own dtype."""
    function = numerics.exact if exact else numerics.eager
    return _put_together(problem, {e: _outputs(problem.group(e, rows), function) for e, rows in problem.filled}, exact)


def _outputs(q: Problem, function: object) -> dict[str, Tensor]:
    """Return what `numerics.exact` or `eager` computes, and the gradient of W."""
    wide = (lambda t: t.double()) if function is numerics.exact else (lambda t: t)
    return function(q) | {"dweight": wide(q.dy).T @ wide(q.x)}  # type: ignore[operator]


def check_grouped(
    actual: dict[str, Tensor], problem: GroupedProblem, split: bool = False, roundings: int = 0
) -> list[Finding]:
    """Hold outputs to rules 1 and 2.

    Args:
        actual: Output name, as of `run_grouped`, to tensor.
        problem: The problem that was computed.
        split: See `numerics.bounds`; False for the kernels, True for the torch backend and other chains of operators.
        roundings: With `split`, how often y and dx may be rounded beyond that and beyond once more for each further
            adapter; see `GROUPED_MM_ROUNDINGS`.

    Returns:
        A finding for each output in `actual`, in its order.
    """
    limits = _put_together(
        problem, {e: _limits(problem, e, rows, split, roundings) for e, rows in problem.filled}, True
    )
    truth, eager, summed = grouped_outputs(problem), grouped_outputs(problem, False), problem.terms_summed
    findings = []
    for name, tensor in actual.items():
        rank = tensor.shape[1 if name.startswith("d_lora_A") else 2] if name.startswith("d_lora") else 0
        inherited = sum(problem.sizes) * rank
        few = tensor.numel() < numerics.RULE_2_SIZE or (rank and inherited < numerics.RULE_2_INHERITED)
        dtype = eager[name].dtype
        findings.append(
            numerics.compare(name, tensor, truth[name], limits[name], dtype, eager[name], not few, summed[name])
        )
    return findings


def _limits(problem: GroupedProblem, e: int, rows: slice, split: bool, roundings: int) -> dict[str, Tensor]:
    """Compute rule 1's limit of each element of the outputs of a group, in float64."""
    q, dtype = problem.group(e, rows), problem.x.dtype
    wide = {name: getattr(q, name).detach().to(dtype).double() for name in ("x", "weight", "lora_A", "lora_B", "dy")}
    limits = numerics.bounds(q, split)
    # Operators round the sum after each adapter but the last once more than `bounds` knows of.
    more = max(len(problem.lora_As) - 1, 0) + roundings
    if split and more:
        x, _, lora_A, lora_B, dy = (t.abs() for t in wide.values())
        signed = (wide["x"] @ wide["weight"].T).abs(), (wide["dy"] @ wide["weight"]).abs()
        parts = signed[0] + x @ lora_A.T @ lora_B.T, signed[1] + dy @ lora_B @ lora_A
        for name, part in zip(("y", "dx"), parts, strict=True):
            limits[name] += more * numerics.error_after_rounding(limits[name], part, dtype)
    error = numerics.propagate_errors(Problem(**wide), dtype)["dweight"]
    return limits | {"dweight": numerics.allowed_error(error, wide["dy"].T @ wide["x"], dtype)}


def _put_together(problem: GroupedProblem, found: dict[int, dict[str, Tensor]], wide: bool) -> dict[str, Tensor]:
    """Lay the results of the groups side by side, and split those of the adapters; 0 where no group has a result."""
    x, (groups, n, k) = problem.x, problem.weight.shape
    dtype = torch.float64 if wide else x.dtype
    whole = {"y": x.new_zeros(x.shape[0], n, dtype=dtype), "dx": x.new_zeros(x.shape, dtype=dtype)}
    whole |= {"dweight": x.new_zeros(groups, n, k, dtype=dtype), "dbias": x.new_zeros(groups, n, dtype=dtype)}
    for i, (lora_A, lora_B) in enumerate(zip(problem.lora_As, problem.lora_Bs, strict=True)):
        for name, t in (("A", lora_A), ("B", lora_B)):
            whole[f"d_lora_{name}[{i}]"] = x.new_zeros(t.shape, dtype=torch.float64 if wide else t.dtype)
    ranks = [lora_A.shape[1] for lora_A in problem.lora_As]
    for e, rows in problem.filled:
        of_group = found[e]
        whole["y"][rows], whole["dx"][rows], whole["dweight"][e] = (of_group[name] for name in ("y", "dx", "dweight"))
        if problem.bias is not None:
            whole["dbias"][e] = of_group["dbias"]
        parts = of_group["d_lora_A"].split(ranks), of_group["d_lora_B"].split(ranks, 1)
        for i, (dA, dB, scaling) in enumerate(zip(*parts, problem.scalings, strict=True)):
            whole[f"d_lora_A[{i}]"][e], whole[f"d_lora_B[{i}]"][e] = scaling * dA, dB
    return whole
