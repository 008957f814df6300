"""The layers that passes compute with, and the views and dtypes of their tensors."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lora_kernels.dropout import keep_scale

__all__ = ["Adapted", "Kept", "Layer", "Part", "Projection", "as_dtype", "by_layer", "readable", "rows"]

_EACH = 4  # weight, lora_A, lora_B, bias

# a tensor that is None where no gradient needs it: which are there follows from what is needed, and no checker sees how
Kept: TypeAlias = Tensor | Any
# a projection that was seen to have an adapter: it has A and B
Adapted: TypeAlias = Any


class Projection(NamedTuple):
    """One projection: what `lora_linear` takes but x.

    Attributes:
        weight: W, `[out, in]`.
        lora_A: A, `[r, in]`, or None for no adapter.
        lora_B: B, `[out, r]`, or None.
        bias: `[out]` or None.
        scaling: Multiplies the low-rank term.
        dropout_p: Drop probability, below 1.
    """

    weight: Tensor
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    bias: Tensor | None = None
    scaling: float = 1.0
    dropout_p: float = 0.0

    @property
    def alpha(self) -> float:
        """What the accumulators of both shrinks are multiplied by."""
        return self.scaling * keep_scale(self.dropout_p)


class Part(NamedTuple):
    """What backward needs of a projection that a gradient comes back to, as far as gradients are needed.

    Attributes:
        dy: `[M, out]`.
        weight: W, where dx is needed.
        lora_A: A, where dx is needed.
        lora_B: B, where dx or dA is needed.
        s: `[M, r]`, where dB is needed.
        keep: The backend's mask, where there is one and dx or dA is needed.
        alpha: scaling · keep_scale.
        dtypes: Those that dA and dB come in.
        need_A: Whether dA is needed.
        into: Gradients to which dA and dB are added, which then are not returned, or None.
    """

    dy: Tensor
    weight: Kept
    lora_A: Kept
    lora_B: Kept
    s: Kept
    keep: Tensor | None
    alpha: float
    dtypes: tuple[torch.dtype, torch.dtype]
    need_A: bool
    into: tuple[Tensor | None, Tensor | None] = (None, None)


class Layer(NamedTuple):
    """What backward needs of one layer, as far as gradients are needed.

    Attributes:
        weight: W, where the gradient of its input is needed.
        lora_A: A, likewise.
        lora_B: B, where that or dA is needed.
        s: `[M, r]`, where dB is needed.
        keep: The backend's mask, where there is one and the gradient of the input or dA is needed.
        alpha: scaling · keep_scale.
        dtypes: Those that dA and dB come in, None without an adapter.
        needs: Whether the gradients of weight, lora_A, lora_B and bias are needed.
        into: Gradients to which dA and dB are added, which then are not returned, or None.
    """

    weight: Kept
    lora_A: Kept
    lora_B: Kept
    s: Kept
    keep: Tensor | None
    alpha: float
    dtypes: tuple[torch.dtype, torch.dtype] | Any
    needs: Sequence[bool]
    into: tuple[Tensor | None, Tensor | None] = (None, None)


def by_layer(flat: Sequence) -> list[Sequence]:
    """What belongs to each layer's weight, lora_A, lora_B and bias, of a flat sequence."""
    return [flat[i : i + _EACH] for i in range(0, len(flat), _EACH)]


def readable(adapter: Tensor, dtype: torch.dtype) -> Tensor:
    """An adapter that contractions in `dtype` can read: of that, or in fp32, which they round as they read it."""
    return adapter if adapter.dtype in (dtype, torch.float32) else adapter.to(dtype)


def as_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    """T in a dtype; t itself where it has it."""
    return t if t.dtype == dtype else t.to(dtype)


def rows(t: Tensor) -> Tensor:
    """View `[*, features]` as `[M, features]`; copies where no view exists."""
    # not Size.numel, which makes a number of a compiler's symbol
    return t if t.dim() == 2 else t.reshape(math.prod(t.shape[:-1]), t.shape[-1])
