"""Shrink: contract a wide operand down to the LoRA rank, and drop elements of it on the way.

    s[m, r] = alpha · Σₖ keep[m, k] x[m, k] a[r, k]

    x      [M, K]          any strides   bf16, fp16 or fp32
    a      [R, K]          any strides   dtype of x
    s      [M, R]          rows padded to 16 bytes, dtype of x: rounded once, after alpha
    keep   [M, ceil(K/8)]  bit-packed, written when there is dropout: the rule is in `lora_kernels.dropout`
    alpha  float           multiplies the fp32 accumulator; a run-time number

One kernel, two call sites. Only the roles differ; strides carry the transpose.

    pass       x               a                  alpha                    s
    forward    x  [M, in]      lora_A   [r, in]   scaling · keep_scale     s  = scaling · D(x) Aᵀ
    backward   dy [M, out]     lora_Bᵀ  [r, out]  scaling · keep_scale     ds, which dx and dA mask again

Where rows are few, K is split among programs to fill the GPU: each leaves its part in fp32, and the last one to
finish adds the parts in a fixed order. The same inputs give the same bits.

Cost: reads x once (for R <= 64; once per 64 of R otherwise), so it is bound by bandwidth: M·K·itemsize bytes,
+ M·K/8 for the mask, + 8·M·R a split, written and read back; 2·M·K·R FLOPs.

Sources: Hu et al. 2021, arXiv:2106.09685, eq. 3. The name is Punica's (Chen et al. 2023, arXiv:2310.18547); packing
the mask while it is drawn follows TransformerEngine's dropout. No code was taken from either.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.dropout import draw_seed, threshold
from lora_kernels.kernels import _launch
from lora_kernels.kernels._configs import ShrinkConfig, shrink_config
from lora_kernels.kernels._device import keep_bits, last_to_arrive, unpack_bits
from lora_kernels.kernels._launch import Facts, Launch, arrivals, facts, on_device, precision, thin_rows

__all__ = ["draw_noise", "outputs", "shrink"]


@triton.jit
def _shrink_kernel(
    x_ptr, a_ptr, s_ptr, parts_ptr, arrivals_ptr, keep_ptr, seed_ptr,
    alpha, threshold,
    M, K, R, k_per_split,
    stride_xm, stride_xk, stride_ar, stride_ak, stride_sm,
    HAS_DROPOUT: tl.constexpr, IS_SPLIT: tl.constexpr, PDL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Each program owns BLOCK_M rows by BLOCK_R columns of one split's part of s, and walks the split's K once."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()  # what follows may come up while this runs; it waits before it reads s
    pid, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    num_r = tl.cdiv(R, BLOCK_R)
    pid_r = pid % num_r
    # 64-bit before any stride: tensors may span more than 2^31 elements
    offs_m = (pid // num_r).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = pid_r.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_m, mask_r = offs_m < M, offs_r < R
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
        row_bytes = tl.cdiv(K, 8)
        written_bytes = tl.where(pid_r == 0, row_bytes, 0)  # by one program a row block

    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    steps = tl.maximum(k_per_split // BLOCK_K, 1)  # a whole number by construction
    for step in range(steps):
        k = tl.cast(split, tl.int64) * steps + step
        offs_k = k * BLOCK_K + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        x = tl.load(
            x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk,
            mask=mask_m[:, None] & mask_k[None, :], other=0.0,
        )  # fmt: skip
        a = tl.load(
            a_ptr + offs_k[:, None] * stride_ak + offs_r[None, :] * stride_ar,
            mask=mask_k[:, None] & mask_r[None, :], other=0.0,
        )  # fmt: skip
        if HAS_DROPOUT:
            offs_byte = k * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
            counter = offs_m[:, None] * row_bytes + offs_byte[None, :]
            bits = keep_bits(seed, counter, threshold)
            inside = mask_m[:, None] & (offs_byte < written_bytes)[None, :]
            tl.store(keep_ptr + counter, bits.to(tl.uint8), mask=inside)
            x = tl.where(unpack_bits(bits), x, tl.zeros((BLOCK_M, BLOCK_K), x.dtype))
        acc = tl.dot(x, a, acc, input_precision=PRECISION)

    mask = mask_m[:, None] & mask_r[None, :]
    if IS_SPLIT:
        part_ptrs = parts_ptr + offs_m[:, None] * R + offs_r[None, :]
        part_size = tl.cast(M, tl.int64) * R
        tl.store(part_ptrs + split * part_size, acc, mask=mask)
        last = last_to_arrive(arrivals_ptr + pid, splits)
        acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for i in range(0, tl.where(last, splits, 0), 4):
            for j in tl.static_range(4):  # four loads on their way at a time
                k = tl.cast(i, tl.int64) + j
                there = (offs_m * 0 + k < splits)[:, None]  # a block: the interpreter takes no scalar in a mask
                part = tl.load(part_ptrs + k * part_size, mask=mask & there, other=0.0, cache_modifier=".cg")
                acc += part
        mask = (offs_m < tl.where(last, M, 0))[:, None] & mask_r[None, :]  # the others have nothing more to store
    s = (acc * tl.cast(alpha, tl.float32)).to(s_ptr.dtype.element_ty)
    tl.store(s_ptr + offs_m[:, None] * stride_sm + offs_r[None, :], s, mask=mask)


def draw_noise(x: Tensor) -> Tensor:
    """Draw what decides a mask for x: a seed, int64, one element."""
    return draw_seed(x.device)


def outputs(x: Tensor, rank: int, dropout_p: float) -> tuple[Tensor, Tensor | None]:
    """Allocate what `shrink` returns: s `[M, R]`, and with dropout the packed mask `[M, ceil(K/8)]`."""
    rows, inner = x.shape
    keep = torch.empty(rows, -(-inner // 8), dtype=torch.uint8, device=x.device) if dropout_p > 0 else None
    return thin_rows(x, rank), keep


def shrink(
    x: Tensor, a: Tensor, alpha: float, dropout_p: float = 0.0, config: ShrinkConfig | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Compute s `[M, R]`; with `dropout_p` > 0 draw a seed and return the packed mask `[M, ceil(K/8)]` as well.

    With `noise`, a seed from an earlier `draw_noise(x)`, nothing is drawn: a pure function.
    """
    blocks, splits, launch = _settle(
        facts(x), facts(a), x.device, dropout_p > 0, threshold(dropout_p), precision(x), config, _launch.imagined
    )
    rows, rank = x.shape[0], a.shape[0]
    s, keep = outputs(x, rank, dropout_p)
    seed = draw_noise(x) if keep is not None and noise is None else noise
    parts = x.new_empty(splits, rows, rank, dtype=torch.float32) if splits > 1 else None
    with on_device(x):
        launch(x, a, s, parts, arrivals(x.device, blocks) if splits > 1 else None, keep, seed, alpha)
    return s, keep


