"""The experts of a mixture with PEFT's adapters on their parameters, by `lora_grouped_linear`.

    h_e = x_e W_eᵀ + Σᵢ scalingᵢ · x_e A_ieᵀ B_ieᵀ + bias_e        i: the active adapters, e: the experts

transformers keeps the weights of all experts as parameters `[E, out, in]`, or `[E, in, out]`, of one module, whose
forward is chosen from a registry (`ExpertsInterface`). PEFT wraps such a module in a `ParamWrapper` for each parameter,
one in the other. PEFT's own forward adds scaling · B A to the weights of all experts, twice a call, and keeps the sum
for backward, which computes a gradient of its size. Here the forward of the outermost wrapper computes the module: the
routing and the weighted sum as transformers' own "grouped_mm" has them, the products by `lora_grouped_linear`, and no
tensor of the size of the weights.

`read` decides at each call, for the reasons in `layer`: what it does not know goes to PEFT's own forward, and it says
why. PEFT computes in the dtype of the weights, whatever autocast says, and so does this.

Sources: PEFT 0.21, `tuners/lora/layer.py` (`ParamWrapper`, layout of A and B); transformers 5.24, `integrations/moe.py`
(the registry and its contract).
"""

import functools
import math
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lora_kernels.autograd.common import autocast_off
from lora_kernels.constants import MAX_ADAPTERS
from lora_kernels.functional import lora_grouped_linear
from lora_kernels.peft.bases import bare
from lora_kernels.peft.classes import stock_class
from lora_kernels.peft.forwards import (
    call_replacement,
    describe,
    is_called_plainly,
    is_in_force,
    parts_are_own,
    replaced_part,
    replacement,
)
from lora_kernels.peft.layer import is_dense, is_traced

__all__ = ["Experts", "Term", "experts_forward", "inner_wrappers", "read", "register", "wrapped_forward"]

# What transformers calls the implementation that this one computes, and this one.
_STOCK, _OWN = "grouped_mm", "lora_kernels"
# What the wrapper's forward calls and reads of its class.
_MEMBERS = ("_check_forward_args", "_activate_lora", "get_delta_factors", "get_delta_weight", "get_param")
_STATE = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "num_experts", "config")


