"""One case of `bench`: a shape, a rank and a drop probability, every provider built, judged, weighed and timed."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_kernels import plan
from lora_kernels.cli import _baselines, _cost, _judge, _timing
from lora_kernels.cli._baselines import Provider
from lora_kernels.cli._presets import Shape
from lora_kernels.dropout import threshold
from lora_kernels.numerics import Problem

__all__ = ["Settings", "draw", "peak_bytes", "run_case", "saved_bytes"]


@dataclass(frozen=True)
class Settings:
    """What all cases of a run have in common.

    Attributes:
        device: Where it runs.
        dtype: Of x and W.
        backend: "auto", "triton" or "torch", for this package's own rows.
        passes: Which of `_timing.PASSES` are timed; none to weigh memory alone.
        rounds: Timed calls of each provider and pass.
        compiled: Whether torch.compile takes part.
        cuda_graph: Whether CUDA graphs are replayed in place of calls.
        peaks: What this machine reaches, see `_timing.measure_peaks`.
        build: Provider name and problem to provider.
        only: Provider names to take; all that make sense if empty.
    """

    device: torch.device
    dtype: torch.dtype
    backend: str = "auto"
    passes: tuple[str, ...] = _timing.PASSES
    rounds: int = 10
    compiled: bool = True
    cuda_graph: bool = False
    peaks: dict[str, Any] = field(default_factory=dict)
    build: Callable[[str, Problem, str], Provider] = _baselines.build
    only: tuple[str, ...] = ()

    def names(self, r: int) -> list[str]:
        """The providers of a case of rank r, in the tables' order."""
        chosen = plan.choose(self.device, self.dtype, r, False, self.backend)
        return list(self.only) or _baselines.names_for(self.dtype, chosen, self.compiled)


def draw(shape: Shape, r: int, p: float, settings: Settings) -> Problem:
    """Draw a problem in which every term matters, on the device: at these sizes a CPU takes seconds a tensor.

    `p` is resolved to 1/65536, as the kernels do, so that every provider scales by the same number.
    """
    generator = torch.Generator(settings.device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, generator=generator, device=settings.device).mul_(scale).to(settings.dtype)

    return Problem(
        x=normal(shape.m, shape.k),
        weight=normal(shape.n, shape.k, scale=shape.k**-0.5),
        lora_A=normal(r, shape.k, scale=shape.k**-0.5),
        lora_B=normal(shape.n, r, scale=r**-0.5),
        dy=normal(shape.m, shape.n),
        scaling=2.0,
        dropout_p=threshold(p) / 65536,
    )


def run_case(
    shape: Shape, r: int, p: float, settings: Settings, tick: Callable[[str], None] = lambda doing: None
) -> dict[str, Any]:
    """Run one case; `tick` is told what is being done. What comes back is plain data, for tables and JSON alike."""
    if settings.compiled:
        torch._dynamo.reset()  # its cache is by code, not by layer: after eight shapes it runs eager and does not say
    problem = draw(shape, r, p, settings)
    truth, rows, ready = _judge.Truth(), {}, {}
    for name in settings.names(r):
        tick(f"checking {name}")
        rows[name], provider = _admit(name, problem, truth, settings)
        if provider is not None:
            try:
                calls = _timing.Calls(provider.forward, provider.backward)
                ready[name] = _timing.graphed(calls) if settings.cuda_graph else calls
            except Exception as error:
                rows[name]["reason"] = f"no CUDA graph: {_first_line(error)}"
    del truth
    measure = _timing.clock(settings.device)
    if settings.passes:
        times = _timing.time_all(ready, settings.passes, settings.rounds, measure, lambda: tick("timing"))
        for name, taken in times.items():
            rows[name]["seconds"] = taken
    _compare(rows, shape, r, settings)
    return {
        "shape": {"m": shape.m, "k": shape.k, "n": shape.n, "label": shape.label}, "r": r, "p": p,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "flops": dict(zip(("forward", "backward"), _cost.flops(shape.m, shape.k, shape.n, r), strict=True)),
        "split_minimum_bytes": _cost.split_minimum(_size(problem)).total,
        "providers": rows,
    }  # fmt: skip


def _admit(
    name: str, problem: Problem, truth: _judge.Truth, settings: Settings
) -> tuple[dict[str, Any], Provider | None]:
    """A provider's row, and the provider itself if it may be timed."""
    row: dict[str, Any] = {"label": name, "reason": "", "check": None, "seconds": {}}
    try:
        provider = settings.build(name, problem, settings.backend)
        row["label"] = provider.label
        verdict = _judge.judge(provider, truth)
        row["check"] = {"ok": verdict.ok, "worst": verdict.worst, "rule": verdict.rule}
        if not verdict.ok:
            row["reason"] = f"wrong result, not timed: {verdict.reason}"
            return row, None
        row["saved_bytes"], row["peak_bytes"] = saved_bytes(provider), peak_bytes(provider)
    except Exception as error:  # a baseline that cannot run here is a line in the table, not the end of it
        row["reason"] = _first_line(error)
        return row, None
    if provider.cost:
        cost = _cost.COSTS[provider.cost](_size(provider.problem), problem.dropout_p > 0)
        row["model"] = {
            "forward_bytes": sum(cost.forward), "backward_bytes": sum(cost.backward), "launches": cost.launches
        }  # fmt: skip
    return row, provider


def _size(problem: Problem) -> _cost.Size:
    (m, k), n, r = problem.x.shape, problem.weight.shape[0], problem.lora_A.shape[0]
    return _cost.Size(m, k, n, r, problem.x.element_size(), problem.lora_A.element_size())


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]  # "inductor raised:" alone says nothing
    return f"{type(error).__name__}: {said}"[:300]


def _compare(rows: dict[str, dict[str, Any]], shape: Shape, r: int, settings: Settings) -> None:
    """Fill in what follows from the times: ratios to the floor, shares of the measured peak, and rates."""
    floor = rows.get("frozen", {}).get("seconds", {})
    for name, row in rows.items():
        forward, backward = _cost.flops(shape.m, shape.k, shape.n, 0 if name == "frozen" else r)
        work = {"forward": forward, "backward": backward, "both": forward + backward}
        peak = settings.peaks.get("matmul_flops_per_second")
        for which, taken in row["seconds"].items():
            taken["to_floor"] = taken["median"] / floor[which]["median"] if floor else None
            taken["flops_per_second"] = work[which] / taken["median"]
            taken["of_peak"] = taken["flops_per_second"] / peak if peak else None
            taken["model_bytes_per_second"] = _moved(row, which) / taken["median"] if "model" in row else None


def _moved(row: dict[str, Any], which: str) -> int:
    forward, backward = row["model"]["forward_bytes"], row["model"]["backward_bytes"]
    return {"forward": forward, "backward": backward, "both": forward + backward}[which]


def saved_bytes(provider: Provider) -> int:
    """Bytes that autograd holds for backward beyond x and the parameters, each storage once."""
    problem = provider.problem
    given = {
        t.untyped_storage().data_ptr()
        for t in (problem.x, problem.weight, problem.lora_A, problem.lora_B, problem.bias, *provider.leaves.values())
        if t is not None
    }
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = provider.forward()  # alive until all is counted, so that no address is given out twice
    del y
    return sum(held.values())


def peak_bytes(provider: Provider) -> int | None:
    """The most memory forward and backward take on top of what is there before; None where PyTorch does not count."""
    device = provider.problem.x.device
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    y = provider.forward()
    gradients = provider.backward(y)
    torch.cuda.synchronize(device)
    del y, gradients
    return torch.cuda.max_memory_allocated(device) - before
