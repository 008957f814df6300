"""Say which layer is concerned when a tensor that backward needs was written in place after the call.

Backward needs x for dA, W and A for dx, and B for both, as they were in the call. Nothing is copied: a call saves the
tensors that it got, at every size, in every dtype, and with dropout or without. If one of them has been written since,
backward raises. Autograd's own error names no layer, so `explained` replaces it where a Function runs, and `watch`
looks before autograd does where a small call is composed of PyTorch's operators. `watch` also looks at an x of which
such a call has saved a dropped copy, so that the size of x decides nothing.

The names of layers are looked for when there is an error, among all modules of the process; a call pays nothing for
them.
"""

import gc
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["check_input", "explained", "watch"]

# In autograd's message.
_WRITTEN = "modified by an inplace operation"
# Autograd's nodes of views.
_VIEWS = {f"{name}Backward" for name in ("Permute", "Reshape", "Transpose", "T", "UnsafeView", "View", "Alias")}


def watch(call: str, y: Tensor, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    """Let backward of a call that PyTorch's operators compute look whether its tensors were written.

    `y` is the result of `torch_backend.linear_by_operators`, whose last product has Bᵀ as its second matrix. Backward
    unpacks the Bᵀ that is saved there, and a hook of that one tensor is the cheapest place to look; the hook is gone as
    soon as the saved tensors are. If other saved-tensor hooks are there (activation checkpointing, offloading), which
    replace what a call saves, nothing is looked at, as in a Function.
    """
    # Without a gradient of s neither Bᵀ nor x is saved. Inference tensors have no version.
    if not (lora_A.requires_grad or x.requires_grad) or x.is_inference():
        return
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        node: Any = y.grad_fn if y.dim() == 2 else y.grad_fn.next_functions[0][0]  # type: ignore[union-attr]
        held = x, weight, lora_A, lora_B, x._version, weight._version, lora_A._version, lora_B._version, call
        node._raw_saved_mat2.register_hooks(lambda transposed: (transposed, held), _check)


def _check(saved: tuple[Tensor, tuple[Any, ...]]) -> Tensor:
    """Return the saved tensor unless one that backward needs has been written."""
    transposed, (*tensors, x_was, weight_was, A_was, B_was, call) = saved
    need_x, need_weight, need_A, _ = (t.requires_grad for t in tensors)
    needed = need_A or need_weight, need_x, need_x, need_x or need_A
    for i, (t, was, need) in enumerate(zip(tensors, (x_was, weight_was, A_was, B_was), needed, strict=True)):
        if need and t._version != was:
            raise RuntimeError(_text(call, "x" if i == 0 else "weight", tensors[1:]))
    return transposed


def explained(call: str, node: Any, error: RuntimeError) -> RuntimeError | None:
    """Return the error to raise in place of autograd's of a written tensor, or None for any other error.

    Args:
        call: The call in whose backward the error was raised.
        node: The context of the Function, which is its node in autograd's graph.
        error: The error.
    """
    if _WRITTEN not in str(error):
        return None
    leaves = [_leaf(after) for after, _ in node.next_functions]
    return RuntimeError(_text(call, _which(node), [t for t in leaves if isinstance(t, nn.Parameter)]))


def _leaf(node: Any) -> Tensor | None:
    """Return the leaf of which an input is a view, as the A and B of experts are of their parameters; None if none."""
    while node is not None and not hasattr(node, "variable"):
        before = node.next_functions
        node = before[0][0] if len(before) == 1 and type(node).__name__.rstrip("0123456789") in _VIEWS else None
    return getattr(node, "variable", None)


def check_input(call: str, x: Tensor, version: int, tensors: Iterable[Tensor | None]) -> None:
    """Refuse to compute again from an x that has been written since the call, when it had `version`.

    Raises:
        RuntimeError: x has another version.
    """
    if x._version != version:
        raise RuntimeError(_text(call, "x", [t for t in tensors if t is not None]))


def _which(node: Any) -> str:
    """Return which tensor is written: "x", which is saved first, "offsets" in the node's place for them, or "weight".

    The result is "" if that cannot be found out.
    """
    for i, saved in enumerate(getattr(node, "_raw_saved_tensors", ())):
        try:
            saved.unpack()
        except RuntimeError:
            return "x" if i == 0 else "offsets" if i == getattr(node, "offsets_at", None) else "weight"
        except (AttributeError, TypeError):
            break
    return ""


def _text(call: str, which: str, tensors: Sequence[Tensor]) -> str:
    what = {
        "x": "its input x has",
        "offsets": "its tensor of offsets has",
        "weight": "a weight or an adapter of it has",
        "": "its input x, a weight or an adapter of it has",
    }
    names = _layers_of(tensors)
    shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
    layer = f"layer {', '.join(names)}" if names else f"the layer with the tensors {shapes}, which no module has"
    of_x = "Write out of place (x = x + z, not x += z), or give the layer a copy: layer(x.clone())."
    of_weights = "Call backward before optimizer.step(), merge() and load_state_dict()."
    of_offsets = "Make new offsets for each call, or give it a copy: offsets.clone()."
    advice = {"x": of_x, "offsets": of_offsets, "weight": of_weights, "": f"{of_x} {of_weights}"}
    return (
        f"{call}, {layer}: {what[which]} been {_WRITTEN} since the call, and backward needs it as it was. "
        f"{advice[which]}"
    )


def _layers_of(tensors: Sequence[Tensor]) -> list[str]:
    """Return the names, from their root, of the layers that have one of the tensors as a parameter."""
    wanted = {id(t) for t in tensors}
    # `isinstance` would ask lazy modules and proxies for their class.
    modules = [one for one in gc.get_objects() if issubclass(type(one), nn.Module)]
    above: dict[int, tuple[nn.Module, str]] = {}
    for module in modules:
        for own, child in vars(module).get("_modules", {}).items():
            above[id(child)] = module, own
    found: dict[str, None] = {}
    for module in modules:
        for own, parameter in vars(module).get("_parameters", {}).items():
            if id(parameter) in wanted:
                found[_name(module, own, above)] = None
    return list(found)


def _name(module: nn.Module, own: str, above: dict[int, tuple[nn.Module, str]]) -> str:
    """Return a layer's name from its parameter's: what stands before "lora_A", before "base_layer" or "weight"."""
    path, seen = [own], set[int]()
    while id(module) in above and id(module) not in seen:
        seen.add(id(module))
        module, own = above[id(module)]
        path.insert(0, own)
    ends = [i for i, part in enumerate(path) if part.startswith(("lora_", "base_layer"))] or [len(path) - 1]
    return ".".join(path[: ends[0]]) or type(module).__name__
