"""`bench --level kernel`: time each launch of the layer alone, beside the best PyTorch operators for the same work.

    s        shrink          s = α D(x) Aᵀ
    y        matmul_expand   y = x Wᵀ + s Bᵀ
    ds, dB   shrink_wgrad    ds = α dy B,  dB = dyᵀ s
    dx       matmul_expand   dx = dy W + keep · (ds A)
    dA       wgrad           dA = dsᵀ (keep · x)

Operands are random, s and ds as well. All rows of a table count the bytes that this package's launch has to move, so
that a rate is useful work per second for every provider. Every result is held to the componentwise bound of
`verify.numerics` before it is timed; the bound of operators includes the roundings that operators cannot avoid.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels import plan
from lora_kernels.bench.cases.layer import Settings, clone, draw, first_line, ready
from lora_kernels.bench.cost import layer as layer_cost
from lora_kernels.bench.providers.layer import scaled_mm
from lora_kernels.dropout import keep_scale
from lora_kernels.measure import timing
from lora_kernels.measure.presets import Shape
from lora_kernels.verify import judge
from lora_kernels.verify.numerics import SLACK, Problem, unit_roundoff

__all__ = ["LAUNCHES", "PROVIDERS", "TimedLaunch", "admit", "launches", "run_case"]

LAUNCHES = ("s", "y", "ds, dB", "dx", "dA")
PROVIDERS = ("base", "ours", "operators")


@dataclass(frozen=True)
class Sum:
    """The expected value of an output: alpha · Σᵢ pᵢ qᵢ, the last product masked by `keep` if there is a mask.

    Attributes:
        terms: Pairs (p `[*, Kᵢ]`, q `[Kᵢ, *]`).
        alpha: Multiplies the sum.
        keep: Bool mask of the last product, or None.
    """

    terms: tuple[tuple[Tensor, Tensor], ...]
    alpha: float = 1.0
    keep: Tensor | None = None


@dataclass(frozen=True)
class TimedLaunch:
    """One launch, and its alternatives for the same work.

    Attributes:
        kernel: Name of the kernel.
        calls: Provider name to a function that returns the outputs.
        sums: Maps outputs to their expected values; a drawn mask is the last output and has none.
        flops: FLOPs that the launch needs.
        bytes: Bytes that the launch has to move.
        like: Tensors as large as the outputs.
        base_flops: FLOPs of the base product alone; 0 without one.
        mask: Maps outputs to the drawn mask; None if the launch draws none.
    """

    kernel: str
    calls: dict[str, Callable[[], tuple[Tensor, ...]]]
    sums: Callable[[tuple[Tensor, ...]], list[Sum]]
    flops: int
    bytes: int
    like: tuple[Tensor, ...]
    base_flops: int = 0
    mask: Callable[[tuple[Tensor, ...]], Tensor] | None = None


def launches(problem: Problem, backend: str, seed: int = 2) -> dict[str, TimedLaunch]:
    """Build the launches of `LAUNCHES` for a problem.

    Args:
        problem: Its x, W, A, B, dy, scaling and drop probability are used.
        backend: "triton" or "torch", of this package's own launches.
        seed: Seed of s and ds.
    """
    ops, p = plan.contractions(backend), problem.dropout_p
    x, w, a, b, dy = problem.x, problem.weight, problem.lora_A, problem.lora_B, problem.dy
    (m, k), n, r = x.shape, w.shape[0], a.shape[0]
    generator = torch.Generator(x.device).manual_seed(seed)
    s, ds = (torch.randn(m, r, generator=generator, device=x.device).to(x.dtype) for _ in range(2))
    alpha = problem.scaling * keep_scale(p)
    keep = ops.shrink(x, a, alpha, p)[1]
    mask = None if keep is None else unpack_mask(keep, k)
    # a chain of operators has stored the masked x by now
    x_kept = x if mask is None else x * mask

    def shrink_by_operators() -> tuple[Tensor, ...]:
        if not p:
            return (scaled_mm(x, a.t(), alpha),)
        x_d, drawn = torch.native_dropout(x, p, True)
        return scaled_mm(x_d, a.t(), problem.scaling), drawn

    def dx_by_operators() -> tuple[Tensor, ...]:
        dx = dy @ w
        return (dx.addmm_(ds, a) if mask is None else dx.addcmul_(ds @ a, mask),)

    def shrunk(out: tuple[Tensor, ...]) -> list[Sum]:
        x_d = x if len(out) == 1 or out[1] is None else x * unpack_mask(out[1], k)
        return [Sum(((x_d, a.t()),), alpha)]

    cost = layer_cost.COSTS["triton"](layer_cost.Size(m, k, n, r, x.element_size()), p > 0)
    *from_dy, dx_bytes, d_a_bytes = cost.backward
    return {
        "s": TimedLaunch(
            "shrink", {"ours": lambda: ops.shrink(x, a, alpha, p), "operators": shrink_by_operators},
            shrunk, 2 * m * k * r, cost.forward[0], (s,), mask=lambda out: unpack_mask(out[1], k),
        ),
        "y": TimedLaunch(
            "matmul_expand",
            {
                "base": lambda: (F.linear(x, w),),
                "ours": lambda: (ops.matmul_expand([(x, w), (s, b)]),),
                "operators": lambda: (F.linear(x, w).addmm_(s, b.t()),),
            },
            lambda _: [Sum(((x, w.t()), (s, b.t())))], 2 * m * n * (k + r), cost.forward[1], (dy,), 2 * m * n * k,
        ),
        "ds, dB": TimedLaunch(
            "shrink_wgrad",
            {
                "ours": lambda: ops.shrink_wgrad(dy, s, b, alpha, b.dtype),
                "operators": lambda: (scaled_mm(dy, b, alpha), dy.t() @ s),
            },
            lambda _: [Sum(((dy, b),), alpha), Sum(((dy.t(), s),))], 4 * m * n * r, sum(from_dy), (s, b),
        ),
        "dx": TimedLaunch(
            "matmul_expand",
            {
                "base": lambda: (dy @ w,),
                "ours": lambda: (ops.matmul_expand([(dy, w.t()), (ds, a.t())], keep=keep),),
                "operators": dx_by_operators,
            },
            lambda _: [Sum(((dy, w), (ds, a)), keep=mask)], 2 * m * k * (n + r), dx_bytes, (x,), 2 * m * k * n,
        ),
        "dA": TimedLaunch(
            "wgrad",
            {"ours": lambda: (ops.wgrad(ds, x, a.dtype, keep),), "operators": lambda: (ds.t() @ x_kept,)},
            lambda _: [Sum(((ds.t(), x_kept),))], 2 * m * k * r, d_a_bytes, (a,),
        ),
    }  # fmt: skip


def unpack_mask(keep: Tensor, cols: int) -> Tensor:
    """Convert a mask of either backend to bool `[M, cols]`."""
    # The mask of the torch backend has one byte per element, 0 or 1.
    if keep.dtype != torch.int32:
        return keep.bool()
    bits = keep[..., None] >> torch.arange(32, dtype=torch.int32, device=keep.device) & 1
    return bits.flatten(-2)[:, :cols].bool()


def run_case(
    shape: Shape, r: int, p: float, settings: Settings, tick: Callable[[str], None] = lambda doing: None
) -> list[dict[str, Any]]:
    """Check and time every launch of a layer; return a case for each of `LAUNCHES`."""
    backend = plan.choose(settings.device, settings.dtype, r, False, settings.backend)
    problem = draw(shape, r, p, settings)
    copies = [problem]
    if settings.cache == "rotate":
        # each launch reads at least one of x and dy
        wanted = timing.copies_for(min(problem.x.nbytes, problem.dy.nbytes))
        copies += [clone(problem) for _ in range(wanted - 1)]
    sets, turn = [launches(copy, backend) for copy in copies], itertools.count()
    cases = []
    for name in LAUNCHES:
        rows, timed = {}, {}
        for provider in settings.only or PROVIDERS:
            tick(f"checking {name} of {provider}")
            if provider not in sets[0][name].calls:
                continue
            row, right = admit(provider, sets[0][name], backend, problem.dropout_p)
            rows[provider] = row
            if right:
                try:
                    calls = [timing.Calls(one[name].calls[provider]) for one in sets]
                    timed[provider] = ready(calls, settings, turn)
                except Exception as error:
                    row["reason"] = f"cannot be timed so: {first_line(error)}"
        times = timing.time_all(timed, ("forward",), settings.rounds, settings.clock(), lambda: tick("timing"))
        for provider, taken in times.items():
            rows[provider]["seconds"] = taken
        launch = sets[0][name]
        _rate(rows, launch, settings)
        cases.append({
            "level": "kernel", "copies": len(copies), "launch": name, "kernel": launch.kernel,
            "shape": {"m": shape.m, "k": shape.k, "n": shape.n, "label": shape.label}, "r": r, "p": p,
            "dtype": str(settings.dtype).removeprefix("torch."), "flops": launch.flops, "bytes": launch.bytes,
            "providers": rows,
        })  # fmt: skip
    return cases


def _label(provider: str, backend: str) -> str:
    return {"base": "base product alone", "ours": f"lora_kernels [{backend}]"}.get(provider, "PyTorch's operators")


def admit(provider: str, launch: TimedLaunch, backend: str, p: float) -> tuple[dict[str, Any], bool]:
    """Run a provider's launch once and hold every element to its bound.

    Args:
        provider: One of `PROVIDERS` that the launch has.
        launch: One of `launches`.
        backend: "triton" or "torch", of this package's own.
        p: Drop probability.

    Returns:
        The provider's row, and whether it may be timed.
    """
    row: dict[str, Any] = {"label": _label(provider, backend), "reason": "", "check": None, "seconds": {}}
    fused = provider == "ours" and backend == "triton"
    try:
        judge.poison(*launch.like)
        out = launch.calls[provider]()
        sums = launch.sums(out)
        if provider == "base":
            sums = [Sum(one.terms[:1], one.alpha) for one in sums]
        dropped = launch.mask is not None and p > 0
        # not strict: a drawn mask is an output without a sum
        used = [share_used(tensor, one, fused, dropped) for tensor, one in zip(out, sums, strict=False)]
        reason = judge.wrong_share(launch.mask(out), p) if launch.mask and p else ""
    # a provider that cannot run here becomes a line in the table and does not stop the run
    except Exception as error:
        row["reason"] = first_line(error)
        return row, False
    worst = max(used)
    if worst > 1:
        reason = f"an element is off by {worst:.3g} times what is allowed"
    row["check"] = {"ok": not reason, "worst": worst, "rule": "every element within its bound"}
    row["reason"] = reason and f"wrong result, not timed: {reason}"
    return row, not reason


def share_used(actual: Tensor, expected: Sum, fused: bool, dropped: bool) -> float:
    """Return the largest error of an output as a fraction of its element's limit; inf if an error is not finite.

    |T - T64| <= 1.05 (g(Σ Kᵢ) |α| Σ |pᵢ||qᵢ| + u |T64|), with g and u of `numerics`. Operators also round each term on
    its own, which adds u |α| Σ |pᵢ qᵢ|, and the `dropped` elements of p, which adds u |α| Σ |pᵢ||qᵢ|.
    """
    unit = unit_roundoff(actual.dtype)
    products = [p.double() @ q.double() for p, q in expected.terms]
    sizes = [p.double().abs() @ q.double().abs() for p, q in expected.terms]
    if expected.keep is not None:
        products[-1], sizes[-1] = products[-1] * expected.keep, sizes[-1] * expected.keep
    exact, size, alpha = expected.alpha * sum(products), abs(expected.alpha) * sum(sizes), abs(expected.alpha)
    inner = sum(p.shape[1] for p, _ in expected.terms)
    allowed = (inner + 8) * min(unit, unit_roundoff(torch.float32)) * size + unit * exact.abs()
    if not fused:
        allowed += unit * (alpha * sum(product.abs() for product in products) + dropped * size)
    error = (actual.double() - exact).abs()
    if not error.isfinite().all():
        return float("inf")
    return torch.where(error > 0, error / (SLACK * allowed), 0.0).max().item()


def _rate(rows: dict[str, dict[str, Any]], launch: TimedLaunch, settings: Settings) -> None:
    """Fill in useful FLOPs and bytes a second, and their shares of this machine's measured peaks."""
    for name, row in rows.items():
        flops = launch.base_flops if name == "base" else launch.flops
        for taken in row["seconds"].values():
            taken["flops_per_second"] = flops / taken["median"]
            taken["bytes_per_second"] = launch.bytes / taken["median"]
            for share, rate in (("of_peak", "flops_per_second"), ("of_copy", "bytes_per_second")):
                best = settings.peaks.get({"of_peak": "matmul_", "of_copy": "copy_"}[share] + rate)
                taken[share] = taken[rate] / best if best else None
