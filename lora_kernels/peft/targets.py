"""Find the layers of a model by PEFT's words: names, regular expressions, patterns, "all-linear"."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lora_kernels.modules.linear import LoRALinear

__all__ = [
    "ALL_LINEAR", "check_targets", "is_all_linear", "lora_layers", "named_modules", "no_match_message", "pattern_value",
    "select", "unwrap",
]  # fmt: skip

ALL_LINEAR = "all-linear"
# The attributes in which wrappers keep their module.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


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
    if is_all_linear(target_modules):
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


def is_all_linear(target_modules: object) -> bool:
    """Return whether a target is "all-linear", in any case of letters."""
    return isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR


def _matches(target: str | Collection[str], name: str) -> bool:
    if isinstance(target, str):
        return re.fullmatch(target, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in target)


def check_targets(model: nn.Module, target_modules: object) -> None:
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
            f'swap_linear: target_modules must be names, a regular expression or "{ALL_LINEAR}", '
            f"got {target_modules!r}."
        )
    linears = _linears(model)
    strangers = [end for end in target_modules if not any(_matches([end], name) for name in linears)]
    if strangers:
        raise ValueError(no_match_message(model, f"{', '.join(map(repr, strangers))} of target_modules", *strangers))


def no_match_message(model: nn.Module, what: str, *targets: object) -> str:
    """Return the message for `targets`, described by `what`, that match no linear layer."""
    if isinstance(unwrap(model), nn.Linear):
        return "swap_linear: the model is a linear layer itself; use LoRALinear.from_linear(layer, r=...)."
    meant = any(re.sub("[-_ ]", "", str(target)).lower() == "alllinear" for target in targets)
    hint = f' For all of them pass target_modules="{ALL_LINEAR}".' if meant else ""
    ends = sorted({name.rpartition(".")[2] for name in _linears(model)})
    return (
        f"swap_linear: no linear layer of {type(model).__name__} matches {what}. "
        f"Its linear layers end in: {', '.join(ends) or 'none'}.{hint}"
    )


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    named = named_modules(model)
    return {name: module for name, module in named if name and isinstance(module, (nn.Linear, LoRALinear))}