@functools.lru_cache(maxsize=4096)
def _settle(
    x: Facts, a: Facts, device: torch.device, dropout: bool, least: int, precision: str, config: ShrinkConfig | None,
    imagined: object,
) -> tuple[int, int, Launch]:  # fmt: skip
    """The blocks of s, the splits of K, and the launch."""
    (rows, inner), rank = x.shape, a.shape[0]
    shared = _launch.shared_per_sm(device)
    config = config or shrink_config(rows, inner, rank, x.dtype, dropout, 1 not in x.strides, shared)
    blocks = triton.cdiv(rows, config.block_m) * triton.cdiv(rank, config.block_r)
    splits = triton.cdiv(inner, config.k_per_split)
    stride_sm = _launch.thin_pitch(rank, x.dtype)
    return blocks, splits, Launch(
        _shrink_kernel, (blocks, splits),
        (least, rows, inner, rank, config.k_per_split, *x.strides, *a.strides, stride_sm),
        dict(
            HAS_DROPOUT=dropout, IS_SPLIT=splits > 1, PDL=_launch.dependent_launch(device), PRECISION=precision,
            BLOCK_M=config.block_m, BLOCK_K=config.block_k, BLOCK_R=config.block_r,
        ),
        dict(num_warps=config.num_warps, num_stages=config.num_stages, **_launch.launch_options(False)),
    )  # fmt: skip
