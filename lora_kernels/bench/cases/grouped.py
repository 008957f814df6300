"""`bench --block experts`: time a stack of experts, a layer for each group of rows, beside its alternatives."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_kernels.bench.cases import layer as layer_case
from lora_kernels.bench.cases.layer import SCALING, Settings, held_bytes
from lora_kernels.bench.cost import grouped as grouped_cost
from lora_kernels.bench.cost import layer as layer_cost
from lora_kernels.bench.providers import grouped as grouped_providers
from lora_kernels.measure.presets import ExpertShape
from lora_kernels.verify import judge
from lora_kernels.verify.grouped_problems import GroupedProblem
from lora_kernels.verify.provider import Provider

__all__ = ["admit", "clone", "draw", "run_case", "size_of"]


def draw(shape: ExpertShape, r: int, settings: Settings) -> GroupedProblem:
    """Draw a stack in which every term matters, on the device; each token goes to `top_k` random experts."""
    generator = torch.Generator(settings.device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, generator=generator, device=settings.device).mul_(scale).to(settings.dtype)

    routing = torch.Generator().manual_seed(0)
    chosen = torch.rand(shape.m // shape.top_k, shape.experts, generator=routing).topk(shape.top_k).indices
    sizes = torch.bincount(chosen.flatten(), minlength=shape.experts)
    offsets = torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).to(settings.device, torch.int32)
    return GroupedProblem(
        x=normal(shape.m, shape.k),
        weight=normal(shape.experts, shape.n, shape.k, scale=shape.k**-0.5),
        lora_As=(normal(shape.experts, r, shape.k, scale=shape.k**-0.5),),
        lora_Bs=(normal(shape.experts, shape.n, r, scale=r**-0.5),),
        scalings=(SCALING,),
        sizes=tuple(sizes.tolist()),
        offsets=offsets,
        dy=normal(shape.m, shape.n),
    )


def clone(problem: GroupedProblem) -> GroupedProblem:
    """Copy the problem to memory of its own."""
    copied = {name: getattr(problem, name).clone() for name in ("x", "weight", "offsets", "dy")}
    adapters = {name: tuple(t.clone() for t in getattr(problem, name)) for name in ("lora_As", "lora_Bs")}
    return replace(problem, **copied, **adapters)


def run_case(
    shape: ExpertShape, r: int, settings: Settings, tick: Callable[[str], None] = lambda doing: None,
    build: Callable[[str, GroupedProblem, str], Provider] = grouped_providers.build,
) -> dict[str, Any]:  # fmt: skip
    """Check every provider on a stack of experts, measure its memory and time it; return plain data.

    Args:
        shape: The stack, with its experts and the rows of all of them together.
        r: Rank.
        settings: The run's settings.
        tick: Called with a description of each step.
        build: Builds a provider from its name, a problem and a backend.
    """
    problem, truth = draw(shape, r, settings), judge.Truth()
    copies = layer_case.copies_of(problem, clone, settings)
    rows = layer_case.run_all(
        list(settings.only) or grouped_providers.names_for(settings.dtype),
        lambda name: admit(name, lambda: build(name, problem, settings.backend), truth, settings),
        lambda name: [build(name, copy, settings.backend) for copy in copies[1:]], truth.forget, settings, tick,
    )  # fmt: skip
    size = size_of(problem)
    base, work = grouped_cost.flops("frozen", size), grouped_cost.flops("ours", size)
    layer_case.compare(rows, base, work, settings)
    return {
        "level": "experts", "copies": len(copies),
        "shape": {
            "m": shape.m, "k": shape.k, "n": shape.n, "label": shape.label, "experts": shape.experts,
            "top_k": shape.top_k, "rows_of_largest": max(problem.sizes), "rows_of_smallest": min(problem.sizes),
        },
        "r": r, "p": 0.0, "dtype": str(settings.dtype).removeprefix("torch."), "quantise": "",
        "flops": dict(zip(("forward", "backward"), work, strict=True)),
        "floor_bytes": grouped_cost.COSTS["frozen"](size, False).total,
        "providers": rows,
    }  # fmt: skip


def size_of(problem: GroupedProblem) -> grouped_cost.GroupSize:
    """Return the sizes of a problem of at most one adapter for `cost.grouped`."""
    (m, k), (experts, n, _) = problem.x.shape, problem.weight.shape
    adapter = problem.lora_As[0].element_size() if problem.lora_As else 0
    return grouped_cost.GroupSize(m, k, n, problem.rank, problem.x.element_size(), adapter, experts)


def admit(
    name: str, construct: Callable[[], Provider], truth: judge.Truth, settings: Settings
) -> tuple[dict[str, Any], Provider | None]:
    """Build, judge and weigh a provider; return its row, and the provider itself if it may be timed."""

    def saved(provider: Provider) -> int:
        return held_bytes(provider.forward, [*provider.problem.operands.values(), *provider.leaves.values()])

    def cost(provider: Provider) -> layer_cost.Cost | None:
        return grouped_cost.COSTS[provider.cost](size_of(provider.problem), False) if provider.cost else None

    return layer_case.examine(
        name, construct, lambda provider: judge.judge(provider, truth), saved, settings, cost
    )  # fmt: skip
