"""Tile configs as data, and the pure rules that pick one.

No autotuning at run time: a rule sees shapes, a dtype and the architecture, and answers at once and always the
same. Tiles are at least 16 on a side, what a tensor-core dot needs.
"""

import functools
import math
from dataclasses import dataclass, replace

import torch

__all__ = [
    "MatmulConfig", "ShrinkConfig", "WgradConfig",
    "descriptor_path", "matmul_config", "shrink_config", "shrink_wgrad_pays", "wgrad_config",
]  # fmt: skip

_TINY = 16
_PROGRAMS = 256  # aimed at where a sum is split; the same on every GPU, so that sums are split the same way everywhere
_SHRINK_WGRAD_RANK = 32  # above it the parts of ds weigh as much as a second read of dy


@dataclass(frozen=True)
class MatmulConfig:
    """Tile of y, K step, tile-order group, column slices of the epilogue, and CTAs a multiprocessor holds."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    subtiles: int
    num_warps: int
    num_stages: int
    ctas_per_sm: int = 1


@dataclass(frozen=True)
class ShrinkConfig:
    """Rows and K step of a program; it owns `block_r` columns of s and walks `k_per_split` of K."""

    block_m: int
    block_k: int
    block_r: int
    k_per_split: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class WgradConfig:
    """A program owns `block_c` wide columns by `block_r` thin ones and walks `rows_per_split` rows."""

    block_m: int
    block_c: int
    block_r: int
    rows_per_split: int
    num_warps: int
    num_stages: int


def descriptor_path(capability: tuple[int, int] | None, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether `matmul_expand` may load tiles by TMA descriptors, and why or why not.

    Args:
        capability: CUDA compute capability; None on other devices.
        dtype: Of the operands.
    """
    if capability is None:
        return False, "not an NVIDIA GPU"
    if capability < (9, 0):
        return False, f"TMA needs compute capability 9.0 and this GPU has {capability[0]}.{capability[1]}"
    if dtype.itemsize != 2:
        return False, "only 16-bit operands feed the tensor cores straight from descriptors"
    return True, "TMA descriptors; operands not aligned to 16 bytes take pointers"


@functools.lru_cache(maxsize=4096)
def matmul_config(
    rows: int, cols: int, dtype: torch.dtype, tma: bool, masked: bool, num_sms: int, tf32: bool = False
) -> MatmulConfig:
    """The tile for y `[rows, cols]`.

    Args:
        rows: M.
        cols: N.
        dtype: Of the operands.
        tma: Descriptor path or pointer path.
        masked: Whether the last product is masked in the epilogue, which costs registers.
        num_sms: Multiprocessors of the device.
        tf32: Whether fp32 products may use TF32.
    """
    if tma:
        wide = _tiles(rows, cols, 128, 256) >= num_sms
        if rows > 64 and wide and not masked:
            return _square(MatmulConfig(128, 256, 64, 8, 2, 8, 4), num_sms)
        if rows > 64 and wide:
            return _square(MatmulConfig(128, 256, 64, 8, 4, 8, 3), num_sms)
        if rows > 64:
            return _square(MatmulConfig(128, 128, 64, 8, 2, 8 if masked else 4, 3, 1 if masked else 2), num_sms)
        return MatmulConfig(64, 128, 64, 8, 1, 4, 4, 2)
    slices = 2 if masked else 1  # a masked product of the whole tile would spill
    if dtype.itemsize == 2:
        base = MatmulConfig(128, 128, 32, 8, slices, 8 if masked else 4, 4)
    elif tf32:
        base = MatmulConfig(128, 64, 32, 8, slices, 8 if masked else 4, 3)
    else:
        base = MatmulConfig(64, 64, 32, 8, slices, 8 if masked else 4, 3)
    block_m, block_n = _fit(rows, base.block_m), _fit(cols, base.block_n)
    subtiles = min(base.subtiles, block_n // _TINY)
    return _square(replace(base, block_m=block_m, block_n=block_n, subtiles=subtiles), num_sms)


@functools.lru_cache(maxsize=4096)
def shrink_config(rows: int, inner: int, rank: int, dtype: torch.dtype) -> ShrinkConfig:
    """The tile for s `[rows, rank]` summed over `inner`, and where the sum is split: where rows are too few."""
    block_m = _fit(rows, 32 if dtype.itemsize == 4 else 64)  # 64 rows of fp32 with dropout spill
    block_r = _fit(rank, 64)
    block_k = _fit(inner, 128 if dtype.itemsize == 2 else 64 if block_r == 16 else 32)
    k_per_split = _split(inner, block_k, _tiles(rows, rank, block_m, block_r))
    return ShrinkConfig(block_m, block_k, block_r, k_per_split, num_warps=4, num_stages=4)


def shrink_wgrad_pays(rank: int) -> bool:
    """Whether ds and dB should come from one read of dy: at small ranks, where their parts are small beside it."""
    return rank <= _SHRINK_WGRAD_RANK


@functools.lru_cache(maxsize=4096)
def wgrad_config(rows: int, wide: int, thin: int, dtype: torch.dtype, shrinks: bool = False) -> WgradConfig:
    """The tile for g `[wide, thin]` summed over `rows`, and where the sum is split.

    With `shrinks` a program owns more columns, so that there are fewer parts of ds.
    """
    wide_tile = 256 if shrinks else 128
    block_c = _fit(wide, wide_tile if dtype.itemsize == 2 else wide_tile // 2)
    block_r = _fit(thin, 64)
    block_m = _fit(rows, 64 if dtype.itemsize == 2 else 32)
    rows_per_split = _split(rows, block_m, _tiles(wide, thin, block_c, block_r))
    return WgradConfig(block_m, block_c, block_r, rows_per_split, num_warps=4, num_stages=3)


def _split(size: int, block: int, tiles: int) -> int:
    """How much of a summed dimension a program takes: whole blocks, four or more, so that `_PROGRAMS` are busy."""
    share = -(-size // max(1, _PROGRAMS // tiles))
    return -(-max(share, 4 * block) // block) * block


def _square(config: MatmulConfig, num_sms: int) -> MatmulConfig:
    """Group tiles so that those that run together cover a near square of y, which needs the fewest rows of operands.

    At 8192 x 8192 with tiles of 128 x 256 on 132 multiprocessors that is 16 rows of tiles by 9, 4352 rows of x and W
    for 132 tiles; the usual 8 rows by 17 need 5376.
    """
    programs = num_sms * config.ctas_per_sm
    return replace(config, group_m=max(1, round(math.sqrt(programs * config.block_n / config.block_m))))


def _fit(size: int, largest: int) -> int:
    """The power of two that covers `size`, between 16 and `largest`."""
    return max(_TINY, min(largest, 1 << max(size - 1, 0).bit_length()))


def _tiles(rows: int, cols: int, block_m: int, block_n: int) -> int:
    return -(-rows // block_m) * -(-cols // block_n)
