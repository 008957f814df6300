"""Put `LoRALinear` layers into a model, and remove them again, in PEFT's words."""

import copy
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lora_kernels.constants import HALF
from lora_kernels.functional.checks import is_sharded
from lora_kernels.modules.linear import LoRALinear, check_base
from lora_kernels.peft import known, trained

__all__ = [
    "lora_layers", "merge_and_unload", "named_modules", "pattern_value", "select", "swap_linear", "swap_named",
]  # fmt: skip

_ALL_LINEAR = "all-linear"
# The attributes in which wrappers keep their module.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def swap_linear(
    model: nn.Module, target_modules: str | Collection[str], r: int = 8, lora_alpha: float = 8, *,
    lora_dropout: float = 0.0, exclude_modules: str | Collection[str] | None = None,
    modules_to_save: Collection[str] | None = None,
    rank_pattern: Mapping[str, int] | None = None, alpha_pattern: Mapping[str, float] | None = None,
    use_rslora: bool = False, autocast_adapter_dtype: bool = True,
) -> list[str]:  # fmt: skip
    """Freeze a model and replace each targeted linear layer with a `LoRALinear`, in place.

    The arguments have the same meaning as in PEFT's `LoraConfig`; weights are shared, not copied.

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

    Returns:
        The names of the layers that were swapped.

    Raises:
        TypeError: `target_modules` or `modules_to_save` are not names, a targeted layer is not exactly an `nn.Linear`,
            its weight is sharded, a module to save is not called or not of floating-point numbers, or a number argument
            is not a number.
        ValueError: The model has PEFT LoRA layers or is a linear layer itself, nothing is targeted, a name matches no
            layer, a targeted layer has hooks or is wrapped itself, a module to save has adapters in it, or a number is
            out of range.
    """
    known.check_not_peft("swap_linear", model)
    _check_targets(model, target_modules)
    modules, whole = dict(named_modules(model)), [] if modules_to_save is None else modules_to_save
    trained.check_names("swap_linear", modules, whole)
    whole = [*whole, *(trained.find_classifier(modules) if _is_all_linear(target_modules) else ())]
    names = [n for n in select(model, target_modules, exclude_modules) if not trained.is_left_to_modules(n, whole)]
    if not names:
        raise ValueError(_no_match(model, f"target_modules={target_modules!r}", target_modules))
    found = trained.matching(modules, whole)
    for what, taken in ((f"modules_to_save={whole!r}", found), ("an earlier call", trained.list_kept(modules))):
        trained.check_whole("swap_linear", what, modules, taken, names)
    swap_named(
        model, {name: pattern_value(rank_pattern, name, r) for name in names},
        {name: pattern_value(alpha_pattern, name, lora_alpha) for name in names},
        lora_dropout, use_rslora, autocast_adapter_dtype, found,
    )  # fmt: skip
    return names


def swap_named(
    model: nn.Module, ranks: Mapping[str, int], alphas: Mapping[str, float],
    lora_dropout: float, use_rslora: bool, autocast_adapter_dtype: bool, whole: Collection[str] = (),
) -> None:  # fmt: skip
    """Swap the layers with exactly these names as `swap_linear` does, each with its rank and its alpha; train `whole`.

    Raises:
        TypeError: A layer is not exactly an `nn.Linear`, its weight is sharded, or a number argument is not a number.
        ValueError: A layer has hooks or is wrapped itself, or a number is out of range.
    """
    modules: dict[str, Any] = dict(named_modules(model))
    _check_places("swap_linear", modules, ranks)
    for name, r in ranks.items():
        linear = modules[name]
        # Refuse wrong numbers before anything is changed.
        LoRALinear(1, 1, r, alphas[name], lora_dropout, device="meta")
        check_base(linear, f"swap_linear: {name}", f"; leave it out with exclude_modules=[{name!r}]")
        if is_sharded(linear.weight):
            raise TypeError(
                f"swap_linear: {name}.weight is a DTensor, and nothing would gather or reduce adapters beside it. "
                "Put the adapters in first and shard the model after that."
            )
    shared = {name: tied for name in whole if (tied := trained.shared_with(modules, name))}
    _check_places("swap_linear", modules, shared)
    copies = {name: copy.deepcopy(modules[name]) for name in shared}
    if shared:
        pairs = ", ".join(f"{key} is {other}" for tied in shared.values() for key, other in tied.items())
        warnings.warn(
            f"swap_linear: {pairs} as well. Trained is a copy of {', '.join(shared)}, as in PEFT, tied no longer.",
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
            wide = autocast_adapter_dtype and linear.weight.dtype in HALF
            dtype = torch.float32 if wide else None
            made[id(linear)] = LoRALinear.from_linear(linear, r, alphas[name], lora_dropout, use_rslora, dtype)
        _replace(modules, name, made[id(linear)])
    for name in whole:
        if name in copies:
            _replace(modules, name, copies[name])
        trained.train(copies.get(name, modules[name]))


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Add every adapter to its weight and put plain linear layers back, in place.

    W += scaling · B A, computed in fp32 and rounded once; the weights are written in place.

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
    made: dict[int, nn.Linear] = {}
    for name, layer in layers:
        if id(layer) not in made:
            layer.merge()
            made[id(layer)] = _plain(layer)
        if not name:
            return made[id(layer)]
        _replace(modules, name, made[id(layer)])
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
    # As in PEFT, take the first number after the first of these names that is there; without patterns, after a name
    # inside another module. A layer that is targeted by its full name is taken whatever its number is.
    places = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns or ()] or [r".*?\.[^.]*\.(\d+)\."]
    numbers = {
        name: next((int(found[1]) for place in places if (found := re.match(place, name))), None) for name in chosen
    }
    return [name for name in chosen if name in target_modules or numbers[name] in wanted]


def pattern_value(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """Return the value of the first key that matches the end of a name after a dot, as in PEFT; else the default."""
    return next((value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", name)), default)


def _is_all_linear(target_modules: object) -> bool:
    return isinstance(target_modules, str) and target_modules.lower() == _ALL_LINEAR


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
