"""The providers that `bench` times: this package, and its alternatives, each in its best form.

A provider takes a `Problem` and supplies a forward; autograd derives the backward. All providers read the same tensors,
and where W is quantised, the same stored ones; then the frozen layer, the floor, has a dense W.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_kernels import plan
from lora_kernels.bench.providers import unsloth
from lora_kernels.bench.providers.quantised import dequantiser, linear4bit
from lora_kernels.constants import DTYPES, HALF
from lora_kernels.functional import lora_linear
from lora_kernels.verify.numerics import Problem
from lora_kernels.verify.provider import Provider, Rounding

__all__ = [
    "PROVIDERS", "Build", "addmm_chain", "build", "chain_label", "chosen_backend", "fp32_adapters", "leaves_of",
    "names_for", "of_format", "scaled_mm", "short", "under_compile", "variants",
]  # fmt: skip

# builds a provider of a problem and a backend
Build = Callable[[Problem, str], Provider]


def build(name: str, problem: Problem, backend: str = "auto") -> Provider:
    """Build a provider of `PROVIDERS`; raises if this machine cannot run it."""
    return PROVIDERS[name](problem, backend)


def names_for(dtype: torch.dtype, backend: str, compiled: bool, quantise: str = "") -> list[str]:
    """List the providers that apply: no fp32-adapter rows where x is fp32, and no row that would repeat another."""
    names = [name for name in of_format(tuple(PROVIDERS), quantise) if compiled or "compiled" not in name]
    if dtype not in HALF:
        names = [name for name in names if "fp32" not in name]
    # with the torch backend, "ours_torch" equals "ours" and "split" the addmm chain
    return [name for name in names if name not in ("ours_torch", "split") or backend == "triton"]


def of_format(names: tuple[str, ...], quantise: str) -> tuple[str, ...]:
    """Return the providers that can take weights in a format, or dense ones if it is "".

    PEFT's layer over transformers' FP8Linear quantises x as well, so it computes something else. Unsloth has kernels of
    its own for FP8. LoRAFusion has no quantised base.
    """
    refused = {"": ("unsloth",), "fp8": ("split", "unsloth", *(name for name in names if name.startswith("peft")))}
    return tuple(name for name in names if name not in refused.get(quantise, ("split",)))


def leaves_of(problem: Problem, *names: str) -> dict[str, Tensor]:
    """Return the tensors that need gradients, by the gradient's name: all of x, A and B, or those of `names`."""
    of = {"dx": problem.x, "d_lora_A": problem.lora_A, "d_lora_B": problem.lora_B}
    return {name: of[name].detach().requires_grad_() for name in names or of}


def fp32_adapters(problem: Problem) -> Problem:
    """Cast the adapters to fp32; their values, and so the truth, stay the same."""
    return replace(problem, lora_A=problem.lora_A.float(), lora_B=problem.lora_B.float())


def _frozen_layer(problem: Problem, backend: str) -> Provider:
    leaves = leaves_of(problem, "dx")
    label = "frozen dense linear" if problem.stored else "frozen linear"
    problem = replace(problem, lora_B=torch.zeros_like(problem.lora_B), dropout_p=0.0, stored={})
    return Provider(
        label, problem, lambda: F.linear(leaves["dx"], problem.weight, problem.bias), leaves,
        cost="frozen",
    )  # fmt: skip


def chosen_backend(problem: Problem, backend: str) -> str:
    """Return the backend for a problem when a call requests `backend`."""
    return plan.choose(problem.x.device, problem.x.dtype, problem.lora_A.shape[0], False, backend)


def _ours(problem: Problem, backend: str) -> Provider:
    chosen, leaves, weight = chosen_backend(problem, backend), leaves_of(problem), problem.kept_weight

    def forward() -> Tensor:
        return lora_linear(
            leaves["dx"], weight, leaves["d_lora_A"], leaves["d_lora_B"],
            scaling=problem.scaling, bias=problem.bias, dropout_p=problem.dropout_p, backend=chosen,
        )  # fmt: skip

    fused = plan.fuses(chosen, problem.x, problem.weight, problem.lora_A.shape[0], problem.dropout_p > 0)
    rounding = Rounding.KERNELS if fused else Rounding.OPERATORS
    wide = "" if problem.lora_A.dtype == problem.x.dtype else f" {short(problem.lora_A.dtype)}"
    return Provider(f"lora_kernels [{chosen}]{wide}", problem, forward, leaves, rounding, chosen)


