"""The activations of a gated MLP in plain PyTorch, and the operands of the adapter gradients in their backward pass.

    h  = a(g) · u,  du = dh · a(g),  dg = dh · u · a'(g)          a is silu, gelu, gelu_tanh or relu2

Each result is computed in fp32 at least and rounded once. The kernels have their own versions in
`lora_kernels.kernels._activation`.

Sources: Shazeer 2020, arXiv:2002.05202 (SwiGLU, GEGLU); So et al. 2021, arXiv:2109.08668 (squared ReLU).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "After", "Before", "activated", "gradients", "known_name"]


class After(NamedTuple):
    """The operands of dA of the layer after an activation: ds `[M, r]`, the dtype of dA, the mask of h or None.

    `into` is a gradient to which dA is added, or None. A dA that was added is not returned.
    """

    ds: Tensor
    out_dtype: torch.dtype
    keep: Tensor | None
    into: Tensor | None = None


class Before(NamedTuple):
    """The operands of ds and dB of a layer before an activation: s `[M, r]` and B `[W, r]`.

    `s` is None for no dB, and `lora_B` is None for no ds. `into` serves dB as in `After` it serves dA.
    """

    s: Tensor | None
    lora_B: Tensor | None
    alpha: float
    out_dtype: torch.dtype
    into: Tensor | None = None


class _Activation(NamedTuple):
    value: Callable[[Tensor], Tensor]
    # The arguments are the gradient of the value and g.
    gradient: Callable[[Tensor, Tensor], Tensor]


_gelu_backward = torch.ops.aten.gelu_backward
_ACTIVATIONS = {
    "silu": _Activation(F.silu, torch.ops.aten.silu_backward),
    "gelu": _Activation(F.gelu, _gelu_backward),
    "gelu_tanh": _Activation(
        lambda g: F.gelu(g, approximate="tanh"), lambda dy, g: _gelu_backward(dy, g, approximate="tanh")
    ),
    "relu2": _Activation(lambda g: F.relu(g).square(), lambda dy, g: dy * F.relu(g) * 2),
}
ACTIVATIONS = tuple(_ACTIVATIONS)
# Names and classes in transformers, in lower case.
_OTHER_NAMES = {
    "swish": "silu", "gelu_python": "gelu", "geluactivation": "gelu", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh", "gelutanh": "gelu_tanh", "gelu_new": "gelu_tanh", "newgeluactivation": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "fastgeluactivation": "gelu_tanh", "gelu_accurate": "gelu_tanh",
    "accurategeluactivation": "gelu_tanh", "relusquaredactivation": "relu2",
}  # fmt: skip


def known_name(activation: object) -> str:
    """Return the name in `ACTIVATIONS` of another name, a function or a module; "" if the activation is unknown."""
    # `approximate` is an attribute of nn.GELU, or an argument of a partial of F.gelu.
    approximate = getattr(activation, "approximate", "none")
    if isinstance(activation, functools.partial):
        approximate, activation = activation.keywords.get("approximate", "none"), activation.func
    name = activation if isinstance(activation, str) else getattr(activation, "__name__", type(activation).__name__)
    name = "gelu_tanh" if approximate == "tanh" else name
    name = _OTHER_NAMES.get(name.lower(), name.lower())
    return name if name in ACTIVATIONS else ""


def activated(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """Compute h = a(gate) · up, or a(gate) without `up`, in the dtype of `gate`; differentiable."""
    h = _ACTIVATIONS[activation].value(_wide(gate))
    return (h if up is None else h * _wide(up)).to(gate.dtype)


def gradients(
    gate: Tensor, up: Tensor | None, dh: Tensor, activation: str
) -> tuple[Tensor, tuple[Tensor] | tuple[Tensor, Tensor]]:
    """Compute h and dg, and with `up` also du, each rounded once to the dtype of `gate`."""
    act, dtype = _ACTIVATIONS[activation], gate.dtype
    gate, dh = _wide(gate), _wide(dh)
    value = act.value(gate)
    if up is None:
        return value.to(dtype), (act.gradient(dh, gate).to(dtype),)
    up = _wide(up)
    return (value * up).to(dtype), (act.gradient(dh * up, gate).to(dtype), value.mul_(dh).to(dtype))


def _wide(t: Tensor) -> Tensor:
    return t.float() if t.itemsize == 2 else t
