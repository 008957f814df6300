"""Why a LoRA layer is not computed by one fused pass: the decisions of `layer`, in words."""

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.peft import experts, known
from lora_kernels.peft import layer as rules
from lora_kernels.peft.bases import bare, base_of, quantized_base
from lora_kernels.peft.forwards import describe, is_ours, replaced_member, replaced_part, replacement, stock_forward

__all__ = ["UNPATCHED", "base_reason", "forward_reason", "part_reason", "stock_reason"]

UNPATCHED = "not patched: call patch_peft(model), again for layers added later"
_STATE = {"_disable_adapters", "merged_adapters", "_active_adapter", "lora_variant", "cast_input_dtype_enabled"}
_SHARDED = " while the layer is not called; explain(model, inputs) looks inside a call"


def stock_reason(module: nn.Module, x: Tensor | None = None, *more: Any, **named: Any) -> str:
    """Return why PEFT's own forward computes a layer, "" if it does not.

    Args:
        module: A LoRA layer.
        x: The layer's input, to explain a call.
        *more: The further arguments of the call, which the experts of a mixture take.
        **named: The keyword arguments of such a call.
    """
    if isinstance(module, known.param_wrapper()):
        found = forward_reason(module) or experts.read(module, x, *more, **named)
        return found if isinstance(found, str) else ""
    return _class_reason(module) or _state_reason(module) or _call_reason(module, x)


def _class_reason(module: nn.Module) -> str:
    cls: type = vars(type(module)).get("_lora_kernels_class", type(module))
    if known.is_supported(cls):
        if theirs := replaced_member(cls):
            return f"{theirs[0]} of its class is not PEFT's own, but {describe(theirs[1])}"
        return forward_reason(module)
    kind = next((kind for kind in known.classes() if kind in cls.__mro__ and not known.is_supported(kind)), None)
    if kind is not None:
        return f"the forward of lora.{kind.__name__} was replaced by {describe(kind.forward)}"
    return f"lora.{cls.__name__} computes something else than x Wᵀ + scaling B A dropout(x)"


def forward_reason(module: nn.Module) -> str:
    """Return why no patched forward computes a module, "" if one does."""
    cls = type(module)
    forward: Any = _wrapped_forward(module) if "forward" in vars(module) else cls.forward
    if is_ours(forward):
        other = replacement(forward)
        if other is stock_forward(forward):
            return "its forward is from a time of accelerate() or accelerated() that has ended"
        return f"the forward of its class was replaced by {describe(other)}" if other else ""
    # A class may make its forward anew at each look, as `functools.partialmethod` does.
    if "forward" not in vars(module) or forward is cls.forward:
        set_on_ours = "_lora_kernels_class" in vars(cls)
        return f"the forward of its class was replaced by {describe(forward)}" if set_on_ours else UNPATCHED
    return "its forward is replaced on the instance (X-LoRA, or a hook from before)"


def _wrapped_forward(module: nn.Module) -> Any:
    """Return the function behind a forward that is set on the instance and calls it, None if it is not known.

    accelerate's device hook sets a forward that calls `_old_forward`, and leaves the old one in its place when it goes.
    Others, as the hooks of diffusers, say by `__wrapped__` what they call.
    """
    forward: Any = vars(module)["forward"]
    if not inspect.ismethod(forward):
        forward = vars(module).get("_old_forward", forward)
    while forward is not None:
        if inspect.ismethod(forward) and forward.__self__ is module:
            return forward.__func__
        forward = getattr(forward, "__wrapped__", None)
    return None


def _state_reason(module: Any) -> str:
    if missing := _STATE - vars(module).keys():
        return f"this PEFT keeps its state elsewhere ({', '.join(sorted(missing))})"
    if module.disable_adapters:
        return "adapters are disabled"
    if module.merged:
        return f"merged: {', '.join(module.merged_adapters)}"
    active = [name for name in module.active_adapters if name in module.lora_A]
    if not active:
        return "no active adapter on this layer"
    return next(filter(None, (_adapter_reason(module, name) for name in active)), "")


