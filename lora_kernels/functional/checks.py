"""Check the arguments of the functional calls before anything is computed or launched.

Each message names the argument, says what the argument is, what would be right, and, if possible, a way out.
`check_call` runs in every call, so it compares first and words an error only after a comparison fails.
"""

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels.activations import ACTIVATIONS, known_name
from lora_kernels.constants import DTYPES, HALF
from lora_kernels.quantized import QuantizedWeight

__all__ = [
    "check_activation", "check_add", "check_backend", "check_call", "check_counts", "check_dtypes", "check_flag",
    "check_kind", "check_mlp", "check_number", "check_shard", "check_sharded", "check_tensors",
    "check_unrecorded", "is_sharded",
]  # fmt: skip

_SUPPORTED = (*DTYPES.values(), torch.float64)
_STRIDED = torch.strided
_TENSORS = ("x", "weight", "lora_A", "lora_B", "bias")
_NUMBERS = (numbers.Real, torch.SymFloat, torch.SymInt)
_PLAIN = (Tensor, torch.nn.Parameter)
_IN_LISTS = {
    "weight": "weights[{}]", "bias": "biases[{}]", "lora_A": "adapters[{}][0]", "lora_B": "adapters[{}][1]",
}  # fmt: skip


def check_call(
    x: Tensor, weight: Any, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, scaling: float, dropout_p: float,
    call: str = "lora_linear",
) -> None:  # fmt: skip
    """Check kinds, shapes, devices and numbers of one layer.

    Args:
        x: The call's x.
        weight: The call's weight, a tensor or a `QuantizedWeight`.
        lora_A: The call's lora_A.
        lora_B: The call's lora_B.
        bias: The call's bias.
        scaling: The call's scaling.
        dropout_p: The call's dropout_p.
        call: Name of the call, at the head of every message; a call for several layers adds the layer's name.

    Raises:
        TypeError: A tensor is not plain and dense or has an unsupported dtype; `scaling` or `dropout_p` is no number.
        ValueError: A shape, a device, `scaling` or `dropout_p` does not fit.
    """
    if torch._C._get_tracing_state() is not None:
        return check_unrecorded(check_call, x, weight, lora_A, lora_B, bias, scaling, dropout_p, call)
    tensors = (x, weight, lora_A, lora_B) if bias is None else (x, weight, lora_A, lora_B, bias)
    device = x.device if isinstance(x, Tensor) else None
    for t in tensors:
        if type(t) not in _PLAIN or t.layout is not _STRIDED or t.dtype not in _SUPPORTED or t.device != device:
            sharded = all(map(is_sharded, tensors))
            check_tensors(dict(zip(_TENSORS, tensors, strict=False)), call, sharded)
            break
    # A nested tensor may have the layout of a plain one.
    if x.is_nested:
        check_kind("x", x, call)
    if x.dim() == 0:
        raise ValueError(f"{call}: x must have at least 1 dim (…, in_features), got a scalar.")
    for t in tensors[1:4]:
        if len(t.shape) != 2:
            name = _TENSORS[[each is t for each in tensors].index(True)]
            raise ValueError(f"{call}: {name} must have 2 dims, got shape {_shape(t)}.")
    (out_features, in_features), rank = weight.shape, lora_A.shape[0]
    if x.shape[-1] != in_features:
        raise ValueError(
            f"{call}: x has {x.shape[-1]} features in its last dim but weight is {_shape(weight)} "
            f"and expects {in_features}."
        )
    if lora_A.shape[1] != in_features:
        raise ValueError(
            f"{call}: lora_A is {_shape(lora_A)} but must be (r, {in_features}) to match x."
            + (_swap_hint(lora_A, lora_B, in_features, out_features) or " Did you pass lora_A transposed?")
        )
    if lora_B.shape != (out_features, rank):
        raise ValueError(
            f"{call}: lora_B is {_shape(lora_B)} but must be ({out_features}, {rank}): out_features x rank."
            + _swap_hint(lora_A, lora_B, in_features, out_features)
        )
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(
            f"{call}: bias has {bias.numel()} elements, weight has {out_features} output features."
            if bias.dim() == 1
            else f"{call}: bias is {_shape(bias)} but must be ({out_features},): one value an output feature."
        )
    _check_numbers(scaling, dropout_p, call)


