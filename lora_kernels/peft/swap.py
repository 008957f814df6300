"""Put `LoRALinear` layers into a model, and remove them again, in PEFT's words."""

import copy
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.constants import HALF
from lora_kernels.functional.checks import is_sharded
from lora_kernels.modules import quantized
from lora_kernels.modules.linear import LoRALinear, check_base
from lora_kernels.peft import fast_path, known, readers, tied, trained
from lora_kernels.peft.classes import give_back
from lora_kernels.peft.targets import (
    ALL_LINEAR,
    check_targets,
    is_all_linear,
    lora_layers,
    named_modules,
    no_match_message,
    pattern_value,
    select,
    unwrap,
)  # fmt: skip
from lora_kernels.quantized import layers as quantized_layers

__all__ = ["merge_and_unload", "swap_linear", "swap_named"]


def swap_linear(
    model: nn.Module, target_modules: str | Collection[str], r: int = 8, lora_alpha: float = 8, *,
    lora_dropout: float = 0.0, exclude_modules: str | Collection[str] | None = None,
    modules_to_save: Collection[str] | None = None,
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
    mode as well: its fast path is off as long as the layer is there.

    Args:
        model: The model. Its parameters stop requiring grad, except for existing adapters and modules that an earlier
            call trains; new adapters and `modules_to_save` require grad.
        target_modules: Names, each for the layers with that name or with a name that ends in "." and that name; or a
            regular expression for full names; or "all-linear" for every linear layer except the output embeddings or,
            in a transformers model without these, its `score`, `classifier` or `qa_outputs`, which is fresh in most
            cases and joins `modules_to_save`, as in PEFT with a `task_type`.
        r: Rank.
        lora_alpha: Numerator of the scaling.
        lora_dropout: Drop probability of the adapters' input in training.
        exclude_modules: Names or a regular expression of layers to leave alone.
        modules_to_save: Names of modules to train whole, without adapters in them; `save_adapter` writes them as well.
            As in PEFT, a name stands for every module whose full name ends in it ("head" for `lm_head`, too), and a
            module that shares a tensor with one outside of it gets a copy of its own; a warning says so.
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
        TypeError: `target_modules` or `modules_to_save` are not names, a targeted layer is not exactly an `nn.Linear`,
            its weight is sharded, a module to save is not called or not of floating-point numbers, `example_inputs` are
            not arguments, or a number argument is not a number.
        ValueError: The model has PEFT LoRA layers or is a linear layer itself, nothing is targeted, a name matches no
            layer, a targeted layer has hooks or is wrapped itself, a module to save has adapters in it, or a number is
            out of range.
    """
    known.check_not_peft("swap_linear", model)
    check_targets(model, target_modules)
    modules, whole = dict(named_modules(model)), [] if modules_to_save is None else modules_to_save
    trained.check_names("swap_linear", modules, whole)
    whole = [*whole, *(trained.find_classifier(modules) if is_all_linear(target_modules) else ())]
    names = [n for n in select(model, target_modules, exclude_modules) if not trained.is_left_to_modules(n, whole)]
    if not names:
        apart = f" outside of modules_to_save={whole!r}" if whole else ""
        raise ValueError(no_match_message(model, f"target_modules={target_modules!r}{apart}", target_modules))
    layers = {name: modules[name] for name in names}
    called = None if example_inputs is None else _called(model, layers, example_inputs)
    left_out: dict[str, nn.Module] = {}
    if is_all_linear(target_modules):
        read = readers.readings(unwrap(model), layers.values())
        never = {key for key, reading in read.items() if not reading.also_called}
        left_out = {name: one for name, one in layers.items() if id(one) in never and name not in (called or ())}
        names = [name for name in names if name not in left_out]
        if not names:
            raise ValueError(f"swap_linear: {readers.without_effect(left_out, read)}. There is no other linear layer.")
    found = trained.matching(modules, whole)
    for what, taken in ((f"modules_to_save={whole!r}", found), ("an earlier call", trained.list_kept(modules))):
        trained.check_whole("swap_linear", what, modules, taken, names)
    swap_named(
        model, {name: pattern_value(rank_pattern, name, r) for name in names},
        {name: pattern_value(alpha_pattern, name, lora_alpha) for name in names},
        lora_dropout, use_rslora, autocast_adapter_dtype, found, called,
    )  # fmt: skip
    if left_out:
        text = "; ".join(f"{', '.join(group)}: {reading}" for reading, group in readers.grouped(left_out, read).items())
        warnings.warn(f'swap_linear: "{ALL_LINEAR}" leaves out {text}.', stacklevel=2)
    return names


def swap_named(
    model: nn.Module, ranks: Mapping[str, int], alphas: Mapping[str, float],
    lora_dropout: float, use_rslora: bool, autocast_adapter_dtype: bool, whole: Collection[str] = (),
    called: Collection[str] | None = None,
) -> None:  # fmt: skip
    """Swap the layers with exactly these names as `swap_linear` does, each with its rank and its alpha; train `whole`.

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
    untied = {name: others for name in whole if (others := trained.shared_with(modules, name))}
    _check_places("swap_linear", modules, untied)
    copies = {name: copy.deepcopy(modules[name]) for name in untied}
    if untied:
        pairs = ", ".join(f"{key} is {other}" for others in untied.values() for key, other in others.items())
        warnings.warn(
            f"swap_linear: {pairs} as well. Trained is a copy of {', '.join(untied)}, as in PEFT, tied no longer.",
            stacklevel=3,
        )
    standing = {id(t) for _, layer in lora_layers(model) for t in (layer.lora_A, layer.lora_B)}
    standing |= {id(p) for name in trained.list_kept(modules) for p in modules[name].parameters()}
    for p in model.parameters():
        if id(p) not in standing:
            p.requires_grad_(False)
    # A layer that is in two places stays one layer.
    made: dict[int, LoRALinear] = {}
    for name, r in ranks.items():
        linear = modules[name]
        if id(linear) not in made:
            known_kind = quantized_layers.kind_of(linear)
            base_dtype = linear.weight.dtype if known_kind is None else quantized_layers.read(linear).dtype
            wide = autocast_adapter_dtype and base_dtype in HALF
            dtype = torch.float32 if wide else None
            made[id(linear)] = LoRALinear.from_linear(linear, r, alphas[name], lora_dropout, use_rslora, dtype)
        _replace(modules, name, made[id(linear)])
    for name in whole:
        if name in copies:
            _replace(modules, name, copies[name])
        trained.train(copies.get(name, modules[name]))
    for name, sharers in shared.items():
        made[id(targets[name])].shared_with = sharers
    if shared:
        warnings.warn(
            f"swap_linear: {_sharing(shared)}. Each adapter is its layer's alone, and merging gives the layer a weight "
            "of its own.",
            stacklevel=3,
        )
    fast_path.call_adapted(model)
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
    made: dict[int, nn.Module] = {}
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
    give_back("merge_and_unload", model, fast_path.is_free)
    return model


def _sharing(shared: Mapping[str, Sequence[str]]) -> str:
    texts = (f"{f'{name}.weight'.lstrip('.')} is shared with {', '.join(others)}" for name, others in shared.items())
    return "; ".join(texts)


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
    with fast_path.fast_path_off():
        return readers.called_layers(unwrap(model), layers, args, kwargs)


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


def _plain(layer: LoRALinear) -> nn.Module:
    if layer._shell is not None:
        return quantized.fill(layer)
    linear: Any = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    linear.weight, linear.bias = layer.weight, layer.bias
    return linear.train(layer.training)
