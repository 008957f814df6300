"""The forward of a block whose layers belong together: one call of `lora_projections`, or of `lora_mlp`, for them.

    MLP         its forward is two or three layers and an activation: `lora_mlp` is all of it
    attention   its own forward runs, with a stand-in for the block as `self`. That is the block in all but q_proj,
                k_proj and v_proj, which are looked up in the call: the first that is called computes all, each is
                handed out once

The stand-in shares the block's `__dict__`, so what forward reads and writes is the block's. It holds the projections
for one call, in a slot, and is made anew for each: calls that run at a time, end by an exception or are run again by
checkpointing know nothing of each other, and nothing outlives its call.

Whether the layers can be computed together is read from them at each call, by `layer.projection`. Where one cannot, the
block's own forward calls them one by one. So it does in attention where a compiler or a dispatch mode is at work:
torch.compile cannot follow the stand-in.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from lora_kernels.functional import lora_mlp, lora_projections
from lora_kernels.functional.gate import watched
from lora_kernels.passes.layer import Projection
from lora_kernels.peft.layer import bare, projection
from lora_kernels.peft.structure import ATTENTION, Part, Structure, members

__all__ = ["block_forward", "changed", "patched_structure"]


def block_forward(
    cls: type[nn.Module], stock: Callable[..., Any], found: Structure, backend: str
) -> Callable[..., Any]:
    """A forward that computes the layers of a block together where it can, and is `stock` where it cannot.

    Args:
        cls: The block's class.
        stock: Its forward.
        found: What `structure` sees in it, with no reason against it.
        backend: For `lora_projections` and `lora_mlp`.
    """
    forward: Any = (
        _attention_forward(cls, stock, backend) if found.kind == "attention" else _mlp_forward(stock, found, backend)
    )
    forward._lora_kernels_stock, forward._lora_kernels_structure = stock, found
    return forward


def patched_structure(forward: Callable[..., Any]) -> Structure | None:
    """What `block_forward` was given; None for any other forward."""
    return getattr(forward, "_lora_kernels_structure", None)


def changed(block: nn.Module, others: Sequence[tuple[str, Any]]) -> str:
    """The name of a part of an MLP that is not what it was, or that is listened to; "" if there is none."""
    fields, modules = block.__dict__, block.__dict__["_modules"]
    for name, was in others:
        module = modules.get(name)
        if module is None:
            same = fields.get(name) is was
        else:
            same = isinstance(was, Part) and bare(module, was.kind) and was.still(module)
        if not same:
            return name
    return ""


def _together(layers: Sequence[nn.Module], x: Tensor) -> list[Projection] | None:
    """Each layer of a block as a projection; None if one has to be called, or none has an adapter."""
    found = []
    for layer in layers:
        if (one := projection(layer, x)) is None:
            return None
        found.append(one)
    return found if any(one.lora_A is not None for one in found) else None


def _mlp_forward(stock: Callable[..., Any], found: Structure, backend: str) -> Callable[..., Any]:
    @functools.wraps(stock)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or changed(self, found.others):
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
        if watched():
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
    """One call of an attention block: its projections of one x, from the first that is asked for to the last."""

    __slots__ = ("_backend", "_layers", "_ready", "_version", "_x")
    _x: Any  # None before the first, the call itself when it is closed
    _version: int | None
    _ready: dict[str, Tensor]

    def __init__(self, layers: Sequence[nn.Module], backend: str) -> None:
        self._layers, self._backend = dict(zip(ATTENTION, layers, strict=True)), backend
        self._x, self._version, self._ready = None, None, {}

    def close(self) -> None:
        """Forget everything; from here on each layer is called."""
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
    """What stands in for a projection during a call of its block: called, it asks the call; else it is the layer."""

    __slots__ = ("_call", "_name")

    def __init__(self, name: str, call: _Call) -> None:
        self._name, self._call = name, call

    # of the class of another, as mocks are
    @property  # type: ignore[misc]
    def __class__(self) -> type[nn.Module]:  # type: ignore[override]
        """The layer's, for a forward that asks with `isinstance`."""
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
    # where there is an A there is a B
    return None if q.lora_A is None else (q.lora_A, q.lora_B)  # type: ignore[return-value]


def _version(x: Tensor) -> int | None:
    """How often x was written to; inference tensors do not count."""
    return x._version if isinstance(x, Tensor) and not x.is_inference() else None
