"""Repeat passes: the first few of a kind run as they are written, one is noted, all others are taken by these notes.

What a pass does may depend on the kinds of its tensors, on its other arguments, on `state` and on whether fp32 products
may be rounded to TF32, and on nothing else: these are the key under which its `Recording` is kept.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels.kernels import _launch, _replay

__all__ = ["forget", "repeat"]

_AS_WRITTEN = 3  # noting takes as long as five or six passes and saves up to half of each, so not for a few
_MOST = 1024  # kinds of passes, of some 10 KB each; activations of ever new lengths make ever new ones


class _Kind:
    """Passes that take the same steps: how many came before there was a recording, and it, or why there is none."""

    def __init__(self) -> None:
        self.passes = 0
        self.recording: _replay.Recording | None = None
        self.problem = ""


def repeat(pass_: Callable, state: Hashable, *arguments: Any) -> Any:
    """Call a pass, or take the steps that it took for tensors of the same kinds.

    Args:
        pass_: A function of tensors, alone or in tuples and lists, and of hashable values, which gives tensors
            likewise. What it does to them it does by PyTorch's operators, outside autocast, and by `_replay.call`, not
            by their attributes. Values that are equal are the same to it: 1, 1.0 and True.
        state: What else it depends on.
        *arguments: Its arguments.
    """
    if _replay.noting():  # it is part of another
        return pass_(*arguments)
    tensors: list[Tensor] = []
    kinds = _kinds(arguments, tensors)
    if any(map(Tensor.is_neg, tensors)):  # kernels read memory, and there lies the negative of what is meant
        return repeat(pass_, state, *map(_resolved, arguments))
    tf32 = _launch.uses_tf32(torch.float32)
    kind = _kind((pass_, state, tensors[0].device, tf32, _launch.imagined, kinds))
    if kind.recording is not None:
        return kind.recording(tensors)
    kind.passes += 1
    if kind.problem or kind.passes <= _AS_WRITTEN or not _told_apart(tensors):
        return _launch.run_pass(pass_, *arguments)
    result, known = _launch.run_pass(_replay.record, pass_, arguments, tensors)
    if isinstance(known, str):
        kind.problem = known
    else:
        kind.recording = known
    return result


def forget() -> None:
    """Forget every recording: something that no key has is about to change."""
    _kind.cache_clear()


@functools.lru_cache(maxsize=_MOST)
def _kind(key: Hashable) -> _Kind:
    return _Kind()


def _kinds(arguments: Sequence[Any], tensors: list[Tensor]) -> tuple[Hashable, ...]:
    """What a pass may know of its arguments; the tensors in them are appended to `tensors`."""
    kinds = []
    for argument in arguments:
        if argument is None:
            kinds.append(None)
        elif isinstance(argument, Tensor):
            tensors.append(argument)
            kinds.append((argument.shape, argument.stride(), argument.dtype, not argument.data_ptr() % 16))
        elif isinstance(argument, (tuple, list)):
            kinds.append(_kinds(argument, tensors))
        else:
            kinds.append(argument)
    return tuple(kinds)


def _resolved(argument: Any) -> Any:
    """An argument in which no tensor stands for the negative of what its memory holds."""
    if isinstance(argument, Tensor):
        return argument.resolve_neg()
    if isinstance(argument, (tuple, list)):
        return getattr(argument, "_make", type(argument))(map(_resolved, argument))
    return argument


def _told_apart(tensors: Sequence[Tensor]) -> bool:
    """Whether no two lie at one address, where notes could take one for the other."""
    return len({t.data_ptr() for t in tensors}) == len(tensors)
