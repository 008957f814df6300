"""Reports of how a model's LoRA layers and blocks are computed: the decisions of `layer` and `blocks`, in words."""

import inspect
import itertools
import math
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lora_kernels.peft import known, readers
from lora_kernels.peft import layer as rules
from lora_kernels.peft.blocks import changed_part, patched_structure
from lora_kernels.peft.forwards import describe, replaced_part, replacement, stock_forward
from lora_kernels.peft.structure import Structure, members, structure

__all__ = ["BLOCK_FORMS", "FORMS", "BlockReport", "LayerReport", "Report", "explain", "report", "stock_reason"]

BLOCK_FORMS = {"joined": "layers that belong together in one call", "per layer": "each layer as it is computed"}
FORMS = {"fused": "base and low-rank in one pass", "low-rank": "the low-rank term alone", "stock": "PEFT's own forward"}
_STATE = {"_disable_adapters", "merged_adapters", "_active_adapter", "lora_variant", "cast_input_dtype_enabled"}
_UNPATCHED = "not patched: call patch_peft(model), again for layers added later"
_PASSED_BY = "not called: the fast path of nn.TransformerEncoderLayer reads its weight; patch_peft switches that off"
_SHARDED = " while the layer is not called; explain(model, inputs) looks inside a call"


@dataclass(frozen=True)
class LayerReport:
    """How one LoRA layer is computed.

    Attributes:
        name: The layer's name in the model.
        kind: The classes of the layer and of its base layer.
        form: "fused", "low-rank" or "stock", see `FORMS`.
        reason: Why the layer is not "fused"; "" if it is.
    """

    name: str
    kind: str
    form: str
    reason: str = ""


@dataclass(frozen=True)
class BlockReport:
    """How the layers of an attention block that share an input, or the layers of an MLP, are computed.

    Attributes:
        name: The block's name in the model.
        kind: "attention" or "mlp".
        form: "joined" or "per layer", see `BLOCK_FORMS`.
        reason: Why the block is not "joined"; "" if it is.
    """

    name: str
    kind: str
    form: str
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """How the LoRA layers of a model are computed; `print` shows a line for each form and reason.

    Attributes:
        layers: Reports of the layers, in the model's order.
        blocks: Reports of the blocks that hold LoRA layers, in the model's order.
    """

    layers: tuple[LayerReport, ...]
    blocks: tuple[BlockReport, ...] = ()

    def count(self, form: str) -> int:
        """Count the layers, or blocks, that are computed in a form."""
        reports: tuple[LayerReport | BlockReport, ...] = (*self.layers, *self.blocks)
        return sum(one.form == form for one in reports)

    def __str__(self) -> str:
        counts = ", ".join(f"{self.count(form)} {form}" for form in FORMS)
        lines = [f"{len(self.layers)} LoRA layers: {counts}"]
        for (form, reason), n in Counter((layer.form, layer.reason) for layer in self.layers if layer.reason).items():
            lines.append(f"  {n} {form}: {reason}")
        if self.blocks:
            counts = ", ".join(f"{self.count(form)} {form}" for form in BLOCK_FORMS)
            lines.append(f"{len(self.blocks)} blocks: {counts}")
        for (kind, reason), n in Counter((block.kind, block.reason) for block in self.blocks if block.reason).items():
            lines.append(f"  {n} {kind} per layer: {reason}")
        return "\n".join(lines)


def report(model: nn.Module) -> Report:
    """Report every LoRA layer of a model in its present state; dtypes and arguments are known only during a call."""
    parts_of_attention = {
        id(module.base_layer.out_proj) for module in model.modules() if isinstance(module, known.multihead_attention())
    }
    layers: dict[int, LayerReport] = {}
    read = readers.peft_readings(model)
    for name, module in model.named_modules():
        if not isinstance(module, known.lora_layer()):
            continue
        reason = stock_reason(module)
        if id(module) in parts_of_attention:
            reason = "lora.MultiheadAttention merges it around the call: its forward is not used"
        elif id(module) in read and not read[id(module)].also_called:
            reason = f"{read[id(module)]}: the adapter has no effect"
        layers[id(module)] = _layer_report(name, module, reason, None)
    return Report(tuple(layers.values()), _block_reports(model, layers))


