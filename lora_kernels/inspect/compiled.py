"""The kernels that a layer or a block launches, compiled for an imagined GPU, read, and checked against the budgets."""

import itertools
import os
import sys
from dataclasses import replace
from typing import Any

import torch

from lora_kernels import plan
from lora_kernels.activations import ACTIVATIONS
from lora_kernels.constants import DTYPES
from lora_kernels.inspect.binary import read
from lora_kernels.inspect.budgets import broken_budgets
from lora_kernels.inspect.kernel import Case, Kernel

__all__ = ["CASES", "QUICK", "compile_case", "describe", "problem"]

_LARGE = (8192, 4096, 4096)
_SMALL = (2048, 1024, 1024)
_MLP = (8192, 4096, 14336)
# Keys and values of Llama-8B, beside its queries.
_QKV = (1024, 1024)
# Gate and up of Mixtral-8x7B at 8192 tokens, of gpt-oss-20b, and of Qwen3-30B-A3B.
_EXPERTS, _TURNED_EXPERTS, _MANY_EXPERTS = (16384, 4096, 28672), (32768, 2880, 5760), (65536, 2048, 1536)
# Weights as they are stored: how a `Case` names them.
STORED = ("nf4", "nf4 nested", "fp8 block", "fp8 row", "int8")
# Cases for every kernel and every rule of the budgets.
QUICK = (
    Case(*_LARGE, 16, bias=True, place=0), Case(*_LARGE, 16, p=0.1, place=0), Case(16, 4096, 4096, 16, p=0.1),
    Case(*_SMALL, 16, "fp32", p=0.1), Case(*_LARGE, 16, p=0.1, others=_QKV), Case(*_MLP, 16, p=0.1, activation="silu"),
    Case(*_LARGE, 16, p=0.1, others=_QKV, mixed=True), Case(*_MLP, 16, activation="silu"),
    *(Case(*_LARGE, 0, storage=storage) for storage in STORED), Case(*_SMALL, 0, "fp32", storage="nf4 nested"),
    *(Case(*_EXPERTS, 16, groups=8, place=place) for place in (0, 1, 3)),
)  # fmt: skip
# Cases for every tile of every path and for every flag.
CASES = (
    *QUICK,
    *(Case(*_LARGE, 16, place=place) for place in range(8)),
    *(Case(*_LARGE, 16, p=0.1, place=place) for place in range(1, 5)),
    *(Case(*_SMALL, 16, p=0.1, strided=True, place=place) for place in range(4)),
    Case(*_SMALL, 16, strided=True), Case(*_LARGE, 32, p=0.1), Case(*_LARGE, 64), Case(*_LARGE, 64, p=0.1),
    Case(16, 4096, 4096, 16), Case(*_LARGE, 16, accumulate=True), Case(*_LARGE, 16, "fp16", p=0.1),
    # The thin product alone, forward and backward; the library's product takes almost no time in these cases.
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
    *(Case(*_MLP, 16, activation=activation) for activation in ACTIVATIONS if activation != "silu"),
    *(Case(*_SMALL, 16, "fp32", p=p, activation="silu") for p in (0.0, 0.1)),
    Case(*_SMALL, 16, p=0.1, strided=True, activation="silu"),
    # Rows that do not lie on 16 elements; the library computes the large products.
    *(
        Case(2048, 1032, 1024, r, p=0.1, strategy="beta1", others=others)
        for r in (16, 64) for others in ((), (256, 256))
    ),
    *(Case(2048, 1024, 1032, r, p=p, strategy="beta1", activation="silu") for r in (16, 64) for p in (0.0, 0.1)),
    Case(2048, 1032, 1024, 16, p=0.1, strategy="beta1", fp32_adapters=True),
    Case(2048, 1024, 1032, 16, p=0.1, strategy="beta1", activation="silu", fp32_adapters=True),
    # PEFT's default: adapters in fp32.
    *(Case(*_LARGE, r, p=p, fp32_adapters=True) for r in (16, 64) for p in (0.0, 0.1)),
    *(Case(16, 4096, 4096, r, fp32_adapters=True) for r in (16, 64)),
    *(Case(*_LARGE, r, p=p, others=_QKV, fp32_adapters=True) for r in (16, 32) for p in (0.0, 0.1)),
    Case(*_LARGE, 64, p=0.1, others=_QKV, fp32_adapters=True),
    *(Case(*_MLP, 16, p=p, activation="silu", fp32_adapters=True) for p in (0.0, 0.1)),
    *(Case(*_SMALL, 0, "fp16", storage=storage) for storage in STORED),
    *(Case(*shape, 0, "fp32", storage=storage) for shape in (_SMALL, _LARGE) for storage in STORED),
    # Groups: every tile, layout, rank and dtype; few rows; a trained W.
    *(Case(*_EXPERTS, 16, groups=8, place=place) for place in (2, 4, 5)),
    *(Case(*_TURNED_EXPERTS, 16, groups=32, bias=True, transposed=True, place=place) for place in (0, 1, 3)),
    *(Case(*_MANY_EXPERTS, r, groups=128) for r in (16, 64)), Case(64, 2048, 1536, 16, groups=128),
    Case(*_MANY_EXPERTS, 16, groups=128, fp32_adapters=True), Case(*_MANY_EXPERTS, 16, "fp16", groups=128),
    *(Case(*_SMALL, 16, "fp32", groups=8, tf32=tf32) for tf32 in (False, True)),
    *(Case(*_SMALL, 16, groups=8, strided=True, place=place) for place in range(4)),
    Case(2048, 1032, 1024, 16, groups=8),
    # rows off 16 elements, and a last block that is short
    *(Case(8, 1033, 1023, 0, storage=storage) for storage in STORED),
)  # fmt: skip


