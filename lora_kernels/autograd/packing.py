"""Pack the tensors of several layers as arguments of one operator, for `projections` and `mlp`.

PyTorch's autograd for operators sees the tensors of a list, but no tensor of a list that holds a None. So operators
take one list without the Nones, and the place of each tensor in the full list: layer i owns `each` places, from
i · each on. The s of layers that read the same x are one result, side by side, because results must not share memory
and kernels leave these s in one buffer.
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
from lora_kernels.autograd.stored import join_all, shape_of, split_all
from lora_kernels.passes.layer import GIVEN, Projection, by_layer

__all__ = [
    "columns", "draw", "entries", "forward_flops", "gradients_of", "needs_by_layer", "pack", "pack_layers", "pitches",
    "prepare", "ranks", "side_by_side", "unpack", "unpack_layers", "widest",
]  # fmt: skip


def prepare(
    call: str, x: Tensor, weights: Sequence[Tensor], lora_As: Sequence[Tensor | None],
    lora_Bs: Sequence[Tensor | None], biases: Sequence[Tensor | None], scalings: Sequence[float], backend: str,
    forms: Sequence[str] | None = None,
) -> tuple[str, list[Tensor], list[int], list[float]]:  # fmt: skip
    """Choose a backend for the layers of one `call`; pack their tensors; return scalings that are plain numbers."""
    # `int` compiles the rank into a graph; all other sizes may vary.
    rank = max((int(lora_A.shape[0]) for lora_A in lora_As if lora_A is not None), default=1)
    shapes = [shape_of(w.shape, form) for w, form in zip(weights, forms or [""] * len(weights), strict=True)]
    empty = x.numel() == 0 or any(cols == 0 for cols, _ in shapes)
    backend = plan.choose(x.device, x.dtype, rank, empty, backend, call)
    lora_As, numbers = list(lora_As), [1.0] * len(weights)
    for i, lora_A in enumerate(lora_As):
        if lora_A is not None:
            lora_As[i], numbers[i] = plain_scaling(lora_A, scalings[i])
    return backend, *pack(zip(weights, lora_As, lora_Bs, biases, strict=True)), numbers


def draw(x: Tensor, backend: str, lora_As: Sequence[Tensor | None], dropout_ps: Sequence[float]) -> Tensor | None:
    """Draw the noise for the masks of all layers that read x; return None if no layer has a mask."""
    masks = sum(p > 0 for lora_A, p in zip(lora_As, dropout_ps, strict=True) if lora_A is not None)
    return draw_noise(x, torch.empty(0, device=x.device), backend, count=masks) if masks else None


def pack(groups: Iterable[Iterable[Tensor | None]]) -> tuple[list[Tensor], list[int]]:
    """Return the tensors that are not None, and the place of each among all entries."""
    everything = list(itertools.chain.from_iterable(groups))
    places = [place for place, t in enumerate(everything) if t is not None]
    return [t for t in everything if t is not None], places


def unpack(tensors: Sequence[Any], places: Sequence[int], count: int, each: int = GIVEN) -> list[Sequence[Any]]:
    """Undo `pack`: return `each` entries for each of `count` layers, None in the empty places."""
    everything: list[Any] = [None] * (count * each)
    for place, t in zip(places, tensors, strict=True):
        everything[place] = t
    return by_layer(everything, each)


def pack_layers(
    groups: Sequence[Sequence[Any]], at: int = 0
) -> tuple[list[Tensor], list[int], list[Tensor], list[str]]:  # fmt: skip
    """Return `pack` of groups that have a weight of either kind, or None, as entry `at`; the tables; and the forms."""
    weights, tables, forms = split_all([group[at] for group in groups])
    plain = ([*group[:at], weight, *group[at + 1 :]] for group, weight in zip(groups, weights, strict=True))
    return *pack(plain), tables, forms


def unpack_layers(
    tensors: Sequence[Any], places: Sequence[int], count: int, tables: Sequence[Tensor] | None,
    forms: Sequence[str] | None, each: int = GIVEN, at: int = 0,
) -> list[Sequence[Any]]:  # fmt: skip
    """Undo `pack_layers`; no forms mean that all weights are plain tensors."""
    groups = unpack(tensors, places, count, each)
    weights = join_all([group[at] for group in groups], tables, forms)
    return [[*group[:at], weight, *group[at + 1 :]] for group, weight in zip(groups, weights, strict=True)]


def entries(
    tensors: Sequence[Tensor], places: Sequence[int], scalings: Sequence[float], dropout_ps: Sequence[float],
    tables: Sequence[Tensor] | None = None, forms: Sequence[str] | None = None,
) -> list[Projection]:  # fmt: skip
    """Build the layers from packed tensors."""
    given = unpack_layers(tensors, places, len(scalings), tables, forms)
    return [Projection(*four, *numbers) for four, *numbers in zip(given, scalings, dropout_ps, strict=True)]


def needs_by_layer(flags: Sequence[bool], places: Sequence[int], count: int) -> list[list[bool]]:
    """Return for each layer which gradients of weight, lora_A, lora_B and bias are needed, False for a missing one."""
    return [list(map(bool, four)) for four in unpack(flags, places, count)]


def widest(x: Tensor, layers: Iterable[Projection]) -> torch.dtype:
    """Return the dtype in which dA and dB are computed: the adapters' dtype if any adapter is wider than x."""
    adapters = (t.dtype for q in layers for t in (q.lora_A, q.lora_B) if t is not None)
    return functools.reduce(torch.promote_types, adapters, x.dtype)


