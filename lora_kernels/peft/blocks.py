"""The forward of a block whose layers belong together: one call of `lora_projections` or of `lora_mlp`.

    MLP         the forward is two or three layers and an activation: `lora_mlp` computes all of it
    attention   the block's own forward runs, with a stand-in for the block as `self`. The stand-in equals the block
                except for q_proj, k_proj and v_proj: the first one that forward calls computes all three results, and
                each result is returned once

The stand-in shares the block's `__dict__`, so forward reads and writes the block's attributes. A slot of the stand-in
holds the projections of one call, and each call creates a stand-in. So concurrent calls, calls that end by an exception
and calls repeated by checkpointing do not affect each other, and no result outlives its call.

`layer.projection` decides at each call whether the layers can be computed together. If one cannot, the block's own
forward calls the layers one by one. An attention block also does so under a compiler or a dispatch mode, because
torch.compile cannot trace the stand-in.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from lora_kernels.functional import lora_mlp, lora_projections
from lora_kernels.functional.gate import is_watched
from lora_kernels.passes.layer import Projection
from lora_kernels.peft.layer import bare, projection
from lora_kernels.peft.structure import ATTENTION, FixedModule, Structure, members

__all__ = ["block_forward", "changed_part", "patched_structure"]


def block_forward(
    cls: type[nn.Module], stock: Callable[..., Any], found: Structure, backend: str
) -> Callable[..., Any]:
    """Make a forward that computes the layers of a block together if possible, and otherwise calls `stock`.

    Args:
        cls: The block's class.
        stock: The forward of the class.
        found: The result of `structure` for the block, with an empty reason.
        backend: Backend for `lora_projections` and `lora_mlp`.
    """
    forward: Any = (
        _attention_forward(cls, stock, backend) if found.kind == "attention" else _mlp_forward(stock, found, backend)
    )
    forward._lora_kernels_stock, forward._lora_kernels_structure = stock, found
    return forward


def patched_structure(forward: Callable[..., Any]) -> Structure | None:
    """Return the `Structure` behind a forward of `block_forward`; None for any other forward."""
    return getattr(forward, "_lora_kernels_structure", None)


def changed_part(block: nn.Module, others: Sequence[tuple[str, Any]]) -> str:
    """Return the name of a part of an MLP that has changed or has hooks, or an empty string."""
    fields, modules = block.__dict__, block.__dict__["_modules"]
    for name, was in others:
        module = modules.get(name)
        if module is None:
            same = fields.get(name) is was
        else:
            same = isinstance(was, FixedModule) and bare(module, was.kind) and was.still(module)
        if not same:
            return name
    return ""


def _together(layers: Sequence[nn.Module], x: Tensor) -> list[Projection] | None:
    """Return each layer of a block as a projection; None if a layer has to be called, or no layer has an adapter."""
    found = []
    for layer in layers:
        if (one := projection(layer, x)) is None:
            return None
        found.append(one)
    return found if any(one.lora_A is not None for one in found) else None


def _mlp_forward(stock: Callable[..., Any], found: Structure, backend: str) -> Callable[..., Any]:
    @functools.wraps(stock)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or changed_part(self, found.others):
            return stock(self, *args, **kwargs)
        layers = _together(members(self, found.layers), args[0])
        if layers is None:
            return stock(self, *args)
        *gate, up, down = layers
        return lora_mlp(args[0], gate[0] if gate else None, up, down, activation=found.activation, backend=backend)

    return forward


def _attention_forward(cls: type[nn.Module], stock: Callable[..., Any], backend: str) -> Callable[..., Any]:
    stand_in_class = _stand_in_class(cls)

    @functools.wraps(stock)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if is_watched():
            return stock(self, *args, **kwargs)
        stand_in, call = object.__new__(stand_in_class), _Call(members(self, ATTENTION), backend)
        object.__setattr__(stand_in, "__dict__", self.__dict__)
        object.__setattr__(stand_in, "_lora_kernels_call", call)
        try:
            return stock(stand_in, *args, **kwargs)
        finally:
            call.close()

    return forward


class _Call:
    """One call of an attention block: its projections of one x, from the first to the last that forward calls."""

    __slots__ = ("_backend", "_layers", "_ready", "_version", "_x")
    # None before the first projection; the `_Call` itself when closed.
    _x: Any
    _version: int | None
    _ready: dict[str, Tensor]

    def __init__(self, layers: Sequence[nn.Module], backend: str) -> None:
        self._layers, self._backend = dict(zip(ATTENTION, layers, strict=True)), backend
        self._x, self._version, self._ready = None, None, {}

    def close(self) -> None:
        """Drop all results; from now on each layer is called."""
        self._x, self._ready = self, {}

    def layer(self, name: str) -> nn.Module:
        return self._layers[name]

    def project(self, name: str, x: Tensor) -> Tensor:
        if self._x is None:
            self._x, self._version = x, _version(x)
            projections = _together(list(self._layers.values()), x)
            if projections is not None:
                weights, adapters = [q.weight for q in projections], [_adapter(q) for q in projections]
                ys = lora_projections(
                    x, weights, adapters, biases=[q.bias for q in projections], backend=self._backend,
                    scaling=[q.scaling for q in projections], dropout_p=[q.dropout_p for q in projections],
                )  # fmt: skip
                self._ready = dict(zip(ATTENTION, ys, strict=True))
        same = x is self._x and _version(x) == self._version
        y = self._ready.pop(name, None) if same else None
        return self._layers[name](x) if y is None else y


class _Layer:
    """A stand-in for a projection during a call of its block: returns the joint result, and else acts as the layer."""

    __slots__ = ("_call", "_name")

    def __init__(self, name: str, call: _Call) -> None:
        self._name, self._call = name, call

    # Like a mock, the stand-in reports the class of another object.
    @property  # type: ignore[misc]
    def __class__(self) -> type[nn.Module]:  # type: ignore[override]
        """Return the layer's class, for a forward that uses `isinstance`."""
        return type(self._call.layer(self._name))

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) == 1 and not kwargs:
            return self._call.project(self._name, args[0])
        return self._call.layer(self._name)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call.layer(self._name), name)


def _stand_in_class(cls: type[nn.Module]) -> type[nn.Module]:
    body = {name: property(functools.partial(_looked_up, name)) for name in ATTENTION}
    body |= {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls.__name__, (cls,), body | {"__slots__": ("_lora_kernels_call",)})


def _looked_up(name: str, stand_in: Any) -> _Layer:
    return _Layer(name, stand_in._lora_kernels_call)


def _adapter(q: Projection) -> tuple[Tensor, Tensor] | None:
    # A projection with an A has a B.
    return None if q.lora_A is None else (q.lora_A, q.lora_B)  # type: ignore[return-value]


def _version(x: Tensor) -> int | None:
    """Return the count of in-place writes to x, or None for inference tensors, which do not count."""
    return x._version if isinstance(x, Tensor) and not x.is_inference() else None