class Term(NamedTuple):
    """An active adapter of one parameter: A `[E, r, in]`, B `[E, out, r]` and scaling."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float


class Experts(NamedTuple):
    """An experts module, and the active adapters of its parameters by the names of these."""

    module: Any
    adapters: Mapping[str, list[Term]]


def wrapped_forward(stock: Callable[..., Tensor], backend: str) -> Any:
    """Make a forward of PEFT's `ParamWrapper` that computes the experts inside if `read` knows them; it needs a `mark`.

    Args:
        stock: PEFT's forward.
        backend: Backend for `lora_grouped_linear`.
    """

    @functools.wraps(stock)
    def forward(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if (other := replacement(forward)) is stock:
            return stock(self, x, *args, **kwargs)
        if other is not None:
            called, y = call_replacement(other, forward, self, x, *args, **kwargs)
            if called:
                return y
        found = read(self, x, *args, **kwargs)
        if isinstance(found, str):
            return stock(self, x, *args, **kwargs)
        return experts_forward(found.module, x, *args, adapters=found.adapters, backend=backend)

    return forward


def experts_forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *,
    adapters: Mapping[str, list[Term]] = types.MappingProxyType({}), backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Compute the experts of a transformers module, with the contract of transformers' `ExpertsInterface`.

    y_t = Σ_k weight_tk · down_e(a(up_e(x_t))), where e is the k-th expert of token t. An id that is no expert of this
    module, as expert parallelism has them, adds 0. The host waits for nothing.

    Args:
        module: The experts: parameters `gate_up_proj` or `up_proj`, and `down_proj`, of all experts in one.
        hidden_states: x, `[tokens, hidden]`.
        top_k_index: Ids of the experts of each token, `[tokens, k]`.
        top_k_weights: Their weights, `[tokens, k]`.
        adapters: The adapters of each parameter by its name; none by default.
        backend: As in `lora_linear`.

    Returns:
        y, `[tokens, hidden]`, in x's dtype.
    """
    top_k = top_k_index.shape[-1]
    ids, order = torch.sort(top_k_index.reshape(-1))
    # Where each expert's rows begin; ids from num_experts on come last.
    offsets = torch.searchsorted(ids, torch.arange(module.num_experts + 1, dtype=ids.dtype, device=ids.device))
    up = "gate_up_proj" if module.has_gate else "up_proj"
    h = _product(module, up, hidden_states[order // top_k], offsets, adapters, backend)
    h = module._apply_gate(h) if module.has_gate else module.act_fn(h)
    h = _product(module, "down_proj", h, offsets, adapters, backend)
    if module.has_post_expert_norm:
        h = module.post_expert_norm(h)
    h = h * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.shape[0], device=order.device)
    y = h[place].view(hidden_states.shape[0], top_k, h.shape[-1]).sum(1)
    return y.to(hidden_states.dtype)


def _product(
    module: Any, name: str, x: Tensor, offsets: Tensor, adapters: Mapping[str, list[Term]], backend: str
) -> Tensor:
    """Compute the product of rows with one parameter of their experts, and the adapters of that parameter."""
    weight = getattr(module, name)
    dtype, bias, terms = weight.dtype, None, adapters.get(name, [])
    if module.has_bias:
        bias = getattr(module, f"{name}_bias").to(dtype)
    if module.is_transposed:
        weight = weight.mT
    # Adapters in fp32 over 16 bits are rounded as they are read; PEFT casts all others as well.
    pairs = [
        [t if t.dtype is dtype or (t.dtype is torch.float32 and dtype.itemsize == 2) else t.to(dtype) for t in term[:2]]
        for term in terms
    ]
    with autocast_off(x):
        return lora_grouped_linear(
            x.to(dtype), weight, [A for A, _ in pairs], [B for _, B in pairs], offsets,
            scaling=[term.scaling for term in terms], bias=bias, backend=backend,
        )  # fmt: skip


def register() -> None:
    """Register `experts_forward` with transformers as "lora_kernels", if transformers' experts are imported."""
    moe = _moe()
    if moe is not None and _OWN not in moe.ALL_EXPERTS_FUNCTIONS:
        moe.ALL_EXPERTS_FUNCTIONS.register(_OWN, experts_forward)


def inner_wrappers(model: nn.Module) -> dict[int, Any]:
    """Return, for each wrapper inside another one, by identity, the outermost wrapper around it."""
    kind = _wrapper()
    found: dict[int, Any] = {}
    for module in model.modules() if kind else ():
        inner = module.__dict__["_modules"].get("base_layer") if isinstance(module, kind) else None
        if isinstance(inner, kind):
            found[id(inner)] = found.get(id(module), module)
    return found


def read(wrapper: Any, x: Any = None, *args: Any, **kwargs: Any) -> Experts | str:
    """Return the experts and their adapters, or the reason why PEFT's own forward has to serve a call.

    Args:
        wrapper: The outermost `ParamWrapper`.
        x: The input of a call; None to look at the present state alone.
        args: The further arguments of the call.
        kwargs: Its keyword arguments.
    """
    if reason := _call_reason(x, args, kwargs):
        return reason
    chain = [wrapper]
    while isinstance(inner := chain[-1].__dict__["_modules"]["base_layer"], _wrapper()):
        if not bare(inner, type(inner)):
            return f"the wrapper of {inner.parameter_name} has a hook, or its forward is replaced on the instance"
        if not is_called_plainly(type(inner)):
            return f"the wrapper of {inner.parameter_name} has a call of its class's own"
        if not is_in_force(type(inner).forward):
            return f"the wrapper of {inner.parameter_name} is not patched, or its forward was replaced"
        chain.append(inner)
    if reason := next(filter(None, map(_state_reason, chain)), "") or _module_reason(inner):
        return reason
    named = ("gate_up_proj" if inner.has_gate else "up_proj"), "down_proj"
    if reason := next(filter(None, (_parameter_reason(inner, name) for name in named)), ""):
        return reason
    adapters: dict[str, list[Term]] = {}
    for one in chain:
        if one.parameter_name not in named:
            return f"{one.parameter_name} is no weight of the experts"
        terms = adapters[one.parameter_name] = []
        for name in one.active_adapters:
            if name in one.__dict__["_modules"]["lora_A"]:
                term = _term(one, name)
                if isinstance(term, str):
                    return term
                terms.append(term)
        if len(terms) > MAX_ADAPTERS:
            return f"{len(terms)} active adapters; one call adds {MAX_ADAPTERS}"
    if not any(adapters.values()):
        return "no active adapter on these experts"
    return Experts(inner, adapters)


def _call_reason(x: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    if is_traced():
        return "inside torch.func, forward-mode AD, torch.jit.trace, a TorchFunctionMode or a hook on all modules"
    if not parts_are_own() and (part := replaced_part()):
        return f"{part[0]} was replaced by {describe(part[1])}"
    if x is None:
        return ""
    if kwargs or len(args) != 2 or not all(map(is_dense, (x, *args))):
        return "called with other arguments than hidden states, ids and weights"
    if x.dim() != 2 or args[0].dim() != 2 or args[0].shape != args[1].shape or x.shape[0] != args[0].shape[0]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, *args))
        return f"called with shapes {shapes}, not [tokens, hidden], [tokens, k], [tokens, k]"
    return ""


def _state_reason(wrapper: Any) -> str:
    """Return why a wrapper's own state needs PEFT's forward."""
    kind, fields = stock_class(type(wrapper)), wrapper.__dict__
    if kind is not _wrapper():
        return f"lora.{type(wrapper).__name__} is not PEFT's ParamWrapper itself"
    if theirs := _foreign_member(kind):
        return f"{theirs} of lora.ParamWrapper is not PEFT's own"
    if fields["_disable_adapters"]:
        return "adapters are disabled"
    if fields["merged_adapters"]:
        return f"merged: {', '.join(fields['merged_adapters'])}"
    return ""


