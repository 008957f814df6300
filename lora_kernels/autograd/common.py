"""Helpers that the Functions and operators of all operations share."""

import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from lora_kernels import reference
from lora_kernels.autograd.stored import save_tensors
from lora_kernels.autograd.written import explained
from lora_kernels.passes.layer import Weight, tensors_to_save

__all__ = [
    "Context", "autocast_off", "autocasts", "backward_products", "by_reference", "contiguous", "fake_gradients",
    "gradient", "gradients", "guard_backward", "is_exporting_to_onnx", "plain_scaling", "register", "register_flops",
    "save",
]  # fmt: skip


class Context(Protocol):
    """The context that PyTorch passes to forward and backward of a Function; operations set further attributes."""

    @property
    def needs_input_grad(self) -> Any:
        """Return for each input whether its gradient is needed."""

    @property
    def saved_tensors(self) -> tuple[Any, ...]:
        """Return the saved tensors."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Save tensors for backward."""

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        """Mark outputs that have no gradients."""

    def set_materialize_grads(self, value: bool) -> None:
        """Choose between zeros and None for the gradients of unused outputs."""

    def __getattr__(self, name: str) -> Any: ...

    def __setattr__(self, name: str, value: Any) -> None: ...


_TWICE = (
    "trying to differentiate twice a function that was marked with @once_differentiable; "
    'backend="reference" of the call, or layer.backend = "reference" of each LoRALinear, differentiates any number of '
    "times, and so does a PEFT model after lora_kernels.unpatch_peft(model)."
)
_NOTHING = contextlib.nullcontext()


def autocast_off(dy: Tensor) -> contextlib.AbstractContextManager:
    """Return a context for backward without autocast, which would change the dtypes that forward has settled."""
    device_type = dy.device.type
    return torch.autocast(device_type, enabled=False) if autocasts(device_type) else _NOTHING


def autocasts(device_type: str) -> bool:
    """Return whether autocast is on for a type of device."""
    # CPU and CUDA always support autocast, so skip the query, which takes as long as a small check.
    available = device_type in ("cuda", "cpu") or torch.amp.is_autocast_available(device_type)
    return available and torch.is_autocast_enabled(device_type)


def gradient(ctx: Context, adapter: Tensor | Any) -> Tensor | None:
    """Return the `.grad` to add to in place, or None unless the engine would only add in place too.

    It adds nothing where `backward(inputs=...)` leaves the adapter out or `torch.autograd.grad` returns gradients.
    The gradient must be plain and without hooks. The result is None in grad mode, because backward is then
    differentiated and the engine adds out of place. `guard_backward` hides grad mode from the function that it
    wraps, so call `gradient` outside.
    """
    grad = None if adapter is None or not adapter.is_leaf or torch.is_grad_enabled() else adapter.grad
    if grad is None or grad.layout is not torch.strided or grad.is_neg():
        return None
    # The engine refuses to write to elements that share memory.
    if torch._debug_has_internal_overlap(grad) == 1:
        return None
    if adapter._backward_hooks or getattr(adapter, "_post_accumulate_grad_hooks", None):
        return None
    if not _is_added(ctx, adapter):
        return None
    torch.autograd.graph.increment_version(grad)
    return grad


def _is_added(ctx: Context, adapter: Tensor) -> bool:
    """Return whether the engine, in the backward that is running, adds to the adapter's `.grad`."""
    for node, _ in ctx.next_functions:
        if getattr(node, "variable", None) is adapter:
            try:
                return torch._C._will_engine_execute_node(node)
            except RuntimeError:
                # `torch.autograd.grad` returns the adapter's gradient.
                return False
    return False


def gradients(
    ctx: Context, adapters: Sequence[tuple[Tensor, Tensor] | None]
) -> list[tuple[Tensor | None, Tensor | None]]:
    """Return the gradients to add to in place, or only None if two are the same, because one launch adds to all."""
    if not any(adapters):
        return [(None, None)] * len(adapters)
    found = [(None, None) if pair is None else (gradient(ctx, pair[0]), gradient(ctx, pair[1])) for pair in adapters]
    places = [g.data_ptr() for pair in found for g in pair if g is not None]
    return found if len(set(places)) == len(places) else [(None, None)] * len(found)


