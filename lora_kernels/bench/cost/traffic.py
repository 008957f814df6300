"""The bytes that each kernel launch moves, as a formula of shapes and tiles; the tests hold the formulas to counts.

*Touched* counts every byte of an operand once: the least that memory must deliver, and the actual traffic as long as
tiles that run together find each other's operands in L2. *Issued* counts the bytes that the programs request, tile by
tile: L2 must deliver them. *Parts* of split sums are written once and read back once within a launch, mostly from L2.

    M rows, K in_features, N out_features, R rank; e bytes an element of x and W; n_m, n_k, ... blocks of a tile size

Several adapters of one x give `shrink` and `wgrad` several ranks, and one mask for each dropout. Inside an MLP the
kernels compute the shared operand from two or three others, [M, K] each, and may store the result.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lora_kernels.kernels import _configs
from lora_kernels.kernels._configs import MatmulConfig, ShrinkConfig
from lora_kernels.kernels._wgrad_config import WgradCase, WgradConfig, wgrad_config

__all__ = ["Moved", "block", "dequantize", "layer", "matmul_expand", "mlp", "outputs", "shrink", "wgrad"]

# Bytes per element of a part, which is in fp32.
_PART = 4


@dataclass(frozen=True)
class Moved:
    """Bytes of one launch: operands touched once and loads issued, results stored, parts in one direction."""

    kernel: str
    touched: int
    issued: int
    stored: int
    parts: int = 0

    @property
    def total(self) -> int:
        """Return the bytes of every operand and every result once: the memory traffic if parts stay in L2."""
        return self.touched + self.stored

    @property
    def most(self) -> int:
        """Return the memory traffic if all parts leave L2 as well."""
        return self.total + 2 * self.parts


def shrink(
    m: int, k: int, ranks: int | Sequence[int], e: int, masks: int, config: ShrinkConfig, made_of: int = 0
) -> Moved:
    """Count the bytes of each s = alpha · D(x) aᵀ for x `[M, K]` and a `[R, K]`, `masks` of them with dropout.

    If `made_of` is not 0, an activation computes x from that many operands and x is stored; `ranks` may then be empty.
    """
    ranks = (ranks,) if isinstance(ranks, int) else ranks
    widest = max(ranks, default=1)
    n_m, n_r, splits = _blocks(m, config.block_m), _blocks(widest, config.block_r), _blocks(k, config.k_per_split)
    r, read = sum(ranks), max(made_of, 1) * m * k * e
    is_split = splits > 1 and bool(ranks)
    parts = splits * m * r * _PART if is_split else 0
    # the counters are set back to 0
    reset = n_m * n_r * 4 if is_split else 0
    touched = read + r * k * e + 8 * masks
    issued = n_r * read + n_m * r * k * e + 8 * masks * n_m * n_r * splits
    made = m * k * e if made_of else 0
    return Moved("shrink", touched, issued, m * r * e + made + reset + masks * m * _blocks(k, 8), parts)


def wgrad(
    m: int, w: int, thin: int | Sequence[int], e: int, e_g: int, config: WgradConfig, masks: int = 0,
    shrinks: bool | Sequence[int] = False, made_of: int = 0,
) -> Moved:  # fmt: skip
    """Count the bytes of each g = wideᵀ thin, and of each ds = alpha · wide b from the same read.

    wide is `[M, W]` and thin `[M, T]`.

    Args:
        m: M.
        w: W.
        thin: T of each product.
        e: Bytes an element of the operands.
        e_g: Bytes an element of g.
        config: The tile.
        masks: How many of the products have a masked wide operand.
        shrinks: T of each ds; or whether every product has a ds.
        made_of: How many operands the activation reads to make the wide ones; one fewer are stored (dg and du). 0
            without an activation.
    """
    thin = (thin,) if isinstance(thin, int) else thin
    shrunk = sum(thin) * shrinks if isinstance(shrinks, bool) else sum(shrinks)
    widest = max(thin, default=1)
    n_w, n_t, splits = _blocks(w, config.block_c), _blocks(widest, config.block_r), _blocks(m, config.rows_per_split)
    t, read = sum(thin), max(made_of, 1) * m * w * e
    is_split = splits > 1 and bool(thin)
    parts = splits * w * t * _PART if is_split else 0
    ds_parts = n_w * m * shrunk * _PART
    reset = (n_w * n_t if is_split else 0) * 4 + (splits * 4 if shrunk else 0)
    mask = masks * m * 4 * _words(w)
    touched = read + m * t * e + mask + w * shrunk * e
    mask_issued = masks * m * 4 * _words(w, config.block_c, config.block_c)
    issued = n_t * (read + mask_issued) + n_w * m * t * e + splits * w * shrunk * e
    made = max(made_of - 1, 0) * m * w * e
    return Moved("wgrad", touched, issued, w * t * e_g + made + m * shrunk * e + reset, parts + ds_parts)


def matmul_expand(
    m: int, n: int, inner: Sequence[int], e: int, config: MatmulConfig, bias: int = 0, masks: int = 0
) -> Moved:
    """Count the bytes of y = Σᵢ pᵢ qᵢᵀ + bias for pᵢ `[M, Kᵢ]` and qᵢ `[N, Kᵢ]`, the last products masked.

    Args:
        m: M.
        n: N.
        inner: Kᵢ of each source.
        e: Bytes an element.
        config: The tile.
        bias: Bytes an element of the bias, 0 without.
        masks: How many of the last products are masked.
    """
    n_m, n_n = _blocks(m, config.block_m), _blocks(n, config.block_n)
    mask = masks * m * 4 * _words(n)
    touched = sum((m + n) * k * e for k in inner) + n * bias + mask
    # a masked product reads its thin operand again for every slice of the tile's columns
    rereads = [n_n] * (len(inner) - masks) + [n_n * config.subtiles] * masks
    issued = sum((reads * m + n_m * n) * k * e for reads, k in zip(rereads, inner, strict=True))
    # a masked product reads its mask in each of its K steps
    block_r = max(16, min(32, 1 << (max(inner[len(inner) - masks :], default=1) - 1).bit_length()))
    steps = sum(_blocks(k, block_r) for k in inner[len(inner) - masks :])
    issued += n_m * n * bias + steps * m * 4 * _words(n, config.block_n, config.block_n // config.subtiles)
    return Moved("matmul_expand", touched, issued, m * n * e)


def outputs(
    m: int, k: int, widths: Sequence[int], ranks: Sequence[int], e: int, config: MatmulConfig, bias: int = 0
) -> Moved:
    """Count the bytes of each yᵢ = x Wᵢᵀ + sᵢ Bᵢᵀ in one launch, which touches x once; rank 0 is no adapter."""
    each = [
        matmul_expand(m, n, (k, r) if r else (k,), e, config, bias) for n, r in zip(widths, ranks, strict=True)
    ]  # fmt: skip
    shared = (len(each) - 1) * m * k * e
    touched, issued, stored = (sum(getattr(y, name) for y in each) for name in ("touched", "issued", "stored"))
    return Moved("matmul_expand", touched - shared, issued, stored)


def dequantize(
    n: int, k: int, e: int, bits: int = 4, block: int | tuple[int, int] = 64, nested: bool = False, scale: int = 4
) -> Moved:
    """Count the bytes of W `[N, K]` from its storage; every entry of a table is touched.

    Args:
        n: N.
        k: K.
        e: Bytes an element of W.
        bits: 4 or 8.
        block: Weights for a scale: a length for 4 bits, (rows, columns) for 8.
        nested: Whether scales are bytes, with 256 values and a second scale for each 256.
        scale: Bytes of a scale that is not nested.
    """
    four_bits = isinstance(block, int)
    (rows, inner), (tall, wide) = ((1, n * k), (1, block)) if isinstance(block, int) else ((n, k), block)
    config = _configs.dequantize_config(inner, wide, four_bits)
    packed, blocks = _blocks(n * k * bits, 8), _blocks(rows, tall) * _blocks(inner, wide)
    touched = packed + blocks * (1 if nested else scale)
    # A program reads a scale for each unit, and looks up a nibble in each lane, inside of W or not.
    lanes = rows * _blocks(inner, config.block) * config.block
    units = rows * _blocks(inner, config.unit)
    issued = packed + units * (1 if nested else scale)
    if four_bits:
        touched, issued = touched + 16 * 4, issued + lanes * 4
    if nested:
        touched += 256 * 4 + _blocks(blocks, 256) * 4 + 4
        issued += lanes // config.unit * 4 + units * 4 + lanes // config.block * 4
    return Moved("dequantize", touched, issued, n * k * e)


def block(
    m: int, k: int, widths: Sequence[int], ranks: Sequence[int], dtype: torch.dtype, dropout: bool, num_sms: int,
    tma: bool, bias: int = 0, place: int | None = None,
) -> list[Moved]:  # fmt: skip
    """List the launches of several projections of one x, forward and backward; rank 0 is no adapter.

    Not included is the copy of A that `plan.stacks` may require: ΣR·K elements, read once and written once. The large
    products use the shipped tile at `place`, or the rule's.
    """
    e, adapted = dtype.itemsize, [r for r in ranks if r]
    masks, widest = len(adapted) * dropout, max(adapted)
    y_crowded = not tma and len(widths) + len(adapted) > 2
    y_tile = _configs.matmul_config(m, k + widest, sum(widths), dtype, tma, y_crowded, num_sms, place=place)
    sources = (*widths, *(() if dropout else adapted))
    dx_crowded = dropout or (not tma and len(sources) > 2)
    dx_tile = _configs.matmul_config(m, sum(sources), k, dtype, tma, dx_crowded, num_sms, place=place)
    s_tile = _configs.shrink_config(m, k, widest, dtype, dropout, _by_element(k), adapters=len(adapted))
    g_tile = wgrad_config(
        WgradCase(m, k, widest, dtype, adapters=len(adapted), masked=dropout, unaligned=_by_element(k))
    )
    from_dys = [moved for n, r in zip(widths, ranks, strict=True) if r for moved in _from_dy(m, n, r, e, e, dtype)]
    return [
        shrink(m, k, adapted, e, masks, s_tile),
        outputs(m, k, widths, ranks, e, y_tile, bias),
        *from_dys,
        matmul_expand(m, k, (*widths, *adapted), e, dx_tile, 0, masks),
        wgrad(m, k, adapted, e, e, g_tile, masks),
    ]


def mlp(
    m: int, k: int, hidden: int, n: int, ranks: Sequence[int], dtype: torch.dtype, dropout: bool, num_sms: int,
    tma: bool, bias: int = 0, place: int | None = None,
) -> list[Moved]:  # fmt: skip
    """List the launches of a gated MLP, forward and backward; `ranks` of gate, up and down, or of up and down.

    Backward is that of `block` for gate and up without the reads of dg and du for their ds and dB, because at ranks up
    to 16 the launch that computes dg and du also computes those ds and dB.
    """
    e, (*before, r) = dtype.itemsize, ranks
    gated = len(before) == 2

    def expand(cols: int, inner: int, masked: bool, bias: int) -> Moved:
        summed = inner if masked else inner + r
        config = _configs.matmul_config(m, summed, cols, dtype, tma, masked, num_sms, place=place)
        return matmul_expand(m, cols, (inner, r), e, config, bias, masked)

    of_gate_and_up = block(m, k, [hidden] * len(before), before, dtype, dropout, num_sms, tma, bias, place)
    s_tile = _configs.shrink_config(m, hidden, r, dtype, dropout, _by_element(hidden), activated=True)
    fused = [rank for rank in before if _configs.shrink_wgrad_pays(rank, activated=True)]
    tile = wgrad_config(WgradCase(
        m, hidden, max(ranks), dtype, bool(fused), adapters=len(ranks), masked=dropout, activated=True,
        unaligned=_by_element(hidden),
    ))  # fmt: skip
    apart = [rank for rank in before if rank not in fused]
    return [
        *of_gate_and_up[:2],
        shrink(m, hidden, r, e, dropout, s_tile, 1 + gated),
        expand(n, hidden, False, bias),
        *_from_dy(m, n, r, e, e, dtype),
        expand(hidden, n, dropout, 0),
        wgrad(m, hidden, (r, *before), e, e, tile, dropout, fused, 2 + gated),
        *(
            shrink(m, hidden, rank, e, 0, _configs.shrink_config(m, hidden, rank, dtype, False, _by_element(hidden)))
            for rank in apart
        ),
        *of_gate_and_up[-2:],
    ]


def layer(
    m: int, k: int, n: int, r: int, dtype: torch.dtype, dropout: bool, num_sms: int, tma: bool,
    adapter: torch.dtype | None = None, bias: int = 0, place: int | None = None,
) -> list[Moved]:  # fmt: skip
    """List the launches of a layer's forward and backward; y and dx use the tile at `place`, or the rule's."""
    e, e_g = dtype.itemsize, (adapter or dtype).itemsize

    def expand(cols: int, inner: int, masked: bool, bias: int) -> Moved:
        summed = inner if masked else inner + r
        config = _configs.matmul_config(m, summed, cols, dtype, tma, masked, num_sms, place=place)
        return matmul_expand(m, cols, (inner, r), e, config, bias, masked)

    forward = [
        shrink(m, k, r, e, dropout, _configs.shrink_config(m, k, r, dtype, dropout, _by_element(k))),
        expand(n, k, False, bias),
    ]
    from_dy = _from_dy(m, n, r, e, e_g, dtype)
    return [*forward, *from_dy, expand(k, n, dropout, 0), _wgrad(m, k, r, e, e_g, dtype, dropout)]


def _by_element(cols: int) -> bool:
    """Return whether Triton loads contiguous rows of so many columns by element: `kernels._launch.Facts.by_element`."""
    return cols % 16 > 0


def _from_dy(m: int, n: int, r: int, e: int, e_g: int, dtype: torch.dtype) -> list[Moved]:
    """List the launches of ds and dB: one read of dy at small ranks, two at larger ones."""
    if _configs.shrink_wgrad_pays(r):
        return [wgrad(m, n, r, e, e_g, wgrad_config(WgradCase(m, n, r, dtype, shrinks=True)), shrinks=True)]
    config = _configs.shrink_config(m, n, r, dtype, False, _by_element(n))
    return [shrink(m, n, r, e, False, config), _wgrad(m, n, r, e, e_g, dtype, False)]


def _wgrad(m: int, features: int, r: int, e: int, e_g: int, dtype: torch.dtype, keep: bool) -> Moved:
    wide, thin = (features, r) if keep or features >= r else (r, features)
    tile = wgrad_config(WgradCase(m, wide, thin, dtype, masked=keep, unaligned=_by_element(wide)))
    return wgrad(m, wide, thin, e, e_g, tile, keep)


def _words(cols: int, tile: int = 32, span: int = 32) -> int:
    """Count the words read of a row of a packed mask; spans under 32 columns read a word once per span."""
    return _blocks(cols, min(tile, 32)) * (min(tile, 32) // min(span, 32))


def _blocks(size: int, block: int) -> int:
    return -(-size // block)
