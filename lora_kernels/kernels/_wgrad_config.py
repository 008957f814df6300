"""The tile of a `wgrad` launch: the rules for each of its sides, and for the split of the sum over rows.

The rules weigh registers (a sum for each product, masked and made tiles, addresses) against the number of parts.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lora_kernels.kernels._configs import (
    LEAST_SHARED,
    PROGRAMS,
    SHARED,
    TINY,
    count_stages,
    count_tiles,
    fit,
    split_sum,
)  # fmt: skip

__all__ = ["WgradCase", "WgradConfig", "wgrad_config"]

# Columns of the thin operand up to which the sums of groups are split. No rank is above; a gradient of W is.
_MOST_SPLIT = 512


@dataclass(frozen=True)
class WgradConfig:
    """Tile of a program, which owns `block_c` wide columns by `block_r` thin ones and walks `rows_per_split` rows."""

    block_m: int
    block_c: int
    block_r: int
    rows_per_split: int
    num_warps: int
    num_stages: int


class WgradCase(NamedTuple):
    """What the tile of a `wgrad` launch depends on.

    Attributes:
        rows: M.
        wide: Columns of the wide operand.
        thin: Columns of the thin operand, the most of several.
        dtype: Dtype of the operands.
        shrinks: Whether the launch computes ds as well.
        adapters: Number of products; each has its own sum and, with a mask, its own masked tile.
        masked: Whether a product has a mask.
        mixed: Whether some products have a mask and some have none.
        activated: Whether an activation makes the wide operands from three others, each with a tile of its own.
        strided: Whether no two elements of an operand are adjacent, so each element needs its own address.
        unaligned: Whether the rows of a wide operand, whose columns are adjacent, start or end off a multiple of 16, so
            each element is loaded alone.
        rounds: Whether B is rounded from fp32.
        tf32: Whether fp32 products may use TF32.
        shared: Bytes of shared memory of a multiprocessor.
        num_sms: Multiprocessors of the device; with `activated` each runs one program at a time.
        groups: Number of groups of rows, each with a sum of its own; 0 without groups.
    """

    rows: int
    wide: int
    thin: int
    dtype: torch.dtype
    shrinks: bool = False
    adapters: int = 1
    masked: bool = False
    mixed: bool = False
    activated: bool = False
    strided: bool = False
    unaligned: bool = False
    rounds: bool = False
    tf32: bool = False
    shared: int = SHARED
    num_sms: int = PROGRAMS // 2
    groups: int = 0


@functools.lru_cache(maxsize=4096)
def wgrad_config(case: WgradCase) -> WgradConfig:
    """Pick the tile for g `[wide, thin]` summed over `rows`, and the split of the sum."""
    block_c, block_r = fit(case.wide, _most_columns(case)), fit(case.thin, 64)
    # In TF32, a tile of 64 rows has half the bank conflicts in shared memory of a tile of 32 rows.
    fixed = case.shrinks and case.tf32 and not case.activated
    block_m = 64 if fixed else fit(case.rows, _most_rows(case))
    # Eight warps share the registers of B before it is rounded, and of many columns of three operands.
    crowded = (case.rounds and block_r > 16) or (case.activated and (case.dtype.itemsize == 4 or block_c >= 64))
    return WgradConfig(
        block_m, block_c, block_r, _rows_per_split(case, block_m, count_tiles(case.wide, case.thin, block_c, block_r)),
        num_warps=8 if crowded else 4, num_stages=_wgrad_stages(case, block_m, block_c, block_r),
    )  # fmt: skip


def _most_columns(case: WgradCase) -> int:
    """Return the most wide columns of a program; more columns make fewer parts of ds, and take more registers."""
    single = case.dtype.itemsize == 4
    if not single and case.unaligned and (case.masked or case.activated):
        # A masked tile, and one that an activation makes, is in registers. Some versions of ptxas overwrite the
        # registers that a wgmma reads where the tile is loaded element by element (docs/traps.md). 32 columns are too
        # few for a wgmma.
        return 32
    if case.activated:
        # Take as many columns as the registers of three operands allow.
        if single:
            return 32
        return 128 if case.thin <= (32 if case.shared > LEAST_SHARED else 16) else 32 if case.masked else 64
    if not single and (case.mixed or (case.masked and case.adapters > 3 and case.thin > 32)):
        # Mixed products read the tile unmasked as well, which ptxas may overwrite too. Four wide masked tiles spill.
        return 32
    if case.shrinks:
        most = 128 if case.strided or (case.rounds and case.shared <= LEAST_SHARED) else 256
    else:
        several = case.adapters > 1 and (case.masked or case.adapters * fit(case.thin, 64) > 64)
        most = 64 if several else 128
    # Keep fp32 tiles narrow: on sm_100, Triton 3.6 rounds 64 or more columns of masked fp32 to TF32, whatever
    # `input_precision` says.
    return most // 4 if single else most


def _most_rows(case: WgradCase) -> int:
    """Return the most rows of a step, by the registers that masks, activations, sums and addresses leave."""
    single, small = case.dtype.itemsize == 4, case.shared < SHARED
    if case.activated:
        most = TINY if single else 32
    elif case.adapters > 2 and case.thin > (16 if case.masked and small else 32) and (small or not case.masked):
        # The sums of many wide adapters.
        most = TINY
    else:
        most = 32 if single or (case.adapters > 2 and case.masked) else 64
    # The address of each element.
    addressed = case.strided and (single or (case.masked and case.adapters > 1 and case.shared <= LEAST_SHARED))
    return most // 2 if addressed else most


def _rows_per_split(case: WgradCase, block_m: int, tiles: int) -> int:
    """Return the rows that a program walks."""
    if case.groups:
        # `segments` makes maps for powers of two. Parts of a gradient of all of W would take more memory than W.
        share = case.rows if case.thin > _MOST_SPLIT else split_sum(case.rows, block_m, tiles)
        return max(TINY, 1 << max(share - 1, 0).bit_length())
    if not case.activated:
        return split_sum(case.rows, block_m, tiles)
    # Bytes of one split's parts over the bytes of g, u, dh, dg and du, which every launch moves.
    part = 8 * case.thin * case.adapters / (5 * case.rows * case.dtype.itemsize)
    return _whole_rounds(case.rows, block_m, tiles, case.num_sms, part)


def _wgrad_stages(case: WgradCase, block_m: int, block_c: int, block_r: int) -> int:
    """Return the stages of the pipeline over rows."""
    if case.shrinks and not case.activated and case.rows <= block_m:
        # One step needs no pipeline, and Triton's pipeline would be wrong on sm_90 (docs/traps.md).
        return 1
    # Two stages suffice for narrow tiles, because many programs run at once; all fp32 tiles are narrow. Some narrow
    # tiles spill with more stages.
    alone, small = case.activated or case.adapters == 1, case.shared < SHARED
    deep = block_c > 64 and alone and (case.shrinks or not small) and not (case.activated and case.dtype.itemsize == 4)
    step = block_c * (3 if case.activated else 1) + block_r * case.adapters
    return count_stages(3 if deep else 2, block_m * step * case.dtype.itemsize, case.shared)


def _whole_rounds(size: int, block: int, tiles: int, programs: int, part: float) -> int:
    """Split as `_split` does, but so that the last round of `programs` long programs at once is nearly full.

    With 112 tiles on 132 multiprocessors, one to six splits leave 15 % of the multiprocessors idle on average, and
    seven splits leave 1 %. One more split costs the fraction `part` of the bytes that every launch moves.
    """

    def busy(splits: int) -> float:
        return -(-tiles * splits // programs) * programs / (tiles * splits) * (1 + splits * part)

    most = max(1, min(8, size // (4 * block)))
    splits = min(range(1, most + 1), key=busy)
    return max(1, -(-size // (splits * block))) * block