def explain(model: nn.Module, *args: Any, **kwargs: Any) -> Report:
    """Print a table of a model's LoRA layers and blocks: how each is computed, and the exact reason where not fused.

    Args:
        model: Any module that holds PEFT's LoRA layers, patched or not.
        *args: Arguments for a call of the model, without gradients. The table then describes that call, in which the
            dtypes, autocast and arguments that reached each layer decide as well. The next call draws the same random
            numbers again.
        **kwargs: Keyword arguments for that call.

    Returns:
        The contents of the table as a report.

    Raises:
        ImportError: PEFT is not installed.
        TypeError: `model` is not a module.
    """
    known.check_model("explain", model)
    from rich.table import Column, Table

    from lora_kernels.console import on_stdout

    found = _observe(model, args, kwargs) if args or kwargs else report(model)
    console = on_stdout()
    if not found.layers:
        console.print("The model has no PEFT LoRA layers: get_peft_model(model, LoraConfig(...)) puts them in.")
        return found
    # Fold long names and do not cut them, because only the ends of the names differ.
    first = Column("layer", overflow="fold")
    table = Table(first, "class", "computed", "reason", title=str(found).splitlines()[0], title_justify="left")
    colours = {"fused": "green", "low-rank": "cyan", "stock": "yellow"}
    for layer in found.layers:
        table.add_row(layer.name, layer.kind, f"[{colours[layer.form]}]{layer.form}[/]", layer.reason)
    console.print(table)
    if found.blocks:
        table = Table(Column("block", overflow="fold"), "kind", "computed", "reason")
        for block in found.blocks:
            colour = "green" if block.form == "joined" else "yellow"
            table.add_row(block.name, block.kind, f"[{colour}]{block.form}[/]", block.reason)
        console.print(table)
    return found


def stock_reason(module: nn.Module, x: Tensor | None = None) -> str:
    """Return why PEFT's own forward computes a layer, "" if it does not.

    Args:
        module: A LoRA layer.
        x: The layer's input, to explain a call.
    """
    return _class_reason(module) or _state_reason(module) or _call_reason(module, x)


def _class_reason(module: nn.Module) -> str:
    cls: type = vars(type(module)).get("_lora_kernels_class", type(module))
    if known.is_supported(cls):
        return _forward_reason(module)
    kind = next((kind for kind in known.classes() if kind in cls.__mro__ and not known.is_supported(kind)), None)
    if kind is not None:
        return f"the forward of lora.{kind.__name__} was replaced by {describe(kind.forward)}"
    return f"lora.{cls.__name__} computes something else than x Wᵀ + scaling B A dropout(x)"


def _forward_reason(module: nn.Module) -> str:
    """Return why no patched forward computes a module, "" if one does."""
    cls = type(module)
    # accelerate's device hook sets `forward`, which calls `_old_forward`; its removal leaves the old one in `forward`.
    methods = (vars(module).get(name) for name in ("forward", "_old_forward"))
    own = next((m.__func__ for m in methods if inspect.ismethod(m) and m.__self__ is module), None)
    forward = own if "forward" in vars(module) else cls.forward
    if forward is not None and stock_forward(forward) is not forward:
        other = replacement(forward)
        return f"the forward of its class was replaced by {describe(other)}" if other else ""
    if forward is cls.forward:
        set_on_ours = "_lora_kernels_class" in vars(cls)
        return f"the forward of its class was replaced by {describe(forward)}" if set_on_ours else _UNPATCHED
    return "its forward is replaced on the instance (X-LoRA, or a hook from before)"


def _state_reason(module: Any) -> str:
    if missing := _STATE - vars(module).keys():
        return f"this PEFT keeps its state elsewhere ({', '.join(sorted(missing))})"
    if module.disable_adapters:
        return "adapters are disabled"
    if module.merged:
        return f"merged: {', '.join(module.merged_adapters)}"
    active = [name for name in module.active_adapters if name in module.lora_A]
    if not active:
        return "no active adapter on this layer"
    return next(filter(None, (_adapter_reason(module, name) for name in active)), "")


