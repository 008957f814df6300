"""The providers of `bench --block`: this package's block, and its alternatives.

A provider takes a `BlockProblem` and supplies a forward; autograd derives the backward. All providers read the same
tensors.
"""

import importlib
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels import plan
from lora_kernels.bench.providers import unsloth
from lora_kernels.bench.providers.layer import addmm_chain, chain_label, of_format, short, under_compile
from lora_kernels.bench.providers.quantised import dequantiser, linear4bit
from lora_kernels.functional import lora_linear, lora_mlp, lora_qkv
from lora_kernels.verify.block_problems import BlockProblem, compose, leaves_of
from lora_kernels.verify.provider import Provider, Rounding

__all__ = ["PROVIDERS", "build", "names_for"]


def build(name: str, problem: BlockProblem, backend: str = "auto") -> Provider:
    """Build a provider of `PROVIDERS`; raises if this machine cannot run it."""
    return PROVIDERS[name](problem, backend)


def names_for(dtype: torch.dtype, compiled: bool, quantise: str = "") -> list[str]:
    """List the providers that apply: no fp32-adapter rows where x is fp32."""
    names = [name for name in of_format(tuple(PROVIDERS), quantise) if compiled or "compiled" not in name]
    return names if dtype.itemsize == 2 else [name for name in names if "fp32" not in name]


def _frozen_block(problem: BlockProblem, backend: str) -> Provider:
    label = "frozen dense block" if problem.stored else "frozen block"
    problem = replace(problem.without_adapters(), stored={})
    leaves = leaves_of(problem)

    def forward() -> tuple[Tensor, ...]:
        return compose(problem, leaves["dx"], lambda name, x: F.linear(x, problem.layers[name].weight))

    return Provider(label, problem, forward, leaves, cost="frozen")


def _backend(problem: BlockProblem, backend: str) -> str:
    return plan.choose(problem.x.device, problem.x.dtype, problem.rank, False, backend)


def _tag(problem: BlockProblem, chosen: str) -> str:
    """Format the backend, and the adapters' dtype if it differs from x's."""
    dtype = next(iter(problem.layers.values())).lora_A.dtype
    return f"[{chosen}]" + ("" if dtype == problem.x.dtype else f" {short(dtype)}")


def _ours(problem: BlockProblem, backend: str) -> Provider:
    chosen, leaves = _backend(problem, backend), leaves_of(problem)
    layers = {
        name: q._replace(lora_A=leaves[f"dA {name}"], lora_B=leaves[f"dB {name}"])
        for name, q in problem.kept_layers.items()
    }
    weights = [q.weight for q in layers.values()]
    numbers = {what: [getattr(q, what) for q in layers.values()] for what in ("scaling", "dropout_p")}

    def qkv() -> tuple[Tensor, ...]:
        adapters = [(q.lora_A, q.lora_B) for q in layers.values()]
        return lora_qkv(leaves["dx"], weights, adapters, **numbers, backend=chosen)

    def mlp() -> tuple[Tensor, ...]:
        return (lora_mlp(leaves["dx"], *layers.values(), activation=problem.activation, backend=chosen),)

    fused = _is_fused(problem, chosen)
    return Provider(
        f"lora_kernels {_tag(problem, chosen)}", problem, mlp if problem.activation else qkv, leaves,
        Rounding.KERNELS if fused else Rounding.OPERATORS, "ours" if fused else "",
    )  # fmt: skip


def _is_fused(problem: BlockProblem, backend: str) -> bool:
    """Check that every large product shares one accumulator with its low-rank part."""
    x, rank = problem.x, problem.rank
    masked = any(q.dropout_p for q in problem.layers.values())
    widths = [q.weight.shape[0] for q in problem.layers.values()]
    forms = set()
    if problem.activation:
        *widths, out = widths
        forms |= {
            plan.expander(backend, None, x, widths[0], out, rank).name,
            plan.expander(backend, None, x, out, widths[0], rank, masked, backward=True).name,
        }
    cols, inner = sum(widths), x.shape[1]
    forms |= {
        plan.expander(backend, None, x, inner, cols, rank, alone=False).name,
        plan.expander(backend, None, x, cols, inner, rank, masked, True, len(widths), alone=False).name,
    }
    return forms == {"fused"}


