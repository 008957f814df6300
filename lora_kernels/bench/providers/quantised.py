"""Quantised weights as other libraries read them: bitsandbytes' layer and its dequantisation, and FP8 by operators.

Every provider of a case reads the same stored tensors.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.bench.cost import stored as stored_cost
from lora_kernels.quantized import QuantizedWeight

__all__ = ["FORMATS", "cost_of", "dequantiser", "linear4bit", "maker"]

# What `bench --quantise` takes. bitsandbytes' int8 layers quantise x as well, so they compute something else.
FORMATS = ("nf4", "fp4", "fp8")


def linear4bit(weight: QuantizedWeight, bias: Tensor | None = None) -> nn.Module:
    """Build bitsandbytes' `Linear4bit` around a stored weight; the layer computes in the weight's dtype.

    Raises:
        ImportError: bitsandbytes is not installed.
        ValueError: The weight is not NF4 or FP4.
    """
    if weight.code is None:
        raise ValueError(f"bitsandbytes' Linear4bit holds nf4 and fp4, not {weight.format}")
    bnb = importlib.import_module("bitsandbytes")
    layer = bnb.nn.Linear4bit(
        weight.in_features, weight.out_features, bias is not None, compute_dtype=weight.dtype,
        compress_statistics=weight.nested is not None, quant_type=weight.format, device="meta",
    )  # fmt: skip
    layer.weight = bnb.nn.Params4bit(
        weight.packed, quant_state=_state(weight), blocksize=weight.block, quant_type=weight.format,
        compress_statistics=weight.nested is not None, bnb_quantized=True,
    )  # fmt: skip
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def dequantiser(weight: Any, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Return a function that makes W in `dtype` as a library without this package does; a dense W is returned as it is.

    NF4 and FP4 take bitsandbytes' kernels, FP8 PyTorch's operators.
    """
    if not isinstance(weight, QuantizedWeight):
        return lambda: weight
    if weight.code is None:
        return lambda: _multiply_blocks(weight, dtype)
    functional = importlib.import_module("bitsandbytes.functional")
    state = _state(weight, dtype)
    return lambda: functional.dequantize_4bit(weight.packed, state)


def maker(weight: QuantizedWeight) -> str:
    """Return who makes W in `dequantiser`, as `cost.stored.launches` names them."""
    return "operators" if weight.code is None else "bitsandbytes"


def cost_of(weight: QuantizedWeight, by: str, element: int) -> tuple[int, ...]:
    """Return the bytes of each launch that makes W, of `element` bytes each, once."""
    return stored_cost.launches(weight.format, *weight.shape, by, element, weight.nested is not None)


def _state(weight: QuantizedWeight, dtype: torch.dtype | None = None) -> Any:
    """Return bitsandbytes' description of a 4-bit weight, which dequantises into `dtype` or the weight's own."""
    kind, nested = importlib.import_module("bitsandbytes.functional").QuantState, weight.nested
    inner, offset = None, None
    if nested is not None:
        inner = kind(nested.absmax, code=nested.code, blocksize=nested.blocksize, dtype=torch.float32)
        offset = nested.offset
    return kind(
        weight.scale, weight.shape, weight.code, weight.block, weight.format, dtype or weight.dtype, offset, inner
    )


def _multiply_blocks(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Return packed · scale by PyTorch's operators."""
    (out_features, in_features), (rows, columns) = weight.shape, weight.block  # type: ignore[misc]
    values = weight.packed.to(torch.float32)
    if out_features % rows == in_features % columns == 0:
        blocks = values.view(out_features // rows, rows, in_features // columns, columns)
        blocks.mul_(weight.scale.view(len(blocks), 1, -1, 1))
    else:
        each = weight.scale.view(-(-out_features // rows), -1).repeat_interleave(rows, 0)[:out_features]
        values.mul_(each.repeat_interleave(columns, 1)[:, :in_features])
    return values.to(dtype)
