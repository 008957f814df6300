"""One case of `bench`, a shape, a rank and a drop probability: build, judge and time every provider."""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lora_kernels import plan
from lora_kernels.bench.cost import layer as layer_cost
from lora_kernels.bench.providers import layer as providers
from lora_kernels.dropout import threshold
from lora_kernels.measure import timing
from lora_kernels.measure.presets import PROJECTIONS, Shape
from lora_kernels.verify import judge
from lora_kernels.verify.numerics import Problem
from lora_kernels.verify.provider import Provider

__all__ = [
    "Settings", "admit", "admit_all", "clone", "compare", "copies_of", "draw", "first_line", "held_bytes", "peak_bytes",
    "ready", "run_case", "saved_bytes", "take_times",
]  # fmt: skip

_OPERANDS = ("x", "weight", "lora_A", "lora_B", "dy")


@dataclass(frozen=True)
class Settings:
    """The settings that all cases of a run share.

    Attributes:
        device: Device of the run.
        dtype: Dtype of x and W.
        backend: "auto", "triton" or "torch", for this package's own rows.
        passes: Which of `timing.PASSES` are timed; none to measure memory alone.
        rounds: Timed calls of each provider and pass.
        compiled: Whether compiled providers are included.
        cuda_graph: Whether CUDA graphs are replayed in place of calls.
        peaks: The rates that this machine reaches, see `timing.measure_peaks`.
        build: Builds a provider from its name, a problem and a backend.
        only: Names of the providers; all that apply if empty.
        cache: One of `timing.CACHES`.
        targets: The projections of a model that get an adapter.
    """

    device: torch.device
    dtype: torch.dtype
    backend: str = "auto"
    passes: tuple[str, ...] = timing.PASSES
    rounds: int = 10
    compiled: bool = True
    cuda_graph: bool = False
    peaks: dict[str, Any] = field(default_factory=dict)
    build: Callable[[str, Problem, str], Provider] = providers.build
    only: tuple[str, ...] = ()
    cache: str = "warm"
    targets: tuple[str, ...] = PROJECTIONS

    def clock(self) -> timing.Measure:
        """Return the function that times a call."""
        return timing.clock(self.device, self.cache == "flush")

    def names(self, r: int) -> list[str]:
        """List the providers of a case of rank r, in the tables' order."""
        chosen = plan.choose(self.device, self.dtype, r, False, self.backend)
        return list(self.only) or providers.names_for(self.dtype, chosen, self.compiled)


