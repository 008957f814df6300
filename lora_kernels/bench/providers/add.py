"""Providers of `lora_add`, the low-rank term over an existing result: this package, PEFT and an addmm chain.

Their `Problem` is a layer with W = 0 and base `[M, out]` in the bias' place: y = x·0 + base + scaling · D(x) Aᵀ Bᵀ. So
the rules of `verify.judge` hold as they are, and dropout masks are read off as they are for a layer. The gradient of
base is dy itself and needs no computation, so base is no leaf. There is no floor, because nothing is left without the
adapter.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.bench.providers import layer
from lora_kernels.bench.providers.layer import Build, chosen_backend, leaves_of, scaled_mm, short, variants
from lora_kernels.functional import lora_add
from lora_kernels.verify.numerics import Problem
from lora_kernels.verify.provider import Provider, Rounding

__all__ = ["PROVIDERS", "build", "names_for", "without_base"]


def without_base(problem: Problem) -> Problem:
    """Make the problem of `lora_add` from a layer's problem; the layer's result with W alone becomes base."""
    base = F.linear(problem.x, problem.weight, problem.bias)
    return replace(problem, weight=torch.zeros_like(problem.weight), bias=base)


def build(name: str, problem: Problem, backend: str = "auto") -> Provider:
    """Build a provider of `PROVIDERS` for a problem that `without_base` gave."""
    return PROVIDERS[name](problem, backend)


def names_for(dtype: torch.dtype, backend: str, compiled: bool) -> list[str]:
    """List the providers that make sense, by the same rules as for a layer."""
    return [name for name in layer.names_for(dtype, backend, compiled) if name in PROVIDERS]


def _ours(problem: Problem, backend: str) -> Provider:
    chosen, leaves = chosen_backend(problem, backend), leaves_of(problem)

    def forward() -> Tensor:
        return lora_add(
            problem.bias, leaves["dx"], leaves["d_lora_A"], leaves["d_lora_B"],
            scaling=problem.scaling, dropout_p=problem.dropout_p, backend=chosen,
        )  # fmt: skip

    wide = "" if problem.lora_A.dtype == problem.x.dtype else f" {short(problem.lora_A.dtype)}"
    # y is a sum by the library in either backend
    return Provider(f"lora_kernels [{chosen}]{wide}", problem, forward, leaves, Rounding.OPERATORS, chosen)


def _peft(problem: Problem, backend: str) -> Provider:
    """Add the low-rank term to the base layer's result, as PEFT's layers do, quantised ones as well."""
    leaves, base, p, scaling = leaves_of(problem), problem.bias, problem.dropout_p, problem.scaling

    def forward() -> Tensor:
        x, a, b = leaves.values()
        wide = x.to(a.dtype)
        low_rank = F.linear(F.linear(F.dropout(wide, p) if p else wide, a), b)
        return (base + low_rank * scaling).to(base.dtype)

    label = f"PEFT arithmetic {short(problem.lora_A.dtype)}"
    return Provider(label, problem, forward, leaves, cost="peft")


class _AddmmOntoBase(torch.autograd.Function):
    """The best chain of library calls; the sum is out of place, because base belongs to the caller."""

    @staticmethod
    def forward(ctx, base, x, lora_A, lora_B, scaling, p):
        x_d, keep = torch.native_dropout(x, p, True) if p else (x, None)
        s = scaled_mm(x_d, lora_A.t(), scaling)
        ctx.save_for_backward(x_d, lora_A, lora_B, s, keep)
        ctx.scaling, ctx.p = scaling, p
        return torch.addmm(base, s, lora_B.t())

    @staticmethod
    def backward(ctx, dy):
        x_d, lora_A, lora_B, s, keep = ctx.saved_tensors
        ds = scaled_mm(dy, lora_B, ctx.scaling)
        dx = ds @ lora_A
        if keep is not None:
            dx = torch.ops.aten.native_dropout_backward(dx, keep, 1 / (1 - ctx.p))
        return None, dx, ds.t() @ x_d, dy.t() @ s, None, None


def _addmm(problem: Problem, backend: str) -> Provider:
    leaves = leaves_of(problem)

    def forward() -> Tensor:
        return _AddmmOntoBase.apply(problem.bias, *leaves.values(), problem.scaling, problem.dropout_p)

    return Provider("addmm chain", problem, forward, leaves, cost="addmm")


PROVIDERS: dict[str, Build] = {
    **variants(_ours, _peft),
    "addmm": _addmm,
}
