"""Device functions that the kernels share: tile order, the end of a split sum, the dropout bits and their packing.

The functions run in Triton's interpreter as well as compiled. So bf16 values are only loaded, selected, multiplied in a
dot, cast and stored, and never used in elementwise arithmetic, which the interpreter does not have for bf16.
"""

import triton
import triton.language as tl
from triton.language.target_info import current_target

from lora_kernels.dropout import PHILOX_ROUNDS

__all__ = [
    "group_entry", "group_part", "halves", "keep_bits", "kept", "last_to_arrive", "load_kept", "sum_of_parts",
    "tile_position", "unpack_bits",
]  # fmt: skip

_ROUNDS = tl.constexpr(PHILOX_ROUNDS)


@triton.jit
def tile_position(tile, num_m, num_n, GROUP_M: tl.constexpr):
    """Return the position of a tile, in groups of GROUP_M rows, so that concurrent tiles share operands in L2."""
    per_group = GROUP_M * num_n
    first_m = (tile // per_group) * GROUP_M
    height = tl.minimum(num_m - first_m, GROUP_M)
    inside = tile % per_group
    return first_m + inside % height, inside // height


@triton.jit
def group_entry(map_ptr, index, entries):
    """Return the group, the first row and the end of an entry of a map that `segments` has made."""
    return tl.load(map_ptr + index), tl.load(map_ptr + entries + index), tl.load(map_ptr + 2 * entries + index)


@triton.jit
def group_part(table_ptr, map_start, entry, entries, rows_per_part, groups):
    """Return the group, first row and end of an entry, the place of the entry among its group's, and their number.

    The number is 0 for an entry of no group. A group without rows has one entry.
    """
    group, first, end = group_entry(table_ptr + map_start, entry, entries)
    belongs = (group >= 0) & (group < groups)
    group = tl.where(belongs, group, 0)
    # The table begins with the offsets of the groups.
    begin, after = tl.load(table_ptr + group), tl.load(table_ptr + group + 1)
    parts = tl.where(belongs, tl.maximum(tl.cdiv(after - begin, rows_per_part), 1), 0)
    part = tl.where(belongs, (first - begin) // rows_per_part, 0)
    first, end = tl.cast(first, tl.int64), tl.cast(tl.where(belongs, end, first), tl.int64)
    return tl.cast(group, tl.int64), first, end, tl.cast(part, tl.int64), parts


@triton.constexpr_function
def _waits_by_hand() -> bool:
    """Return whether a wave has to wait for its own stores before a barrier: on CDNA (gfx9)."""
    # Ask for no target in the interpreter, because an imagined GPU may have left its driver active.
    target = None if triton.knobs.runtime.interpret else current_target()
    return target is not None and target.backend == "hip" and target.arch.startswith("gfx9")


@triton.jit
def last_to_arrive(arrivals_ptr, expected):
    """Count this program in, and return whether it is the last of `expected`; the last one sees the stores of all.

    Chance decides which program is last, so the last one must add all partial sums, its own among them, in a fixed
    order. The last program leaves the counter at 0 for the next launch. No program waits, so no order of programs can
    hang.
    """
    if _waits_by_hand():
        # On CDNA, the barrier and the atomic wait for the stores of the counting wave alone, so each wave waits here.
        tl.inline_asm_elementwise(
            "s_waitcnt vmcnt(0)\ns_mov_b32 $0, 0", "=s,~{memory}", [], dtype=tl.int32, is_pure=False, pack=1
        )
    # The barrier puts the stores of all threads before the release of the one thread that counts.
    tl.debug_barrier()
    last = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel") == expected - 1
    if last:
        tl.store(arrivals_ptr, 0)
    return last


@triton.jit
def sum_of_parts(part_ptrs, part_size, splits, last, mask, AT_ONCE: tl.constexpr):
    """Add the `splits` partial sums of a tile in order, if this program is the last; AT_ONCE loads are in flight."""
    total = tl.zeros(part_ptrs.shape, tl.float32)
    for j in range(0, tl.where(last, splits, 0), AT_ONCE):
        for ahead in tl.static_range(AT_ONCE):
            k = tl.cast(j, tl.int64) + ahead
            # The mask is a block, because the interpreter takes no scalar in a mask.
            there = tl.zeros(part_ptrs.shape, tl.int64) + k < splits
            total += tl.load(part_ptrs + k * part_size, mask=mask & there, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def keep_bits(seed, counter, threshold):
    """Draw a byte of eight keep bits for each int64 counter, by a threshold of 16 bits; see `lora_kernels.dropout`.

    Instructions count, because drawing costs a shrink as much as reading x. So Philox is written out here with one wide
    product where Triton's Philox has two narrow ones, and two halves are compared at a time.
    """
    c0 = counter.to(tl.uint32)
    c1 = (counter >> 32).to(tl.uint32)
    c2 = c0 * 0
    c3 = c2
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(_ROUNDS):
        first, second = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (second >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = second.to(tl.uint32)
        c2 = (first >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = first.to(tl.uint32)
        # Both keys wrap by definition.
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    t = tl.cast(threshold, tl.uint32)
    both = t | (t << 16)
    flags = _kept_halves(c0, both) >> 15
    flags |= _kept_halves(c1, both) >> 13
    flags |= _kept_halves(c2, both) >> 11
    flags |= _kept_halves(c3, both) >> 9
    # Even bits come from low halves, odd bits from high halves.
    return ((flags | (flags >> 15)) & 0xFF).to(tl.int32)


@triton.jit
def _kept_halves(word, both):
    """Set the topmost bit of each 16-bit half of a word that is at least the threshold in that half of `both`."""
    # Subtract the lower 15 bits of each half; the set topmost bit supplies the borrow, so the halves stay apart.
    rest = (word | 0x80008000) - (both & 0x7FFF7FFF)
    return ((word & ~both) | (~(word ^ both) & rest)) & 0x80008000


@triton.jit
def unpack_bits(packed):
    """Spread the lowest byte of integers [ROWS, COLS] to booleans [ROWS, 8 COLS], lowest bit first."""
    bits = packed[:, :, None] & (1 << tl.arange(0, 8))[None, None, :]
    return tl.reshape(bits, (packed.shape[0], packed.shape[1] * 8)) != 0


@triton.jit
def load_kept(keep_ptr, offs_m, M, first, cols, SPAN: tl.constexpr):
    """Load the keep bits of SPAN columns from `first` on, in the packed form that `kept` takes.

    The bits come in words of 32 bits, because Triton loads no byte ahead of the loop step that needs it. The words are
    few enough to load well ahead.
    """
    row_words = tl.cdiv(cols, 32)
    offs_word = first // 32 + tl.arange(0, SPAN // 32 if SPAN > 32 else 1)
    here = offs_m[:, None] * row_words + offs_word[None, :]
    mask = (offs_m < M)[:, None] & (offs_word < row_words)[None, :]
    # Load the words as one row, so that each thread loads one word. As a tile, the threads would take the tile's shape,
    # and its words would conflict in banks of shared memory.
    COUNT: tl.constexpr = here.shape[0] * here.shape[1]
    words = tl.load(keep_ptr + tl.reshape(here, (COUNT,)), mask=tl.reshape(mask, (COUNT,)), other=0)
    words = tl.reshape(words, here.shape)
    return words >> (first % 32).to(tl.int32) if SPAN < 32 else words


@triton.jit
def kept(words, SPAN: tl.constexpr):
    """Unpack the words of `load_kept` to booleans [ROWS, SPAN]: True where the element is kept."""
    # Bytes of a word. Each thread unpacks one or two words.
    BYTES: tl.constexpr = SPAN // 8 if SPAN < 32 else 4
    parts = words[:, :, None] >> (8 * tl.arange(0, BYTES))[None, None, :]
    return unpack_bits(tl.reshape(parts, (words.shape[0], words.shape[1] * BYTES)))


@triton.jit
def halves(t):
    """Split a tile [ROWS, COLS] into its left and its right half."""
    pair = tl.reshape(t, (t.shape[0], 2, t.shape[1] // 2))
    return tl.split(tl.permute(pair, (0, 2, 1)))
