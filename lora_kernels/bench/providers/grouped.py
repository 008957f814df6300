"""The providers of `bench --block experts`: this package's layer of groups, and the forms it is compared with.

    frozen        grouped_mm with W alone, the floor
    ours          `lora_grouped_linear`
    peft          PEFT 0.21 over transformers 5: `baddbmm` makes W + scaling · B A of all experts, twice a forward, as
                  the parametrization is registered and as it is read, and grouped_mm takes it
    peft_once     the same without the first `baddbmm`: the best that the dense form can be
    split         grouped_mm with W and with A and B, then a scale and an add over y; backward by autograd
    split_best    the split form at its best: the scale is on s, both adds are in place, backward is by hand

PEFT's parametrization is written out, because a layer without routing is none of transformers' modules. Adapters in
fp32 over a 16-bit W are rounded to W's dtype, as PEFT's factors are. All providers read the same tensors.

Source: peft 0.21 `ParamWrapper`; Unsloth's documentation of its split form for experts.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels import plan
from lora_kernels.bench.providers.layer import short
from lora_kernels.functional import lora_grouped_linear
from lora_kernels.verify.grouped_problems import GroupedProblem, grouped_leaves
from lora_kernels.verify.provider import Provider, Rounding

__all__ = ["PROVIDERS", "build", "names_for"]


def build(name: str, problem: GroupedProblem, backend: str = "auto") -> Provider:
    """Build a provider of `PROVIDERS` for a problem of one adapter; raises if this machine cannot run it."""
    return PROVIDERS[name](problem, backend)


def names_for(dtype: torch.dtype) -> list[str]:
    """List the providers that apply: no fp32-adapter rows where x is fp32."""
    return [name for name in PROVIDERS if dtype.itemsize == 2 or "fp32" not in name]


def _grouped_mm(x: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    """Multiply the rows of each group by its matrix `[K, N]`, or with two matrices the groups of their inner side."""
    if hasattr(F, "grouped_mm"):
        return F.grouped_mm(x, stack, offs=ends)
    # before PyTorch 2.10
    return torch._grouped_mm(x, stack, offs=ends)


def _ends(problem: GroupedProblem) -> Tensor:
    """Return where each group ends, as grouped_mm takes it."""
    return problem.offsets[1:].int()


def _frozen(problem: GroupedProblem, backend: str) -> Provider:
    bare = replace(problem, lora_As=(), lora_Bs=(), scalings=())
    leaves, ends = grouped_leaves(bare), _ends(problem)
    return Provider(
        "frozen experts", bare, lambda: _grouped_mm(leaves["dx"], problem.weight.mT, ends), leaves, cost="frozen"
    )


def _adapted(label: str, problem: GroupedProblem, leaves: dict[str, Tensor], forward: Callable, cost: str) -> Provider:
    return Provider(f"{label} {short(problem.lora_As[0].dtype)}", problem, forward, leaves, cost=cost)


def _ours(problem: GroupedProblem, backend: str) -> Provider:
    x, leaves = problem.x, grouped_leaves(problem)
    chosen = plan.choose(x.device, x.dtype, problem.rank, False, backend)

    def forward() -> Tensor:
        return lora_grouped_linear(
            leaves["dx"], problem.weight, leaves["d_lora_A[0]"], leaves["d_lora_B[0]"], problem.offsets,
            scaling=problem.scalings[0], backend=chosen,
        )  # fmt: skip

    dtype = problem.lora_As[0].dtype
    wide = "" if dtype == x.dtype else f" {short(dtype)}"
    fused = chosen == "triton"
    return Provider(
        f"lora_kernels [{chosen}]{wide}", problem, forward, leaves,
        Rounding.KERNELS if fused else Rounding.OPERATORS, "ours" if fused else "",
    )  # fmt: skip


def _peft(problem: GroupedProblem, once: bool = False) -> Provider:
    leaves, ends, weight = grouped_leaves(problem), _ends(problem), problem.weight
    scaling = problem.scalings[0]

    def merged() -> Tensor:
        lora_A, lora_B = (leaves[f"d_lora_{name}[0]"].to(weight.dtype) for name in "AB")
        return torch.baddbmm(weight, lora_B, lora_A, alpha=scaling)

    def forward() -> Tensor:
        if not once:
            # registering a parametrization calls it, and nothing reads the result
            merged()
        return _grouped_mm(leaves["dx"], merged().mT, ends)

    label, cost = ("dense, made once", "peft_once") if once else ("PEFT arithmetic", "peft")
    return _adapted(label, problem, leaves, forward, cost)


def _split(problem: GroupedProblem, backend: str) -> Provider:
    leaves, ends, scaling = grouped_leaves(problem), _ends(problem), problem.scalings[0]

    def forward() -> Tensor:
        x, lora_A, lora_B = leaves.values()
        base = _grouped_mm(x, problem.weight.mT, ends)
        s = _grouped_mm(x, lora_A.to(x.dtype).mT, ends)
        return base + _grouped_mm(s, lora_B.to(x.dtype).mT, ends) * scaling

    return _adapted("split", problem, leaves, forward, "split")


class _SplitByHand(torch.autograd.Function):
    """The split form with nothing that can be left out: s is scaled, not y, and the sums are in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lora_A: Tensor, lora_B: Tensor, weight: Tensor, ends: Tensor, scaling: float):
        s = _grouped_mm(x, lora_A.mT, ends).mul_(scaling)
        ctx.save_for_backward(x, lora_A, lora_B, weight, ends, s)
        ctx.scaling = scaling
        return _grouped_mm(x, weight.mT, ends).add_(_grouped_mm(s, lora_B.mT, ends))

    @staticmethod
    def backward(ctx: Any, dy: Tensor):  # type: ignore[override]
        x, lora_A, lora_B, weight, ends, s = ctx.saved_tensors
        ds = _grouped_mm(dy, lora_B, ends).mul_(ctx.scaling)
        dx = _grouped_mm(dy, weight, ends).add_(_grouped_mm(ds, lora_A, ends))
        return dx, _grouped_mm(ds.mT, x, ends), _grouped_mm(dy.mT, s, ends), None, None, None


def _split_best(problem: GroupedProblem, backend: str) -> Provider:
    leaves, ends, scaling = grouped_leaves(problem), _ends(problem), problem.scalings[0]

    def forward() -> Tensor:
        x, lora_A, lora_B = leaves.values()
        return _SplitByHand.apply(x, lora_A.to(x.dtype), lora_B.to(x.dtype), problem.weight, ends, scaling)

    return _adapted("split, by hand", problem, leaves, forward, "split_best")


def _fp32(problem: GroupedProblem) -> GroupedProblem:
    """Return the problem with adapters in fp32, as PEFT makes them by default."""
    wide = {name: tuple(t.float() for t in getattr(problem, name)) for name in ("lora_As", "lora_Bs")}
    return replace(problem, **wide)


PROVIDERS: dict[str, Callable[[GroupedProblem, str], Provider]] = {
    "frozen": _frozen,
    "ours": _ours,
    "ours_fp32": lambda problem, backend: _ours(_fp32(problem), backend),
    "peft": lambda problem, backend: _peft(problem),
    "peft_fp32": lambda problem, backend: _peft(_fp32(problem)),
    "peft_once": lambda problem, backend: _peft(problem, once=True),
    "split": _split,
    "split_best": _split_best,
}