def _peft(problem: Problem, backend: str) -> Provider:
    """Build PEFT's own layer through PEFT; without PEFT installed, build its arithmetic."""
    try:
        peft = importlib.import_module("peft")
    except ImportError:
        if problem.stored:
            raise
        return _peft_arithmetic(problem)
    (r, k), n = problem.lora_A.shape, problem.weight.shape[0]
    model = nn.Module()
    if stored := problem.stored.get(""):
        model.linear, model.is_loaded_in_4bit = linear4bit(stored, problem.bias), True
    else:
        model.linear = nn.Linear(k, n, bias=problem.bias is not None, device="meta")
        model.linear.weight = nn.Parameter(problem.weight, requires_grad=False)
        if problem.bias is not None:
            model.linear.bias = nn.Parameter(problem.bias, requires_grad=False)
    config = peft.LoraConfig(
        r=r, lora_alpha=problem.scaling * r, lora_dropout=problem.dropout_p, target_modules=["linear"],
        init_lora_weights=False,
    )  # fmt: skip
    layer = peft.inject_adapter_in_model(config, model).linear.train()
    leaves = leaves_of(problem, "dx")
    for which, tensor in (("A", problem.lora_A), ("B", problem.lora_B)):
        module = getattr(layer, f"lora_{which}")["default"]
        module.weight = leaves[f"d_lora_{which}"] = nn.Parameter(tensor.detach())
    label = f"PEFT {'over bitsandbytes ' * bool(problem.stored)}{short(problem.lora_A.dtype)}"
    return Provider(label, problem, lambda: layer(leaves["dx"]), leaves, cost="peft")


def _peft_arithmetic(problem: Problem) -> Provider:
    leaves, p, scaling = leaves_of(problem), problem.dropout_p, problem.scaling

    def forward() -> Tensor:
        x, a, b = leaves.values()
        y = F.linear(x, problem.weight, problem.bias)
        low_rank = F.linear(F.linear(F.dropout(x.to(a.dtype), p) if p else x.to(a.dtype), a), b)
        return (y + low_rank * scaling).to(y.dtype)

    label = f"PEFT arithmetic {short(problem.lora_A.dtype)}"
    return Provider(label, problem, forward, leaves, cost="peft")


def under_compile(provider: Provider) -> Provider:
    """Wrap a provider in torch.compile with static shapes; it compiles at the first call, which is never timed."""
    forward = torch.compile(provider.forward, dynamic=False)
    return replace(provider, label=f"{provider.label}, compiled", forward=forward, cost="")


class _AddmmChain(torch.autograd.Function):
    """The best chain without custom kernels: low-rank products accumulated in place, s kept for backward.

    `make` makes W, once a pass.
    """

    @staticmethod
    def forward(ctx, x, make, lora_A, lora_B, bias, scaling, p):
        y = F.linear(x, make(), bias)
        x_d, keep = torch.native_dropout(x, p, True) if p else (x, None)
        s = scaled_mm(x_d, lora_A.t(), scaling)
        y.addmm_(s, lora_B.t())
        ctx.save_for_backward(x_d, lora_A, lora_B, s, keep)
        ctx.make, ctx.scaling, ctx.p = make, scaling, p
        return y

    @staticmethod
    def backward(ctx, dy):
        x_d, lora_A, lora_B, s, keep = ctx.saved_tensors
        ds = scaled_mm(dy, lora_B, ctx.scaling)
        dx = dy @ ctx.make()
        if keep is None:
            dx.addmm_(ds, lora_A)
        else:
            dx.addcmul_(ds @ lora_A, keep, value=1 / (1 - ctx.p))
        return dx, None, ds.t() @ x_d, dy.t() @ s, None, None, None


def addmm_chain(
    x: Tensor, make: Callable[[], Tensor], lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, scaling: float, p: float
) -> Tensor:
    """Compute y `[M, out]` of x `[M, in]` by the best chain of library calls we know, forward and backward.

    `make` returns W, `[out, in]`, which `providers.quantised.dequantiser` makes of a stored one in each pass.
    """
    return _AddmmChain.apply(x, make, lora_A, lora_B, bias, scaling, p)


def chain_label(quantised: bool) -> str:
    """Return the name of `addmm_chain` in the tables."""
    return "dequantise + addmm chain" if quantised else "in-place addmm chain"


def scaled_mm(left: Tensor, right: Tensor, alpha: float) -> Tensor:
    """Compute alpha · left right in one launch."""
    # beta=0: the first operand is not read
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=alpha)