class _Once(torch.autograd.Function):
    """Return gradients with the tensors that they were computed from in their graph, and refuse to differentiate them.

    PyTorch's `once_differentiable` leaves these tensors out: `torch.autograd.grad` then calls them unused, and a
    penalty on the gradients changes nothing if what backward was given does not require grad.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, count: int, *tensors: Any) -> tuple[Any, ...]:
        return tuple(None if t is None else t.detach() for t in tensors[:count])

    @staticmethod
    def backward(ctx: FunctionCtx, *_: Tensor | None) -> None:
        raise RuntimeError(_TWICE)


class _Read:
    """A context whose saved tensors are read already, because checkpointing lets a backward read them only once."""

    def __init__(self, ctx: Context) -> None:
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def guard_backward(name: str) -> Callable[[Callable], Callable]:
    """Make the gradients that a backward of a Function returns raise where they are differentiated.

    Errors of tensors that were written in place name the call, `name`, and the layer.
    """

    def guard(backward: Callable) -> Callable:
        def call(ctx: Context, *arguments: Any) -> Any:
            # Only in grad mode is a backward differentiated.
            if not torch.is_grad_enabled():
                return backward(ctx, *arguments)
            read = _Read(ctx)
            with torch.no_grad():
                results = backward(read, *arguments)
            sources = [t for t in (*arguments, *read.saved_tensors) if isinstance(t, Tensor)]
            return _Once.apply(len(results), *results, *sources)

        return _explain_written(name, call)

    return guard


def _explain_written(name: str, backward: Callable) -> Callable:
    """Make the errors of a backward name the call and the layer where a tensor was written in place."""

    def call(ctx: Context, *arguments: Any) -> Any:
        try:
            return backward(ctx, *arguments)
        except RuntimeError as error:
            if said := explained(name, ctx, error):
                raise said from error
            raise

    return call


def plain_scaling(lora_A: Tensor, scaling: float) -> tuple[Tensor, float]:
    """Return A and the scaling as a plain number; multiply a scaling that is a compiler's symbol into A."""
    if isinstance(scaling, torch.SymFloat):
        return lora_A.to(torch.promote_types(lora_A.dtype, torch.float32)) * scaling, 1.0
    return lora_A, scaling


def _differentiates_once(call: str) -> Callable:
    """Return an autograd formula that refuses, because the backward operators have no derivative."""

    def refuse(ctx: Context, *_: Tensor | None) -> None:
        raise RuntimeError(f"{call}: {_TWICE}")

    return refuse


def backward_products(inner: int, cols: int, rank: int, need_x: bool, need_A: bool, need_B: bool) -> int:
    """Count the multiplications per row in a layer's backward: for dx, dA, dB, and ds if dx or dA is needed."""
    thin = rank * (inner * (need_x + need_A) + cols * (need_B + (need_x or need_A)))
    return inner * cols * need_x + thin


