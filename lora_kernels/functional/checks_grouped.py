"""Check the arguments of `lora_grouped_linear` before anything is computed or launched, as `checks` does.

The values of `offsets` are not looked at, because that would make the host wait for the device.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels.constants import HALF, MAX_ADAPTERS
from lora_kernels.functional.checks import check_kind, check_number, check_tensors, check_unrecorded
from lora_kernels.quantized import QuantizedWeight

__all__ = ["check_grouped", "check_grouped_dtypes", "listed"]

_CALL = "lora_grouped_linear"
_INTEGERS = (torch.int32, torch.int64)


def listed(lora_A: Any, lora_B: Any, scaling: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """Return the A, the B and the scalings of all adapters as lists.

    Raises:
        TypeError: One of `lora_A` and `lora_B` is a sequence and the other is not.
        ValueError: The sequences differ in length, or there are too many adapters.
    """
    several = isinstance(lora_A, (list, tuple))
    if several != isinstance(lora_B, (list, tuple)):
        raise TypeError(
            f"{_CALL}: lora_A is a {type(lora_A).__name__} and lora_B a {type(lora_B).__name__}; "
            "pass a tensor as each, or for several adapters a list of tensors as each."
        )
    lora_As, lora_Bs = (list(lora_A), list(lora_B)) if several else ([lora_A], [lora_B])
    if len(lora_As) != len(lora_Bs):
        raise ValueError(f"{_CALL}: lora_A is of {len(lora_As)} adapters but lora_B of {len(lora_Bs)}.")
    if len(lora_As) > MAX_ADAPTERS:
        raise ValueError(
            f"{_CALL}: lora_A is of {len(lora_As)} adapters; at most {MAX_ADAPTERS} are added by one call. Concatenate "
            "some of them along r: torch.cat of their lora_A in dim 1, and of their scaled lora_B in dim 2."
        )
    scalings = list(scaling) if isinstance(scaling, (list, tuple)) else [scaling] * len(lora_As)
    if len(scalings) != len(lora_As):
        raise ValueError(
            f"{_CALL}: scaling has {len(scalings)} numbers for {len(lora_As)} adapters; pass one number for all, "
            "or one for each."
        )
    return lora_As, lora_Bs, scalings


def check_grouped(
    x: Tensor, weight: Tensor, lora_As: Sequence[Tensor], lora_Bs: Sequence[Tensor], offsets: Tensor,
    bias: Tensor | None, scalings: Sequence[float], alone: bool,
) -> None:  # fmt: skip
    """Check kinds, shapes, devices and numbers of a call.

    Args:
        x: The call's x.
        weight: The call's weight.
        lora_As: A of each adapter.
        lora_Bs: B of each adapter.
        offsets: The call's offsets.
        bias: The call's bias.
        scalings: The scaling of each adapter.
        alone: Whether the call got an adapter and not a list of them, which messages name by place.

    Raises:
        TypeError: A tensor is not plain and dense or has an unsupported dtype; a scaling is no number.
        ValueError: A shape, a device or a scaling does not fit.
    """
    if torch._C._get_tracing_state() is not None:
        return check_unrecorded(check_grouped, x, weight, lora_As, lora_Bs, offsets, bias, scalings, alone)
    if isinstance(weight, QuantizedWeight):
        raise TypeError(f"{_CALL}: weight is a QuantizedWeight; pass a dense tensor (E, out_features, in_features).")
    names = _names(len(lora_As), alone)
    tensors = {"x": x, "weight": weight}
    for (name_A, name_B), lora_A, lora_B in zip(names, lora_As, lora_Bs, strict=True):
        tensors |= {name_A: lora_A, name_B: lora_B}
    check_tensors(tensors if bias is None else {**tensors, "bias": bias}, _CALL)
    if x.dim() != 2:
        raise ValueError(
            f"{_CALL}: x must have 2 dims, (rows sorted by group, in_features), got shape {_shape(x)}."
            + (" Use x.flatten(0, -2)." if x.dim() > 2 else "")
        )
    if weight.dim() != 3:
        raise ValueError(
            f"{_CALL}: weight must have 3 dims, (E, out_features, in_features), got shape {_shape(weight)}."
            + (" Use lora_linear for a single matrix." if weight.dim() == 2 else "")
        )
    groups, out_features, in_features = weight.shape
    if x.shape[1] != in_features:
        transposed = " Pass weight.mT for a stack (E, in_features, out_features)." if x.shape[1] == out_features else ""
        raise ValueError(
            f"{_CALL}: x has {x.shape[1]} features but weight is {_shape(weight)} and expects {in_features}."
            + transposed
        )
    _check_offsets(offsets, x, groups)
    for (name_A, name_B), lora_A, lora_B in zip(names, lora_As, lora_Bs, strict=True):
        _check_adapter(name_A, name_B, lora_A, lora_B, weight)
    if bias is not None and bias.shape != (groups, out_features):
        raise ValueError(f"{_CALL}: bias is {_shape(bias)} but must be ({groups}, {out_features}): E x out_features.")
    for i, scaling in enumerate(scalings):
        name = "scaling" if alone else f"scaling[{i}]"
        check_number(_CALL, name, scaling)
        # Do not use math.isfinite, because a compiler cannot trace it with a symbol.
        if not -math.inf < scaling < math.inf:
            raise ValueError(f"{_CALL}: {name} must be finite, got {scaling}.")


def _check_offsets(offsets: Tensor, x: Tensor, groups: int) -> None:
    """Check kind, dtype, device and shape of `offsets`."""
    check_kind("offsets", offsets, _CALL)
    if offsets.dtype not in _INTEGERS:
        raise TypeError(f"{_CALL}: offsets has dtype {offsets.dtype}; supported: int32, int64.")
    if offsets.device != x.device:
        raise ValueError(
            f"{_CALL}: all tensors must be on one device; x is on {x.device}, offsets on {offsets.device}."
        )
    if offsets.shape == (groups,):
        raise ValueError(
            f"{_CALL}: offsets has {groups} entries for {groups} groups but must have {groups + 1}, beginning with 0. "
            "From the offs of torch.nn.functional.grouped_mm: torch.nn.functional.pad(offs, (1, 0))."
        )
    if offsets.shape != (groups + 1,):
        raise ValueError(
            f"{_CALL}: offsets is {_shape(offsets)} but must be ({groups + 1},) for the {groups} groups of weight: "
            "the first row of each group, and the row behind the last."
        )


def _check_adapter(name_A: str, name_B: str, lora_A: Tensor, lora_B: Tensor, weight: Tensor) -> None:
    """Check the shapes of one adapter."""
    groups, out_features, in_features = weight.shape
    if lora_A.dim() != 3 or lora_A.shape[0] != groups or lora_A.shape[2] != in_features:
        raise ValueError(
            f"{_CALL}: {name_A} is {_shape(lora_A)} but must be ({groups}, r, {in_features}) to match weight."
            + _hint(name_A, name_B, lora_A, lora_B, weight)
        )
    rank = lora_A.shape[1]
    if lora_B.shape != (groups, out_features, rank):
        raise ValueError(
            f"{_CALL}: {name_B} is {_shape(lora_B)} but must be ({groups}, {out_features}, {rank}): "
            "E x out_features x rank." + _hint(name_A, name_B, lora_A, lora_B, weight)
        )


def _hint(name_A: str, name_B: str, lora_A: Tensor, lora_B: Tensor, weight: Tensor) -> str:
    """Return a hint if adapters would fit when viewed as PEFT's, exchanged or transposed, else an empty string."""
    groups, out_features, in_features = weight.shape
    rank = lora_A.shape[1] if lora_A.dim() == 3 else lora_A.shape[:1].numel() // max(groups, 1)
    view_of_B = f"{name_B}.view({out_features}, {rank}, {groups}).permute(2, 0, 1)"
    if lora_A.shape == (rank * groups, in_features):
        return f" They seem to be PEFT's: pass {name_A}.view({groups}, {rank}, {in_features}) and {view_of_B}."
    if lora_B.shape == (out_features, rank * groups):
        return f" It seems to be PEFT's: pass {view_of_B}."
    if lora_A.dim() == lora_B.dim() == 3:
        if lora_B.shape[::2] == (groups, in_features) and lora_A.shape == (groups, out_features, lora_B.shape[1]):
            return f" {name_A} and {name_B} seem to be swapped: exchanged, they would fit."
        if lora_A.shape[:2] == (groups, in_features):
            return f" Did you pass {name_A} transposed? Use {name_A}.mT."
    if lora_B.dim() == 3 and lora_B.shape[::2] == (groups, out_features):
        return f" Did you pass {name_B} transposed? Use {name_B}.mT."
    return ""


