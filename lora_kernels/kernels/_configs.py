"""Tile configs as data, and the pure rules that pick one.

There is no autotuning at run time: a rule reads shapes, a dtype and the architecture, and always picks the same config
for them. Tiles are at least 16 on a side, because a tensor-core dot needs 16.
"""

import functools
import math
from dataclasses import dataclass, replace

import torch

from lora_kernels.constants import ONE_READ_RANK

__all__ = [
    "LEAST_SHARED", "PROGRAMS", "SHARED", "TINY", "DequantizeConfig", "MatmulConfig", "ShrinkConfig",
    "count_stages", "count_tiles", "dequantize_config", "descriptor_path", "fit", "matmul_config", "matmul_configs",
    "shrink_config", "shrink_wgrad_pays", "split_sum",
]  # fmt: skip

TINY = 16
# Split sums aim at this many programs. The number is the same for every GPU, so GPUs with equal tiles split sums alike.
PROGRAMS = 256
# Up to this K, the write of the result dominates a product.
_THIN = 128
# Shared memory of a multiprocessor: an H100 and an MI300X.
SHARED = 233_472  # bytes
LEAST_SHARED = 65_536  # bytes


@dataclass(frozen=True)
class MatmulConfig:
    """Tile of y, K step, tile-order group, column slices of the epilogue, and CTAs per multiprocessor."""

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
    """Rows and K step of a program; the program owns `block_r` columns of s and walks `k_per_split` of K."""

    block_m: int
    block_k: int
    block_r: int
    k_per_split: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class DequantizeConfig:
    """Weights of a program, and weights in one block of a scale, for which the program reads the scale once."""

    block: int
    unit: int
    num_warps: int


