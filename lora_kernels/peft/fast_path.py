"""Switch the fast path of PyTorch's transformer encoders off while an adapted layer is inside.

    nn.TransformerEncoderLayer    reads linear1.weight, linear2.weight and self_attn's in eval mode: a fused kernel
    nn.TransformerEncoder         passes nested tensors to such layers, which need the fused kernel

The fast path never calls the layers, so an adapter would have no effect. Each of the two classes has a field that
decides; the modules get a class in which the field depends on what is inside at that moment.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lora_kernels.modules.linear import LoRALinear
from lora_kernels.peft import known
from lora_kernels.peft.classes import Patched, give_class, patched_class

__all__ = ["CallsLayers", "call_adapted", "fast_layers", "fast_path_off", "is_free"]

_SWITCHES: tuple[tuple[type[nn.Module], str, Any], ...] = (
    # 0 means an activation that the fused kernel does not have; forward itself calls `self.activation`.
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    # The encoder would pass nested tensors to its layers.
    (nn.TransformerEncoder, "use_nested_tensor", False),
)


class CallsLayers(Patched):
    """The mix-in of encoders' patched classes.

    A pickle of a module with LoRALinear layers needs this library anyway, and loads with the patched class.
    """

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        build, (cls, *args), *state = super().__reduce_ex__(protocol)
        return (_empty, (cls,), *state) if _has_lora_linear(self) else (build, (cls, *args), *state)


class _Switch:
    """A field of a module that is `off` while an adapted layer is inside the module, and else what it was set to."""

    def __init__(self, name: str, off: Any) -> None:
        self._name, self._off = name, off

    def __get__(self, module: Any, owner: type) -> Any:
        if module is None:
            return self
        # To call the layers is right at any time, and what is inside is nothing for a compiler to guard.
        return self._off if torch.compiler.is_compiling() or _is_adapted(module) else vars(module)[self._name]

    def __set__(self, module: Any, value: Any) -> None:
        vars(module)[self._name] = value


def fast_layers(model: nn.Module) -> list[nn.Module]:
    """List the encoders and their layers that have an adapted layer inside and a fast path that may pass it by."""
    return [
        module
        for module in model.modules()
        for kind, field, _ in _SWITCHES
        if isinstance(module, kind) and field in vars(module) and getattr(module, field) and _is_adapted(module)
    ]


def call_adapted(model: nn.Module) -> None:
    """Let PyTorch's transformer encoders call their layers while a layer inside is adapted, in eval mode as well."""
    for module in fast_layers(model):
        give_class(module, _calling_class(type(module)))


def is_free(module: Any) -> bool:
    """Return whether a module is an encoder that `call_adapted` has patched, without a `LoRALinear` inside by now."""
    return isinstance(module, CallsLayers) and not _has_lora_linear(module)


@contextlib.contextmanager
def fast_path_off() -> Iterator[None]:
    """Let PyTorch's transformer modules call their layers in eval mode, inside a `with` block."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _calling_class(cls: type[nn.Module]) -> type[Any]:
    def members() -> dict[str, Any]:
        return {field: _Switch(field, off) for kind, field, off in _SWITCHES if issubclass(cls, kind)}

    return patched_class(cls, "calls its layers", members, CallsLayers)


def _empty(cls: type[nn.Module]) -> nn.Module:
    """Make an encoder of a patched class for a pickle to fill."""
    return object.__new__(_calling_class(cls))


def _has_lora_linear(module: Any) -> bool:
    return any(isinstance(inner, LoRALinear) for inner in module.modules())


def _is_adapted(module: nn.Module) -> bool:
    kinds: tuple[type[Any], ...] = LoRALinear, *known.imported_lora_layer()
    return any(isinstance(inner, kinds) for inner in module.modules())
