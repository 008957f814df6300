"""Reports of how a model's LoRA layers and blocks are computed, in their present state or in an observed call."""

import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from lora_kernels.functional.gate import is_watched
from lora_kernels.peft import experts, fast_path, known, readers
from lora_kernels.peft.bases import storage
from lora_kernels.peft.blocks import changed_part, patched_structure
from lora_kernels.peft.forwards import class_forward, is_called_plainly, stock_forward
from lora_kernels.peft.reasons import UNPATCHED, base_reason, forward_reason, part_reason, stock_reason
from lora_kernels.peft.structure import Structure, members, structure

__all__ = ["BLOCK_FORMS", "FORMS", "BlockReport", "LayerReport", "Report", "explain", "report"]

BLOCK_FORMS = {"joined": "layers that belong together in one call", "per layer": "each layer as it is computed"}
FORMS = {"fused": "base and low-rank in one pass", "low-rank": "the low-rank term alone", "stock": "PEFT's own forward"}
_EXPERTS = "experts, by groups of rows"
_PASSED_BY = "not called: the fast path of nn.TransformerEncoderLayer reads its weight; patch_peft switches that off"


@dataclass(frozen=True)
class LayerReport:
    """How one LoRA layer is computed.

    Attributes:
        name: The layer's name in the model.
        kind: The classes of the layer and of its base layer.
        form: "fused", "low-rank" or "stock", see `FORMS`.
        reason: Why the layer is not "fused"; "" if it is.
        note: How the weight is read, if the layer is "fused" over a quantised one; else "".
    """

    name: str
    kind: str
    form: str
    reason: str = ""
    note: str = ""


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
        for note, n in Counter(layer.note for layer in self.layers if layer.note).items():
            lines.append(f"  {n} fused ({note})")
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
    read, outermost = readers.peft_readings(model), experts.inner_wrappers(model)
    for name, module in model.named_modules():
        if not isinstance(module, known.lora_layer()):
            continue
        reason = stock_reason(outermost.get(id(module), module))
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
            dtypes, autocast and arguments that reached each layer decide as well. Of a layer that is called several
            times with different outcomes, the table has the slowest form, and all outcomes as the reason. The model is
            called once, and the next call draws the same random numbers again.
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
        form = f"{layer.form} ({layer.note})" if layer.note else layer.form
        table.add_row(layer.name, layer.kind, f"[{colours[layer.form]}]{form}[/]", layer.reason)
    console.print(table)
    if found.blocks:
        table = Table(Column("block", overflow="fold"), "kind", "computed", "reason")
        for block in found.blocks:
            colour = "green" if block.form == "joined" else "yellow"
            table.add_row(block.name, block.kind, f"[{colour}]{block.form}[/]", block.reason)
        console.print(table)
    return found


def _layer_report(name: str, module: nn.Module, reason: str, x: Tensor | None) -> LayerReport:
    base = getattr(module, "base_layer", None)
    kind = f"{type(module).__name__} over {type(base).__name__}"
    if reason:
        return LayerReport(name, kind, "stock", reason)
    if isinstance(module, known.param_wrapper()):
        return LayerReport(name, kind, "fused", "", _note(module))
    reason = base_reason(base, x)
    return (
        LayerReport(name, kind, "low-rank", reason) if reason else LayerReport(name, kind, "fused", "", _note(module))
    )


def _note(module: Any) -> str:
    """Return how a fused layer reads its weight, "" for a plain one."""
    return _EXPERTS if isinstance(module, known.param_wrapper()) else storage(module.base_layer)


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
        # A forward that others have set says more than what it does.
        reason = forward_reason(module)
        if reason in ("", UNPATCHED):
            reason = block.reason or reason
        if reason == UNPATCHED and any(
            getattr(type(child), "_lora_kernels_alone", False) for child in members(module, block.layers)
        ):
            reason = "left alone: patch_peft was called with blocks=False"
        if not reason and block.kind == "attention" and is_watched():
            reason = "inside a compiler or a dispatch mode"
        if not reason and (part := changed_part(module, block.others)):
            reason = f"{part} has a hook, or is not what it was when the model was patched"
        for own, child in zip(block.layers, members(module, block.layers), strict=True):
            if reason:
                break
            if id(child) in layers:
                reason = _member_reason(own, child, layers[id(child)])
            else:
                reason = plain[id(child)] if id(child) in plain else base_reason(child, None, own)
        found.append(BlockReport(name, block.kind, "per layer" if reason else "joined", reason))
    return tuple(found)


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, Structure]]:
    """Yield the blocks that hold LoRA layers: name, module, and the structure when patched, or else the present one."""
    for name, module in model.named_modules():
        forward = class_forward(type(module))
        block = patched_structure(forward) or structure(module, stock_forward(forward))
        if block and any(isinstance(child, known.lora_layer()) for child in members(module, block.layers)):
            yield name, module, block


