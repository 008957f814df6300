"""The cases of `lora-kernels verify` for layers of groups: their list, and how a case is run and held to the rules."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_kernels.constants import DTYPES
from lora_kernels.verify.grouped_problems import (
    GROUPED_MM_ROUNDINGS,
    GroupedProblem,
    check_grouped,
    make_grouped,
    run_grouped,
)
from lora_kernels.verify.numerics import Finding
from lora_kernels.verify.problems import every_other, same_bits, storages

__all__ = ["GROUPED_LAYOUTS", "GroupedCase", "draw_grouped", "examine", "matrix"]

GROUPED_LAYOUTS = (
    "contiguous", "W transposed", "B as in PEFT", "bias", "two adapters", "no adapter", "fp32 adapters",
    "int64 offsets", "dy expanded", "all strided",
)  # fmt: skip
_FP32_ADAPTERS = "fp32 adapters"
_QUICK_LAYOUTS = ("W transposed", "B as in PEFT", "bias", "two adapters", _FP32_ADAPTERS)


@dataclass(frozen=True)
class GroupedCase:
    """One line of the table.

    Attributes:
        backend: "triton" or "torch".
        dtype: Name of the dtype of x and the weights.
        k: in_features.
        n: out_features.
        r: Rank of each adapter.
        sizes: Rows of each group.
        beyond: Rows of no group.
        strides: One of `GROUPED_LAYOUTS`.
    """

    backend: str
    dtype: str
    k: int
    n: int
    r: int
    sizes: tuple[int, ...]
    beyond: int = 0
    strides: str = "contiguous"

    form = "fused"
    p = 0.0

    @property
    def layout(self) -> str:
        """Return the table's layout column: what is unusual of the tensors."""
        return "experts" if self.strides == "contiguous" else self.strides

    def shape(self) -> str:
        """Format the shape as the table shows it: rows in groups and of none, inputs, outputs, rank and groups."""
        beyond = f"+{self.beyond}" if self.beyond else ""
        return f"{sum(self.sizes)}{beyond}x{self.k}x{self.n} r{self.r} E{len(self.sizes)}"


def _uneven(groups: int, rows: int) -> tuple[int, ...]:
    """Share rows out unevenly: a group in four gets none, another one, and the others more and more."""
    weights = [e % 4 if e % 4 < 2 else (e % 4) * (e + 3) for e in range(groups)]
    total = sum(weight for weight in weights if weight > 1)
    return tuple(weight if weight < 2 else rows * weight // total for weight in weights)


def _around(block: int) -> tuple[int, ...]:
    """Return sizes around a tile of so many rows: 0, 1, one less, one more, the tile, and two tiles and one."""
    return (0, block - 1, 1, block + 1, 0, block, 2 * block + 1, 3)


def matrix(backend: str, dtype: str, on_gpu: bool, quick: bool) -> list[GroupedCase]:
    """List the cases of a backend and a dtype: 1, 3, 8 and 128 groups, every layout.

    Interpreted, 128 groups take minutes, so there is a single such case, of few columns, and none among the quick ones.
    """
    fast = backend == "torch" or on_gpu
    if backend == "torch":
        k, n, r, rows, block = 96, 136, 8, 300, 64
    elif on_gpu:
        k, n, r, rows, block = 1024, 1536, 16, 4096, 128
    else:
        k, n, r, rows, block = 32, 40, 8, 48, 16
    base = GroupedCase(backend, dtype, k, n, r, _around(block), 5)
    layouts = [one for one in GROUPED_LAYOUTS[1:] if dtype != "fp32" or one != _FP32_ADAPTERS]
    if quick:
        some = [one for one in _QUICK_LAYOUTS if one in layouts]
        many = [replace(base, sizes=_uneven(128, 200))] if fast else []
        return [base, *many, *(replace(base, strides=one) for one in some)]
    spread = [
        ((rows,), 0), ((rows - 3,), 3), ((block, 0, block + 1), 0), ((0, rows, 0), 7), (_uneven(3, rows), 4),
        (_around(block), 0), ((0,) * 5 + (rows,) + (0,) * 2, 0), ((1,) * 8, 1), ((0,) * 8, 9),
    ]  # fmt: skip
    if fast:
        spread += [(_uneven(128, 2 * rows + 128), 4), ((0, 1) * 64, 0), ((0,) * 127 + (rows,), 2)]
    cases = [base, *(replace(base, sizes=sizes, beyond=beyond) for sizes, beyond in spread)]
    if not fast:
        cases.append(replace(base, k=16, n=16, r=4, sizes=_uneven(128, 100), beyond=2))
    cases += [replace(base, r=one, k=k + 1, n=n + 3) for one in (1, 3, 17)]
    cases += [replace(base, r=one) for one in (64, 128)]
    return cases + [replace(base, strides=one) for one in layouts]


def draw_grouped(case: GroupedCase, device: str, seed: int) -> GroupedProblem:
    """Draw the problem of a case, with the strides that its layout names."""
    ranks = {"two adapters": (case.r, 3), "no adapter": ()}.get(case.strides, (case.r,))
    problem = make_grouped(
        case.sizes, case.k, case.n, ranks, DTYPES[case.dtype], device, beyond=case.beyond, seed=seed,
        adapter_dtype=torch.float32 if case.strides == _FP32_ADAPTERS else None, bias=case.strides == "bias",
    )  # fmt: skip
    if case.strides == "W transposed":
        return replace(problem, weight=problem.weight.mT.contiguous().mT)
    # as PEFT stores it: [out, r · E], the experts side by side
    if case.strides in ("B as in PEFT", _FP32_ADAPTERS, "two adapters"):
        return replace(problem, lora_Bs=tuple(map(_expert_minor, problem.lora_Bs)))
    if case.strides == "int64 offsets":
        return replace(problem, offsets=problem.offsets.long())
    # as the backward of y.sum(0) gives dy: all rows share one row's memory
    if case.strides == "dy expanded":
        return replace(problem, dy=problem.dy[:1].expand_as(problem.dy))
    if case.strides == "all strided":
        matrices = {name: every_other(getattr(problem, name)) for name in ("x", "weight", "dy")}
        lists = {name: tuple(map(every_other, getattr(problem, name))) for name in ("lora_As", "lora_Bs")}
        return replace(problem, **matrices, **lists)
    return problem


def _expert_minor(lora_B: Tensor) -> Tensor:
    return lora_B.permute(1, 2, 0).contiguous().permute(2, 0, 1)


def examine(case: GroupedCase, device: torch.device, seed: int) -> tuple[list[Finding], list[str]]:
    """Run a case twice and hold it to the rules; return the findings and the messages of all other failures."""
    problem = draw_grouped(case, str(device), seed)
    before = storages(problem.operands)
    actual, again = (run_grouped(problem, case.backend, weight=True) for _ in range(2))
    after = storages(problem.operands)
    messages = [f"{name} was written to" for name in before if not torch.equal(before[name], after[name])]
    messages += [f"{name} differs from run to run" for name in actual if not same_bits(actual[name], again[name])]
    roundings = GROUPED_MM_ROUNDINGS if device.type == "cuda" else 0
    return check_grouped(actual, problem, case.backend == "torch", roundings), messages
