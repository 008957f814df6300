"""Every registered operator is there under its name, and a call of it does what it did."""

import pytest
import torch
from operator_samples import taken

from lora_kernels import Projection, reference

IN, OUT, R, SCALING = 12, 7, 3, 0.5
_draw = torch.Generator().manual_seed(0)
X, DY, WEIGHT, BIAS, A, B, BASE, SQUARE = (
    torch.randn(shape, generator=_draw)
    for shape in ((5, IN), (5, OUT), (OUT, IN), (OUT,), (R, IN), (OUT, R), (5, OUT), (OUT, OUT))
)

same = torch.testing.assert_close

# Each of the operators in the table computes with a layer of X, WEIGHT, a and b, which others may follow.
OPERATORS = {
    "linear": (
        lambda op, x, a, b, p: [op(x, WEIGHT, a, b, BIAS, SCALING, p, "torch")],
        lambda x, a, b: [reference.lora_linear(x, WEIGHT, a, b, scaling=SCALING, bias=BIAS)],
    ),
    "add": (
        lambda op, x, a, b, p: [op(BASE, x, a, b, SCALING, p, "torch")],
        lambda x, a, b: [reference.lora_add(BASE, x, a, b, scaling=SCALING)],
    ),
    "projections": (
        lambda op, x, a, b, p: op(x, [WEIGHT] * 2, [a, None], [b, None], [None] * 2, [SCALING] * 2, [p] * 2, "torch"),
        lambda x, a, b: reference.lora_projections(x, [WEIGHT] * 2, [(a, b), None], scaling=SCALING),
    ),
    "grouped_linear": (
        lambda op, x, a, b, p: [
            op(x, WEIGHT[None], [a[None]], [b[None]], torch.tensor([0, len(X)]), BIAS[None], [SCALING], "torch")
        ],
        lambda x, a, b: [reference.lora_linear(x, WEIGHT, a, b, scaling=SCALING, bias=BIAS)],
    ),
    "mlp": (
        lambda op, x, a, b, p: [
            op(x, [WEIGHT, SQUARE], [a, None], [b, None], [BIAS, None], [SCALING] * 2, [p] * 2, "relu2", False, "torch")
        ],
        lambda x, a, b: [
            reference.lora_mlp(
                x, None, Projection(WEIGHT, a, b, BIAS, SCALING), Projection(SQUARE), activation="relu2"
            )
        ],
    ),
}  # fmt: skip


def operator(name):
    return getattr(torch.ops.lora_kernels, name).default


def run(compute):
    """What a function of x, a and b gives, and its gradients."""
    leaves = [t.clone().requires_grad_() for t in (X, A, B)]
    ys = compute(*leaves)
    return ys, torch.autograd.grad(ys, leaves, [DY] * len(ys))


def test_these_are_the_operators():
    halves = [f"{name}{half}" for name in OPERATORS for half in ("", "_forward", "_backward")]
    found = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("lora_kernels::")}
    assert found == {f"lora_kernels::{name}" for name in ["draw_noise", *halves]}


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_and_its_halves_compute(name):
    call, exact = OPERATORS[name]

    def compute(x, a, b):
        return call(operator(name), x, a, b, 0.0)

    (ys, grads), (expected, exact_grads) = run(compute), run(exact)
    for found, right in zip((*ys, *grads), (*expected, *exact_grads), strict=True):
        same(found, right)
    forward, backward = operator(f"{name}_forward"), operator(f"{name}_backward")
    found = forward(*taken(forward, lambda: run(compute)))[0]
    for y, right in zip(found if isinstance(found, list) else [found], expected, strict=True):
        same(y, right)
    for grad, right in zip(backward(*taken(backward, lambda: run(compute))), exact_grads, strict=True):
        same(grad.view_as(right), right)


@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "grouped_linear"])
def test_an_operator_draws_noise_by_the_operator_for_it(name):
    call, _ = OPERATORS[name]
    draw = operator("draw_noise")
    arguments = taken(draw, lambda: run(lambda x, a, b: call(operator(name), x, a, b, 0.5)))
    torch.manual_seed(0)
    first = draw(*arguments)
    assert not torch.equal(first, draw(*arguments))
    torch.manual_seed(0)
    assert torch.equal(first, draw(*arguments))