def _module_reason(module: Any) -> str:
    """Return why the wrapped module is not computed here."""
    kind = type(module)
    if not _is_dispatched(kind):
        return f"{kind.__name__} is no experts module of transformers (ExpertsInterface)"
    if not bare(module, kind):
        return "the experts have a hook, or their forward is replaced on the instance"
    if not is_called_plainly(kind):
        return f"{kind.__name__} has a call of its own"
    if "parametrizations" in module.__dict__["_modules"]:
        return f"parametrized: {', '.join(module.parametrizations)}"
    if missing := [name for name in _STATE if not hasattr(module, name)]:
        return f"this transformers keeps its state elsewhere ({', '.join(missing)})"
    chosen = module.config._experts_implementation
    if chosen not in (_STOCK, _OWN):
        return f"the experts implementation is {chosen!r}, not {_STOCK!r}"
    if not _finds_own(kind, chosen):
        return f"the experts implementation {chosen!r} was replaced"
    return ""


def _parameter_reason(module: Any, name: str) -> str:
    """Return why the experts' parameter of a name is not computed here."""
    weight = module.__dict__["_parameters"].get(name)
    if type(weight) is not nn.Parameter or hasattr(weight, "ds_shape"):
        return f"{name} is a {type(weight).__name__}, quantised or sharded"
    if weight.layout is not torch.strided or weight.dim() != 3:
        return f"{name} has {weight.dim()} dimensions and layout {weight.layout}, not 3 and strided"
    if weight.shape[0] != module.num_experts or module.num_experts == 1:
        return f"{name} has {weight.shape[0]} experts of {module.num_experts}; there must be two or more, and all"
    if not weight.is_floating_point() or weight.itemsize < 2:
        return f"{name} is {str(weight.dtype).removeprefix('torch.')}"
    bias = getattr(module, f"{name}_bias", None) if module.has_bias else None
    if bias is not None and type(bias) is not nn.Parameter:
        return f"{name}_bias is a {type(bias).__name__}"
    return ""


def _term(wrapper: Any, name: str) -> Term | str:
    """Return an adapter of a wrapper, or the reason why its parts have to be called."""
    modules, scaling = wrapper.__dict__["_modules"], wrapper.scaling[name]
    experts, weights = wrapper.num_experts, []
    for part in ("lora_A", "lora_B"):
        linear = modules[part].__dict__["_modules"][name]
        if not bare(linear, nn.Linear):
            return f"{part}.{name} has a hook, or is no plain nn.Linear"
        weight = linear.__dict__["_parameters"].get("weight")
        if type(weight) is not nn.Parameter or weight.layout is not torch.strided:
            return f"{part}.{name}.weight is a {type(weight).__name__}, or not strided"
        if linear.bias is not None:
            return f"lora_bias=True: {part}.{name} has a bias"
        weights.append(weight)
    if wrapper.lora_variant.get(name) is not None:
        return f"adapter {name!r} is a variant"
    if isinstance(scaling, Tensor) or not math.isfinite(scaling):
        return f"scaling[{name!r}] is {scaling}, not a finite number"
    A, B = weights
    lora_A = A.reshape(experts, -1, A.shape[1])
    # PEFT keeps the experts side by side in the columns of B.
    lora_B = B.reshape(B.shape[0], -1, experts).permute(2, 0, 1)
    return Term(lora_A, lora_B, scaling)


def _foreign_member(kind: type) -> str:
    """Return the name of what the wrapper's forward calls of its class and others have set, "" if there is none."""
    for name in _MEMBERS:
        member = getattr(kind, name, None)
        if getattr(getattr(member, "__wrapped__", member), "__globals__", None) is not vars(
            sys.modules[kind.__module__]
        ):
            return name
    return ""


def _is_dispatched(kind: type) -> bool:
    """Return whether the forward of a class is that of transformers, which looks the implementation up."""
    moe, forward = _moe(), getattr(kind, "forward", None)
    return moe is not None and getattr(forward, "__globals__", None) is vars(moe) and hasattr(forward, "__wrapped__")


def _finds_own(kind: type, chosen: str) -> bool:
    """Return whether a class of experts finds, by a name, the function that transformers or this module defines."""
    moe, forward = _moe(), cast(Any, kind).forward
    names = forward.__code__.co_freevars
    if "experts_interface" not in names:
        return False
    # `use_experts_implementation` takes another interface than transformers' own, too.
    interface = forward.__closure__[names.index("experts_interface")].cell_contents
    own = experts_forward if chosen == _OWN else getattr(moe, f"{_STOCK}_experts_forward", None)
    return interface.get(chosen) is own


# A compiler does not find the globals of a function to be those of its module.
_foreign_member._dynamo_marked_constant = True  # type: ignore[attr-defined]
_is_dispatched._dynamo_marked_constant = True  # type: ignore[attr-defined]
_finds_own._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _wrapper() -> Any:
    """Return PEFT's `ParamWrapper`, or () if this PEFT has none or is not imported."""
    return getattr(sys.modules.get("peft.tuners.lora.layer"), "ParamWrapper", ())


def _moe() -> Any:
    """Return transformers' module of experts implementations, or None if it is not imported."""
    return sys.modules.get("transformers.integrations.moe")
