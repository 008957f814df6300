"""Find the modules that read a layer's weight and do not call the layer, so that an adapter has no effect there.

    nn.MultiheadAttention         reads out_proj.weight, always
    nn.TransformerEncoderLayer    reads linear1.weight and linear2.weight in eval mode: its fast path, a fused kernel
    Mamba, DeBERTa, and others    read dt_proj.weight, in_proj.weight, by their source

`readings` looks for `self.<layer>.weight` in the source of a module's forward and of the methods that the forward
uses. `fast_path` sees to the fast path. `called_layers` calls the model and sees which layers are called.
"""

import ast
import contextlib
import functools
import inspect
import textwrap
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from lora_kernels.peft import known

__all__ = [
    "Reading", "call_watched", "called_layers", "grouped", "peft_readings", "readings", "without_effect",
]  # fmt: skip

# What one may ask of a weight without computing by it.
_FACTS = ("dtype", "device", "shape", "ndim", "size", "dim", "numel", "is_meta", "is_cuda", "requires_grad", "layout")
Path = tuple[str, ...]


class Reading(NamedTuple):
    """A module that reads a layer's weight.

    Attributes:
        reader: The class of the module.
        path: The layer's name in the module.
        also_called: Whether another part of the module's forward calls the layer.
    """

    reader: str
    path: str
    also_called: bool

    def __str__(self) -> str:
        if self.also_called:
            return f"{self.reader} reads {self.path}.weight in a part of its forward that does not call the layer"
        return f"{self.reader} reads {self.path}.weight and never calls the layer"


class _Uses(NamedTuple):
    """What the source of a function does with `self`."""

    reads: frozenset[Path]
    calls: frozenset[Path]
    own: frozenset[str]
    inherited: frozenset[str]


def readings(model: nn.Module, layers: Iterable[nn.Module]) -> dict[int, Reading]:
    """Return the readings of those of `layers` whose weights a module of the model reads, by the layers' identity.

    A reading that never calls the layer goes before one that does. Reads by another way than `self.<layer>.weight`, and
    in functions without Python source, are not found.
    """
    wanted, found = {id(layer) for layer in layers}, dict[int, Reading]()
    for module in model.modules():
        near = (below for child in module.children() for below in (child, *child.children()))
        if id(module) in wanted or not any(id(child) in wanted for child in near):
            continue
        reads, calls = _uses(type(module))
        for path in sorted(reads):
            layer = _member(module, path)
            if id(layer) in wanted:
                reading = Reading(type(module).__name__, ".".join(path), path in calls)
                if id(layer) not in found or not reading.also_called:
                    found[id(layer)] = reading
    return found


def peft_readings(model: nn.Module) -> dict[int, Reading]:
    """Return `readings` of a model's PEFT LoRA layers, without those that `lora.MultiheadAttention` merges."""
    layers = [module for module in model.modules() if isinstance(module, known.lora_layer())]
    merged = {id(layer.base_layer.out_proj) for layer in layers if isinstance(layer, known.multihead_attention())}
    return readings(model, (layer for layer in layers if id(layer) not in merged))


def without_effect(names: Mapping[str, nn.Module], found: Mapping[int, Reading], called: Collection[str] = ()) -> str:
    """Return, in words, which of the named layers have adapters without effect; "" if none is known to.

    Args:
        names: The layers by name.
        found: Result of `readings`.
        called: Names of layers that are known to be called.
    """
    groups = grouped({name: layer for name, layer in names.items() if name not in called}, found)
    return "; ".join(
        f"{reading}, so the adapters of {', '.join(group)} have no effect and no gradient"
        + (" there" if reading.also_called else "")
        for reading, group in groups.items()
    )


def grouped(names: Mapping[str, nn.Module], found: Mapping[int, Reading]) -> dict[Reading, list[str]]:
    """Return the names of the layers in `found`, by reading; see `without_effect`."""
    groups: dict[Reading, list[str]] = {}
    for name, layer in names.items():
        if id(layer) in found:
            groups.setdefault(found[id(layer)], []).append(name)
    return groups


