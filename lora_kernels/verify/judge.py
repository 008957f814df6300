"""Judge a provider against float64 before `bench` prints its time, and read its dropout masks off dx.

This package is held to its own rules: `numerics.check` for a layer, `block_problems.check_projections` for projections
of one x, `grouped_problems.check_grouped` for layers of groups. Other providers, and every MLP, choose their own
roundings, so only rule 2 applies to them, on outputs of any size: an rms error of at most twice that of PyTorch's
operators (`check_rms`).

The dropout masks are read off the provider itself. With all weights zero, dx = Σ Dᵢ(dsᵢ Aᵢ) is zero where x was
dropped. With only one layer's dy nonzero, dx shows that layer's mask. For an MLP, the weights are chosen so that one
mask alone decides where dx is zero:

    gate    W of gate and up are 1 in one column, B of up is 0:    dx is D(ds A) in every other column
    up      the same with gate and up exchanged
    down    W of all layers and B of gate and up are 0, except that one block of W of gate and up is the unit matrix:
            dx is D(ds A) of that block of h, times a factor that the activation makes of a positive x

The same seed draws the same masks, whatever values the operands hold. A mask that keeps a share far from 1 - p fails.
Weights that are stored quantised are changed with the dense ones: every format holds 0 and 1 exactly.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_kernels.dropout import drop_probability
from lora_kernels.verify import numerics, stored
from lora_kernels.verify.block_problems import BlockProblem, Keeps, check_projections, outputs
from lora_kernels.verify.grouped_problems import GROUPED_MM_ROUNDINGS, GroupedProblem, check_grouped, grouped_outputs
from lora_kernels.verify.numerics import Finding, Problem
from lora_kernels.verify.provider import Provider, Rounding

__all__ = [
    "BY_RMS", "Truth", "Verdict", "check_rms", "find_masks", "judge", "poison", "run_once", "wrong_share",
]  # fmt: skip

# the rule of `check_rms`, in words
BY_RMS = "rms error at most twice that of PyTorch's operators"
_SIGMAS = 6
_FEW = 65_536

# A problem of a provider.
AnyProblem = Problem | BlockProblem | GroupedProblem
# A function of upstream gradients that returns dx.
Run = Callable[[tuple[Tensor, ...]], Tensor]


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

    @classmethod
    def of(cls, findings: Sequence[Finding], rule: str, most: int | None = None) -> "Verdict":
        """Sum findings up; the reason names the first `most` outputs that are wrong, or all of them."""
        wrong = [f.message for f in findings if not f.ok]
        return cls("; ".join(wrong[:most]), max(max(f.rule_1, f.rule_2 or 0.0) for f in findings), rule)

    @property
    def ok(self) -> bool:
        """Return whether nothing is wrong."""
        return not self.reason


class Truth:
    """Exact and eager outputs, cached for one problem.

    The cache is used without dropout only, because then all providers share the same outputs.
    """

    def __init__(self) -> None:
        self._problem: AnyProblem | None = None
        self._outputs: tuple[dict[str, Tensor], ...] = ()

    def of(self, problem: AnyProblem, keeps: Keeps) -> tuple[dict[str, Tensor], ...]:
        """Return the float64 outputs and those of PyTorch's operators in x's dtype, with the masks `keeps`."""
        if keeps or self._problem is not problem:
            self._problem, self._outputs = None if keeps else problem, _exact_and_eager(problem, keeps)
        return self._outputs

    def forget(self) -> None:
        """Free the cached outputs."""
        self._problem, self._outputs = None, ()


def _exact_and_eager(problem: AnyProblem, keeps: Keeps) -> tuple[dict[str, Tensor], ...]:
    if isinstance(problem, GroupedProblem):
        return grouped_outputs(problem), grouped_outputs(problem, exact=False)
    if isinstance(problem, BlockProblem):
        return tuple(outputs(problem, keeps, dtype) for dtype in (torch.float64, problem.x.dtype))
    problem = _with_mask(problem, keeps)
    return numerics.exact(problem), numerics.eager(problem)


def _with_mask(problem: Problem, keeps: Keeps) -> Problem:
    return replace(problem, keep=keeps[""]) if keeps else problem


def judge(provider: Provider, truth: Truth, seed: int = 1) -> Verdict:
    """Run a provider once, forward and backward, and check its results against float64."""
    problem = provider.problem
    # layers of groups have no dropout
    keeps = {} if isinstance(problem, GroupedProblem) else _find_masks_of(provider, problem, seed)
    for name, keep in keeps.items():
        reason = wrong_share(keep, drop_probability(problem.layers[name].dropout_p))
        if reason:
            return Verdict(f"{name}: {reason}" if name else reason, float("inf"), "share of elements kept")
    poison(*problem.dys, *provider.leaves.values())
    actual = run_once(provider, problem.dys, seed)
    # a block has many outputs, and a mistake in one layer is seen in most of them
    most = None if isinstance(problem, Problem) else 3
    if provider.rounding is Rounding.OWN or problem.activation:
        findings = check_rms(actual, *truth.of(problem, keeps), problem.x.dtype, problem.terms_summed)
        return Verdict.of(findings, BY_RMS, most)
    findings = _check(actual, problem, keeps, split=provider.rounding is Rounding.OPERATORS)
    return Verdict.of(findings, "numerics rules 1 and 2", most)


def _find_masks_of(provider: Provider, problem: Problem | BlockProblem, seed: int) -> dict[str, Tensor]:
    return find_masks(problem, provider.leaves, lambda dys: run_once(provider, dys, seed)["dx"])


def _check(actual: dict[str, Tensor], problem: AnyProblem, keeps: Keeps, split: bool) -> list[Finding]:
    """Hold the outputs of a layer, of projections or of layers of groups to rules 1 and 2."""
    if isinstance(problem, GroupedProblem):
        return check_grouped(actual, problem, split, GROUPED_MM_ROUNDINGS if split and problem.x.is_cuda else 0)
    if isinstance(problem, BlockProblem):
        return check_projections(actual, problem, keeps, split)
    problem = _with_mask(problem, keeps)
    return numerics.check(actual, problem, numerics.eager(problem), split)


def check_rms(
    actual: dict[str, Tensor], exact: dict[str, Tensor], eager: dict[str, Tensor], dtype: torch.dtype,
    summed: int | Mapping[str, int],
) -> list[Finding]:  # fmt: skip
    """Hold outputs of any size to rule 2 (`numerics.allowed_rms`); NaN fails.

    Args:
        actual: Output name to tensor.
        exact: The truth, in a wider dtype.
        eager: The outputs of PyTorch's operators.
        dtype: The dtype computed in; u is its unit roundoff.
        summed: How many terms are summed to each output: a number for all outputs, or output name to number.

    Returns:
        A finding for each output in `actual`, in its order; `rule_1` is 0 because rule 1 does not apply.
    """
    findings = []
    for name, tensor in actual.items():
        truth, terms = exact[name].double(), summed if isinstance(summed, int) else summed[name]
        error, beside = numerics.rms(tensor.double() - truth), numerics.rms(eager[name].double() - truth)
        allowed = numerics.allowed_rms(beside, numerics.rms(truth), dtype, terms)
        used = error / allowed if allowed else (float("inf") if error else 0.0)
        used = used if used == used else float("inf")
        message = "" if used <= 1 else f"{name} has rms error {error:.3g}, {allowed:.3g} allowed"
        findings.append(Finding(name, not message, 0.0, used, error / beside if beside else None, message))
    return findings


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


def run_once(provider: Provider, dys: tuple[Tensor, ...], seed: int) -> dict[str, Tensor]:
    """Run the provider after `torch.manual_seed(seed)` and return its outputs and gradients by name."""
    torch.manual_seed(seed)
    ys = provider.forward()
    each = (ys,) if isinstance(ys, Tensor) else ys
    named = dict(zip(provider.problem.ys, (y.detach() for y in each), strict=True))
    return named | dict(zip(provider.leaves, provider.backward(ys, dys), strict=True))


def wrong_share(keep: Tensor, p: float) -> str:
    """Say what is wrong with the share of elements that a mask keeps, or ""."""
    off = keep.double().mean().item() - (1 - p)
    allowed = _SIGMAS * (p * (1 - p) / keep.numel()) ** 0.5
    return f"dropout keeps a share of {1 - p + off:.4f}, {1 - p:.4f} expected" if abs(off) > allowed else ""


def find_masks(problem: Problem | BlockProblem, leaves: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
    """Return the masks that a layer or a block draws, by layer: bool, of the shape of that layer's input.

    Args:
        problem: The problem; its tensors are changed temporarily.
        leaves: The tensors that are read, which may be copies of the problem's.
        run: Runs the problem with the given upstream gradients, always from the same seed, and returns dx.
    """
    dropping = [name for name, q in problem.layers.items() if q.lora_A is not None and q.dropout_p]
    if not problem.activation:
        return {name: _of_projection(problem, name, run) for name in dropping}
    down = list(problem.layers)[2]
    return {
        name: _of_down(problem, leaves, run) if name == down else _of_input(problem, leaves, name, run)
        for name in dropping
    }


def _of_projection(problem: Problem | BlockProblem, name: str, run: Run) -> Tensor:
    alone = tuple(
        dy if other == name else torch.zeros_like(dy) for other, dy in zip(problem.layers, problem.dys, strict=True)
    )
    with _change_weights(problem, list(problem.layers), lambda t: t.zero_()):
        # one layer is quick to run, so its mask is always seen twice
        return _nonzero(run, alone, _FEW if isinstance(problem, BlockProblem) else 0)


def _of_input(problem: BlockProblem, leaves: dict[str, Tensor], name: str, run: Run) -> Tensor:
    gate, up, _ = problem.layers
    quiet = _present(leaves, (up if name == gate else gate,))
    keep = torch.zeros_like(problem.x, dtype=torch.bool)
    with _change(quiet, lambda t: t.zero_()), _change([leaves["dx"]], lambda t: t.abs_().add_(0.5)):
        for column in (0, problem.x.shape[1] - 1):

            def one_column(t: Tensor, column: int = column) -> None:
                t.zero_()
                t[:, column] = 1

            with _change_weights(problem, [gate, up], one_column):
                seen = _nonzero(run, problem.dys)
            # the weights, not the mask, decide this column; the other iteration shows its mask
            seen[:, column] = False
            keep |= seen
    return keep


def _of_down(problem: BlockProblem, leaves: dict[str, Tensor], run: Run) -> Tensor:
    gate, up, down = problem.layers
    (hidden, k), blocks = problem.layers[gate].weight.shape, []
    quiet = _present(leaves, list(problem.layers)[:2])
    with (
        _change_weights(problem, [down], lambda t: t.zero_()),
        _change(quiet, lambda t: t.zero_()),
        _change([leaves["dx"]], lambda t: t.abs_().add_(0.5)),
    ):
        for first in range(0, hidden, k):
            width = min(k, hidden - first)

            def unit(t: Tensor, first: int = first, width: int = width) -> None:
                t.zero_()
                t[first : first + width, :width].fill_diagonal_(1)

            with _change_weights(problem, [gate, up], unit):
                blocks.append(_nonzero(run, problem.dys)[:, :width])
    return torch.cat(blocks, 1)


def _present(leaves: dict[str, Tensor], names: Sequence[str]) -> list[Tensor]:
    """Return B of those named layers that have an adapter."""
    return [leaves[f"dB {name}"] for name in names if f"dB {name}" in leaves]


def _nonzero(run: Run, dys: tuple[Tensor, ...], few: int = _FEW) -> Tensor:
    """Mark where dx is not zero.

    In a large dx a sum may cancel to zero by chance, but hardly for two gradients: from `few` elements on, a second
    gradient is run as well.
    """
    seen = run(dys) != 0
    return seen if seen.numel() < few else seen | (run(tuple(dy.roll(1, 0) for dy in dys)) != 0)


@contextlib.contextmanager
def _change_weights(
    problem: Problem | BlockProblem, names: Sequence[str], change: Callable[[Tensor], object]
) -> Iterator[None]:
    """Change weights to zeros and ones, dense and as they are stored, and restore both on exit."""
    quantised = [(problem.stored[name], problem.layers[name].weight) for name in names if name in problem.stored]
    stored_tensors = [t for weight, _ in quantised for t in stored.changeable(weight)]
    with (
        _change([problem.layers[name].weight for name in names], change),
        _change(stored_tensors, lambda t: None),
    ):
        for weight, dense in quantised:
            stored.write(weight, dense)
        yield


@contextlib.contextmanager
def _change(tensors: list[Tensor], change: Callable[[Tensor], object]) -> Iterator[None]:
    """Change tensors in place, and restore them on exit."""
    tensors = [t.detach() for t in tensors]
    kept = [t.clone() for t in tensors]
    try:
        for t in tensors:
            change(t)
        yield
    finally:
        for t, before in zip(tensors, kept, strict=True):
            t.copy_(before)
