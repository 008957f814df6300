"""What the kernels share on the device: tile order, the end of a split sum, the dropout bits and packing them.

Interpreted and compiled alike; bf16 values are only loaded, selected, multiplied in a dot, cast and stored, never
used in elementwise arithmetic (which Triton's interpreter does not have for bf16).
"""

import triton
import triton.language as tl

from lora_kernels.dropout import PHILOX_ROUNDS

__all__ = ["halves", "keep_bits", "last_to_arrive", "tile_position", "unpack_bits"]

_ROUNDS = tl.constexpr(PHILOX_ROUNDS)


@triton.jit
def tile_position(tile, num_m, num_n, GROUP_M: tl.constexpr):
    """Order tiles in groups of GROUP_M rows, so that tiles that run together share operands in L2."""
    per_group = GROUP_M * num_n
    first_m = (tile // per_group) * GROUP_M
    height = tl.minimum(num_m - first_m, GROUP_M)
    inside = tile % per_group
    return first_m + inside % height, inside // height


@triton.jit
def last_to_arrive(arrivals_ptr, expected):
    """Count this program in; whether it is the last of `expected`, which then sees what all of them have stored.

    Who is last is chance, so it must add the others' partial sums in a fixed order, its own among them. It leaves the
    counter at 0 for the next launch. Nobody waits: no order of programs can hang.
    """
    tl.debug_barrier()  # the stores of all threads come before the one thread's release
    last = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel") == expected - 1
    if last:
        tl.store(arrivals_ptr, 0)
    return last


@triton.jit
def keep_bits(seed, counter, threshold):
    """Draw a byte of eight keep bits for each int64 counter; the rule is in `lora_kernels.dropout`."""
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = low * 0
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero, zero, n_rounds=_ROUNDS)
    return (
        _two_bits(w0, threshold)
        | (_two_bits(w1, threshold) << 2)
        | (_two_bits(w2, threshold) << 4)
        | (_two_bits(w3, threshold) << 6)
    )


@triton.jit
def _two_bits(word, threshold):
    low = ((word & 0xFFFF).to(tl.int32) >= threshold).to(tl.int32)
    high = ((word >> 16).to(tl.int32) >= threshold).to(tl.int32)
    return low | (high << 1)


@triton.jit
def unpack_bits(packed):
    """Spread bytes [ROWS, COLS] (int32) to booleans [ROWS, 8 COLS], lowest bit first."""
    shifts = tl.arange(0, 8)[None, None, :]
    bits = (packed[:, :, None] >> shifts) & 1
    return tl.reshape(bits, (packed.shape[0], packed.shape[1] * 8)) != 0


@triton.jit
def halves(t):
    """Split a tile [ROWS, COLS] into its left and its right half."""
    pair = tl.reshape(t, (t.shape[0], 2, t.shape[1] // 2))
    return tl.split(tl.permute(pair, (0, 2, 1)))
