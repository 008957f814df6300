"""Shrink: contract a wide operand down to the LoRA rank, with dropout on the way, for one adapter or several.

    sᵢ[m, r] = alphaᵢ · Σₖ keepᵢ[m, k] x[m, k] aᵢ[r, k]

    x      [M, K]          any strides   bf16, fp16 or fp32
    aᵢ     [Rᵢ, K]         any strides   dtype of x, or fp32: rounded to it as it is read
    sᵢ     [M, Rᵢ]         columns of one buffer, each on 16 bytes, dtype of x: rounded once, after alpha
    keepᵢ  [M, ceil(K/32)]  bit-packed, int32, written where there is dropout: the rule is in `lora_kernels.dropout`
    alphaᵢ float           multiplies the fp32 accumulator; a run-time number

One kernel serves two call sites. Only the roles differ, and strides carry the transpose.

    pass       x               a                  alpha                    s
    forward    x  [M, in]      lora_A   [r, in]   scaling · keep_scale     s  = scaling · D(x) Aᵀ
    backward   dy [M, out]     lora_Bᵀ  [r, out]  scaling · keep_scale     ds, which dx and dA mask again

Several adapters of one x (Q, K and V; gate and up) share the tile of x: x is read once, and each adapter has a mask and
a dot. x may be the result of an activation, a(g) · u: the input of an MLP's last layer. The kernel then computes x from
tiles of g and u [M, K] and stores x for later readers, and there may be no adapter at all.

Rows may come in groups (`segments`), each with an A of its own: a is then a stack `[G, R, K]`, and the rows of no group
are left as they are.

Where rows are few, K is split among programs to fill the GPU. Each program stores its part in fp32, and the last one to
finish adds the parts in a fixed order. The same inputs give the same bits.

Cost: bound by bandwidth, because x is read once for Rᵢ <= 64 (32 with four adapters or more), and otherwise once per 64
(32) of the largest. M·K·itemsize bytes, thrice that with an activation, + M·K/8 a mask, + 8·M·ΣRᵢ a split, written and
read back; 2·M·K·ΣRᵢ FLOPs. Each mask costs as much to draw as x costs to read.

Sources: Hu et al. 2021, arXiv:2106.09685, eq. 3. The name is Punica's (Chen et al. 2023, arXiv:2310.18547); packing
the mask while it is drawn follows TransformerEngine's dropout. No code was taken from either.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.dropout import draw_seed, threshold
from lora_kernels.kernels import _launch
from lora_kernels.kernels._activation import activated
from lora_kernels.kernels._configs import ShrinkConfig, shrink_config
from lora_kernels.kernels._device import group_entry, keep_bits, last_to_arrive, sum_of_parts, unpack_bits
from lora_kernels.kernels._launch import Facts, Launch, Slot, allocator, arrivals, facts, precision, thin_rows
from lora_kernels.kernels.segments import Segments, place

__all__ = ["Row", "activate_shrink", "draw_noise", "outputs", "shrink", "shrink_all"]

Row = tuple[Tensor, float, float]  # a [R, K], alpha, dropout_p


@triton.jit
def _shrink_kernel(
    x_ptr, up_ptr, h_ptr, a_ptrs, s_ptrs, parts_ptr, arrivals_ptr, keep_ptrs, seed_ptr, table_ptr,
    alphas,
    thresholds, M, K, Rs, k_per_split,
    stride_xm, stride_xk, stride_um, stride_uk, strides_ar, strides_ak, stride_sm,
    strides_ag, map_start, map_entries, groups,
    ROWS: tl.constexpr, ACTIVATION: tl.constexpr, HAS_DROPOUT: tl.constexpr, IS_SPLIT: tl.constexpr, PDL: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_M rows by BLOCK_R columns of one split's part of each s in each program, in one walk over its K."""
    if PDL:
        # The next launch may start while this one runs, because it waits before it reads s.
        tl.extra.cuda.gdc_launch_dependents()
    pid, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    widest, ranks = 1, 0
    for i in tl.static_range(ROWS):
        widest = tl.maximum(widest, Rs[i])
        ranks += Rs[i]
    num_r = tl.cdiv(widest, BLOCK_R)
    pid_r = pid % num_r
    # Offsets are 64-bit before any stride, because tensors may span more than 2^31 elements.
    offs_m = (pid // num_r).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = pid_r.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    end, tile_as = M, a_ptrs
    if GROUPED:
        group, first, end = group_entry(table_ptr + map_start, pid // num_r, map_entries)
        # An entry of no group has no rows here.
        end = tl.where((group >= 0) & (group < groups), end, 0)
        offs_m = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_M)
        tile_as = ()
        for i in tl.static_range(ROWS):
            tile_as = tile_as + (a_ptrs[i] + tl.where(end > 0, tl.cast(group, tl.int64), 0) * strides_ag[i],)
    mask_m = offs_m < end
    if HAS_DROPOUT:
        # The bytes of whole words. The formula hides the factor 4 from Triton, which would shuffle bytes to store four.
        row_bytes = (K + 31) // 8 & ~3

    accs, seeds, drawn = (), (), 0
    for i in tl.static_range(ROWS):
        accs = accs + (tl.zeros((BLOCK_M, BLOCK_R), tl.float32),)
        if keep_ptrs[i] is not None:
            seeds = seeds + (tl.load(seed_ptr + drawn),)
            drawn += 1
        else:
            seeds = seeds + (0,)
    # `k_per_split` is a multiple of BLOCK_K by construction.
    steps = tl.maximum(k_per_split // BLOCK_K, 1)
    if GROUPED:
        steps = tl.where(end > 0, steps, 1)
    for step in range(steps):
        k = tl.cast(split, tl.int64) * steps + step
        offs_k = k * BLOCK_K + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        x = tl.load(
            x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk,
            mask=mask_m[:, None] & mask_k[None, :], other=0.0,
        )  # fmt: skip
        if ACTIVATION is not None:
            up = None
            if up_ptr is not None:
                up_ptrs = up_ptr + offs_m[:, None] * stride_um + offs_k[None, :] * stride_uk
                up = tl.load(up_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            # The select among rows keeps Triton from computing the activation again in the layout of the dot.
            x = tl.where(mask_m[:, None], x, tl.zeros((BLOCK_M, BLOCK_K), x.dtype))
            x = activated(x, up, ACTIVATION)
            inside = mask_m[:, None] & (offs_k < tl.where(pid_r == 0, K, 0))[None, :]
            tl.store(h_ptr + offs_m[:, None] * K + offs_k[None, :], x, mask=inside)
        sums = ()
        for i in tl.static_range(ROWS):
            kept = x
            if keep_ptrs[i] is not None:
                offs_byte = k * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
                counter = offs_m[:, None] * row_bytes + offs_byte[None, :]
                bits = keep_bits(seeds[i], counter, thresholds[i])
                # Only the program of the first columns of s stores the mask.
                inside = mask_m[:, None] & (8 * offs_byte < tl.where(pid_r == 0, K, 0))[None, :]
                tl.store(keep_ptrs[i].to(tl.pointer_type(tl.uint8)) + counter, bits.to(tl.uint8), mask=inside)
                kept = tl.where(unpack_bits(bits), x, tl.zeros((BLOCK_M, BLOCK_K), x.dtype))
            a = tl.load(
                tile_as[i] + offs_k[:, None] * strides_ak[i] + offs_r[None, :] * strides_ar[i],
                mask=mask_k[:, None] & (offs_r < Rs[i])[None, :], other=0.0,
            ).to(x.dtype)  # fmt: skip
            sums = sums + (tl.dot(kept, a, accs[i], input_precision=PRECISION),)
        accs = sums

    part_size = tl.cast(M, tl.int64) * ranks
    if IS_SPLIT:
        before = 0
        for i in tl.static_range(ROWS):
            part_ptrs = parts_ptr + tl.cast(M, tl.int64) * before + offs_m[:, None] * Rs[i] + offs_r[None, :]
            tl.store(part_ptrs + split * part_size, accs[i], mask=mask_m[:, None] & (offs_r < Rs[i])[None, :])
            before += Rs[i]
        last = last_to_arrive(arrivals_ptr + pid, splits)
        # Only the last program to arrive stores s.
        mask_m = offs_m < tl.where(last, end, 0)
    before = 0
    for i in tl.static_range(ROWS):
        acc = accs[i]
        mask = mask_m[:, None] & (offs_r < Rs[i])[None, :]
        if IS_SPLIT:
            part_ptrs = parts_ptr + tl.cast(M, tl.int64) * before + offs_m[:, None] * Rs[i] + offs_r[None, :]
            acc = sum_of_parts(part_ptrs, part_size, splits, last, mask, 4)
            before += Rs[i]
        s = (acc * tl.cast(alphas[i], tl.float32)).to(s_ptrs[i].dtype.element_ty)
        tl.store(s_ptrs[i] + offs_m[:, None] * stride_sm + offs_r[None, :], s, mask=mask)


def draw_noise(x: Tensor, count: int = 1) -> Tensor:
    """Draw the seeds of `count` masks for x, int64."""
    return draw_seed(x.device, count)


def outputs(x: Tensor, rank: int, dropout_p: float) -> tuple[Tensor, Tensor | None]:
    """Allocate the results of `shrink`: s `[M, R]`, and with dropout the packed mask `[M, ceil(K/32)]`."""
    # Do not use `_new_mask`, because its branch would force a compiler to decide a symbolic size.
    keep = x.new_empty(x.shape[0], -(-x.shape[1] // 32), dtype=torch.int32) if dropout_p > 0 else None
    return thin_rows(x, rank), keep


def shrink(
    x: Tensor, a: Tensor, alpha: float, dropout_p: float = 0.0, config: ShrinkConfig | None = None,
    noise: Tensor | None = None, slot: Slot | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Compute s `[M, R]`; with `dropout_p` > 0 draw a seed and return the packed mask `[M, ceil(K/32)]` as well.

    With `noise`, a seed from an earlier `draw_noise(x)`, the function draws nothing and is pure. A `slot` of a plan
    keeps the settled launch; all its calls must have tensors of one kind and the same `dropout_p`.
    """
    settled = _settled_launch(slot, x, (a,), (dropout_p,), config, noise)
    (s,), (keep,) = settled(x, (a,), (alpha,), noise)
    return s, keep


def shrink_all(
    x: Tensor, rows: Sequence[Row], config: ShrinkConfig | None = None, noise: Tensor | None = None,
    slot: Slot | None = None, segments: Segments | None = None,
) -> tuple[list[Tensor], list[Tensor | None]]:  # fmt: skip
    """Compute `shrink` for several adapters of one x, in one read of x.

    Args:
        x: `[M, K]`.
        rows: For each adapter a `[Rᵢ, K]`, alpha and the probability of dropping an element of x.
        config: Tile to use instead of the rule's.
        noise: Seeds from an earlier `draw_noise(x, count)`, one for each row with dropout; None to draw them here.
        slot: As in `shrink`.
        segments: The groups of the rows; each a is then a stack `[G, Rᵢ, K]`, there is no dropout, and the rows of no
            group stay as they are allocated.

    Returns:
        Each s `[M, Rᵢ]`, side by side in one buffer, and each packed mask `[M, ceil(K/32)]`, None without dropout.
    """
    operands, alphas, ps = zip(*rows, strict=True)
    settled = _settled_launch(slot, x, operands, ps, config, noise, segments=segments)
    return settled(x, operands, alphas, noise, segments=segments)


def activate_shrink(
    gate: Tensor, up: Tensor | None, activation: str, rows: Sequence[Row],
    config: ShrinkConfig | None = None, noise: Tensor | None = None, slot: Slot | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:  # fmt: skip
    """Compute h = a(gate) · up, `[M, K]`, and `shrink_all` of h on the way.

    Args:
        gate: `[M, K]`.
        up: `[M, K]`, or None for h = a(gate).
        activation: "silu", "gelu", "gelu_tanh" or "relu2".
        rows: As in `shrink_all`; there may be none.
        config: As in `shrink_all`.
        noise: As in `shrink_all`.
        slot: As in `shrink`.

    Returns:
        h, and the results of `shrink_all`.
    """
    h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    operands, alphas, ps = zip(*rows, strict=True) if rows else ((), (), ())
    settled = _settled_launch(slot, gate, operands, ps, config, noise, activation, up)
    return h, *settled(gate, operands, alphas, noise, up, h)


class SettledShrink(NamedTuple):
    """A launch for tensors of one kind. A call allocates and launches.

    Attributes:
        launch: The launch.
        ranks: R of each adapter.
        pitches: Columns of each s in the buffer of all.
        new_s: Allocates the buffer.
        new_keeps: Allocates the mask of each adapter; None for an adapter without a mask.
        masks: Number of masks.
        new_parts: Allocates the parts of a split sum; None without a split.
        blocks: Number of blocks of s, each with a counter.
    """

    launch: Launch
    ranks: tuple[int, ...]
    pitches: tuple[int, ...]
    new_s: Callable[[], Tensor]
    new_keeps: tuple[Callable[[], Tensor] | None, ...]
    masks: int
    new_parts: Callable[[], Tensor] | None
    blocks: int

    def __call__(
        self, x: Tensor, operands: tuple[Tensor, ...], alphas: tuple[float, ...], noise: Tensor | None,
        up: Tensor | None = None, h: Tensor | None = None, segments: Segments | None = None,
    ) -> tuple[list[Tensor], list[Tensor | None]]:  # fmt: skip
        launch, ranks, pitches, new_s, new_keeps, masks, new_parts, blocks = self
        if not ranks:
            launch(x, up, h, *_NO_ADAPTER)
            return [], []
        s = [new_s()] if len(ranks) == 1 else [*new_s().split(pitches, 1)]
        if ranks != pitches:
            s = [part[:, :rank] for part, rank in zip(s, ranks, strict=True)]
        keeps: list[Tensor | None] = [new and new() for new in new_keeps]
        if noise is None and masks:
            noise = draw_noise(x, masks)
        parts, counters = (new_parts(), arrivals(x.device, blocks)) if new_parts else (None, None)
        table = segments and segments.table
        launch(x, up, h, operands, tuple(s), parts, counters, tuple(keeps), noise, table, alphas)
        return s, keeps


# In place of the arguments a, s, parts, arrivals, keep, seed, table and alpha.
_NO_ADAPTER = (None,) * 8


def _new_mask(rows: int, inner: int, device: torch.device) -> Callable[[], Tensor]:
    """Return a function that allocates a mask."""
    # Zero a mask with bytes of no element, so that the same noise gives the same mask to the last byte.
    if inner % 32:
        return functools.partial(torch.zeros, rows, -(-inner // 32), dtype=torch.int32, device=device)
    return allocator((rows, inner // 32), torch.int32, device)


def _settled_launch(
    slot: Slot | None, x: Tensor, operands: tuple[Tensor, ...], ps: tuple[float, ...], config: ShrinkConfig | None,
    noise: Tensor | None, activation: str | None = None, up: Tensor | None = None, segments: Segments | None = None,
) -> SettledShrink:  # fmt: skip
    """Return the launch that the slot keeps, or settle one."""
    slot = slot or Slot()
    if slot.settled is not None:
        return slot.settled
    kinds, how = (facts(x), facts(up), facts(noise), tuple(map(facts, operands))), (precision(x), activation, config)
    return slot.keep(_settle(*kinds, x.device, ps, *how, segments and segments.groups, _launch.imagined))


@functools.lru_cache(maxsize=4096)
def _settle(
    x: Facts, up: Facts | None, noise: Facts | None, operands: tuple[Facts, ...], device: torch.device,
    ps: tuple[float, ...], precision: str, activation: str | None, config: ShrinkConfig | None, groups: int | None,
    imagined: object,
) -> SettledShrink:  # fmt: skip
    if max(ps, default=0) >= 1:
        raise ValueError(f"shrink: dropout_p must be below 1 but is {max(ps)}; nothing of x would be left to read.")
    pitches_a = None
    if groups:
        operands, pitches_a = tuple(a.matrix() for a in operands), tuple(a.strides[0] for a in operands)
    (rows, inner), ranks, masks = x.shape, tuple(a.shape[0] for a in operands), sum(p > 0 for p in ps)
    widest, strided = max(ranks, default=1), any(t.by_element() for t in (x, up) if t is not None)
    config = config or shrink_config(
        rows, inner, widest, x.dtype, masks > 0, strided, _launch.shared_per_sm(device), len(ranks), bool(activation),
        max((a.dtype.itemsize for a in operands), default=0), groups or 0,
    )  # fmt: skip
    where, high = (None, None), triton.cdiv(rows, config.block_m)
    if groups:
        where = _, high = place(rows, groups, config.block_m)
    blocks = high * triton.cdiv(widest, config.block_r)
    splits = triton.cdiv(inner, config.k_per_split)
    pitches = tuple(_launch.thin_pitch(rank, x.dtype) for rank in ranks)
    launch = Launch(
        _shrink_kernel, (blocks, splits),
        (
            tuple(map(threshold, ps)) or None, rows, inner, ranks or None, config.k_per_split, *x.strides,
            *(up.strides if up else (0, 0)), *(tuple(zip(*(a.strides for a in operands), strict=True)) or (None, None)),
            sum(pitches), pitches_a, *where, groups,
        ),
        dict(
            ROWS=len(ranks), ACTIVATION=activation, HAS_DROPOUT=masks > 0, IS_SPLIT=splits > 1 and bool(ranks),
            PDL=_launch.dependent_launch(device), PRECISION=precision,
            BLOCK_M=config.block_m, BLOCK_K=config.block_k, BLOCK_R=config.block_r, GROUPED=groups is not None,
        ),
        dict(num_warps=config.num_warps, num_stages=config.num_stages, **_launch.launch_options(False)), device,
    )  # fmt: skip
    new_mask = _new_mask(rows, inner, device)
    new_parts = allocator((splits * rows * sum(ranks),), torch.float32, device) if splits > 1 and ranks else None
    return SettledShrink(
        launch, ranks, pitches, allocator((rows, sum(pitches)), x.dtype, device),
        tuple(new_mask if p > 0 else None for p in ps), masks, new_parts, blocks,
    )  # fmt: skip
