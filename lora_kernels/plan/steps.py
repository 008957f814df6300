"""Plan passes: for tensors of one kind, decide once, and from then on only allocate and launch.

A pass is a function of `Steps` and of its arguments: tensors, alone or in tuples and lists, and hashable values. For
tensors of one kind and equal values a pass takes the same steps. So `run` keeps one `Steps` per kind. The first pass of
a kind decides the form of each large product and settles each launch, and `Steps` keeps them by name. Later passes take
what they find, because on few rows the host's decisions take longer than the GPU's work.
"""

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


class Steps:
    """The decisions of passes over tensors of one kind, by name.

    Attributes:
        backend: "triton" or "torch".
        ops: The contractions of the backend.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.ops: Contractions = contractions(backend)
        self._slots: dict[Hashable, Any] = {}
        self._decided: dict[Hashable, Any] = {}

    def __getitem__(self, name: Hashable) -> Any:
        """Return the slot for the launches of one contraction; None for "torch", which settles no launches."""
        found = self._slots.get(name)
        if found is None and self.backend == "triton":
            found = self._slots[name] = contractions("triton").Slot()
        return found

    def once(self, name: Hashable, decide: Callable, *arguments: Any) -> Any:
        """Return what `decide` has returned to the first pass."""
        found = self._decided.get(name)
        if found is None:
            found = self._decided[name] = decide(*arguments)
        return found

    def part(self, name: Hashable) -> "Steps":
        """Return the steps of a pass within this pass."""
        return self.once(name, Steps, self.backend)

    def expander(self, name: Hashable, *product: Any) -> Expander:
        """Return the way to compute a large product, as `forms.expander` chooses, with the slot of that name."""
        return self.once(name, forms.expander, self.backend, self[name], *product)

    def expander_all(self, name: Hashable, *product: Any) -> Expander:
        """Return the way to compute several large products, as `forms.expander_all` chooses."""
        return self.once(name, forms.expander_all, self.backend, self[name], *product)


def run(backend: str, pass_: Callable, *arguments: Any) -> Any:
    """Call a pass with the steps for its arguments.

    Args:
        backend: "triton" or "torch".
        pass_: A function of `Steps` and of `arguments`. It must decide by the backend, by the kinds of the tensors
            (shape, strides, dtype, device, alignment), by the other arguments, and by nothing else that may change.
        *arguments: Its arguments. Equal values are the same to it: 1, 1.0 and True.
    """
    if backend == "torch":
        return pass_(Steps(backend), *arguments)
    ops = contractions("triton")
    tensors: list[Tensor] = []
    kinds = _kinds(arguments, tensors, ops.facts)
    # Kernels read memory, and the memory of such a tensor holds the negative of its values.
    if any(map(Tensor.is_neg, tensors)):
        return run(backend, pass_, *map(_resolved, arguments))
    steps = _steps((pass_, forms.override(), tensors[0].device, ops.state(), kinds))
    return ops.run_pass(pass_, steps, *arguments)


def forget() -> None:
    """Forget all decisions, because measurements have changed."""
    forms.forget()
    _steps.cache_clear()


@functools.lru_cache(maxsize=_MOST)
def _steps(key: Hashable) -> Steps:
    """Return the steps of one kind of pass, empty at first."""
    return Steps("triton")


def _kinds(arguments: Sequence[Any], tensors: list[Tensor], facts: Callable) -> tuple[Hashable, ...]:
    """Return the kinds of arguments, and append the tensors in them to `tensors`."""
    kinds: list[Hashable] = []
    for argument in arguments:
        if argument is None:
            kinds.append(None)
        elif isinstance(argument, Tensor):
            tensors.append(argument)
            kinds.append(facts(argument))
        elif isinstance(argument, (tuple, list)):
            kinds.append(_kinds(argument, tensors, facts))
        else:
            kinds.append(argument)
    return tuple(kinds)


def _resolved(argument: Any) -> Any:
    """Return an argument in which no tensor stands for the negative of what its memory holds."""
    if isinstance(argument, Tensor):
        return argument.resolve_neg()
    if isinstance(argument, (tuple, list)):
        return getattr(argument, "_make", type(argument))(map(_resolved, argument))
    return argument