def check_tensors(tensors: dict[str, Tensor], call: str, sharded: bool = False) -> None:
    """Check kinds, dtypes and devices of the tensors of one layer, and name the first that does not fit.

    x is the first of the tensors. With `sharded` all are DTensors, and may be.
    """
    x = tensors["x"]
    for name, t in tensors.items():
        if type(t) is QuantizedWeight and name == "weight":
            if t.device != x.device:
                raise ValueError(f"{call}: x is on {x.device}, the quantised {name} on {t.device}; use one device.")
            continue
        plain = type(t) in _PLAIN and t.layout is _STRIDED
        if not plain and not sharded:
            check_kind(name, t, call)
        if t.dtype not in _SUPPORTED:
            raise TypeError(
                f"{call}: {name} has dtype {t.dtype}; supported: bfloat16, float16, float32 (float64 on CPU)."
            )
        if t.device != x.device:
            raise ValueError(f"{call}: all tensors must be on one device; x is on {x.device}, {name} on {t.device}.")


def check_add(base: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout_p: float) -> None:
    """Check kinds, shapes, devices and numbers of one call of `lora_add`.

    Raises:
        TypeError: A tensor is not plain and dense or has an unsupported dtype; `scaling` or `dropout_p` is no number.
        ValueError: A shape, a device, `scaling` or `dropout_p` does not fit.
    """
    if torch._C._get_tracing_state() is not None:
        return check_unrecorded(check_add, base, x, lora_A, lora_B, scaling, dropout_p)
    device = x.device if isinstance(x, Tensor) else None
    for t in (x, base, lora_A, lora_B):
        if type(t) not in _PLAIN or t.layout is not _STRIDED or t.dtype not in _SUPPORTED or t.device != device:
            check_tensors({"x": x, "base": base, "lora_A": lora_A, "lora_B": lora_B}, "lora_add")
            break
    if x.dim() == 0 or base.dim() == 0 or base.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"lora_add: base must be (…, out_features) with the leading dims of x, (…, in_features); "
            f"got {_shape(base)} for x of {_shape(x)}."
        )
    if lora_A.dim() != 2 or lora_A.shape[1] != x.shape[-1]:
        raise ValueError(
            f"lora_add: lora_A is {_shape(lora_A)} but must be (r, {x.shape[-1]}) to match x."
            + (_swap_hint(lora_A, lora_B, x.shape[-1], base.shape[-1]) or " Did you pass lora_A transposed?")
        )
    if lora_B.shape != (base.shape[-1], lora_A.shape[0]):
        raise ValueError(
            f"lora_add: lora_B is {_shape(lora_B)} but must be ({base.shape[-1]}, {lora_A.shape[0]}): "
            "out_features x rank." + _swap_hint(lora_A, lora_B, x.shape[-1], base.shape[-1])
        )
    _check_numbers(scaling, dropout_p, "lora_add")


def check_dtypes(
    x: Tensor, weight: Any, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, call: str = "lora_linear",
    layer: str | int | None = None, together: Sequence[Any] = (),
) -> None:  # fmt: skip
    """Check the mix of dtypes outside autocast: one dtype throughout, or fp32 adapters over a 16-bit base.

    Args:
        x: The call's x.
        weight: The call's weight.
        lora_A: The call's lora_A.
        lora_B: The call's lora_B.
        bias: The call's bias.
        call: Name of the call.
        layer: The layer in a call for several layers: its name, or its index in the lists.
        together: The `Projection`s of a call for several layers. Only if the dtypes of their weights agree does the
            message advise to cast x.

    Raises:
        TypeError: The mix is neither of the two.
    """
    dtype = x.dtype
    for part, t in (("weight", weight), ("bias", bias)):
        # A quantised weight is dequantised into x's dtype.
        if t is not None and t.dtype != dtype and type(t) is not QuantizedWeight:
            name = _argument(part, layer)
            agree = part == "weight" and all(getattr(q.weight, "dtype", None) == t.dtype for q in together)
            cast = f"x: x.to({name}.dtype)" if agree else f"{name}: {name}.to(x.dtype)"
            raise TypeError(f"{call}: x is {_name(x)} but {name} is {_name(t)}. Use torch.autocast, or cast {cast}.")
    for part, t in (("lora_A", lora_A), ("lora_B", lora_B)):
        if t.dtype != dtype and not (t.dtype == torch.float32 and dtype in HALF):
            name = _argument(part, layer)
            raise TypeError(
                f"{call}: x is {_name(x)} but {name} is {_name(t)}. Adapters must have x's dtype, or be float32 "
                f"over a float16 or bfloat16 x. Use torch.autocast, or cast: {name}.to(x.dtype)."
            )


def check_shard(dropout_shard: tuple[int, int]) -> None:
    """Check that `dropout_shard` is (i, n) with 0 <= i < n.

    Raises:
        ValueError: i is out of range.
    """
    index, count = dropout_shard
    if not 0 <= index < count:
        raise ValueError(
            f"lora_linear: dropout_shard must be (i, n) with 0 <= i < n, the i-th of n shards, got {dropout_shard}."
        )