def draw(shape: Shape, r: int, p: float, settings: Settings) -> Problem:
    """Draw a problem in which every term matters.

    The numbers are drawn on the device, because at these sizes a CPU takes seconds a tensor. `p` is rounded to 1/65536,
    as the kernels round it, so that every provider scales by the same number.
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
    """Run one case and return plain data, for tables and JSON; `tick` is called with a description of each step."""
    if settings.compiled:
        # dynamo's cache is by code, not by layer: after eight shapes it would silently run eager
        torch._dynamo.reset()
    problem, truth = draw(shape, r, p, settings), judge.Truth()
    copies = copies_of(problem, sum(getattr(problem, name).nbytes for name in _OPERANDS), clone, settings)
    rows, timed = admit_all(
        settings.names(r), lambda name: admit(name, problem, truth, settings),
        lambda name: [settings.build(name, copy, settings.backend) for copy in copies[1:]], settings, tick,
    )  # fmt: skip
    truth.forget()
    take_times(rows, timed, settings, tick)
    base, work = (layer_cost.flops(shape.m, shape.k, shape.n, rank) for rank in (0, r))
    compare(rows, base, work, settings)
    return {
        "level": "layer", "copies": len(copies),
        "shape": {"m": shape.m, "k": shape.k, "n": shape.n, "label": shape.label}, "r": r, "p": p,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "flops": dict(zip(("forward", "backward"), work, strict=True)),
        "split_minimum_bytes": layer_cost.split_minimum(_size(problem)).total,
        "providers": rows,
    }  # fmt: skip


def copies_of(problem: Any, size: int, clone: Callable[[Any], Any], settings: Settings) -> list[Any]:
    """Return the problem and, if the buffers are rotated, its copies; the operands of one take `size` bytes."""
    if settings.cache != "rotate" or not settings.passes:
        return [problem]
    return [problem, *(clone(problem) for _ in range(timing.copies_for(size) - 1))]


def admit_all(
    names: list[str], admit: Callable[[str], tuple[dict[str, Any], Any]], others: Callable[[str], list[Any]],
    settings: Settings, tick: Callable[[str], None],
) -> tuple[dict[str, dict[str, Any]], dict[str, timing.Calls]]:  # fmt: skip
    """Build and judge every provider, and measure its memory.

    Args:
        names: Names of the providers.
        admit: Maps a name to the provider's row and to the provider, or None if it may not be timed.
        others: Maps a name to the same provider on each further copy of the operands.
        settings: The run's settings.
        tick: Called with a description of each step.

    Returns:
        The rows, and the calls to time.
    """
    rows, timed, turn = {}, {}, itertools.count()
    for name in names:
        tick(f"checking {name}")
        rows[name], provider = admit(name)
        if provider is None:
            continue
        if settings.cache == "rotate" and "compiled" in name:
            rows[name]["reason"] = "not with --cache rotate: it would be compiled anew for every copy"
            continue
        try:
            calls = [timing.Calls(one.forward, one.backward) for one in (provider, *others(name))]
            timed[name] = ready(calls, settings, turn)
        except Exception as error:
            rows[name]["reason"] = f"cannot be timed so: {first_line(error)}"
    return rows, timed


def take_times(
    rows: dict[str, dict[str, Any]], timed: dict[str, timing.Calls], settings: Settings, tick: Callable[[str], None]
) -> None:
    """Time all providers in turn and write their times into the rows."""
    if settings.passes:
        times = timing.time_all(timed, settings.passes, settings.rounds, settings.clock(), lambda: tick("timing"))
        for name, taken in times.items():
            rows[name]["seconds"] = taken


def clone(problem: Problem) -> Problem:
    """Copy the problem to memory of its own."""
    return replace(problem, **{name: getattr(problem, name).clone() for name in _OPERANDS})


def ready(copies: list[timing.Calls], settings: Settings, turn: Iterator[int]) -> timing.Calls:
    """Return the calls to time: as CUDA graphs if the settings ask for them, and taking turns over several copies."""
    if settings.cuda_graph:
        copies = [timing.graphed(calls) for calls in copies]
    return timing.rotated(copies, turn) if len(copies) > 1 else copies[0]


def admit(
    name: str, problem: Problem, truth: judge.Truth, settings: Settings,
    costs: Mapping[str, Callable[[layer_cost.Size, bool], layer_cost.Cost]] = layer_cost.COSTS,
) -> tuple[dict[str, Any], Provider | None]:  # fmt: skip
    """Build, judge and weigh a provider.

    Args:
        name: Of the provider, as `settings.build` knows it.
        problem: What it computes.
        truth: Of the problem, kept from one provider to the next.
        settings: Of the run.
        costs: The formulas that `Provider.cost` names.

    Returns:
        The provider's row, and the provider itself if it may be timed.
    """
    row: dict[str, Any] = {"label": name, "reason": "", "check": None, "seconds": {}}
    try:
        provider = settings.build(name, problem, settings.backend)
        row["label"] = provider.label
        verdict = judge.judge(provider, truth)
        row["check"] = {"ok": verdict.ok, "worst": verdict.worst, "rule": verdict.rule}
        if not verdict.ok:
            row["reason"] = f"wrong result, not timed: {verdict.reason}"
            return row, None
        row["saved_bytes"] = saved_bytes(provider)
        row["peak_bytes"] = peak_bytes(timing.Calls(provider.forward, provider.backward), settings.device)
    # a baseline that cannot run here becomes a line in the table and does not stop the run
    except Exception as error:
        row["reason"] = first_line(error)
        return row, None
    if provider.cost:
        cost = costs[provider.cost](_size(provider.problem), problem.dropout_p > 0)
        row["model"] = {
            "forward_bytes": sum(cost.forward), "backward_bytes": sum(cost.backward), "launches": cost.launches
        }  # fmt: skip
    return row, provider


def _size(problem: Problem) -> layer_cost.Size:
    (m, k), n, r = problem.x.shape, problem.weight.shape[0], problem.lora_A.shape[0]
    return layer_cost.Size(m, k, n, r, problem.x.element_size(), problem.lora_A.element_size())


def first_line(error: Exception) -> str:
    """Format an error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    # a first line such as "inductor raised:" says nothing without the second
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__}: {said}"[:300]


def compare(
    rows: dict[str, dict[str, Any]], base: tuple[int, int], adapted: tuple[int, int], settings: Settings
) -> None:
    """Fill in ratios to the floor, rates, and shares of the measured peak.

    Args:
        rows: Provider name to row.
        base: FLOPs of forward and of backward without adapters.
        adapted: The same with adapters.
        settings: The run's settings.
    """
    floor = rows.get("frozen", {}).get("seconds", {})
    for name, row in rows.items():
        forward, backward = base if name == "frozen" else adapted
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
    """Count the bytes that autograd holds for a provider's backward beyond x and the parameters."""
    problem = provider.problem
    given = (problem.x, problem.weight, problem.lora_A, problem.lora_B, problem.bias, *provider.leaves.values())
    return held_bytes(provider.forward, [t for t in given if t is not None])


def held_bytes(forward: Callable[[], Tensor], given: Iterable[Tensor]) -> int:
    """Count the bytes that autograd holds for backward beyond the tensors `given`, each storage once."""
    not_counted = {t.untyped_storage().data_ptr() for t in given}
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in not_counted:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # y stays alive until all storages are counted, so that no address is reused
        y = forward()
    del y
    return sum(held.values())


def peak_bytes(calls: timing.Calls, device: torch.device) -> int:
    """Measure the peak tensor memory of forward and backward, above the memory allocated before."""
    if device.type != "cuda":
        return _peak_bytes_of_cpu(calls)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    y = calls.forward()
    gradients = calls.backward(y)
    torch.cuda.synchronize(device)
    del y, gradients
    return torch.cuda.max_memory_allocated(device) - before


def _peak_bytes_of_cpu(calls: timing.Calls) -> int:
    """Measure the peak on a CPU from all allocations that PyTorch's profiler records, in order of time."""
    # without the setting, Kineto writes two lines to stderr each time
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        y = calls.forward()
        gradients = calls.backward(y)
    del y, gradients
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(changes), default=0)
