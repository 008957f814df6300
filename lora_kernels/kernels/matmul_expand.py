"""Matmul-expand: a sum of products in one accumulator, for one or several outputs over the same rows.

    y[m, n] = Σᵢ Σₖ pᵢ[m, k] qᵢ[n, k] + Σⱼ keepⱼ[m, n] Σₖ pⱼ[m, k] qⱼ[n, k] + bias[n]

    pᵢ     [M, Kᵢ]         any strides   bf16, fp16 or fp32
    qᵢ     [N, Kᵢ]         any strides   dtype of p; of a masked product also fp32, rounded to it as it is read
    bias   [N]             any stride    any of the dtypes, or none
    keepⱼ  [M, ceil(N/32)] bit-packed, int32: masks a product before it is added
    y      [M, N]          contiguous    dtype of p, rounded once

The K loop walks a short list of sources. Nothing is concatenated, and only a masked product has an accumulator of its
own. Outputs lie side by side, and each tile belongs to one output. The K steps of all sources are numbered through, and
an output owns a range of them, so a second output is one more row in a list.

    pass       sources                        masked               outputs
    forward    (x, W [out, in]), (s, B)       -                    y  = x Wᵀ + s Bᵀ + bias
    backward   (dy, Wᵀ), (ds, Aᵀ)             the last, by keep    dx = dy W + keep · (ds A)
    Q, K, V    (x, Wᵢ), (sᵢ, Bᵢ) each         -                    yᵢ = x Wᵢᵀ + sᵢ Bᵢᵀ + biasᵢ
    experts    (x, W [G, out, in]), (s, B)    -                    y_g = x_g W_gᵀ + s_g B_gᵀ + bias_g
    backward   (dyᵢ, Wᵢᵀ)…, (dsᵢ, Aᵢᵀ)…       (dsᵢ, Aᵢᵀ, keepᵢ)…   dx = Σᵢ dyᵢ Wᵢ + keepᵢ · (dsᵢ Aᵢ)

One kernel has two ways to load a tile. Pointers with masks load any operand. TMA descriptors do the addressing and the
bounds where every operand is 16-bit and aligned to 16 bytes and the GPU is sm_90 or later. Either way, a select between
two addresses picks the source of a K step, so the loop stays one software pipeline.

Rows may come in groups, each with operands of its own: every q is then a stack `[G, N, Kᵢ]`, which a descriptor reads
with the group as a coordinate. A tile belongs to one group, as the map of `segments` says. Its loads may reach the rows
of the next group, and its store is masked. Rows of no group are 0.

On sm_90 and later the launch is a programmatic dependent launch: its programs start while the shrink before it still
runs, and wait for the end of that shrink before they touch memory.

Cost: 2·M·N·ΣKᵢ FLOPs; at least (ΣKᵢ·(M + N) + M·N)·itemsize bytes, which count a shared operand of several outputs
once. A source costs whole K steps: ceil(Kᵢ / BLOCK_K), one for any r <= BLOCK_K.

Sources: Hu et al. 2021, arXiv:2106.09685. Grouped tile order: Triton's matrix multiplication tutorial (idea).
Summing the low-rank product in the accumulator of the base product: Zhu et al., LoRAFusion, arXiv:2510.00206 (idea;
there the product comes before the loop). Dependent launch: CUDA C++ Programming Guide,
programmatic dependent launch. No code was taken.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.constants import MAX_OUTPUTS
from lora_kernels.kernels import _launch
from lora_kernels.kernels._configs import MatmulConfig, descriptor_path, matmul_config
from lora_kernels.kernels._descriptors import Describe, keeps
from lora_kernels.kernels._device import group_entry, halves, kept, tile_position
from lora_kernels.kernels._launch import Facts, Launch, Slot, allocator, facts, new_facts, precision
from lora_kernels.kernels._sources import load_tile, masked_tiles, source_of
from lora_kernels.kernels.segments import Segments, place

__all__ = ["matmul_expand", "matmul_expand_all"]

Source = tuple[Tensor, Tensor]
Masked = tuple[Tensor, Tensor, Tensor]
Output = tuple[Sequence[Source], Tensor | None]
# The kernel's signature has 8 sources, not counting masked ones.
MAX_SOURCES = 8
_NONE = (None,) * MAX_SOURCES
# Use by `map` over equally many operands, because a comprehension takes twice as long.
_describe = Describe.__call__


@triton.jit
def _matmul_expand_kernel(
    p0, p1, p2, p3, p4, p5, p6, p7, q0, q1, q2, q3, q4, q5, q6, q7, y0, y1, y2, y3,
    masked_ps, masked_qs, keep_ptrs, bias_ptrs, table_ptr,
    M, Ns, Ks, masked_Ks, biased_Ns,
    strides_pm, strides_pk, strides_qn, strides_qk,
    strides_mpm, strides_mpk, strides_mqn, strides_mqk, strides_qg, map_start, map_entries, groups,
    NUM_OUTPUTS: tl.constexpr, NUM_SOURCES: tl.constexpr, NUM_MASKED: tl.constexpr, ENDS: tl.constexpr,
    USE_TMA: tl.constexpr, Q_ROWS_ARE_N: tl.constexpr, STORE_TMA: tl.constexpr,
    HAS_BIAS: tl.constexpr, PDL: tl.constexpr, PRECISION: tl.constexpr, SUBTILES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """Walk tiles of the outputs in each program, and for each tile the K steps of its output's sources in turn."""
    if PDL:
        # This program started while the shrink before it still ran. After the wait the s of that shrink is complete.
        tl.extra.cuda.gdc_wait()
        # Release the next launch only after the wait, because the next launch may read that s, too.
        tl.extra.cuda.gdc_launch_dependents()
    # p0 to p7, q0 to q7 and y0 to y3 are separate arguments, because Triton 3.6 cannot launch with descriptors inside a
    # tuple.
    ps, qs, ys = (p0, p1, p2, p3, p4, p5, p6, p7), (q0, q1, q2, q3, q4, q5, q6, q7), (y0, y1, y2, y3)
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(Ns[0], BLOCK_N)
    for o in tl.static_range(1, NUM_OUTPUTS):
        num_n += tl.cdiv(Ns[o], BLOCK_N)
    # The first K step of each source, and the number of all K steps.
    firsts, steps = (), 0
    for i in tl.static_range(NUM_SOURCES):
        firsts = firsts + (steps,)
        steps += tl.cdiv(Ks[i], BLOCK_K)
    firsts = firsts + (steps,)
    masked_firsts, masked_steps = (), 0
    for j in tl.static_range(NUM_MASKED):
        masked_firsts = masked_firsts + (masked_steps,)
        masked_steps += tl.cdiv(masked_Ks[j], BLOCK_R)

    if GROUPED:
        map_ptr = table_ptr + map_start
        num_m = tl.load(map_ptr + 3 * map_entries)

    SLICE: tl.constexpr = BLOCK_N // SUBTILES
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=False):
        pid_m, pid_n = tile_position(tile, num_m, num_n, GROUP_M)
        y, N, begin, end = ys[0], Ns[0], 0, firsts[ENDS[0]]
        if HAS_BIAS:
            bias_ptr, biased_N = bias_ptrs[0], biased_Ns[0]
        before, block_n = tl.cdiv(Ns[0], BLOCK_N), pid_n
        for o in tl.static_range(1, NUM_OUTPUTS):
            if pid_n >= before:
                y = ys[o]
            N = tl.where(pid_n >= before, Ns[o], N)
            begin = tl.where(pid_n >= before, firsts[ENDS[o - 1]], begin)
            end = tl.where(pid_n >= before, firsts[ENDS[o]], end)
            block_n = tl.where(pid_n >= before, pid_n - before, block_n)
            if HAS_BIAS:
                if pid_n >= before:
                    bias_ptr = bias_ptrs[o]
                biased_N = tl.where(pid_n >= before, biased_Ns[o], biased_N)
            before += tl.cdiv(Ns[o], BLOCK_N)
        m0, n0 = pid_m * BLOCK_M, block_n * BLOCK_N
        p_row, p_rows, y_rows, q_rows, tile_qs = m0, M, M, N, qs
        if GROUPED:
            group, m0, y_rows = group_entry(map_ptr, pid_m, map_entries)
            # Rows behind the last group are 0: one step over operands out of bounds, and no bias.
            belongs = group < groups
            end = tl.where(belongs, end, begin)
            p_row, p_rows, q_rows = tl.where(belongs, m0, M), tl.where(belongs, y_rows, 0), tl.where(belongs, N, 0)
            if not USE_TMA:
                tile_qs = ()
                for i in tl.static_range(NUM_SOURCES):
                    tile_qs = tile_qs + (qs[i] + tl.cast(group, tl.int64) * strides_qg[i],)
        # Offsets are 64-bit before any stride, because tensors may span more than 2^31 elements.
        offs_m = tl.cast(m0, tl.int64) + tl.arange(0, BLOCK_M)
        offs_n = tl.cast(n0, tl.int64) + tl.arange(0, BLOCK_N)

        # Prefetch the first masked tiles and the bias slices, so that their loads overlap the K loop.
        if NUM_MASKED > 0:
            masked = masked_tiles(
                0, n0, M, N, offs_m, masked_ps, masked_qs, keep_ptrs, masked_Ks, masked_firsts,
                strides_mpm, strides_mpk, strides_mqn, strides_mqk, NUM_MASKED, SLICE, BLOCK_R,
            )  # fmt: skip
        biases = ()
        for i in tl.static_range(SUBTILES if HAS_BIAS and not GROUPED else 0):
            cols = tl.cast(n0 + i * SLICE, tl.int64) + tl.arange(0, SLICE)
            biases = biases + (tl.load(bias_ptr + cols, mask=cols < biased_N, other=0.0),)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        # NUM_SOURCES is 0 where cuBLAS computes the base product (beta1).
        if NUM_SOURCES > 0:
            # The trip count is at least 1, because Triton 3.6 serialises wgmma over a trip count that might be 0.
            for step in range(begin, tl.maximum(end, begin + 1)):
                p, q, first, K, stride_pm, stride_pk, stride_qn, stride_qk = source_of(
                    step, firsts, ps, tile_qs, Ks, strides_pm, strides_pk, strides_qn, strides_qk, NUM_SOURCES
                )
                k0 = (step - first) * BLOCK_K
                if USE_TMA:
                    p_tile = p.load([p_row, k0])
                    if GROUPED and Q_ROWS_ARE_N:
                        q_tile = tl.reshape(q.load([group, n0, k0]), (BLOCK_N, BLOCK_K)).T
                    elif GROUPED:
                        q_tile = tl.reshape(q.load([group, k0, n0]), (BLOCK_K, BLOCK_N))
                    elif Q_ROWS_ARE_N:
                        q_tile = q.load([n0, k0]).T
                    else:
                        q_tile = q.load([k0, n0])
                else:
                    offs_k = tl.cast(k0, tl.int64) + tl.arange(0, BLOCK_K)
                    p_tile = load_tile(p, offs_m[:, None], p_rows, stride_pm, offs_k[None, :], K, stride_pk)
                    q_tile = load_tile(q, offs_k[:, None], K, stride_qk, offs_n[None, :], q_rows, stride_qn)
                acc = tl.dot(p_tile, q_tile, acc, input_precision=PRECISION)

        # Process one column slice at a time, because the second accumulator of a masked product spills at full width.
        if SUBTILES == 1:
            slices = (acc,)
        elif SUBTILES == 2:
            slices = halves(acc)
        else:
            left, right = halves(acc)
            slices = halves(left) + halves(right)
        for i in tl.static_range(SUBTILES):
            part = slices[i]
            if NUM_MASKED > 0:
                # The loop itself loads tiles one step ahead, into registers. num_stages=1 turns off Triton's pipeline
                # through shared memory.
                for step in tl.range(masked_steps, num_stages=1):
                    p_tile, q_tile, keep = masked
                    ends = step + 1 == masked_steps
                    after = n0 + tl.where(ends, i + 1, i) * SLICE
                    more = after < n0 + BLOCK_N
                    masked = masked_tiles(
                        tl.where(ends, 0, step + 1), after, tl.where(more, M, 0), N, offs_m,
                        masked_ps, masked_qs, keep_ptrs, masked_Ks, masked_firsts,
                        strides_mpm, strides_mpk, strides_mqn, strides_mqk, NUM_MASKED, SLICE, BLOCK_R,
                    )  # fmt: skip
                    product = tl.dot(p_tile, q_tile.to(p_tile.dtype), input_precision=PRECISION)
                    part += tl.where(kept(keep, SLICE), product, 0.0)
            offs_n = tl.cast(n0 + i * SLICE, tl.int64) + tl.arange(0, SLICE)
            if HAS_BIAS and GROUPED:
                # No prefetch, because the loop has no registers to spare for an address that depends on the group.
                bias_ptrs_n = bias_ptr + tl.cast(group, tl.int64) * N + offs_n
                mask_n = offs_n < tl.where(group < groups, N, 0)
                part += tl.load(bias_ptrs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
            elif HAS_BIAS:
                part += biases[i].to(tl.float32)[None, :]
            if STORE_TMA:
                y.store([m0, n0 + i * SLICE], part.to(y.dtype))
            else:
                y_ptrs = y + offs_m[:, None] * N + offs_n[None, :]
                tl.store(y_ptrs, part.to(y.dtype.element_ty), mask=(offs_m < y_rows)[:, None] & (offs_n < N)[None, :])


def matmul_expand(
    sources: Sequence[Source], bias: Tensor | None = None, keep: Tensor | None = None,
    config: MatmulConfig | int | None = None, tma: bool | None = None, slot: Slot | None = None,
) -> Tensor:  # fmt: skip
    """Compute y = Σᵢ pᵢ qᵢᵀ + bias, `[M, N]`, with the last product masked by `keep`.

    Args:
        sources: Pairs (p `[M, Kᵢ]`, q `[N, Kᵢ]`), the largest first; at most eight, plus a last one that `keep` masks.
            The masked source may be the only one.
        bias: `[N]` or None.
        keep: Packed mask `[M, ceil(N/32)]` of the last product, or None.
        config: Tile to use instead of the rule's, or its place among `matmul_configs`.
        tma: Force descriptors on or off; by default they are used wherever they can be.
        slot: A place of a plan that keeps the settled launch; all its calls must have tensors of one kind.
    """
    masked: Sequence[Masked] = ()
    if keep is not None:
        *sources, last = sources
        masked = ((*last, keep),)
    return matmul_expand_all(((sources, bias),), masked, 1, config, tma, slot)[0]


def matmul_expand_all(
    outputs: Sequence[Output], masked: Sequence[Masked] = (), wide: int = 1,
    config: MatmulConfig | int | None = None, tma: bool | None = None, slot: Slot | None = None,
    segments: Segments | None = None,
) -> list[Tensor]:  # fmt: skip
    """Compute y `[M, Nₒ]` of every output over the same rows, in one launch.

    Args:
        outputs: Sources and bias of each output; at most four outputs with at most eight sources in all.
        masked: Triples (p, q, keep): products of a single output, masked before they are added.
        wide: Number of an output's first sources that are too large to copy where no descriptor can read them.
        config: As in `matmul_expand`.
        tma: As in `matmul_expand`.
        slot: As in `matmul_expand`.
        segments: The groups of the rows, for one output without masked products; each q is then a stack `[G, N, Kᵢ]`,
            and the bias `[G, N]`.
    """
    summed, biases = zip(*outputs, strict=True)
    sources = summed[0] if len(summed) == 1 else list(itertools.chain.from_iterable(summed))
    # The masked q must have one dtype, because the kernel selects among their pointers.
    if len(masked) > 1 and len({q.dtype for _, q, _ in masked}) > 1:
        masked = [(p, q.to(p.dtype), keep) for p, q, keep in masked]
    slot = slot or Slot()
    settled = slot.settled
    if settled is None:
        like, (ps, qs) = (sources or masked)[0][0], zip(*sources, strict=True) if sources else ((), ())
        kinds = tuple(map(facts, ps)), tuple(map(facts, qs)), tuple(map(len, summed)), tuple(map(facts, biases))
        how = tuple([tuple(map(facts, product)) for product in masked]), wide, like.device, config, tma, precision(like)
        settled = slot.keep(_settle(*kinds, *how, segments and segments.groups, _launch.imagined))
    return settled(sources, biases, masked, segments)


def _bias_per_output(biases: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """Return one bias per output; a missing bias aliases another, which the kernel masks out."""
    there = [bias.contiguous() for bias in biases if bias is not None]
    if len(there) == len(biases):
        return tuple(there)
    return tuple(there[0] if bias is None else bias.contiguous() for bias in biases)


class SettledExpand(NamedTuple):
    """A launch for tensors of one kind. A call allocates, describes and launches.

    Attributes:
        launch: The launch.
        new_ys: Allocates each y.
        absent: The Nones that fill the kernel's unused arguments for sources and for outputs.
        biased: Whether there is any bias.
        tma: Whether descriptors load.
        ps: Describes each p, if descriptors load.
        qs: Describes each q, if descriptors load.
        ys: Describes each y, if descriptors store.
    """

    launch: Launch
    new_ys: list[Callable[[], Tensor]]
    absent: tuple[tuple[None, ...], tuple[None, ...]]
    biased: bool
    tma: bool
    ps: list[Describe]
    qs: list[Describe]
    ys: list[Describe]

    def __call__(
        self, sources: Sequence[Source], biases: tuple[Tensor | None, ...], masked: Sequence[Masked],
        segments: Segments | None,
    ) -> list[Tensor]:  # fmt: skip
        launch, new_ys, (absent, no_ys), biased, tma, of_ps, of_qs, of_ys = self
        y_args = ys = [new() for new in new_ys]
        ps, qs = zip(*sources, strict=True) if sources else ((), ())
        if tma:
            ps, qs = map(_describe, of_ps, ps), map(_describe, of_qs, qs)
            y_args = map(_describe, of_ys, ys) if of_ys else ys
        masked_args = zip(*masked, strict=True) if masked else _NONE[:3]
        bias_args = _bias_per_output(biases) if biased else None
        table = segments and segments.table
        launch(*ps, *absent, *qs, *absent, *y_args, *no_ys, *masked_args, bias_args, table)
        return ys


@functools.lru_cache(maxsize=4096)
def _settle(
    ps: tuple[Facts, ...], qs: tuple[Facts, ...], counts: tuple[int, ...], biases: tuple[Facts | None, ...],
    masked: tuple[tuple[Facts, Facts, Facts], ...], wide: int, device: torch.device, config: MatmulConfig | int | None,
    tma: bool | None, precision: str, groups: int | None, imagined: object,
) -> SettledExpand:  # fmt: skip
    pitches = None
    if groups:
        qs, pitches = tuple(q.matrix() for q in qs), tuple(q.strides[0] for q in qs)
    sources, ends = tuple(zip(ps, qs, strict=True)), tuple(itertools.accumulate(counts))
    # Masks and biases are part of the cache key, because the kernel is compiled for their alignment.
    masked = tuple([(p, q) for p, q, _ in masked])
    by_output = [sources[end - count : end] for end, count in zip(ends, counts, strict=True)]
    large = [source for summed in by_output for source in summed[:wide]] or masked[:1]
    (p, _), sms = large[0], _launch.num_sms(device)
    rows, dtype = p.shape[0], p.dtype
    cols = tuple((summed or masked)[0][1].shape[0] for summed in by_output)
    q_rows_are_n = all(q.rows_on_16_bytes() for _, q in large)
    if tma is None:
        on_16_bytes = q_rows_are_n or all(q.t().rows_on_16_bytes() for _, q in large)
        on_16_bytes = on_16_bytes and all(p.rows_on_16_bytes() for p, _ in large)
        tma = descriptor_path(_launch.capability(device), dtype)[0] and on_16_bytes
    inner = [sum(p.shape[1] for p, _ in summed) for summed in by_output]
    if not isinstance(config, MatmulConfig):
        strided = any(1 not in t.strides for pair in large for t in pair)
        # A select among pointers costs registers, as a mask does.
        crowded = bool(masked) or (len(sources) > 2 and not tma)
        config = matmul_config(
            rows, max(inner), sum(cols), dtype, tma, crowded, sms, precision == "tf32", place=config, strided=strided,
            many=len(sources) > 6, groups=groups or 0,
        )  # fmt: skip
    ranks = [p.shape[1] for p, _ in masked]
    block_r = max(16, min(32, triton.next_power_of_2(max(ranks, default=0))))
    # A tile of a group may end among the rows of the next, which a descriptor would overwrite.
    store_tma = tma and not groups and all(n * dtype.itemsize % 16 == 0 for n in cols)
    strides = [tuple(0 if tma else pair[side].strides[dim] for pair in sources) for side in (0, 1) for dim in (0, 1)]
    masked_strides = [tuple(pair[side].strides[dim] for pair in masked) or None for side in (0, 1) for dim in (0, 1)]
    pdl = _launch.dependent_launch(device)
    where, high = (None, None), triton.cdiv(rows, config.block_m)
    if groups:
        where = _, high = place(rows, groups, config.block_m)
    tiles = high * sum(triton.cdiv(n, config.block_n) for n in cols)
    launch = Launch(
        _matmul_expand_kernel, (min(tiles, sms * config.ctas_per_sm),),
        (
            rows, cols, tuple(p.shape[1] for p, _ in sources) or None, tuple(ranks) or None,
            tuple(n if bias else 0 for n, bias in zip(cols, biases, strict=True)),
            *(stride or None for stride in strides), *masked_strides,
            None if tma else pitches, *where, groups,
        ),
        dict(
            NUM_OUTPUTS=len(cols), NUM_SOURCES=len(sources), NUM_MASKED=len(masked), ENDS=ends,
            USE_TMA=tma, Q_ROWS_ARE_N=q_rows_are_n, STORE_TMA=store_tma, HAS_BIAS=any(biases), PDL=pdl,
            PRECISION=precision, SUBTILES=config.subtiles, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            BLOCK_K=config.block_k, BLOCK_R=block_r, GROUP_M=config.group_m, GROUPED=groups is not None,
        ),
        dict(num_warps=config.num_warps, num_stages=config.num_stages, **_launch.launch_options(pdl)), device,
    )  # fmt: skip
    absent = _NONE[len(sources) : MAX_SOURCES], _NONE[len(cols) : MAX_OUTPUTS]
    new_ys = [allocator((rows, n), dtype, device) for n in cols]
    if not tma:
        return SettledExpand(launch, new_ys, absent, any(biases), tma, [], [], [])
    m, n, k = config.block_m, config.block_n, config.block_k
    lasting, store_block = keeps(device), (m, n // config.subtiles)
    ps = [Describe(p, (m, k), False, lasting) for p, _ in sources]
    stacks = [(groups, pitch) for pitch in pitches] if pitches else [None] * len(sources)
    qs = [
        Describe(q, (n, k), False, lasting, stack) if q_rows_are_n else Describe(q.t(), (k, n), True, lasting, stack)
        for (_, q), stack in zip(sources, stacks, strict=True)
    ]
    ys = [Describe(new_facts((rows, n), dtype), store_block, False, lasting) for n in cols if store_tma]
    return SettledExpand(launch, new_ys, absent, any(biases), tma, ps, qs, ys)
