"""Unsloth's order of calls over a quantised base, written from its description (unsloth/kernels/fast_lora.py).

    forward     W dequantised; y = x Wᵀ; y += scaling · (x Aᵀ) Bᵀ                     layer by layer, s not kept
    backward    dA = scaling · (dy B)ᵀ x, dB = scaling · dyᵀ (x Aᵀ); W dequantised again; dx += dy W;
                dx += scaling · (dy B) A                                               x Aᵀ and dy B computed twice

The gated MLP keeps g and u; a launch computes h = silu(g) · u, and one in backward h again, dg and du. There is no
dropout: Unsloth leaves layers with dropout to PEFT.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_kernels.bench.providers.quantised import dequantiser
from lora_kernels.passes.layer import Projection
from lora_kernels.verify.block_problems import BlockProblem, leaves_of
from lora_kernels.verify.numerics import Problem
from lora_kernels.verify.provider import Provider

__all__ = ["LABEL", "build_block", "build_layer"]

LABEL = "Unsloth's order of calls"
# A function that makes W, and scaling.
_Frozen = tuple[Callable[[], Tensor], float]


def build_layer(problem: Problem, backend: str) -> Provider:
    """Build the provider of a layer without bias."""
    _refuse(problem.dropout_p)
    leaves = {
        name: t.detach().requires_grad_()
        for name, t in (("dx", problem.x), ("d_lora_A", problem.lora_A), ("d_lora_B", problem.lora_B))
    }
    frozen = [(dequantiser(problem.kept_weight, problem.x.dtype), problem.scaling)]
    return Provider(LABEL, problem, lambda: _Projections.apply(frozen, *leaves.values()), leaves, cost="unsloth")


def build_block(problem: BlockProblem, backend: str) -> Provider:
    """Build the provider of projections of one x, or of a gated MLP, all with adapters."""
    for q in problem.layers.values():
        _refuse(q.dropout_p)
    if problem.activation not in ("", "silu"):
        raise ValueError(f"{LABEL}: the activation is {problem.activation}, here only silu is written")
    leaves = leaves_of(problem)
    frozen = [_frozen(q, problem.x.dtype) for q in problem.kept_layers.values()]

    def forward() -> tuple[Tensor, ...]:
        ys = (_MLP if problem.activation else _Projections).apply(frozen, *leaves.values())
        return ys if isinstance(ys, tuple) else (ys,)

    # The formula has one launch for each activation, which PyTorch's operators have not.
    counted = problem.x.is_cuda or not problem.activation
    return Provider(LABEL, problem, forward, leaves, cost="unsloth" if counted else "")


def _refuse(dropout_p: float) -> None:
    if dropout_p:
        raise ValueError(f"{LABEL}: it has no dropout")


def _frozen(q: Projection, dtype: torch.dtype) -> _Frozen:
    return dequantiser(q.weight, dtype), q.scaling


class _Projections(torch.autograd.Function):
    """y of each layer of x; the adapters follow x as A, B of each."""

    @staticmethod
    def forward(ctx: Any, frozen: Sequence[_Frozen], x: Tensor, *adapters: Tensor) -> Any:
        ctx.frozen = frozen
        ctx.save_for_backward(x, *adapters)
        ys = tuple(_layer(x, *one) for one in zip(frozen, adapters[::2], adapters[1::2], strict=True))
        return ys if len(ys) > 1 else ys[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, *adapters = ctx.saved_tensors
        layers = list(zip(dys, ctx.frozen, adapters[::2], adapters[1::2], strict=True))
        found = [_gradients(x, *layer) for layer in layers]
        dx = None
        for layer in layers:
            dx = _into_dx(dx, *layer)
        return None, dx, *(t for pair in found for t in pair)


class _MLP(torch.autograd.Function):
    """y = down(silu(gate(x)) · up(x)); the adapters follow x as A, B of gate, up and down."""

    @staticmethod
    def forward(ctx: Any, frozen: Sequence[_Frozen], x: Tensor, *adapters: Tensor) -> Tensor:
        gate, up, down = zip(frozen, adapters[::2], adapters[1::2], strict=True)
        g, u = _layer(x, *gate), _layer(x, *up)
        ctx.frozen = frozen
        ctx.save_for_backward(x, g, u, *adapters)
        return _layer(_kernel(_product)(g, u), *down)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, g, u, *adapters = ctx.saved_tensors
        gate, up, down = zip(ctx.frozen, adapters[::2], adapters[1::2], strict=True)
        h, dg, du = _kernel(_product_backward)(_into_dx(None, dy, *down), g, u)
        found = _gradients(x, dg, *gate), _gradients(x, du, *up), _gradients(h, dy, *down)
        dx = _into_dx(_into_dx(None, du, *up), dg, *gate)
        return None, dx, *(t for pair in found for t in pair)


def _layer(x: Tensor, frozen: _Frozen, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    dequantise, scaling = frozen
    y = x @ dequantise().t()
    return y.addmm_(x @ lora_A.t(), lora_B.t(), alpha=scaling)


def _gradients(x: Tensor, dy: Tensor, frozen: _Frozen, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return dA and dB."""
    return _scaled((dy @ lora_B).t(), x, frozen[1]), _scaled(dy.t(), x @ lora_A.t(), frozen[1])


def _into_dx(dx: Tensor | None, dy: Tensor, frozen: _Frozen, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """Return dx with the part of one layer added to it."""
    dequantise, scaling = frozen
    dx = dy @ dequantise() if dx is None else dx.addmm_(dy, dequantise())
    return dx.addmm_(dy @ lora_B, lora_A, alpha=scaling)


def _scaled(left: Tensor, right: Tensor, alpha: float) -> Tensor:
    # beta=0: the first operand is not read
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=alpha)


def _product(g: Tensor, u: Tensor) -> Tensor:
    return F.silu(g) * u


def _product_backward(dh: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return h, dg and du."""
    share = torch.sigmoid(g)
    value = g * share
    return value * u, dh * u * (share + value * (1 - share)), dh * value


def _kernel(of: Callable[..., Any]) -> Callable[..., Any]:
    """Return one launch on a GPU, and PyTorch's operators elsewhere."""

    def call(*tensors: Tensor) -> Any:
        return (_compiled(of) if tensors[0].is_cuda else of)(*tensors)

    return call


@functools.cache
def _compiled(of: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(of, dynamic=True)
