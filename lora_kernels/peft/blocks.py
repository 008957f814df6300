"""The forward of a block whose layers belong together: one call of `lora_projections` or of `lora_mlp`.

    MLP         the forward is two or three layers and an activation: `lora_mlp` computes all of it
    attention   the block's own forward runs. At its calls of `self.q_proj`, `self.k_proj` and `self.v_proj` it finds a
                function in the layer's place: the first of these calls computes all three results, and each result is
                returned once

Those three instructions of the forward's code call the function at once, and every other reader (attention functions,
caches, hooks, the rest of forward) gets the model's own layer. The results belong to one call of one thread. So
concurrent calls, calls that end by an exception and calls repeated by checkpointing do not affect each other, and no
result outlives its call.

Each call begins with the question whether the class still has the forward that was recognised; if not, the forward in
force runs. `layer.projection` then decides whether the layers can be computed together. If one cannot, the block's own
forward calls the layers one by one. An attention block also does so under a compiler or a dispatch mode, because
torch.compile cannot trace the search for the reader.
"""

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.functional import lora_mlp, lora_projections
from lora_kernels.functional.gate import is_watched
from lora_kernels.passes.layer import Projection
from lora_kernels.peft.bases import bare
from lora_kernels.peft.forwards import call_replacement, is_ours, replacement
from lora_kernels.peft.layer import projection
from lora_kernels.peft.names import Names
from lora_kernels.peft.structure import ATTENTION, FixedMember, FixedModule, Structure, call_sites, members

__all__ = ["block_forward", "block_members", "changed_part", "patched_structure"]


def block_forward(stock: Callable[..., Any], found: Structure, backend: str) -> Callable[..., Any]:
    """Make a forward that computes the layers of a block together if possible, and otherwise calls the one in force.

    The class of the block must have the members of `block_members`.

    Args:
        stock: The forward of the block's class.
        found: The result of `structure` for the block, with an empty reason.
        backend: Backend for `lora_projections` and `lora_mlp`.
    """
    together: Any = _attention_forward if found.kind == "attention" else _mlp_forward
    compute = together(stock, found, backend)

    @functools.wraps(stock)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if (other := replacement(forward)) is not None:
            called, y = call_replacement(other, forward, self, *args, **kwargs)
            if called:
                return y
        return compute(self, *args, **kwargs)

    forward._lora_kernels_structure = found  # type: ignore[attr-defined]
    return forward


def block_members(found: Structure) -> dict[str, property]:
    """Return the members of a patched block's class by which its forward gets joint results."""
    return {name: _layer_or_result(name) for name in found.layers if found.kind == "attention"}


def patched_structure(forward: Callable[..., Any]) -> Structure | None:
    """Return the `Structure` behind a forward of `block_forward`; None for any other forward."""
    return getattr(forward, "_lora_kernels_structure", None) if is_ours(forward) else None


def changed_part(block: nn.Module, others: Sequence[tuple[str, Any]]) -> str:
    """Return the name of a part of an MLP that has changed or has hooks, or an empty string."""
    fields, modules = block.__dict__, block.__dict__["_modules"]
    for name, was in others:
        module = modules.get(name)
        if module is not None:
            same = isinstance(was, FixedModule) and bare(module, was.kind) and was.still(module)
        elif isinstance(was, Names):
            same = was.still()
        elif isinstance(was, FixedMember):
            same = name not in fields and getattr(type(block), name, None) is was.value
        else:
            same = fields.get(name) is was
        if not same:
            return name
    return ""


def _together(layers: Sequence[nn.Module], x: Tensor) -> tuple[list[Projection], torch.dtype | None] | None:
    """Return each layer of a block as a projection, and the dtype of `base_of` that all have.

    None if a layer has to be called, no layer has an adapter, or the layers compute in several dtypes.
    """
    found, dtypes = [], set()
    for layer in layers:
        if (one := projection(layer, x)) is None:
            return None
        found.append(one[0])
        dtypes.add(one[1])
    # Beside quantised layers a plain one fits if they all compute in x's dtype.
    if len(dtypes) > 1:
        if dtypes - {None, x.dtype}:
            return None
        dtypes.discard(None)
    return (found, dtypes.pop()) if any(one.lora_A is not None for one in found) else None