def gradients_of(
    grads: Sequence[Tensor | None], places: Sequence[int], dtypes: Sequence[torch.dtype]
) -> list[Tensor | None]:
    """Select from all gradients those of the packed tensors, each in the dtype of its tensor."""
    return [None if (g := grads[place]) is None else g.to(dtype) for place, dtype in zip(places, dtypes, strict=True)]


def ranks(layers: Iterable[Projection]) -> list[int]:
    """Return the rank of each layer, 0 without an adapter."""
    return [0 if q.lora_A is None else q.lora_A.shape[0] for q in layers]


def pitches(of: Sequence[int], dtype: torch.dtype, backend: str) -> list[int]:
    """Return the number of columns that the s of each rank takes in the shared buffer."""
    pitch = plan.contractions(backend).thin_pitch
    return [pitch(rank, dtype) if rank else 0 for rank in of]


def side_by_side(x: Tensor, shrunk: Sequence[Tensor | None], backend: str) -> Tensor:
    """Return the s of all layers that have one as columns of one tensor `[M, ·]`; x is `[M, in]`."""
    there = [s for s in shrunk if s is not None]
    own = pitches([s.shape[1] for s in there], x.dtype, backend)
    if not there or there[0].stride(0) != sum(own):
        return torch.cat(there, 1) if there else x.new_empty(x.shape[0], 0)
    whole = there[0].as_strided((x.shape[0], sum(own)), (sum(own), 1))
    for s, place in zip(there, whole.split(own, 1), strict=True):
        # No kernel writes the padding.
        if s.shape[1] < place.shape[1]:
            place[:, s.shape[1] :] = 0
    return whole


def columns(s: Tensor, of: Sequence[int], backend: str) -> list[Tensor | None]:
    """Undo `side_by_side`: return the s of each rank, None for rank 0."""
    places = s.split(pitches(of, s.dtype, backend), 1)
    return [place[:, :rank] if rank else None for place, rank in zip(places, of, strict=True)]


def forward_flops(
    x: Sequence[int], tensors: Sequence[Sequence[int]], places: Sequence[int], count: int,
    forms: Sequence[str] | None,
) -> int:  # fmt: skip
    """Count 2 M (K N + r K + r N) FLOPs for each layer; the arguments are shapes."""
    total = 0
    for (weight, lora_A, _, _), form in zip(unpack(tensors, places, count), forms or [""] * count, strict=True):
        (cols, inner), rank = shape_of(weight, form), lora_A[0] if lora_A else 0
        total += inner * cols + rank * (inner + cols)
    return 2 * math.prod(x[:-1]) * total
