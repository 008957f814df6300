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
from lora_kernels.bench.cost import stored as stored_cost
from lora_kernels.bench.providers import layer as providers
from lora_kernels.bench.providers import quantised as quantised_providers
from lora_kernels.dropout import drop_probability
from lora_kernels.measure import timing
from lora_kernels.measure.presets import PROJECTIONS, Shape
from lora_kernels.quantized import QuantizedWeight
from lora_kernels.verify import judge
from lora_kernels.verify.block_problems import BlockProblem, quantised
from lora_kernels.verify.numerics import Problem
from lora_kernels.verify.provider import Provider

__all__ = [
    "SCALING", "Settings", "admit", "clone", "clone_stored", "compare", "copies_of", "draw", "examine", "first_line",
    "forget_compiled", "held_bytes", "peak_bytes", "ready", "run_all", "run_case", "saved_bytes", "with_stored",
]  # fmt: skip

# Scaling of the low-rank term in every case.
SCALING = 2.0
_OPERANDS = ("x", "weight", "lora_A", "lora_B", "dy")
# formulas of libraries that dequantise by kernels of their own
_OF_OTHERS = ("peft", "addmm", "unsloth")


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
        quantise: Format of the frozen weights, see `verify.stored.FORMATS`; "" for dense ones.
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
    quantise: str = ""

    def clock(self) -> timing.Measure:
        """Return the function that times a call."""
        return timing.clock(self.device, self.cache == "flush")

    def names(self, r: int) -> list[str]:
        """List the providers of a case of rank r, in the tables' order."""
        chosen = plan.choose(self.device, self.dtype, r, False, self.backend)
        return list(self.only) or providers.names_for(self.dtype, chosen, self.compiled, self.quantise)


def draw(shape: Shape, r: int, p: float, settings: Settings) -> Problem:
    """Draw a problem in which every term matters.

    The numbers are drawn on the device, because at these sizes a CPU takes seconds a tensor. `p` is rounded to 1/65536,
    as the kernels round it, so that every provider scales by the same number.
    """
    generator = torch.Generator(settings.device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, generator=generator, device=settings.device).mul_(scale).to(settings.dtype)

    problem = Problem(
        x=normal(shape.m, shape.k),
        weight=normal(shape.n, shape.k, scale=shape.k**-0.5),
        lora_A=normal(r, shape.k, scale=shape.k**-0.5),
        lora_B=normal(shape.n, r, scale=r**-0.5),
        dy=normal(shape.m, shape.n),
        scaling=SCALING,
        dropout_p=drop_probability(p),
    )
    return quantised(problem, settings.quantise) if settings.quantise else problem


def run_case(
    shape: Shape, r: int, p: float, settings: Settings, tick: Callable[[str], None] = lambda doing: None
) -> dict[str, Any]:
    """Run one case and return plain data, for tables and JSON; `tick` is called with a description of each step."""
    forget_compiled(settings)
    problem, truth = draw(shape, r, p, settings), judge.Truth()
    copies = copies_of(problem, clone, settings)
    rows = run_all(
        settings.names(r), lambda name: admit(name, problem, truth, settings),
        lambda name: [settings.build(name, copy, settings.backend) for copy in copies[1:]], truth.forget, settings,
        tick,
    )  # fmt: skip
    base, work = (layer_cost.flops(shape.m, shape.k, shape.n, rank) for rank in (0, r))
    compare(rows, base, work, settings)
    return {
        "level": "layer", "copies": len(copies),
        "shape": {"m": shape.m, "k": shape.k, "n": shape.n, "label": shape.label}, "r": r, "p": p,
        "dtype": str(settings.dtype).removeprefix("torch."), "quantise": settings.quantise,
        "flops": dict(zip(("forward", "backward"), work, strict=True)),
        "split_minimum_bytes": with_stored(layer_cost.split_minimum(_size(problem)), "", problem).total,
        "providers": rows,
    }  # fmt: skip


def forget_compiled(settings: Settings) -> None:
    """Forget the compiled code of earlier cases, if providers are compiled."""
    if settings.compiled:
        # dynamo's cache is by code, not by layer or model: after eight shapes it would silently run eager
        torch._dynamo.reset()


def copies_of(problem: Any, clone: Callable[[Any], Any], settings: Settings) -> list[Any]:
    """Return the problem of a layer or a block and, if the buffers are rotated, the copies that `clone` makes of it."""
    if settings.cache != "rotate" or not settings.passes:
        return [problem]
    # A quantised problem's dense weights are read by the floor alone.
    of_floor = sum(problem.layers[name].weight.nbytes for name in problem.stored)
    size = sum(t.nbytes for t in _operands(problem)) - of_floor
    return [problem, *(clone(problem) for _ in range(timing.copies_for(size) - 1))]


def clone_stored(problem: Problem | BlockProblem) -> dict[str, QuantizedWeight]:
    """Copy the stored weights of a problem to memory of their own."""
    return {name: w.with_tensors([t.clone() for t in w.tensors()]) for name, w in problem.stored.items()}


def _operands(problem: Problem | BlockProblem) -> list[Tensor]:
    of_layers = [t for q in problem.layers.values() for t in (q.weight, q.lora_A, q.lora_B, q.bias)]
    stored = [t for w in problem.stored.values() for t in w.tensors()]
    return [problem.x, *problem.dys, *stored, *(t for t in of_layers if t is not None)]


