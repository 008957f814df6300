"""Estimate by arithmetic how long a run of `bench` takes, to warn before a run that would take very long."""

from collections.abc import Sequence

import torch

from lora_kernels.bench import levels
from lora_kernels.bench.cases.layer import Settings
from lora_kernels.bench.cost import layer as layer_cost
from lora_kernels.measure.presets import Dims, HostedDims, Shape

__all__ = ["flops", "seconds", "warning"]

# Warn about runs that take more seconds.
_LONG = 300.0
# cost in units of one forward and backward; a timed backward runs its forward first
_PASSES = {"forward": 0.5, "backward": 1.0, "both": 1.0}
# per case, in the same units: the float64 truth and its bounds
_ONCE = 8.0
# per provider, in the same units: check, measurement of memory, warm-up
_EACH = 6.0
# Seconds that compiling one provider takes.
_COMPILING = 10.0
# FLOP/s of a matmul, if nothing is timed and no peak was measured
_ASSUMED = 1e11
# share of the best matmul's rate that timed and checked calls reach
_REACHED = 0.4


def flops(level: str, subject: Shape | Dims, r: int) -> int:
    """Count the FLOPs of one forward and backward of a case's layer, block or model."""
    if isinstance(subject, Dims):
        m, hidden = subject.tokens, subject.hidden
        key_value = subject.kv_heads * subject.head_dim
        sides = [(hidden, hidden)] * 2 + [(hidden, key_value)] * 2 + [(hidden, subject.intermediate)] * 3
        attention = 12 * m * subject.seq * hidden
        layer = sum(sum(layer_cost.flops(m, k, n, r)) for k, n in sides) + attention
        head = sum(layer_cost.flops(m, hidden, subject.vocab, 0))
        return subject.layers * layer + head if level == "model" else layer
    widths = (subject.n,) * 3 if level == "mlp" else subject.widths
    return sum(sum(layer_cost.flops(subject.m, subject.k, n, r)) for n in widths)


def seconds(case: tuple[str, Shape | Dims, int, float], settings: Settings) -> float:
    """Estimate the seconds of a case from this run's measured matmul rate, to a factor of about 3."""
    level, subject, r, _ = case
    names = levels.names(level, settings, r, subject)
    timed = settings.rounds * sum(_PASSES[which] for which in settings.passes)
    # each launch is timed as a forward, and all launches together are forward and backward
    if level == "kernel":
        timed *= 2
    work = flops(level, subject, r) * (_ONCE + len(names) * (_EACH + timed))
    compiling = _COMPILING * sum("compiled" in name for name in names)
    return work / settings.peaks.get("matmul_flops_per_second", _ASSUMED) / _REACHED + compiling


def warning(cases: Sequence[tuple[str, Shape | Dims, int, float]], settings: Settings, minutes: float | None) -> str:
    """Warn in one line of a run that takes long on a CPU, with shorter options; "" for any other run.

    Args:
        cases: Level, shape or model, rank and drop probability of each case.
        settings: The run's settings.
        minutes: No case begins after this many minutes; None without a limit.
    """
    if settings.device.type != "cpu":
        return ""
    each = [seconds(case, settings) for case in cases]
    total = sum(each) if minutes is None else min(sum(each), minutes * 60 + max(each))
    if total <= _LONG:
        return ""
    about = f"{total / 60:.0f} minutes" if total < 2 * 3600 else f"{total / 3600:.0f} hours"
    many = f"{len(cases)} case{'s' * (len(cases) > 1)}"
    smaller = "--model tiny, --layers 1, --seq 64" if isinstance(cases[0][1], HostedDims) else "--preset tiny, --m 64"
    return (
        f"By arithmetic this takes about {about} on this CPU ({many}; threads: {torch.get_num_threads()}). "
        f"Less: {smaller}, --rounds 3, --minutes 5. Ctrl-C keeps the cases that are done."
    )
