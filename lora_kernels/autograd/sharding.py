"""Sharding rules of the registered operators for DTensors: the layouts that need no communication.

A layout says which part of each tensor each rank holds, along one dim of a mesh. PyTorch combines layouts for more
dims, picks the one that is cheapest to reach from the present layouts, and redistributes. R is replicated, S(d) sharded
along dim d, and P a partial sum: the parts of all ranks add up to the tensor. y is linear in s, so the ranks never add
up a partial s.

    linear_forward       y      s    keep | x      W     A     B     bias  noise
    replicated           R      R    R    | R      R     R     R     R     R
    rows, as in a batch  S(0)   S(0)      | S(0)   R     R     R     R
    column-wise          S(-1)  R         | R      S(0)  R     S(0)  S(0)
    row-wise             P      P         | S(-1)  S(1)  S(1)  R     P

    linear_backward      dx     dA    dB   | dy     x      W     A     B     s     keep
    replicated           R      R     R    | R      R      R     R     R     R     R
    rows                 S(0)   P     P    | S(0)   S(0)   R     R     R     S(0)
    column-wise          P      P     S(0) | S(-1)  R      S(0)  R     S(0)  R
    row-wise             S(-1)  S(1)  P    | R      S(-1)  S(1)  S(1)  R     P

With a mask only the replicated layout remains. Noise has no layout, because noise belongs to the rank that drew it.
An import of this module registers the rules; `lora_linear` imports the module when its arguments are DTensors.
"""

from collections.abc import Sequence
from typing import Any

from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.placement_types import Placement

from lora_kernels.autograd.linear import linear_backward, linear_forward

__all__: list[str] = []

_R, _P, _S0, _S1 = Replicate(), Partial(), Shard(0), Shard(1)
_Layout = tuple[list[Placement | None], list[Placement | None]]  # outputs, arguments


@register_sharding(linear_forward)
def _forward_layouts(
    x: Any, weight: Any, lora_A: Any, lora_B: Any, bias: Any, noise: Any, *numbers: Any
) -> list[_Layout]:  # fmt: skip
    last = Shard(x.ndim - 1)
    layouts: list[_Layout] = [([_R] * 3, [_R] * 6)]
    if noise is None:
        more: list[_Layout] = [
            ([_S0, _S0, None], [_S0, _R, _R, _R, _R, None]),
            ([last, _R, None], [_R, _S0, _R, _S0, _S0, None]),
            ([_P, _P, None], [last, _S1, _S1, _R, _P, None]),
        ]
        # A single row has no dim of rows to shard.
        layouts += more[x.ndim == 1 :]
    return _of_these(layouts, (True, True, noise is not None), (x, weight, lora_A, lora_B, bias, noise), numbers)


@register_sharding(linear_backward)
def _backward_layouts(
    dy: Any, x: Any, weight: Any, lora_A: Any, lora_B: Any, s: Any, keep: Any,
    alpha: float, backend: str, dtype_A: Any, dtype_B: Any, needed: Sequence[bool],
) -> list[_Layout]:  # fmt: skip
    last = Shard(dy.ndim - 1)
    layouts: list[_Layout] = [([_R] * 3, [_R] * 7)]
    if keep is None:
        more: list[_Layout] = [
            ([_S0, _P, _P], [_S0, _S0, _R, _R, _R, _S0, None]),
            ([_P, _P, _S0], [last, _R, _S0, _R, _S0, _R, None]),
            ([last, _S1, _P], [_R, last, _S1, _S1, _R, _P, None]),
        ]
        layouts += more[dy.ndim == 1 :]
    numbers = (alpha, backend, dtype_A, dtype_B, needed)
    return _of_these(layouts, needed, (dy, x, weight, lora_A, lora_B, s, keep), numbers)


def _of_these(
    layouts: list[_Layout], returned: Sequence[bool], given: Sequence[Any], numbers: Sequence[Any]
) -> list[_Layout]:
    """Return the layouts with None for each output not returned, argument not given, and argument not a tensor."""
    return [
        (
            [at if there else None for at, there in zip(outputs, returned, strict=True)],
            [None if t is None else at for at, t in zip(arguments, given, strict=True)] + [None] * len(numbers),
        )
        for outputs, arguments in layouts
    ]