def check_sharded(dropout_p: float, call: str = "lora_linear") -> None:
    """Refuse dropout on DTensors, because no layout says which ranks must draw the same mask.

    Raises:
        ValueError: dropout_p is not 0.
    """
    if dropout_p != 0:
        raise ValueError(
            f"{call}: dropout_p must be 0 for DTensors, got {dropout_p}. "
            "Parallelize a LoRALinear by a style of lora_kernels.parallel, which knows which ranks share a mask."
        )


def is_sharded(t: object) -> bool:
    """Return whether a tensor is a DTensor, by the name of its type: PyTorch's DTensor package need not be loaded."""
    return type(t).__name__ == "DTensor"


def check_counts(call: str, weights: Any, adapters: Any, expected: int | None = None, **others: Any) -> int:
    """Check the lists of a call for several projections; return the number of projections.

    Args:
        call: Name of the call.
        weights: A tensor for each projection.
        adapters: (lora_A, lora_B) or None for each projection.
        expected: Required number of projections, or None.
        others: More lists by name, with one entry per projection.

    Raises:
        TypeError: An argument is not a list or tuple, or an adapter is neither None nor a pair.
        ValueError: The lists differ in length, or the number of projections is 0 or not the expected one.
    """
    for name, entries in {"weights": weights, "adapters": adapters, **others}.items():
        if not isinstance(entries, (list, tuple)):
            raise TypeError(
                f"{call}: {name} must be a list or tuple, one entry a projection, got {type(entries).__name__}."
            )
        if len(entries) != len(weights):
            raise ValueError(f"{call}: weights are of {len(weights)} projections but {name} of {len(entries)}.")
    if not weights or expected not in (None, len(weights)):
        raise ValueError(f"{call}: needs {expected or 'at least 1'} projections, got {len(weights)}.")
    for i, pair in enumerate(adapters):
        if pair is not None and not (isinstance(pair, (list, tuple)) and len(pair) == 2):
            raise TypeError(f"{call}: adapters[{i}] must be (lora_A, lora_B), or None for no adapter.")
    return len(weights)


def check_backend(call: str, backend: object, known: tuple[str, ...]) -> None:
    """Check that `backend` is a known name, also in calls that leave a backend nothing to do.

    Raises:
        ValueError: `backend` is not in `known`.
    """
    if backend not in known:
        raise ValueError(f"{call}: backend={backend!r} is not one of: {', '.join(known)}.")


def check_flag(call: str, name: str, flag: object, each: str = "") -> None:
    """Check a bool, or with `each` a bool or a list of bools, one per `each`.

    Raises:
        TypeError: The argument is something else.
    """
    flags, listed = (flag, True) if each and isinstance(flag, (list, tuple)) else ((flag,), False)
    for i, one in enumerate(flags):
        if type(one) is not bool:
            found = f"{name}[{i}]" if listed else name
            right = f"True or False, or a list of one for each {each}" if each and not listed else "True or False"
            raise TypeError(f"{call}: {found} must be {right}, got {type(one).__name__}.")


def check_activation(call: str, activation: object) -> None:
    """Check that an activation is the name of one in `ACTIVATIONS`.

    Raises:
        TypeError: The activation is not a string.
        ValueError: The string is not a known name.
    """
    if isinstance(activation, str) and activation in ACTIVATIONS:
        return
    known, name = ", ".join(ACTIVATIONS), known_name(activation)
    hint = f' Use "{name}".' if name else ""
    if isinstance(activation, str):
        raise ValueError(f"{call}: activation={activation!r} is not one of: {known}.{hint}")
    raise TypeError(f"{call}: activation must be a string, one of: {known}; got {type(activation).__name__}.{hint}")