def _adapter_reason(module: Any, name: str) -> str:
    variant, scaling = module.lora_variant.get(name), module.scaling[name]
    if variant is not None and not rules.is_plain_variant(variant):
        return f"adapter {name!r} is a variant: {type(variant).__name__.removesuffix('LinearVariant')}"
    for part, kinds in (
        ("lora_A", (nn.Linear,)), ("lora_B", (nn.Linear,)), ("lora_dropout", (nn.Identity, nn.Dropout)),
    ):  # fmt: skip
        listened = _not_bare(getattr(module, part)[name], kinds)
        if listened:
            return f"{part}.{name} {listened}"
    for part in ("lora_A", "lora_B"):
        own = getattr(module, part)[name]._parameters
        if type(own.get("weight")) is not nn.Parameter:
            kind = type(getattr(getattr(module, part)[name], "weight", None)).__name__
            return f"{part}.{name}.weight is a {kind}" + _SHARDED * (kind == "DTensor")
        if own["weight"].layout is not torch.strided:
            return f"{part}.{name}.weight has layout {own['weight'].layout}"
        if own.get("bias") is not None:
            return f"lora_bias=True: {part}.{name} has a bias"
    if isinstance(scaling, Tensor) and scaling.dim():
        return f"scaling[{name!r}] is a tensor of shape {tuple(scaling.shape)}, not a number"
    if not isinstance(scaling, (int, float, Tensor)):
        return f"scaling[{name!r}] is a {type(scaling).__name__}, not a number"
    if not isinstance(scaling, Tensor) and not math.isfinite(scaling):
        return f"scaling[{name!r}] is {scaling}, not a finite number"
    return ""


def _call_reason(module: Any, x: Tensor | None) -> str:
    if part := replaced_part():
        return f"the forward of nn.{part.__name__} was replaced by {describe(part.forward)}"
    if rules._has_any_global_hook():
        return "a hook on all modules is registered"
    if rules.is_traced():
        return "inside torch.func, forward-mode AD or torch.jit.trace"
    if x is None:
        return ""
    if type(x) is not Tensor:
        return f"x is a {type(x).__name__}"
    if not rules.is_dense(x):
        return "x is a nested tensor" if x.is_nested else f"x has layout {x.layout}"
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        A, B = module.lora_A[name].weight, module.lora_B[name].weight
        if not rules.dtypes_fit(x, A, B):
            return f"x is {_name(x)}, lora_A.{name} {_name(A)}, lora_B.{name} {_name(B)}"
        if not module.cast_input_dtype_enabled and A.dtype is not x.dtype:
            return f"casting of x ({_name(x)} to {_name(A)}) is disabled"
    return ""


def _base_reason(base: Any, x: Tensor | None, name: str = "the base layer") -> str:
    if listened := _not_bare(base, (nn.Linear,)):
        return f"{name} {listened}"
    like: Any = base.weight if x is None and isinstance(base.weight, Tensor) else x
    if rules.fusable(base, like):
        return ""
    kinds = {type(t).__name__ for t in (base.weight, base.bias) if t is not None and type(t) is not nn.Parameter}
    if kinds:
        return f"{name}'s weight is a {', '.join(sorted(kinds))}"
    layouts = {str(t.layout) for t in (base.weight, base.bias) if t is not None and t.layout is not torch.strided}
    if layouts:
        return f"{name}'s weight has layout {', '.join(sorted(layouts))}"
    return f"x is {_name(like)}, {name}'s weight {_name(base.weight)}"


def _not_bare(module: nn.Module, kinds: tuple[type, ...]) -> str:
    if type(module) not in kinds:
        return f"is a {type(module).__name__}, not a plain nn.{kinds[-1].__name__}"
    if "forward" in vars(module):
        return "has its forward replaced on the instance"
    return "" if rules.bare(module, type(module)) else "has a hook"


def _layer_report(name: str, module: nn.Module, reason: str, x: Tensor | None) -> LayerReport:
    base = getattr(module, "base_layer", None)
    kind = f"{type(module).__name__} over {type(base).__name__}"
    if reason:
        return LayerReport(name, kind, "stock", reason)
    reason = _base_reason(base, x)
    return LayerReport(name, kind, "low-rank" if reason else "fused", reason)