def check_grouped_dtypes(
    x: Tensor, weight: Tensor, lora_As: Sequence[Tensor], lora_Bs: Sequence[Tensor], bias: Tensor | None, alone: bool
) -> None:
    """Check the mix of dtypes outside autocast: one dtype throughout, or fp32 adapters over a 16-bit base.

    Raises:
        TypeError: The mix is neither of the two.
    """
    dtype = x.dtype
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype != dtype:
            cast = "x: x.to(weight.dtype)" if name == "weight" else "bias: bias.to(x.dtype)"
            raise TypeError(f"{_CALL}: x is {_name(x)} but {name} is {_name(t)}. Use torch.autocast, or cast {cast}.")
    for names, *pair in zip(_names(len(lora_As), alone), lora_As, lora_Bs, strict=True):
        for name, t in zip(names, pair, strict=True):
            if t.dtype != dtype and not (t.dtype == torch.float32 and dtype in HALF):
                raise TypeError(
                    f"{_CALL}: x is {_name(x)} but {name} is {_name(t)}. Adapters must have x's dtype, or be float32 "
                    f"over a float16 or bfloat16 x. Use torch.autocast, or cast: {name}.to(x.dtype)."
                )


def _names(count: int, alone: bool) -> list[tuple[str, str]]:
    """Return the names of A and B of each adapter as the caller passed them."""
    return [("lora_A", "lora_B")] if alone else [(f"lora_A[{i}]", f"lora_B[{i}]") for i in range(count)]


def _shape(t: Tensor) -> str:
    return str(tuple(t.shape))


def _name(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")