def _member_reason(own: str, layer: Any, found: LayerReport) -> str:
    """Return why a LoRA layer of a block has to be called, "" if it need not be."""
    if found.form != "fused":
        return f"{own} is {found.form}: {found.reason}"
    if listened := part_reason(layer, (type(layer),)):
        return f"{own} {listened}"
    if not is_called_plainly(type(layer)):
        return f"{own} is called by another __call__ than nn.Module's"
    active = [layer.lora_dropout[name] for name in layer.active_adapters if name in layer.lora_A]
    masks = sum(dropout.training and getattr(dropout, "p", 0) > 0 for dropout in active)
    return f"{own} has {len(active)} active adapters, and dropout" if len(active) > 1 and masks else ""


def _observe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Report:
    """Call the model and inspect each layer at each of its calls, because its parameters are gathered then."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, known.lora_layer())}
    names = {id(module): name for name, module in layers.items()}
    idle = {one.name: one for one in report(model).layers}
    seen: dict[str, list[_Outcome]] = {name: [] for name in layers}
    plain: dict[int, list[_Outcome]] = {}
    passed_by = _Outcome("stock", _PASSED_BY)

    def layer_called(name: str) -> Callable[..., None]:
        def look(*given: Any, **named: Any) -> None:
            x = given[0] if given else named.get("x")
            more = [*(f"argument {i}" for i in range(1, len(given))), *(key for key in named if key != "x")]
            if isinstance(layers[name], known.param_wrapper()):
                found = _layer_report(name, layers[name], stock_reason(layers[name], *given, **named), x)
                seen[name].append(_Outcome(found.form, found.reason))
                return
            found = _layer_report(name, layers[name], stock_reason(layers[name], x), x)
            if found.form != "stock" and more:
                found = replace(found, form="stock", reason=f"called with {', '.join(more)}")
            if passed_by in seen[name][-1:]:
                seen[name].pop()
            seen[name].append(_Outcome(found.form, found.reason))

        return look

    def encoder_layer_called(module: nn.Module) -> Callable[..., None]:
        def look(*_: Any, **__: Any) -> None:
            for child in module.children() if not module.training else ():
                # If the layer is called, its own look takes this back.
                if id(child) in names:
                    seen[names[id(child)]].append(passed_by)

        return look

    def plain_called(own: str, module: nn.Module) -> Callable[..., None]:
        def look(*given: Any, **_: Any) -> None:
            reason = base_reason(module, given[0] if given else None, own)
            plain.setdefault(id(module), []).append(_Outcome("low-rank" if reason else "fused", reason))

        return look

    # The outermost wrapper computes the experts in place of those inside.
    inner = experts.inner_wrappers(model)
    watched = [(module, layer_called(name)) for name, module in layers.items() if id(module) not in inner]
    watched += [(one, encoder_layer_called(one)) for one in fast_path.fast_layers(model)]
    watched += {
        id(child): (child, plain_called(own, child))
        for _, module, block in _blocks(model)
        for own, child in zip(block.layers, members(module, block.layers), strict=True)
        if id(child) not in names
    }.values()
    readers.call_watched(model, watched, args, kwargs)
    for name, module in layers.items():
        if id(module) in inner:
            seen[name] = seen[names[id(inner[id(module)])]]
    for name, one in idle.items():
        outcome = _joined(seen[name]) if seen[name] else _Outcome("stock", one.reason or "not called")
        note = _note(layers[name]) if outcome.form == "fused" else ""
        idle[name] = replace(one, form=outcome.form, reason=outcome.reason, note=note)
    by_layer = {id(module): idle[name] for name, module in layers.items()}
    called = {key: _joined(outcomes).reason for key, outcomes in plain.items()}
    return Report(tuple(by_layer.values()), _block_reports(model, by_layer, called))


class _Outcome(NamedTuple):
    """How one call of a layer is computed."""

    form: str
    reason: str


def _joined(outcomes: Sequence[_Outcome]) -> _Outcome:
    """Return what to report of the calls of a layer: the slowest form, and how often the calls had which outcome."""
    counts, order = Counter(outcomes), list(FORMS)
    form = max((one.form for one in counts), key=order.index)
    if len(counts) == 1:
        return outcomes[0]
    texts = (
        f"{one.form} " * (one.form != form) + f"in {n} of {len(outcomes)} calls" + f": {one.reason}" * bool(one.reason)
        for one, n in sorted(counts.items(), key=lambda item: -order.index(item[0].form))
    )
    return _Outcome(form, "; ".join(texts))
