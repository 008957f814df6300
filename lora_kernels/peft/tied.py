"""Find weights that a layer shares with other parameters of the model, as a tied output head with the embedding."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["shared_weights", "untie_config"]


class _Place(NamedTuple):
    """A parameter or buffer of a module, and the bytes of the storage that it takes."""

    module: int
    name: str
    start: int
    end: int


def shared_weights(modules: Mapping[str, nn.Module], names: Mapping[str, nn.Module]) -> dict[str, tuple[str, ...]]:
    """Return, for each named layer whose weight is shared, the names of the parameters that share memory with it.

    Args:
        modules: All modules of the model by name. A module in two places shares nothing with itself.
        names: The layers in question by name.
    """
    places: dict[Any, list[_Place]] = {}
    for name, module in modules.items():
        for own, t in (*module._parameters.items(), *module._buffers.items()):
            if t is not None:
                places.setdefault(_memory(t), []).append(_Place(id(module), f"{name}.{own}".lstrip("."), *_span(t)))
    return {name: found for name, layer in names.items() if (found := tuple(_sharers(places, layer)))}


def untie_config(model: nn.Module, layer: nn.Module) -> list[str]:
    """Set `tie_word_embeddings` of transformers' configurations to False where `layer` is the model's output head.

    Otherwise `tie_weights`, which loading calls, would put the embedding's weight back. Return the models' classes.
    """
    found = []
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "tie_word_embeddings", False) is True and _output_head(module) is layer:
            config.tie_word_embeddings = False
            found.append(type(module).__name__)
    return found


def _output_head(module: Any) -> Any:
    try:
        return module.get_output_embeddings()
    except (AttributeError, NotImplementedError, TypeError):
        return None


def _sharers(places: Mapping[Any, list[_Place]], layer: Any) -> Iterator[str]:
    start, end = _span(layer.weight)
    for place in places.get(_memory(layer.weight), ()):
        if place.module != id(layer) and place.start < end and start < place.end:
            yield place.name


def _memory(t: Tensor) -> Any:
    """Return what is equal for tensors of one storage; the tensor's identity if it has no memory that can be asked."""
    if type(t) in (Tensor, nn.Parameter, nn.Buffer) and t.layout is torch.strided and not t.is_meta:
        place = t.untyped_storage().data_ptr()
        return (t.device, place) if place else id(t)
    return id(t)


def _span(t: Tensor) -> tuple[int, int]:
    """Return the first byte of a tensor in its storage, and the first one after it."""
    if type(_memory(t)) is int:
        return 0, 1
    start = int(t.storage_offset())
    last = sum((int(n) - 1) * int(step) for n, step in zip(t.shape, t.stride(), strict=True)) if t.numel() else -1
    return start * t.itemsize, (start + last + 1) * t.itemsize
