"""`lora_mlp`: check, apply autocast, choose a backend, call it."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lora_kernels import autograd, passes, plan
from lora_kernels.activations import activated
from lora_kernels.autograd.common import autocasts
from lora_kernels.autograd.written import check_input
from lora_kernels.functional import checks
from lora_kernels.functional.gate import (
    BACKENDS,
    cast,
    is_proxy,
    is_transforming,
    is_watched,
    record,
    takes_reference,
    wait_for,
    without_autocast,
)
from lora_kernels.functional.projections import alone, arguments, check_each, is_small, project_jointly, with_floats
from lora_kernels.passes.layer import GIVEN, Adapted, Projection

__all__ = ["lora_mlp"]


def lora_mlp(
    x: Tensor, gate: Projection | None, up: Projection, down: Projection, *,
    activation: str = "silu", recompute: bool = False, backend: str = "auto",
    accumulate_grad: bool | Sequence[bool] = False,
) -> Tensor:  # fmt: skip
    """Apply a gated MLP whose layers may have low-rank adapters.

    y = down(a(gate(x)) · up(x)), or down(a(up(x))) without a gate. Each layer computes what `lora_linear` computes,
    with a dropout mask of its own. An MLP of two layers, like GPT-2's or one with squared ReLU, has no gate:

        up, down = Projection(w_up, a_up, b_up), Projection(w_down, a_down, b_down)
        y = lora_mlp(x, None, up, down, activation="gelu_tanh")

    Args:
        x: Activations, `[*, in_features]`; as in `lora_linear`.
        gate: weight `[hidden, in_features]`, a tensor or a `QuantizedWeight`, lora_A, lora_B, bias, scaling and
            dropout_p of the gate, as in `lora_linear`; lora_A and lora_B are None for no adapter. None for an MLP
            without a gate.
        up: The same of up, with weight `[hidden, in_features]`.
        down: The same of down, with weight `[out_features, hidden]`.
        activation: a: "silu" (SwiGLU), "gelu" (GEGLU), "gelu_tanh" (GEGLU, approximated) or "relu2" (squared ReLU).
        recompute: Compute gate(x) and up(x) again in backward instead of saving them. This saves `2 · hidden` elements
            per row and costs about half of the MLP's forward pass.
        backend: As in `lora_linear`.
        accumulate_grad: As in `lora_linear`: one bool for all layers, or one for each.

    Returns:
        y, `[*, out_features]`, as `lora_linear` returns it.

    Raises:
        TypeError, ValueError, RuntimeError: As `lora_linear`, naming the layer; also if the widths do not fit each
            other or `activation` is not a known name.

    Saved for backward: x, gate(x), up(x), and for each layer s and the mask.

    Numerics: as `lora_linear`; gate(x), up(x), h = a(gate(x)) · up(x) and the gradients of all three are rounded once.
    For a few elements on a CPU the call runs `lora_projections`, PyTorch's own activation and `lora_linear`, which save
    h as well.

    Source: Shazeer 2020, arXiv:2002.05202 (SwiGLU, GEGLU); So et al. 2021, arXiv:2109.08668 (squared ReLU).
    """
    if type(x) is not Tensor and is_proxy(x):
        how = dict(activation=activation, recompute=recompute, backend=backend, accumulate_grad=accumulate_grad)
        return record(x, lora_mlp, x, gate, up, down, **how)
    given = ("gate", gate), ("up", up), ("down", down)
    layers: dict[str, Any] = {name: q for name, q in given if name != "gate" or q is not None}
    checks.check_mlp(layers, activation)
    checks.check_flag("lora_mlp", "accumulate_grad", accumulate_grad, "layer")
    added: Any = accumulate_grad if isinstance(accumulate_grad, (list, tuple)) else [accumulate_grad] * len(layers)
    if len(added) != len(layers):
        raise ValueError(f"lora_mlp: accumulate_grad is for {len(added)} layers and there are {len(layers)}.")
    x = wait_for(x)
    device_type = x.device.type if isinstance(x, Tensor) else "cpu"
    autocast, entries, adapters_fit = autocasts(device_type), list(layers.values()), [False] * len(layers)
    if autocast:
        x, entries, adapters_fit = cast(device_type, x, entries)
    checks.check_backend("lora_mlp", backend, BACKENDS)
    check_each("lora_mlp", x, [*layers][:-1], entries[:-1], adapters_fit[:-1], entries)
    shape = *x.shape[:-1], entries[0].weight.shape[0]
    # A placeholder with the shape of h but without its memory.
    h = x.new_empty_strided(shape, (0,) * len(shape))
    check_each("lora_mlp", h, ["down"], entries[-1:], adapters_fit[-1:], entries)
    if autocast:
        with without_autocast(device_type):
            return _mlp(x, entries, activation, recompute, backend, added)
    return _mlp(x, entries, activation, recompute, backend, added)


def _mlp(
    x: Tensor, entries: list[Projection], activation: str, recompute: bool, backend: str, added: Sequence[bool]
) -> Tensor:
    """Compute all layers of a checked call in shared passes, or one after the other."""
    *before, down = entries
    shared, chosen = _backends(x, entries, backend)
    if shared is None:
        # Transforms and traces do not support saved-tensor hooks, which `checkpoint` needs.
        again = recompute and torch.is_grad_enabled() and not is_transforming()
        # Inference tensors have no version, and a compiler takes care of writes itself.
        version = x._version if again and not is_watched() and not x.is_inference() else None

        def compose(x: Tensor) -> Tensor:
            # Backward calls this again, and `checkpoint` does not look whether x was written.
            if version is not None:
                check_input("lora_mlp", x, version, (t for q in entries for t in q[:GIVEN] if isinstance(t, Tensor)))
            # There is at least one layer before the activation, so that `gate` is never None.
            gate: Any
            outs = project_jointly("lora_mlp", x, before, backend, added[:-1], chosen)
            gate, up = (*outs, None)[:2]
            return alone("lora_mlp", activated(gate, up, activation), down, backend, added[-1], chosen)

        if version is not None:
            # Autograd would look at x first, and name no layer.
            return checkpoint(functools.partial(compose, x), use_reentrant=False)
        return checkpoint(compose, x, use_reentrant=False) if again else compose(x)
    if is_watched():
        plain, stored = arguments(entries)
        return autograd.mlp.mlp(x, *plain, activation, recompute, shared, *stored)
    entries = list(map(with_floats, entries))
    tensors: list[Any] = list(itertools.chain.from_iterable(q[:GIVEN] for q in entries))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors)):
        numbers = tuple((q.scaling, q.dropout_p, into) for q, into in zip(entries, added, strict=True))
        y = autograd.mlp.LoRAMLPFunction.apply(x, shared, activation, recompute, numbers, *tensors)
    else:
        y, *_ = passes.mlp.forward(x, entries[:-1], entries[-1], activation, shared)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


def _backends(x: Tensor, entries: list[Projection], backend: str) -> tuple[str | None, str | None]:
    """Return the backend of the shared passes, None to compute layers one after the other, and that of small layers.

    The second is None unless all layers are small calls; then layers one after the other choose their own. Under a
    compiler or a dispatch mode, the first is the requested backend, because the operators choose later.
    """
    adapted: list[Adapted] = [q for q in entries if q.lora_A is not None]
    if not adapted or takes_reference(backend) or checks.is_sharded(x):
        return None, None
    # An adapter that adds nothing gets gradients of 0 when its layer is computed alone.
    if any(q.dropout_p == 1 or not q.lora_A.shape[0] for q in adapted):
        return None, None
    empty = x.numel() == 0 or any(0 in q.weight.shape for q in entries)
    if is_watched():
        return None if empty else plan.requested_backend(backend), None
    chosen = plan.choose(x.device, x.dtype, max(q.lora_A.shape[0] for q in adapted), empty, backend, "lora_mlp")
    if chosen == "torch" and all(is_small(x, q) for q in adapted):
        return None, chosen
    return None if empty else chosen, None
