"""Put `LoRALinear` layers into a model, and remove them again, in PEFT's words."""

import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lora_kernels.constants import HALF
from lora_kernels.functional.checks import is_sharded
from lora_kernels.modules.linear import LoRALinear, check_base
from lora_kernels.peft import known, readers, tied

__all__ = [
    "lora_layers", "merge_and_unload", "named_modules", "pattern_value", "select", "swap_linear", "swap_named",
]  # fmt: skip

_ALL_LINEAR = "all-linear"
# The attributes in which wrappers keep their module.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def swap_linear(
    model: nn.Module, target_modules: str | Collection[str], r: int = 8, lora_alpha: float = 8, *,
    lora_dropout: float = 0.0, exclude_modules: str | Collection[str] | None = None,
    rank_pattern: Mapping[str, int] | None = None, alpha_pattern: Mapping[str, float] | None = None,
    use_rslora: bool = False, autocast_adapter_dtype: bool = True,
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any] | None = None,
) -> list[str]:  # fmt: skip
    """Freeze a model and replace each targeted linear layer with a `LoRALinear`, in place.

    The arguments have the same meaning as in PEFT's `LoraConfig`; weights are shared, not copied. A `UserWarning` names
    a layer whose weight another layer has as well, such as an output head that is tied to the embedding: the adapter is
    the layer's alone, and merging gives the layer a weight of its own.

    An adapter has an effect only where its layer is called. A `UserWarning` names the layers whose weights their module
    reads by its source, without a call (`nn.MultiheadAttention` and `out_proj`, Mamba and `dt_proj`); "all-linear"
    leaves out those that are never called. An `nn.TransformerEncoderLayer` with a `LoRALinear` inside calls it in eval
    mode as well: its fast path is off until `merge_and_unload`.

    Args:
        model: The model. Its parameters stop requiring grad, except for existing adapters; new adapters require grad.
        target_modules: Names, each for the layers with that name or with a name that ends in "." and that name; or a
            regular expression for full names; or "all-linear" for every linear layer except the output embeddings.
        r: Rank.
        lora_alpha: Numerator of the scaling.
        lora_dropout: Drop probability of the adapters' input in training.
        exclude_modules: Names or a regular expression of layers to leave alone.
        rank_pattern: Ranks that differ from `r`, by name or regular expression of the end of a name.
        alpha_pattern: Values that differ from `lora_alpha`, in the same way.
        use_rslora: Scale by 1/√r instead of 1/r.
        autocast_adapter_dtype: Whether adapters over a float16 or bfloat16 weight are float32, as in PEFT; otherwise
            adapters have the weight's dtype.
        example_inputs: Arguments of one call of the model: a tensor, a sequence of positional arguments, or a mapping
            of keyword arguments. The model is called once before it is changed, without gradients, and a `UserWarning`
            names the targeted layers that this call does not call.

    Returns:
        The names of the layers that were swapped.

    Raises:
        TypeError: `target_modules` are not names, a targeted layer is not exactly an `nn.Linear`, its weight is
            sharded, `example_inputs` are not arguments, or a number argument is not a number.
        ValueError: The model has PEFT LoRA layers or is a linear layer itself, nothing is targeted, a name matches no
            layer, a targeted layer has hooks or is wrapped itself, or a number is out of range.
    """
    known.check_not_peft("swap_linear", model)
    _check_targets(model, target_modules)
    names = select(model, target_modules, exclude_modules)
    if not names:
        raise ValueError(_no_match(model, f"target_modules={target_modules!r}", target_modules))
    layers = {name: module for name, module in named_modules(model) if name in names}
    called = None if example_inputs is None else _called(model, layers, example_inputs)
    left_out: dict[str, nn.Module] = {}
    if _is_all_linear(target_modules):
        read = readers.readings(unwrap(model), layers.values())
        never = {key for key, reading in read.items() if not reading.also_called}
        left_out = {name: one for name, one in layers.items() if id(one) in never and name not in (called or ())}
        names = [name for name in names if name not in left_out]
        if not names:
            raise ValueError(f"swap_linear: {readers.without_effect(left_out, read)}. There is no other linear layer.")
    swap_named(
        model, {name: pattern_value(rank_pattern, name, r) for name in names},
        {name: pattern_value(alpha_pattern, name, lora_alpha) for name in names},
        lora_dropout, use_rslora, autocast_adapter_dtype, called,
    )  # fmt: skip
    if left_out:
        text = "; ".join(f"{', '.join(group)}: {reading}" for reading, group in readers.grouped(left_out, read).items())
        warnings.warn(f'swap_linear: "{_ALL_LINEAR}" leaves out {text}.', stacklevel=2)
    return names


