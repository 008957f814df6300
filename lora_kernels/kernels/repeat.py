"""Repeat passes: the first of a kind runs as it is written, the second is noted, all others are taken by these notes.

What a pass does may depend on the kinds of its tensors, on its other arguments and on `state`, and on nothing else:
these are the key under which its `Recording` is kept.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import Tensor

from lora_kernels.kernels import _launch, _replay
from lora_kernels.kernels._replay import Recording

__all__ = ["forget", "repeat"]

_MOST = 1024  # kinds of passes; activations of ever new lengths make ever new ones
_known: dict[Hashable, Recording | str] = {}  # or why there is none
_SEEN = "it has been called once"


def repeat(pass_: Callable, state: Hashable, *arguments: Any) -> Any:
    """Call a pass, or take the steps that it took for tensors of the same kinds.

    Args:
        pass_: A function of tensors, alone or in tuples and lists, and of hashable values, which gives tensors
            likewise. What it does to them it does by PyTorch's operators and by `_replay.call`.
        state: What else it depends on.
        *arguments: Its arguments.
    """
    if _replay.noting():  # it is part of another
        return pass_(*arguments)
    tensors: list[Tensor] = []
    kinds = _kinds(arguments, tensors)
    like = tensors[0]
    key = pass_, state, like.device, _launch.uses_tf32(like.dtype), _launch.imagined, kinds
    known = _known.get(key)
    if type(known) is Recording:
        return known(tensors)
    if known != _SEEN:
        if known is None:
            if len(_known) >= _MOST:
                _known.clear()
            _known[key] = _SEEN
        return pass_(*arguments)
    result, _known[key] = _replay.record(pass_, arguments, tensors)
    return result


def forget() -> None:
    """Forget every recording: something that no key has is about to change."""
    _known.clear()


def _kinds(arguments: Sequence[Any], tensors: list[Tensor]) -> tuple[Hashable, ...]:
    """What a pass may know of its arguments; the tensors in them are appended to `tensors`."""
    kinds = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            tensors.append(argument)
            kinds.append((argument.shape, argument.stride(), argument.dtype, not argument.data_ptr() % 16))
        elif isinstance(argument, (tuple, list)):
            kinds.append(_kinds(argument, tensors))
        else:
            kinds.append(argument)
    return tuple(kinds)