def check_mlp(layers: dict[str, Any], activation: str) -> None:
    """Check that the layers of `lora_mlp` are projections that fit each other, and that the activation is known.

    Raises:
        TypeError: A layer is not a `Projection`, its weight not a matrix, or `activation` not a string.
        ValueError: Two layers differ in width, a layer has only one of A and B, or `activation` is not a known name.
    """
    if torch._C._get_tracing_state() is not None:
        return check_unrecorded(check_mlp, layers, activation)
    check_activation("lora_mlp", activation)
    for name, q in layers.items():
        if not hasattr(q, "_replace") or not hasattr(q, "lora_A"):
            raise TypeError(
                f"lora_mlp: {name} must be a lora_kernels.Projection(weight, lora_A, lora_B, ...), "
                f"got {type(q).__name__}."
            )
        if not isinstance(q.weight, (Tensor, QuantizedWeight)) or len(q.weight.shape) != 2:
            raise TypeError(f"lora_mlp: {name}.weight must be a tensor with 2 dims, got {_description(q.weight)}.")
        if (q.lora_A is None) != (q.lora_B is None):
            there, missing = ("lora_B", "lora_A") if q.lora_A is None else ("lora_A", "lora_B")
            raise ValueError(f"lora_mlp: {name} has {there} and no {missing}; give both, or neither for no adapter.")
    widths = {name: q.weight.shape[name == "down"] for name, q in layers.items()}
    for name, width in widths.items():
        if width != widths["up"]:
            raise ValueError(
                f"lora_mlp: up.weight is {_shape(layers['up'].weight)} and {name}.weight "
                f"{_shape(layers[name].weight)}: gate and up must have as many output features as down has inputs."
            )


def check_number(call: str, name: str, number: object) -> None:
    """Check that an argument is a number.

    Raises:
        TypeError: The argument is not a number.
    """
    if type(number) is not float and not isinstance(number, _NUMBERS):
        hint = "" if number is None else f" Use float({name})."
        raise TypeError(f"{call}: {name} must be a number, got {type(number).__name__} {number!r}.{hint}")


def check_unrecorded(check: Callable[..., None], *arguments: Any) -> None:
    """Run a check outside of `torch.jit.trace`, which would warn of each comparison of sizes."""
    state = torch._C._get_tracing_state()
    set_state: Any = torch._C._set_tracing_state  # type: ignore[attr-defined]
    set_state(None)
    try:
        check(*arguments)
    finally:
        set_state(state)


def _check_numbers(scaling: float, dropout_p: float, call: str) -> None:
    check_number(call, "scaling", scaling)
    check_number(call, "dropout_p", dropout_p)
    if not (0.0 <= dropout_p <= 1.0):
        raise ValueError(f"{call}: dropout_p must be in [0, 1], got {dropout_p}. (1 drops the whole low-rank term.)")
    # Do not use math.isfinite, because a compiler cannot trace it with a symbol.
    if not -math.inf < scaling < math.inf:
        raise ValueError(f"{call}: scaling must be finite, got {scaling}.")


def check_kind(name: str, t: object, call: str = "lora_linear") -> None:
    """Check that an argument is a plain dense tensor, or one that stands for such.

    Raises:
        TypeError: The argument is something else.
    """
    if not isinstance(t, Tensor):
        raise TypeError(f"{call}: {name} must be a torch.Tensor, got {type(t).__name__}.")
    kind = type(t).__name__
    if kind == "DTensor":
        raise TypeError(
            f"{call}: {name} is a DTensor. Call the module inside its FSDP forward (so it is unsharded), parallelize a "
            f"LoRALinear by a style of lora_kernels.parallel, or use {name}.to_local() if it is replicated."
        )
    if t.is_nested:
        raise TypeError(f"{call}: {name} is a nested tensor. Use {name}.to_padded_tensor(0.0) or {name}.values().")
    if t.layout is not torch.strided:
        raise TypeError(f"{call}: {name} has layout {t.layout}. Use {name}.to_dense().")
    if t.is_quantized:
        raise TypeError(f"{call}: {name} is quantized. Use {name}.dequantize().")
    if kind not in ("FakeTensor", "FunctionalTensor", "Buffer") and type(t) not in _PLAIN:
        raise TypeError(
            f"{call}: {name} is a {kind}, a tensor subclass that the kernels cannot read. "
            f"Pass the dense tensor it stands for."
        )


def _swap_hint(lora_A: Tensor, lora_B: Tensor, in_features: int, out_features: int) -> str:
    """Return a hint if misfit adapters would fit when exchanged, else an empty string."""
    fit = lora_B.shape[1:] == (in_features,) and lora_A.shape == (out_features, lora_B.shape[0])
    return " lora_A and lora_B seem to be swapped: exchanged, they would fit." if fit else ""


def _argument(part: str, layer: str | int | None) -> str:
    """Return the name under which the caller passed a layer's weight, bias, lora_A or lora_B."""
    if layer is None:
        return part
    return f"{layer}.{part}" if isinstance(layer, str) else _IN_LISTS[part].format(layer)


def _description(t: object) -> str:
    return f"shape {_shape(t)}" if isinstance(t, Tensor) else type(t).__name__


def _shape(t: Tensor) -> str:
    return str(tuple(t.shape))


def _name(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")