def swap_named(
    model: nn.Module, ranks: Mapping[str, int], alphas: Mapping[str, float],
    lora_dropout: float, use_rslora: bool, autocast_adapter_dtype: bool, called: Collection[str] | None = None,
) -> None:  # fmt: skip
    """Swap the layers with exactly these names as `swap_linear` does, each with its rank and its alpha.

    `called` has the names of the layers that a call of the model calls, None if no call was observed.

    Raises:
        TypeError: A layer is not exactly an `nn.Linear`, its weight is sharded, or a number argument is not a number.
        ValueError: A layer has hooks or is wrapped itself, or a number is out of range.
    """
    modules: dict[str, Any] = dict(named_modules(model))
    _check_places("swap_linear", modules, ranks)
    targets = {name: modules[name] for name in ranks}
    read = readers.readings(unwrap(model), targets.values())
    shared = tied.shared_weights(modules, targets)
    for name, r in ranks.items():
        linear = modules[name]
        # Refuse wrong numbers before anything is changed.
        LoRALinear(1, 1, r, alphas[name], lora_dropout, device="meta")
        way_out = f"; leave it out with exclude_modules=[{name!r}]"
        if id(linear) in read:
            way_out = f". {read[id(linear)]}, so an adapter would have no effect{way_out}"
        check_base(linear, f"swap_linear: {name}", way_out)
        if is_sharded(linear.weight):
            raise TypeError(
                f"swap_linear: {name}.weight is a DTensor, and nothing would gather or reduce adapters beside it. "
                "Put the adapters in first and shard the model after that."
            )
    standing = {id(t) for _, layer in lora_layers(model) for t in (layer.lora_A, layer.lora_B)}
    for p in model.parameters():
        if id(p) not in standing:
            p.requires_grad_(False)
    # A layer that is in two places stays one layer.
    made: dict[int, LoRALinear] = {}
    for name, r in ranks.items():
        linear = modules[name]
        if id(linear) not in made:
            wide = autocast_adapter_dtype and linear.weight.dtype in HALF
            dtype = torch.float32 if wide else None
            made[id(linear)] = LoRALinear.from_linear(linear, r, alphas[name], lora_dropout, use_rslora, dtype)
        _replace(modules, name, made[id(linear)])
    for name, others in shared.items():
        made[id(targets[name])].shared_with = others
    if shared:
        warnings.warn(
            f"swap_linear: {_sharing(shared)}. Each adapter is its layer's alone, and merging gives the layer a weight "
            "of its own.",
            stacklevel=3,
        )
    readers.call_adapted(model, _is_lora)
    lost = readers.without_effect(targets, read, called or ())
    silent = [name for name in targets if called is not None and name not in called and id(targets[name]) not in read]
    if silent:
        lost = f"{lost}; " * bool(lost) + f"with example_inputs the model does not call {', '.join(silent)}"
    if lost:
        warnings.warn(f"swap_linear: {lost}. Leave them out with exclude_modules.", stacklevel=3)


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Add every adapter to its weight and put plain linear layers back, in place.

    W += scaling · B A, computed in fp32 and rounded once; the weights are written in place. A weight that is shared
    with another module, such as an output head that is tied to the embedding, is copied first, and a `UserWarning`
    names it: the two are no longer tied, and `config.tie_word_embeddings` of a transformers model is False from then
    on.

    Args:
        model: A model with `LoRALinear` layers, or a `LoRALinear`.

    Returns:
        The model; a plain `nn.Linear` if `model` is a layer itself.

    Raises:
        TypeError: A layer is sharded, by `fully_shard` or a style of `lora_kernels.parallel`.
        ValueError: The model has no `LoRALinear` layers, or a layer is wrapped itself.
    """
    modules, layers = dict(named_modules(model)), lora_layers(model)
    if not layers:
        raise ValueError("merge_and_unload: the model has no LoRALinear layers; PEFT models have their own method.")
    for name, layer in layers:
        if is_sharded(layer.weight):
            raise TypeError(
                f"merge_and_unload: {f'{name}.weight'.lstrip('.')} is a DTensor; a plain layer cannot compute with it. "
                "Call merge() of each layer, which stays what it is; or gather the model's state dict, load it into a "
                "model that is not sharded, and take the layers out of that."
            )
    _check_places("merge_and_unload", modules, [name for name, _ in layers])
    shared = tied.shared_weights(modules, dict(layers))
    made: dict[int, nn.Linear] = {}
    for name, layer in layers:
        layer.shared_with = shared.get(name, layer.shared_with)
        if layer.shared_with:
            shared[name] = layer.shared_with
        if id(layer) not in made:
            layer._merge()
            made[id(layer)] = _plain(layer)
        if name:
            _replace(modules, name, made[id(layer)])
    if shared:
        untied = [
            kind for name, layer in layers if name in shared for kind in tied.untie_config(model, made[id(layer)])
        ]
        also = f" {', '.join(untied)}.config.tie_word_embeddings is False now." if untied else ""
        warnings.warn(
            f"merge_and_unload: {_sharing(shared)}; these layers have merged copies of their own and are no longer "
            f"tied.{also}",
            stacklevel=2,
        )
    if not layers[0][0]:
        return made[id(layers[0][1])]
    readers.allow_fast_path(model, _is_lora)
    return model


def lora_layers(model: nn.Module) -> list[tuple[str, LoRALinear]]:
    """List every `LoRALinear` of a model by name, in order; a shared layer is listed under each of its names."""
    return [(name, module) for name, module in named_modules(model) if isinstance(module, LoRALinear)]


def named_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield every module of a model by name, with modules and names as if nothing were wrapped; see `unwrap`."""
    model = unwrap(model)
    yield prefix, model
    for own, child in model._modules.items():
        if child is not None:
            yield from named_modules(child, f"{prefix}.{own}".lstrip("."))


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module inside torch.compile, activation checkpointing, FSDP1, DataParallel and DDP wrappers."""
    names = _WRAPPED + ("module",) * isinstance(module, (DataParallel, DistributedDataParallel))
    inner = next((module._modules[name] for name in names if name in module._modules), None)
    return module if inner is None else unwrap(inner)


def select(
    model: nn.Module, target_modules: str | Collection[str], exclude_modules: str | Collection[str] | None = None,
    layers_to_transform: int | Sequence[int] | None = None, layers_pattern: str | Sequence[str] | None = None,
) -> list[str]:  # fmt: skip
    """Return the names of the linear layers (`nn.Linear` or `LoRALinear`) that PEFT would target; see `swap_linear`."""
    linears = _linears(model)
    if _is_all_linear(target_modules):
        embeddings = getattr(unwrap(model), "get_output_embeddings", lambda: None)()
        chosen = [n for n, module in linears.items() if embeddings is None or module is not unwrap(embeddings)]
    else:
        chosen = [name for name in linears if _matches(target_modules, name)]
    if exclude_modules:
        chosen = [name for name in chosen if not _matches(exclude_modules, name)]
    if layers_to_transform is None or layers_to_transform == []:
        return chosen
    wanted = [layers_to_transform] if isinstance(layers_to_transform, int) else layers_to_transform
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
    # As in PEFT, take the first number after one of these names; without patterns, after a name inside another module.
    places = rf"(?:^|.*?\.)(?:{'|'.join(patterns)})\.(\d+)\." if patterns else r".*?\.[^.]*\.(\d+)\."
    return [name for name in chosen if (found := re.match(places, name)) and int(found[1]) in wanted]


def pattern_value(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """Return the value of the first key that matches the end of a name after a dot, as in PEFT; else the default."""
    return next((value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", name)), default)


def _sharing(shared: Mapping[str, Sequence[str]]) -> str:
    texts = (f"{f'{name}.weight'.lstrip('.')} is shared with {', '.join(others)}" for name, others in shared.items())
    return "; ".join(texts)


def _is_all_linear(target_modules: object) -> bool:
    return isinstance(target_modules, str) and target_modules.lower() == _ALL_LINEAR


def _is_lora(module: nn.Module) -> bool:
    return isinstance(module, LoRALinear)


def _called(model: nn.Module, layers: Mapping[str, nn.Module], example_inputs: object) -> set[str]:
    """Call the model with `example_inputs` and return the names of the layers that are called."""
    if isinstance(example_inputs, Mapping):
        args, kwargs = (), example_inputs
    elif isinstance(example_inputs, (Tensor, list, tuple)):
        args, kwargs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs), {}
    else:
        raise TypeError(
            "swap_linear: example_inputs must be a tensor, a tuple of positional arguments or a mapping of keyword "
            f"arguments, got {type(example_inputs).__name__}."
        )
    with readers.fast_path_off():
        return readers.called_layers(unwrap(model), layers, args, kwargs)


def _matches(target: str | Collection[str], name: str) -> bool:
    if isinstance(target, str):
        return re.fullmatch(target, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in target)


def _check_targets(model: nn.Module, target_modules: object) -> None:
    """Refuse arguments that cannot target layers of a model, and names that match none of its linear layers."""
    if hasattr(target_modules, "target_modules"):
        raise TypeError(
            f"swap_linear: target_modules is a {type(target_modules).__name__}. Pass its fields: swap_linear(model, "
            "config.target_modules, r=config.r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout)."
        )
    if isinstance(target_modules, str):
        return
    if not isinstance(target_modules, Collection) or not all(isinstance(end, str) for end in target_modules):
        raise TypeError(
            f'swap_linear: target_modules must be names, a regular expression or "{_ALL_LINEAR}", '
            f"got {target_modules!r}."
        )
    linears = _linears(model)
    strangers = [end for end in target_modules if not any(_matches([end], name) for name in linears)]
    if strangers:
        raise ValueError(_no_match(model, f"{', '.join(map(repr, strangers))} of target_modules", *strangers))


def _no_match(model: nn.Module, what: str, *targets: object) -> str:
    """Return the message for `targets`, described by `what`, that match no linear layer."""
    if isinstance(unwrap(model), nn.Linear):
        return "swap_linear: the model is a linear layer itself; use LoRALinear.from_linear(layer, r=...)."
    meant = any(re.sub("[-_ ]", "", str(target)).lower() == "alllinear" for target in targets)
    hint = f' For all of them pass target_modules="{_ALL_LINEAR}".' if meant else ""
    ends = sorted({name.rpartition(".")[2] for name in _linears(model)})
    return (
        f"swap_linear: no linear layer of {type(model).__name__} matches {what}. "
        f"Its linear layers end in: {', '.join(ends) or 'none'}.{hint}"
    )


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    named = named_modules(model)
    return {name: module for name, module in named if name and isinstance(module, (nn.Linear, LoRALinear))}


def _check_places(call: str, modules: Mapping[str, nn.Module], names: Iterable[str]) -> None:
    for name in names:
        parent, _, own = name.rpartition(".")
        wrapper = getattr(modules[parent], own) if name else modules[name]
        # torch.compile, for example, keeps calling the module that it was given.
        if wrapper is not modules[name]:
            kind = type(wrapper).__name__
            raise ValueError(f"{call}: {name} is wrapped by {kind}. Take that off; wrap the new layer after that.")


def _replace(modules: Mapping[str, nn.Module], name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(modules[parent], own, module)


def _plain(layer: LoRALinear) -> nn.Linear:
    linear: Any = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    linear.weight, linear.bias = layer.weight, layer.bias
    return linear.train(layer.training)
