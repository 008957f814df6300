"""Judge a block before it is timed, and read its dropout masks off dx.

With all weights zero, dx = Σ Dᵢ(dsᵢ Aᵢ) is zero where x was dropped. With only one projection's dy nonzero, dx shows
that projection's mask. For an MLP, the weights are chosen so that one mask alone decides where dx is zero:

    gate    W of gate and up are 1 in one column, B of up is 0:    dx is D(ds A) in every other column
    up      the same with gate and up exchanged
    down    W of all layers and B of gate and up are 0, except that one block of W of gate and up is the unit matrix:
            dx is D(ds A) of that block of h, times a factor that the activation makes of a positive x

The same seed draws the same masks, whatever values the operands hold. A mask that keeps a share far from 1 - p fails.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lora_kernels.dropout import threshold
from lora_kernels.verify.block_problems import BlockProblem, Keeps, check_mlp, check_projections, outputs
from lora_kernels.verify.judge import Verdict, poison, wrong_share
from lora_kernels.verify.provider import BlockProvider

__all__ = ["Truth", "find_masks", "judge", "run_once"]

_FEW = 65_536

Run = Callable[[tuple[Tensor, ...]], Tensor]  # upstream gradients to dx


class Truth:
    """Exact and eager outputs of a block, cached for one problem.

    The cache is used without dropout only, because then all providers share the same outputs.
    """

    def __init__(self) -> None:
        self._problem: BlockProblem | None = None
        self._outputs: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None

    def of(self, problem: BlockProblem, keeps: Keeps) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the float64 outputs and those of PyTorch's operators in x's dtype."""
        if keeps or self._problem is not problem:
            self._problem = None if keeps else problem
            self._outputs = tuple(outputs(problem, keeps, dtype) for dtype in (torch.float64, problem.x.dtype))
        return self._outputs

    def forget(self) -> None:
        """Free the cached outputs."""
        self._problem = self._outputs = None


def judge(provider: BlockProvider, truth: Truth, seed: int = 1) -> Verdict:
    """Run a provider once, forward and backward, and check its results against float64."""
    problem = provider.problem
    keeps = find_masks(problem, provider.leaves, lambda dys: run_once(provider, dys, seed)["dx"])
    for name, keep in keeps.items():
        reason = wrong_share(keep, threshold(problem.layers[name].dropout_p) / 65536)
        if reason:
            return Verdict(f"{name}: {reason}", float("inf"), "share of elements kept")
    poison(*problem.dys, problem.x, *(t for q in problem.adapted.values() for t in (q.lora_A, q.lora_B)))
    actual = run_once(provider, problem.dys, seed)
    if provider.rule == "peer" or problem.activation:
        findings = check_mlp(actual, *truth.of(problem, keeps), problem.x.dtype, problem.summed)
        rule = "rms error at most twice that of PyTorch's operators"
    else:
        findings = check_projections(actual, problem, keeps, split=provider.rule == "operators")
        rule = "numerics rules 1 and 2"
    worst = max(max(f.rule_1, f.rule_2 or 0.0) for f in findings)
    return Verdict("; ".join([f.message for f in findings if not f.ok][:3]), worst, rule)


def run_once(provider: BlockProvider, dys: tuple[Tensor, ...], seed: int) -> dict[str, Tensor]:
    """Run the provider after `torch.manual_seed(seed)` and return its outputs and gradients by name."""
    torch.manual_seed(seed)
    ys = provider.forward()
    named = dict(zip(provider.problem.ys, (y.detach() for y in ys), strict=True))
    return named | dict(zip(provider.leaves, provider.backward(ys, dys), strict=True))


def find_masks(problem: BlockProblem, leaves: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
    """Return the masks that a block draws, by layer: bool, `[M, in]` of that layer.

    Args:
        problem: The block; its tensors are changed temporarily.
        leaves: The tensors that the block reads, which may be copies of the problem's.
        run: Runs the block with the given upstream gradients, always from the same seed, and returns dx.
    """
    dropping = [name for name, q in problem.adapted.items() if q.dropout_p]
    if not problem.activation:
        return {name: _of_projection(problem, name, run) for name in dropping}
    down = list(problem.layers)[2]
    return {
        name: _of_down(problem, leaves, run) if name == down else _of_input(problem, leaves, name, run)
        for name in dropping
    }


def _of_projection(problem: BlockProblem, name: str, run: Run) -> Tensor:
    weights = [q.weight for q in problem.layers.values()]
    alone = tuple(
        dy if other == name else torch.zeros_like(dy) for other, dy in zip(problem.layers, problem.dys, strict=True)
    )
    with _changed(weights, lambda t: t.zero_()):
        return _nonzero(run, alone)


def _of_input(problem: BlockProblem, leaves: dict[str, Tensor], name: str, run: Run) -> Tensor:
    gate, up, _ = problem.layers
    pair = [problem.layers[gate].weight, problem.layers[up].weight]
    quiet = _present(leaves, (up if name == gate else gate,))
    keep = torch.zeros_like(problem.x, dtype=torch.bool)
    with _changed(quiet, lambda t: t.zero_()), _changed([leaves["dx"]], lambda t: t.abs_().add_(0.5)):
        for column in (0, problem.x.shape[1] - 1):

            def one_column(t: Tensor, column: int = column) -> None:
                t.zero_()
                t[:, column] = 1

            with _changed(pair, one_column):
                seen = _nonzero(run, problem.dys)
            # the weights, not the mask, decide this column; the other iteration shows its mask
            seen[:, column] = False
            keep |= seen
    return keep


def _of_down(problem: BlockProblem, leaves: dict[str, Tensor], run: Run) -> Tensor:
    gate, up, down = problem.layers.values()
    (hidden, k), blocks = gate.weight.shape, []
    quiet = _present(leaves, list(problem.layers)[:2])
    with (
        _changed([down.weight, *quiet], lambda t: t.zero_()),
        _changed([leaves["dx"]], lambda t: t.abs_().add_(0.5)),
    ):
        for first in range(0, hidden, k):
            width = min(k, hidden - first)

            def unit(t: Tensor, first: int = first, width: int = width) -> None:
                t.zero_()
                t[first : first + width, :width].fill_diagonal_(1)

            with _changed([gate.weight, up.weight], unit):
                blocks.append(_nonzero(run, problem.dys)[:, :width])
    return torch.cat(blocks, 1)


def _present(leaves: dict[str, Tensor], names: Sequence[str]) -> list[Tensor]:
    """Return B of those named layers that have an adapter."""
    return [leaves[f"dB {name}"] for name in names if f"dB {name}" in leaves]


def _nonzero(run: Run, dys: tuple[Tensor, ...]) -> Tensor:
    """Mark where dx is not zero.

    In a large dx a sum may cancel to zero by chance, but hardly for two gradients: a second one is run as well.
    """
    seen = run(dys) != 0
    return seen if seen.numel() < _FEW else seen | (run(tuple(dy.roll(1, 0) for dy in dys)) != 0)


@contextlib.contextmanager
def _changed(tensors: list[Tensor], change: Callable[[Tensor], object]) -> Iterator[None]:
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
