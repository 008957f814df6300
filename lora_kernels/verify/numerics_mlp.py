"""The error rules of a gated MLP: those of `numerics`, with the errors of each layer propagated to the next.

A `MLPProblem` is one call of `lora_mlp` and one upstream gradient. `numerics.propagate_errors` gives E of an output
from the errors of its layer's x and dy below, each element rounded once to the dtype (`numerics.error_after_rounding`):

    e_g, e_u     E_y of gate and up
    e_a          min(|a'(g)| e_g + ½ L₂ e_g², L₁ e_g) + 8 u_acc (|g| + |a(g)|)       a(g) in fp32
    e_a'         min(|a"(g)| e_g + ½ L₃ e_g², L₂ e_g) + 16 u_acc (1 + |g|)           a'(g) in fp32
    e_h          e_a (|u| + e_u) + |a| e_u                                           h = a(g) · u; x of down
    e_dh         E_dx of down
    e_du         of the product dh · a(g), as e_h; dy of up
    e_dg         of the product dh · u · a'(g), as e_h; dy of gate

Lᵢ bounds the i-th derivative of a. 8 and 16 units cover the fp32 errors of exp, erf, tanh, a division and a handful of
products, each within 2 units in the last place. The error of a(g) is relative to |g| because the absolute error of
1 + erf and 1 + tanh is the same for every g. That of a' is relative to |g| because of the difference in σ g (1 - σ).

What the rules can detect: every h of a row is rounded on its own, and the bound adds these errors without cancellation.
The bound is √hidden times the typical error, and √M times more in the gradients of gate's and up's A. In fp32 that is
far below any mistake. In 16 bit, rule 1 detects errors as large as the result itself, NaN, and single elements that are
far off. At real widths a right result uses a hundredth of rule 1's limit (at 3,584), and rule 2 detects the rest. An
approximation of the activation (tanh's GELU for erf's: at most 5e-4) shows in fp32 alone.

Rule 2's yardstick is `eager`: PyTorch's operators, with the activation and the product with u each rounded. Rule 2
needs M·r >= 256 for every output, with the smallest r, because every output inherits the errors of some s or ds. Its n
(`terms`) counts all sums that an output may inherit errors from, those of g twice, because an activation hardly makes
a relative error larger.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels import reference
from lora_kernels.measure.presets import MLP
from lora_kernels.reference import Layer
from lora_kernels.verify import numerics
from lora_kernels.verify.numerics import Finding, Problem

__all__ = ["ACTIVATIONS", "MLPProblem", "bounds", "check", "eager", "exact", "terms"]

_UNBOUNDED = 1e300
# bounds of |a'|, |a"| and |a'''|, found on a fine grid and rounded up
_DERIVATIVES = {
    "silu": (1.1, 0.5, 0.31),
    "gelu": (1.13, 0.8, 0.78),
    "gelu_tanh": (1.13, 0.8, 0.78),
    # a" of relu2 jumps at 0.
    "relu2": (_UNBOUNDED, 2.0, _UNBOUNDED),
}
# PyTorch's activations and not those of `lora_kernels.activations`, because the latter are under test
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu2": lambda g: F.relu(g).square(),
}
_GRADIENTS = {"lora_A": "d_lora_A", "lora_B": "d_lora_B", "bias": "dbias", "weight": "dweight"}


@dataclass(frozen=True)
class MLPProblem:
    """One call of `lora_mlp` and the gradient that flows back into it.

    Attributes:
        x: `[*, in]`. The MLP computes in its dtype.
        gate: The gate as `lora_mlp` takes it, or None.
        up: As gate, but never None; tensors of another dtype than x's are rounded to x's dtype before use.
        down: As up.
        dy: `[*, out]`.
        activation: Name of the activation.
        keeps: The masks used, by layer name: bool of x's shape, for down `[*, hidden]`.
    """

    x: Tensor
    gate: Layer | None
    up: Layer
    down: Layer
    dy: Tensor
    activation: str = "silu"
    keeps: dict[str, Tensor] = field(default_factory=dict)

    def layers(self) -> dict[str, Layer]:
        """Return the layers by name, in order; without gate if there is none."""
        return {name: q for name in MLP if (q := getattr(self, name)) is not None}

    def output_dtypes(self) -> dict[str, torch.dtype]:
        """Return the dtype each output is rounded to, by name: y, dx, gate.d_lora_A and so on."""
        own = {
            f"{layer}.{gradient}": t.dtype
            for layer, q in self.layers().items()
            for name, gradient in _GRADIENTS.items()
            if (t := getattr(q, name)) is not None
        }
        return dict(y=self.x.dtype, dx=self.x.dtype) | own


def exact(problem: MLPProblem) -> dict[str, Tensor]:
    """Compute the outputs of a problem in float64 from its rounded inputs: y, dx, gate.d_lora_A and so on."""
    return _run(problem, torch.float64, reference.activated)[0]


def eager(problem: MLPProblem) -> dict[str, Tensor]:
    """Compute the outputs by PyTorch's operators in the problem's own dtype: the yardstick of rule 2."""

    def activated(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
        value = ACTIVATIONS[activation](gate)
        return value if up is None else value * up

    outputs, _ = _run(problem, problem.x.dtype, activated)
    return {name: outputs[name].to(dtype) for name, dtype in problem.output_dtypes().items()}


def bounds(problem: MLPProblem, split: bool = False) -> dict[str, Tensor]:
    """Compute rule 1's limit of each element of each output, in float64; `split` of each layer as `numerics.bounds`."""
    truth, layers = _run(problem, torch.float64, reference.activated)
    return _limits(problem, truth, layers, split)


