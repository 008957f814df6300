"""Segments: where the rows of each group lie, as maps of tiles that the grouped contractions read on the device.

    offsets  [G + 1]   int32 or int64; rows offsets[g] to offsets[g + 1] belong to group g
    table    int32     the offsets, clamped to 0 … M; then for each power of two `block` from 16 up to M a map:

    map      [3, capacity] and one number more; entry i is (group, first row, end row)
             the tiles of all groups, of up to `block` rows, in order; the number of these and the next ones is the last
             number
             the tiles of the rows behind the last group, which belong to no group: group G
             an entry without rows for each group without rows
             entries without rows of group -1, up to `capacity` = ceil(M / block) + G + 1

A tile belongs to one group, so a program finds the group's weight by one number, and a group without rows costs a
program only where its result is zero and has to be written. Nothing is read by the host: the launch is made for the
number of rows and groups, which are shapes. One launch makes the maps of all blocks, because each contraction picks its
own block.

Cost: reads (G + 1) numbers a program, writes some 12·(M/8 + (G + 1)·log₂(M/16)) bytes.

Source: the precomputed schedules of ragged products in Triton's own triton_kernels (idea: maps for several block sizes
from one launch). No code was taken.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.kernels import _launch
from lora_kernels.kernels._configs import TINY
from lora_kernels.kernels._launch import Facts, Launch, Slot, facts

__all__ = ["Segments", "place", "segments"]

# Entries that a program writes at a time.
_AT_ONCE = 128
# The last map is of blocks of this many rows, or of all.
_LARGEST = 256


class Segments(NamedTuple):
    """Where the rows of each group lie.

    Attributes:
        table: The offsets and the maps, int32.
        rows: M.
        groups: G.
    """

    table: Tensor
    rows: int
    groups: int


@triton.jit
def _segments_kernel(
    offsets_ptr, table_ptr, M, G, BLOCK_G: tl.constexpr, SMALLEST: tl.constexpr, AT_ONCE: tl.constexpr
):
    """Write the entries of one group in one map in each program; the program after the last group writes the rest."""
    group, level = tl.program_id(0), tl.program_id(1)
    block = SMALLEST << level
    map_ptr = table_ptr + G + 1
    for i in range(level):
        map_ptr += 3 * (tl.cdiv(M, SMALLEST << i) + G + 1) + 1
    capacity = tl.cdiv(M, block) + G + 1

    offs_g = tl.arange(0, BLOCK_G)
    begins = _clamped(offsets_ptr + offs_g, offs_g < G, M)
    ends = _clamped(offsets_ptr + offs_g + 1, offs_g < G, M)
    rows = tl.maximum(ends - begins, 0)
    tiles = tl.where(offs_g < G, tl.cdiv(rows, block), 0)
    empty = tl.where((offs_g < G) & (rows == 0), 1, 0)
    before = tl.sum(tl.where(offs_g < group, tiles, 0))
    # Of the program after the last group, the rows lie between the end of that group and M.
    last = tl.sum(tl.where(offs_g == G - 1, ends, 0))
    first = tl.where(group < G, tl.sum(tl.where(offs_g == group, begins, 0)), last)
    end = tl.where(group < G, tl.sum(tl.where(offs_g == group, ends, 0)), M)
    own = tl.cdiv(tl.maximum(end - first, 0), block)
    for i in range(0, own, AT_ONCE):
        offs = i + tl.arange(0, AT_ONCE)
        row = first + offs * block
        _write(map_ptr, capacity, before + offs, offs < own, offs * 0 + group, row, tl.minimum(row + block, end))

    tail = tl.cdiv(tl.maximum(M - last, 0), block)
    total = tl.sum(tiles) + tail
    if group < G:
        at = total + tl.sum(tl.where(offs_g < group, empty, 0))
        offs = tl.arange(0, 1)
        zeros = offs * 0
        _write(map_ptr, capacity, at + offs, zeros + own == 0, zeros + group, zeros + first, zeros + first)
    else:
        tl.store(map_ptr + 3 * capacity, total)
        written = total + tl.sum(empty)
        for i in range(written, capacity, AT_ONCE):
            offs = i + tl.arange(0, AT_ONCE)
            _write(map_ptr, capacity, offs, offs < capacity, offs * 0 - 1, offs * 0, offs * 0)
        if level == 0:
            tl.store(table_ptr + offs_g, begins, mask=offs_g < G)
            tl.store(table_ptr + G, last)


@triton.jit
def _clamped(ptrs, mask, M):
    """Load offsets, clamped to the rows that there are, so that no wrong offset leads outside of a tensor."""
    return tl.minimum(tl.maximum(tl.load(ptrs, mask=mask, other=0), 0), M).to(tl.int32)


@triton.jit
def _write(map_ptr, capacity, index, mask, group, first, end):
    """Write entries of a map."""
    tl.store(map_ptr + index, group, mask=mask)
    tl.store(map_ptr + capacity + index, first, mask=mask)
    tl.store(map_ptr + 2 * capacity + index, end, mask=mask)


def segments(offsets: Tensor, rows: int, slot: Slot | None = None) -> Segments:
    """Make the maps of the rows of each group.

    Args:
        offsets: `[G + 1]`, int32 or int64: the first row of each group, and the row behind the last group.
        rows: M.
        slot: A place of a plan that keeps the settled launch; all its calls must have tensors of one kind.
    """
    offsets = offsets.contiguous()
    settled = (slot and slot.settled) or _settle(facts(offsets), rows, offsets.device, _launch.imagined)
    launch, size = settled if slot is None else slot.keep(settled)
    table = torch.empty(size, dtype=torch.int32, device=offsets.device)
    launch(offsets, table)
    return Segments(table, rows, offsets.shape[0] - 1)


@functools.lru_cache(maxsize=4096)
def place(rows: int, groups: int, block: int) -> tuple[int, int]:
    """Return where the map of tiles of up to `block` rows begins in the table, and its number of entries."""
    start, size = groups + 1, TINY
    while size < block:
        start, size = start + 3 * (-(-rows // size) + groups + 1) + 1, 2 * size
    return start, -(-rows // block) + groups + 1


@functools.lru_cache(maxsize=4096)
def _settle(offsets: Facts, rows: int, device: torch.device, imagined: object) -> tuple[Launch, int]:
    groups = offsets.shape[0] - 1
    largest = max(_LARGEST, triton.next_power_of_2(rows))
    start, entries = place(rows, groups, largest)
    levels = (largest // TINY).bit_length()
    launch = Launch(
        _segments_kernel, (groups + 1, levels), (rows, groups),
        dict(BLOCK_G=triton.next_power_of_2(groups), SMALLEST=TINY, AT_ONCE=_AT_ONCE),
        dict(num_warps=1, num_stages=1, **_launch.launch_options(False)), device,
    )  # fmt: skip
    return launch, start + 3 * entries + 1
