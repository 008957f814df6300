"""TMA descriptors of the operands of a settled launch, kept by address: Triton takes long to check new ones."""

from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lora_kernels.kernels import _launch
from lora_kernels.kernels._launch import Facts, thin_pitch, thin_rows
from lora_kernels.kernels._replay import call

__all__ = ["Describe", "keeps"]

_MOST = 8192  # descriptors kept in all: activations lie elsewhere with every allocation
_kept = _epoch = 0  # how many there are, and how often they were dropped


class _Address(NamedTuple):
    """As much of a tensor as a descriptor asks for; it keeps no memory alive."""

    pointer: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        """The address."""
        return self.pointer


class Describe:
    """Describes for TMA whatever tensor takes an operand's part in a launch; one that TMA cannot read is copied.

    Args:
        operand: Facts of the tensor, or of its transpose if that is what is to be described.
        block: Rows and columns of a tile.
        turned: Whether it is the transpose.
        keeps: Whether descriptors may outlive the tensor; the interpreter's have to hold it.
    """

    def __init__(self, operand: Facts, block: tuple[int, int], turned: bool, keeps: bool) -> None:
        self.copied, self.turned = not operand.rows_on_16_bytes(), turned
        self.keeps = keeps and not self.copied
        strides = (thin_pitch(operand.shape[1], operand.dtype), 1) if self.copied else operand.strides
        self.layout = list(operand.shape), list(strides), list(block)
        self.known: dict[int, TensorDescriptor] = {}
        self.epoch = _epoch

    def __call__(self, t: Tensor) -> TensorDescriptor:
        """Describe a tensor with the facts that were settled."""
        return call(self.now, t, by_address=not self.copied)

    def now(self, t: Tensor) -> TensorDescriptor:
        """Describe it, and leave no note of that."""
        if self.keeps:
            pointer = t.data_ptr()
            found = self.known.get(pointer)
            if found is None:
                self._make_room()
                found = self.known[pointer] = TensorDescriptor(_Address(pointer, t.dtype), *self.layout)
            return found
        if self.copied:  # only thin operands ever have to be
            t = t.t() if self.turned else t
            t = thin_rows(t, t.shape[1]).copy_(t)
        return TensorDescriptor(t, *self.layout)  # whoever launches holds a copy by this: nobody else does

    def _make_room(self) -> None:
        """Count one more; where there are too many, of all operands, each drops its own when it is next asked."""
        global _kept, _epoch
        if _kept >= _MOST:
            _kept, _epoch = 0, _epoch + 1
        if self.epoch != _epoch:
            self.known.clear()
            self.epoch = _epoch
        _kept += 1


def keeps(device: torch.device) -> bool:
    """Whether descriptors of a device's memory may be kept."""
    return device.type == "cuda" or _launch.imagined is not None
