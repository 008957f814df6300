"""LoRA in plain PyTorch: the formulas of the README, for any dtype and any device.

    y    = x Wᵀ + scaling · D(x) Aᵀ Bᵀ + bias          D(x) = x · keep · keep_scale   (inverted dropout)
    dx   = dy W + D(scaling · dy B A)
    dA   = (scaling · dy B)ᵀ D(x)
    dB   = dyᵀ (scaling · D(x) Aᵀ)
    dW   = dyᵀ x,    dbias = Σ dy over the rows

    grouped      y_e = x_e W_eᵀ + Σᵢ scalingᵢ · x_e A_ieᵀ B_ieᵀ + bias_e, with x_e the rows of group e

    gated MLP    y = down(h),  h = a(gate(x)) · up(x), or a(up(x)) without a gate

The tests check all kernels against these functions, in float64. The functions are written to be read, not to be fast,
and share no code with either backend. Shapes: x `[*, in]`, W `[out, in]`, A `[r, in]`, B `[out, r]`, dy `[*, out]`;
keep is a bool mask of the shape of x, or None.

Sources: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", eq. 3, arXiv:2106.09685; Shazeer 2020,
arXiv:2002.05202 (SwiGLU, GEGLU); Hendrycks and Gimpel 2016, arXiv:1606.08415 (GELU and its approximation); So et al.
2021, arXiv:2109.08668 (squared ReLU).
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lora_kernels.dropout import PHILOX_ROUNDS, keep_scale, threshold

__all__ = [
    "Layer",
    "activated",
    "dequantize",
    "dropped",
    "forward",
    "grad_bias",
    "grad_lora_A",
    "grad_lora_B",
    "grad_weight",
    "grad_x",
    "keep_mask",
    "lora_add",
    "lora_grouped_linear",
    "lora_linear",
    "lora_mlp",
    "lora_projections",
    "philox4x32",
]

_MASK32 = 0xFFFFFFFF
_ACTIVATIONS = {
    "silu": lambda g: g * torch.sigmoid(g),
    "gelu": lambda g: g * (1 + torch.erf(g / math.sqrt(2))) / 2,
    "gelu_tanh": lambda g: g * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) / 2,
    "relu2": lambda g: torch.where(g > 0, g, 0) ** 2,
}


class Layer(Protocol):
    """A linear layer with or without an adapter, for example a `lora_kernels.Projection`.

    Attributes:
        weight: W, `[out, in]`.
        lora_A: A, `[r, in]`, or None.
        lora_B: B, `[out, r]`, or None.
        bias: `[out]` or None.
        scaling: Multiplies the low-rank term.
        dropout_p: Drop probability.
    """

    weight: Tensor
    lora_A: Tensor | None
    lora_B: Tensor | None
    bias: Tensor | None
    scaling: float
    dropout_p: float


def dequantize(weight: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Compute W, `[out, in]`, of a `lora_kernels.quantized.QuantizedWeight`.

    Products are of fp32, and W is rounded once, to `dtype` or to the weight's own.

        nf4, fp4    W = code[nibble] · absmax[i // block]         i = n · in + k, even i in the high nibble
                    nested: absmax[b] = code2[scale[b]] · absmax2[b // blocksize] + offset, rounded twice
        fp8         W = packed · scale[n // rows, k // columns]
        int8        W = packed · scale[n] · (1 / 127), rounded twice

    Sources: bitsandbytes 0.50, `backends/default/ops.py`; Dettmers et al. 2023, arXiv:2305.14314 (NF4, nested scales).
    """
    (out_features, in_features), block = weight.shape, weight.block
    if weight.format in ("nf4", "fp4"):
        numel, codes = out_features * in_features, weight.packed.reshape(-1)
        # `torch.jit.trace` cannot record a view as another dtype.
        codes = codes if codes.dtype == torch.uint8 else codes.view(torch.uint8)
        nibbles = torch.stack((codes >> 4, codes & 15), -1).reshape(-1)[:numel]
        absmax = weight.scale.reshape(-1)
        if weight.nested is not None:
            code, inner, offset, blocksize = weight.nested
            factor = inner.reshape(-1).repeat_interleave(blocksize)[: absmax.numel()]
            absmax = code[absmax.long()] * factor + offset.reshape(())
        value = weight.code[nibbles.long()] * absmax.repeat_interleave(block)[:numel]
    else:
        rows, columns = block
        scale = weight.scale.float().reshape(-1, max(1, -(-in_features // columns)))
        scale = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[:out_features, :in_features]
        value = weight.packed.float() * scale
        value = value * (1 / 127) if weight.format == "int8" else value
    return value.to(weight.dtype if dtype is None else dtype).reshape(weight.shape)


def philox4x32(seed: int, counter: Tensor, rounds: int = PHILOX_ROUNDS) -> list[Tensor]:
    """Compute Philox4x32 of (seed, counter): four int64 tensors that hold 32-bit words.

    Args:
        seed: The 64-bit key.
        counter: int64, any shape; its low and high halves are the first two counter words, the rest are 0.
        rounds: Number of rounds; 10 is the published default.
    """
    c0, c1 = counter & _MASK32, (counter >> 32) & _MASK32
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(rounds):
        # int64 products wrap at 64 bits, and the wrap leaves the low and the high 32 bits correct.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK32) ^ c1 ^ k0, p1 & _MASK32, ((p0 >> 32) & _MASK32) ^ c3 ^ k1, p0 & _MASK32
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return [c0, c1, c2, c3]


def keep_mask(seed: Tensor | int, rows: int, cols: int, p: float) -> Tensor:
    """Compute the kernels' dropout mask for an input of `[rows, cols]`: bool, True where the element is kept."""
    device = seed.device if isinstance(seed, Tensor) else "cpu"
    row_bytes = 4 * -(-cols // 32)
    counter = torch.arange(rows * row_bytes, dtype=torch.int64, device=device)
    words = torch.stack(philox4x32(int(seed), counter), dim=-1)  # [bytes, 4]
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1)  # [bytes, 4, 2]: low half first
    return (halves >= threshold(p)).reshape(rows, row_bytes * 8)[:, :cols]


def dropped(x: Tensor, keep: Tensor | None, p: float) -> Tensor:
    """Compute D(x), inverted dropout with a given mask, `[*, in]`."""
    return x if keep is None else torch.where(keep, x, 0) * keep_scale(p)


def forward(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None = None,
    scaling: float = 1.0, keep: Tensor | None = None, dropout_p: float = 0.0,
) -> Tensor:  # fmt: skip
    """Compute y = x Wᵀ + scaling · D(x) Aᵀ Bᵀ + bias, `[*, out]`."""
    y = x @ weight.T + scaling * (dropped(x, keep, dropout_p) @ lora_A.T) @ lora_B.T
    return y if bias is None else y + bias


def grad_x(
    dy: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor,
    scaling: float = 1.0, keep: Tensor | None = None, dropout_p: float = 0.0,
) -> Tensor:  # fmt: skip
    """Compute dx = dy W + D(scaling · dy B A), `[*, in]`; the gradient of dropout is dropout with the same mask."""
    return dy @ weight + dropped(scaling * (dy @ lora_B) @ lora_A, keep, dropout_p)


def grad_lora_A(
    dy: Tensor, x: Tensor, lora_B: Tensor,
    scaling: float = 1.0, keep: Tensor | None = None, dropout_p: float = 0.0,
) -> Tensor:  # fmt: skip
    """Compute dA = (scaling · dy B)ᵀ D(x), `[r, in]`."""
    return (scaling * (_rows(dy) @ lora_B)).T @ _rows(dropped(x, keep, dropout_p))


def grad_lora_B(
    dy: Tensor, x: Tensor, lora_A: Tensor,
    scaling: float = 1.0, keep: Tensor | None = None, dropout_p: float = 0.0,
) -> Tensor:  # fmt: skip
    """Compute dB = dyᵀ (scaling · D(x) Aᵀ), `[out, r]`."""
    return _rows(dy).T @ (scaling * _rows(dropped(x, keep, dropout_p)) @ lora_A.T)


def grad_weight(dy: Tensor, x: Tensor) -> Tensor:
    """Compute dW = dyᵀ x, `[out, in]`; only for a base weight that is trained."""
    return _rows(dy).T @ _rows(x)


def grad_bias(dy: Tensor) -> Tensor:
    """Compute dbias = Σ dy over all rows, `[out]`."""
    return _rows(dy).sum(0)


def lora_linear(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, *,
    scaling: float = 1.0, bias: Tensor | None = None, dropout_p: float = 0.0, seed: Tensor | int | None = None,
) -> Tensor:  # fmt: skip
    """Compute the same as `lora_kernels.lora_linear`, in plain differentiable PyTorch.

    Args:
        x: `[*, in]`.
        weight: W, `[out, in]`.
        lora_A: A, `[r, in]`.
        lora_B: B, `[out, r]`.
        scaling: Multiplies the low-rank term.
        bias: `[out]` or None.
        dropout_p: Probability of dropping an element of the low-rank path's input.
        seed: An integer or a result of `lora_kernels.dropout.draw_seed`: dropout then keeps and drops the same elements
            as the kernels with that seed. With None, PyTorch's own generator decides.

    Returns:
        y, `[*, out]`. Double backward, forward-mode AD and `torch.func` all work, because y is computed by PyTorch
        operators.
    """
    return forward(x, weight, lora_A, lora_B, bias, scaling, _mask(x, dropout_p, seed), dropout_p)


def lora_projections(
    x: Tensor, weights: Sequence[Tensor], adapters: Sequence[tuple[Tensor, Tensor] | None], *,
    biases: Sequence[Tensor | None] | None = None, scaling: float | Sequence[float] = 1.0,
    dropout_p: float | Sequence[float] = 0.0, seeds: Sequence[Tensor | int | None] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Compute the same as `lora_kernels.lora_projections`, in plain differentiable PyTorch: `lora_linear` for each.

    Args:
        x: `[*, in]`.
        weights: W of each projection, `[outᵢ, in]`.
        adapters: (lora_A `[rᵢ, in]`, lora_B `[outᵢ, rᵢ]`) of each projection, or None for one without an adapter.
        biases: `[outᵢ]` or None of each projection; None for no biases at all.
        scaling: One number for all projections, or one for each.
        dropout_p: One number for all projections, or one for each.
        seeds: A seed for each projection, as in `lora_linear`.

    Returns:
        Each y, `[*, outᵢ]`.
    """
    each = [t if isinstance(t, (list, tuple)) else (t,) * len(weights) for t in (biases, scaling, dropout_p, seeds)]
    return tuple(
        _linear(x, weight, bias) if pair is None
        else lora_linear(x, weight, *pair, scaling=factor, bias=bias, dropout_p=p, seed=seed)
        for weight, pair, bias, factor, p, seed in zip(weights, adapters, *each, strict=True)
    )  # fmt: skip


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight.T if bias is None else x @ weight.T + bias


def activated(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """Compute h = a(gate) · up, or a(gate) without `up`; a is "silu", "gelu", "gelu_tanh" or "relu2"."""
    value = _ACTIVATIONS[activation](gate)
    return value if up is None else value * up


def lora_mlp(
    x: Tensor, gate: Layer | None, up: Layer, down: Layer, *,
    activation: str = "silu", seeds: Sequence[Tensor | int | None] = (None, None, None),
) -> Tensor:  # fmt: skip
    """Compute y = down(a(gate(x)) · up(x)), or down(a(up(x))) without a gate, the same as `lora_kernels.lora_mlp`.

    Args:
        x: `[*, in]`.
        gate: The gate's `weight` `[hidden, in]`, `lora_A`, `lora_B`, `bias`, `scaling` and `dropout_p`, or None.
        up: The same for up, with `weight` `[hidden, in]`.
        down: The same for down, with `weight` `[out, hidden]`.
        activation: a, see `activated`.
        seeds: Seeds of gate, up and down, each as in `lora_linear`.

    Returns:
        y, `[*, out]`.
    """
    before = [_layer(x, q, seed) for q, seed in zip((gate, up), seeds, strict=False) if q is not None]
    return _layer(activated(before[0], before[1] if len(before) > 1 else None, activation), down, seeds[2])


def _layer(x: Tensor, q: Layer, seed: Tensor | int | None) -> Tensor:
    pair: Any = None if q.lora_A is None else (q.lora_A, q.lora_B)
    return lora_projections(
        x, [q.weight], [pair], biases=[q.bias], scaling=q.scaling, dropout_p=q.dropout_p, seeds=[seed]
    )[0]


def lora_add(
    base: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, *,
    scaling: float = 1.0, dropout_p: float = 0.0, seed: Tensor | int | None = None,
) -> Tensor:  # fmt: skip
    """Compute base + scaling · D(x) Aᵀ Bᵀ, `[*, out]`, the same as `lora_kernels.functional.lora_add`.

    Args:
        base: `[*, out]`; the result has its dtype.
        x: `[*, in]`.
        lora_A: A, `[r, in]`.
        lora_B: B, `[out, r]`.
        scaling: Multiplies the low-rank term.
        dropout_p: As in `lora_linear`.
        seed: As in `lora_linear`.
    """
    low_rank = scaling * (dropped(x, _mask(x, dropout_p, seed), dropout_p) @ lora_A.T) @ lora_B.T
    return (base + low_rank).to(base.dtype)


def lora_grouped_linear(
    x: Tensor, weight: Tensor, lora_A: Tensor | Sequence[Tensor], lora_B: Tensor | Sequence[Tensor], offsets: Tensor, *,
    scaling: float | Sequence[float] = 1.0, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Compute the same as `lora_kernels.lora_grouped_linear`, in plain differentiable PyTorch.

    Every group multiplies all rows, those of other groups being zero, and keeps its own: so no offset is read by the
    host, a NaN in a row reaches its own group alone, and the work grows with the number of groups.

    Args:
        x: `[S, in]`, rows sorted by group.
        weight: W, `[E, out, in]`.
        lora_A: A, `[E, r, in]`, or one for each of several adapters.
        lora_B: B, `[E, out, r]`, or one for each adapter.
        offsets: `[E + 1]`; rows offsets[e] to offsets[e + 1] belong to group e. Rows from offsets[E] on give zeros.
        scaling: Multiplies the low-rank terms, or one for each adapter.
        bias: `[E, out]` or None.

    Returns:
        y, `[S, out]`.
    """
    A, B = ([t] if isinstance(t, Tensor) else list(t) for t in (lora_A, lora_B))
    factors = scaling if isinstance(scaling, (list, tuple)) else [scaling] * len(A)
    row = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    y = x.new_zeros(x.shape[0], weight.shape[1])
    for e in range(weight.shape[0]):
        own = (offsets[e] <= row) & (row < offsets[e + 1])
        x_e = torch.where(own, x, 0)
        y_e = _linear(x_e, weight[e], None if bias is None else bias[e])
        for A_i, B_i, factor in zip(A, B, factors, strict=True):
            y_e = y_e + factor * (x_e @ A_i[e].T) @ B_i[e].T
        y = torch.where(own, y_e, y)
    return y


def _mask(x: Tensor, dropout_p: float, seed: Tensor | int | None) -> Tensor | None:
    if dropout_p <= 0:
        return None
    if seed is None:
        return torch.rand(x.shape, device=x.device) >= dropout_p
    return keep_mask(seed, _rows(x).shape[0], x.shape[-1], dropout_p).to(x.device).view(x.shape)


def _rows(t: Tensor) -> Tensor:
    return t.reshape(t.numel() // t.shape[-1] if t.shape[-1] else t.shape[:-1].numel(), t.shape[-1])
