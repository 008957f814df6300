"""Tile configs as data, and the pure rules that pick one.

No autotuning at run time: a rule sees shapes, a dtype and the architecture, and answers at once and always the
same. Tiles are at least 16 on a side, what a tensor-core dot needs.
"""

import functools
import math
from dataclasses import dataclass, replace

import torch

__all__ = [
    "SHARED", "MatmulConfig", "ShrinkConfig", "WgradConfig",
    "descriptor_path", "matmul_config", "matmul_configs", "shrink_config", "shrink_wgrad_pays", "wgrad_config",
]  # fmt: skip

_TINY = 16
_PROGRAMS = 256  # aimed at where a sum is split; one number, so that GPUs whose tiles are alike split sums alike
_THIN = 128  # up to it a product is a matter of writing its result
SHARED = 233_472  # bytes of shared memory of a multiprocessor, an H100's
_LEAST_SHARED = 65_536  # an MI300X's
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
    if capability >= (12, 0):
        return False, "its tiles are made for the 227 KB of shared memory of sm_90 and sm_100, and this GPU has 99 KB"
    if dtype.itemsize != 2:
        return False, "only 16-bit operands feed the tensor cores straight from descriptors"
    return True, "TMA descriptors; operands not aligned to 16 bytes take pointers"


@functools.lru_cache(maxsize=4096)
def matmul_config(
    rows: int, inner: int, cols: int, dtype: torch.dtype, tma: bool, masked: bool, num_sms: int, tf32: bool = False,
    place: int | None = None, strided: bool = False, many: bool = False,
) -> MatmulConfig:  # fmt: skip
    """The tile for y `[rows, cols]`: of the shipped ones the soonest done by the model, of equals the least padded.

    Args:
        rows: M.
        inner: What is summed over, the K of all sources; masked ones not counted.
        cols: N.
        dtype: Of the operands.
        tma: Descriptor path or pointer path.
        masked: Whether the last product is masked in the epilogue, which costs registers.
        num_sms: Multiprocessors of the device.
        tf32: Whether fp32 products may use TF32.
        place: Only this one of `matmul_configs`; ignored where there are not so many.
        strided: Whether a large operand has no element next to another, so that each has an address of its own.
        many: Whether there are more than six sources to select among, which costs registers beside a masked product.
    """
    shipped = matmul_configs(dtype, tma, masked, tf32)
    if many and masked and tma and place is None:
        shipped = shipped[1:]
    if place is not None and place < len(shipped):
        shipped = shipped[place : place + 1]
    elif inner <= _THIN:  # writing y is most of the work: many small programs at once
        small = [config for config in shipped if config.block_m <= 64 and config.block_n <= 128]
        shipped = tuple(replace(config, num_stages=2, ctas_per_sm=2) for config in small)
    best = min(shipped, key=lambda config: (_clocks(config, rows, cols, num_sms), _padded(config, rows, cols)))
    if not tma:  # descriptors fill what is outside with zeros at no cost, pointers pay for every lane
        block_m, block_n = _fit(rows, best.block_m), _fit(cols, best.block_n)
        best = replace(best, block_m=block_m, block_n=block_n, subtiles=min(best.subtiles, block_n // _TINY))
    if strided:  # the addresses of many elements spill, unless steps are short and more warps share them
        block_k = min(best.block_k, 32) if best.block_n >= 64 else best.block_k
        best = replace(best, block_k=block_k, num_warps=8 if best.block_m > 64 else best.num_warps)
    return _square(best, num_sms)


def matmul_configs(dtype: torch.dtype, tma: bool, masked: bool, tf32: bool = False) -> tuple[MatmulConfig, ...]:
    """The shipped tiles of a path, the largest first; `lora-kernels tune` stores places in this tuple.

    A masked product has a second accumulator, so its tiles are sliced more finely or spread over more warps: whole
    ones spill.
    """
    if tma:
        return _MASKED_TMA if masked else _TMA
    if dtype.itemsize == 2:
        return _MASKED_HALF if masked else _HALF
    if not tf32:  # without tensor cores operands are spread over registers: larger tiles and longer steps spill
        return (MatmulConfig(64, 32, 16, 8, 1, 8, 2),)
    single = MatmulConfig(64, 64, 32, 8, 2 if masked else 1, 8, 3)
    return replace(single, block_m=128), single


# On sm_90 and later. The first tiles are those of large products; narrow ones are for few rows, where W is all that is
# read: enough programs to ask every multiprocessor for a part of it, deep pipelines to keep many bytes on the way.
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


def _clocks(config: MatmulConfig, rows: int, cols: int, num_sms: int) -> float:
    """A model of the clocks a multiprocessor is busy for 64 of K: a choice between tiles, not a forecast.

    Tiles of one multiprocessor share its tensor cores, however many are there at once. A K step takes the longer of its
    products, at 2048 multiply-adds a clock less what narrow instructions lose on reading shared memory at 128 bytes a
    clock (Hopper's wgmma, 64 rows each), and of its operands, which L2 delivers at some 48 bytes a clock.
    """
    m, n = config.block_m, config.block_n
    instruction = max(n / 2, (64 * 32 + n * 32) / 128)  # m64 n k16: n/2 clocks of products, or its operands from shared
    products = max(1, m // 64) * 4 * instruction
    operands = (min(m, rows) + min(n, cols)) * 128 / 48
    return -(-_tiles(rows, cols, m, n) // num_sms) * max(products, operands)


@functools.lru_cache(maxsize=4096)
def shrink_config(
    rows: int, inner: int, rank: int, dtype: torch.dtype, dropout: bool = False, strided: bool = False,
    shared: int = SHARED, adapters: int = 1, activated: bool = False, adapter_itemsize: int = 0,
) -> ShrinkConfig:  # fmt: skip
    """The tile for s `[rows, rank]` summed over `inner`, and where the sum is split: where rows are too few.

    Args:
        rows: M.
        inner: K.
        rank: R, the largest of several adapters.
        dtype: Of the operands.
        dropout: Whether a mask is drawn, which costs registers.
        strided: Whether no element of x lies next to another, so that each has an address of its own.
        shared: Bytes of shared memory of a multiprocessor.
        adapters: How many; several have a tile of A each, and with dropout a masked tile of x each, at a time.
        activated: Whether x is made of two operands by an activation, which costs registers and a tile more.
        adapter_itemsize: Bytes an element of A, where it is wider than x.
    """
    # 64 rows of fp32 with dropout spill. Of 16 bits they would be a wgmma of an x in registers, where x is masked or made
    # by an activation. Some ptxas overwrite these too early (docs/traps.md), and a multiprocessor has two programs of 64
    # rows, five of 32.
    block_m = _fit(rows, 32 if dtype.itemsize == 4 or dropout or activated else 64)
    block_r = _fit(rank, 64 if adapters < 4 else 32)
    # 128 of K beside the mask, and addresses or sums, spill; several adapters take less of it anyway
    crowded = dropout and adapters == 1 and (strided or block_r == 64)
    half_k = 64 if crowded else 128
    most_stages = 3 if crowded and dtype.itemsize == 4 else 4  # where IEEE products take longer than any load
    block_k = _fit(inner, half_k if dtype.itemsize == 2 else 64 if block_r == 16 else 32)
    of_x, of_a = dtype.itemsize, max(dtype.itemsize, adapter_itemsize)
    if adapters > 1:
        wide = adapters > 2 and block_r * of_a >= 128  # their sums, and rows of A on their way to 16 bits
        crowded = (dropout and strided) or (wide and (of_a > of_x or (dropout and of_x == 4)))
        block_k = max(_TINY, block_k // (8 if crowded else 4 if dropout or wide else 2))
    elif activated:
        block_k = max(_TINY, block_k // 2)
    k_per_split = _split(inner, block_k, _tiles(rows, rank, block_m, block_r))
    room = shared // 2 if block_r <= 32 else shared  # two programs hide the latency of each other's loads
    stages = _stages(most_stages, block_k * (block_m * (1 + activated) * of_x + block_r * adapters * of_a), room)
    return ShrinkConfig(block_m, block_k, block_r, k_per_split, num_warps=4, num_stages=stages)


def shrink_wgrad_pays(rank: int, activated: bool = False) -> bool:
    """Whether ds and dB should come from one read of dy: at small ranks, where their parts are small beside it.

    Where dy is made by an activation, fewer columns fit a program, so there are more parts: written and read they weigh
    as much as another read of dy at rank 32 in 16 bit, at rank 16 in fp32.
    """
    return rank <= (_SHRINK_WGRAD_RANK // 2 if activated else _SHRINK_WGRAD_RANK)


@functools.lru_cache(maxsize=4096)
def wgrad_config(
    rows: int, wide: int, thin: int, dtype: torch.dtype, shrinks: bool = False, shared: int = SHARED,
    adapters: int = 1, masked: bool = False, activated: bool = False, strided: bool = False, rounds: bool = False,
    tf32: bool = False, num_sms: int = _PROGRAMS // 2, mixed: bool = False,
) -> WgradConfig:  # fmt: skip
    """The tile for g `[wide, thin]` summed over `rows`, and where the sum is split.

    With `shrinks` a program owns more columns, so that there are fewer parts of ds. Several adapters have a sum each
    and, with a mask, a masked tile each: fewer columns. `activated` operands are made of three others, a tile of each.
    `strided` operands, which have no element next to another, take an address each. A program that `rounds` B holds it
    in fp32 for a while, in the registers of more warps. `shared` is a multiprocessor's shared memory in bytes. `tf32`
    says that fp32 products may use TF32. `num_sms` multiprocessors have a program each of what is `activated`. Adapters
    are `mixed` where some have a mask and some have none.
    """
    single = dtype.itemsize == 4
    small = shared < SHARED
    if shrinks:
        wide_tile = 128 if strided or (rounds and shared <= _LEAST_SHARED) else 256
    else:
        wide_tile = 64 if adapters > 1 and (masked or adapters * _fit(thin, 64) > 64) else 128
    # Mixed adapters take one tile masked, from registers, and as it is, from shared memory. No wgmma may do either
    # (docs/traps.md), and 32 columns are too few for one. Four wide masked tiles spill with more.
    if not single and (mixed or (masked and adapters > 3 and thin > 32)):
        wide_tile = 32
    if activated:  # more columns, for fewer parts of ds, as far as three operands leave registers for them
        wide_tile = 128 if single or thin <= (32 if shared > _LEAST_SHARED else 16) else 32 if masked else 64
    # 64 columns of masked fp32 and more are rounded to TF32 by Triton 3.6 on sm_100, whatever precision it is told
    block_c = _fit(wide, wide_tile // 4 if single else wide_tile)
    block_r = _fit(thin, 64)
    # masks, made operands and the sums of many wide adapters leave registers for fewer rows, and so do addresses
    few = single or activated or (adapters > 2 and masked)
    wide_sums = adapters > 2 and thin > (16 if masked and small else 32) and (small or not masked)
    fewest = single if activated else wide_sums
    addressed = strided and (single or (masked and adapters > 1 and shared <= _LEAST_SHARED))
    most_rows = (_TINY if fewest else 32 if few else 64) // (2 if addressed else 1)
    # in TF32 a tile of 64 rows passes through shared memory most smoothly, with half the bank conflicts of 32
    block_m = 64 if shrinks and tf32 and not activated else _fit(rows, most_rows)
    tiles = _tiles(wide, thin, block_c, block_r)
    if activated:
        part = 8 * thin * adapters / (5 * rows * dtype.itemsize)  # of what is read and written anyway: g, u, dh, dg, du
        rows_per_split = _whole_rounds(rows, block_m, tiles, num_sms, part)
    else:
        rows_per_split = _split(rows, block_m, tiles)
    # narrow tiles, all of fp32 among them, run many at once; some spill with more
    alone = activated or adapters == 1
    most = 3 if block_c > 64 and alone and (shrinks or not small) and not (activated and single) else 2
    stages = _stages(most, block_m * (block_c * (3 if activated else 1) + block_r * adapters) * dtype.itemsize, shared)
    if shrinks and not activated and rows <= block_m:  # one step is no pipeline, and Triton's would be wrong on sm_90
        stages = 1
    warps = 8 if (rounds and block_r > 16) or (activated and (single or block_c >= 64)) else 4
    return WgradConfig(block_m, block_c, block_r, rows_per_split, num_warps=warps, num_stages=stages)


def _stages(most: int, size: int, room: int) -> int:
    """Stages of a pipeline that takes `size` bytes a stage: as many as there is room for, two at least."""
    return max(2, min(most, room // size))


def _padded(config: MatmulConfig, rows: int, cols: int) -> int:
    """Elements of y that the tiles cover, those outside of it among them."""
    return _tiles(rows, cols, config.block_m, config.block_n) * config.block_m * config.block_n


def _split(size: int, block: int, tiles: int) -> int:
    """How much of a summed dimension a program takes: whole blocks, so that `_PROGRAMS` are busy.

    Four blocks or more, as far as there are so many: a pipeline wants steps.
    """
    share = max(-(-size // max(1, _PROGRAMS // tiles)), 4 * block)
    return max(1, -(-min(share, size) // block)) * block


def _whole_rounds(size: int, block: int, tiles: int, programs: int, part: float) -> int:
    """As `_split`, where `programs` run at once and take long: so that the last of their rounds is nearly full.

    With 112 tiles on 132 multiprocessors one to six splits leave 15 % of them idle on average, seven 1 %. A split more
    costs `part` of the bytes that are moved anyway.
    """

    def busy(splits: int) -> float:
        return -(-tiles * splits // programs) * programs / (tiles * splits) * (1 + splits * part)

    most = max(1, min(8, size // (4 * block)))
    splits = min(range(1, most + 1), key=busy)
    return max(1, -(-size // (splits * block))) * block


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
