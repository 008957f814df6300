"""Modules that are trained whole beside adapters, as PEFT's `modules_to_save`: found, copied, marked, compared.

PEFT takes a name for every module whose full name ends in it, in the middle of a word, too ("head" for `lm_head`), and
saves such a module's whole state under the module's own name: `base_model.model.<module>.weight`. The functions take a
model as a mapping of names to modules, with names as if nothing were wrapped.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.modules.linear import LoRALinear

__all__ = [
    "check_names", "check_plain", "check_values", "check_whole", "find_classifier", "find_embeddings", "find_trained",
    "is_left_to_modules", "keep", "list_kept", "matching", "read_state", "shared_with", "train",
]  # fmt: skip

_Modules = Mapping[str, nn.Module]
# PEFT cannot call these, and refuses them.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
# The names that PEFT adds to `modules_to_save` for a task.
_TASK_HEADS = {"SEQ_CLS": ["classifier", "score"], "TOKEN_CLS": ["classifier", "score"], "QUESTION_ANS": ["qa_outputs"]}
_HEADS = ("score", "classifier", "qa_outputs")
# The attribute of a module that `save_adapter` writes even if nothing in it requires grad any more.
_KEPT = "_saved_with_adapter"


def matching(modules: _Modules, names: Iterable[str]) -> list[str]:
    """Return the full names that PEFT takes the names of `modules_to_save` for."""
    ends = tuple(names)
    return [name for name in modules if name and ends and name.endswith(ends)]


def is_left_to_modules(name: str, modules_to_save: Iterable[str]) -> bool:
    """Return whether PEFT leaves a targeted layer alone because `modules_to_save` names it or a module around it."""
    return any(re.match(rf"(^|.*\.){end}($|\..*)", name) for end in modules_to_save)


def check_names(call: str, modules: _Modules, modules_to_save: object) -> None:
    """Refuse what are no names, and names that no module has.

    Raises:
        TypeError: `modules_to_save` is not a list of names.
        ValueError: A name matches no module.
    """
    if isinstance(modules_to_save, str) or not isinstance(modules_to_save, Collection):
        hint = f"; pass [{modules_to_save!r}]" if isinstance(modules_to_save, str) else ""
        raise TypeError(f"{call}: modules_to_save must be a list of names, got {modules_to_save!r}{hint}.")
    for end in modules_to_save:
        if not isinstance(end, str) or not end:
            raise TypeError(f"{call}: modules_to_save must be a list of names, got {modules_to_save!r}.")
        if not matching(modules, [end]):
            ends = sorted({name.rpartition(".")[2] for name in modules if name} - {str(n) for n in range(len(modules))})
            raise ValueError(
                f"{call}: modules_to_save has {end!r}, in which no module's name ends. Names end in: {', '.join(ends)}."
            )


def check_whole(call: str, what: str, modules: _Modules, names: Collection[str], targets: Collection[str] = ()) -> None:
    """Refuse modules that PEFT cannot train and save whole; `what` says where the names come from.

    Raises:
        TypeError: A module is a container, which is not called, or has parameters that are not floating-point numbers.
        ValueError: A module has adapters in it, or would get them by `targets`, or lies inside another of the modules.
    """
    for name in names:
        if isinstance(modules[name], _CONTAINERS):
            kind = type(modules[name]).__name__
            raise TypeError(f"{call}: {what} takes {name}, a {kind}, which is not called; name the modules in it.")
        parts = [part for part in modules if _is_in(part, name)]
        adapted = next((part for part in parts if isinstance(modules[part], LoRALinear)), None)
        if adapted is not None:
            raise ValueError(
                f"{call}: {what} takes {name} whole, and {adapted} is a LoRALinear. PEFT trains a module whole or puts "
                "adapters in it, and takes a name for every module whose name ends in it; a longer name may say which."
            )
        targeted = next((target for target in targets if _is_in(target, name)), None)
        if targeted is not None:
            raise ValueError(
                f"{call}: {what} takes {name} whole, and target_modules an adapter for {targeted}. PEFT does one or "
                f"the other: leave it out with exclude_modules=[{targeted!r}], or give modules_to_save longer names."
            )
        outer = next((other for other in names if other != name and _is_in(name, other)), None)
        if outer is not None:
            raise ValueError(
                f"{call}: {what} takes {name} as well as {outer}, in which it lies, and PEFT cannot load such a file. "
                "Give one of them another name in the model."
            )
        for key, t in read_state(modules, name).items():
            if isinstance(t, nn.Parameter) and not t.is_floating_point():
                raise TypeError(f"{call}: {what} takes {name}, and {key} is {t.dtype}, which cannot be trained.")


def find_classifier(modules: _Modules) -> list[str]:
    """Return the name of the fresh head of a transformers model without output embeddings, such as `classifier`.

    PEFT leaves that head without an adapter, and trains it, where a task such as "SEQ_CLS" is given.
    """
    model = modules[""]
    get_output: Any = getattr(model, "get_output_embeddings", None)
    if get_output is None or get_output() is not None:
        return []
    head = next((name for name in _HEADS if name in model._modules), None)
    return [] if head is None or isinstance(model._modules[head], LoRALinear) else [head]


def find_embeddings(modules: _Modules, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the embeddings whose weights `tensors`, by full name, has.

    PEFT saves these beside adapters if the vocabulary was resized, and nothing in the configuration says so.
    """
    found = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(modules[""], getter, lambda: None)()
        except NotImplementedError:
            continue
        found += [n for n, m in modules.items() if n and m is module and f"{n}.weight" in tensors]
    return [name for name in found if not isinstance(modules[name], LoRALinear)]