def check(
    actual: dict[str, Tensor], problem: MLPProblem, baseline: dict[str, Tensor] | None = None, split: bool = False
) -> list[Finding]:
    """Hold outputs to rules 1 and 2.

    Args:
        actual: Output name to tensor; any subset of the outputs of `exact`.
        problem: The problem that was computed.
        baseline: PyTorch's own outputs, for rule 2; see `eager`.
        split: See `numerics.bounds`; False for the kernels, True for the torch backend and other chains of operators.

    Returns:
        A finding for each output in `actual`, in its order.
    """
    truth, layers = _run(problem, torch.float64, reference.activated)
    limits, dtypes = _limits(problem, truth, layers, split), problem.output_dtypes()
    ranks = [q.lora_A.shape[0] for q in layers.values() if q.lora_A.numel()]
    rows = problem.dy.shape[:-1].numel()
    inherited = rows * min(ranks, default=numerics.RULE_2_INHERITED)
    summed, findings = terms(rows, layers["up"].weight.shape, layers["down"].weight.shape, max(ranks, default=0)), []
    for name, tensor in actual.items():
        few = tensor.numel() < numerics.RULE_2_SIZE or inherited < numerics.RULE_2_INHERITED
        beside = None if baseline is None else baseline[name]
        findings.append(
            numerics.compare(name, tensor, truth[name], limits[name], dtypes[name], beside, not few, summed)
        )
    return findings


def terms(rows: int, up: Sequence[int], down: Sequence[int], rank: int) -> int:
    """Return the n of rule 2 (`numerics.terms`) for every output of an MLP from the weight shapes of up and down."""
    (hidden, k), (n, _) = up, down
    return rows + 3 * (k + 2 * rank) + 2 * (hidden + 2 * rank) + n + 2 * rank


