"""Choose the fastest form of a large product by arithmetic on a GPU's limits: pure rules that need no device.

The fused kernel can compute the large product of a pass, `[rows, inner] x [inner, cols]`, with its thin companion of
rank r. So can the vendor's library, with the thin product before, after or beside the large one (`kernels/hybrid.py`):

    fused    products of inner + r columns, at a rate below the library's by the factor 1 + slowdown
    beta1    the library's rate, and y once more out and in
    padded   the library's rate, and copies of both operands
    joint    the library's rate, a copy of W, dx once more out and in, or twice when masked; one pass of dy less above
             rank 32

The first two take the same time at slowdown = e · F / (K · BW), for elements of e bytes, F FLOP/s and BW bytes/s: 7.1 %
at K = 4096 and 2.0 % at 14336 for bf16 with 700 TFLOP/s and 4.8 TB/s. Measured choices override these, see `plan`.
"""

import functools
from typing import NamedTuple

import torch

from lora_kernels.constants import ONE_READ_RANK

__all__ = ["NAMES", "Limits", "Product", "allowed_strategies", "best", "best_of_several", "limits", "seconds", "stacks"]

NAMES = ("fused", "beta1", "padded", "joint")
# Seconds between two launches: an assumption.
_LAUNCH = 2e-6
_K_STEP = 64
# Elements of a sum for which a K step takes, by arithmetic, as long as a small launch: some 3 us.
_STACKED = 1 << 24


class Limits(NamedTuple):
    """The limits of a GPU: FLOP/s of the library's products, bytes/s of memory, and how much slower our kernel is.

    `slowdown` is an assumption until measured on a GPU. Published ratios of Triton's products to cuBLAS' run from 0.90
    to 1.03 in 16 bits on H100, and are far lower in IEEE fp32, which has no tensor cores.
    """

    flops: float
    bandwidth: float
    slowdown: float


class Product(NamedTuple):
    """The large product of a pass and its thin companion.

    Attributes:
        rows: M.
        inner: Length of the sums: in_features forward, out_features backward.
        cols: out_features forward, in_features backward.
        rank: r.
        element: Bytes per element.
        masked: Whether dropout masks the thin product.
        backward: Whether the product is dx.
    """

    rows: int
    inner: int
    cols: int
    rank: int
    element: int
    masked: bool = False
    backward: bool = False


# Dense FLOP/s in 16 bits summed in fp32, in TF32 and in fp32, and bytes/s. Sources: datasheets of A100 SXM, H200 SXM,
# B200 and MI300X, and NVIDIA's architecture whitepapers for RTX 4090 (Ada) and RTX 5090 (RTX Blackwell).
_GPUS = {
    "8": (312e12, 156e12, 19.5e12, 2.04e12),
    "8.9": (165.2e12, 82.6e12, 82.6e12, 1.008e12),
    "9": (989e12, 495e12, 67e12, 4.8e12),
    "10": (2250e12, 1125e12, 75e12, 8.0e12),
    "12": (209.5e12, 104.8e12, 104.8e12, 1.792e12),
    "amd": (1307e12, 654e12, 163e12, 5.3e12),
}
# Fraction of these FLOP/s that a library reaches on a good day.
_REACHED = 0.75
_SLOWDOWN = {"half": 0.05, "tf32": 0.10, "fp32": 0.25, "amd": 0.15}


def limits(capability: tuple[int, int] | None, dtype: torch.dtype, tf32: bool = False) -> Limits:
    """Return the limits assumed for a GPU: of one GPU of its architecture, or of the newest earlier data-centre GPU.

    Args:
        capability: CUDA compute capability; None for AMD.
        dtype: The dtype of the operands.
        tf32: Whether fp32 products may use TF32.
    """
    half, reduced, single, bandwidth = _GPUS[_like(capability)]
    kind = "half" if dtype.itemsize == 2 else "tf32" if tf32 else "fp32"
    flops = {"half": half, "tf32": reduced, "fp32": single}[kind]
    return Limits(flops * _REACHED, bandwidth, max(_SLOWDOWN[kind], _SLOWDOWN["amd"] if capability is None else 0))


