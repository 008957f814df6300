"""What the tests of repeated passes share."""

import torch

from lora_kernels.kernels.repeat import _AS_WRITTEN

WRITTEN = _AS_WRITTEN + 1  # passes of a kind that run, the one that is noted among them


def flat(shapes, order, gap=4):
    """Tensors of these shapes in one buffer, in an order of places."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    buffer, starts, at = torch.randn(sum(sizes) + gap * len(sizes)), {}, 0
    for i in order:
        starts[i], at = at, at + sizes[i] + gap
    return [buffer[starts[i] : starts[i] + sizes[i]].view(shape) for i, shape in enumerate(shapes)]