def with_stored(cost: layer_cost.Cost, formula: str, problem: Problem | BlockProblem) -> layer_cost.Cost:
    """Add to a cost the launches that make the dense weights of a quantised problem, once a pass.

    Args:
        cost: The cost with dense weights.
        formula: `Provider.cost`; formulas of other libraries dequantise as `providers.quantised` does.
        problem: The problem.
    """
    made = []
    for weight in problem.stored.values():
        by = quantised_providers.maker(weight) if formula in _OF_OTHERS else "ours"
        made += quantised_providers.cost_of(weight, by, problem.x.element_size())
    return stored_cost.over(cost, tuple(made)) if made else cost


def run_all(
    names: Iterable[str], admit: Callable[[str], tuple[dict[str, Any], Any]], others: Callable[[str], list[Any]],
    forget: Callable[[], None], settings: Settings, tick: Callable[[str], None],
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Build and judge every provider, measure its memory, and time all providers in turn; return their rows.

    Args:
        names: Names of the providers.
        admit: Maps a name to the provider's row and to the provider, or None if it may not be timed.
        others: Maps a name to the same provider on each further copy of the operands.
        forget: Frees what only `admit` needs; called before anything is timed.
        settings: The run's settings.
        tick: Called with a description of each step.
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
    forget()
    if settings.passes:
        times = timing.time_all(timed, settings.passes, settings.rounds, settings.clock(), lambda: tick("timing"))
        for name, taken in times.items():
            rows[name]["seconds"] = taken
    return rows


def clone(problem: Problem) -> Problem:
    """Copy the problem to memory of its own."""
    copied = {name: getattr(problem, name).clone() for name in _OPERANDS}
    return replace(problem, **copied, stored=clone_stored(problem))


def ready(copies: list[timing.Calls], settings: Settings, turn: Iterator[int]) -> timing.Calls:
    """Return the calls to time: as CUDA graphs if the settings ask for them, and taking turns over several copies."""
    if settings.cuda_graph:
        copies = [timing.capture_graphs(calls) for calls in copies]
    return timing.rotate_copies(copies, turn) if len(copies) > 1 else copies[0]


def admit(
    name: str, problem: Problem, truth: judge.Truth, settings: Settings,
    costs: Mapping[str, Callable[[layer_cost.Size, bool], layer_cost.Cost]] = layer_cost.COSTS,
) -> tuple[dict[str, Any], Provider | None]:  # fmt: skip
    """Build, judge and weigh a provider.

    Args:
        name: The provider's name in `settings.build`.
        problem: The problem that the provider computes.
        truth: Cache of the problem's exact outputs, shared by all providers.
        settings: The run's settings.
        costs: The formulas that `Provider.cost` names.

    Returns:
        The provider's row, and the provider itself if it may be timed.
    """

    def cost(provider: Provider) -> layer_cost.Cost | None:
        if not provider.cost:
            return None
        moved = costs[provider.cost](_size(provider.problem), problem.dropout_p > 0)
        return with_stored(moved, provider.cost, provider.problem)

    return examine(
        name, lambda: settings.build(name, problem, settings.backend), lambda provider: judge.judge(provider, truth),
        saved_bytes, settings, cost,
    )  # fmt: skip


def examine(
    name: str, construct: Callable[[], Any], check: Callable[[Any], judge.Verdict], saved: Callable[[Any], int],
    settings: Settings, cost: Callable[[Any], layer_cost.Cost | None] = lambda provider: None,
) -> tuple[dict[str, Any], Any]:  # fmt: skip
    """Build, judge and weigh whatever has a label, a forward and a backward.

    Args:
        name: The provider's name, shown if the provider cannot be built.
        construct: Builds the provider.
        check: Judges the provider.
        saved: Counts the bytes that autograd holds for the provider's backward.
        settings: The run's settings.
        cost: Counts the bytes of the provider's launches; None where no formula is known.

    Returns:
        The provider's row, and the provider itself, or None if it may not be timed.
    """
    row: dict[str, Any] = {"label": name, "reason": "", "check": None, "seconds": {}}
    try:
        provider = construct()
        row["label"] = provider.label
        verdict = check(provider)
        row["check"] = {"ok": verdict.ok, "worst": verdict.worst, "rule": verdict.rule}
        if not verdict.ok:
            row["reason"] = f"wrong result, not timed: {verdict.reason}"
            return row, None
        row["saved_bytes"] = saved(provider)
        row["peak_bytes"] = peak_bytes(timing.Calls(provider.forward, provider.backward), settings.device)
    # a baseline that cannot run here becomes a line in the table and does not stop the run
    except Exception as error:
        row["reason"] = first_line(error)
        return row, None
    moved = cost(provider)
    if moved is not None:
        row["model"] = {
            "forward_bytes": sum(moved.forward), "backward_bytes": sum(moved.backward), "launches": moved.launches
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
            taken["model_bytes_per_second"] = _moved_bytes(row, which) / taken["median"] if "model" in row else None


def _moved_bytes(row: dict[str, Any], which: str) -> int:
    forward, backward = row["model"]["forward_bytes"], row["model"]["backward_bytes"]
    return {"forward": forward, "backward": backward, "both": forward + backward}[which]


def saved_bytes(provider: Provider) -> int:
    """Count the bytes that autograd holds for a provider's backward beyond x and the parameters."""
    return held_bytes(provider.forward, [*_operands(provider.problem), *provider.leaves.values()])


def held_bytes(forward: Callable[[], Any], given: Iterable[Tensor]) -> int:
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
