"""The block cases of `lora-kernels verify`: their list, and how a case is run and held to the rules."""

from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lora_kernels import dropout, reference, torch_backend
from lora_kernels.dropout import drop_probability
from lora_kernels.functional import lora_mlp, lora_qkv
from lora_kernels.measure.presets import MLP, QKV
from lora_kernels.passes.layer import GIVEN, Projection
from lora_kernels.verify import numerics_mlp
from lora_kernels.verify.block_problems import BlockProblem, check_projections, leaves_of, quantised, wrong_weights
from lora_kernels.verify.judge import find_masks
from lora_kernels.verify.numerics import Finding
from lora_kernels.verify.numerics_mlp import ACTIVATIONS, MLPProblem
from lora_kernels.verify.problems import every_other, make_problem, same_bits, storages
from lora_kernels.verify.stored import FORMATS

__all__ = ["BlockCase", "examine", "matrix"]


@dataclass(frozen=True)
class BlockCase:
    """One line of the table: queries, keys and values, or a gated MLP if `activation` is set.

    Attributes:
        backend: "triton" or "torch".
        dtype: Name of the dtype of x and the weights.
        m: Rows of x.
        k: in_features.
        widths: out_features of each projection; for an MLP, of gate.
        ranks: Rank of each layer; 0 is no adapter.
        ps: Drop probability of each layer.
        activation: Name of the MLP's activation; "" for queries, keys and values.
        bias: Whether the layers have a bias.
        fp32_adapters: Whether the adapters are float32.
        strided: Whether the elements of x, the weights, the adapters and dy lie two apart.
        stored: Format of quantised weights, see `stored.FORMATS`; "" for dense ones.
    """

    backend: str
    dtype: str
    m: int
    k: int
    widths: tuple[int, ...]
    ranks: tuple[int, int, int]
    ps: tuple[float, float, float]
    activation: str = ""
    bias: bool = False
    fp32_adapters: bool = False
    strided: bool = False
    stored: str = ""

    form = "fused"

    @property
    def layout(self) -> str:
        """Return the table's layout column: the block, then its weights' format, bias, fp32 adapters and strides."""
        # where weights are stored, the activation of an MLP is silu
        block = f"mlp {self.stored or self.activation}" if self.activation else f"qkv {self.stored}".strip()
        return block + (" fp32" if self.fp32_adapters else " bias" * self.bias) + " strided" * self.strided

    @property
    def p(self) -> float:
        """Return the largest drop probability."""
        return max(self.ps)

    def shape(self) -> str:
        """Format the shape as the table shows it, with every rank where the ranks differ."""
        ranks = "/".join(map(str, self.ranks[: 1 if len(set(self.ranks)) == 1 else None]))
        return f"{self.m}x{self.k}x{'+'.join(map(str, self.widths))} r{ranks}"


_ON_GPU = (1000, 1024, (1024, 256, 256), 1536, 16)
_INTERPRETED = (17, 32, (40, 16, 16), 36, 8)
_TORCH = (96, 160, (160, 32, 32), 224, 8)


