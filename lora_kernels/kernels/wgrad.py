"""Wgrad: contract two tall operands over their rows, deterministically.

    g[c, d] = Σₘ left[m, c] · keep[m, d] right[m, d]

    left   [M, C]          any strides   bf16, fp16 or fp32
    right  [M, D]          any strides   dtype of left
    keep   [M, ceil(D/8)]  bit-packed, as `shrink` writes it, or none
    g      [C, D]          contiguous, in the dtype asked for, straight from the fp32 sums

    gradient   left         right          g
    dA         ds [M, r]    x [M, in]      [r, in]      keep: the mask of the forward pass
    dB         dy [M, out]  s [M, r]       [out, r]

Either side may be the wide one. The wide side goes into the rows of the dot, where tiles of 64 and more use the
fast tensor-core instructions; the output's strides put the result the right way round.

The rows are split among programs; partial sums go to fp32 buffers that a second kernel adds in a fixed order. No
atomics: the same inputs give the same bits.

Cost: reads the wide operand once (thin side <= 64), M·W·itemsize bytes, + 4·W·T bytes written and read per split;
2·M·W·T FLOPs.

Sources: Hu et al. 2021, arXiv:2106.09685. Split sums with a fixed-order reduction are common practice (cuBLAS's
split-K with a workspace). No code was taken.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.kernels._configs import WgradConfig, wgrad_config
from lora_kernels.kernels._device import unpack_bits
from lora_kernels.kernels._launch import LAUNCH_OPTIONS, on_device, precision

__all__ = ["wgrad"]

_REDUCE_BLOCK = 1024


@triton.jit
def _wgrad_kernel(
    wide_ptr, thin_ptr, keep_ptr, g_ptr,
    M, W, T, rows_per_split,
    stride_wm, stride_ww, stride_tm, stride_tt, stride_gsplit, stride_gw, stride_gt,
    HAS_KEEP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Each program owns BLOCK_W by BLOCK_T elements of one split's partial sum."""
    pid = tl.program_id(0)
    split = tl.program_id(1).to(tl.int64)
    num_t = tl.cdiv(T, BLOCK_T)
    offs_w = (pid // num_t).to(tl.int64) * BLOCK_W + tl.arange(0, BLOCK_W)
    offs_t = (pid % num_t).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_w, mask_t = offs_w < W, offs_t < T
    if HAS_KEEP:
        row_bytes = tl.cdiv(W, 8)
        offs_byte = (pid // num_t).to(tl.int64) * (BLOCK_W // 8) + tl.arange(0, BLOCK_W // 8)
        mask_byte = offs_byte < row_bytes

    acc = tl.zeros((BLOCK_W, BLOCK_T), tl.float32)
    for i in range(tl.maximum(rows_per_split // BLOCK_M, 1)):  # a whole number of blocks by construction
        offs_m = split * rows_per_split + tl.cast(i, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        wide = tl.load(
            wide_ptr + offs_m[:, None] * stride_wm + offs_w[None, :] * stride_ww,
            mask=mask_m[:, None] & mask_w[None, :], other=0.0,
        )  # fmt: skip
        thin = tl.load(
            thin_ptr + offs_m[:, None] * stride_tm + offs_t[None, :] * stride_tt,
            mask=mask_m[:, None] & mask_t[None, :], other=0.0,
        )  # fmt: skip
        if HAS_KEEP:
            packed = tl.load(
                keep_ptr + offs_m[:, None] * row_bytes + offs_byte[None, :],
                mask=mask_m[:, None] & mask_byte[None, :], other=0,
            ).to(tl.int32)  # fmt: skip
            wide = tl.where(unpack_bits(packed), wide, tl.zeros((BLOCK_M, BLOCK_W), wide.dtype))
        acc = tl.dot(tl.trans(wide), thin, acc, input_precision=PRECISION)

    g_ptrs = g_ptr + split * stride_gsplit + offs_w[:, None] * stride_gw + offs_t[None, :] * stride_gt
    tl.store(g_ptrs, acc.to(g_ptr.dtype.element_ty), mask=mask_w[:, None] & mask_t[None, :])


@triton.jit
def _reduce_kernel(partial_ptr, g_ptr, numel, splits, BLOCK: tl.constexpr):
    """Add the partial sums `[splits, numel]` in the order of the splits."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        acc += tl.load(partial_ptr + tl.cast(split, tl.int64) * numel + offs, mask=mask, other=0.0)
    tl.store(g_ptr + offs, acc.to(g_ptr.dtype.element_ty), mask=mask)


def wgrad(
    left: Tensor, right: Tensor, out_dtype: torch.dtype, keep: Tensor | None = None, config: WgradConfig | None = None
) -> Tensor:
    """Compute g = leftᵀ (right · keep), `[C, D]`, in `out_dtype`."""
    g = left.new_empty(left.shape[1], right.shape[1], dtype=out_dtype)
    # a mask belongs to `right`, so with one that side is the wide one whatever its width
    right_is_wide = keep is not None or right.shape[1] >= left.shape[1]
    wide, thin = (right, left) if right_is_wide else (left, right)
    (rows, width), thickness = wide.shape, thin.shape[1]
    config = config or wgrad_config(rows, width, thickness, left.dtype)
    splits = triton.cdiv(rows, config.rows_per_split)
    partial = g[None] if splits == 1 else g.new_empty(splits, *g.shape, dtype=torch.float32)
    stride_split, stride_left, stride_right = partial.stride()
    strides_g = (stride_right, stride_left) if right_is_wide else (stride_left, stride_right)
    grid = (triton.cdiv(width, config.block_c) * triton.cdiv(thickness, config.block_r), splits)
    with on_device(left):
        _wgrad_kernel[grid](
            wide, thin, keep, partial, rows, width, thickness, config.rows_per_split,
            *wide.stride(), *thin.stride(), stride_split, *strides_g,
            HAS_KEEP=keep is not None, PRECISION=precision(left),
            BLOCK_M=config.block_m, BLOCK_W=config.block_c, BLOCK_T=config.block_r,
            num_warps=config.num_warps, num_stages=config.num_stages, **LAUNCH_OPTIONS,
        )  # fmt: skip
        if splits > 1:
            _reduce_kernel[(triton.cdiv(g.numel(), _REDUCE_BLOCK),)](
                partial, g, g.numel(), splits, BLOCK=_REDUCE_BLOCK, **LAUNCH_OPTIONS
            )
    return g
