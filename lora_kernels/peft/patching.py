"""Patch PEFT models: give each LoRA layer a class that differs only in its forward, and give the old class back.

Blocks whose layers belong together are patched in the same way. The class of a patched module is a subclass of the
module's own class with the same name, so `isinstance`, `repr`, `state_dict`, merging, saving and all else in PEFT are
unchanged. Pickling writes the unpatched module, so the file loads without this library. Call `patch_peft` again on a
model loaded from the file.
"""

import contextlib
import copy
import functools
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from lora_kernels.peft import known, readers
from lora_kernels.peft.blocks import block_forward, block_members
from lora_kernels.peft.forwards import at_work, is_defined_by, is_ours, mark, stock_forward
from lora_kernels.peft.layer import accelerated_forward
from lora_kernels.peft.report import Report, report
from lora_kernels.peft.structure import Structure, members, structure

__all__ = ["accelerate", "accelerated", "patch_peft", "unpatch_peft"]


def patch_peft(model: nn.Module, backend: str = "auto", blocks: bool = True) -> Report:
    """Let the fused kernels compute every LoRA layer of a PEFT model if possible.

    y = x Wᵀ + bias + Σᵢ scalingᵢ · Dᵢ(x) Aᵢᵀ Bᵢᵀ over the active adapters, in one pass over x. If a layer cannot run
    fused, PEFT's own forward computes the layer, call by call. The model computes the same as before, up to rounding,
    with dropout from another stream of random numbers. The model is changed in place. Call `patch_peft` after
    `get_peft_model` or `PeftModel.from_pretrained`, before or after `fully_shard`; call it again for layers added
    later.

    Q, K and V of an attention block share one call of `lora_projections`, and an MLP is one call of `lora_mlp`, if the
    block's forward computes exactly that. The names of the blocks' classes do not matter.

    An `nn.TransformerEncoderLayer` with LoRA layers inside calls these layers in eval mode as well: its fast path,
    which reads their weights and passes the adapters by, is off until `unpatch_peft`. A `UserWarning` names the layers
    whose weights their module reads by its source, without a call, because an adapter has no effect there.

    Args:
        model: A `PeftModel`, or any module that holds PEFT's LoRA layers.
        backend: As in `lora_linear`.
        blocks: False to compute each layer alone.

    Returns:
        The form of each layer and block, and the reason if not fused; `print` the report, or use `explain(model)` for
        a table.

    Raises:
        ImportError: PEFT is not installed.
        TypeError: `model` is not a module, or `blocks` not a bool.
        ValueError: `model` has no LoRA layers, or `backend` is unknown.
    """
    known.check_model("patch_peft", model)
    known.check_backend("patch_peft", backend)
    if not isinstance(blocks, bool):
        raise TypeError(f"patch_peft: blocks must be True or False, got {blocks!r}.")
    layers = [module for module in model.modules() if isinstance(module, known.lora_layer())]
    if not layers:
        raise ValueError(
            "patch_peft: the model has no PEFT LoRA layers. Call it after get_peft_model(model, LoraConfig(...)) or "
            "PeftModel.from_pretrained(...); for layers of this library use lora_kernels.swap_linear."
        )
    for layer in layers:
        cls = _stock_class(type(layer))
        if cls is not None and known.is_supported(cls):
            _give_class(layer, _patched_class(cls, stock_forward(cls.forward), backend, alone=not blocks))
    for block in (module for module in model.modules() if not isinstance(module, known.lora_layer())):
        cls = _stock_class(type(block))
        found = structure(block, cls.forward) if blocks and cls is not None else None
        if found and not found.reason and any(isinstance(m, known.lora_layer()) for m in members(block, found.layers)):
            _give_class(block, _patched_class(cls, cls.forward, backend, found))
        elif cls is not None and cls is not type(block):
            _give_class(block, cls)
    readers.call_adapted(model, _is_lora)
    names = {name: module for name, module in model.named_modules() if isinstance(module, known.lora_layer())}
    if lost := readers.without_effect(names, readers.peft_readings(model)):
        warnings.warn(
            f"patch_peft: {lost}, in stock PEFT as here. Leave these layers out with "
            "LoraConfig(exclude_modules=...), or target an nn.MultiheadAttention itself.",
            stacklevel=2,
        )
    return report(model)


