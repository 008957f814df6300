"""What makes a module an attention block or a gated MLP: not its name, but what its forward is seen to do.

    attention   q_proj(x), k_proj(x), v_proj(x)              read in the forward's syntax tree
    MLP         down_proj(act(gate_proj(x)) · up_proj(x))    the forward is run with stand-ins for the three layers

An attention's forward does much besides, so that only its three calls are looked at, in the order of its statements:
each must stand there once, none behind a branch, and nothing else may touch x from the first to the last. Nothing is
decided by a first call: checkpointing compares what a forward saves with what its second run does.
"""

import ast
import copy
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.blocks import ACTIVATIONS

__all__ = ["ATTENTION", "MLP", "Structure", "members", "structure"]

ATTENTION = ("q_proj", "k_proj", "v_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
_OTHERS = (  # what is known to be a block of another kind, by the layers it has
    ("attention", ("qkv_proj",), "one layer holds Q, K and V: qkv_proj"),
    ("mlp", ("gate_up_proj", "down_proj"), "one layer holds gate and up: gate_up_proj"),
    ("mlp", ("fc1", "fc2"), "it has no gate: fc2(act(fc1(x)))"),
)
_CHOICES = (ast.IfExp, ast.BoolOp, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass(frozen=True)
class Structure:
    """What a block is.

    Attributes:
        kind: "attention" or "mlp".
        layers: Names of the layers that belong together, in the order in which they are computed.
        reason: Why they have to be called one by one; "" where they are not.
        activation: A gated MLP's, in the words of `lora_mlp`.
        others: What else a gated MLP is made of: each name, and the module's class, or the function itself.
    """

    kind: str
    layers: tuple[str, ...]
    reason: str = ""
    activation: str = ""
    others: tuple[tuple[str, Any], ...] = ()


def structure(module: nn.Module, forward: Callable[..., Any]) -> Structure | None:
    """See what a module is; None if it is no block, whatever else it is.

    Args:
        module: Any.
        forward: The function that computes it, of its class.
    """
    children = module._modules.keys()
    if children >= set(ATTENTION):
        return Structure("attention", ATTENTION, _attention_reason(forward))
    if children >= set(MLP):
        return _gated(module, forward)
    for kind, layers, reason in _OTHERS:
        if children >= set(layers):
            return Structure(kind, layers, reason)
    return None


def members(module: nn.Module, layers: Sequence[str]) -> list[nn.Module]:
    """The layers of a block."""
    return [module._modules[name] for name in layers]


@functools.cache
def _attention_reason(forward: Callable[..., Any]) -> str:
    """Why a forward's calls of q_proj, k_proj and v_proj may not be one; "" if they may."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(forward))))
    except (OSError, TypeError, SyntaxError):
        return "the source of its forward cannot be read"
    calls = [node for node in ast.walk(tree) if _is_projection(node)]
    if sorted(call.func.attr for call in calls) != sorted(ATTENTION):
        return "its forward does not call each of q_proj, k_proj and v_proj once"
    given = [call.args[0] for call in calls if len(call.args) == 1 and not call.keywords]
    if len(given) < len(calls) or len({x.id if isinstance(x, ast.Name) else x for x in given}) > 1:
        return "its forward does not call q_proj, k_proj and v_proj on one input"
    for statements in _lists(tree):
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
    return ""


def _is_projection(node: ast.AST) -> bool:
    """Whether it is a call of self.q_proj, self.k_proj or self.v_proj."""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute) and node.func.attr in ATTENTION
        and isinstance(node.func.value, ast.Name) and node.func.value.id == "self"
    )  # fmt: skip


def _lists(tree: ast.AST) -> Iterator[list[ast.stmt]]:
    """Every list of statements, the inner ones last."""
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            statements = getattr(node, field, None)
            if isinstance(statements, list):
                yield statements


def _gated(module: nn.Module, forward: Callable[..., Any]) -> Structure:
    """What a module with a gate computes, found by running it."""
    rest = {name: child for name, child in module._modules.items() if name not in MLP and child is not None}
    functions = {name: f for name, f in vars(module).items() if callable(f) and name[0] != "_" and name != "forward"}
    others = (*((name, type(child)) for name, child in rest.items()), *functions.items())
    holding = [name for name, child in rest.items() if any(True for _ in (*child.parameters(), *child.buffers()))]
    holding += [name for own in (module._parameters, module._buffers) for name, t in own.items() if t is not None]
    if holding:
        return Structure("mlp", MLP, f"it has more than three layers and an activation: {', '.join(holding)}")
    try:
        found = {_activation(module, forward, rest, training) for training in (True, False)}
    except Exception as error:  # a stranger's code, with stand-ins in place of its layers
        return Structure("mlp", MLP, f"its forward cannot be followed: {type(error).__name__}: {error}")
    if len(found) > 1 or "" in found:
        known = ", ".join(ACTIVATIONS)
        return Structure("mlp", MLP, f"it is not down_proj(act(gate_proj(x)) · up_proj(x)) with act one of {known}")
    return Structure("mlp", MLP, "", found.pop(), others)


@torch.no_grad()
def _activation(
    module: nn.Module, forward: Callable[..., Any], rest: dict[str, nn.Module], training: bool
) -> str:  # fmt: skip
    """Run a gated MLP with stand-ins for its layers: which activation it has, "" if it computes anything else."""
    x = torch.zeros(1, 1, 8, dtype=torch.float64, device="cpu")
    gate = torch.linspace(-60, 60, 481, dtype=x.dtype, device="cpu").view(1, 1, -1)
    up, y, given = gate.flip(-1) / 7 + 1, torch.zeros_like(x), []

    def stand_in(name: str, result: Tensor) -> Callable[[Tensor], Tensor]:
        def call(t: Tensor) -> Tensor:
            given.append((name, t))
            return result.clone() if name != "down_proj" else result

        return call

    modules = {name: copy.deepcopy(child).train(training) for name, child in rest.items()}
    modules |= {name: stand_in(name, result) for name, result in zip(MLP, (gate, up, y), strict=True)}
    twin = object.__new__(type(module))
    object.__setattr__(twin, "__dict__", vars(module) | {"training": training, "_modules": modules})
    if forward(twin, x) is not y or sorted(name for name, _ in given) != sorted(MLP):
        return ""
    inputs = dict(given)
    if not (inputs["gate_proj"] is inputs["up_proj"] is x):
        return ""
    h = inputs["down_proj"]
    matching = (
        name for name, act in ACTIVATIONS.items()
        if h.shape == gate.shape and torch.allclose(h, act(gate) * up, rtol=1e-8, atol=1e-8)
    )  # fmt: skip
    return next(matching, "")
