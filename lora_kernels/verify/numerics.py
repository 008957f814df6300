"""The error rules that every backend is held to, and the float64 truth behind them.

A `Problem` is one call and one upstream gradient. `exact` computes its outputs in float64 from the same rounded
inputs. `bounds` computes, before anything runs, how far each element may be from the exact one:

    u     unit roundoff of the dtype: 2^-8 bf16, 2^-11 fp16, 2^-24 fp32, 2^-53 fp64
    eta   half its smallest subnormal, because rounding errors of subnormals are absolute
    g(n)  (n + 8) · u_acc: a sum of n products, in any order, in the accumulator (fp32, or fp64 for fp64)

    E_s  = u|s| + eta + (g(K) + u_d)|scaling x_d||A|ᵀ      s and ds are stored once in the dtype
    E_ds = u|ds| + eta + g(N)·|scaling dy||B|              u_d = u where D(x) may be rounded
    E_y  = g(K + r)(|x||W|ᵀ + |s||B|ᵀ + |bias|) + E_s|B|ᵀ
    E_dx = g(N + r)(|dy||W| + D(|ds||A|)) + D(E_ds|A|)
    E_dA = (g(M) + u_d)|ds|ᵀ|x_d| + E_dsᵀ|x_d|
    E_dB = g(M)|dy|ᵀ|s| + |dy|ᵀE_s
    E_dbias = g(M) Σ|dy|

Where x or dy carry errors e_x or e_dy of their own (`propagate_errors`), |x| above becomes |x| + e_x, e_x is added to
each g(·)|x|, and |ds|ᵀe_x_d to E_dA. The same holds for dy.

Where several projections of one x share a dx, E_dx is the sum of their E_dx, with g of the length of the whole sum.

    rule 1, every element:                  |T - T64| <= 1.05 (E_T + u(|T64| + E_T) + eta)
    rule 2, enough independent errors:      rms(T - T64) <= max(2 rms(T_eager - T64), c rms(T64)) + u rms(T64)
    rule 3, pooled over many problems:      rms ratio to eager <= 1.10, and <= 0.90 for y and dx in 16 bit

where `T_eager` is the result of PyTorch's operators in the same dtype with the same mask (`eager`). c = u_acc sqrt(n/6)
bounds the relative rms error of n products summed one after the other (docs/math.md). A sequential sum is right, but
less accurate than that of a library that splits it, as cuBLAS does for one row. n counts the terms of T's own sum and
of the sums it inherits errors from:

    y   K + 2r        dx   N + 2r        dA   M + N        dB   M + K

NaN or inf where the truth is finite fails. Rule 2 needs 2,048 elements, and for d_lora_A and d_lora_B also
M·r >= 256: whatever their size, they inherit the errors of the M·r numbers ds or s, and with few such numbers either
side may be more accurate by luck. The limits are the same on every machine. Derivation of the form: Higham, "Accuracy
and Stability of Numerical Algorithms", 2nd ed., §3.5 (inner products).
"""

import functools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from lora_kernels import reference
from lora_kernels.quantized import QuantizedWeight

__all__ = [
    "RULE_2_INHERITED", "RULE_2_SIZE", "SLACK", "Finding", "Problem", "allowed_error", "allowed_rms", "bounds", "check",
    "check_shared_dx", "compare", "eager", "error_after_rounding", "exact", "propagate_errors", "rms", "shared_dx",
    "terms", "unit_roundoff",
]  # fmt: skip

_UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float64: 2.0**-53}
_ETA = {torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25, torch.float32: 2.0**-150, torch.float64: 0.0}
SLACK = 1.05
RULE_2_SIZE = 2048
RULE_2_INHERITED = 256


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return the largest relative error of one rounding to `dtype`."""
    return _UNIT[dtype]


@dataclass(frozen=True)
class Problem:
    """One call of the layer and the gradient that flows back into it.

    Attributes:
        x: `[*, in]`. The layer computes in its dtype.
        weight: `[out, in]`.
        lora_A: `[r, in]`, rounded to x's dtype before use if it is wider.
        lora_B: `[out, r]`, rounded as lora_A is.
        dy: `[*, out]`.
        bias: `[out]` or None.
        scaling: Multiplies the low-rank term.
        dropout_p: Drop probability.
        keep: The dropout mask used, bool of x's shape; None without dropout.
        stored: A quantised weight as it is stored, under the name ""; `weight` is then its dense W.

    A problem also reads as a `block_problems.BlockProblem` of one layer, whose name is "".
    """

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    dy: Tensor
    bias: Tensor | None = None
    scaling: float = 1.0
    dropout_p: float = 0.0
    keep: Tensor | None = None
    stored: Mapping[str, QuantizedWeight] = field(default_factory=dict)
    activation: ClassVar[str] = ""
    ys: ClassVar[tuple[str, ...]] = ("y",)

    @property
    def dys(self) -> tuple[Tensor, ...]:
        """Return the upstream gradient of each output."""
        return (self.dy,)

    @property
    def layers(self) -> dict[str, "Problem"]:
        """Return the problem as the only layer of a block, named ""."""
        return {"": self}

    @property
    def kept_weight(self) -> Tensor | QuantizedWeight:
        """Return the weight as a call takes it: quantised if it is stored so, else dense."""
        return self.stored.get("", self.weight)

    @property
    def terms_summed(self) -> dict[str, int]:
        """Return the n of rule 2 (see `terms`) for each output."""
        return terms(self)

    def output_dtypes(self) -> dict[str, torch.dtype]:
        """Return the dtype each output is rounded to: x's, and the adapters' own for their gradients."""
        dtypes = dict(y=self.x.dtype, dx=self.x.dtype, d_lora_A=self.lora_A.dtype, d_lora_B=self.lora_B.dtype)
        return dtypes if self.bias is None else dtypes | {"dbias": self.bias.dtype}


@dataclass(frozen=True)
class Finding:
    """The result of holding one output of one call to the rules.

    Attributes:
        name: The output: y, dx, d_lora_A, d_lora_B or dbias.
        ok: Whether every rule that applies held.
        rule_1: Largest error as a fraction of rule 1's limit of its element; 1 and below passes.
        rule_2: rms error as a fraction of rule 2's limit; None with too few numbers or without an eager result.
        rms_ratio: rms error over eager's rms error; None without an eager result.
        message: What is wrong, or "".
    """

    name: str
    ok: bool
    rule_1: float
    rule_2: float | None
    rms_ratio: float | None
    message: str = ""


def exact(problem: Problem) -> dict[str, Tensor]:
    """Compute the outputs of a problem in float64 from its rounded inputs."""
    return _outputs(_as(problem, torch.float64))


def eager(problem: Problem) -> dict[str, Tensor]:
    """Compute the outputs by PyTorch's operators in the problem's own dtype: the yardstick of rules 2 and 3."""
    outputs = _outputs(_as(problem, problem.x.dtype))
    return {name: outputs[name].to(dtype) for name, dtype in problem.output_dtypes().items()}


def bounds(problem: Problem, split: bool = False) -> dict[str, Tensor]:
    """Compute rule 1's limit of each element of each output, in float64.

    Args:
        problem: The problem.
        split: Whether the base product and the low-rank part may be rounded on their own before they are summed, as
            PyTorch's operators and the hybrids with a library must. One of the two parts is rounded for y and both
            for dx, which adds u(max(|x Wᵀ|, |s Bᵀ + bias|) + E) and u(|dy W| + |D(ds A)| + E). D(x) may be rounded
            as well; kernels never round D(x), because dropout's factor multiplies their accumulators.
    """
    e, truth = propagate_errors(_as(problem, torch.float64), problem.x.dtype, split=split), exact(problem)
    return {
        name: allowed_error(e[name].reshape(truth[name].shape), truth[name], out_dtype)
        for name, out_dtype in problem.output_dtypes().items()
    }


def allowed_error(error: Tensor, truth: Tensor, dtype: torch.dtype) -> Tensor:
    """Return rule 1's limit of an output whose error is `error` before the output is rounded to `dtype`."""
    return SLACK * error_after_rounding(error, truth, dtype)


