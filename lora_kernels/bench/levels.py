"""The levels of `bench`: the cases and providers of each level, and the function that runs them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lora_kernels.bench.cases import block as block_case
from lora_kernels.bench.cases import grouped as grouped_case
from lora_kernels.bench.cases import kernel as kernel_case
from lora_kernels.bench.cases import layer as layer_case
from lora_kernels.bench.cases import model as model_case
from lora_kernels.bench.cases.block import BLOCKS
from lora_kernels.bench.cases.layer import Settings
from lora_kernels.bench.providers import block as block_providers
from lora_kernels.bench.providers import grouped as grouped_providers
from lora_kernels.bench.providers import layer as providers
from lora_kernels.bench.providers.layer import of_format
from lora_kernels.measure import presets
from lora_kernels.measure.presets import Dims, ExpertShape, HostedDims, Shape

__all__ = ["LEVELS", "OF_BLOCK", "PROVIDERS", "names", "run", "subjects"]

LEVELS = ("layer", "kernel", "decoder", "model")
# --block's names to levels
OF_BLOCK = {"qkv": "qkv", "mlp": "mlp", "layer": "decoder", "experts": "experts"}
# Number of out_features that the level's --shape needs, if not 1.
_WIDTHS = {"qkv": 3}
_OF_LEVEL = {
    "layer": tuple(providers.PROVIDERS), "kernel": kernel_case.PROVIDERS,
    "decoder": model_case.PROVIDERS, "model": model_case.PROVIDERS,
    **dict.fromkeys(BLOCKS, tuple(block_providers.PROVIDERS)), "experts": tuple(grouped_providers.PROVIDERS),
}  # fmt: skip
PROVIDERS = tuple(dict.fromkeys(name for names in _OF_LEVEL.values() for name in names))


def subjects(
    level: str, preset: str | None, shapes: list[Shape] | None, rows: list[int] | None, model: str | None = None,
    layers: int | None = None, batch: int | None = None, seq: int | None = None,
) -> list[Shape | Dims]:  # fmt: skip
    """List the subjects to time: shapes of a layer or a block, or models.

    Args:
        level: One of `LEVELS`, or "qkv", "mlp" or "experts".
        preset: One of `presets.PRESETS`; None if there are `shapes` or a `model`.
        shapes: Replace the preset's shapes.
        rows: Replace the numbers of rows, or of tokens.
        model: One of `presets.MODELS`.
        layers: Replaces the model's number of decoder layers.
        batch: Replaces the number of sequences in a batch.
        seq: Replaces the length of the sequences.

    Raises:
        ValueError: The level needs a model and has none, the rows do not fit the model, or a shape does not fit the
            level.
    """
    wanted = _WIDTHS.get(level, 1)
    for shape in shapes or ():
        if len(shape.widths) != wanted:
            form = "+".join(["OUT"] * wanted)
            raise ValueError(f"--shape {shape}: here a shape is ROWSxINx{form}, {wanted} of out_features")
    if level == "experts":
        return list(_stacks(preset, bool(shapes), rows))
    if level in ("layer", "kernel"):
        found = presets.PRESETS[preset].shapes if preset else tuple(shapes or ())
        return list(presets.with_rows(found, rows) if rows else found)
    if level in BLOCKS and shapes:
        return list(presets.with_rows(tuple(shapes), rows) if rows else shapes)
    dims: Dims | None = presets.MODELS[model] if model else presets.PRESETS[preset].model if preset else None
    if dims is None:
        models = ", ".join(name for name, one in presets.PRESETS.items() if one.model)
        option = "--block" if level in BLOCKS else "--level"
        raise ValueError(f"{option} {level} takes a --preset that is a model: {models}")
    dims = presets.resize(dims, layers, batch, seq)
    if level in BLOCKS:
        shape = presets.block_shape(dims, level)
        return list(presets.with_rows((shape,), rows)) if rows else [shape]
    return [presets.with_tokens(dims, m) for m in rows] if rows else [dims]


def _stacks(preset: str | None, given: bool, tokens: list[int] | None) -> tuple[ExpertShape, ...]:
    """Return the stacks of a preset's experts, at other numbers of tokens if some are given."""
    stacks = presets.PRESETS[preset].experts if preset else ()
    if given or not stacks:
        having = ", ".join(name for name, one in presets.PRESETS.items() if one.experts)
        raise ValueError(f"--block experts takes a --preset that has experts: {having}")
    if tokens is None:
        return stacks
    return tuple(replace(stack, m=count * stack.top_k) for stack in stacks for count in tokens)


def names(level: str, settings: Settings, r: int, subject: Shape | Dims | None = None) -> list[str]:
    """List the providers of a case, in the tables' order.

    Raises:
        ValueError: `settings.only` has a provider that the level does not have.
    """
    known = of_format(_OF_LEVEL[level], settings.quantise)
    if unknown := [name for name in settings.only if name not in known]:
        option = "--block" if level in (*BLOCKS, "experts") else "--level"
        having = f" --quantise {settings.quantise}" * bool(settings.quantise)
        raise ValueError(f"--providers {' '.join(unknown)}: {option} {level}{having} has {', '.join(known)}")
    if level == "layer":
        return settings.names(r)
    if level == "kernel":
        return list(settings.only or kernel_case.PROVIDERS)
    if level == "experts":
        return list(settings.only) or grouped_providers.names_for(settings.dtype)
    if level in BLOCKS:
        return list(settings.only) or block_providers.names_for(settings.dtype, settings.compiled, settings.quantise)
    hosted = isinstance(subject, HostedDims)
    return list(settings.only) or model_case.names_for(settings.dtype, settings.compiled, hosted)


def run(
    level: str, subject: Shape | Dims, r: int, p: float, settings: Settings, tick: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Run a subject at a level; return one case, or one per launch at level "kernel"."""
    if level == "kernel":
        return kernel_case.run_case(subject, r, p, settings, tick)
    if level == "layer":
        return [layer_case.run_case(subject, r, p, settings, tick)]
    if isinstance(subject, ExpertShape):
        return [grouped_case.run_case(subject, r, settings, tick)]
    if level in BLOCKS:
        return [block_case.run_case(level, subject, r, p, settings, tick)]
    return [model_case.run_case(subject, r, p, settings, tick, whole=level == "model")]