def find_trained(modules: _Modules, task_type: str | None) -> list[str]:
    """Return the names of the modules that belong into a file beside the adapters.

    These are the modules that `keep` has marked, those with a parameter of their own that requires grad, and the heads
    that PEFT expects in a file for `task_type`.

    Raises:
        ValueError: A parameter is trained that no module holds which could be saved whole.
    """
    found = [*list_kept(modules), *matching(modules, _TASK_HEADS.get(task_type or "", ()))]
    for name, module in modules.items():
        own = [] if isinstance(module, LoRALinear) else module._parameters.items()
        trained = next((f"{name}.{own}".lstrip(".") for own, p in own if p is not None and p.requires_grad), None)
        if trained is None:
            continue
        # A container is not called, so that PEFT saves what is around it.
        while name and isinstance(modules[name], _CONTAINERS):
            name = name.rpartition(".")[0]
        adapted = next((n for n, m in modules.items() if isinstance(m, LoRALinear) and _is_in(n, name)), None)
        if not name or adapted is not None:
            where = f"{name} with {adapted} in it" if name else "the model itself"
            raise ValueError(
                f"save_adapter: {trained} is trained and held by {where}. PEFT's modules_to_save saves modules inside "
                "a model, whole and without adapters in them. Give the parameter a module of its own, save "
                "model.state_dict() in its place, or freeze it."
            )
        found.append(name)
    found = list(dict.fromkeys(found))
    return [name for name in found if not any(name != other and _is_in(name, other) for other in found)]


def read_state(modules: _Modules, name: str) -> dict[str, Any]:
    """Return what the state dict of a module holds, by full names as if nothing were wrapped; nothing is copied."""
    found: dict[str, Any] = {}
    for part, module in modules.items():
        if _is_in(part, name):
            module._save_to_state_dict(found, f"{part}.", True)
    return found


def shared_with(modules: _Modules, name: str) -> dict[str, str]:
    """Return the tensors of a module that stand outside of it, too, each with the name that it has there."""
    places = _places(modules)
    found = {}
    for key, t in read_state(modules, name).items():
        outside = [place for place in places[id(t)] if not _is_in(place, name)]
        if outside:
            found[key] = outside[0]
    return found


def train(module: nn.Module) -> None:
    """Let all of a module be trained, and be saved with the adapters."""
    module.requires_grad_(True)
    keep(module)


def keep(module: nn.Module) -> None:
    """Have `save_adapter` write a module."""
    setattr(module, _KEPT, True)


def list_kept(modules: _Modules) -> list[str]:
    """Return the names of the modules that `save_adapter` writes whether or not they require grad."""
    return [name for name, module in modules.items() if name and vars(module).get(_KEPT)]


def check_values(
    modules: _Modules, names: Collection[str], copied: Collection[str], tensors: Mapping[str, Tensor]
) -> None:
    """Refuse file tensors that do not fit those of whole modules; `copied` names modules that will get their own.

    Raises:
        TypeError: A tensor of the model is not plain.
        ValueError: A tensor has another shape or kind; or tensors differ which are one in the model.
    """
    states = {name: read_state(modules, name) for name in names}
    values: dict[tuple[int, str], tuple[str, Tensor]] = {}
    places = _places(modules)
    for name, state in states.items():
        for key, t in state.items():
            check_plain("load_adapter", key, t)
            value = tensors[key]
            if value.shape != t.shape:
                raise ValueError(
                    f"load_adapter: {key} is {tuple(value.shape)} in the file and {tuple(t.shape)} in the model; make "
                    "the model's module of that size first."
                )
            if value.is_floating_point() != t.is_floating_point() or value.is_complex() != t.is_complex():
                raise ValueError(f"load_adapter: {key} is {value.dtype} in the file and {t.dtype} in the model.")
            value = value.to(t)
            first, other = values.setdefault((id(t), name if name in copied else ""), (key, value))
            if not torch.equal(value, other):
                raise ValueError(f"load_adapter: {first} and {key} are one tensor of the model and two in the file.")
            outside = [p for p in places[id(t)] if not any(_is_in(p, n) for n in names)]
            if outside and name not in copied and not torch.equal(value, t):
                raise ValueError(
                    f"load_adapter: {key} is {outside[0]}, too, of which the file has no new value. Before loading, "
                    f"swap_linear(..., modules_to_save=[{name!r}]) gives {name} a tensor of its own."
                )


def check_plain(call: str, key: str, t: Any) -> None:
    """Refuse part of a state that cannot be written to a file or read from it.

    Raises:
        TypeError: `t` is not a plain tensor, or has no numbers.
    """
    if type(t) not in (Tensor, nn.Parameter):
        raise TypeError(f"{call}: {key} is a {type(t).__name__}, not a plain tensor; gather it, or freeze its module.")
    if t.is_meta:
        raise TypeError(f"{call}: {key} is on the meta device and has no numbers; load the model's own first.")


def _places(modules: _Modules) -> dict[int, list[str]]:
    """Return all full names of each tensor of a model, by the tensor's identity."""
    places = defaultdict(list)
    for name, module in modules.items():
        for own, t in (*module._parameters.items(), *module._buffers.items()):
            if t is not None:
                places[id(t)].append(f"{name}.{own}".lstrip("."))
    return places


def _is_in(name: str, module: str) -> bool:
    return name == module or not module or name.startswith(f"{module}.")
