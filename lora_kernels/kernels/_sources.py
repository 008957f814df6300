"""Device functions of `matmul_expand`: the source of a K step, and the tiles of a step.

The functions have their own file because `matmul_expand` is long. Each K step belongs to one source of the list, and a
select among the sources' addresses finds its operands.
"""

import triton
import triton.language as tl

from lora_kernels.kernels._device import load_kept

__all__ = ["load_tile", "masked_tiles", "source_of"]


@triton.jit
def source_of(step, firsts, ps, qs, Ks, strides_pm, strides_pk, strides_qn, strides_qk, COUNT: tl.constexpr):
    """Return p, q, the first step, K and the strides of the source that owns a K step."""
    p, q, first, K = ps[0], qs[0], 0, Ks[0]
    stride_pm, stride_pk, stride_qn, stride_qk = strides_pm[0], strides_pk[0], strides_qn[0], strides_qk[0]
    for i in tl.static_range(1, COUNT):
        there = step >= firsts[i]
        if there:
            p = ps[i]
            q = qs[i]
        first = tl.where(there, firsts[i], first)
        K = tl.where(there, Ks[i], K)
        stride_pm = tl.where(there, strides_pm[i], stride_pm)
        stride_pk = tl.where(there, strides_pk[i], stride_pk)
        stride_qn = tl.where(there, strides_qn[i], stride_qn)
        stride_qk = tl.where(there, strides_qk[i], stride_qk)
    return p, q, first, K, stride_pm, stride_pk, stride_qn, stride_qk


@triton.jit
def masked_tiles(
    step, n0, M, N, offs_m, ps, qs, keep_ptrs, Ks, firsts, strides_pm, strides_pk, strides_qn, strides_qk,
    NUM_MASKED: tl.constexpr, SLICE: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Load p, q and the mask words of one step of the masked products, for the columns from n0 on; 0 outside."""
    p, q, first, K, stride_pm, stride_pk, stride_qn, stride_qk = source_of(
        step, firsts, ps, qs, Ks, strides_pm, strides_pk, strides_qn, strides_qk, NUM_MASKED
    )
    keep = keep_ptrs[0]
    for j in tl.static_range(1, NUM_MASKED):
        if step >= firsts[j]:
            keep = keep_ptrs[j]
    n0 = tl.cast(n0, tl.int64)
    offs_n, offs_r = n0 + tl.arange(0, SLICE), tl.cast(step - first, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    p_tile = load_tile(p, offs_m[:, None], M, stride_pm, offs_r[None, :], K, stride_pk)
    q_tile = load_tile(q, offs_r[:, None], K, stride_qk, offs_n[None, :], tl.where(M > 0, N, 0), stride_qn)
    return p_tile, q_tile, load_kept(keep, offs_m, M, n0, N, SLICE)


@triton.jit
def load_tile(ptr, rows, num_rows, stride_row, cols, num_cols, stride_col):
    """Load a tile by pointers; 0 outside the tensor."""
    return tl.load(ptr + rows * stride_row + cols * stride_col, mask=(rows < num_rows) & (cols < num_cols), other=0)
