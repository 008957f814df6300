"""The operator that draws the noise of dropout; the other operators are pure."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels import plan

__all__ = ["draw_noise", "draw_shard"]

_library = torch.library.Library("lora_kernels", "FRAGMENT")
_library.define(
    "draw_noise(Tensor x, Tensor unique, str backend, int[2] dropout_shard=[0, 1], int count=1) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded),
)


def draw_shard(x: Tensor, backend: str, dropout_shard: Sequence[int] = (0, 1), count: int = 1) -> Tensor:
    """Draw the noise that decides `count` masks of x, `[*, in]`, from the device's default torch generator.

    With `dropout_shard` = (i, n), draw n times and return the i-th draw, so that equal generators stay equal.
    """
    index, shards = dropout_shard
    for i in range(shards):
        drawn = plan.contractions(backend).draw_noise(x, count)
        if i == index:
            noise = drawn
    return noise


def _draw_noise(
    x: Tensor, unique: Tensor, backend: str, dropout_shard: Sequence[int] = (0, 1), count: int = 1
) -> Tensor:
    """Run `draw_shard` for compilers, and keep them from merging calls.

    Compilers merge equal calls, even of random operators if these are not PyTorch's own. They never merge two `empty`,
    so a new `empty` as `unique` makes every call different, and layers that read the same x get masks of their own.
    """
    return draw_shard(x, backend, dropout_shard, count)


_library.impl("draw_noise", _draw_noise, "CompositeExplicitAutograd")
torch.library.register_fake("lora_kernels::draw_noise", _draw_noise, lib=_library)

draw_noise = torch.ops.lora_kernels.draw_noise.default
