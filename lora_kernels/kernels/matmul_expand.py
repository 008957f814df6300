"""Matmul-expand: a sum of products in one accumulator.

    y[m, n] = Σᵢ Σₖ pᵢ[m, k] qᵢ[n, k] + bias[n]

    pᵢ     [M, Kᵢ]         any strides   bf16, fp16 or fp32
    qᵢ     [N, Kᵢ]         any strides   dtype of p
    bias   [N]             any stride    any of the dtypes, or none
    keep   [M, ceil(N/8)]  bit-packed: masks the last product before it is added, or none
    y      [M, N]          contiguous    dtype of p, rounded once

The K loop walks a short list of sources; nothing is concatenated and no product but the last, masked one has an
accumulator of its own.

    pass       sources                        keep
    forward    (x, W [out, in]), (s, B)       -           y  = x Wᵀ + s Bᵀ + bias
    backward   (dy, Wᵀ), (ds, Aᵀ)             the mask    dx = dy W + keep · (ds A)

Two ways to load a tile, one kernel: pointers with masks take anything; where every operand is 16-bit, aligned to 16
bytes and the GPU is sm_90 or later, TMA descriptors do the addressing and the bounds. Which source a K step belongs
to is a select between two addresses in either case, so the loop stays one software pipeline.

On sm_90 and later the launch is a programmatic dependent one: its programs are brought up while the shrink before it
still runs, and wait for its end before they touch anything.

Cost: 2·M·N·ΣKᵢ FLOPs; at the least (ΣKᵢ·(M + N) + M·N)·itemsize bytes. A source costs whole K steps: ceil(Kᵢ /
BLOCK_K), one for any r <= BLOCK_K.

Sources: Hu et al. 2021, arXiv:2106.09685. Grouped tile order: Triton's matrix multiplication tutorial (idea).
Summing the low-rank product in the accumulator of the base product: Zhu et al., LoRAFusion, arXiv:2510.00206 (idea;
there the product comes before the loop). Dependent launch: CUDA C++ Programming Guide,
programmatic dependent launch. No code was taken.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lora_kernels.kernels import _launch
from lora_kernels.kernels._configs import MatmulConfig, descriptor_path, matmul_config
from lora_kernels.kernels._device import halves, tile_position, unpack_bits
from lora_kernels.kernels._launch import Facts, Launch, facts, on_device, precision, thin_rows

__all__ = ["matmul_expand"]

Source = tuple[Tensor, Tensor]
MAX_SOURCES = 4  # what the kernel's signature holds, beside a masked one


@triton.jit
def _matmul_expand_kernel(
    p0, p1, p2, p3, q0, q1, q2, q3, y, masked_p, masked_q, bias_ptr, keep_ptr,
    M, N, Ks, masked_K,
    strides_pm, strides_pk, strides_qn, strides_qk,
    stride_ym, stride_mpm, stride_mpk, stride_mqn, stride_mqk, stride_bias,
    NUM_SOURCES: tl.constexpr, USE_TMA: tl.constexpr, Q_ROWS_ARE_N: tl.constexpr, STORE_TMA: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_KEEP: tl.constexpr, PDL: tl.constexpr, PRECISION: tl.constexpr, SUBTILES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """Each program walks tiles of y, and for each tile the K steps of every source in turn."""
    if PDL:
        tl.extra.cuda.gdc_wait()  # brought up while the shrink before it was running; its s is there from here on
        tl.extra.cuda.gdc_launch_dependents()  # and not sooner: whoever comes up next may rely on that s as well
    # arguments of their own, because Triton 3.6 cannot launch with descriptors inside a tuple
    ps, qs = (p0, p1, p2, p3), (q0, q1, q2, q3)
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    steps = 0
    for i in tl.static_range(NUM_SOURCES):
        steps += tl.cdiv(Ks[i], BLOCK_K)
    steps = tl.maximum(steps, 1)  # Triton 3.6 serialises wgmma over a trip count that might be 0

    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=False):
        pid_m, pid_n = tile_position(tile, num_m, num_n, GROUP_M)
        m0, n0 = pid_m * BLOCK_M, pid_n * BLOCK_N
        # 64-bit before any stride: tensors may span more than 2^31 elements
        offs_m = tl.cast(m0, tl.int64) + tl.arange(0, BLOCK_M)
        offs_n = tl.cast(n0, tl.int64) + tl.arange(0, BLOCK_N)

        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if NUM_SOURCES > 0:  # none where a library adds the others
            for step in range(steps):
                p, q, k0, K = ps[0], qs[0], step * BLOCK_K, Ks[0]
                stride_pm, stride_pk, stride_qn, stride_qk = strides_pm[0], strides_pk[0], strides_qn[0], strides_qk[0]
                first = tl.cdiv(Ks[0], BLOCK_K)
                for i in tl.static_range(1, NUM_SOURCES):
                    if step >= first:
                        p = ps[i]
                        q = qs[i]
                    k0 = tl.where(step >= first, (step - first) * BLOCK_K, k0)
                    K = tl.where(step >= first, Ks[i], K)
                    stride_pm = tl.where(step >= first, strides_pm[i], stride_pm)
                    stride_pk = tl.where(step >= first, strides_pk[i], stride_pk)
                    stride_qn = tl.where(step >= first, strides_qn[i], stride_qn)
                    stride_qk = tl.where(step >= first, strides_qk[i], stride_qk)
                    first += tl.cdiv(Ks[i], BLOCK_K)
                if USE_TMA:
                    p_tile = p.load([m0, k0])
                    if Q_ROWS_ARE_N:
                        q_tile = q.load([n0, k0]).T
                    else:
                        q_tile = q.load([k0, n0])
                else:
                    offs_k = tl.cast(k0, tl.int64) + tl.arange(0, BLOCK_K)
                    p_tile = _load(p, offs_m[:, None], M, stride_pm, offs_k[None, :], K, stride_pk)
                    q_tile = _load(q, offs_k[:, None], K, stride_qk, offs_n[None, :], N, stride_qn)
                acc = tl.dot(p_tile, q_tile, acc, input_precision=PRECISION)

        # one column slice after the other: the masked product needs a second accumulator, and a whole one spills
        SLICE: tl.constexpr = BLOCK_N // SUBTILES
        if SUBTILES == 1:
            slices = (acc,)
        elif SUBTILES == 2:
            slices = halves(acc)
        else:
            left, right = halves(acc)
            slices = halves(left) + halves(right)
        for i in tl.static_range(SUBTILES):
            part = slices[i]
            offs_n = tl.cast(n0 + i * SLICE, tl.int64) + tl.arange(0, SLICE)
            if HAS_KEEP:
                product = tl.zeros((BLOCK_M, SLICE), tl.float32)
                for r in range(tl.maximum(tl.cdiv(masked_K, BLOCK_R), 1)):
                    offs_r = tl.cast(r, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
                    p_tile = _load(masked_p, offs_m[:, None], M, stride_mpm, offs_r[None, :], masked_K, stride_mpk)
                    q_tile = _load(masked_q, offs_r[:, None], masked_K, stride_mqk, offs_n[None, :], N, stride_mqn)
                    product = tl.dot(p_tile, q_tile, product, input_precision=PRECISION)
                row_bytes = tl.cdiv(N, 8)
                offs_byte = tl.cast((n0 + i * SLICE) // 8, tl.int64) + tl.arange(0, SLICE // 8)
                packed = _load(keep_ptr, offs_m[:, None], M, row_bytes, offs_byte[None, :], row_bytes, 1)
                part += tl.where(unpack_bits(packed.to(tl.int32)), product, 0.0)
            if HAS_BIAS:
                bias = tl.load(bias_ptr + offs_n * stride_bias, mask=offs_n < N, other=0.0)
                part += bias.to(tl.float32)[None, :]
            if STORE_TMA:
                y.store([m0, n0 + i * SLICE], part.to(y.dtype))
            else:
                y_ptrs = y + offs_m[:, None] * stride_ym + offs_n[None, :]
                tl.store(y_ptrs, part.to(y.dtype.element_ty), mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


@triton.jit
def _load(ptr, rows, num_rows, stride_row, cols, num_cols, stride_col):
    """Load a tile by pointers; 0 outside the tensor."""
    return tl.load(ptr + rows * stride_row + cols * stride_col, mask=(rows < num_rows) & (cols < num_cols), other=0)


def matmul_expand(
    sources: Sequence[Source], bias: Tensor | None = None, keep: Tensor | None = None,
    config: MatmulConfig | int | None = None, tma: bool | None = None,
) -> Tensor:  # fmt: skip
    """Compute y = Σᵢ pᵢ qᵢᵀ + bias, `[M, N]`, with the last product masked by `keep`.

    Args:
        sources: Pairs (p `[M, Kᵢ]`, q `[N, Kᵢ]`), the largest first; four at most, and one more if `keep` masks it,
            which may be the only one.
        bias: `[N]` or None.
        keep: Packed mask `[M, ceil(N/8)]` of the last product, or None.
        config: Tile to use in place of the rule's, or its place among `matmul_configs`.
        tma: Force descriptors on or off; by default they are used where they can be.
    """
    p, device = sources[0][0], sources[0][0].device
    settled = _settle(
        tuple((facts(p), facts(q)) for p, q in sources), facts(bias), device, keep is not None, config, tma,
        precision(p), _launch.imagined,
    )  # fmt: skip
    y = p.new_empty(p.shape[0], sources[0][1].shape[0])
    summed, masked = (sources[:-1], sources[-1]) if keep is not None else (sources, (None, None))
    ps, qs, y_arg = [p for p, _ in summed], [q for _, q in summed], y
    if settled.tma:
        m, n, k = settled.blocks
        # only thin operands ever have to be copied for a descriptor to read them
        ps = [_descriptor(_copy(p) if copy else p, m, k) for p, copy in zip(ps, settled.copy_p, strict=True)]
        if settled.q_rows_are_n:
            qs = [_descriptor(_copy(q) if copy else q, n, k) for q, copy in zip(qs, settled.copy_q, strict=True)]
        else:
            qs = [q.t() for q in qs]
            qs = [_descriptor(_copy(q) if copy else q, k, n) for q, copy in zip(qs, settled.copy_q, strict=True)]
        y_arg = _descriptor(y, m, settled.store_n) if settled.store_n else y
    absent = (None,) * (MAX_SOURCES - len(summed))
    with on_device(p):
        settled.launch(*ps, *absent, *qs, *absent, y_arg, *masked, bias, keep)
    return y


class _Settled(NamedTuple):
    """What is settled about a launch; `store_n` is the width of the slices that descriptors store, 0 for pointers."""

    launch: Launch
    tma: bool
    q_rows_are_n: bool
    copy_p: list[bool]
    copy_q: list[bool]
    blocks: tuple[int, int, int]
    store_n: int


@functools.lru_cache(maxsize=4096)
def _settle(
    sources: tuple[tuple[Facts, Facts], ...], bias: Facts | None, device: torch.device, has_keep: bool,
    config: MatmulConfig | int | None, tma: bool | None, precision: str, imagined: object,
) -> _Settled:  # fmt: skip
    (p, q), dtype = sources[0], sources[0][0].dtype
    rows, cols, sms = p.shape[0], q.shape[0], _launch.num_sms(device)
    summed, masked = (sources[:-1], sources[-1]) if has_keep else (sources, None)
    if tma is None:
        on_16_bytes = p.rows_on_16_bytes() and (q.rows_on_16_bytes() or q.t().rows_on_16_bytes())
        tma = descriptor_path(_launch.capability(device), dtype)[0] and on_16_bytes
    q_rows_are_n = q.rows_on_16_bytes()
    inner = tuple(p.shape[1] for p, _ in summed)
    if not isinstance(config, MatmulConfig):
        strided = 1 not in p.strides or 1 not in q.strides
        config = matmul_config(
            rows, sum(inner), cols, dtype, tma, has_keep, sms, precision == "tf32", place=config, strided=strided
        )
    rank = masked[0].shape[1] if masked else 0
    store_tma = tma and cols * dtype.itemsize % 16 == 0
    strides = [tuple(0 if tma else pair[side].strides[dim] for pair in summed) for side in (0, 1) for dim in (0, 1)]
    pdl = _launch.dependent_launch(device)
    tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(cols, config.block_n)
    launch = Launch(
        _matmul_expand_kernel, (min(tiles, sms * config.ctas_per_sm),),
        (
            rows, cols, inner, rank,
            *strides, cols, *((*masked[0].strides, *masked[1].strides) if masked else (0, 0, 0, 0)),
            bias.strides[0] if bias else 0,
        ),
        dict(
            NUM_SOURCES=len(summed), USE_TMA=tma, Q_ROWS_ARE_N=q_rows_are_n, STORE_TMA=store_tma,
            HAS_BIAS=bias is not None, HAS_KEEP=has_keep, PDL=pdl, PRECISION=precision, SUBTILES=config.subtiles,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
            BLOCK_R=max(16, min(32, triton.next_power_of_2(rank))), GROUP_M=config.group_m,
        ),
        dict(num_warps=config.num_warps, num_stages=config.num_stages, **_launch.launch_options(pdl)),
    )  # fmt: skip
    blocks = config.block_m, config.block_n, config.block_k
    copy_p = [not p.rows_on_16_bytes() for p, _ in summed]
    copy_q = [not (q if q_rows_are_n else q.t()).rows_on_16_bytes() for _, q in summed]
    store_n = config.block_n // config.subtiles if store_tma else 0
    return _Settled(launch, tma, q_rows_are_n, copy_p, copy_q, blocks, store_n)


def _copy(t: Tensor) -> Tensor:
    """A copy that a descriptor can read."""
    return thin_rows(t, t.shape[1]).copy_(t)


class _Address(NamedTuple):
    """As much of a tensor as a descriptor asks for; it keeps no memory alive."""

    pointer: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        """The address."""
        return self.pointer


def _descriptor(t: Tensor, block_rows: int, block_cols: int) -> TensorDescriptor:
    """Describe `t` for TMA in blocks. Descriptors of a GPU's memory are kept: Triton takes long to check new ones."""
    if t.is_cuda or _launch.imagined:
        return _describe(_Address(t.data_ptr(), t.dtype), t.shape, t.stride(), block_rows, block_cols)
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [block_rows, block_cols])


@functools.lru_cache(maxsize=4096)
def _describe(
    base: _Address, shape: tuple[int, ...], strides: tuple[int, ...], block_rows: int, block_cols: int
) -> TensorDescriptor:
    return TensorDescriptor(base, list(shape), list(strides), [block_rows, block_cols])