def _mlp_forward(stock: Callable[..., Any], found: Structure, backend: str) -> Callable[..., Any]:
    # The name of x, by which callers may pass it.
    name = list(inspect.signature(stock).parameters)[1]

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = args or ((kwargs[name],) if name in kwargs else ())
        if len(args) + len(kwargs) != 1 or not given or changed_part(self, found.others):
            return stock(self, *args, **kwargs)
        layers = _together(members(self, found.layers), given[0])
        if layers is None:
            return stock(self, *args, **kwargs)
        (*gate, up, down), dtype = layers
        x = given[0] if dtype is None else given[0].to(dtype)
        y = lora_mlp(x, gate[0] if gate else None, up, down, activation=found.activation, backend=backend)
        # Quantised layers return x's dtype, inside autocast as well.
        return y if dtype is None else y.to(given[0].dtype)

    return forward


def _attention_forward(stock: Callable[..., Any], found: Structure, backend: str) -> Callable[..., Any]:
    code, sites = call_sites(stock)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if is_watched():
            return stock(self, *args, **kwargs)
        calls, call = _running.calls, _Call(self, code, sites, backend)
        calls.append(call)
        try:
            return stock(self, *args, **kwargs)
        finally:
            calls.pop()
            call.close()

    return forward


class _Running(threading.local):
    """The calls of attention blocks that this thread is in, the innermost last."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []


_running = _Running()


class _Call:
    """One call of an attention block: its projections of one x, from the first to the last that forward calls."""

    __slots__ = ("_backend", "_ready", "_version", "_x", "block", "code", "sites")
    # None before the first projection; the `_Call` itself when closed.
    _x: Any
    _version: int | None
    _ready: dict[str, Tensor]

    def __init__(self, block: nn.Module, code: CodeType, sites: frozenset[int], backend: str) -> None:
        self.block, self.code, self.sites, self._backend = block, code, sites, backend
        self._x, self._version, self._ready = None, None, {}

    def close(self) -> None:
        """Drop all results; from now on each layer is called."""
        self._x, self._ready = self, {}

    def waits_for(self, name: str) -> bool:
        """Return whether a call of a layer would get a joint result."""
        return self._x is None or name in self._ready

    def project(self, name: str, x: Tensor) -> Tensor:
        """Return the result of a layer: the joint one, or that of the layer's own call."""
        if self._x is None:
            self._x, self._version = x, _version(x)
            found = _together(members(self.block, ATTENTION), x)
            if found is not None:
                projections, dtype = found
                weights, adapters = [q.weight for q in projections], [_adapter(q) for q in projections]
                wide = x if dtype is None else x.to(dtype)
                ys: Sequence[Tensor] = lora_projections(
                    wide, weights, adapters, biases=[q.bias for q in projections], backend=self._backend,
                    scaling=[q.scaling for q in projections], dropout_p=[q.dropout_p for q in projections],
                )  # fmt: skip
                ys = ys if dtype is None else [y.to(x.dtype) for y in ys]
                self._ready = dict(zip(ATTENTION, ys, strict=True))
        y = self._ready.pop(name, None)
        if y is None or x is not self._x or _version(x) != self._version:
            return self.block.__dict__["_modules"][name](x)
        return y


def _layer_or_result(name: str) -> property:
    """Return a property that is a layer of a block; at the forward's call of the layer, a function in its place."""

    def look_up(block: nn.Module) -> Any:
        # A compiler cannot trace the state of a thread, and calls the layers one by one.
        if not torch.compiler.is_compiling():
            calls = _running.calls
            if calls and (call := calls[-1]).block is block and call.waits_for(name):
                reader = sys._getframe(1)
                if reader.f_code is call.code and reader.f_lasti in call.sites:
                    return functools.partial(call.project, name)
        try:
            return block.__dict__["_modules"][name]
        except KeyError:
            # nn.Module then says what is missing.
            raise AttributeError(name) from None

    return property(look_up)


def _adapter(q: Projection) -> tuple[Tensor, Tensor] | None:
    # A projection with an A has a B.
    return None if q.lora_A is None else (q.lora_A, q.lora_B)  # type: ignore[return-value]


def _version(x: Tensor) -> int | None:
    """Return the count of in-place writes to x, or None for inference tensors, which do not count."""
    return x._version if isinstance(x, Tensor) and not x.is_inference() else None
