"""Plan passes: for tensors of one kind, decide once, and from then on only allocate and launch.

A pass is a function of `Steps` and of its arguments: hashable values, and tensors, alone or in tuples and lists. For
equal values and tensors of one kind a pass takes the same steps. So `run` keeps one `Steps` per kind. The first pass of
a kind decides the form of each large product and settles each launch, and `Steps` keeps these decisions by name. Later
passes reuse the decisions, because on few rows the host's decisions take longer than the GPU's work.
"""

import collections
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import Tensor

from lora_kernels.plan import forms
from lora_kernels.plan.backend import contractions
from lora_kernels.plan.forms import Expander
from lora_kernels.plan.interface import Contractions

__all__ = ["Steps", "forget", "run"]

# Number of kinds. Each takes some 10 KB, and activations of ever new lengths make ever new kinds.
_MOST = 1024


class Steps(collections.defaultdict):
    """The decisions of passes over tensors of one kind, by name.

    `steps[name]` is the slot for the launches of one contraction; None for "torch", which settles no launches.

    Attributes:
        backend: "triton" or "torch".
        ops: The contractions of the backend.
        negative: Whether a tensor has PyTorch's negative bit set, which kernels ignore; None before the first pass.
    """

    def __init__(self, backend: str) -> None:
        super().__init__(contractions("triton").Slot if backend == "triton" else _no_slot)
        self.backend = backend
        self.ops: Contractions = contractions(backend)
        self.negative: bool | None = None
        self._decided: dict[str, Any] = {}

    def once(self, name: str, decide: Callable, *arguments: Any) -> Any:
        """Return the result of `decide`, which only the first pass calls."""
        found = self._decided.get(name)
        if found is None:
            found = self._decided[name] = decide(*arguments)
        return found

    def part(self, name: str) -> "Steps":
        """Return the steps of a pass within this pass."""
        return self.once(name, Steps, self.backend)

    def expander(self, name: str, *product: Any) -> Expander:
        """Return the way to compute large products, as `forms.expander` chooses, with the slot of that name."""
        # Repeat `once` inline, because every pass takes this path.
        found = self._decided.get(name)
        if found is None:
            found = self._decided[name] = forms.expander(self.backend, self[name], *product)
        return found

    def grouped_expander(self, name: str) -> Expander:
        """Return the way to compute large products of groups of rows, with the slot of that name."""
        return self.once(name, forms.grouped_expander, self.backend, self[name])


def _no_slot() -> None:
    return None


def run(backend: str, pass_: Callable, settings: tuple[Hashable, ...], *tensors: Any) -> Any:
    """Call a pass with the steps for its arguments.

    Args:
        backend: "triton" or "torch".
        pass_: A function of `Steps`, of the `settings`, and of the `tensors`. It must decide by the backend, by the
            kinds of the tensors (shape, strides, dtype, device, alignment), by all other values, and by nothing else
            that may change.
        settings: Values. Equal values are the same to the pass: 1, 1.0 and True.
        *tensors: Tensors, Nones, or tuples and lists of tensors and values. The first one has, or begins with, a tensor
            in the dtype of the computation.
    """
    if backend == "torch":
        return pass_(Steps(backend), *settings, *tensors)
    ops, kinds = contractions("triton"), _kinds(tensors)
    first = tensors[0]
    while not isinstance(first, Tensor):
        first = first[0]
    steps = _steps(pass_, settings, kinds, first.device, ops.state(first.dtype), forms.override())
    if steps.negative is None:
        steps.negative = any(map(_is_negative, tensors))
    if steps.negative:
        tensors = tuple(map(_resolve_negatives, tensors))
    return ops.run_pass(pass_, steps, *settings, *tensors)


def forget() -> None:
    """Forget all decisions, because measurements have changed."""
    forms.forget()
    _steps.cache_clear()


@functools.lru_cache(maxsize=_MOST)
def _steps(pass_: Callable, settings: Hashable, kinds: tuple[Hashable, ...], *state: Hashable) -> Steps:
    """Return the steps of one kind of pass, empty at first."""
    return Steps("triton")


def _kinds(values: Sequence[Any]) -> tuple[Hashable, ...]:
    """Return the kind of each tensor, recursively in tuples and lists; return other values unchanged.

    The only part of an address in a kind is the alignment to 16 bytes.
    """
    return tuple(
        [
            (t.shape, t.stride(), t.dtype, t.data_ptr() % 16 == 0, t.is_neg())
            if isinstance(t, Tensor)
            else (t if t is None else _members(t))
            for t in values
        ]
    )


def _members(value: Any) -> Hashable:
    """Return the kinds of the members of a tuple or list, or any other value itself.

    A class may have a method `tensors_and_values`, which tells its tensors from its values.
    """
    parts = getattr(value, "tensors_and_values", None)
    if parts is None:
        return _kinds(value) if isinstance(value, (tuple, list)) else value
    tensors, values = parts()
    return _kinds(tensors), values


def _is_negative(value: Any) -> bool:
    """Return whether a tensor, or a member of a tuple or list, has PyTorch's negative bit set."""
    return (
        value.is_neg()
        if isinstance(value, Tensor)
        else isinstance(value, (tuple, list)) and any(map(_is_negative, value))
    )


def _resolve_negatives(argument: Any) -> Any:
    """Return an argument in which no tensor has PyTorch's negative bit set."""
    if isinstance(argument, Tensor):
        return argument.resolve_neg()
    if isinstance(argument, (tuple, list)):
        return getattr(argument, "_make", type(argument))(map(_resolve_negatives, argument))
    return argument
