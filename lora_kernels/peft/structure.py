"""Recognise attention blocks and MLPs, not by the module's name but by the operations of its forward.

    attention   q_proj(x), k_proj(x), v_proj(x)              read in the forward's syntax tree
    MLP         down_proj(act(gate_proj(x)) · up_proj(x))    the forward is run with stand-ins for its layers
                fc2(act(fc1(x)))                             the forward is run with stand-ins for its layers

The forward of an attention block does much else, so only its three calls are checked, in the order of its statements.
Each call must occur once, outside branches and inner functions, and nothing else may use x or the three layers until
the last call. `call_sites` finds the instructions of these calls. No decision depends on a first call, because
checkpointing compares the tensors that a forward saves with those of its second run.

The forward of an MLP may do nothing else, and may not even inspect x or the result, because `lora_mlp` replaces the
forward. All attributes of the module that the forward reads are recorded, because a number that is 1 today may change
tomorrow.
"""

import ast
import copy
import dis
import functools
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels.activations import ACTIVATIONS, activated
from lora_kernels.peft.forwards import class_forward, is_called_plainly
from lora_kernels.peft.names import Names, is_fixed, names_of

__all__ = ["ATTENTION", "FixedMember", "FixedModule", "Structure", "call_sites", "members", "structure"]

ATTENTION = ("q_proj", "k_proj", "v_proj")
# The layers of an MLP, the last layer last, and the computation.
_MLPS = {
    ("gate_proj", "up_proj", "down_proj"): "down_proj(act(gate_proj(x)) · up_proj(x))",
    ("fc1", "fc2"): "fc2(act(fc1(x)))",
}
# Known blocks of another kind, by their layers.
_OTHERS = (
    ("attention", ("qkv_proj",), "one layer holds Q, K and V: qkv_proj"),
    ("mlp", ("gate_up_proj", "down_proj"), "one layer holds gate and up: gate_up_proj"),
)
_CHOICES = (ast.IfExp, ast.BoolOp, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class FixedModule(NamedTuple):
    """What a module beside the layers must keep: its class, the forward and what that names, numbers and functions.

    The module may get further attributes.
    """

    kind: type[nn.Module]
    forward: Callable[..., Any]
    names: Names
    constants: tuple[tuple[str, Any], ...]

    def still(self, module: nn.Module) -> bool:
        """Return whether a module of that class still has the same forward, names and constants."""
        fields = module.__dict__
        same = self.kind.forward is self.forward and is_called_plainly(self.kind) and self.names.still()
        return same and all(_identity(fields.get(name)) == value for name, value in self.constants)


class FixedMember(NamedTuple):
    """A member of the block's class, for example a method, that the class must keep."""

    value: Any


@dataclass(frozen=True)
class Structure:
    """The structure of a block.

    Attributes:
        kind: "attention" or "mlp".
        layers: Names of the layers that belong together, in the order of their computation.
        reason: Why the layers have to be called one by one; "" if they need not be.
        activation: The activation of an MLP, in the words of `lora_mlp`.
        others: Everything else in an MLP: each name with a `FixedModule` for a module, with a `FixedMember` for a
            member of the class, with the value itself, or with None if the attribute does not exist; and `Names` for
            all that the forward's code names.
    """

    kind: str
    layers: tuple[str, ...]
    reason: str = ""
    activation: str = ""
    others: tuple[tuple[str, Any], ...] = ()


def structure(module: nn.Module, forward: Callable[..., Any] | None) -> Structure | None:
    """Return the structure of a module, or None if the module is not a block.

    Args:
        module: Any module.
        forward: The forward function of the module's class, None if it has none.
    """
    if forward is None:
        return None
    children = module._modules.keys()
    own = "" if is_fixed(forward) else f"its forward is a {type(forward).__name__}, not a function"
    if children >= set(ATTENTION):
        return Structure("attention", ATTENTION, own or _attention_reason(forward))
    for layers in _MLPS:
        if children >= set(layers):
            return Structure("mlp", layers, own) if own else _mlp(module, forward, layers)
    for kind, layers, reason in _OTHERS:
        if children >= set(layers):
            return Structure(kind, layers, reason)
    return None


def _record_module(module: nn.Module) -> FixedModule:
    """Record the present state of a module beside the layers."""
    kind, constants = type(module), tuple((name, _identity(value)) for name, value in _own(module))
    return FixedModule(kind, kind.forward, names_of(kind.forward, kind), constants)


def _own(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of a module that not every module has."""
    return ((name, value) for name, value in module.__dict__.items() if name not in _OF_EVERY_MODULE)


def _loose(module: nn.Module) -> str:
    """Return the name of what a module beside the layers uses that can change and stay the same object, or ""."""
    kind, forward = type(module), class_forward(type(module))
    values = (*_own(module), ("its forward", forward))
    return next((name for name, value in values if not is_fixed(value)), "") or names_of(forward, kind).loose


def _identity(value: Any) -> Any:
    """Return a value to compare: that of a number or function, the parts of a partial, the function of a method.

    A deep copy of a module has partials and methods of its own.
    """
    if isinstance(value, functools.partial):
        return value.func, value.args, tuple(sorted(value.keywords.items()))
    return getattr(value, "__func__", value)


def members(module: nn.Module, layers: Sequence[str]) -> list[nn.Module]:
    """Return the layers of a block."""
    modules: Mapping[str, Any] = module._modules
    return [modules[name] for name in layers]


@functools.cache
def call_sites(forward: Callable[..., Any]) -> tuple[CodeType, frozenset[int]]:
    """Return the code of an attention block's forward, and where in it q_proj, k_proj and v_proj are read and called.

    The sites are values of `frame.f_lasti`. Only the reads of direct calls, `self.q_proj(x)`, are among them: there
    Python loads a method and calls it at once, so what is loaded cannot be kept.
    """
    code: CodeType = inspect.unwrap(forward).__code__
    instructions = list(dis.get_instructions(code))
    ends = [following.offset for following in instructions[1:]] + [len(code.co_code)]
    # Python 3.12 may count the caches that follow an instruction as part of what it has run.
    sites = (range(one.offset, end) for one, end in zip(instructions, ends, strict=True) if _loads_projection(one))
    return code, frozenset(offset for site in sites for offset in site)


def _loads_projection(one: dis.Instruction) -> bool:
    """Return whether an instruction loads q_proj, k_proj or v_proj of an object to call it as a method."""
    # Since Python 3.12 the lowest bit of the argument says that a method is loaded.
    marked = sys.version_info >= (3, 12) and one.opname == "LOAD_ATTR" and bool(one.arg and one.arg & 1)
    return (marked or one.opname == "LOAD_METHOD") and one.argval in ATTENTION


@functools.cache
def _attention_reason(forward: Callable[..., Any]) -> str:
    """Return why a forward's calls of q_proj, k_proj and v_proj cannot be one call; "" if they can."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(forward))))
    except (OSError, TypeError, SyntaxError):
        return "the source of its forward cannot be read"
    calls: list[Any] = [node for node in ast.walk(tree) if _is_projection(node)]
    if sorted(call.func.attr for call in calls) != sorted(ATTENTION):
        return "its forward does not call each of q_proj, k_proj and v_proj once"
    called, end = [call.func for call in calls], max(call.lineno for call in calls)
    read = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in ATTENTION)
    # The first call computes all three results, so the layers may not change after it.
    if any(node not in called and node.lineno <= end for node in read):
        return "its forward does more with q_proj, k_proj and v_proj before the last of them is called than call them"
    given = [call.args[0] for call in calls if len(call.args) == 1 and not call.keywords]
    if len(given) < len(calls) or len({x.id if isinstance(x, ast.Name) else x for x in given}) > 1:
        return "its forward does not call q_proj, k_proj and v_proj on one input"
    for statements in _lists(tree.body[0]):
        places = [i for i, statement in enumerate(statements) for node in ast.walk(statement) if node in calls]
        between = statements[places[0] : places[-1] + 1] if len(places) == len(calls) else []
        if between and all(isinstance(statement, (ast.Assign, ast.AnnAssign)) for statement in between):
            break
    else:
        return "its forward does not call q_proj, k_proj and v_proj one after another, come what may"
    nodes = [node for statement in between for node in ast.walk(statement)]
    if any(isinstance(node, _CHOICES) for node in nodes):
        return "its forward does not call q_proj, k_proj and v_proj one after another, come what may"
    if sum(isinstance(node, ast.Name) and node.id == given[0].id for node in nodes) > len(given):
        return f"its forward uses {given[0].id} between q_proj, k_proj and v_proj"
    # What stands in a `finally` is compiled twice, and another object's v_proj may be this block's.
    if sum(map(_loads_projection, dis.get_instructions(inspect.unwrap(forward)))) != len(calls):
        return "its forward does not call each of q_proj, k_proj and v_proj once"
    return ""


def _is_projection(node: ast.AST) -> bool:
    """Return whether a node is a call of self.q_proj, self.k_proj or self.v_proj."""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute) and node.func.attr in ATTENTION
        and isinstance(node.func.value, ast.Name) and node.func.value.id == "self"
    )  # fmt: skip


