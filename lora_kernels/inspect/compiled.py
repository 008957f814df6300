"""The kernels that a layer or a block launches, compiled for an imagined GPU, read, and checked against the budgets."""

import itertools
import os
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch

from lora_kernels import plan
from lora_kernels.inspect.binary import Facts, read
from lora_kernels.inspect.budgets import broken

__all__ = ["CASES", "DTYPES", "QUICK", "Case", "Kernel", "compile_case", "describe", "problem"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """A layer, or several layers of one x, to launch forward and backward.

    Attributes:
        m: Rows.
        k: in_features.
        n: out_features.
        r: Rank.
        dtype: "bf16", "fp16" or "fp32".
        p: Dropout probability.
        bias: Whether the layer has a bias.
        strided: Whether no two elements of an operand are adjacent and no operand is aligned to 16 bytes.
        tf32: Whether fp32 products may use TF32.
        accumulate: Whether gradients are added to existing ones.
        strategy: Form of the large products.
        place: Place of the large products' tile among the shipped ones; the rule's tile for None or a place past the
            last.
        others: out_features of further projections of the same x, of the same rank.
        activation: Activation of a gated MLP with n out_features in gate and up and k in down; "" for no MLP.
        fp32_adapters: Whether A and B are in fp32, whatever the dtype of x.
        mixed: Whether only the first of several projections has dropout.
    """

    m: int
    k: int
    n: int
    r: int
    dtype: str = "bf16"
    p: float = 0.0
    bias: bool = False
    strided: bool = False
    tf32: bool = False
    accumulate: bool = False
    strategy: str = "fused"
    place: int | None = None
    others: tuple[int, ...] = ()
    activation: str = ""
    fp32_adapters: bool = False
    mixed: bool = False

    def __str__(self) -> str:
        words = _flag_words(self, "bias", "strided", "tf32", "accumulate", "fp32_adapters", "mixed")
        tile = [] if self.place is None else [f"tile {self.place}"]
        widths = "+".join(map(str, (self.n, *self.others)))
        mlp = [f"mlp {self.activation}"] if self.activation else []
        return " ".join([f"{self.m}x{self.k}x{widths} r={self.r} {self.dtype} p={self.p:g}", *mlp, *words, *tile])


_LARGE = (8192, 4096, 4096)
_SMALL = (2048, 1024, 1024)
_MLP = (8192, 4096, 14336)
# Keys and values of Llama-8B, beside its queries.
_QKV = (1024, 1024)
# Cases for every kernel and every rule of the budgets.
QUICK = (
    Case(*_LARGE, 16, bias=True, place=0), Case(*_LARGE, 16, p=0.1, place=0), Case(16, 4096, 4096, 16, p=0.1),
    Case(*_SMALL, 16, "fp32", p=0.1), Case(*_LARGE, 16, p=0.1, others=_QKV), Case(*_MLP, 16, p=0.1, activation="silu"),
    Case(*_LARGE, 16, p=0.1, others=_QKV, mixed=True), Case(*_MLP, 16, activation="silu"),
)  # fmt: skip
# Cases for every tile of every path and for every flag.
CASES = (
    *QUICK,
    *(Case(*_LARGE, 16, place=place) for place in range(8)),
    *(Case(*_LARGE, 16, p=0.1, place=place) for place in range(1, 5)),
    *(Case(*_SMALL, 16, p=0.1, strided=True, place=place) for place in range(4)),
    Case(*_SMALL, 16, strided=True), Case(*_LARGE, 32, p=0.1), Case(*_LARGE, 64), Case(*_LARGE, 64, p=0.1),
    Case(16, 4096, 4096, 16), Case(*_LARGE, 16, accumulate=True), Case(*_LARGE, 16, "fp16", p=0.1),
    # The thin product alone, forward and backward; the library's product beside it is next to nothing here.
    Case(8192, 64, 4096, 16, bias=True, strategy="beta1"), Case(8192, 4096, 64, 16, strategy="beta1"),
    Case(8192, 4096, 64, 16, p=0.1, strategy="beta1"),
    Case(*_SMALL, 16, "fp32", bias=True), Case(*_SMALL, 64, "fp32", p=0.1),
    *(Case(*_SMALL, 16, "fp32", p=0.1, tf32=True, place=place) for place in range(2)),
    Case(16, 1024, 1024, 16, "fp32", tf32=True), Case(*_SMALL, 16, "fp32", tf32=True, others=(256, 256)),
    Case(*_SMALL, 16, "fp32", p=0.1, tf32=True, activation="silu"),
    Case(*_SMALL, 16, "fp32", p=0.1, strided=True),
    # Queries, keys and values; gate and up.
    Case(*_LARGE, 16, others=_QKV), Case(*_LARGE, 16, bias=True, others=_QKV), Case(*_LARGE, 64, others=_QKV),
    Case(*_LARGE, 64, p=0.1, others=_QKV), *(Case(16, 4096, 4096, 16, p=p, others=_QKV) for p in (0.0, 0.1)),
    Case(16, 4096, 4096, 16, p=0.1, others=_QKV, mixed=True),
    # as many projections as a launch takes
    Case(*_LARGE, 16, p=0.1, others=(*_QKV, 1024)), Case(*_LARGE, 16, others=(*_QKV, 1024)),
    Case(*_LARGE, 64, p=0.1, others=(*_QKV, 1024), mixed=True), Case(16, 4096, 4096, 16, p=0.1, others=(*_QKV, 1024)),
    Case(*_SMALL, 16, "fp32", p=0.1, others=(256, 256)), Case(*_SMALL, 16, p=0.1, strided=True, others=(256, 256)),
    *(Case(8192, 4096, 14336, 16, p=p, others=(14336,)) for p in (0.0, 0.1)),
    Case(*_MLP, 64, activation="silu"),
    *(Case(*_MLP, 16, activation=activation) for activation in ("gelu", "gelu_tanh", "relu2")),
    *(Case(*_SMALL, 16, "fp32", p=p, activation="silu") for p in (0.0, 0.1)),
    Case(*_SMALL, 16, p=0.1, strided=True, activation="silu"),
    # PEFT's default: adapters in fp32.
    *(Case(*_LARGE, r, p=p, fp32_adapters=True) for r in (16, 64) for p in (0.0, 0.1)),
    *(Case(16, 4096, 4096, r, fp32_adapters=True) for r in (16, 64)),
    *(Case(*_LARGE, r, p=p, others=_QKV, fp32_adapters=True) for r in (16, 32) for p in (0.0, 0.1)),
    Case(*_LARGE, 64, p=0.1, others=_QKV, fp32_adapters=True),
    *(Case(*_MLP, 16, p=p, activation="silu", fp32_adapters=True) for p in (0.0, 0.1)),
)  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel: the case that launches it, its properties, and the budgets it breaks.

    Attributes:
        arch: "sm_90" or "gfx942".
        name: "shrink", "matmul_expand" or "wgrad".
        case: The first case that launches it.
        backward: Whether the first launch is in the backward pass.
        constants: Compile-time constants by name.
        num_warps: Warps a program.
        num_stages: Stages of the software pipelines.
        programs: Programs of the launch.
        hash: Triton's name for the binary.
        facts: Properties read from the binary.
        broken: The budgets that the kernel breaks, in words.
    """

    arch: str
    name: str
    case: Case
    backward: bool
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    programs: int
    hash: str
    facts: Facts
    broken: tuple[str, ...] = ()

    @property
    def sides(self) -> tuple[int, ...]:
        """Return the sides of the tile."""
        return tuple(self.constants[side] for side in _SIDES.get(self.name, ()))

    @property
    def tile(self) -> str:
        """Return the tile in words, for example 128x256x64."""
        return "x".join(map(str, self.sides))

    @property
    def flags(self) -> str:
        """Return the words that distinguish the kernel from others of the same tile."""
        words = [word for flag, word in _FLAGS.items() if _is_set(self.constants.get(flag))]
        words += [activation] if (activation := self.constants.get("ACTIVATION")) else []
        counts = ((self.constants.get(flag, 0), word, usual) for flag, (word, usual) in _COUNTS.items())
        words += [f"{n} {word}" for n, word, usual in counts if n > usual]
        tf32 = self.constants.get("PRECISION") == "tf32"
        words += ["tf32"] if tf32 else []
        return " ".join([*words, *_flag_words(self.case, "strided", "fp32_adapters", "mixed")])

    def __str__(self) -> str:
        made = f"{self.num_warps} warps {self.num_stages} stages"
        return f"{self.arch} {self.name} {self.case.dtype} {self.tile} {made} {self.flags}".rstrip()


def _flag_words(case: Case, *flags: str) -> list[str]:
    """Return those of the flags that are set in a case, in words."""
    return [flag.replace("_", " ") for flag in flags if getattr(case, flag)]


def _is_set(flag: Any) -> bool:
    """Return whether a flag is set; of a flag with a value per row, whether any value is set."""
    return any(flag) if isinstance(flag, tuple) else bool(flag)


_SIDES = {
    "shrink": ("BLOCK_M", "BLOCK_K", "BLOCK_R"),
    "matmul_expand": ("BLOCK_M", "BLOCK_N", "BLOCK_K"),
    "wgrad": ("BLOCK_M", "BLOCK_W", "BLOCK_T"),
}
_FLAGS = {"USE_TMA": "tma", "HAS_BIAS": "bias", "HAS_KEEP": "masked", "NUM_MASKED": "masked", "HAS_DROPOUT": "dropout",
          "HAS_SHRINK": "shrinks", "ACCUMULATE": "adds"}  # fmt: skip
# Counts to name where they exceed those of one layer: adapters of a thin product, products and results of a large one.
_COUNTS = {"ROWS": ("rows", 1), "NUM_SOURCES": ("in", 2), "NUM_MASKED": ("masks", 1), "NUM_OUTPUTS": ("out", 1)}


def problem() -> str:
    """Return why this process cannot compile kernels, or ""; also turn Triton's interpreter off before its import."""
    if "triton" in sys.modules and plan.interpreting():
        return "Triton was imported with its interpreter; run this in a process of its own."
    # Triton reads TRITON_INTERPRET when it is imported, which happens after this.
    os.environ.pop("TRITON_INTERPRET", None)
    return plan.backend.triton_problem()


def compile_case(case: Case, arch: str, seen: set[str]) -> list[Kernel]:
    """Launch a layer's forward and backward on an imagined GPU, and read each kernel whose hash is not in `seen`.

    Args:
        case: The layer.
        arch: The GPU's architecture.
        seen: Hashes of known kernels; the function adds the new ones.
    """
    from lora_kernels.kernels._imagined import GPUS, imagine

    precision = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if case.tf32 else "ieee"
    try:
        with imagine(GPUS[arch]) as launched, plan.forced(case.strategy, case.place):
            ys = _forward(case)
            forward = len(launched)
            torch.autograd.backward(ys, [torch.empty_like(y) for y in ys])
    finally:
        torch.backends.cuda.matmul.fp32_precision = precision
    kernels = []
    for position, launch in enumerate(launched):
        if launch.kernel.hash not in seen:
            seen.add(launch.kernel.hash)
            kernels.append(describe(launch, case, arch, backward=position >= forward))
    return kernels


def describe(launch: Any, case: Case, arch: str, backward: bool = False) -> Kernel:
    """Read the kernel of a launch and check the kernel against the budgets.

    Args:
        launch: A launch that `imagine` recorded.
        case: The case that launched it.
        arch: The GPU's architecture.
        backward: Whether the launch is in the backward pass.
    """
    from lora_kernels.kernels._imagined import GPUS

    compiled = launch.kernel
    names = compiled.src.fn.arg_names
    constants = {names[path[0]]: value for path, value in compiled.src.constants.items() if len(path) == 1}
    kernel = Kernel(
        arch, compiled.name.strip("_").removesuffix("_kernel"), case, backward,
        {name: value for name, value in constants.items() if name.isupper() and len(name) > 1},
        compiled.metadata.num_warps, compiled.metadata.num_stages, launch.programs, compiled.hash,
        read(compiled, GPUS[arch].shared_per_sm),
    )  # fmt: skip
    return replace(kernel, broken=tuple(broken(kernel, GPUS[arch])))


def _forward(case: Case) -> tuple[torch.Tensor, ...]:
    """Run the forward pass on tensors that are allocated and never touched; return the output of each projection."""
    from lora_kernels.autograd.linear import LoRALinearFunction
    from lora_kernels.autograd.mlp import LoRAMLPFunction
    from lora_kernels.autograd.projections import LoRAProjectionsFunction

    def make(*shape: int, grad: bool = True, dtype: torch.dtype = DTYPES[case.dtype]) -> torch.Tensor:
        if case.strided:
            # No two elements are adjacent, and the first is not on 16 bytes.
            return torch.empty(*shape[:-1], 2 * shape[-1] + 3, dtype=dtype)[..., 1:-2:2].requires_grad_(grad)
        return torch.empty(shape, dtype=dtype, requires_grad=grad)

    def projection(n: int, k: int = case.k) -> tuple[torch.Tensor | None, ...]:
        bias, own = make(n, grad=False) if case.bias else None, DTYPES["fp32" if case.fp32_adapters else case.dtype]
        return make(n, k, grad=False), make(case.r, k, dtype=own), make(n, case.r, dtype=own), bias

    x, first = make(case.m, case.k), projection(case.n)
    # Scaling, drop probability, and whether backward may add to gradients itself, for each projection.
    numbers = [(2.0, 0.0 if case.mixed and i else case.p, False) for i in range(4)]
    if case.activation:
        tensors = itertools.chain(first, projection(case.n), projection(case.k, case.n))
        return (LoRAMLPFunction.apply(x, "triton", case.activation, False, tuple(numbers[:3]), *tensors),)
    if case.others:
        tensors = itertools.chain(first, *map(projection, case.others))
        return LoRAProjectionsFunction.apply(x, "triton", tuple(numbers[: 1 + len(case.others)]), *tensors)
    if case.accumulate:
        for adapter in first[1:3]:
            adapter.grad = torch.empty_like(adapter)
    return (LoRALinearFunction.apply(x, *first, 2.0, case.p, "triton", case.accumulate),)
