"""How the registered operators are computed on DTensors: which layouts need no communication.

A layout says what each rank holds of each tensor, along one dim of a mesh; PyTorch combines them for more dims, picks the
one that costs least to get to from the layouts at hand, and redistributes. R is replicated, S(d) sharded along dim d, and P
a partial sum, what is held adding up to the tensor. Everything is linear in s, so a partial s is never reduced.

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

With a mask only the replicated layout is left, and noise has no layout at all: it belongs to the rank that drew it.
Importing this registers the rules; `lora_linear` does so when it is given DTensors.
"""

from collections.abc import Sequence
from typing import Any

from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.placement_types import Placement

from lora_kernels import ops

__all__: list[str] = []

_R, _P, _S0, _S1 = Replicate(), Partial(), Shard(0), Shard(1)
_Rule = tuple[list[Placement | None], list[Placement | None]]  # of the outputs, of the arguments


@register_sharding(ops.linear_forward)
def _forward_rules(x: Any, weight: Any, lora_A: Any, lora_B: Any, bias: Any, noise: Any, *numbers: Any) -> list[_Rule]:
    tensors, last = (x, weight, lora_A, lora_B, bias, noise), Shard(x.ndim - 1)
    outputs = (True, True, noise is not None)
    rules = [_rule(outputs, [_R] * 3, tensors, [_R] * 6, numbers)]
    if noise is None:
        if x.ndim > 1:
            rules.append(_rule(outputs, [_S0, _S0], tensors, [_S0, _R, _R, _R, _R], numbers))
        rules.append(_rule(outputs, [last, _R], tensors, [_R, _S0, _R, _S0, _S0], numbers))
        rules.append(_rule(outputs, [_P, _P], tensors, [last, _S1, _S1, _R, _P], numbers))
    return rules


@register_sharding(ops.linear_backward)
def _backward_rules(
    dy: Any, x: Any, weight: Any, lora_A: Any, lora_B: Any, s: Any, keep: Any,
    alpha: float, backend: str, dtype_A: Any, dtype_B: Any, needed: Sequence[bool],
) -> list[_Rule]:  # fmt: skip
    tensors, last = (dy, x, weight, lora_A, lora_B, s, keep), Shard(dy.ndim - 1)
    numbers = (alpha, backend, dtype_A, dtype_B, needed)
    rules = [_rule(needed, [_R] * 3, tensors, [_R] * 7, numbers)]
    if keep is None:
        if dy.ndim > 1:
            rules.append(_rule(needed, [_S0, _P, _P], tensors, [_S0, _S0, _R, _R, _R, _S0], numbers))
        rules.append(_rule(needed, [_P, _P, _S0], tensors, [last, _R, _S0, _R, _S0, _R], numbers))
        rules.append(_rule(needed, [last, _S1, _P], tensors, [_R, last, _S1, _S1, _R, _P], numbers))
    return rules


def _rule(
    returned: Sequence[bool], outputs: list[Placement], given: Sequence[Any], arguments: list[Placement],
    numbers: Sequence[Any],
) -> _Rule:  # fmt: skip
    """A rule with None for what is not returned, not given, or not a tensor."""
    outputs, arguments = (
        [placement if is_there else None for is_there, placement in zip(there, [*placements, None], strict=False)]
        for there, placements in ((returned, outputs), ([t is not None for t in given], arguments))
    )
    return outputs, arguments + [None] * len(numbers)
