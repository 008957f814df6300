"""The layer cases of `lora-kernels verify`: their list, and how a case is drawn, run and held to the rules."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_kernels import plan
from lora_kernels.constants import DTYPES
from lora_kernels.plan import model
from lora_kernels.verify import numerics
from lora_kernels.verify.block_problems import quantised, wrong_weights
from lora_kernels.verify.numerics import Finding, Problem
from lora_kernels.verify.problems import every_other, make_problem, run_problem, same_bits, storages, with_mask

__all__ = ["LAYOUTS", "STORED", "LayerCase", "draw", "examine", "lay_out", "matrix"]

LAYOUTS = (
    "contiguous", "x transposed", "x sliced", "W transposed", "dy expanded", "x 4-D", "bias", "fp32 adapters",
    "all sliced",
)  # fmt: skip
# layouts of a quantised W, each with the arguments of `block_problems.quantised`
STORED = {
    "nf4": ("nf4",), "nf4 unnested": ("nf4", False, 32), "nf4 fp32": ("nf4",), "fp4": ("fp4",),
    "fp8": ("fp8", False, 16), "int8": ("int8",),
}  # fmt: skip
_FP32_ADAPTERS = ("fp32 adapters", "nf4 fp32")
_QUICK_LAYOUTS = ("x transposed", "x 4-D", "bias", "all sliced", "nf4", "fp8")
_OPERANDS = ("x", "weight", "lora_A", "lora_B", "dy", "bias")


@dataclass(frozen=True)
class LayerCase:
    """One line of the table: M, K and N are the rows, inputs and outputs of the layer."""

    backend: str
    dtype: str
    m: int
    k: int
    n: int
    r: int
    layout: str = "contiguous"
    p: float = 0.0
    # form of the large products, see `lora_kernels.plan.model`; the torch backend ignores it
    form: str = "fused"

    def shape(self) -> str:
        """Format the shape as the table shows it."""
        return f"{self.m}x{self.k}x{self.n} r{self.r}"


def matrix(backend: str, dtype: str, on_gpu: bool, quick: bool) -> list[LayerCase]:
    """List the cases of a backend and a dtype."""
    fast = backend == "torch" or on_gpu
    if backend == "torch":
        shapes, base = _TORCH_SHAPES, (96, 160, 224, 8)
    elif on_gpu:
        shapes, base = _GPU_SHAPES, (1000, 1024, 1536, 16)
    else:
        shapes, base = _INTERPRETER_SHAPES, (40, 48, 56, 8)
    layouts = [one for one in (*LAYOUTS[1:], *STORED) if dtype != "fp32" or one not in _FP32_ADAPTERS]
    if quick:
        first, second = shapes[0], shapes[3]
        cases = [LayerCase(backend, dtype, *shape, p=p) for shape, p in ((first, 0.0), (first, 0.1), (second, 0.1))]
        cases += [LayerCase(backend, dtype, *base, layout, 0.1) for layout in _QUICK_LAYOUTS]
        return cases if backend == "torch" else [*cases, LayerCase(backend, dtype, *base, p=0.1, form="beta1")]
    cases = [LayerCase(backend, dtype, *shape, p=p) for shape in shapes for p in (0.0, 0.1)]
    ps = (0.0, 0.1) if fast else (0.1,)
    cases += [LayerCase(backend, dtype, *base, layout, p) for layout in layouts for p in ps]
    cases += [LayerCase(backend, dtype, *base, p=p) for p in (0.5, 0.999)]
    # with a mask, dx cannot be "padded" but y can
    if backend == "triton":
        cases += [LayerCase(backend, dtype, *base, p=p, form=form) for form in model.NAMES[1:] for p in (0.0, 0.1)]
    return cases


_GPU_SHAPES = (
    # The third shape is that of k and v of Llama-3-8B.
    (4096, 4096, 4096, 16), (1, 1, 1, 1), (2048, 4096, 1024, 8),
    (777, 1111, 1333, 17), (1, 4096, 4096, 16), (129, 255, 513, 3),
    (512, 4096, 14336, 64), (1024, 2048, 2048, 128), (333, 1000, 264, 24),
    (512, 14336, 4096, 16), (256, 1024, 1024, 256), (4095, 511, 257, 1),
)  # fmt: skip
_INTERPRETER_SHAPES = (
    (64, 64, 64, 16), (1, 1, 1, 1), (17, 33, 65, 3),
    (65, 63, 100, 17), (1, 96, 72, 8), (72, 40, 48, 24),
    (24, 40, 32, 128), (33, 72, 40, 64), (16, 16, 24, 256),
)  # fmt: skip
_TORCH_SHAPES = (
    (256, 512, 384, 16), (1, 1, 1, 1), (257, 129, 511, 3),
    (1, 512, 768, 8), (128, 1024, 256, 64), (100, 72, 1000, 17),
    (200, 256, 256, 128), (64, 1536, 384, 24), (96, 128, 192, 256),
)  # fmt: skip


def lay_out(problem: Problem, layout: str) -> Problem:
    """Give a problem's tensors the strides, or W the format, that a layout names.

    Of the strides, "dy expanded" alone changes values.
    """
    if layout in STORED:
        return quantised(problem, *STORED[layout])
    if layout == "x transposed":
        return replace(problem, x=problem.x.mT.contiguous().mT)
    if layout == "x sliced":
        return replace(problem, x=_slice_of_nans(problem.x))
    if layout == "W transposed":
        return replace(problem, weight=problem.weight.mT.contiguous().mT)
    # as the backward of y.sum(0) gives dy: all rows share one row's memory
    if layout == "dy expanded":
        return replace(problem, dy=problem.dy[:1].expand_as(problem.dy))
    if layout == "all sliced":
        return replace(problem, **{name: _slice_of_nans(getattr(problem, name)) for name in _OPERANDS[:-1]})
    if layout == "all strided":
        return replace(problem, **{name: every_other(getattr(problem, name)) for name in _OPERANDS[:-1]})
    return problem


def _slice_of_nans(t: Tensor) -> Tensor:
    """Copy t into a larger buffer of NaNs, off by one element in each dimension, so that stray accesses show."""
    buffer = t.new_full([size + 3 for size in t.shape], float("nan"))
    return buffer[tuple(slice(1, 1 + size) for size in t.shape)].copy_(t)


def draw(case: LayerCase, device: torch.device, seed: int) -> Problem:
    """Draw the problem of a case, in the case's layout and without the dropout mask."""
    batch = (2, case.m // 4, 2) if case.layout == "x 4-D" else (case.m,)
    problem = make_problem(
        batch, case.k, case.n, case.r, DTYPES[case.dtype], str(device), bias=case.layout == "bias",
        adapter_dtype=torch.float32 if case.layout in _FP32_ADAPTERS else None, dropout_p=case.p, seed=seed,
    )  # fmt: skip
    return lay_out(problem, case.layout)


def examine(case: LayerCase, device: torch.device, seed: int) -> tuple[list[Finding], list[str]]:
    """Run a case twice and hold it to the rules; return the findings and the messages of all other failures."""
    problem = with_mask(draw(case, device, seed), case.backend, seed)
    operands = {name: getattr(problem, name) for name in _OPERANDS if getattr(problem, name) is not None}
    operands |= {f"weight's tensor {i}": t for w in problem.stored.values() for i, t in enumerate(w.tensors())}
    before = storages(operands)
    with plan.force_form(case.form):
        actual, again = (run_problem(problem, case.backend, seed) for _ in range(2))
    after = storages(operands)
    messages = [f"{name} was written to" for name in before if not torch.equal(before[name], after[name])]
    messages += [f"{name} differs from run to run" for name in actual if not same_bits(actual[name], again[name])]
    messages += wrong_weights(problem, case.backend)
    split = case.backend == "torch" or case.form != "fused"
    return numerics.check(actual, problem, numerics.eager(problem), split=split), messages