def error_after_rounding(error: Tensor, truth: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the error of a number after rounding to `dtype`, given its error before."""
    return error + _UNIT[dtype] * (truth.abs() + error) + _ETA[dtype]


def propagate_errors(
    q: Problem, dtype: torch.dtype, *, e_x: Tensor | float = 0.0, e_dy: Tensor | float = 0.0, inner: int | None = None,
    split: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """Compute E of each output and of the weight's gradient, before rounding, in float64, as matrices.

    Args:
        q: The problem, in float64.
        dtype: The dtype that s and ds are rounded to.
        e_x: How far x may be from `q.x`, `[M, in]`: each |x| above becomes |x| + e_x, and e_x is added to g(K)|x|.
        e_dy: How far dy may be from `q.dy`, `[M, out]`.
        inner: How many terms are summed to dx, N + r of them this projection's; None if dx has no others.
        split: See `bounds`.
    """
    u, eta = _UNIT[dtype], _ETA[dtype]
    u_d = u if q.keep is not None and split else 0.0
    u_acc = min(u, _UNIT[torch.float32])
    w, a, b = q.weight.abs(), q.lora_A.abs(), q.lora_B.abs()
    signed_x, signed_dy, keep = _matrices(q)
    x, dy = signed_x.abs() + e_x, signed_dy.abs() + e_dy
    (rows, k), n, r, scaling = x.shape, w.shape[0], a.shape[0], abs(q.scaling)

    def g(terms: int) -> float:
        return (terms + 8) * u_acc

    def d(t: Tensor) -> Tensor:
        return reference.dropped(t, keep, q.dropout_p)

    s = scaling * (d(signed_x) @ q.lora_A.T).abs()
    ds = scaling * (signed_dy @ q.lora_B).abs()
    e_s = u * s + eta + scaling * (d((g(k) + u_d) * x + e_x) @ a.T)
    e_ds = u * ds + eta + scaling * ((g(n) * dy + e_dy) @ b)
    g_y, g_dx, g_m = g(k + r), g(inner or n + r), g(rows)
    errors = {
        "y": (g_y * x + e_x) @ w.T + (g_y * s + e_s) @ b.T + (0 if q.bias is None else g_y * q.bias.abs()),
        "dx": (g_dx * dy + e_dy) @ w + d((g_dx * ds + e_ds) @ a),
        "d_lora_A": ((g_m + u_d) * ds + e_ds).T @ d(x),
        "d_lora_B": (g_m * dy + e_dy).T @ s + dy.T @ e_s,
        "dbias": (g_m * dy + e_dy).sum(0),
        "dweight": (g_m * dy + e_dy).T @ x,
    }
    if isinstance(e_x, Tensor):
        errors["d_lora_A"] += ds.T @ d(e_x)
        errors["dweight"] += signed_dy.abs().T @ e_x
    if split:
        parts = _parts(q)
        errors["y"] = errors["y"] * (1 + u) + u * parts["y"] + eta
        errors["dx"] = errors["dx"] * (1 + u) + u * parts["dx"] + 2 * eta
    return errors


def _parts(q: Problem) -> dict[str, Tensor]:
    """Return the sizes that separate roundings are relative to: of y the larger part, of dx the sum of both parts."""
    x, dy, keep = _matrices(q)
    base = x @ q.weight.T
    y = reference.forward(x, q.weight, q.lora_A, q.lora_B, q.bias, q.scaling, keep, q.dropout_p)
    ds = abs(q.scaling) * (dy @ q.lora_B).abs()
    return {
        "y": base.abs().maximum((y - base).abs()),
        "dx": (dy @ q.weight).abs() + reference.dropped(ds @ q.lora_A.abs(), keep, q.dropout_p),
    }


def _matrices(q: Problem) -> tuple[Tensor, Tensor, Tensor | None]:
    """Reshape x, dy and the mask to matrices of rows."""
    x, dy = q.x.reshape(-1, q.x.shape[-1]), q.dy.reshape(-1, q.dy.shape[-1])
    return x, dy, None if q.keep is None else q.keep.reshape(x.shape)


def check(
    actual: dict[str, Tensor], problem: Problem, baseline: dict[str, Tensor] | None = None, split: bool = False
) -> list[Finding]:
    """Hold outputs to rules 1 and 2.

    Args:
        actual: Output name to tensor; any subset of y, dx, d_lora_A, d_lora_B, dbias.
        problem: The problem that was computed.
        baseline: PyTorch's own outputs, for rule 2; see `eager`.
        split: See `bounds`; False for the kernels, True for the torch backend and other chains of operators.

    Returns:
        A finding for each output in `actual`, in its order.
    """
    truth, limits, dtypes, summed = exact(problem), bounds(problem, split), problem.output_dtypes(), terms(problem)
    inherited = problem.lora_A.shape[0] * (problem.x.numel() // max(problem.x.shape[-1], 1))
    findings = []
    for name, tensor in actual.items():
        few = tensor.numel() < RULE_2_SIZE or (name.startswith("d_lora") and inherited < RULE_2_INHERITED)
        beside = None if baseline is None else baseline[name]
        findings.append(compare(name, tensor, truth[name], limits[name], dtypes[name], beside, not few, summed[name]))
    return findings


def check_shared_dx(
    actual: Tensor, problems: Sequence[Problem], baselines: Sequence[Tensor] | None = None, split: bool = False
) -> Finding:
    """Hold the dx of several projections of one x to rules 1 and 2.

    Args:
        actual: dx, `[*, in]`.
        problems: The projections, all with the same x.
        baselines: PyTorch's own dx of each projection, added up for rule 2.
        split: Whether each projection's two parts, and each sum of parts, may be rounded on their own.
    """
    dtype = problems[0].x.dtype
    truth = sum(exact(q)["dx"] for q in problems)
    error = shared_dx([_as(q, torch.float64) for q in problems], dtype, split=split).reshape(truth.shape)
    beside = None if baselines is None else functools.reduce(operator.add, baselines)
    enough, summed = actual.numel() >= RULE_2_SIZE, sum(terms(q)["dx"] for q in problems)
    return compare("dx", actual, truth, allowed_error(error, truth, dtype), dtype, beside, enough, summed)


def shared_dx(
    problems: Sequence[Problem], dtype: torch.dtype, e_dys: Sequence[Tensor | float] | None = None, split: bool = False
) -> Tensor:
    """Compute E of the dx of several projections of one x, in float64, as a matrix.

    See `propagate_errors` and `check_shared_dx`.
    """
    inner = sum(q.weight.shape[0] + q.lora_A.shape[0] for q in problems)
    each = zip(problems, e_dys or [0.0] * len(problems), strict=True)
    error = sum(propagate_errors(q, dtype, e_dy=e_dy, inner=inner)["dx"] for q, e_dy in each)
    if split:
        roundings, parts = 2 * (2 * len(problems) - 1), sum(_parts(q)["dx"] for q in problems)
        error = error + roundings * (_UNIT[dtype] * (parts + error) + _ETA[dtype])
    return error


def rms(t: Tensor) -> float:
    """Return the root of the mean square, 0 for an empty tensor."""
    return t.double().square().mean().sqrt().item() if t.numel() else 0.0


def terms(problem: Problem) -> dict[str, int]:
    """Return the n of rule 2 by output: the terms of its own sum and of the sums it inherits errors from."""
    (n, k), r = problem.weight.shape, problem.lora_A.shape[0]
    rows = problem.x.numel() // max(k, 1)
    return dict(y=k + 2 * r, dx=n + 2 * r, d_lora_A=rows + n, d_lora_B=rows + k, dbias=rows)


def allowed_rms(eager_rms: float, truth_rms: float, dtype: torch.dtype, summed: int) -> float:
    """Return rule 2's limit of the rms error of an output to which `summed` terms are summed; see `terms`."""
    u = _UNIT[dtype]
    chain = min(u, _UNIT[torch.float32]) * math.sqrt(summed / 6)
    return max(2 * eager_rms, chain * truth_rms) + u * truth_rms


def compare(
    name: str, actual: Tensor, truth: Tensor, limit: Tensor, dtype: torch.dtype, baseline: Tensor | None,
    rule_2_applies: bool, summed: int,
) -> Finding:  # fmt: skip
    """Hold one output to rule 1's limits of its elements and, where it applies, to rule 2."""
    if actual.shape != truth.shape or actual.dtype != dtype:
        got, want = (f"{t} {tuple(s)}" for t, s in ((actual.dtype, actual.shape), (dtype, truth.shape)))
        return Finding(name, False, float("inf"), None, None, f"{name} is {got}, expected {want}")
    if not actual.numel():
        return Finding(name, True, 0.0, None, None)
    error = (actual.double() - truth).abs()
    if not error.isfinite().all():
        return Finding(name, False, float("inf"), None, None, f"{name} has NaN or inf in {_count(~error.isfinite())}")
    used = torch.where(error > 0, error / limit, 0.0)
    rule_1 = used.max().item()
    messages = []
    if not rule_1 <= 1:
        at = tuple(int(i) for i in (used == used.max()).nonzero()[0])
        messages.append(
            f"{name}{list(at)} is {actual[at].item():.6g}, exactly {truth[at].item():.6g}: error "
            f"{error[at].item():.3g} of {limit[at].item():.3g} allowed; beyond the bound in {_count(used > 1)}"
        )
    rule_2 = ratio = None
    if baseline is not None:
        eager_rms = rms(baseline.double() - truth)
        ratio = rms(error) / eager_rms if eager_rms else None
        # in float64 the truth has rounding errors of the same size
        if rule_2_applies and dtype != torch.float64:
            most = allowed_rms(eager_rms, rms(truth), dtype, summed)
            rule_2 = rms(error) / most if most else (float("inf") if error.any() else 0.0)
            if not rule_2 <= 1:
                messages.append(
                    f"{name} has rms error {rms(error):.3g}, {most:.3g} allowed beside eager's {eager_rms:.3g}"
                )
    return Finding(name, not messages, rule_1, rule_2, ratio, "; ".join(messages))


def _count(bad: Tensor) -> str:
    return f"{int(bad.sum())} of {bad.numel()} elements"


def _as(problem: Problem, dtype: torch.dtype) -> Problem:
    """Round the tensors to the problem's own dtype, then convert them to `dtype`."""

    def cast(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().to(problem.x.dtype).to(dtype)

    return replace(
        problem,
        **{name: cast(getattr(problem, name)) for name in ("x", "weight", "lora_A", "lora_B", "dy", "bias")},
    )


def _outputs(problem: Problem) -> dict[str, Tensor]:
    q, drop = problem, (problem.scaling, problem.keep, problem.dropout_p)
    outputs = {
        "y": reference.forward(q.x, q.weight, q.lora_A, q.lora_B, q.bias, *drop),
        "dx": reference.grad_x(q.dy, q.weight, q.lora_A, q.lora_B, *drop),
        "d_lora_A": reference.grad_lora_A(q.dy, q.x, q.lora_B, *drop),
        "d_lora_B": reference.grad_lora_B(q.dy, q.x, q.lora_A, *drop),
    }
    return outputs if q.bias is None else outputs | {"dbias": reference.grad_bias(q.dy)}
