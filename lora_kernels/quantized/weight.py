"""A frozen weight in 4 or 8 bits: the tensors as they are stored, and the numbers that say how to read them."""

import dataclasses
import functools
import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.quantized import sources
from lora_kernels.quantized.checks import FOUR_BITS, check, check_dequantize

__all__ = ["Nested", "QuantizedWeight", "count_tables", "shape_of_form"]


class Nested(NamedTuple):
    """The parts of scales that are quantised themselves: absmax[b] = code[scale[b]] · absmax[b // blocksize] + offset.

    Attributes:
        code: The 256 values of a byte, fp32.
        absmax: `[ceil(scales / blocksize)]`, fp32.
        offset: One fp32 number on the weight's device, so that reading needs no synchronisation.
        blocksize: Scales of a block: 256, the only number that bitsandbytes writes.
    """

    code: Tensor
    absmax: Tensor
    offset: Tensor
    blocksize: int = 256


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A frozen W `[out, in]` as it is stored.

        nf4, fp4    W = round(code[nibble] · absmax[i // block])        i = n · in + k, the even i in the high nibble
        fp8         W = round(packed · scale[n // rows, k // columns])  e4m3
        int8        W = round(packed · scale[n] · (1 / 127))

    Every product is one of fp32; `round` is the one rounding to the dtype that the caller wants. Two weights are equal
    only if they are the same object. The tensors are kept as they are given, a Parameter as that Parameter.

    Attributes:
        format: "nf4", "fp4", "fp8" or "int8".
        packed: The stored tensor. 4 bits: contiguous, of any storage dtype, two weights a byte. fp8: float8_e4m3fn
            `[out, in]`. int8: int8 `[out, in]`.
        shape: (out_features, in_features).
        dtype: What `dequantize` returns by default: bfloat16, float16 or float32.
        scale: 4 bits: absmax, one number for each block, fp32, or uint8 with `nested`. fp8: one number for each block,
            in fp32, bfloat16, float16 or float8_e8m0fnu. int8: fp32 `[out]`, the greatest absolute values of the rows.
        block: Weights for one number of `scale`: 4 bits: a length of W read row by row, even, and blocks go on from one
            row to the next. fp8 and int8: (rows, columns).
        code: 4 bits: the 16 values of a nibble, fp32.
        nested: How to read `scale`, if that is uint8.

    Raises:
        TypeError: A tensor or a number is of the wrong kind or dtype, or a tensor is distributed.
        ValueError: Sizes or devices do not fit, a tensor is not contiguous, or a tensor requires grad.
    """

    format: str
    packed: Tensor
    shape: torch.Size
    dtype: torch.dtype
    scale: Tensor
    block: int | tuple[int, int]
    code: Tensor | None = None
    nested: Nested | None = None

    def __post_init__(self) -> None:
        check(self)
        object.__setattr__(self, "shape", torch.Size(self.shape))

    @classmethod
    def from_bitsandbytes(cls, layer: Any) -> "QuantizedWeight":
        """Take the weight of a bitsandbytes `Linear4bit`, or its `Params4bit`, as it is.

        Args:
            layer: A layer whose weight is quantised in 4 bits, or the weight.

        Raises:
            TypeError: The layer has no such weight; LLM.int8 weights are refused, because bitsandbytes quantises the
                inputs of such a layer as well.
            ValueError: The weight is not quantised yet, was repacked for a CPU, is stored as `[in, out]`, or has a
                state that bitsandbytes wrote before version 0.43 or that does not fit the weight.
        """
        # Each look at a `Params4bit` would else go through its `__torch_function__`, which costs more than all checks.
        with torch._C.DisableTorchFunctionSubclass():
            return cls(**sources.of_bitsandbytes(layer), nested=sources.nested_of_bitsandbytes(layer, Nested))

    @classmethod
    def from_fp8(
        cls, weight: Tensor, weight_scale_inv: Tensor, block: Sequence[int] | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> "QuantizedWeight":  # fmt: skip
        """Take an FP8 weight and its scales, as transformers' `FP8Linear` has them: W = weight · weight_scale_inv.

        Args:
            weight: float8_e4m3fn, `[out, in]`.
            weight_scale_inv: One number; a number for each row, `[out]` or `[out, 1]`; or a number for each block,
                `[ceil(out / rows), ceil(in / columns)]`. In fp32, bfloat16, float16 or float8_e8m0fnu.
            block: (rows, columns) of a block, as `FP8Linear.block_size`; None to tell by the shape of
                `weight_scale_inv`, with blocks of 128 x 128.
            dtype: What `dequantize` returns by default.

        Raises:
            TypeError: A dtype is none of these.
            ValueError: The shapes do not fit.
        """
        return cls(**sources.of_fp8(weight, weight_scale_inv, block), dtype=dtype)

    @classmethod
    def from_int8(cls, CB: Tensor, SCB: Tensor, dtype: torch.dtype = torch.bfloat16) -> "QuantizedWeight":
        """Take an int8 weight with a scale for each row, W = CB · SCB / 127, in the words of bitsandbytes' LLM.int8.

        bitsandbytes quantises the inputs of such a layer as well, so that its outputs differ from x Wᵀ.

        Args:
            CB: int8, `[out, in]`.
            SCB: fp32, `[out]`: the greatest absolute value of each row.
            dtype: What `dequantize` returns by default.

        Raises:
            TypeError: A dtype is none of these.
            ValueError: The shapes do not fit.
        """
        return cls(**sources.of_int8(CB, SCB), dtype=dtype)

    @classmethod
    def nf4(
        cls, packed: Tensor, absmax: Tensor, *, shape: Sequence[int], code: Tensor | None = None, blocksize: int = 64,
        nested: Nested | None = None, dtype: torch.dtype = torch.bfloat16,
    ) -> "QuantizedWeight":  # fmt: skip
        """Take an NF4 weight in parts.

        Args:
            packed: Two weights a byte, the first in the high nibble, in any storage dtype.
            absmax: As `scale`.
            shape: (out_features, in_features).
            code: The 16 values of a nibble, fp32; None for those of the QLoRA paper.
            blocksize: Weights for one number of `absmax`.
            nested: As in the class.
            dtype: What `dequantize` returns by default.

        Raises:
            TypeError: As the class.
            ValueError: As the class.
        """
        code = sources.nf4_code(getattr(packed, "device", None)) if code is None else code
        return cls("nf4", packed, shape, dtype, absmax, blocksize, code, nested)  # type: ignore[arg-type]

    @property
    def out_features(self) -> int:
        """Return the number of rows of W."""
        return self.shape[0]

    @property
    def in_features(self) -> int:
        """Return the number of columns of W."""
        return self.shape[1]

    @property
    def device(self) -> torch.device:
        """Return the device of all tensors."""
        # `scale` is a plain tensor; a look at a `Params4bit` costs much more.
        return self.scale.device

    @property
    def requires_grad(self) -> bool:
        """Return False: a quantised weight is frozen."""
        return False

    @property
    def form(self) -> str:
        """Return all that is no tensor as a string, from which `from_form` makes the weight again."""
        block, nested = self.block, self.nested
        numbers = *self.shape, *(block if isinstance(block, tuple) else (block,))
        inner = () if nested is None else ("nested", nested.blocksize)
        return " ".join(map(str, (self.format, str(self.dtype).removeprefix("torch."), *numbers, *inner)))

    @staticmethod
    def from_form(form: str, tensors: Sequence[Tensor]) -> "QuantizedWeight":
        """Make a weight from its `form` and from tensors in the order of `tensors()`; nothing is checked again."""
        return _template(form).with_tensors(tensors)

    def tensors_and_values(self) -> tuple[tuple[Tensor, ...], str]:
        """Return the tensors, and the values."""
        return self.tensors(), self.form

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors: packed, scale, and if there are any, code and nested's code, absmax and offset."""
        code = () if self.code is None else (self.code,)
        return (self.packed, self.scale, *code, *(() if self.nested is None else self.nested[:3]))

    def with_tensors(self, tensors: Sequence[Tensor]) -> "QuantizedWeight":
        """Return the same weight with other tensors, in the order of `tensors()`; nothing is checked again."""
        packed, scale, *rest = tensors
        other = object.__new__(QuantizedWeight)
        code = rest[0] if rest else None
        nested = None if self.nested is None else Nested(rest[1], rest[2], rest[3], self.nested.blocksize)
        for name, value in {**self.__dict__, "packed": packed, "scale": scale, "code": code, "nested": nested}.items():
            object.__setattr__(other, name, value)
        return other

    def dequantize(self, dtype: torch.dtype | None = None, backend: str = "auto") -> Tensor:
        """Compute W, contiguous `[out, in]`, in `dtype` or in the weight's own.

        Args:
            dtype: bfloat16, float16 or float32; float64 with "torch".
            backend: "auto", "triton" or "torch", as in `lora_linear`.

        Raises:
            TypeError: `dtype` is none of these, or "triton" was asked for and has no such dtype.
            ValueError: `backend` is none of these.
            RuntimeError: "triton" was asked for and cannot run.
        """
        # by name, because the plan stands above the weights
        plan = importlib.import_module("lora_kernels.plan.backend")
        dtype = self.dtype if dtype is None else dtype
        check_dequantize(dtype, backend)
        chosen = plan.choose(self.device, dtype, 1, 0 in self.shape, backend, "QuantizedWeight.dequantize")
        return plan.contractions(chosen).dequantize(self, dtype)


def count_tables(form: str) -> int:
    """Return the number of a weight's tensors beside `packed`, by its form."""
    if form.partition(" ")[0] not in FOUR_BITS:
        return 1
    return 5 if " nested " in form else 2


def shape_of_form(form: str) -> torch.Size:
    """Return a weight's shape, by its form."""
    return _template(form).shape


@functools.lru_cache(maxsize=4096)
def _template(form: str) -> QuantizedWeight:
    """Return a weight with the numbers of a form and without tensors."""
    kind, dtype, *rest = form.split()
    size, _, nested = " ".join(rest).partition(" nested ")
    out_features, in_features, *block = map(int, size.split())
    template = object.__new__(QuantizedWeight)
    shape = torch.Size((out_features, in_features))
    fields = {
        "format": kind, "packed": None, "shape": shape, "dtype": getattr(torch, dtype), "scale": None,
        "block": tuple(block) if block[1:] else block[0], "code": None,
        "nested": Nested(None, None, None, int(nested)) if nested else None,  # type: ignore[arg-type]
    }  # fmt: skip
    for name, value in fields.items():
        object.__setattr__(template, name, value)
    return template