def _adapter_reason(module: Any, name: str) -> str:
    variant, scaling = module.lora_variant.get(name), module.scaling[name]
    if variant is not None and not rules.is_plain_variant(variant):
        return f"adapter {name!r} is a variant: {type(variant).__name__.removesuffix('LinearVariant')}"
    for part, kinds in (
        ("lora_A", (nn.Linear,)), ("lora_B", (nn.Linear,)), ("lora_dropout", (nn.Identity, nn.Dropout)),
    ):  # fmt: skip
        listened = part_reason(getattr(module, part)[name], kinds)
        if listened:
            return f"{part}.{name} {listened}"
    for part in ("lora_A", "lora_B"):
        own = getattr(module, part)[name]._parameters
        if type(own.get("weight")) is not nn.Parameter:
            kind = type(getattr(getattr(module, part)[name], "weight", None)).__name__
            return f"{part}.{name}.weight is a {kind}" + _SHARDED * (kind == "DTensor")
        if own["weight"].layout is not torch.strided:
            return f"{part}.{name}.weight has layout {own['weight'].layout}"
        if own.get("bias") is not None:
            return f"lora_bias=True: {part}.{name} has a bias"
    if isinstance(scaling, Tensor) and scaling.dim():
        return f"scaling[{name!r}] is a tensor of shape {tuple(scaling.shape)}, not a number"
    if not isinstance(scaling, (int, float, Tensor)):
        return f"scaling[{name!r}] is a {type(scaling).__name__}, not a number"
    if not isinstance(scaling, Tensor) and not math.isfinite(scaling):
        return f"scaling[{name!r}] is {scaling}, not a finite number"
    return ""


def _call_reason(module: Any, x: Tensor | None) -> str:
    if part := replaced_part():
        name, other = part
        return f"{name} was replaced by {describe(other)}"
    if rules._has_any_global_hook():
        return "a hook on all modules is registered"
    if rules.is_function_mode_active():
        return "inside a TorchFunctionMode"
    if rules.is_traced():
        return "inside torch.func, forward-mode AD or torch.jit.trace"
    if x is None:
        return ""
    if type(x) is not Tensor:
        return f"x is a {type(x).__name__}"
    if not rules.is_dense(x):
        return "x is a nested tensor" if x.is_nested else f"x has layout {x.layout}"
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        A, B = module.lora_A[name].weight, module.lora_B[name].weight
        if not rules.dtypes_fit(x, A, B):
            return f"x is {_name(x)}, lora_A.{name} {_name(A)}, lora_B.{name} {_name(B)}"
        if not module.cast_input_dtype_enabled and A.dtype is not x.dtype:
            return f"casting of x ({_name(x)} to {_name(A)}) is disabled"
    return ""


def base_reason(base: Any, x: Tensor | None, name: str = "the base layer") -> str:
    """Return why the product of a base layer, called `name` in the words, cannot be fused; "" if it can."""
    if type(base) is not nn.Linear:
        found = quantized_base(base, x)
        return f"{name} {found}" if isinstance(found, str) else ""
    if listened := part_reason(base, (nn.Linear,)):
        return f"{name} {listened}"
    like: Any = base.weight if x is None and isinstance(base.weight, Tensor) else x
    if base_of(base, like):
        return ""
    kinds = {type(t).__name__ for t in (base.weight, base.bias) if t is not None and type(t) is not nn.Parameter}
    if kinds:
        return f"{name}'s weight is a {', '.join(sorted(kinds))}"
    layouts = {str(t.layout) for t in (base.weight, base.bias) if t is not None and t.layout is not torch.strided}
    if layouts:
        return f"{name}'s weight has layout {', '.join(sorted(layouts))}"
    return f"x is {_name(like)}, {name}'s weight {_name(base.weight)}"


def part_reason(module: nn.Module, kinds: tuple[type, ...]) -> str:
    """Return why a part of a layer, exactly of one of the classes, has to be called; "" if it need not be."""
    kind, plain = type(module), kinds[-1].__name__
    if kind not in kinds:
        # Other tuners call their layers Linear as well.
        name = f"{kind.__module__}.{plain}" if kind.__name__ == plain else kind.__name__
        return f"is a {name}, not a plain nn.{plain}"
    if "forward" in vars(module):
        return "has its forward replaced on the instance"
    return "" if bare(module, kind) else "has a hook"


def _name(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")
