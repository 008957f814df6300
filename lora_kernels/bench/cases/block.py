"""`bench --block qkv` and `--block mlp`: time projections of one x, or a gated MLP, beside their alternatives."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_kernels.bench.cases import layer as layer_case
from lora_kernels.bench.cases.layer import SCALING, Settings, saved_bytes
from lora_kernels.bench.cost import block as block_cost
from lora_kernels.bench.cost.block import BlockSize
from lora_kernels.bench.providers import block as block_providers
from lora_kernels.dropout import drop_probability
from lora_kernels.measure.presets import MLP, QKV, Shape
from lora_kernels.passes.layer import Projection
from lora_kernels.verify import judge
from lora_kernels.verify.block_problems import BlockProblem, quantised
from lora_kernels.verify.provider import Provider

__all__ = ["BLOCKS", "admit", "clone", "cost_of", "draw", "run_case"]

BLOCKS = ("qkv", "mlp")


def draw(block: str, shape: Shape, r: int, p: float, settings: Settings) -> BlockProblem:
    """Draw a block in which every term matters, on the device; `p` is rounded to 1/65536, as the kernels round it."""
    generator = torch.Generator(settings.device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, generator=generator, device=settings.device).mul_(scale).to(settings.dtype)

    def layer(k: int, n: int) -> Projection:
        weight, a = normal(n, k, scale=k**-0.5), normal(r, k, scale=k**-0.5)
        return Projection(weight, a, normal(n, r, scale=r**-0.5), None, SCALING, drop_probability(p))

    m, k, n = shape.m, shape.k, shape.n
    if block == "mlp":
        layers = dict(zip(MLP, (layer(k, n), layer(k, n), layer(n, k)), strict=True))
        problem = BlockProblem(normal(m, k), layers, (normal(m, k),), "silu")
        return quantised(problem, settings.quantise) if settings.quantise else problem
    layers = dict(zip(QKV, (layer(k, width) for width in shape.widths), strict=True))
    problem = BlockProblem(normal(m, k), layers, tuple(normal(m, width) for width in shape.widths))
    return quantised(problem, settings.quantise) if settings.quantise else problem


def clone(problem: BlockProblem) -> BlockProblem:
    """Copy the problem to memory of its own."""
    layers = {
        name: q._replace(weight=q.weight.clone(), lora_A=q.lora_A.clone(), lora_B=q.lora_B.clone())
        for name, q in problem.layers.items()
    }
    stored, dys = layer_case.clone_stored(problem), tuple(dy.clone() for dy in problem.dys)
    return replace(problem, x=problem.x.clone(), layers=layers, dys=dys, stored=stored)


def run_case(
    block: str, shape: Shape, r: int, p: float, settings: Settings, tick: Callable[[str], None] = lambda doing: None,
    build: Callable[[str, BlockProblem, str], Provider] = block_providers.build,
) -> dict[str, Any]:  # fmt: skip
    """Check every provider on a block of `BLOCKS`, measure its memory and time it; return plain data.

    Args:
        block: "qkv" or "mlp".
        shape: Shape of the block.
        r: Rank.
        p: Drop probability.
        settings: The run's settings.
        tick: Called with a description of each step.
        build: Builds a provider from its name, a problem and a backend.
    """
    layer_case.forget_compiled(settings)
    problem, truth = draw(block, shape, r, p, settings), judge.Truth()
    copies = layer_case.copies_of(problem, clone, settings)
    rows = layer_case.run_all(
        list(settings.only) or block_providers.names_for(settings.dtype, settings.compiled, settings.quantise),
        lambda name: admit(name, lambda: build(name, problem, settings.backend), truth, r, settings),
        lambda name: [build(name, copy, settings.backend) for copy in copies[1:]], truth.forget, settings, tick,
    )  # fmt: skip
    cost = cost_of(problem, r)
    base, work = (block_cost.flops(cost, rank) for rank in (0, r))
    layer_case.compare(rows, base, work, settings)
    return {
        "level": block, "copies": len(copies),
        "shape": {"m": shape.m, "k": shape.k, "n": shape.n, "label": shape.label, "others": list(shape.others)},
        "r": r, "p": p, "dtype": str(settings.dtype).removeprefix("torch."), "quantise": settings.quantise,
        "flops": dict(zip(("forward", "backward"), work, strict=True)),
        "floor_bytes": layer_case.with_stored(block_cost.COSTS["floor"](cost, p > 0), "", problem).total,
        "providers": rows,
    }  # fmt: skip


def cost_of(problem: BlockProblem, r: int) -> BlockSize:
    """Return the sizes of a block's layers for `cost.block`, with adapters of rank `r`."""
    (m, k), element = problem.x.shape, problem.x.element_size()
    first, adapted = next(iter(problem.layers.values())), problem.adapted_layers
    adapter = next(iter(adapted.values())).lora_A.element_size() if adapted else 0
    if problem.activation:
        return block_cost.mlp(m, k, first.weight.shape[0], r, element, adapter)
    widths = tuple(q.weight.shape[0] for q in problem.layers.values())
    return block_cost.projections(m, k, widths, r, element, adapter)


def admit(
    name: str, construct: Callable[[], Provider], truth: judge.Truth, r: int, settings: Settings
) -> tuple[dict[str, Any], Provider | None]:
    """Build, judge and weigh a provider.

    Args:
        name: The provider's name, shown if the provider cannot be built.
        construct: Builds the provider.
        truth: Cache of the problem's exact outputs, shared by all providers.
        r: Rank.
        settings: The run's settings.

    Returns:
        The provider's row, and the provider itself if it may be timed.
    """

    def cost(provider: Provider) -> block_cost.Cost | None:
        dropout = any(q.dropout_p for q in provider.problem.adapted_layers.values())
        if not provider.cost:
            return None
        moved = block_cost.COSTS[provider.cost](cost_of(provider.problem, r), dropout)
        return layer_case.with_stored(moved, provider.cost, provider.problem)

    return layer_case.examine(
        name, construct, lambda provider: judge.judge(provider, truth), saved_bytes, settings, cost
    )
