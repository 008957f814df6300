"""What each launch of the kernels moves, in bytes, as a formula of shapes and tiles; held to counts by the tests.

*Touched* counts every byte of an operand once: what memory must deliver at the least, and what it does deliver as long
as tiles that run together find each other's operands in L2. *Issued* counts what the programs ask for, tile by tile:
what L2 must deliver. *Parts* of split sums are written once and read back once within a launch, mostly out of L2.

    M rows, K in_features, N out_features, R rank; e bytes an element of x and W; n_m, n_k, ... blocks of a tile size
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lora_kernels.kernels import _configs
from lora_kernels.kernels._configs import MatmulConfig, ShrinkConfig, WgradConfig

__all__ = ["Moved", "layer", "matmul_expand", "shrink", "wgrad"]

_PART = 4  # bytes an element of a part: fp32


@dataclass(frozen=True)
class Moved:
    """Bytes of one launch: operands loaded, each byte once and as issued; results stored; parts, one way."""

    kernel: str
    touched: int
    issued: int
    stored: int
    parts: int = 0

    @property
    def total(self) -> int:
        """Every operand once and every result once: the traffic with memory while parts stay in L2."""
        return self.touched + self.stored

    @property
    def most(self) -> int:
        """The traffic with memory if all parts leave L2 as well."""
        return self.total + 2 * self.parts


def shrink(m: int, k: int, r: int, e: int, dropout: bool, config: ShrinkConfig) -> Moved:
    """Bytes of s = alpha · D(x) aᵀ for x `[M, K]` and a `[R, K]`."""
    n_m, n_r, splits = _blocks(m, config.block_m), _blocks(r, config.block_r), _blocks(k, config.k_per_split)
    parts = splits * m * r * _PART if splits > 1 else 0
    reset = n_m * n_r * 4 if splits > 1 else 0  # the counters, back to 0
    touched = m * k * e + r * k * e + 8 * dropout
    issued = n_r * m * k * e + n_m * r * k * e + 8 * dropout * n_m * n_r * splits
    return Moved("shrink", touched, issued, m * r * e + reset + dropout * m * _blocks(k, 8), parts)


def wgrad(
    m: int, w: int, t: int, e: int, e_g: int, config: WgradConfig, keep: bool = False, shrinks: bool = False
) -> Moved:
    """Bytes of g = wideᵀ thin for wide `[M, W]` and thin `[M, T]`, and of ds = alpha · wide b from the same read."""
    n_w, n_t, splits = _blocks(w, config.block_c), _blocks(t, config.block_r), _blocks(m, config.rows_per_split)
    parts = splits * w * t * _PART if splits > 1 else 0
    ds_parts = n_w * m * t * _PART if shrinks else 0
    reset = (n_w * n_t if splits > 1 else 0) * 4 + (splits * 4 if shrinks else 0)
    mask = m * _blocks(w, 8) if keep else 0
    touched = m * w * e + m * t * e + mask + shrinks * w * t * e
    issued = n_t * (m * w * e + mask) + n_w * m * t * e + shrinks * splits * w * t * e
    return Moved("wgrad", touched, issued, w * t * e_g + shrinks * m * t * e + reset, parts + ds_parts)


def matmul_expand(
    m: int, n: int, inner: Sequence[int], e: int, config: MatmulConfig, bias: int = 0, keep: bool = False
) -> Moved:
    """Bytes of y = Σᵢ pᵢ qᵢᵀ + bias for pᵢ `[M, Kᵢ]` and qᵢ `[N, Kᵢ]`, the last product masked with `keep`.

    Args:
        m: M.
        n: N.
        inner: Kᵢ of each source.
        e: Bytes an element.
        config: The tile.
        bias: Bytes an element of the bias, 0 without.
        keep: Whether the last product is masked.
    """
    n_m, n_n = _blocks(m, config.block_m), _blocks(n, config.block_n)
    mask = m * _blocks(n, 8) if keep else 0
    touched = sum((m + n) * k * e for k in inner) + n * bias + mask
    # the masked product takes its thin operand anew for every slice of the tile's columns
    rereads = [n_n] * (len(inner) - 1) + [n_n * config.subtiles if keep else n_n]
    issued = sum((reads * m + n_m * n) * k * e for reads, k in zip(rereads, inner, strict=True))
    return Moved("matmul_expand", touched, issued + n_m * n * bias + mask, m * n * e)


def layer(
    m: int, k: int, n: int, r: int, dtype: torch.dtype, dropout: bool, num_sms: int, tma: bool,
    adapter: torch.dtype | None = None, bias: int = 0,
) -> list[Moved]:  # fmt: skip
    """The launches of a layer's forward and backward, in order, with the tiles that the rules pick."""
    e, e_g = dtype.itemsize, (adapter or dtype).itemsize

    def expand(cols: int, inner: int, masked: bool, bias: int) -> Moved:
        summed = inner if masked else inner + r
        config = _configs.matmul_config(m, summed, cols, dtype, tma, masked, num_sms)
        return matmul_expand(m, cols, (inner, r), e, config, bias, masked)

    forward = [
        shrink(m, k, r, e, dropout, _configs.shrink_config(m, k, r, dtype, dropout)),
        expand(n, k, False, bias),
    ]
    if _configs.shrink_wgrad_pays(r):
        config = _configs.wgrad_config(m, n, r, dtype, shrinks=True)
        from_dy = [wgrad(m, n, r, e, e_g, config, shrinks=True)]
    else:
        from_dy = [
            shrink(m, n, r, e, False, _configs.shrink_config(m, n, r, dtype)),
            _wgrad(m, n, r, e, e_g, dtype, False),
        ]
    return [*forward, *from_dy, expand(k, n, dropout, 0), _wgrad(m, k, r, e, e_g, dtype, dropout)]


def _wgrad(m: int, features: int, r: int, e: int, e_g: int, dtype: torch.dtype, keep: bool) -> Moved:
    wide, thin = (features, r) if keep or features >= r else (r, features)
    return wgrad(m, wide, thin, e, e_g, _configs.wgrad_config(m, wide, thin, dtype), keep)


def _blocks(size: int, block: int) -> int:
    return -(-size // block)