def _lists(statement: ast.AST) -> Iterator[list[ast.stmt]]:
    """Yield every list of statements, inner lists last, without inner functions and classes, which run later."""
    for field in ("body", "orelse", "finalbody"):
        statements = getattr(statement, field, None)
        if isinstance(statements, list):
            yield statements
            for inner in statements:
                if not isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                    yield from _lists(inner)


def _mlp(module: nn.Module, forward: Callable[..., Any], layers: tuple[str, ...]) -> Structure:
    """Run the forward of a module that has an MLP's layers, to find the module's structure."""
    rest = {name: child for name, child in module._modules.items() if name not in layers and child is not None}
    other = Structure("mlp", layers, f"it is not {_MLPS[layers]} with act one of {', '.join(ACTIVATIONS)}")
    holding = [n for n, m in rest.items() if any(True for _ in (*m.children(), *m.parameters(), *m.buffers()))]
    holding += [name for own in (module._parameters, module._buffers) for name, t in own.items() if t is not None]
    if holding:
        return replace(other, reason=f"it has more than {', '.join(layers)} and an activation: {', '.join(holding)}")
    fields = vars(module)
    read: set[str] = set()
    try:
        found = {_activation(module, forward, layers, rest, read, training) for training in (True, False)}
    except _Touched:
        return other
    # Foreign code may raise anything when stand-ins replace its layers.
    except Exception as error:
        return replace(other, reason=f"its forward cannot be followed: {type(error).__name__}: {error}")
    if len(found) > 1 or "" in found:
        return other
    read |= {name for name, f in fields.items() if callable(f) and name[0] != "_" and name != "forward"}
    read -= {*layers, *rest, *_OF_EVERY_MODULE, "__dict__"}
    kind, values = type(module), dict[str, Any]()
    for name in sorted(read):
        of_class = name not in fields and hasattr(kind, name) and not hasattr(nn.Module, name)
        value = getattr(kind, name) if of_class else fields.get(name)
        # The forward was run, so what a property reads is among the names.
        if not is_fixed(value):
            return replace(other, reason=f"its forward reads {name}, which may change")
        values[name] = FixedMember(value) if of_class else value
    own: type = vars(kind).get("_lora_kernels_class", kind)
    names = values["what its forward names"] = names_of(forward, own)
    if names.loose:
        return replace(other, reason=f"its forward reads {names.loose}, which may change")
    for name, child in rest.items():
        if loose := _loose(child):
            return replace(other, reason=f"{name} uses {loose}, which may change")
    others = (*((name, _record_module(child)) for name, child in rest.items()), *values.items())
    return replace(other, reason="", activation=found.pop(), others=others)


