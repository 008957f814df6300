"""Activations of a gated MLP and their gradients on a tile, in fp32, between the load of the tile and its dot.

    h  = a(g) · u                                 rounded once, to the dtype of g and u
    du = dh · a(g),  dg = dh · u · a'(g)

    a            a(g)                                   a'(g)
    silu         g σ(g)                                 σ(g) (1 + g (1 - σ(g)))
    gelu         g Φ(g)                                 Φ(g) + g φ(g)
    gelu_tanh    g σ(2z), z = √(2/π)(g + 0.044715 g³)   σ(2z) (1 + g (1 - σ(2z)) 2z')
    relu2        max(g, 0)²                             2 max(g, 0)

σ is the logistic function, Φ and φ the normal distribution and its density. Without u, h = a(g).

Sources: Hendrycks and Gimpel 2016, arXiv:1606.08415 (GELU and its approximation, (1 + tanh z)/2 = σ(2z)); Shazeer 2020,
arXiv:2002.05202 (gated forms); So et al. 2021, arXiv:2109.08668 (squared ReLU).
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Activation", "activated", "activation_gradient"]

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
_TWO_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
_CUBIC = tl.constexpr(0.044715)


class Activation(NamedTuple):
    """The operands of an activation besides g, and the outputs for dg and du: all `[M, W]`, dg and du contiguous."""

    name: str
    up: Tensor | None
    dh: Tensor
    dgate: Tensor
    dup: Tensor | None


@triton.jit
def _value_and_slope(g, ACTIVATION: tl.constexpr):
    """Compute a(g) and a'(g) of an fp32 tile."""
    if ACTIVATION == "relu2":
        positive = tl.maximum(g, 0.0)
        return positive * positive, 2 * positive
    elif ACTIVATION == "gelu":
        share = 0.5 * (1 + tl.erf(g * _SQRT_HALF))
        return g * share, share + g * _INV_SQRT_2PI * tl.exp(-0.5 * g * g)
    elif ACTIVATION == "gelu_tanh":
        share = tl.sigmoid(g * (g * g * _CUBIC + 1) * _TWO_SQRT_2_OVER_PI)
        return g * share, share * (1 + g * (1 - share) * (g * g * (3 * _CUBIC) + 1) * _TWO_SQRT_2_OVER_PI)
    else:
        tl.static_assert(ACTIVATION == "silu")
        share = tl.sigmoid(g)
        return g * share, share * (1 + g * (1 - share))


@triton.jit
def activated(gate, up, ACTIVATION: tl.constexpr):
    """Compute h of a tile, in the dtype of `gate`."""
    h, _ = _value_and_slope(gate.to(tl.float32), ACTIVATION)
    if up is not None:
        h = h * up.to(tl.float32)
    return h.to(gate.dtype)


@triton.jit
def activation_gradient(gate, up, dh, ACTIVATION: tl.constexpr):
    """Compute h, dg and du of a tile, in the dtype of `gate`; without `up` the third result is h instead of du."""
    value, slope = _value_and_slope(gate.to(tl.float32), ACTIVATION)
    dh = dh.to(tl.float32)
    if up is None:
        h = value.to(gate.dtype)
        return h, (dh * slope).to(gate.dtype), h
    else:
        up = up.to(tl.float32)
        return (value * up).to(gate.dtype), (dh * up * slope).to(gate.dtype), (dh * value).to(gate.dtype)
