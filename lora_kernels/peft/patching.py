"""Patch PEFT models: give each LoRA layer a class that differs only in its forward, and give the old class back.

Blocks whose layers belong together are patched in the same way; see `classes`. Merging, saving and all else in PEFT are
unchanged. Pickling writes the unpatched module, so the file loads without this library. Call `patch_peft` again on a
model loaded from the file.
"""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

from lora_kernels.peft import experts, fast_path, known, readers
from lora_kernels.peft.blocks import block_forward, block_members
from lora_kernels.peft.classes import give_back, give_class, members_of_others, patched_class, stock_class
from lora_kernels.peft.forwards import at_work, class_forward, is_defined_by, is_ours, mark, stock_forward
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

    The experts of a mixture, whose parameters PEFT has wrapped, are computed by `lora_grouped_linear`, without a tensor
    of the size of their weights.

    Q, K and V of an attention block share one call of `lora_projections`, and an MLP is one call of `lora_mlp`, if the
    block's forward computes exactly that. The names of the blocks' classes do not matter.

    An `nn.TransformerEncoderLayer` calls LoRA layers inside in eval mode as well: its fast path, which reads their
    weights and passes the adapters by, is off as long as they are there, until `unpatch_peft`. A `UserWarning` names
    the layers whose weights their module reads by its source, without a call, because an adapter has no effect there.

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
    for module in list(model.modules()):
        cls = stock_class(type(module))
        # A module whose patched class others have changed keeps the class, and the report names what they have set.
        if cls is None or isinstance(module, fast_path.CallsLayers) or members_of_others(type(module)):
            continue
        if isinstance(module, known.lora_layer()):
            if known.is_supported(cls) or cls is known.param_wrapper():
                give_class(module, _accelerated_class(cls, backend, None, alone=not blocks))
            continue
        found = structure(module, class_forward(cls)) if blocks else None
        if found and not found.reason and any(isinstance(m, known.lora_layer()) for m in members(module, found.layers)):
            give_class(module, _accelerated_class(cls, backend, found))
        elif cls is not type(module):
            give_class(module, cls)
    experts.register()
    fast_path.call_adapted(model)
    names = {name: module for name, module in model.named_modules() if isinstance(module, known.lora_layer())}
    if lost := readers.without_effect(names, readers.peft_readings(model)):
        warnings.warn(
            f"patch_peft: {lost}, in stock PEFT as here. Leave these layers out with "
            "LoraConfig(exclude_modules=...), or target an nn.MultiheadAttention itself.",
            stacklevel=2,
        )
    return report(model)


def unpatch_peft(model: nn.Module) -> int:
    """Give every patched layer, block and encoder its own class back.

    A `UserWarning` names a forward, or another member, that others have set on a patched class since.

    Args:
        model: A model that `patch_peft` has patched; its adapters may be merged and unloaded since.

    Returns:
        The number of layers that were patched.

    Raises:
        TypeError: `model` is not a module.
        RuntimeError: A patched module was given a subclass of its patched class (`fully_shard` does that).
    """
    known.check_model("unpatch_peft", model)
    # A model of `swap_linear` needs its encoders as they are.
    given = give_back(
        "unpatch_peft", model, lambda one: not isinstance(one, fast_path.CallsLayers) or fast_path.is_free(one)
    )
    return sum(isinstance(module, known.lora_layer()) for module in given)


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
            cls.forward = at_work[cls] = mark(_layer_forward(cls, stock, backend), stock, None)


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
    wrapper = known.param_wrapper()
    return [cls for cls in (*known.classes(), *((wrapper,) if wrapper else ())) if "forward" in vars(cls)]


def _layer_forward(cls: type[nn.Module], stock: Any, backend: str) -> Any:
    """Return the accelerated forward of a class of layers, or of the wrapper of experts."""
    make = experts.wrapped_forward if cls is known.param_wrapper() else accelerated_forward
    return make(stock, backend)


def _accelerated_class(cls: type[nn.Module], backend: str, block: Structure | None, alone: bool = False) -> type[Any]:
    """Return the patched class for a class of layers or blocks, whose forward in force is accelerated."""
    stock = stock_forward(cls.forward)

    def members() -> dict[str, Any]:
        own = block_forward(stock, block, backend) if block else _layer_forward(cls, stock, backend)
        # `alone` is for the report: `patch_peft` was told to leave the layer's block alone.
        made = {"forward": mark(own, stock, cls), "_lora_kernels_alone": alone}
        return made | (block_members(block) if block else {})

    return patched_class(cls, (stock, backend, block, alone), members)