def _addmm(problem: Problem, backend: str) -> Provider:
    leaves, make = leaves_of(problem), dequantiser(problem.kept_weight, problem.x.dtype)

    def forward() -> Tensor:
        x, a, b = leaves.values()
        return addmm_chain(x, make, a, b, problem.bias, problem.scaling, problem.dropout_p)

    return Provider(chain_label(bool(problem.stored)), problem, forward, leaves, cost="addmm")


class _SplitGraph(torch.autograd.Function):
    """LoRAFusion's scheme (arXiv:2510.00206): the graph split at s, dropped x and a byte mask stored for backward.

    Dropout and shrink are launches of their own before a fused GEMM. The published backward sums ds and dB by atomics;
    here this package's launch, which has no atomics, computes them. This package's GEMM reads the mask as bits, so the
    byte mask is packed.
    """

    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, bias, scaling, p, backend):
        ops = plan.contractions(backend)
        x_d, keep = torch.native_dropout(x, p, True) if p else (x, None)
        s, _ = ops.shrink(x_d, lora_A, scaling)
        ctx.save_for_backward(x_d, weight, lora_A, lora_B, s, keep)
        ctx.scaling, ctx.p, ctx.backend = scaling, p, backend
        return ops.matmul_expand([(x, weight), (s, lora_B)], bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x_d, weight, lora_A, lora_B, s, keep = ctx.saved_tensors
        ops = plan.contractions(ctx.backend)
        ds, d_lora_B = ops.shrink_wgrad(dy, s, lora_B, ctx.scaling, lora_B.dtype)
        d_lora_A = ops.wgrad(ds, x_d, lora_A.dtype)
        if keep is not None:
            # dropout's scale 1 / (1 - p), applied to the smallest operand
            lora_A = lora_A / (1 - ctx.p)
            keep = _pack_mask(keep) if ctx.backend == "triton" else keep
        dx = ops.matmul_expand([(dy, weight.t()), (ds, lora_A.t())], keep=keep)
        return dx, None, d_lora_A, d_lora_B, None, None, None, None


def _pack_mask(keep: Tensor) -> Tensor:
    """Pack a bool mask `[M, K]` into `[M, ceil(K/32)]` words, bit i of a word for the i-th of its 32 elements."""
    words = F.pad(keep, (0, -keep.shape[1] % 32)).view(torch.int64)
    return (_compiled_gather() if keep.is_cuda else _gather_bits)(words).view(torch.int32)


def _gather_bits(words: Tensor) -> Tensor:
    """Gather bit 0 of each byte of a word in the top byte, and return that byte: b·2^(8i) · 2^(56-7i) = b·2^(56+i)."""
    return ((words * 0x0102040810204080) >> 56).bitwise_and(255).to(torch.uint8)


@functools.cache
def _compiled_gather() -> Callable[[Tensor], Tensor]:
    # one launch in place of four
    return torch.compile(_gather_bits, dynamic=True)


def _split(problem: Problem, backend: str) -> Provider:
    chosen, leaves = chosen_backend(problem, backend), leaves_of(problem)
    if chosen == "triton" and problem.dropout_p:
        # compile here and now, not in the thread of the first backward
        with torch.no_grad():
            _pack_mask(torch.ones_like(problem.x, dtype=torch.bool))

    def forward() -> Tensor:
        x, a, b = leaves.values()
        return _SplitGraph.apply(
            x, problem.weight, a, b, problem.bias, problem.scaling, problem.dropout_p, chosen
        )  # fmt: skip

    return Provider(f"split graph [{chosen}]", problem, forward, leaves, cost="split" if chosen == "triton" else "")


def short(dtype: torch.dtype) -> str:
    """Return the tables' name of a dtype, such as bf16."""
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype)[6:])


def variants(ours: Build, peft: Build) -> dict[str, Build]:
    """Return our own provider and PEFT's by name, with fp32 adapters, on the torch backend and compiled as well."""
    return {
        "ours": ours,
        "ours_fp32": lambda problem, backend: ours(fp32_adapters(problem), backend),
        "ours_torch": lambda problem, backend: ours(problem, "torch"),
        "peft": peft,
        "peft_fp32": lambda problem, backend: peft(fp32_adapters(problem), backend),
        "peft_compiled": lambda problem, backend: under_compile(peft(problem, backend)),
        "peft_fp32_compiled": lambda problem, backend: under_compile(peft(fp32_adapters(problem), backend)),
    }


PROVIDERS: dict[str, Build] = {
    "frozen": _frozen_layer,
    **variants(_ours, _peft),
    "addmm": _addmm,
    "unsloth": unsloth.build_layer,
    "split": _split,
}
