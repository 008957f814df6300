"""Wgrad: contract two tall operands over their rows, deterministically, and shrink the wide operand on the way.

    g[c, d] = Σₘ left[m, c] · keep[m, d] right[m, d]       for one left operand of right, or several
    ds[m, t] = alpha · Σ_w wide[m, w] b[w, t]              on request, from the same read of the wide operand

    left   [M, C]          any strides   bf16, fp16 or fp32
    right  [M, D]          any strides   dtype of left
    keep   [M, ceil(D/32)]  bit-packed, int32, as `shrink` writes it, or none
    g      [C, D]          contiguous, in the requested dtype, straight from the fp32 sums; or an existing gradient, any
                           strides, to which the sums are added
    b      [W, T]          any strides   dtype of left, or fp32: rounded to it as it is read; W and T are the widths of
                                         the wide and of the thin operand
    ds     [M, T]          rows padded to 16 bytes, dtype of left

    gradient   left         right          g                 shrinks
    dA         ds [M, r]    x [M, in]      [r, in]           -                        keep: the mask of the forward pass
    dB         dy [M, out]  s [M, r]       [out, r]          ds = alpha · dy B [M, r]
    dAᵢ        dsᵢ [M, rᵢ]  x [M, in]      [rᵢ, in] each     -                        keepᵢ: one read of x for all
    MLP        as dA of h, as dB and ds of dg and du: one read of g, u and dh

Inside an MLP the kernel makes the wide operands on the way: h = a(g) · u, du = dh · a(g) and dg = dh · u · a'(g) from
tiles of g, u and dh [M, W]. dg and du are stored, h is not.

Either side may be the wide one. The wide side goes into the rows of the dot, because tiles of 64 rows and more use the
fast tensor-core instructions. The output's strides carry the transpose.

Rows may come in groups (`segments`), each with a sum of its own: g is then a stack `[G, C, D]`, and so is b. A program
walks up to `rows_per_split` rows of one group, so a group's rows alone decide the order of its sum. A group without
rows gets zeros.

The rows and the wide columns are split among programs, so both results come in fp32 parts, in buffers of their own. The
last program to finish a result adds its parts. The order of the sum is fixed, so the same inputs give the same bits
whichever program is last, and no second launch is needed.

On sm_90 and later the launch is a programmatic dependent launch. Where the launch before it is the dx that needs the
same ds, its programs read x while the last tiles of dx still run on the other multiprocessors.

Cost: reads the wide operand once (thin sides <= 64), M·W·itemsize bytes, + 8·W·T bytes a split and, with ds, + 8·M·T
bytes a block of wide columns, written and read back, most of it from L2; 2·M·W·T FLOPs for g and as many for ds.

Sources: Hu et al. 2021, arXiv:2106.09685. Both gradients from one read of dy: Zhu et al., LoRAFusion,
arXiv:2510.00206 (idea; there by atomic adds). The last adds up: CUDA's threadFenceReduction (idea). No code was taken.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.kernels import _launch
from lora_kernels.kernels._activation import Activation, activation_gradient
from lora_kernels.kernels._device import group_part, kept, last_to_arrive, load_kept, sum_of_parts
from lora_kernels.kernels._launch import Facts, Launch, Slot, allocator, facts, new_facts, new_rows, precision
from lora_kernels.kernels._wgrad_config import WgradCase, WgradConfig, wgrad_config
from lora_kernels.kernels._wgrad_settled import DGATE, DUP, NO_ACTIVATION, H, SettledWgrad, ThinProduct
from lora_kernels.kernels.segments import Segments, place

__all__ = ["DGATE", "DUP", "H", "SettledWgrad", "ThinProduct", "settle", "wgrad", "wgrad_all"]


@triton.jit
def _wgrad_kernel(
    wide_ptr, up_ptr, dh_ptr, dgate_ptr, dup_ptr, thin_ptrs, keep_ptrs, b_ptrs, g_ptrs, g_parts_ptr, ds_ptrs,
    ds_parts_ptr, arrivals_ptr, table_ptr,
    alphas,
    M, W, Ts, rows_per_split,
    stride_wm, stride_ww, stride_um, stride_uw, stride_hm, stride_hw,
    strides_tm, strides_tt, strides_bw, strides_bt, strides_gw, strides_gt, strides_dsm,
    strides_bg, strides_gg, map_start, groups,
    ROWS: tl.constexpr, WIDE: tl.constexpr, ACTIVATION: tl.constexpr, HAS_KEEP: tl.constexpr, HAS_SHRINK: tl.constexpr,
    IS_SPLIT: tl.constexpr, ACCUMULATE: tl.constexpr, PDL: tl.constexpr, READY: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_T: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_W by BLOCK_T elements of one split's part of every g in each program, in a walk over its rows."""
    # HAS_KEEP says whether any product has a mask; `inspect` cannot read that from the tuple `keep_ptrs`.
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    pid, tiles = tl.program_id(0), tl.num_programs(0)
    split, splits = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    widest, thinness = 1, 0
    for i in tl.static_range(ROWS):
        widest = tl.maximum(widest, Ts[i])
        thinness += Ts[i]
    num_t = tl.cdiv(widest, BLOCK_T)
    block, pid_t = (pid // num_t).to(tl.int64), pid % num_t
    offs_w = block * BLOCK_W + tl.arange(0, BLOCK_W)
    offs_t = pid_t.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_w = offs_w < W
    end, columns, tile_bs, tile_gs = M, W, b_ptrs, g_ptrs
    if GROUPED:
        # The rows of this program, and which of how many parts of its group's sum it makes.
        group, first, end, nth, num_parts = group_part(table_ptr, map_start, split, splits, rows_per_split, groups)
        # An entry of no group has no columns here.
        columns = tl.where(num_parts > 0, W, 0)
        mask_w = offs_w < columns
        tile_bs, tile_gs = (), ()
        for i in tl.static_range(ROWS):
            tile_gs = tile_gs + (g_ptrs[i] + group * strides_gg[i],)
            if b_ptrs[i] is not None:
                tile_bs = tile_bs + (b_ptrs[i] + group * strides_bg[i],)
            else:
                tile_bs = tile_bs + (0,)
    if HAS_SHRINK:
        bs = ()
        for i in tl.static_range(ROWS):
            if b_ptrs[i] is not None:
                b = tl.load(
                    tile_bs[i] + offs_w[:, None] * strides_bw[i] + offs_t[None, :] * strides_bt[i],
                    mask=mask_w[:, None] & (offs_t < Ts[i])[None, :], other=0.0,
                )  # fmt: skip
                bs = bs + (b.to(wide_ptr.dtype.element_ty),)
            else:
                bs = bs + (0,)

    accs = ()
    for _ in tl.static_range(ROWS):
        accs = accs + (tl.zeros((BLOCK_W, BLOCK_T), tl.float32),)
    # `rows_per_split` is a multiple of BLOCK_M by construction.
    steps = tl.maximum(rows_per_split // BLOCK_M, 1)
    if GROUPED:
        steps = tl.maximum(tl.cdiv(end - first, BLOCK_M), 1)
    for step in range(steps):
        begin = first if GROUPED else split * rows_per_split
        offs_m = begin + tl.cast(step, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < end
        wide = tl.load(
            wide_ptr + offs_m[:, None] * stride_wm + offs_w[None, :] * stride_ww,
            mask=mask_m[:, None] & mask_w[None, :], other=0.0,
        )  # fmt: skip
        # All products of a tile must take it from registers, or all from shared memory (docs/traps.md). The select puts
        # the tile in registers, because one of the two products in TF32 turns the tile there.
        if HAS_SHRINK and PRECISION == "tf32" and ACTIVATION is None:
            wide = tl.where(mask_m[:, None], wide, tl.zeros((BLOCK_M, BLOCK_W), wide.dtype))
        wides = (wide,)
        if ACTIVATION is not None:
            mask = mask_m[:, None] & mask_w[None, :]
            up = None
            if up_ptr is not None:
                up = tl.load(up_ptr + offs_m[:, None] * stride_um + offs_w[None, :] * stride_uw, mask=mask, other=0.0)
            dh = tl.load(dh_ptr + offs_m[:, None] * stride_hm + offs_w[None, :] * stride_hw, mask=mask, other=0.0)
            # The select among rows keeps Triton from computing the activation again for each layout of a dot.
            wide = tl.where(mask_m[:, None], wide, tl.zeros((BLOCK_M, BLOCK_W), wide.dtype))
            wides = activation_gradient(wide, up, dh, ACTIVATION)
            here = offs_m[:, None] * W + offs_w[None, :]
            # Only the program of the first thin columns stores dg and du.
            mask = mask_m[:, None] & (offs_w < tl.where(pid_t == 0, W, 0))[None, :]
            tl.store(dgate_ptr + here, wides[1], mask=mask)
            if up_ptr is not None:
                tl.store(dup_ptr + here, wides[2], mask=mask)
        sums, before = (), 0
        for i in tl.static_range(ROWS):
            thin = tl.load(
                thin_ptrs[i] + offs_m[:, None] * strides_tm[i] + offs_t[None, :] * strides_tt[i],
                mask=mask_m[:, None] & (offs_t < Ts[i])[None, :], other=0.0,
            )  # fmt: skip
            right = wides[WIDE[i]]
            if keep_ptrs[i] is not None:
                words = load_kept(keep_ptrs[i], offs_m, M, block * BLOCK_W, W, BLOCK_W)
                right = tl.where(kept(words, BLOCK_W), right, tl.zeros((BLOCK_M, BLOCK_W), right.dtype))
            sums = sums + (tl.dot(tl.trans(right), thin, accs[i], input_precision=PRECISION),)
            if b_ptrs[i] is not None:
                part = tl.dot(wides[WIDE[i]], bs[i], input_precision=PRECISION)
                ds_parts = ds_parts_ptr + tl.cast(before, tl.int64) * M * (tiles // num_t)
                ds_part_ptrs = ds_parts + (block * M + offs_m)[:, None] * Ts[i] + offs_t[None, :]
                tl.store(ds_part_ptrs, part, mask=mask_m[:, None] & (offs_t < Ts[i])[None, :])
                before += Ts[i]
        accs = sums

    if READY:
        # Nothing read so far is written by the launch before. That launch may still read memory that is written below.
        tl.extra.cuda.gdc_wait()
    part_size = tl.cast(W, tl.int64) * thinness
    # Number of parts in flight at a time.
    AT_ONCE: tl.constexpr = 4 if BLOCK_W * BLOCK_T <= 4096 else 1
    if IS_SPLIT:
        before = 0
        for i in tl.static_range(ROWS):
            g_part_ptrs = g_parts_ptr + tl.cast(W, tl.int64) * before + offs_w[:, None] * Ts[i] + offs_t[None, :]
            mask_g = mask_w[:, None] & (offs_t < Ts[i])[None, :]
            if GROUPED:
                # A group with one part needs no sum.
                mask_g = (offs_w < tl.where(num_parts > 1, W, 0))[:, None] & (offs_t < Ts[i])[None, :]
            tl.store(g_part_ptrs + split * part_size, accs[i], mask=mask_g)
            before += Ts[i]
        if GROUPED:
            counter_ptr = arrivals_ptr + tl.cast(pid, tl.int64) * splits + split - nth
            last = last_to_arrive(counter_ptr, tl.maximum(num_parts, 1))
        else:
            last = last_to_arrive(arrivals_ptr + pid, splits)
    before = 0
    for i in tl.static_range(ROWS):
        acc = accs[i]
        mask_g = mask_w[:, None] & (offs_t < Ts[i])[None, :]
        if IS_SPLIT:
            g_part_ptrs = g_parts_ptr + tl.cast(W, tl.int64) * before + offs_w[:, None] * Ts[i] + offs_t[None, :]
            if GROUPED:
                g_part_ptrs += (split - nth) * part_size
                total = sum_of_parts(g_part_ptrs, part_size, num_parts, last & (num_parts > 1), mask_g, AT_ONCE)
                acc = tl.where(num_parts > 1, total, acc)
            else:
                acc = sum_of_parts(g_part_ptrs, part_size, splits, last, mask_g, AT_ONCE)
            before += Ts[i]
            # Only the last program to arrive stores g.
            mask_g = (offs_w < tl.where(last, columns, 0))[:, None] & (offs_t < Ts[i])[None, :]
        g_block = tile_gs[i] + offs_w[:, None] * strides_gw[i] + offs_t[None, :] * strides_gt[i]
        if ACCUMULATE[i]:
            acc += tl.load(g_block, mask=mask_g, other=0.0).to(tl.float32)
        tl.store(g_block, acc.to(g_ptrs[i].dtype.element_ty), mask=mask_g)

    if HAS_SHRINK:
        ds_arrivals_ptr = arrivals_ptr + tiles
        if GROUPED:
            ds_arrivals_ptr = arrivals_ptr + tl.cast(tiles, tl.int64) * splits
        last = last_to_arrive(ds_arrivals_ptr + split, tiles)
        blocks, before = tiles // num_t, 0
        # Number of parts in flight at a time, because one part after the other takes too long.
        DS_AT_ONCE: tl.constexpr = 128 // BLOCK_T
        offs_t = tl.arange(0, BLOCK_T)
        for i in tl.static_range(ROWS):
            if b_ptrs[i] is not None:
                ds_parts_of_i = ds_parts_ptr + tl.cast(before, tl.int64) * M * blocks
                before += Ts[i]
                for step in range(tl.where(last, steps, 0)):
                    begin = first if GROUPED else split * rows_per_split
                    offs_m = begin + tl.cast(step, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
                    mask = (offs_m < end)[:, None] & (offs_t < Ts[i])[None, :]
                    ds = tl.zeros((BLOCK_M, BLOCK_T), tl.float32)
                    for j in range(0, blocks, DS_AT_ONCE):
                        # Add the parts one by one, because Triton 3.6 sums the first side of a tile through shared
                        # memory, in sixteen times the fewest passes, where rows of T are not known to lie on 16 bytes.
                        for ahead in tl.static_range(DS_AT_ONCE):
                            k = tl.cast(j, tl.int64) + ahead
                            part_rows = k * M + offs_m[None, :, None]
                            parts = tl.load(
                                ds_parts_of_i + part_rows * Ts[i] + offs_t[None, None, :],
                                mask=(offs_m[None, :, None] * 0 + k < blocks) & mask[None, :, :],
                                other=0.0, cache_modifier=".cg",
                            )  # fmt: skip
                            ds += tl.sum(parts, 0)
                    ds = (ds * tl.cast(alphas[i], tl.float32)).to(ds_ptrs[i].dtype.element_ty)
                    tl.store(ds_ptrs[i] + offs_m[:, None] * strides_dsm[i] + offs_t[None, :], ds, mask=mask)


def wgrad(
    left: Tensor, right: Tensor, out_dtype: torch.dtype, keep: Tensor | None = None, *,
    into: Tensor | None = None, ready: bool = False, config: WgradConfig | None = None, slot: Slot | None = None,
    segments: Segments | None = None,
) -> Tensor | None:  # fmt: skip
    """Compute g = leftᵀ (right · keep), `[C, D]`, in `out_dtype`.

    Args:
        left: `[M, C]`.
        right: `[M, D]`.
        out_dtype: Dtype of g.
        keep: Packed mask `[M, ceil(D/32)]` of `right`, or None.
        into: A tensor `[C, D]` to which g is added; the function then returns None.
        ready: Whether the launch before this one is a `matmul_expand` that writes none of `left`, `right` and `keep`,
            so that this launch may read them early.
        config: Tile to use instead of the rule's.
        slot: A place of a plan that keeps the settled launch; all its calls must have tensors of one kind.
        segments: The groups of the rows; g is then a stack `[G, C, D]`, one product for the rows of each group.
    """
    # A mask makes `right` the wide side, whatever the widths.
    right_is_wide = keep is not None or right.shape[1] >= left.shape[1]
    wide, thin = (right, left) if right_is_wide else (left, right)
    settled = (slot and slot.settled) or settle(
        slot, wide, (ThinProduct(thin, out_dtype, right_is_wide, keep, into),), ready=ready, config=config,
        segments=segments,
    )  # fmt: skip
    return settled(wide, (thin,), (keep,), (into,), (None,), (None,), (1.0,), segments=segments)[0][0]


def wgrad_all(
    rows: Sequence[tuple[Tensor, torch.dtype, Tensor | None]], right: Tensor, ready: bool = False,
    config: WgradConfig | None = None, into: Sequence[Tensor | None] | None = None, slot: Slot | None = None,
    segments: Segments | None = None,
) -> list[Tensor | None]:  # fmt: skip
    """Compute gᵢ = leftᵢᵀ (right · keepᵢ), `[Cᵢ, D]`, for several left operands, in one read of `right`.

    Args:
        rows: For each row left `[M, Cᵢ]`, the dtype of g, and the packed mask `[M, ceil(D/32)]` of `right` or None.
        right: `[M, D]`, the wide operand.
        ready: As in `wgrad`.
        config: Tile to use instead of the rule's.
        into: For each row a tensor `[Cᵢ, D]` to which its g is added, or None. The tensors must be distinct. None is
            returned for a g that was added.
        slot: As in `wgrad`.
        segments: As in `wgrad`.
    """
    nothing = (None,) * len(rows)
    intos, (lefts, dtypes, keeps) = tuple(into or nothing), zip(*rows, strict=True)
    settled = (slot and slot.settled) or settle(
        slot, right, [*map(ThinProduct, lefts, dtypes, (True,) * len(rows), keeps, intos)], ready=ready, config=config,
        segments=segments,
    )  # fmt: skip
    return settled(right, lefts, keeps, intos, nothing, nothing, (1.0,) * len(rows), segments=segments)[0]


def settle(
    slot: Slot | None, wide: Tensor, products: Sequence[ThinProduct], activation: Activation = NO_ACTIVATION,
    ready: bool = False, config: WgradConfig | None = None, segments: Segments | None = None,
) -> SettledWgrad:  # fmt: skip
    """Settle a launch for products of one wide operand, or of the operands that make it; keep the launch in the slot.

    `wide` is `[M, W]`; with `activation`, which stores dg and du on the way, it is the g of the formula, and there may
    be no products. `ready`, `config` and `segments` are as in `wgrad`; each b is then a stack `[G, W, T]`.
    """
    thins, dtypes, turned, keeps, intos, bs, dss, _, wides = tuple(zip(*products, strict=True)) or ((),) * 9
    kinds = [tuple(map(facts, ts)) for ts in (thins, intos, bs, dss, keeps)]
    made_of = facts(wide), facts(activation.up), facts(activation.dh)
    groups = segments and segments.groups
    how = activation.name, wide.device, ready, precision(wide), config, groups, _launch.imagined
    return (slot or Slot()).keep(_settle(made_of, *kinds, dtypes, turned, wides, *how))


@functools.lru_cache(maxsize=4096)
def _settle(
    made_of: tuple[Facts, Facts | None, Facts | None], thins: tuple[Facts, ...], intos: tuple[Facts | None, ...],
    bs: tuple[Facts | None, ...], dss: tuple[Facts | None, ...], keeps: tuple[Facts | None, ...],
    dtypes: tuple[torch.dtype, ...], turned: tuple[bool, ...], wides: tuple[int, ...], activation: str | None,
    device: torch.device, ready: bool, precision: str, config: WgradConfig | None, groups: int | None,
    imagined: object,
) -> SettledWgrad:  # fmt: skip
    (rows, width), _, dtype, _ = made_of[0]
    pitches_b = None
    if groups:
        bs, pitches_b = tuple(b and b.matrix() for b in bs), tuple(b.strides[0] if b else 0 for b in bs)
    widths, shrunk = [thin.shape[1] for thin in thins], [b.shape[1] for b in bs if b is not None]
    if ready and (shrunk or activation):
        raise ValueError(
            "wgrad: ready must be False, because this launch makes ds, dg or du before it waits; pass ready=False."
        )
    strided = all(1 not in t.strides for t in made_of if t) or any(1 not in b.strides for b in bs if b)
    if config is None:
        config = wgrad_config(WgradCase(
            rows, width, max(widths, default=1), dtype, shrinks=bool(shrunk), adapters=len(widths), masked=any(keeps),
            mixed=any(keeps) and not all(keeps), activated=activation is not None, strided=strided,
            unaligned=not strided and any(t.by_element() for t in made_of if t),
            rounds=any(b.dtype != dtype for b in bs if b), tf32=precision == "tf32",
            shared=_launch.shared_per_sm(device), num_sms=_launch.num_sms(device), groups=groups or 0,
        ))  # fmt: skip
    start, splits = None, triton.cdiv(rows, config.rows_per_split)
    is_split = splits > 1
    if groups:
        start, splits = place(rows, groups, config.rows_per_split)
    blocks = triton.cdiv(width, config.block_c)
    tiles = blocks * triton.cdiv(max(widths, default=1), config.block_r)
    dependent = _launch.dependent_launch(device)
    ready = ready and dependent
    new_dss = [b and not ds and new_rows((rows, b.shape[1]), dtype, device) for b, ds in zip(bs, dss, strict=True)]
    pitch = functools.partial(_launch.thin_pitch, dtype=dtype)
    pitches = tuple([ds.strides[0] if ds else pitch(b.shape[1]) if b else 0 for b, ds in zip(bs, dss, strict=True)])
    gs = []
    for columns, into, g_dtype, flip in zip(widths, intos, dtypes, turned, strict=True):
        shape = (columns, width) if flip else (width, columns)
        g = into or new_facts(shape, g_dtype)
        new = None if into else allocator((groups, *shape) if groups else shape, g_dtype, device)
        gs.append((new, g.t() if flip else g))
    launch = Launch(
        _wgrad_kernel, (tiles, splits),
        (
            rows, width, tuple(widths) or None, config.rows_per_split,
            *(stride for t in made_of for stride in (t.strides if t else (0, 0))),
            *_strides(thins), *_strides(bs), *_strides([g for _, g in gs]), pitches or None,
            pitches_b, tuple(width * n for n in widths) if groups else None, start, groups,
        ),
        dict(
            ROWS=len(thins), WIDE=wides or None, ACTIVATION=activation, HAS_KEEP=any(keeps), HAS_SHRINK=bool(shrunk),
            IS_SPLIT=is_split and bool(thins), ACCUMULATE=tuple(into is not None for into in intos) or None,
            PDL=(bool(shrunk) or activation is not None) and dependent, READY=ready, PRECISION=precision,
            BLOCK_M=config.block_m, BLOCK_W=config.block_c, BLOCK_T=config.block_r, GROUPED=groups is not None,
        ),
        dict(num_warps=config.num_warps, num_stages=config.num_stages, **_launch.launch_options(ready)), device,
    )  # fmt: skip
    sizes = splits * width * sum(widths) if is_split else 0, blocks * rows * sum(shrunk)
    # Of groups, each part has a counter, and a group uses that of its first part.
    counted = tiles * (splits if groups else 1) + splits
    new_parts = [allocator((size,), torch.float32, device) if size else None for size in sizes]
    return SettledWgrad(launch, [new for new, _ in gs], new_dss, *new_parts, counted if any(sizes) else 0)


def _strides(operands: Sequence[Facts | None]) -> tuple[tuple[int, ...] | None, ...]:
    """Return the row strides and the column strides of several operands, 0 for a missing operand."""
    return tuple(zip(*(t.strides if t else (0, 0) for t in operands), strict=True)) or (None, None)
