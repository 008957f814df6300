"""Check the parts of a quantised weight once, when the weight is made; nothing below checks them again."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lora_kernels.constants import DTYPES

__all__ = ["check", "check_dequantize"]

FOUR_BITS = ("nf4", "fp4")
_FORMATS = (*FOUR_BITS, "fp8", "int8")
_STORED = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
_SCALES = {
    "fp8": (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu), "int8": (torch.float32,),
}  # fmt: skip
# bitsandbytes' quant_storage, and bytes under other names
_STORAGE = (torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32)
_NESTED_BLOCK = 256
_BACKENDS = ("auto", "triton", "torch")
# What the constructors of 8-bit weights call `packed` and `scale`
_ARGUMENTS = {"fp8": ("packed (weight)", "scale (weight_scale_inv)"), "int8": ("packed (CB)", "scale (SCB)")}


def check(weight: Any) -> None:
    """Check the fields of a `QuantizedWeight`.

    Raises:
        TypeError: A tensor or a number is of the wrong kind or dtype, or a tensor is distributed.
        ValueError: Sizes or devices do not fit, a tensor is not contiguous, or a tensor requires grad.
    """
    if weight.format not in _FORMATS:
        raise ValueError(f"QuantizedWeight: format={weight.format!r} is not one of: {', '.join(_FORMATS)}.")
    if weight.dtype not in DTYPES.values():
        raise TypeError(f"QuantizedWeight: dtype is {weight.dtype}; supported: bfloat16, float16, float32.")
    shape = weight.shape
    if not isinstance(shape, (tuple, list)):
        raise TypeError(f"QuantizedWeight: shape must be (out_features, in_features), got {shape!r}.")
    if len(shape) != 2 or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(f"QuantizedWeight: shape must be (out_features, in_features), got {tuple(shape)}.")
    if weight.nested is not None and not hasattr(weight.nested, "blocksize"):
        raise TypeError(
            "QuantizedWeight: nested must be a lora_kernels.quantized.Nested(code, absmax, offset), "
            f"got {type(weight.nested).__name__}."
        )
    _check_tensors(_named(weight), weight.packed)
    if weight.format in FOUR_BITS:
        _check_four_bits(weight)
    else:
        _check_eight_bits(weight)


def check_dequantize(dtype: Any, backend: Any) -> None:
    """Check the arguments of `QuantizedWeight.dequantize`.

    Raises:
        TypeError: `dtype` is not one of those that W can be computed in.
        ValueError: `backend` is not a known name.
    """
    if dtype not in (*DTYPES.values(), torch.float64):
        raise TypeError(
            f"QuantizedWeight.dequantize: dtype is {dtype!r}; supported: bfloat16, float16, float32 (float64 with the "
            'backend "torch").'
        )
    if backend not in _BACKENDS:
        raise ValueError(f"QuantizedWeight.dequantize: backend={backend!r} is not one of: {', '.join(_BACKENDS)}.")


def _named(weight: Any) -> dict[str, Tensor]:
    """Return the tensors of a weight by their names."""
    stored, scales = _ARGUMENTS.get(weight.format, ("packed", "scale (absmax)"))
    named = {stored: weight.packed, scales: weight.scale}
    if weight.code is not None:
        named["code"] = weight.code
    if weight.nested is not None:
        named |= {f"nested.{name}": t for name, t in zip(("code", "absmax", "offset"), weight.nested, strict=False)}
    return named


def _check_tensors(named: dict[str, Any], packed: Any) -> None:
    device = getattr(packed, "device", None)
    for name, t in named.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"QuantizedWeight: {name} must be a tensor, got {type(t).__name__}.")
        if is_traceable_wrapper_subclass(t):
            raise TypeError(
                f"QuantizedWeight: {name} is a {type(t).__name__}, which wraps other tensors; a quantised weight must "
                "be whole and on one device. Gather a sharded one first."
            )
        if t.requires_grad:
            raise ValueError(
                f"QuantizedWeight: {name} requires grad; a quantised weight is frozen: requires_grad_(False)."
            )
        if not t.is_contiguous():
            raise ValueError(
                f"QuantizedWeight: {name} must be contiguous, got shape {tuple(t.shape)} with strides {t.stride()}."
            )
        if t.device != device:
            raise ValueError(
                f"QuantizedWeight: all tensors must be on one device; packed is on {device}, {name} on {t.device}."
            )


def _check_four_bits(weight: Any) -> None:
    out_features, in_features = weight.shape
    numel, block, packed, nested = out_features * in_features, weight.block, weight.packed, weight.nested
    if packed.dtype not in _STORAGE:
        raise TypeError(f"QuantizedWeight: packed has dtype {packed.dtype}; supported: {_names(_STORAGE)}.")
    have, need, unit = packed.numel() * packed.itemsize, (numel + 1) // 2, packed.itemsize
    # the last element of a wider storage may be half empty
    if not need <= have < need + unit:
        raise ValueError(
            f"QuantizedWeight: packed has {have} bytes and must have {need} for shape {tuple(weight.shape)}: "
            "two weights a byte."
        )
    if not isinstance(block, int) or isinstance(block, bool):
        raise TypeError(f"QuantizedWeight: block must be one int for {weight.format}, got {block!r}.")
    if block < 2 or block % 2:
        raise ValueError(f"QuantizedWeight: block={block} must be an even number of weights, because a byte holds two.")
    if weight.code is None:
        raise ValueError(f"QuantizedWeight: {weight.format} needs code, the 16 values of a nibble.")
    _check_one("code", weight.code, torch.float32, 16)
    blocks = -(-numel // block)
    _check_one("scale (absmax)", weight.scale, torch.float32 if nested is None else torch.uint8, blocks)
    if nested is not None:
        if nested.blocksize != _NESTED_BLOCK:
            raise ValueError(f"QuantizedWeight: nested.blocksize is {nested.blocksize}; supported: {_NESTED_BLOCK}.")
        _check_one("nested.code", nested.code, torch.float32, 256)
        _check_one("nested.absmax", nested.absmax, torch.float32, -(-blocks // _NESTED_BLOCK))
        _check_one("nested.offset", nested.offset, torch.float32, 1)


def _check_eight_bits(weight: Any) -> None:
    kind, packed, scale, block = weight.format, weight.packed, weight.scale, weight.block
    stored, scales = _ARGUMENTS[kind]
    if weight.code is not None or weight.nested is not None:
        raise ValueError(f"QuantizedWeight: {kind} has neither code nor nested.")
    if packed.dtype != _STORED[kind]:
        raise TypeError(
            f"QuantizedWeight: {stored} has dtype {packed.dtype}; {kind} is stored in {_names([_STORED[kind]])}."
        )
    if packed.shape != weight.shape:
        raise ValueError(f"QuantizedWeight: {stored} is {tuple(packed.shape)} and shape is {tuple(weight.shape)}.")
    if scale.dtype not in _SCALES[kind]:
        raise TypeError(f"QuantizedWeight: {scales} has dtype {scale.dtype}; supported: {_names(_SCALES[kind])}.")
    if not (isinstance(block, tuple) and len(block) == 2 and all(isinstance(n, int) for n in block)):
        raise TypeError(f"QuantizedWeight: block must be (rows, columns) for {kind}, got {block!r}.")
    if min(block) < 1:
        raise ValueError(f"QuantizedWeight: block={block} must be at least (1, 1).")
    grid = tuple(-(-size // part) for size, part in zip(weight.shape, block, strict=True))
    # a grid of one column, or one row, may have any shape that is read in the same order
    fits = scale.shape == grid or (1 in grid and scale.numel() == grid[0] * grid[1])
    if not fits and 0 not in weight.shape:
        raise ValueError(
            f"QuantizedWeight: {scales} is {tuple(scale.shape)} but must be {grid}: one number for each block of "
            f"{block[0]} x {block[1]} of a weight {tuple(weight.shape)}."
        )


def _check_one(name: str, t: Tensor, dtype: torch.dtype, numel: int) -> None:
    if t.dtype != dtype:
        raise TypeError(f"QuantizedWeight: {name} has dtype {t.dtype}; it must be {dtype}.")
    if t.numel() != numel:
        raise ValueError(f"QuantizedWeight: {name} has {t.numel()} elements and must have {numel}.")


def _names(dtypes: Any) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