def unpatch_peft(model: nn.Module) -> int:
    """Give every patched layer, and every patched block, its own class back.

    Args:
        model: A model that `patch_peft` has patched.

    Returns:
        The number of layers that were patched.

    Raises:
        TypeError: `model` is not a module.
        RuntimeError: A patched module was given a subclass of its patched class (`fully_shard` does that).
    """
    known.check_model("unpatch_peft", model)
    count = 0
    for name, module in model.named_modules():
        if not isinstance(module, _Patched):
            continue
        stock = _stock_class(type(module))
        if stock is None:
            raise RuntimeError(
                f"unpatch_peft: {name} was given another class, {type(module).__name__}, after patch_peft; "
                "undo that first."
            )
        _give_class(module, stock)
        count += isinstance(module, known.lora_layer())
    readers.allow_fast_path(model)
    return count


def accelerate(on: bool = True, backend: str = "auto") -> None:
    """Accelerate all present and future PEFT LoRA layers by a change of PEFT's classes themselves; or undo the change.

    A forward that another library has set on a class stays, and so does one that is set later.

    Args:
        on: False to give the classes their own forward back. Models patched by `patch_peft` stay patched.
        backend: As in `lora_linear`.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: `backend` is unknown.
    """
    known.check_backend("accelerate", backend)
    for cls in _classes_with_forward():
        stock = stock_forward(cls.forward)
        if not on:
            at_work.pop(cls, None)
            cls.forward = stock
        elif is_defined_by(stock, cls):
            # Subclasses that inherit the forward follow.
            cls.forward = at_work[cls] = mark(accelerated_forward(stock, backend), stock, None)


@contextlib.contextmanager
def accelerated(backend: str = "auto") -> Iterator[None]:
    """Accelerate all PEFT models, also those built later, inside a `with` block.

    A forward that another library sets on a class inside the block stays after its end.

    Args:
        backend: As in `lora_linear`.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: `backend` is unknown.
    """
    before = {cls: (cls.forward, at_work.get(cls)) for cls in _classes_with_forward()}
    accelerate(True, backend)
    try:
        yield
    finally:
        for cls, (forward, ours) in before.items():
            at_work.pop(cls, None)
            if ours is not None:
                at_work[cls] = ours
            if is_ours(cls.forward):
                cls.forward = forward


def _classes_with_forward() -> list[Any]:
    """Return the known classes that define a forward."""
    return [cls for cls in known.classes() if "forward" in vars(cls)]


def _is_lora(module: nn.Module) -> bool:
    return isinstance(module, known.lora_layer())


class _Patched:
    """The mix-in of patched classes: copies stay patched, and pickles do not."""

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        twin: Any = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__dict__, memo))
        return twin

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Protocols after 1 insist on the object's exact class.
        reduced: Any = super().__reduce_ex__(1)
        build, (cls, *args), *state = reduced
        return build, (_stock_class(cls) or cls, *args), *state


@functools.cache
def _patched_class(
    cls: type[nn.Module], stock: Callable[..., Any], backend: str, block: Structure | None = None, alone: bool = False
) -> type[nn.Module]:
    """Return the subclass of a class whose forward, now, is `stock`."""
    own = block_forward(stock, block, backend) if block else accelerated_forward(stock, backend)
    body = {
        "forward": mark(own, stock, cls),
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_lora_kernels_class": cls,
        # For the report: `patch_peft` was told to leave the layer's block alone.
        "_lora_kernels_alone": alone,
        **(block_members(block) if block else {}),
    }
    return type(cls.__name__, (_Patched, cls), body)


def _give_class(module: Any, cls: type[nn.Module]) -> None:
    """Set a module's class, and replace a forward that accelerate's device hook keeps or has left on the instance."""
    before = types.MethodType(type(module).forward, module)
    for name in ("forward", "_old_forward"):
        if vars(module).get(name) == before:
            setattr(module, name, types.MethodType(cls.forward, module))
    module.__class__ = cls


def _stock_class(cls: type) -> Any:
    """Return the class behind a patched class, any other class itself, or None for a subclass of a patched class."""
    if not issubclass(cls, _Patched):
        return cls
    return vars(cls).get("_lora_kernels_class")
