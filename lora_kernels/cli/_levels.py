"""The levels of `bench`: which cases and providers each has, and who runs them."""

from collections.abc import Callable
from typing import Any

from lora_kernels.cli import _baselines, _bench_case, _kernel_case, _model_case
from lora_kernels.cli._bench_case import Settings
from lora_kernels.cli._presets import MODELS, PRESETS, Dims, Shape, sized, with_rows, with_tokens

__all__ = ["LEVELS", "PROVIDERS", "names", "run", "subjects"]

LEVELS = ("layer", "kernel", "decoder", "model")
_OF_LEVEL = {
    "layer": tuple(_baselines.PROVIDERS), "kernel": _kernel_case.PROVIDERS,
    "decoder": _model_case.PROVIDERS, "model": _model_case.PROVIDERS,
}  # fmt: skip
PROVIDERS = tuple(dict.fromkeys(name for names in _OF_LEVEL.values() for name in names))


def subjects(
    level: str, preset: str | None, shapes: list[Shape] | None, rows: list[int] | None, model: str | None = None,
    layers: int | None = None, batch: int | None = None, seq: int | None = None,
) -> list[Shape | Dims]:  # fmt: skip
    """What is timed: shapes of a layer, or models.

    Args:
        level: One of `LEVELS`.
        preset: One of `PRESETS`; None if there are `shapes` or a `model`.
        shapes: In place of a preset's.
        rows: Other numbers of rows, or of tokens.
        model: One of `MODELS`.
        layers: Another number of a model's decoder layers.
        batch: Other sequences at once.
        seq: Another length of theirs.

    Raises:
        ValueError: The level needs a model and there is none, or the rows do not fit one.
    """
    if level in ("layer", "kernel"):
        found = PRESETS[preset].shapes if preset else tuple(shapes or ())
        return list(with_rows(found, rows) if rows else found)
    dims: Dims | None = MODELS[model] if model else PRESETS[preset].model if preset else None
    if dims is None:
        models = ", ".join(name for name, one in PRESETS.items() if one.model)
        raise ValueError(f"--level {level} takes a --preset that is a model: {models}")
    dims = sized(dims, layers, batch, seq)
    return [with_tokens(dims, m) for m in rows] if rows else [dims]


def names(level: str, settings: Settings, r: int) -> list[str]:
    """The providers of a case, in the tables' order.

    Raises:
        ValueError: `settings.only` asks for one that the level does not have.
    """
    unknown = [name for name in settings.only if name not in _OF_LEVEL[level]]
    if unknown:
        raise ValueError(
            f"--providers {' '.join(unknown)}: --level {level} has {', '.join(_OF_LEVEL[level])}"
        )  # fmt: skip
    if level == "layer":
        return settings.names(r)
    if level == "kernel":
        return list(settings.only or _kernel_case.PROVIDERS)
    return list(settings.only) or _model_case.names_for(settings.dtype, settings.compiled)


def run(
    level: str, subject: Shape | Dims, r: int, p: float, settings: Settings, tick: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Run what is to be timed at a level; one case, or one for each launch."""
    if level == "kernel":
        return _kernel_case.run_case(subject, r, p, settings, tick)
    if level == "layer":
        return [_bench_case.run_case(subject, r, p, settings, tick)]
    return [_model_case.run_case(subject, r, p, settings, tick, whole=level == "model")]
