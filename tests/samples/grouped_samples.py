"""Layers of groups: their tensors by name, the call on them, and the formula written group by group."""

import torch

from lora_kernels import lora_grouped_linear
from lora_kernels.verify.grouped_problems import make_grouped

# the backends that tests of groups run on
BACKENDS = ["torch", "triton"]
# rows of each group, and two rows of none: none, one, and several
SIZES, BEYOND = (0, 1, 7, 4), 2
K, N, RANKS = 12, 10, (3, 2)
E, S = len(SIZES), sum(SIZES) + BEYOND


def draw(device, dtype=torch.float32, adapters=None, *, sizes=SIZES, beyond=BEYOND, k=K, n=N, ranks=RANKS, bias=True):
    """x, weight, bias, A0, B0, A1, B1, ..., offsets and dy; finite in rows of no group, for other formulas' sake."""
    q = make_grouped(sizes, k, n, ranks, dtype, device, beyond=beyond, adapter_dtype=adapters, bias=bias)
    t = {"x": q.x.nan_to_num(0.5), "weight": q.weight, "bias": q.bias}
    for i, pair in enumerate(zip(q.lora_As, q.lora_Bs, strict=True)):
        t |= {f"{name}{i}": each for name, each in zip("AB", pair, strict=True)}
    return t | {"offsets": q.offsets, "dy": q.dy.nan_to_num(0.5)}


def leaves(t):
    """The tensors that may need gradients."""
    return {name: each for name, each in t.items() if each is not None and name not in ("offsets", "dy")}


def adapters_of(t, name):
    return [t[f"{name}{i}"] for i in range(len(t)) if f"{name}{i}" in t]


def call(t, backend="torch", scaling=(1.5, -0.5), **options):
    scaling = scaling[: len(adapters_of(t, "A"))] if isinstance(scaling, tuple) else scaling
    lists = adapters_of(t, "A"), adapters_of(t, "B")
    return lora_grouped_linear(
        t["x"], t["weight"], *lists, t["offsets"], scaling=scaling, bias=t["bias"], backend=backend, **options
    )


def formula(t, scaling=(1.5, -0.5)):
    """y of each group on its own: PEFT's W + scaling B A, folded."""
    y, ends = t["x"].new_zeros(t["x"].shape[0], t["weight"].shape[1]), t["offsets"].tolist()
    parts = []
    for e in range(len(ends) - 1):
        whole = t["weight"][e]
        for lora_A, lora_B, factor in zip(adapters_of(t, "A"), adapters_of(t, "B"), scaling, strict=False):
            whole = whole + factor * lora_B[e] @ lora_A[e]
        part = t["x"][ends[e] : ends[e + 1]] @ whole.T
        parts.append(part if t["bias"] is None else part + t["bias"][e])
    return torch.cat([*parts, y[ends[-1] :]])


def expert_minor(lora_B):
    """The same B as PEFT stores it, `[out, r · E]`, viewed as `[E, out, r]`."""
    groups, out, rank = lora_B.shape
    stored = lora_B.permute(1, 2, 0).reshape(out, rank * groups)
    return stored.view(out, rank, groups).permute(2, 0, 1)