def _block_reports(
    model: nn.Module, layers: Mapping[int, LayerReport], plain: Mapping[int, str] = types.MappingProxyType({})
) -> tuple[BlockReport, ...]:
    """Report how the blocks of a model are computed.

    Args:
        model: The model.
        layers: The reports of its LoRA layers, by identity, because a layer may be in two places.
        plain: Why a layer without an adapter had to be called, as observed in a call; also by identity.
    """
    found = []
    for name, module, block in _blocks(model):
        reason = block.reason or _forward_reason(module)
        if reason == _UNPATCHED and any(
            getattr(type(child), "_lora_kernels_alone", False) for child in members(module, block.layers)
        ):
            reason = "left alone: patch_peft was called with blocks=False"
        if not reason and (part := changed_part(module, block.others)):
            reason = f"{part} has a hook, or is not what it was when the model was patched"
        for own, child in zip(block.layers, members(module, block.layers), strict=True):
            if reason:
                break
            if id(child) in layers:
                reason = _member_reason(own, child, layers[id(child)])
            else:
                reason = plain[id(child)] if id(child) in plain else _base_reason(child, None, own)
        found.append(BlockReport(name, block.kind, "per layer" if reason else "joined", reason))
    return tuple(found)


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, Structure]]:
    """Yield the blocks that hold LoRA layers: name, module, and the structure when patched, or else the present one."""
    for name, module in model.named_modules():
        forward = type(module).forward
        block = patched_structure(forward) or structure(module, stock_forward(forward))
        if block and any(isinstance(child, known.lora_layer()) for child in members(module, block.layers)):
            yield name, module, block


def _member_reason(own: str, layer: Any, found: LayerReport) -> str:
    """Return why a LoRA layer of a block has to be called, "" if it need not be."""
    if found.form != "fused":
        return f"{own} is {found.form}: {found.reason}"
    if listened := _not_bare(layer, (type(layer),)):
        return f"{own} {listened}"
    active = [layer.lora_dropout[name] for name in layer.active_adapters if name in layer.lora_A]
    masks = sum(dropout.training and getattr(dropout, "p", 0) > 0 for dropout in active)
    return f"{own} has {len(active)} active adapters, and dropout" if len(active) > 1 and masks else ""


def _observe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Report:
    """Call the model and inspect each layer as its forward begins, because its parameters are gathered then.

    Arguments that a hook adds to the call, for example PEFT's `adapter_names`, may come later, so these are inspected
    as the forward ends.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, known.lora_layer())}
    # The hooks below would switch the fast path off, so look without them first.
    fast = readers.fast_layers(model, lambda module: isinstance(module, known.lora_layer()))
    passed_by = set(layers) - readers.called_layers(model, layers, args, kwargs) if fast else set()
    plain = {
        id(child): (own, child)
        for _, module, block in _blocks(model)
        for own, child in zip(block.layers, members(module, block.layers), strict=True)
        if not isinstance(child, known.lora_layer())
    }
    seen: dict[str, LayerReport] = {}
    called: dict[int, str] = {}

    def begins(name: str) -> Callable[..., None]:
        def look(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = given[0] if given else named.get("x")
            seen[name] = _layer_report(name, module, stock_reason(module, x), x)

        return look

    def ends(name: str) -> Callable[..., None]:
        def look(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], y: Any) -> None:
            more = (f"argument {i}" for i in range(1, len(given))), (key for key in named if key != "x")
            if seen[name].form != "stock" and (added := ", ".join(itertools.chain(*more))):
                seen[name] = replace(seen[name], form="stock", reason=f"called with {added}")

        return look

    def watch(own: str, module: nn.Module) -> RemovableHandle:
        def look(module: nn.Module, given: tuple[Any, ...]) -> None:
            # This hook must not count as a reason; other hooks do.
            handle.remove()
            called[id(module)] = _base_reason(module, given[0] if given else None, own)

        handle = module.register_forward_pre_hook(look)
        return handle

    handles = [watch(*one) for one in plain.values()] + [
        handle
        for name, module in layers.items()
        for handle in (
            module.register_forward_pre_hook(begins(name), with_kwargs=True),
            module.register_forward_hook(ends(name), with_kwargs=True),
        )
    ]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.no_grad(), torch.random.fork_rng(list(devices), device_type="cuda"):
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    for name in passed_by & seen.keys():
        seen[name] = replace(seen[name], form="stock", reason=_PASSED_BY)
    idle = report(model)
    for module in idle.layers:
        if module.name not in seen:
            seen[module.name] = LayerReport(module.name, module.kind, "stock", module.reason or "not called")
    by_layer = {id(module): seen[name] for name, module in layers.items()}
    return Report(tuple(by_layer.values()), _block_reports(model, by_layer, called))


def _name(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")