class _Touched(Exception):
    """A forward used a `_Sealed` tensor."""


class _Sealed(Tensor):
    """A tensor that can only be passed on; even a query of its shape raises."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise _Touched


def _activation(
    module: nn.Module, forward: Callable[..., Any], layers: tuple[str, ...], rest: dict[str, nn.Module], read: set[str],
    training: bool,
) -> str:  # fmt: skip
    """Run an MLP with stand-ins for its layers; return its activation, or "" if the MLP computes anything else.

    The function adds the names of all attributes that forward looks up in the module to `read`.
    """
    *before, last = layers
    with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
        x, y = (torch.empty(0).as_subclass(_Sealed) for _ in range(2))
        # All pairs of a gate and an up, some of them beyond the limits at which models clamp.
        gates = torch.cat([torch.linspace(-60, 60, 241, dtype=torch.float64), torch.tensor([-1e5, -1e3, 1e3, 1e5])])
        ups = gates.new_tensor([-1e5, -12, -0.7, 0.9, 8, 1e5])
        pairs = torch.cartesian_prod(gates, ups).unbind(1) if len(before) > 1 else (gates,)
        leaves, given = tuple(t.requires_grad_() for t in pairs), []

        def stand_in(name: str, result: Tensor) -> Callable[[Tensor], Tensor]:
            def call(t: Tensor) -> Tensor:
                given.append((name, t))
                return result if result is y else result[None, None].clone()

            return call

        # The base class is known only at run time.
        class Twin(type(module)):  # type: ignore[misc]
            def __getattribute__(self, name: str) -> Any:
                read.add(name)
                return super().__getattribute__(name)

        modules: dict[str, Any] = {name: copy.deepcopy(child).train(training) for name, child in rest.items()}
        modules |= {name: stand_in(name, result) for name, result in zip(layers, (*leaves, y), strict=True)}
        twin, fields = object.__new__(Twin), vars(module) | {"training": training, "_modules": modules}
        object.__setattr__(twin, "__dict__", dict(fields))
        if forward(twin, x) is not y or sorted(name for name, _ in given) != sorted(layers):
            return ""
        after, inputs = object.__getattribute__(twin, "__dict__"), dict(given)
        if after.keys() != fields.keys() or any(after[name] is not value for name, value in fields.items()):
            return ""
        if any(inputs[name] is not x for name in before):
            return ""
        h = inputs[last]
        if h.shape[2:] != leaves[0].shape or not h.requires_grad:
            return ""
        made = (h[0, 0], *torch.autograd.grad(h.sum(), leaves, materialize_grads=True))
        return next((name for name in ACTIVATIONS if _same(made, leaves, name)), "")


def _same(made: Sequence[Tensor], leaves: Sequence[Tensor], activation: str) -> bool:
    """Return whether an h and its gradients are those of an activation."""
    h = activated(leaves[0], leaves[1] if len(leaves) > 1 else None, activation)
    expected = (h, *torch.autograd.grad(h.sum(), leaves))
    return all(torch.allclose(t, own, rtol=1e-8, atol=1e-8) for t, own in zip(made, expected, strict=True))