def matrix(backend: str, dtype: str, on_gpu: bool, quick: bool) -> list[BlockCase]:
    """List the cases of a backend and a dtype.

    They cover grouped-query widths, ranks and dropouts that differ between layers, and every activation.
    """
    m, k, widths, hidden, r = _TORCH if backend == "torch" else _ON_GPU if on_gpu else _INTERPRETED
    same, mixed, some = (r, r, r), (r, 3, r // 2 + 1), (r, 0, 3)

    def qkv(ranks: tuple[int, int, int], ps: tuple[float, float, float], m: int = m, **more: Any) -> BlockCase:
        return BlockCase(backend, dtype, m, k, widths, ranks, ps, **more)

    def mlp(activation: str, ranks: tuple[int, int, int], ps: tuple[float, float, float], **more: Any) -> BlockCase:
        return BlockCase(backend, dtype, m, k, (hidden,), ranks, ps, activation, **more)

    fast = backend == "torch" or on_gpu
    if quick:
        return [
            qkv(mixed, (0.1, 0.0, 0.3), bias=True), mlp("silu", same, (0.0, 0.0, 0.1 if fast else 0.0)),
            qkv(some, (0.1, 0.0, 0.3), stored="nf4"), mlp("silu", same, (0.0, 0.0, 0.0), stored="nf4"),
        ]  # fmt: skip
    cases = [
        qkv(same, (0.0, 0.0, 0.0)), qkv(same, (0.1, 0.1, 0.1)), qkv(mixed, (0.1, 0.0, 0.3), bias=True),
        qkv(some, (0.0, 0.0, 0.0)), qkv(some, (0.5, 0.0, 0.0), bias=True), qkv(mixed, (0.1, 0.1, 0.1), m=1),
        *(mlp(name, same, (0.1, 0.1, 0.1) if fast or name == "silu" else (0.0, 0.0, 0.0)) for name in ACTIVATIONS),
        mlp("silu", same, (0.0, 0.0, 0.0), bias=True), mlp("silu", mixed, (0.3, 0.0, 0.1)),
        mlp("silu", some, (0.0, 0.0, 0.0)),
    ]  # fmt: skip
    for stored in FORMATS:
        cases += [
            qkv(same, (0.0, 0.0, 0.0), stored=stored), qkv(some, (0.1, 0.0, 0.3), stored=stored),
            mlp("silu", same, (0.0, 0.0, 0.0), stored=stored), mlp("silu", some, (0.1, 0.0, 0.3), stored=stored),
        ]  # fmt: skip
    if dtype != "fp32":
        wide = [cases[2], next(one for one in cases if one.activation)]
        wide += [next(one for one in cases if one.stored and bool(one.activation) == gated) for gated in (False, True)]
        cases += [replace(one, fp32_adapters=True) for one in wide]
    return cases


def examine(
    case: BlockCase, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[list[Finding], list[str]]:  # fmt: skip
    """Run a case twice and hold it to the rules; return the findings and the messages of all other failures."""
    problem = _draw(case, dtype, str(device), seed)
    operands = {f"{name}'s {field}": t for name, q in problem.layers.items()
                for field, t in zip(Projection._fields[:GIVEN], q[:GIVEN], strict=True) if t is not None}  # fmt: skip
    operands |= {f"{name}'s tensor {i}": t for name, w in problem.stored.items() for i, t in enumerate(w.tensors())}
    operands |= {"x": problem.x} | {f"the gradient of {y}": dy for y, dy in zip(problem.ys, problem.dys, strict=True)}
    before = storages(operands)
    actual, again = (_run(problem, case.backend, seed) for _ in range(2))
    after = storages(operands)
    messages = [f"{name} was written to" for name in before if not torch.equal(before[name], after[name])]
    messages += [f"{name} differs from run to run" for name in actual if not same_bits(actual[name], again[name])]
    messages += wrong_weights(problem, case.backend)
    if not problem.activation:
        keeps = _masks(problem, case.backend, seed)
        return check_projections(actual, problem, keeps, split=case.backend == "torch"), messages
    # dense weights draw the same masks
    problem = replace(problem, stored={})
    keeps = find_masks(
        problem, leaves_of(problem), lambda dys: _run(replace(problem, dys=dys), case.backend, seed)["dx"]
    )  # fmt: skip
    (dy,) = problem.dys
    mlp = MLPProblem(problem.x, *problem.layers.values(), dy, problem.activation, dict(keeps))
    named = {_name(name): t for name, t in actual.items()}
    return numerics_mlp.check(named, mlp, numerics_mlp.eager(mlp), split=case.backend == "torch"), messages


def _name(output: str) -> str:
    """Return `numerics_mlp`'s name of an output: gate.d_lora_A for "dA gate"."""
    kind, _, layer = output.partition(" ")
    return f"{layer}.d_lora_{kind[1]}" if layer else output


def _draw(case: BlockCase, dtype: torch.dtype, device: str, seed: int) -> BlockProblem:
    """Draw a block; down of an MLP maps back to the width of x."""
    hidden = case.widths[0]
    sides = [(case.k, n) for n in case.widths] if not case.activation else [(case.k, hidden)] * 2 + [(hidden, case.k)]
    problems = [
        make_problem(
            (case.m,), k, n, r, dtype, device, bias=case.bias, dropout_p=drop_probability(p), seed=seed + i,
            adapter_dtype=torch.float32 if case.fp32_adapters else None,
        )
        for i, ((k, n), r, p) in enumerate(zip(sides, case.ranks, case.ps, strict=True))
    ]  # fmt: skip
    if case.strided:
        matrices = "x", "weight", "lora_A", "lora_B", "dy"
        problems = [replace(q, **{name: every_other(getattr(q, name)) for name in matrices}) for q in problems]
    layers = {
        name: Projection(
            q.weight, *((q.lora_A, q.lora_B) if q.lora_A.numel() else (None, None)), q.bias, q.scaling,
            q.dropout_p if q.lora_A.numel() else 0.0,
        )
        for name, q in zip(MLP if case.activation else QKV, problems, strict=True)
    }  # fmt: skip
    dys = (problems[-1].dy,) if case.activation else tuple(q.dy for q in problems)
    block = BlockProblem(problems[0].x, layers, dys, case.activation)
    return quantised(block, case.stored) if case.stored else block


def _run(problem: BlockProblem, backend: str, seed: int) -> dict[str, Tensor]:
    """Run the block after `torch.manual_seed(seed)` and return its outputs and gradients by name."""
    leaves = leaves_of(problem)
    layers = [
        q if q.lora_A is None else q._replace(lora_A=leaves[f"dA {name}"], lora_B=leaves[f"dB {name}"])
        for name, q in problem.kept_layers.items()
    ]
    torch.manual_seed(seed)
    if problem.activation:
        ys = (lora_mlp(leaves["dx"], *layers, activation=problem.activation, backend=backend),)
    else:
        adapters = [None if q.lora_A is None else (q.lora_A, q.lora_B) for q in layers]
        weights, *lists = ([q[i] for q in layers] for i in (0, 3, 4, 5))
        named = dict(zip(("biases", "scaling", "dropout_p"), lists, strict=True))
        ys = lora_qkv(leaves["dx"], weights, adapters, **named, backend=backend)
    gradients = torch.autograd.grad(ys, tuple(leaves.values()), problem.dys)
    return {name: t.detach() for name, t in zip(chain(problem.ys, leaves), (*ys, *gradients), strict=True)}


def _masks(problem: BlockProblem, backend: str, seed: int) -> dict[str, Tensor]:
    """Compute the masks by the backend's own rule: from the seeds in order (kernels) or by draws in order (torch)."""
    torch.manual_seed(seed)
    dropping, (m, k) = {name: q for name, q in problem.adapted_layers.items() if q.dropout_p}, problem.x.shape
    if not dropping or backend == "torch":
        return {
            name: torch_backend.draw_mask(problem.x.shape, q.dropout_p, problem.x.device).bool()
            for name, q in dropping.items()
        }
    seeds = dropout.draw_seed(problem.x.device, len(dropping)).reshape(-1)
    return {
        name: reference.keep_mask(one, m, k, q.dropout_p).to(problem.x.device)
        for one, (name, q) in zip(seeds, dropping.items(), strict=True)
    }