def problem() -> str:
    """Return why this process cannot compile kernels, or ""; also turn Triton's interpreter off before its import."""
    if "triton" in sys.modules and plan.is_interpreting():
        return "Triton was imported with its interpreter; run this in a process of its own."
    # Triton is imported later and reads TRITON_INTERPRET then.
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
        with imagine(GPUS[arch]) as launched, plan.force_form(case.strategy, case.place):
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
    return replace(kernel, broken=tuple(broken_budgets(kernel, GPUS[arch])))


def _dequantize(case: Case) -> None:
    """Dequantise a weight of zeros, so that lookups are the same from run to run."""
    from lora_kernels.kernels import dequantize
    from lora_kernels.quantized import Nested, QuantizedWeight

    (n, k), (kind, *how) = (case.n, case.k), case.storage.split()
    if kind == "nf4":
        packed, blocks = torch.zeros(-(-n * k // 2), 1, dtype=torch.uint8), -(-n * k // 64)
        nested = Nested(torch.zeros(256), torch.zeros(-(-blocks // 256)), torch.zeros(())) if how else None
        absmax = torch.zeros(blocks, dtype=torch.uint8 if how else torch.float32)
        weight = QuantizedWeight.nf4(packed, absmax, shape=(n, k), nested=nested)
    elif kind == "fp8":
        scales = (-(-n // 128), -(-k // 128)) if how == ["block"] else (n,)
        weight = QuantizedWeight.from_fp8(torch.zeros(n, k, dtype=torch.float8_e4m3fn), torch.zeros(scales))
    else:
        weight = QuantizedWeight.from_int8(torch.zeros(n, k, dtype=torch.int8), torch.zeros(n))
    dequantize(weight, DTYPES[case.dtype])


def _grouped(case: Case, make: Any) -> torch.Tensor:
    """Run the forward pass of groups of rows on tensors that `make` allocates."""
    from lora_kernels.autograd.grouped import LoRAGroupedLinearFunction

    groups, own = case.groups, DTYPES["fp32" if case.fp32_adapters else case.dtype]
    weight = (
        make(groups, case.k, case.n, grad=False).mT if case.transposed else make(groups, case.n, case.k, grad=False)
    )
    bias = make(groups, case.n, grad=False) if case.bias else None
    adapters = make(groups, case.r, case.k, dtype=own), make(groups, case.n, case.r, dtype=own)
    offsets = torch.zeros(groups + 1, dtype=torch.int32)
    return LoRAGroupedLinearFunction.apply(
        make(case.m, case.k), weight, offsets, bias, ((2.0,), "triton"), *adapters
    )  # fmt: skip


def _forward(case: Case) -> tuple[torch.Tensor, ...]:
    """Run the forward pass on tensors that are allocated and never touched; return the output of each projection.

    A stored weight is dequantised, and nothing is returned.
    """
    if case.storage:
        _dequantize(case)
        return ()
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

    if case.groups:
        return (_grouped(case, make),)
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
    return (LoRALinearFunction.apply(x, *first, (2.0, case.p, "triton", case.accumulate, None)),)
