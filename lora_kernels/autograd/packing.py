"""Layers that belong together as arguments of one operator: what `projections` and `mlp` have in common.

PyTorch's autograd for operators sees the tensors of a list, but none of a list that holds a None. So operators take
those that are there in one list, and their places among all: layer i has `each` of them, from i · each on. The s of
layers that read the same x are one result, side by side: results share no memory, and kernels leave them in one buffer.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels import plan
from lora_kernels.autograd.common import plain_scaling
from lora_kernels.autograd.noise import draw_noise
from lora_kernels.passes.layer import Projection

__all__ = [
    "GIVEN", "columns", "draw", "entries", "forward_flops", "gradients_of", "needed", "pack", "pitches", "prepared",
    "ranks", "side_by_side", "unpack", "widest",
]  # fmt: skip

GIVEN = 4  # weight, lora_A, lora_B, bias


def prepared(
    x: Tensor, weights: Sequence[Tensor], lora_As: Sequence[Tensor | None], lora_Bs: Sequence[Tensor | None],
    biases: Sequence[Tensor | None], scalings: Sequence[float], backend: str,
) -> tuple[str, list[Tensor], list[int], list[float]]:  # fmt: skip
    """Choose a backend for layers of one call; pack their tensors, with scalings that are plain numbers."""
    # compiled in, where all else may vary
    rank = max((int(lora_A.shape[0]) for lora_A in lora_As if lora_A is not None), default=1)
    empty = x.numel() == 0 or any(weight.shape[0] == 0 for weight in weights)
    backend = plan.choose(x.device, x.dtype, rank, empty, backend)
    lora_As, numbers = list(lora_As), [1.0] * len(weights)
    for i, lora_A in enumerate(lora_As):
        if lora_A is not None:
            lora_As[i], numbers[i] = plain_scaling(lora_A, scalings[i])
    return backend, *pack(zip(weights, lora_As, lora_Bs, biases, strict=True)), numbers


def draw(x: Tensor, backend: str, lora_As: Sequence[Tensor | None], dropout_ps: Sequence[float]) -> Tensor | None:
    """Draw the noise of the masks that layers of x have; None where they have none."""
    masks = sum(p > 0 for lora_A, p in zip(lora_As, dropout_ps, strict=True) if lora_A is not None)
    return draw_noise(x, torch.empty(0, device=x.device), backend, count=masks) if masks else None


def pack(groups: Iterable[Iterable[Tensor | None]]) -> tuple[list[Tensor], list[int]]:
    """The tensors that are there, and where among all of them."""
    everything = list(itertools.chain.from_iterable(groups))
    places = [place for place, t in enumerate(everything) if t is not None]
    return [t for t in everything if t is not None], places


def unpack(tensors: Sequence[Any], places: Sequence[int], count: int, each: int) -> list[list[Any]]:
    """`each` tensors, or what stands for them, of `count` layers, None where there is none."""
    everything: list[Any] = [None] * (count * each)
    for place, t in zip(places, tensors, strict=True):
        everything[place] = t
    return [everything[i * each : (i + 1) * each] for i in range(count)]


def entries(
    tensors: Sequence[Tensor], places: Sequence[int], scalings: Sequence[float], dropout_ps: Sequence[float]
) -> list[Projection]:
    """The layers of packed tensors."""
    given = unpack(tensors, places, len(scalings), GIVEN)
    return [Projection(*four, *numbers) for four, *numbers in zip(given, scalings, dropout_ps, strict=True)]


def needed(flags: Sequence[bool], places: Sequence[int], count: int) -> list[list[bool]]:
    """Whether the gradients of each layer's weight, lora_A, lora_B and bias are needed, False of one without."""
    return [list(map(bool, four)) for four in unpack(flags, places, count, GIVEN)]


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype that dA and dB are computed in: the adapters', where any is wider than x."""
    return functools.reduce(torch.promote_types, dtypes)


def gradients_of(
    grads: Sequence[Tensor | None], places: Sequence[int], dtypes: Sequence[torch.dtype]
) -> list[Tensor | None]:
    """Of the gradients of all, those of packed tensors, each in its tensor's dtype."""
    return [None if (g := grads[place]) is None else g.to(dtype) for place, dtype in zip(places, dtypes, strict=True)]


def ranks(layers: Iterable[Projection]) -> list[int]:
    """The rank of each, 0 for no adapter."""
    return [0 if q.lora_A is None else q.lora_A.shape[0] for q in layers]


def pitches(of: Sequence[int], dtype: torch.dtype, backend: str) -> list[int]:
    """Columns that the s of each rank takes of the one buffer that holds them."""
    pitch = plan.contractions(backend).thin_pitch
    return [pitch(rank, dtype) if rank else 0 for rank in of]


def side_by_side(x: Tensor, shrunk: Sequence[Tensor | None], backend: str) -> Tensor:
    """The s of layers as columns of one tensor `[M, ·]`, where there is one; x is `[M, in]`."""
    there = [s for s in shrunk if s is not None]
    own = pitches([s.shape[1] for s in there], x.dtype, backend)
    if not there or there[0].stride(0) != sum(own):
        return torch.cat(there, 1) if there else x.new_empty(x.shape[0], 0)
    whole = there[0].as_strided((x.shape[0], sum(own)), (sum(own), 1))
    for s, place in zip(there, whole.split(own, 1), strict=True):
        if s.shape[1] < place.shape[1]:  # padding, which nobody wrote
            place[:, s.shape[1] :] = 0
    return whole


def columns(s: Tensor, of: Sequence[int], backend: str) -> list[Tensor | None]:
    """The s of each rank, out of `side_by_side`; None for rank 0."""
    places = s.split(pitches(of, s.dtype, backend), 1)
    return [place[:, :rank] if rank else None for place, rank in zip(places, of, strict=True)]


def forward_flops(x: Sequence[int], tensors: Sequence[Sequence[int]], places: Sequence[int], count: int) -> int:
    """2 M (K N + r K + r N) of each layer, of shapes."""
    total = 0
    for weight, lora_A, _, _ in unpack(tensors, places, count, GIVEN):
        (cols, inner), rank = weight, lora_A[0] if lora_A else 0
        total += inner * cols + rank * (inner + cols)
    return 2 * math.prod(x[:-1]) * total