def _per_layer(problem: BlockProblem, backend: str) -> Provider:
    chosen, leaves, layers = _backend(problem, backend), leaves_of(problem), problem.kept_layers

    def apply(name: str, x: Tensor) -> Tensor:
        q = layers[name]
        return lora_linear(
            x, q.weight, leaves[f"dA {name}"], leaves[f"dB {name}"], scaling=q.scaling, dropout_p=q.dropout_p,
            backend=chosen,
        )  # fmt: skip

    label = f"lora_linear alone {_tag(problem, chosen)}"
    return Provider(label, problem, lambda: compose(problem, leaves["dx"], apply), leaves, cost=chosen)


def _peft(problem: BlockProblem, backend: str) -> Provider:
    """Build PEFT's own layers through PEFT; without PEFT installed, build its arithmetic."""
    leaves, dtype = leaves_of(problem), next(iter(problem.layers.values())).lora_A.dtype
    try:
        model, words = _build_peft_module(problem, leaves), "PEFT over bitsandbytes" if problem.stored else "PEFT"
    except ImportError:
        if problem.stored:
            raise
        model, words = None, "PEFT arithmetic"

    def arithmetic(name: str, x: Tensor) -> Tensor:
        q, a, b = problem.layers[name], leaves[f"dA {name}"], leaves[f"dB {name}"]
        wide = x.to(a.dtype)
        low_rank = F.linear(F.linear(F.dropout(wide, q.dropout_p) if q.dropout_p else wide, a), b)
        y = F.linear(x, q.weight)
        return (y + low_rank * q.scaling).to(y.dtype)

    apply = arithmetic if model is None else (lambda name, x: getattr(model, name)(x))
    return Provider(
        f"{words} {short(dtype)}", problem, lambda: compose(problem, leaves["dx"], apply), leaves, cost="peft"
    )


def _addmm(problem: BlockProblem, backend: str) -> Provider:
    """Build the in-place addmm chain, layer by layer."""
    leaves = leaves_of(problem)
    make = {name: dequantiser(q.weight, problem.x.dtype) for name, q in problem.kept_layers.items()}

    def apply(name: str, x: Tensor) -> Tensor:
        q = problem.layers[name]
        return addmm_chain(x, make[name], leaves[f"dA {name}"], leaves[f"dB {name}"], q.bias, q.scaling, q.dropout_p)

    label = chain_label(bool(problem.stored))
    return Provider(label, problem, lambda: compose(problem, leaves["dx"], apply), leaves, cost="addmm")


def _build_peft_module(problem: BlockProblem, leaves: dict[str, Tensor]) -> nn.Module:
    """Build a module with one PEFT layer for each layer of the block; its adapters become the leaves."""
    peft = importlib.import_module("peft")
    model = nn.Module()
    model.is_loaded_in_4bit = bool(problem.stored)
    for name, q in problem.layers.items():
        if name in problem.stored:
            linear = linear4bit(problem.stored[name])
        else:
            n, k = q.weight.shape
            linear = nn.Linear(k, n, bias=False, device="meta")
            linear.weight = nn.Parameter(q.weight, requires_grad=False)
        setattr(model, name, linear)
    q = next(iter(problem.layers.values()))
    config = peft.LoraConfig(
        r=problem.rank, lora_alpha=q.scaling * problem.rank, lora_dropout=q.dropout_p,
        target_modules=list(problem.layers), init_lora_weights=False,
    )  # fmt: skip
    model = peft.inject_adapter_in_model(config, model).train()
    for name in problem.layers:
        for which in "AB":
            module = getattr(getattr(model, name), f"lora_{which}")["default"]
            module.weight = leaves[f"d{which} {name}"] = nn.Parameter(leaves[f"d{which} {name}"].detach())
    return model


def _fp32(problem: BlockProblem) -> BlockProblem:
    return problem.with_adapters_in(torch.float32)


PROVIDERS: dict[str, Callable[[BlockProblem, str], Provider]] = {
    "frozen": _frozen_block,
    "ours": _ours,
    "ours_fp32": lambda problem, backend: _ours(_fp32(problem), backend),
    "per_layer": _per_layer,
    "peft": _peft,
    "peft_fp32": lambda problem, backend: _peft(_fp32(problem), backend),
    "peft_compiled": lambda problem, backend: under_compile(_peft(problem, backend)),
    "peft_fp32_compiled": lambda problem, backend: under_compile(_peft(_fp32(problem), backend)),
    "addmm": _addmm,
    "unsloth": unsloth.build_block,
}
