"""Types for the layers of passes, and helpers for the views and dtypes of their tensors."""

import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lora_kernels import plan
from lora_kernels.dropout import keep_scale
from lora_kernels.quantized import QuantizedWeight

__all__ = [
    "GIVEN", "SAVED", "SAVED_WITH_BIAS", "Adapted", "Kept", "Part", "Projection", "SavedLayer", "Weight", "as_dtype",
    "by_layer", "dense", "readable", "rows", "tensors_to_save",
]  # fmt: skip

# Tensors given for each layer: weight, lora_A, lora_B and bias. A type checker can slice by a Final number.
GIVEN: Final = 4

# A tensor, or None if no gradient needs the tensor. `Any`, because no type checker can follow which ones are needed.
Kept: TypeAlias = Tensor | Any
# W as callers may give it.
Weight: TypeAlias = Tensor | QuantizedWeight
# A projection with an adapter, that is with A and B, as a check has shown.
Adapted: TypeAlias = Any


class Projection(NamedTuple):
    """One projection: the arguments of `lora_linear` without x.

    Attributes:
        weight: W, `[out, in]`, a tensor or a `QuantizedWeight`.
        lora_A: A, `[r, in]`, or None for no adapter.
        lora_B: B, `[out, r]`, or None.
        bias: `[out]` or None.
        scaling: Multiplies the low-rank term.
        dropout_p: Drop probability, below 1.
    """

    weight: Weight
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    bias: Tensor | None = None
    scaling: float = 1.0
    dropout_p: float = 0.0

    @property
    def alpha(self) -> float:
        """Return the factor on the accumulators of both shrinks."""
        return self.scaling * keep_scale(self.dropout_p)

    def tensors_and_values(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Return the tensors, and the values."""
        return self[:GIVEN], self[GIVEN:]


class Part(NamedTuple):
    """The tensors of one projection that backward needs, for a projection that has a dy.

    Attributes:
        dy: `[M, out]`.
        weight: As in `SavedLayer`; so are lora_A, lora_B, s and keep.
        into_A: A gradient to add dA to instead of returning it, or None.
        into_B: A gradient to add dB to, or None.
        alpha: scaling · keep_scale.
        dtypes: The dtypes of dA and dB.
        need_A: Whether dA is needed.
    """

    dy: Tensor
    weight: Kept
    lora_A: Kept
    lora_B: Kept
    s: Kept
    keep: Tensor | None
    into_A: Tensor | None
    into_B: Tensor | None
    alpha: float
    dtypes: tuple[torch.dtype, torch.dtype]
    need_A: bool

    def tensors_and_values(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Return the tensors, and the values."""
        return self[:_OF_PART], self[_OF_PART:]


class SavedLayer(NamedTuple):
    """The tensors of one layer that backward needs.

    Attributes:
        weight: W, if the gradient of the layer's input is needed.
        lora_A: A, if the gradient of the layer's input is needed.
        lora_B: B, if the gradient of the layer's input or dA is needed.
        s: `[M, r]`, if dB is needed.
        keep: The backend's mask, if there is a mask and the gradient of the layer's input or dA is needed.
        bias: The bias, if the outputs are computed again.
        into_A: A gradient to add dA to instead of returning it, or None.
        into_B: A gradient to add dB to, or None.
        alpha: scaling · keep_scale.
        dtypes: The dtypes of dA and dB, None without an adapter.
        needs: Whether the gradients of weight, lora_A, lora_B and bias are needed.
    """

    weight: Kept
    lora_A: Kept
    lora_B: Kept
    s: Kept
    keep: Tensor | None
    bias: Tensor | None
    into_A: Tensor | None
    into_B: Tensor | None
    alpha: float
    dtypes: tuple[torch.dtype, torch.dtype] | Any
    needs: Sequence[bool]

    def tensors_and_values(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Return the tensors, and the values."""
        return self[:_OF_LAYER], self[_OF_LAYER:]


# Tensors saved for each layer: weight, lora_A, lora_B, s and keep. To compute outputs again also takes the bias.
SAVED = SavedLayer._fields.index("bias")
SAVED_WITH_BIAS = SAVED + 1
# The tensors of a part and of a layer come before alpha.
_OF_PART = Part._fields.index("alpha")
_OF_LAYER = SavedLayer._fields.index("alpha")


def by_layer(flat: Sequence, each: int = GIVEN) -> list[Sequence]:
    """Split a flat sequence into `each` entries per layer, by default for weight, lora_A, lora_B and bias."""
    return [flat[i : i + each] for i in range(0, len(flat), each)]


def tensors_to_save(
    weight: Weight | None, lora_A: Tensor | None, lora_B: Tensor | None, s: Tensor | None, keep: Tensor | None,
    need_x: bool, need_A: bool, need_B: bool, again: bool = False,
) -> tuple[Kept, Kept, Kept, Kept, Kept]:  # fmt: skip
    """Select the tensors to save for one layer, by the needed gradients of the layer's input, of A and of B.

    With `again`, also select the tensors from which backward computes the output again.
    """
    need_ds = need_x or need_A
    return (
        weight if need_x or again else None, lora_A if need_x else None, lora_B if need_ds or again else None,
        s if need_B or again else None, keep if need_ds else None,
    )  # fmt: skip


def readable(adapter: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an adapter in `dtype` or in fp32, which contractions round to `dtype` as they read."""
    return adapter if adapter.dtype in (dtype, torch.float32) else adapter.to(dtype)


def as_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return t in `dtype`; return t itself if that is its dtype."""
    return t if t.dtype == dtype else t.to(dtype)


def dense(steps: plan.Steps, weight: Any, dtype: torch.dtype, place: int = 0) -> Tensor:
    """Return W as a tensor: a `QuantizedWeight` is dequantised into a new one, which the pass drops after its product.

    Args:
        steps: The steps of the pass.
        weight: W, a tensor or a `QuantizedWeight`.
        dtype: The dtype of a dequantised W.
        place: Place of W among the weights of the pass.
    """
    if isinstance(weight, Tensor):
        return weight
    return steps.ops.dequantize(weight, dtype, slot=steps["W", place])


def rows(t: Tensor) -> Tensor:
    """View `[*, features]` as `[M, features]`; copy if no view exists."""
    # Do not use Size.numel, because it turns a compiler's symbol into a number.
    return t if t.dim() == 2 else t.reshape(math.prod(t.shape[:-1]), t.shape[-1])