def contiguous(
    gradients: Sequence[Tensor | None], shape: Sequence[int]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return dx, dA and dB, of them those that are there, contiguous as `fake_gradients` promises, and dx in `shape`.

    Some forms of the products return padded or transposed results.
    """
    dx, d_lora_A, d_lora_B = (None if g is None else g.contiguous() for g in gradients)
    return None if dx is None else dx.view(shape), d_lora_A, d_lora_B


def fake_gradients(dy, x, inner, lora_B, s, dtype, dtype_A, dtype_B, needed):
    """Return the needed ones of dx, dA and dB of one layer without values; dx has `inner` features."""
    need_x, need_A, need_B = needed
    return (
        dy.new_empty(*dy.shape[:-1], inner, dtype=dtype) if need_x else None,
        dy.new_empty(lora_B.shape[1], x.shape[-1], dtype=dtype_A) if need_A else None,
        dy.new_empty(dy.shape[-1], s.shape[1], dtype=dtype_B) if need_B else None,
    )


def register_flops(formulas: dict[Any, Callable[..., int]]) -> None:
    """Register the formulas with PyTorch's FLOP counter if its module is loaded; an import here would load Triton."""
    if "torch.utils.flop_counter" not in sys.modules:
        return
    from torch.utils import flop_counter
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    packets = {operator.overloadpacket: formula for operator, formula in formulas.items()}
    for operator, formula in packets.items():
        if operator not in flop_counter.flop_registry:
            flop_counter.register_flop_formula(operator)(formula)
    # An active counter has its own copy of the registry.
    for mode in _get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", None)
        if isinstance(counter, flop_counter.FlopCounterMode):
            for operator in packets:
                counter.flop_registry.setdefault(operator, flop_counter.flop_registry[operator])


def save(
    ctx: Context, x: Tensor, weight: Weight | None, lora_A: Tensor, lora_B: Tensor, s: Tensor, keep: Tensor | None,
    alpha: float, backend: str, needs: Sequence[bool],
) -> None:  # fmt: skip
    """Save the tensors that one layer's needed gradients take; `needs` has a flag for each of x, W, A and B."""
    need_x, need_weight, need_A, need_B = needs
    saved = tensors_to_save(weight, lora_A, lora_B, s, keep, need_x, need_A, need_B)
    save_tensors(ctx, [x if need_A or need_weight else None, *saved])
    ctx.alpha, ctx.backend = alpha, backend
    ctx.adapter_dtypes = lora_A.dtype, lora_B.dtype


def is_exporting_to_onnx() -> bool:
    """Return whether the exporter to ONNX, which knows PyTorch's operators alone, takes operators apart."""
    return "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()


def by_reference(
    x: Tensor, weights: Sequence[Weight], lora_As: Sequence[Tensor | None], lora_Bs: Sequence[Tensor | None],
    biases: Sequence[Tensor | None], scalings: Sequence[float], dropout_ps: Sequence[float],
) -> list[Tensor]:  # fmt: skip
    """Compute layers that read one x by PyTorch's own operators alone, with adapters in x's dtype."""
    dense = [w if isinstance(w, Tensor) else reference.dequantize(w, x.dtype) for w in weights]
    pairs: Any = [
        None if A is None else (A.to(x.dtype), B.to(x.dtype))  # type: ignore[union-attr]
        for A, B in zip(lora_As, lora_Bs, strict=True)
    ]
    how = dict(biases=list(biases), scaling=list(scalings), dropout_p=list(dropout_ps))
    return list(reference.lora_projections(x, dense, pairs, **how))  # type: ignore[arg-type]


def register(
    library: torch.library.Library, name: str, *, composed: Callable, forward: Callable, backward: Callable,
    fake_forward: Callable, fake_backward: Callable, save: Callable, differentiate: Callable,
) -> list[torch._ops.OpOverload]:  # fmt: skip
    """Register the three operators of an operation, whose schemas are already defined; return the operators.

    Args:
        library: The library that has the schemas.
        name: Name of the first operator, which a compiler traces through; the others are `name`_forward and
            `name`_backward. The public call is lora_`name`.
        composed: Chooses a backend, draws noise and calls `name`_forward; for ONNX, calls the reference.
        forward: A pure function of its arguments.
        backward: The derivative of `forward`.
        fake_forward: `forward` for shapes without values.
        fake_backward: `backward` for shapes without values.
        save: Saves tensors for backward, given a context, inputs and outputs.
        differentiate: Calls `name`_backward, given a context and the gradients of the outputs.
    """
    library.impl(name, composed, "CompositeImplicitAutograd")
    for half, function, fake in (("forward", forward, fake_forward), ("backward", backward, fake_backward)):
        library.impl(f"{name}_{half}", function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"lora_kernels::{name}_{half}", fake, lib=library)
    differentiate = _explain_written(f"lora_{name}", differentiate)
    torch.library.register_autograd(f"lora_kernels::{name}_forward", differentiate, setup_context=save, lib=library)
    again = _differentiates_once(f"lora_{name}")
    torch.library.register_autograd(f"lora_kernels::{name}_backward", again, lib=library)
    return [getattr(torch.ops.lora_kernels, name + half).default for half in ("", "_forward", "_backward")]
