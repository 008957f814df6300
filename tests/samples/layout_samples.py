"""Layouts of operands: transposed, sliced, expanded, at odd offsets."""

from dataclasses import replace

import torch

LAYOUTS = {
    "x transposed": lambda q: replace(q, x=q.x.t().contiguous().t()),
    "x sliced": lambda q: replace(q, x=_sliced(q.x)),
    "x at an odd offset": lambda q: replace(q, x=_offset(q.x, 3)),
    "x expanded": lambda q: replace(q, x=q.x[:1].expand_as(q.x)),
    "W transposed": lambda q: replace(q, weight=q.weight.t().contiguous().t()),
    "W sliced": lambda q: replace(q, weight=_sliced(q.weight)),
    "A transposed": lambda q: replace(q, lora_A=q.lora_A.t().contiguous().t()),
    "B sliced": lambda q: replace(q, lora_B=_sliced(q.lora_B)),
    "B transposed": lambda q: replace(q, lora_B=q.lora_B.t().contiguous().t()),
    "dy expanded": lambda q: replace(q, dy=q.dy[:1, :1].expand_as(q.dy)),
    "dy transposed": lambda q: replace(q, dy=q.dy.t().contiguous().t()),
    "dy sliced": lambda q: replace(q, dy=_sliced(q.dy)),
    "bias with a stride": lambda q: replace(q, bias=_sliced(q.bias[:, None])[:, 0]),
}


def _sliced(t):
    """The tensor inside a larger one full of NaN: rows apart, columns apart."""
    buffer = torch.full((2 * t.shape[0] + 1, 2 * t.shape[1] + 3), float("nan"), dtype=t.dtype, device=t.device)
    inside = buffer[1::2, 2 : 2 + 2 * t.shape[1] : 2]
    return inside.copy_(t)


def _offset(t, elements):
    buffer = torch.full((t.numel() + elements,), float("nan"), dtype=t.dtype, device=t.device)
    return buffer[elements:].view(t.shape).copy_(t)
