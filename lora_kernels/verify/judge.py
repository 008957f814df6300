"""Judge a provider against float64 before `bench` prints its time.

This package is held to its own rules (`numerics.check`). Other providers round where they like, so they are held to
rule 2 alone, on outputs of any size: an rms error of at most twice that of PyTorch's operators.

The dropout mask is read off the provider itself: with W = 0, dx = D(ds A) is zero exactly where x was dropped, and the
same seed draws the same mask again. A mask that keeps a share far from 1 - p fails.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_kernels.dropout import threshold
from lora_kernels.verify import numerics
from lora_kernels.verify.numerics import Problem
from lora_kernels.verify.provider import Provider

__all__ = ["Truth", "Verdict", "find_mask", "judge", "poison", "run_once", "wrong_share"]

_SIGMAS = 6


@dataclass(frozen=True)
class Verdict:
    """The judgement of a provider's results.

    Attributes:
        reason: What is wrong, or "".
        worst: The largest error as a fraction of the allowed error.
        rule: The rule applied, in words.
    """

    reason: str
    worst: float
    rule: str

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.reason


class Truth:
    """Exact and eager outputs, cached for one problem, because without dropout all providers share that problem."""

    def __init__(self) -> None:
        self._problem: Problem | None = None
        self._outputs: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None

    def of(self, problem: Problem) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the float64 outputs and those of PyTorch's operators in x's dtype."""
        if self._problem is None or not _same(self._problem, problem):
            self._problem, self._outputs = problem, (numerics.exact(problem), numerics.eager(problem))
        return self._outputs

    def forget(self) -> None:
        """Free the cached outputs."""
        self._problem = self._outputs = None


def _same(one: Problem, other: Problem) -> bool:
    return all(getattr(one, name) is getattr(other, name) for name in ("x", "weight", "lora_A", "lora_B", "dy", "keep"))


def judge(provider: Provider, truth: Truth, seed: int = 1) -> Verdict:
    """Run a provider once, forward and backward, and check its results against float64."""
    problem = provider.problem
    if problem.dropout_p:
        keep, reason = find_mask(provider, seed)
        if reason:
            return Verdict(reason, float("inf"), "share of elements kept")
        problem = replace(problem, keep=keep)
    poison(problem.dy, problem.x, problem.lora_A, problem.lora_B)
    actual = run_once(provider, problem.dy, seed)
    if provider.rule == "peer":
        return _peer(actual, problem, truth)
    baseline = numerics.eager(problem)
    findings = numerics.check(actual, problem, baseline, split=provider.rule == "operators")
    worst = max(max(f.rule_1, f.rule_2 or 0.0) for f in findings)
    return Verdict("; ".join(f.message for f in findings if not f.ok), worst, "numerics rules 1 and 2")


def poison(*outputs: Tensor) -> None:
    """Leave NaN in freed memory, so that a right result of another provider cannot pass for this provider's.

    Args:
        *outputs: Tensors as large as those about to be allocated.
    """
    if outputs[0].is_cuda:
        # leave the allocator no other blocks to give out
        torch.cuda.empty_cache()
    left = [torch.full_like(t, float("nan")) for t in outputs for _ in range(2)]
    del left


def run_once(provider: Provider, dy: Tensor, seed: int) -> dict[str, Tensor]:
    """Run the provider after `torch.manual_seed(seed)` and return its outputs and gradients by name."""
    torch.manual_seed(seed)
    y = provider.forward()
    return {"y": y.detach(), **dict(zip(provider.leaves, provider.backward(y, dy), strict=True))}


def find_mask(provider: Provider, seed: int) -> tuple[Tensor, str]:
    """Return the mask that a provider draws after `torch.manual_seed(seed)`, and what is wrong with it or ""."""
    problem, p = provider.problem, threshold(provider.problem.dropout_p) / 65536
    weight = problem.weight.clone()
    try:
        problem.weight.zero_()
        keep = torch.zeros_like(problem.x, dtype=torch.bool)
        # a sum that cancels to zero by chance does so for one of the two gradients only
        for dy in (problem.dy, problem.dy.roll(1, 0)):
            keep |= run_once(provider, dy, seed)["dx"] != 0
    finally:
        problem.weight.copy_(weight)
    return keep, wrong_share(keep, p)


def wrong_share(keep: Tensor, p: float) -> str:
    """Say what is wrong with the share of elements that a mask keeps, or ""."""
    off = keep.double().mean().item() - (1 - p)
    allowed = _SIGMAS * (p * (1 - p) / keep.numel()) ** 0.5
    return f"dropout keeps a share of {1 - p + off:.4f}, {1 - p:.4f} expected" if abs(off) > allowed else ""


def _peer(actual: dict[str, Tensor], problem: Problem, truth: Truth) -> Verdict:
    exact, eager = truth.of(problem)
    summed, worst, reasons = numerics.terms(problem), 0.0, []
    for name, tensor in actual.items():
        error, beside = (numerics.rms(t.double() - exact[name]) for t in (tensor, eager[name]))
        allowed = numerics.allowed_rms(beside, numerics.rms(exact[name]), problem.x.dtype, summed[name])
        used = error / allowed if allowed else (float("inf") if error else 0.0)
        worst = max(worst, used) if used == used else float("inf")
        if not used <= 1:
            reasons.append(f"{name} has rms error {error:.3g}, {allowed:.3g} allowed")
    return Verdict("; ".join(reasons), worst, "rms error at most twice that of PyTorch's operators")
