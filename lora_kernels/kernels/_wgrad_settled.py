"""What a launch of `wgrad` computes, and a launch that is settled for tensors of one kind."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.kernels._activation import Activation
from lora_kernels.kernels._launch import Launch, arrivals

__all__ = ["DGATE", "DUP", "NO_ACTIVATION", "H", "SettledWgrad", "ThinProduct"]

NO_ACTIVATION = Activation(None, None, None, None, None)
# The wide operands that an activation makes.
H, DGATE, DUP = range(3)


class ThinProduct(NamedTuple):
    """One g = wideᵀ thin of a launch.

    Attributes:
        thin: `[M, T]`.
        dtype: The dtype of g.
        turned: Whether g is `[T, W]` instead of `[W, T]`.
        keep: Packed mask `[M, ceil(W/32)]` of the wide operand, or None.
        into: A g to add the product to, any strides, or None.
        b: `[W, T]`, to compute ds = alpha · wide b as well, `[M, T]`, or None; T at most a tile wide.
        ds: The tensor to write ds to, or None.
        alpha: Multiplies ds.
        wide: H, DGATE or DUP: the wide operand, where an activation makes it.
    """

    thin: Tensor
    dtype: torch.dtype
    turned: bool
    keep: Tensor | None = None
    into: Tensor | None = None
    b: Tensor | None = None
    ds: Tensor | None = None
    alpha: float = 1.0
    wide: int = H


class SettledWgrad(NamedTuple):
    """A launch for tensors of one kind. A call allocates and launches.

    Attributes:
        launch: The launch.
        new_gs: Allocates each g; None for a g that is added to a gradient.
        new_dss: Allocates each ds; None for a ds that is given or absent.
        new_g_parts: Allocates the parts of all g; None without a split.
        new_ds_parts: Allocates the parts of all ds, or None.
        counted: Number of counters.
    """

    launch: Launch
    new_gs: list[Callable[[], Tensor] | None]
    new_dss: list[Callable[[], Tensor] | None]
    new_g_parts: Callable[[], Tensor] | None
    new_ds_parts: Callable[[], Tensor] | None
    counted: int

    def __call__(
        self, wide: Tensor, thins: tuple[Tensor, ...] | None, keeps: tuple[Tensor | None, ...] | None,
        intos: Sequence[Tensor | None], bs: tuple[Tensor | None, ...] | None, dss: Sequence[Tensor | None],
        alphas: tuple[float, ...] | None, activation: Activation = NO_ACTIVATION, segments: Any = None,
    ) -> tuple[list[Tensor | None], Sequence[Tensor | None]]:  # fmt: skip
        """Return each g, None for a g that was added; and each ds, None for an absent ds."""
        start, new_gs, new_dss, new_g_parts, new_ds_parts, counted = self
        gs: list[Tensor | None] = [new and new() for new in new_gs]
        there = gs if None not in new_gs else [into if g is None else g for g, into in zip(gs, intos, strict=True)]
        if new_ds_parts:
            dss = [new() if new else ds for new, ds in zip(new_dss, dss, strict=True)]
        g_parts, ds_parts = new_g_parts and new_g_parts(), new_ds_parts and new_ds_parts()
        counters = arrivals(wide.device, counted) if counted else None
        results = tuple(there) or None, g_parts, tuple(dss) or None, ds_parts
        table = segments and segments.table
        start(wide, *activation[1:], thins, keeps, bs, *results, counters, table, alphas)
        return gs, dss
