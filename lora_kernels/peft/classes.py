"""Give a module a class that differs from its own in a few members, and give its own class back.

The patched class is a subclass of the module's own class with the same name, so `isinstance`, `repr` and `state_dict`
are unchanged. One class serves all modules that are patched alike. Others may set a forward on it, as they do on any
class: then it stays with the modules that have it, and later modules get a fresh one.
"""

import copy
import types
import warnings
from collections.abc import Callable, Hashable
from typing import Any

from torch import nn

__all__ = ["Patched", "give_back", "give_class", "members_of_others", "patched_class", "stock_class"]

_made: dict[tuple[type, Hashable], type[Any]] = {}


class Patched:
    """The mix-in of patched classes: copies stay patched, and pickles do not."""

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        twin: Any = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__dict__, memo))
        return twin

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Protocols after 1 insist on the object's exact class.
        reduced: Any = super().__reduce_ex__(1)
        build, (cls, *args), *state = reduced
        return build, (stock_class(cls) or cls, *args), *state


def patched_class(
    cls: type[nn.Module], key: Hashable, make: Callable[[], dict[str, Any]], mixin: type[Patched] = Patched
) -> type[Any]:
    """Return the subclass of a class for a key: the one that was made before, unless others have changed it since.

    Args:
        cls: The class, not patched.
        key: What the members depend on.
        make: Makes the members.
        mixin: `Patched`, or a subclass of it.
    """
    made = _made.get((cls, key))
    if made is None or members_of_others(made):
        own = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        made = type(cls.__name__, (mixin, cls), {**own, "_lora_kernels_class": cls, **make()})
        made._lora_kernels_members = dict(vars(made))
        _made[cls, key] = made
    return made


def members_of_others(cls: type) -> list[str]:
    """Return the names of the members of a patched class that others have set or deleted; [] for any other class."""
    now = dict(vars(cls))
    own = now.pop("_lora_kernels_members", now)
    # Python itself adds `__annotations__` when it is read.
    names = (name for name in own.keys() | now.keys() if not name.startswith("__annot"))
    return sorted(name for name in names if own.get(name, cls) is not now.get(name, cls))


def stock_class(cls: type) -> Any:
    """Return the class behind a patched class, any other class itself, or None for a subclass of a patched class."""
    return vars(cls).get("_lora_kernels_class") if issubclass(cls, Patched) else cls


def give_class(module: Any, cls: type[nn.Module]) -> None:
    """Set a module's class, and replace a forward that accelerate's device hook keeps or has left on the instance."""
    before = types.MethodType(type(module).forward, module)
    for name in ("forward", "_old_forward"):
        if vars(module).get(name) == before:
            setattr(module, name, types.MethodType(cls.forward, module))
    module.__class__ = cls


def give_back(call: str, model: nn.Module, is_meant: Callable[[Any], bool]) -> list[nn.Module]:
    """Give patched modules their own class back, and warn of members that others have set on a patched class.

    Args:
        call: The function that the messages begin with; its caller's line is that of the warning.
        model: The model.
        is_meant: Whether a patched module is one to give its class back.

    Returns:
        The modules that were patched.

    Raises:
        RuntimeError: A module was given a subclass of its patched class (`fully_shard` does that).
    """
    named: Any = model.named_modules()
    found: list[tuple[str, Any]] = [(name, one) for name, one in named if isinstance(one, Patched) and is_meant(one)]
    changed: dict[type, list[str]] = {}
    for name, module in found:
        cls = type(module)
        if stock_class(cls) is None:
            raise RuntimeError(
                f"{call}: {name} was given another class, {cls.__name__}, after it was patched; undo that first."
            )
        if members_of_others(cls):
            changed.setdefault(cls, []).append(name)
    for _, module in found:
        give_class(module, stock_class(type(module)))
    for cls, (first, *others) in changed.items():
        more, theirs = f" and {len(others)} more modules" if others else "", ", ".join(members_of_others(cls))
        warnings.warn(
            f"{call}: {theirs}, set by others on the patched class of {first}{more}, is left "
            f"behind with that class. Set it on {cls.__module__}.{cls.__qualname__}, or on the modules.",
            stacklevel=3,
        )
    return [module for _, module in found]