def dequantize_config(inner: int, columns: int, four_bits: bool) -> DequantizeConfig:
    """Pick the share of a program that dequantises a weight: 32 weights a thread, fewer where rows are short.

    Args:
        inner: Weights of a row as the kernel takes them: of the whole weight in 4 bits, of a row in 8 bits.
        columns: Weights of a row that share a scale.
        four_bits: Whether a weight has 4 bits.
    """
    # 16 bytes of storage, or as many as a power of two leaves in one block
    most = 32 if four_bits else 16
    unit = most if columns >= inner else min(most, columns & -columns)
    if inner < 1024:
        return DequantizeConfig(max(256, 1 << (inner - 1).bit_length()), unit, 1)
    # of the last program of a row little is left idle: 14336 weights are 7 programs of 2048, 5120 are 5 of 1024
    block = next((block for block in (4096, 2048) if -inner % block <= inner // 8), 1024)
    return DequantizeConfig(block, unit, block // 1024)


def descriptor_path(capability: tuple[int, int] | None, dtype: torch.dtype) -> tuple[bool, str]:
    """Return whether `matmul_expand` may load tiles by TMA descriptors, and the reason.

    Args:
        capability: CUDA compute capability; None on other devices.
        dtype: Dtype of the operands.
    """
    if capability is None:
        return False, "not an NVIDIA GPU"
    if capability < (9, 0):
        return False, f"TMA needs compute capability 9.0 and this GPU has {capability[0]}.{capability[1]}"
    if capability >= (12, 0):
        return False, "its tiles are made for the 227 KB of shared memory of sm_90 and sm_100, and this GPU has 99 KB"
    if dtype.itemsize != 2:
        return False, "only 16-bit operands feed the tensor cores straight from descriptors"
    return True, "TMA descriptors; operands not aligned to 16 bytes take pointers"


@functools.lru_cache(maxsize=4096)
def matmul_config(
    rows: int, inner: int, cols: int, dtype: torch.dtype, tma: bool, masked: bool, num_sms: int, tf32: bool = False,
    place: int | None = None, strided: bool = False, many: bool = False, groups: int = 0,
) -> MatmulConfig:  # fmt: skip
    """Pick the tile for y `[rows, cols]`: the shipped tile that the model finishes first; on a tie, the least padded.

    Args:
        rows: M.
        inner: Length of the sum: the K of all sources without the masked ones.
        cols: N.
        dtype: Dtype of the operands.
        tma: Descriptor path or pointer path.
        masked: Whether the last product is masked in the epilogue, which costs registers.
        num_sms: Multiprocessors of the device.
        tf32: Whether fp32 products may use TF32.
        place: Restrict the choice to this entry of `matmul_configs`; ignored past the end of the tuple.
        strided: Whether no two elements of a large operand are adjacent, so each element needs its own address.
        many: Whether there are more than six sources; a select among them costs registers beside a masked product.
        groups: Number of groups of rows, each with operands of its own; 0 without groups. A tile belongs to one group.
    """
    shipped = matmul_configs(dtype, tma, masked, tf32, groups > 0)
    if groups and tma and cols % TINY and place is None:
        # Rows of y off 16 elements are stored one by one, whose addresses spill beside 256 columns on Triton 3.6.
        shipped = tuple(config for config in shipped if config.block_n <= 128)
    # The host does not know the rows of each group, so the tile serves groups of the average size.
    parts = max(1, min(groups, rows))
    rows = -(-rows // parts)
    if many and masked and tma and place is None:
        shipped = shipped[1:]
    if place is not None and place < len(shipped):
        shipped = shipped[place : place + 1]
    elif inner <= _THIN:
        # Many small programs run at once, because the write of y is most of the work.
        small = [config for config in shipped if config.block_m <= 64 and config.block_n <= 128]
        shipped = tuple(replace(config, num_stages=2, ctas_per_sm=2) for config in small)
    best = min(
        shipped,
        key=lambda config: (_clocks(config, parts, rows, cols, num_sms), _count_covered(config, rows, cols)),
    )
    if not tma:
        # Fit the tile to y, because pointers pay for every lane; descriptors zero-fill outside of y at no cost.
        block_m, block_n = fit(rows, best.block_m), fit(cols, best.block_n)
        best = replace(best, block_m=block_m, block_n=block_n, subtiles=min(best.subtiles, block_n // TINY))
        if groups and block_m > 64:
            # More warps share the addresses, which depend on the group.
            best = replace(best, num_warps=8)
    elif groups and cols % TINY:
        # The addresses of single elements take the registers of a second program.
        best = replace(best, ctas_per_sm=1)
    if strided:
        # The addresses of many elements spill, unless steps are short and more warps share the addresses.
        block_k = min(best.block_k, 32) if best.block_n >= 64 else best.block_k
        best = replace(best, block_k=block_k, num_warps=8 if best.block_m > 64 else best.num_warps)
    return _square(best, num_sms)


def matmul_configs(
    dtype: torch.dtype, tma: bool, masked: bool, tf32: bool = False, grouped: bool = False
) -> tuple[MatmulConfig, ...]:
    """Return the shipped tiles of a path, the largest first; `lora-kernels tune` stores places in this tuple.

    Tiles of a masked product are sliced more finely or spread over more warps, because a second accumulator of a whole
    tile spills.
    """
    if tma:
        return _MASKED_TMA if masked else _GROUPED_TMA if grouped else _TMA
    if dtype.itemsize == 2:
        return _MASKED_HALF if masked else _HALF
    if not tf32:
        # Without tensor cores, operands are spread over registers, so larger tiles and longer steps spill.
        return (MatmulConfig(64, 32, 16, 8, 1, 8, 2),)
    single = MatmulConfig(64, 64, 32, 8, 2 if masked else 1, 8, 3)
    return replace(single, block_m=128), single


# Tiles for sm_90 and later. The first tiles serve large products. The narrow tiles serve few rows, where the read of W
# dominates: they give every multiprocessor a part of W, and their deep pipelines keep many bytes in flight.
_TMA = (
    MatmulConfig(128, 256, 64, 8, 2, 8, 4),
    MatmulConfig(256, 128, 64, 8, 2, 8, 4),
    MatmulConfig(128, 256, 64, 8, 1, 8, 3),
    MatmulConfig(128, 128, 64, 8, 2, 4, 3, 2),
    MatmulConfig(64, 256, 64, 8, 2, 4, 4),
    MatmulConfig(64, 128, 64, 8, 1, 4, 4, 2),
    MatmulConfig(64, 64, 64, 8, 1, 4, 6, 2),
    MatmulConfig(64, 32, 128, 8, 1, 4, 4, 2),
)
# Tiles of groups of rows are stored by pointers, through shared memory. With 4 warps, the K loop of a bias and of a W
# stored as [in, out] at 128x128 is a fifth longer.
_GROUPED_TMA = (_TMA[2], replace(_TMA[3], num_warps=8), *_TMA[4:])
_MASKED_TMA = (
    MatmulConfig(128, 256, 64, 8, 4, 8, 3),
    MatmulConfig(128, 128, 64, 8, 2, 8, 3),
    MatmulConfig(64, 128, 64, 8, 2, 4, 4, 2),
    MatmulConfig(64, 64, 64, 8, 1, 4, 6, 2),
    MatmulConfig(64, 32, 128, 8, 1, 4, 4, 2),
)
_HALF = (
    MatmulConfig(128, 128, 32, 8, 1, 4, 4),
    MatmulConfig(64, 128, 32, 8, 1, 4, 4),
    MatmulConfig(64, 64, 64, 8, 1, 4, 4),
    MatmulConfig(64, 32, 64, 8, 1, 4, 4),
)
_MASKED_HALF = (
    MatmulConfig(128, 128, 32, 8, 2, 8, 4),
    MatmulConfig(64, 128, 32, 8, 2, 4, 4),
    MatmulConfig(64, 64, 64, 8, 2, 4, 4),
    MatmulConfig(64, 32, 64, 8, 1, 4, 4),
)


def _clocks(config: MatmulConfig, parts: int, rows: int, cols: int, num_sms: int) -> float:
    """Estimate the clocks a multiprocessor is busy for 64 of K, for `parts` products of `rows` rows each.

    The model ranks tiles and forecasts no time.

    All tiles on a multiprocessor share its tensor cores. A K step takes the maximum of two times. The products run at
    2048 multiply-adds a clock, or slower where narrow instructions wait for shared memory at 128 bytes a clock
    (Hopper's wgmma, 64 rows each). L2 delivers the operands at some 48 bytes a clock.
    """
    m, n = config.block_m, config.block_n
    # Clocks of an m64 n k16 instruction: n/2 for its products, or the time to read its operands from shared memory.
    instruction = max(n / 2, (64 * 32 + n * 32) / 128)
    products = max(1, m // 64) * 4 * instruction
    operands = (min(m, rows) + min(n, cols)) * 128 / 48
    return -(-parts * count_tiles(rows, cols, m, n) // num_sms) * max(products, operands)


@functools.lru_cache(maxsize=4096)
def shrink_config(
    rows: int, inner: int, rank: int, dtype: torch.dtype, dropout: bool = False, strided: bool = False,
    shared: int = SHARED, adapters: int = 1, activated: bool = False, adapter_itemsize: int = 0, groups: int = 0,
) -> ShrinkConfig:  # fmt: skip
    """Pick the tile for s `[rows, rank]` summed over `inner`, and the split of the sum where rows are too few.

    Args:
        rows: M.
        inner: K.
        rank: R, the largest of several adapters.
        dtype: Dtype of the operands.
        dropout: Whether a mask is drawn, which costs registers.
        strided: Whether no two elements of x are adjacent, or its rows start or end off a multiple of 16, so each
            element needs its own address.
        shared: Bytes of shared memory of a multiprocessor.
        adapters: Number of adapters; each has its own tile of A and, with dropout, its own masked tile of x.
        activated: Whether an activation makes x from two operands, which costs registers and one more tile.
        adapter_itemsize: Bytes per element of A, where A is wider than x.
        groups: Number of groups of rows, each with an A of its own; 0 without groups.
    """
    parts = max(1, min(groups, rows))
    rows = -(-rows // parts)
    # 64 rows of fp32 with dropout spill. 64 rows of 16 bits would be a wgmma of an x in registers where x is masked or
    # made by an activation. Some versions of ptxas overwrite these registers too early (docs/traps.md), and a
    # multiprocessor would hold two programs where it holds five of 32 rows.
    # The addresses of a strided x and of the A of a group spill beside more rows.
    addressed = strided and groups > 0
    block_m = fit(rows, TINY if addressed else 32 if dtype.itemsize == 4 or dropout or activated else 64)
    block_r = fit(rank, 64 if adapters < 4 else 32)
    # A K step of 128 spills beside the mask and the addresses or sums; several adapters take a shorter step below.
    crowded = dropout and adapters == 1 and (strided or block_r == 64)
    half_k = 64 if crowded else 128
    # Three stages suffice for a crowded fp32 tile, because IEEE products take longer than any load.
    most_stages = 3 if crowded and dtype.itemsize == 4 else 4
    block_k = fit(inner, half_k if dtype.itemsize == 2 else 64 if block_r == 16 else 32)
    of_x, of_a = dtype.itemsize, max(dtype.itemsize, adapter_itemsize)
    if adapters > 1:
        # The sums of many adapters, and rows of A before their cast to 16 bits, take registers.
        wide = adapters > 2 and block_r * of_a >= 128
        crowded = (dropout and strided) or (wide and (of_a > of_x or (dropout and of_x == 4)))
        block_k = max(TINY, block_k // (8 if crowded else 4 if dropout or wide else 2))
    elif activated:
        block_k = max(TINY, block_k // 2)
    k_per_split = split_sum(inner, block_k, parts * count_tiles(rows, rank, block_m, block_r))
    # Leave room for two programs, because two programs hide the latency of each other's loads.
    room = shared // 2 if block_r <= 32 else shared
    step = block_k * (block_m * (1 + activated) * of_x + block_r * adapters * of_a)
    num_stages = count_stages(most_stages, step, room)
    return ShrinkConfig(block_m, block_k, block_r, k_per_split, num_warps=4, num_stages=num_stages)


def shrink_wgrad_pays(rank: int, activated: bool = False) -> bool:
    """Return whether ds and dB should come from one read of dy: at small ranks, where the parts of ds are small.

    Where an activation makes dy, there are more parts, because fewer columns fit a program. Their write and read weigh
    as much as another read of dy at rank 32 in 16 bit, at rank 16 in fp32.
    """
    return rank <= (ONE_READ_RANK // 2 if activated else ONE_READ_RANK)


def count_stages(most: int, size: int, room: int) -> int:
    """Return the stages of a pipeline with `size` bytes a stage: as many as fit in `room`, from two up to `most`."""
    return max(2, min(most, room // size))


def _count_covered(config: MatmulConfig, rows: int, cols: int) -> int:
    """Return the number of elements that the tiles cover, inside y and outside."""
    return count_tiles(rows, cols, config.block_m, config.block_n) * config.block_m * config.block_n


def split_sum(size: int, block: int, tiles: int) -> int:
    """Return a program's share of a summed dimension, in whole blocks, so that `PROGRAMS` programs are busy.

    A share has four blocks or more where the dimension has them, because a pipeline needs steps.
    """
    share = max(-(-size // max(1, PROGRAMS // tiles)), 4 * block)
    return max(1, -(-min(share, size) // block)) * block


def _square(config: MatmulConfig, num_sms: int) -> MatmulConfig:
    """Group tiles so that concurrent tiles cover a near square of y, which needs the fewest rows of operands.

    At 8192 x 8192 with tiles of 128 x 256 on 132 multiprocessors, a group is 16 rows of tiles by 9: 4352 rows of x and
    W for 132 tiles. The usual 8 rows by 17 need 5376.
    """
    programs = num_sms * config.ctas_per_sm
    return replace(config, group_m=max(1, round(math.sqrt(programs * config.block_n / config.block_m))))


def fit(size: int, largest: int) -> int:
    """Return the power of two that covers `size`, between 16 and `largest`."""
    return max(TINY, min(largest, 1 << max(size - 1, 0).bit_length()))


def count_tiles(rows: int, cols: int, block_m: int, block_n: int) -> int:
    return -(-rows // block_m) * -(-cols // block_n)
