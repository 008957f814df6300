"""Patch PEFT models: swap the class of each LoRA layer for one that differs in its forward alone, and swap it back.

The same for the blocks whose layers belong together. A patched module's class is a subclass of its own class with the
same name, so `isinstance`, `repr`, `state_dict`, merging, saving and everything else PEFT does are unchanged. Pickling
writes the module as what it was: the file loads where this library is not, and the model loaded from it is patched by
calling `patch_peft` again.
"""

import contextlib
import copy
import functools
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

from lora_kernels.peft import known
from lora_kernels.peft.blocks import block_forward
from lora_kernels.peft.layer import accelerated_forward, stock_forward
from lora_kernels.peft.reasons import Report, report
from lora_kernels.peft.structure import Structure, members, structure

__all__ = ["accelerate", "accelerated", "patch_peft", "unpatch_peft"]


def patch_peft(model: nn.Module, backend: str = "auto", blocks: bool = True) -> Report:
    """Let every LoRA layer of a PEFT model be computed by the fused kernels where it can be.

    y = x Wᵀ + bias + Σᵢ scalingᵢ · Dᵢ(x) Aᵢᵀ Bᵢᵀ over the active adapters, in one pass over x. What a layer cannot do
    fused, PEFT's own forward does, call by call: the model computes what it computed before, to rounding, and with
    dropout from another stream of random numbers. The model is changed in place. Call it after `get_peft_model` or
    `PeftModel.from_pretrained`, before or after `fully_shard`; call it again for layers that were added later.

    Q, K and V of an attention block share one call of `lora_projections`, and an MLP is one of `lora_mlp`, where
    the block's forward is seen to compute just that; whatever its name.

    Args:
        model: A `PeftModel`, or any module that holds PEFT's LoRA layers.
        backend: As in `lora_linear`.
        blocks: False to compute each layer on its own.

    Returns:
        What was taken, layer by layer and block by block, and why not; `print` it, or `explain(model)` for a table.

    Raises:
        ImportError: PEFT is not installed.
        TypeError: `model` is not a module, or `blocks` not a bool.
        ValueError: It has no LoRA layers, or `backend` is unknown.
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
            _give_class(layer, _patched_class(cls, backend, alone=not blocks))
    for block in (module for module in model.modules() if not isinstance(module, known.lora_layer())):
        cls = _stock_class(type(block))
        found = structure(block, cls.forward) if blocks and cls is not None else None
        if found and not found.reason and any(isinstance(m, known.lora_layer()) for m in members(block, found.layers)):
            _give_class(block, _patched_class(cls, backend, found))
        elif cls is not None and cls is not type(block):
            _give_class(block, cls)
    return report(model)


def unpatch_peft(model: nn.Module) -> int:
    """Give every patched layer, and every patched block, its own class back.

    Args:
        model: What `patch_peft` was given.

    Returns:
        How many layers were patched.

    Raises:
        TypeError: `model` is not a module.
        RuntimeError: A class was derived from after it was patched (`fully_shard` does that).
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
    return count


def accelerate(on: bool = True, backend: str = "auto") -> None:
    """Accelerate all PEFT LoRA layers there are and will be, by PEFT's classes themselves; or stop it.

    Args:
        on: False to give the classes their own forward back. Models patched by `patch_peft` stay patched.
        backend: As in `lora_linear`.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: `backend` is unknown.
    """
    known.check_backend("accelerate", backend)
    for cls in known.classes():
        if "forward" in vars(cls):  # a subclass that inherits it follows
            stock = stock_forward(cls.forward)
            cls.forward = accelerated_forward(stock, backend) if on else stock


@contextlib.contextmanager
def accelerated(backend: str = "auto") -> Iterator[None]:
    """Accelerate all PEFT models, also those built inside, for as long as the `with` block lasts.

    Args:
        backend: As in `lora_linear`.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: `backend` is unknown.
    """
    before = {cls: cls.forward for cls in known.classes() if "forward" in vars(cls)}
    accelerate(True, backend)
    try:
        yield
    finally:
        for cls, forward in before.items():
            cls.forward = forward


class _Patched:
    """What a patched module's class has beside its own: copying keeps it patched, pickling does not."""

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        twin: Any = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__dict__, memo))
        return twin

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced: Any = super().__reduce_ex__(1)  # later protocols insist on the very class
        build, (cls, *args), *state = reduced
        return build, (_stock_class(cls) or cls, *args), *state


@functools.cache
def _patched_class(
    cls: type[nn.Module], backend: str, block: Structure | None = None, alone: bool = False
) -> type[nn.Module]:
    stock = stock_forward(cls.forward)
    body = {
        "forward": block_forward(cls, stock, block, backend) if block else accelerated_forward(stock, backend),
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_lora_kernels_class": cls,
        "_lora_kernels_alone": alone,  # that a layer's block was to be left alone, for the report
    }
    return type(cls.__name__, (_Patched, cls), body)


def _give_class(module: Any, cls: type[nn.Module]) -> None:
    """Swap a module's class, and its forward where accelerate's device hook keeps or has left it on the instance."""
    before = types.MethodType(type(module).forward, module)
    for name in ("forward", "_old_forward"):
        if vars(module).get(name) == before:
            setattr(module, name, types.MethodType(cls.forward, module))
    module.__class__ = cls


def _stock_class(cls: type) -> Any:
    """The class that a patched one stands for, any other itself; None for one derived from a patched one."""
    if not issubclass(cls, _Patched):
        return cls
    return vars(cls).get("_lora_kernels_class")
