"""Which form of a large product is soonest done on a GPU, by arithmetic on its limits: pure rules, no device.

The large product of a pass, `[rows, inner] x [inner, cols]`, with its thin companion of rank r, can be done by the
fused kernel or by the vendor's library with the thin product before, after or beside it (`kernels/hybrid.py`):

    fused    products of inner + r columns, at a rate below the library's by the factor 1 + slowdown
    beta1    the library's rate, and y once more out and in
    padded   the library's rate, and copies of both operands
    joint    the library's rate, a copy of W, dx twice more out and in when masked; one pass of dy less above rank 32

The first two break even where slowdown = e · F / (K · BW), for elements of e bytes, F FLOP/s and BW bytes/s: 7.1 %
at K = 4096 and 2.0 % at 14336 for bf16 with 700 TFLOP/s and 4.8 TB/s. Measured choices override these, see `plan`.
"""

import functools
from typing import NamedTuple

import torch

__all__ = ["NAMES", "Limits", "Product", "allowed", "best", "best_of_several", "limits", "seconds", "stacks"]

NAMES = ("fused", "beta1", "padded", "joint")
_LAUNCH = 2e-6  # seconds between two launches: an assumption
_ONE_READ_RANK = 32  # up to it ds and dB come from one read of dy in any case; a test holds it to the kernels' own rule
_K_STEP = 64
_STACKED = 1 << 24  # elements of a sum for which a K step takes, by arithmetic, as long as a small launch: some 3 us


class Limits(NamedTuple):
    """What a GPU does: FLOP/s of the library's products, bytes/s of memory, and how much slower our kernel is.

    `slowdown` is an assumption until a GPU has measured it: published ratios of Triton's products to cuBLAS' run from
    0.90 to 1.03 in 16 bits on H100, and are far lower in IEEE fp32, which has no tensor cores.
    """

    flops: float
    bandwidth: float
    slowdown: float


class Product(NamedTuple):
    """The large product of a pass and its thin companion.

    Attributes:
        rows: M.
        inner: What is summed over: in_features forward, out_features backward.
        cols: out_features forward, in_features backward.
        rank: r.
        element: Bytes an element.
        masked: Whether dropout masks the thin product.
        backward: Whether it is dx.
    """

    rows: int
    inner: int
    cols: int
    rank: int
    element: int
    masked: bool = False
    backward: bool = False


# dense FLOP/s in 16 bits summed in fp32, TF32 and fp32, bytes/s; datasheets of A100 SXM, H200 SXM, B200 and MI300X,
# and by NVIDIA's architecture whitepapers RTX 4090 (Ada) and RTX 5090 (RTX Blackwell)
_GPUS = {
    "8": (312e12, 156e12, 19.5e12, 2.04e12),
    "8.9": (165.2e12, 82.6e12, 82.6e12, 1.008e12),
    "9": (989e12, 495e12, 67e12, 4.8e12),
    "10": (2250e12, 1125e12, 75e12, 8.0e12),
    "12": (209.5e12, 104.8e12, 104.8e12, 1.792e12),
    "amd": (1307e12, 654e12, 163e12, 5.3e12),
}
_REACHED = 0.75  # of those FLOP/s, by a library on a good day
_SLOWDOWN = {"half": 0.05, "tf32": 0.10, "fp32": 0.25, "amd": 0.15}


def limits(capability: tuple[int, int] | None, dtype: torch.dtype, tf32: bool = False) -> Limits:
    """The limits assumed for a GPU: those of one GPU of its architecture, or of the newest data centre's before it.

    Args:
        capability: CUDA compute capability; None for AMD.
        dtype: Of the operands.
        tf32: Whether fp32 products may use TF32.
    """
    half, reduced, single, bandwidth = _GPUS[_like(capability)]
    kind = "half" if dtype.itemsize == 2 else "tf32" if tf32 else "fp32"
    flops = {"half": half, "tf32": reduced, "fp32": single}[kind]
    return Limits(flops * _REACHED, bandwidth, max(_SLOWDOWN[kind], _SLOWDOWN["amd"] if capability is None else 0))


def _like(capability: tuple[int, int] | None) -> str:
    """The name in `_GPUS` of what a GPU is like."""
    if capability is None:
        return "amd"
    names = f"{capability[0]}.{capability[1]}", str(capability[0]), "10" if capability[0] > 9 else "8"
    return next(name for name in names if name in _GPUS)


@functools.lru_cache(maxsize=4096)
def allowed(q: Product) -> tuple[str, ...]:
    """The strategies that can compute a product: a padded one cannot mask, a joint one is for dx."""
    barred = {"padded": q.masked, "joint": not q.backward}
    return tuple(name for name in NAMES if not barred.get(name))


def seconds(name: str, q: Product, gpu: Limits) -> float:
    """The least time of a strategy for a product, the passes it saves elsewhere taken off."""
    flops, bandwidth, slowdown = gpu
    wide, out = q.rows * q.inner * q.element, q.rows * q.cols * q.element
    moved = wide + q.inner * q.cols * q.element + out
    more_inner = -(-q.rank // _K_STEP) * _K_STEP

    def product(inner: int, cols: int, rate: float = flops) -> float:
        return max(2 * q.rows * inner * cols / rate, moved / bandwidth)

    if name == "fused":  # slower at products, not at waiting for memory
        return product(q.inner + more_inner, q.cols, flops / (1 + slowdown))
    if name == "beta1":
        return product(q.inner, q.cols) + 2 * out / bandwidth + _LAUNCH
    if name == "padded":
        copies = 2 * (q.rows + q.cols) * q.inner * q.element
        return product(q.inner + more_inner, q.cols) + copies / bandwidth + 2 * _LAUNCH
    passes = 2 * q.inner * q.cols * q.element + (4 if q.masked else 2) * out - (q.rank > _ONE_READ_RANK) * wide
    return product(q.inner, q.cols + q.rank) + passes / bandwidth + (1 + q.masked) * _LAUNCH


def best(q: Product, gpu: Limits) -> str:
    """The strategy with the least time; one further down `NAMES` has to gain a hundredth, for so much is it a guess."""
    times = {name: seconds(name, q, gpu) for name in allowed(q)}
    best = NAMES[0]
    for name, needed in times.items():
        if needed < 0.99 * times[best]:
            best = name
    return best


def best_of_several(q: Product, sources: int, gpu: Limits) -> str:
    """The soonest, "fused" or "beta1", of a sum of so many large products, which the library adds one by one."""
    more = sources - 1 - (not q.rank)  # without a thin product there is nothing to add the first to
    again = more * (2 * q.rows * q.cols * q.element / gpu.bandwidth + _LAUNCH)
    return "beta1" if seconds("beta1", q, gpu) + again < 0.99 * seconds("fused", q, gpu) else "fused"


def stacks(
    rows: int, cols: int, ranks: tuple[int, ...], element: int, copied: bool, k_step: int = _K_STEP
) -> bool:  # fmt: skip
    """Whether thin products `[rows, r]` x `[r, cols]` of one sum should be one product, of operands side by side.

    Each is padded to whole K steps, so together they take fewer. The price is a launch that copies the right sides,
    unless all are `copied` anyhow. Ranks that do not fill 16 bytes, of `element` each, would leave gaps; in fp32 K
    steps are short, and little of them is padding.
    """
    if element != 2 or max(ranks, default=0) > _ONE_READ_RANK or any(r * element % 16 for r in ranks):
        return False
    saved = sum(-(-r // k_step) for r in ranks) - -(-sum(ranks) // k_step)
    return saved > 0 and (copied or rows * cols * saved * k_step >= _STACKED * _K_STEP)
