"""What the kernels share on the device: tile order, the end of a split sum, the dropout bits and packing them.

Interpreted and compiled alike; bf16 values are only loaded, selected, multiplied in a dot, cast and stored, never
used in elementwise arithmetic (which Triton's interpreter does not have for bf16).
"""

import triton
import triton.language as tl
from triton.language.target_info import current_target

from lora_kernels.dropout import PHILOX_ROUNDS

__all__ = ["halves", "keep_bits", "kept", "last_to_arrive", "load_kept", "tile_position", "unpack_bits"]

_ROUNDS = tl.constexpr(PHILOX_ROUNDS)


@triton.jit
def tile_position(tile, num_m, num_n, GROUP_M: tl.constexpr):
    """Order tiles in groups of GROUP_M rows, so that tiles that run together share operands in L2."""
    per_group = GROUP_M * num_n
    first_m = (tile // per_group) * GROUP_M
    height = tl.minimum(num_m - first_m, GROUP_M)
    inside = tile % per_group
    return first_m + inside % height, inside // height


@triton.constexpr_function
def _waits_by_hand() -> bool:
    """Whether a wave has to wait for its own stores before a barrier: on CDNA (gfx9)."""
    # the interpreter may find a driver that an imagined GPU has left active
    target = None if triton.knobs.runtime.interpret else current_target()
    return target is not None and target.backend == "hip" and target.arch.startswith("gfx9")


@triton.jit
def last_to_arrive(arrivals_ptr, expected):
    """Count this program in; whether it is the last of `expected`, which then sees what all of them have stored.

    Who is last is chance, so it must add the others' partial sums in a fixed order, its own among them. It leaves the
    counter at 0 for the next launch. Nobody waits: no order of programs can hang.
    """
    if _waits_by_hand():  # there a barrier does not wait for the stores of other waves than the one that counts
        tl.inline_asm_elementwise(
            "s_waitcnt vmcnt(0)\ns_mov_b32 $0, 0", "=s,~{memory}", [], dtype=tl.int32, is_pure=False, pack=1
        )
    tl.debug_barrier()  # the stores of all threads come before the one thread's release
    last = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel") == expected - 1
    if last:
        tl.store(arrivals_ptr, 0)
    return last


@triton.jit
def keep_bits(seed, counter, threshold):
    """Draw a byte of eight keep bits for each int64 counter, by a threshold of 16 bits; see `lora_kernels.dropout`.

    Drawing costs a shrink as much as reading x, so instructions count: Philox is written out here with one wide
    product where Triton's own has two narrow ones, and two halves are compared at a time.
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
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)  # wraps by definition
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    t = tl.cast(threshold, tl.uint32)
    both = t | (t << 16)
    flags = _kept_halves(c0, both) >> 15
    flags |= _kept_halves(c1, both) >> 13
    flags |= _kept_halves(c2, both) >> 11
    flags |= _kept_halves(c3, both) >> 9
    return ((flags | (flags >> 15)) & 0xFF).to(tl.int32)  # even bits from low halves, odd ones from high halves


@triton.jit
def _kept_halves(word, both):
    """Whether each 16-bit half of a word is at least the threshold in that half of `both`, in its topmost bit."""
    rest = (word | 0x80008000) - (both & 0x7FFF7FFF)  # of the lower 15 bits; the topmost one lends what is short
    return ((word & ~both) | (~(word ^ both) & rest)) & 0x80008000


@triton.jit
def unpack_bits(packed):
    """Spread the lowest byte of integers [ROWS, COLS] to booleans [ROWS, 8 COLS], lowest bit first."""
    bits = packed[:, :, None] & (1 << tl.arange(0, 8))[None, None, :]
    return tl.reshape(bits, (packed.shape[0], packed.shape[1] * 8)) != 0


@triton.jit
def load_kept(keep_ptr, offs_m, M, first, cols, SPAN: tl.constexpr):
    """Load the keep bits of SPAN columns from `first` on, as `kept` takes them: few enough to load well ahead.

    They come in words of 32 bits, because Triton loads no byte ahead of the step of a loop that needs it.
    """
    row_words = tl.cdiv(cols, 32)
    offs_word = first // 32 + tl.arange(0, SPAN // 32 if SPAN > 32 else 1)
    here = offs_m[:, None] * row_words + offs_word[None, :]
    mask = (offs_m < M)[:, None] & (offs_word < row_words)[None, :]
    # As a row of words each thread loads one; as a tile the threads would take its shape, and its words meet in banks.
    COUNT: tl.constexpr = here.shape[0] * here.shape[1]
    words = tl.load(keep_ptr + tl.reshape(here, (COUNT,)), mask=tl.reshape(mask, (COUNT,)), other=0)
    words = tl.reshape(words, here.shape)
    return words >> (first % 32).to(tl.int32) if SPAN < 32 else words


@triton.jit
def kept(words, SPAN: tl.constexpr):
    """Whether each element of SPAN columns is kept, [ROWS, SPAN], by what `load_kept` gave."""
    BYTES: tl.constexpr = SPAN // 8 if SPAN < 32 else 4  # of a word: each thread unpacks one or two of them
    parts = words[:, :, None] >> (8 * tl.arange(0, BYTES))[None, None, :]
    return unpack_bits(tl.reshape(parts, (words.shape[0], words.shape[1] * BYTES)))


@triton.jit
def halves(t):
    """Split a tile [ROWS, COLS] into its left and its right half."""
    pair = tl.reshape(t, (t.shape[0], 2, t.shape[1] // 2))
    return tl.split(tl.permute(pair, (0, 2, 1)))
