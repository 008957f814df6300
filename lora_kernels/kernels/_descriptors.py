"""TMA descriptors of a settled launch's operands, cached by address because Triton takes long to check new ones."""

from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lora_kernels.kernels import _launch
from lora_kernels.kernels._launch import Facts, thin_pitch

__all__ = ["Describe", "keeps"]

# Upper limit of cached descriptors. The cache needs one, because activations get a new address at every allocation.
_MOST = 8192
# Number of cached descriptors, and number of times that the cache was dropped.
_kept = _epoch = 0


class _Address(NamedTuple):
    """The part of a tensor's interface that a descriptor reads; an `_Address` keeps no memory alive."""

    pointer: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        """Return the address."""
        return self.pointer


class Describe:
    """Makes the TMA descriptor of the tensor that each call passes for an operand; copies a tensor TMA cannot read.

    Args:
        operand: Facts of the tensor, or of its transpose with `turned`.
        block: Rows and columns of a tile.
        turned: Whether the descriptor describes the transpose of the tensor.
        keeps: Whether a descriptor may outlive its tensor. The interpreter's descriptors have to hold the tensor.
        stack: Number of matrices and elements from one to the next, for a stack of which `operand` and `block` tell one
            matrix; None for a matrix.
    """

    def __init__(
        self, operand: Facts, block: tuple[int, int], turned: bool, keeps: bool, stack: tuple[int, int] | None = None
    ) -> None:
        self.copied, self.turned = not operand.rows_on_16_bytes(), turned
        self.keeps = keeps and not self.copied
        shape, strides, block = operand.shape, operand.strides, tuple(block)
        if self.copied:
            strides = thin_pitch(shape[1], operand.dtype), 1
        if stack:
            number, pitch = stack
            pitch = shape[0] * strides[0] if self.copied else pitch
            shape, strides, block = (number, *shape), (pitch, *strides), (1, *block)
        self.layout = list(shape), list(strides), list(block)
        self.known: dict[int, TensorDescriptor] = {}
        self.epoch = _epoch

    def __call__(self, t: Tensor) -> TensorDescriptor:
        """Describe a tensor that has the settled facts."""
        if self.keeps:
            pointer = t.data_ptr()
            found = self.known.get(pointer)
            if found is None:
                self._make_room()
                found = self.known[pointer] = TensorDescriptor(_Address(pointer, t.dtype), *self.layout)
            return found
        if self.copied:
            # Only thin operands ever need a copy.
            t = t.mT if self.turned else t
            shape, strides, _ = self.layout
            rows = t.new_empty(*shape[:-1], strides[-2])
            t = rows[..., : shape[-1]].copy_(t)
        # The descriptor holds the only reference to a copy, so the launcher keeps the copy alive by the descriptor.
        return TensorDescriptor(t, *self.layout)

    def _make_room(self) -> None:
        """Count one more descriptor; past `_MOST` of all operands, each operand drops its own at its next new one."""
        global _kept, _epoch
        if _kept >= _MOST:
            _kept, _epoch = 0, _epoch + 1
        if self.epoch != _epoch:
            self.known.clear()
            self.epoch = _epoch
        _kept += 1


def keeps(device: torch.device) -> bool:
    """Return whether descriptors of a device's memory may be cached."""
    return device.type == "cuda" or _launch.imagined is not None