def _like(capability: tuple[int, int] | None) -> str:
    """Return the name of the most similar GPU in `_GPUS`."""
    if capability is None:
        return "amd"
    names = f"{capability[0]}.{capability[1]}", str(capability[0]), "10" if capability[0] > 9 else "8"
    return next(name for name in names if name in _GPUS)


@functools.lru_cache(maxsize=4096)
def allowed_strategies(q: Product) -> tuple[str, ...]:
    """List the strategies that can compute a product: "padded" cannot mask, "joint" is for dx alone."""
    barred = {"padded": q.masked, "joint": not q.backward}
    return tuple(name for name in NAMES if not barred.get(name))


def seconds(name: str, q: Product, gpu: Limits) -> float:
    """Return the least time of a strategy for a product, minus the time that the strategy saves in other passes."""
    flops, bandwidth, slowdown = gpu
    wide, out = q.rows * q.inner * q.element, q.rows * q.cols * q.element
    moved = wide + q.inner * q.cols * q.element + out
    more_inner = -(-q.rank // _K_STEP) * _K_STEP

    def product(inner: int, cols: int, rate: float = flops) -> float:
        return max(2 * q.rows * inner * cols / rate, moved / bandwidth)

    # The slowdown is for products and not for memory.
    if name == "fused":
        return product(q.inner + more_inner, q.cols, flops / (1 + slowdown))
    if name == "beta1":
        return product(q.inner, q.cols) + 2 * out / bandwidth + _LAUNCH
    if name == "padded":
        copies = 2 * (q.rows + q.cols) * q.inner * q.element
        return product(q.inner + more_inner, q.cols) + copies / bandwidth + 2 * _LAUNCH
    passes = 2 * q.inner * q.cols * q.element + (4 if q.masked else 2) * out - (q.rank > ONE_READ_RANK) * wide
    return product(q.inner, q.cols + q.rank) + passes / bandwidth + (1 + q.masked) * _LAUNCH


def best(q: Product, gpu: Limits) -> str:
    """Return the fastest strategy; a later one in `NAMES` must gain 1 %, because the times are estimates."""
    times = {name: seconds(name, q, gpu) for name in allowed_strategies(q)}
    best = NAMES[0]
    for name, needed in times.items():
        if needed < 0.99 * times[best]:
            best = name
    return best


def best_of_several(q: Product, sources: int, gpu: Limits) -> str:
    """Return the faster of "fused" and "beta1" for a sum of large products, which the library adds one by one."""
    # Without a thin product the first large product is added to nothing.
    more = sources - 1 - (not q.rank)
    again = more * (2 * q.rows * q.cols * q.element / gpu.bandwidth + _LAUNCH)
    return "beta1" if seconds("beta1", q, gpu) + again < 0.99 * seconds("fused", q, gpu) else "fused"


def stacks(
    rows: int, cols: int, ranks: tuple[int, ...], element: int, copied: bool, k_step: int = _K_STEP
) -> bool:  # fmt: skip
    """Return whether to merge the thin products `[rows, r]` x `[r, cols]` of one sum, with operands side by side.

    Each product is padded to whole K steps, so one merged product takes fewer steps. The cost is a launch that copies
    the right sides, unless all are `copied` anyway. Ranks that do not fill 16 bytes, at `element` bytes per element,
    would leave gaps. In fp32 the K steps are short, and little of them is padding.
    """
    if element != 2 or max(ranks, default=0) > ONE_READ_RANK or any(r * element % 16 for r in ranks):
        return False
    saved = sum(-(-r // k_step) for r in ranks) - -(-sum(ranks) // k_step)
    return saved > 0 and (copied or rows * cols * saved * k_step >= _STACKED * _K_STEP)
