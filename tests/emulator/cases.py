"""The kinds of cases that are held to the project's own rules: a layer; queries, keys and values; an MLP.

A case can be judged, which runs it and gives "" or what is wrong, or only launched: its kernels for a gradient step, on
numbers that mean nothing, to see which they are (`rules.py`).
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from lora_kernels import plan
from lora_kernels.constants import DTYPES
from lora_kernels.functional import lora_mlp
from lora_kernels.passes.layer import Projection
from lora_kernels.verify import block_matrix, layer_matrix, matrix, numerics_mlp
from lora_kernels.verify.numerics_mlp import MLPProblem
from lora_kernels.verify.problems import make_problem, run_problem

__all__ = ["CPU", "Case", "block", "layer", "precision_of_products", "ungated"]

CPU = torch.device("cpu")


class Case(NamedTuple):
    """A line of the table.

    Attributes:
        name: What it is; no other case has the same.
        judge: Runs it; "" or what is wrong.
        launch: Runs its kernels and looks at nothing.
    """

    name: str
    judge: Callable[[], str]
    launch: Callable[[], object]


@contextlib.contextmanager
def precision_of_products(precision: str) -> Iterator[None]:
    """Set what fp32 products may be rounded to, "ieee" or "tf32"."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@contextlib.contextmanager
def _placed(place: int | None) -> Iterator[None]:
    """Every form that is forced takes this place among the shipped tiles as well."""
    forced = plan.force_form
    plan.force_form = lambda name, _=None: forced(name, place)
    try:
        yield
    finally:
        plan.force_form = forced


def layer(dtype, m, k, n, r, layout="contiguous", p=0.0, form="fused", place=None) -> Case:
    """A layer, forward and backward, twice, held to the rules as `lora-kernels verify` does."""
    case = layer_matrix.LayerCase("triton", dtype, m, k, n, r, layout, p, form)

    def judge() -> str:
        with _placed(place):
            result = matrix.examine(case, CPU, 0)
        return "" if result.ok else result.message

    def launch() -> None:
        with plan.force_form(form, place):
            run_problem(layer_matrix.draw(case, CPU, 0), "triton", 0)

    tile = "" if place is None else f" tile{place}"
    return Case(f"layer {dtype} {m}x{k}x{n} r{r} {layout} p={p:g} {form}{tile}", judge, launch)


def block(dtype, m, k, widths, ranks, ps, activation="", place=None, **more) -> Case:
    """Queries, keys and values, or a gated MLP; `more`: bias, fp32_adapters, strided."""
    case = block_matrix.BlockCase("triton", dtype, m, k, widths, ranks, ps, activation, **more)

    def placed() -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if place is None else plan.force_form("fused", place)

    def judge() -> str:
        with placed():
            findings, messages = block_matrix.examine(case, DTYPES[dtype], CPU, 0)
        return "; ".join(messages + [f.message for f in findings if not f.ok])

    def launch() -> None:
        with placed():
            block_matrix._run(block_matrix._draw(case, DTYPES[dtype], "cpu", 0), "triton", 0)

    kind = f"mlp {activation}" if activation else "qkv"
    shape = f"{m}x{k}x{'+'.join(map(str, widths))} r{'/'.join(map(str, ranks))} p={'/'.join(f'{p:g}' for p in ps)}"
    words = [name for name, on in more.items() if on] + ([] if place is None else [f"tile{place}"])
    return Case(" ".join([kind, dtype, shape, *words]), judge, launch)


def ungated(dtype, m, k, hidden, r, activation) -> Case:
    """An MLP of two layers, up and down, without dropout: h = a(up(x))."""
    sides = (k, hidden), (hidden, k)
    problems = [make_problem((m,), *side, r, DTYPES[dtype], "cpu", seed=i) for i, side in enumerate(sides)]
    up, down = (Projection(q.weight, q.lora_A, q.lora_B, None, q.scaling) for q in problems)
    problem = MLPProblem(problems[0].x, None, up, down, problems[1].dy, activation)

    def run() -> dict[str, torch.Tensor]:
        leaves = [t.detach().requires_grad_() for t in (problem.x, up.lora_A, up.lora_B, down.lora_A, down.lora_B)]
        layers = [q._replace(lora_A=leaves[i], lora_B=leaves[i + 1]) for q, i in ((up, 1), (down, 3))]
        y = lora_mlp(leaves[0], None, *layers, activation=activation, backend="triton")
        names = "dx", "up.d_lora_A", "up.d_lora_B", "down.d_lora_A", "down.d_lora_B"
        return {"y": y.detach()} | dict(zip(names, torch.autograd.grad(y, leaves, problem.dy), strict=True))

    def judge() -> str:
        findings = numerics_mlp.check(run(), problem, numerics_mlp.eager(problem))
        return "; ".join(f.message for f in findings if not f.ok)

    return Case(f"mlp {activation} {dtype} {m}x{k}x{hidden} r{r} ungated", judge, run)