def called_layers(
    model: nn.Module, layers: Mapping[str, nn.Module], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> set[str]:
    """Call the model as `call_watched` does, and return the names of the layers that are called."""
    seen: set[str] = set()

    def look(name: str) -> Callable[..., None]:
        return lambda *_, **__: seen.add(name)

    call_watched(model, [(layer, look(name)) for name, layer in layers.items()], args, kwargs)
    return seen


def call_watched(
    model: nn.Module, watched: Iterable[tuple[nn.Module, Callable[..., None]]],
    args: tuple[Any, ...], kwargs: Mapping[str, Any],
) -> None:  # fmt: skip
    """Call the model once, without gradients; the next call draws the same random numbers again.

    Args:
        model: The model.
        watched: Modules of the model, each with a function that gets the arguments of the module's forward at each
            call, before the forward runs. In the meantime the module is as it is without a watch.
        args: Arguments of the call.
        kwargs: Keyword arguments of the call.
    """
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with contextlib.ExitStack() as stack:
        for module, look in watched:
            stack.enter_context(_watched(module, look))
        stack.enter_context(torch.no_grad())
        # A compiler would trace what watches, too.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.random.fork_rng(list(devices), device_type="cuda"))
        model(*args, **kwargs)


@contextlib.contextmanager
def _watched(module: Any, look: Callable[..., None]) -> Iterator[None]:
    # By a forward on the instance, because PyTorch's encoders do not take their fast path where a module has a hook.
    fields, forward = vars(module), module.forward
    before = {"forward": fields["forward"]} if "forward" in fields else {}

    def end() -> None:
        fields.pop("forward", None)
        fields.update(before)

    def noted(*args: Any, **kwargs: Any) -> Any:
        end()
        try:
            look(*args, **kwargs)
            return forward(*args, **kwargs)
        finally:
            fields["forward"] = noted

    fields["forward"] = noted
    try:
        yield
    finally:
        end()


def _member(module: nn.Module, path: Path) -> nn.Module | None:
    found: nn.Module | None = module
    for name in path:
        found = None if found is None else found._modules.get(name)
    return found


def _uses(cls: type[nn.Module]) -> tuple[set[Path], set[Path]]:
    """Return the layers whose weights the forward of a class reads, and the layers that it calls."""
    reads, calls = set[Path](), set[Path]()
    todo, seen = [(cls.__mro__, "forward")], set[tuple[type, str]]()
    while todo:
        line, name = todo.pop()
        place = next((i for i, kind in enumerate(line) if kind is not nn.Module and name in vars(kind)), None)
        if place is None or (line[place], name) in seen:
            continue
        seen.add((line[place], name))
        function = vars(line[place])[name]
        # `fast_path` sees to the reads of this forward; those in a subclass's own forward are read.
        if function is nn.TransformerEncoderLayer.forward:
            continue
        function = getattr(function, "fget", None) or getattr(function, "__func__", None) or function
        # A list or dictionary of the class has neither source nor hash.
        if not callable(function) or not isinstance(function, Hashable):
            continue
        uses = _source_uses(function)
        reads |= uses.reads
        calls |= uses.calls
        todo += [(cls.__mro__, own) for own in uses.own]
        todo += [(line[place + 1 :], own) for own in uses.inherited]
    return reads, calls


@functools.cache
def _source_uses(function: Any) -> _Uses:
    nothing: frozenset[Any] = frozenset()
    try:
        tree: Any = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body[0]
        first = tree.args.args[0].arg
    except (OSError, TypeError, ValueError, SyntaxError, AttributeError, IndexError):
        return _Uses(nothing, nothing, nothing, nothing)
    nodes = list(ast.walk(tree))
    asked = {id(node.value) for node in nodes if isinstance(node, ast.Attribute) and node.attr in _FACTS}
    for node in nodes:
        if isinstance(node, ast.Compare) and all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
            asked |= {id(side) for side in (node.left, *node.comparators)}
    paths = [(node, _path(node, first)) for node in nodes if isinstance(node, ast.Attribute)]
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    return _Uses(
        frozenset(
            path[:-1] for node, path in paths
            if path[1:] and path[-1] == "weight" and isinstance(node.ctx, ast.Load) and id(node) not in asked
        ),
        frozenset(path for node, path in paths if path and id(node) in called),
        frozenset(path[0] for _, path in paths if len(path) == 1),
        frozenset(node.attr for node, _ in paths if _is_super(node.value)),
    )  # fmt: skip


def _path(node: ast.expr, first: str) -> Path:
    """Return ("a", "b") for `self.a.b`, where `first` is the name of self; () for any other expression."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return tuple(reversed(names)) if isinstance(node, ast.Name) and node.id == first else ()


def _is_super(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"