def _run(
    problem: MLPProblem, dtype: torch.dtype, activated: Callable[[Tensor, Tensor | None, str], Tensor]
) -> tuple[dict[str, Tensor], dict[str, Problem]]:
    """Compute the outputs in `dtype`, and each layer as a `Problem` with its own input and upstream gradient."""

    def leaf(t: Tensor) -> Tensor:
        return t.detach().to(problem.x.dtype).to(dtype).requires_grad_()

    given, ins, outs = {}, {}, {}
    for name, q in problem.layers().items():
        lora_A, lora_B = (q.weight[:0], q.weight[:, :0]) if q.lora_A is None else (q.lora_A, q.lora_B)
        keep, bias = problem.keeps.get(name), None if q.bias is None else leaf(q.bias)
        tensors = *map(leaf, (q.weight, lora_A, lora_B)), bias
        given[name] = *tensors, q.scaling, None if keep is None else _rows(keep), q.dropout_p

    def through(name: str, x: Tensor) -> Tensor:
        ins[name], outs[name] = x, reference.forward(x, *given[name])
        outs[name].retain_grad()
        return outs[name]

    x = leaf(_rows(problem.x))
    gate, up = (*[through(name, x) for name in given if name != "down"], None)[:2]
    y = through("down", activated(gate, up, problem.activation))
    y.backward(_rows(problem.dy).to(problem.x.dtype).to(dtype))
    results = {"y": y.detach().view(problem.dy.shape), "dx": x.grad.view(problem.x.shape)}
    layers = {}
    for name, (*tensors, scaling, keep, p) in given.items():
        own = dict(zip(("weight", "lora_A", "lora_B", "bias"), tensors, strict=True))
        results |= {f"{name}.{_GRADIENTS[key]}": t.grad for key, t in own.items() if t is not None}
        weight, lora_A, lora_B, bias = (None if t is None else t.detach() for t in tensors)
        dy = outs[name].grad
        layers[name] = Problem(ins[name].detach(), weight, lora_A, lora_B, dy, bias, scaling, p, keep)
    return results, layers


def _limits(
    problem: MLPProblem, truth: dict[str, Tensor], layers: dict[str, Problem], split: bool
) -> dict[str, Tensor]:
    dtype = problem.x.dtype
    *before, down = layers.values()
    outs = [reference.forward(q.x, q.weight, q.lora_A, q.lora_B, q.bias, *_low_rank(q)) for q in before]
    made = [
        (t, numerics.error_after_rounding(numerics.propagate_errors(q, dtype, split=split)["y"], t, dtype))
        for t, q in zip(outs, before, strict=True)
    ]
    value, slope = _activation(*made[0], problem.activation, dtype)
    # empty without a gate
    up = made[1:]
    h, e_h = _product(value, *up)
    of_down = numerics.propagate_errors(down, dtype, e_x=numerics.error_after_rounding(e_h, h, dtype), split=split)
    dh = reference.grad_x(down.dy, down.weight, down.lora_A, down.lora_B, *_low_rank(down))
    back = dh, numerics.error_after_rounding(of_down["dx"], dh, dtype)
    e_dys = [
        numerics.error_after_rounding(_product(back, *factors)[1], q.dy, dtype)
        for q, factors in zip(before, ([slope, *up], [value]), strict=False)
    ]
    errors = {"y": of_down["y"], "dx": numerics.shared_dx(before, dtype, e_dys, split)}
    each = [*(numerics.propagate_errors(q, dtype, e_dy=e_dy) for q, e_dy in zip(before, e_dys, strict=True)), of_down]
    errors |= {f"{name}.{key}": t for name, own in zip(layers, each, strict=True) for key, t in own.items()}
    return {
        name: numerics.allowed_error(errors[name].reshape(truth[name].shape), truth[name], out_dtype)
        for name, out_dtype in problem.output_dtypes().items()
    }


def _low_rank(q: Problem) -> tuple[float, Tensor | None, float]:
    return q.scaling, q.keep, q.dropout_p


def _activation(
    gate: Tensor, e_g: Tensor, activation: str, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Compute a(g) and a'(g), each with a bound of its error from e_g and from fp32 arithmetic."""
    g = gate.detach().requires_grad_()
    u_acc = min(numerics.unit_roundoff(dtype), numerics.unit_roundoff(torch.float32))
    first, second, third = _DERIVATIVES[activation]
    value = reference.activated(g, None, activation)
    (slope,) = torch.autograd.grad(value.sum(), g, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), g)
    value, slope, g = value.detach(), slope.detach(), gate.abs()
    e_value = (slope.abs() * e_g + second / 2 * e_g**2).minimum(first * e_g) + 8 * u_acc * (g + value.abs())
    e_slope = (bend.abs() * e_g + third / 2 * e_g**2).minimum(second * e_g) + 16 * u_acc * (1 + g)
    return (value, e_value), (slope, e_slope)


def _product(*factors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Multiply numbers that carry errors; return the product and its error."""
    (total, error), *rest = factors
    for t, e_t in rest:
        total, error = total * t, error * (t.abs() + e_t) + total.abs() * e_t
    return total, error


def _rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])
