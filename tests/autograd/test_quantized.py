"""Operators over quantised weights: PyTorch's own checks, the plain call's numbers, and what a compiled graph saves."""

import functools

import pytest
import torch
from operator_samples import Watch, fresh_compiler, taken  # noqa: F401  a fixture
from quantized_samples import FORMATS, Call
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels import autograd

KINDS = ("linear", "projections", "mlp")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),  # PyTorch's own
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]


def operators(kind):
    module = getattr(autograd, kind)
    return [getattr(module, f"{kind}{half}") for half in ("", "_forward", "_backward")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["nf4 nested", "int8"])  # PyTorch's own check multiplies no FP8
def test_opcheck(form, kind, device):
    call = Call(kind, form, torch.float32, device, "torch")
    _, forward, backward = operators(kind)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    opcheck(forward, taken(forward, lambda: call.run(call.weights)), test_utils=checks)
    opcheck(backward, taken(backward, lambda: call.run(call.weights)), test_utils=checks)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMATS)
def test_the_operators_give_what_the_plain_call_gives(form, kind, device):
    call = Call(kind, form, torch.bfloat16, device, "torch", adapters=torch.float32)
    expected = call.run(call.weights)
    with Watch() as mode:
        got = call.run(call.weights)
    assert operators(kind)[1] in mode.seen
    assert operators(kind)[2] in mode.seen
    assert all(one is other or torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_alone_is_an_operator_as_well(kind, device):
    call = Call(kind, "nf4", torch.float32, device, "torch", p=1.0)
    expected = call.run(call.weights)
    with Watch() as mode:
        got = call.run(call.weights)
    assert autograd.projections.projections_forward in mode.seen
    assert all(one is other or torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_flops_are_those_of_the_dense_weight(kind, device):
    call, counts = Call(kind, "nf4", torch.float32, device, "torch"), []
    for weights in (call.weights, call.dense()):
        with FlopCounterMode(display=False) as counter:
            call.run(weights)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_graph_saves_no_dense_weight(kind, device):
    call, graphs = Call(kind, "nf4 nested", torch.float32, device, "torch"), []
    expected = call.run(call.weights)

    def compiler(graph, inputs):
        def keep(graph, inputs):
            outputs = next(node for node in graph.graph.nodes if node.op == "output").args[0]
            graphs.append([node.meta["val"] for node in outputs if hasattr(node, "meta")])
            return make_boxed_func(graph.forward)

        plain = lambda graph, _: make_boxed_func(graph.forward)  # noqa: E731
        return aot_module_simplified(graph, inputs, fw_compiler=keep, bw_compiler=plain)

    compiled = torch.compile(lambda: call.call(call.weights), backend=compiler, fullgraph=True)
    torch.manual_seed(2)
    ys = compiled()
    leaves = [call.x, *(t for pair in call.pairs for t in pair)]
    grads = torch.autograd.grad([y.square().mean() for y in ys], leaves, allow_unused=True)
    for one, other in zip([*ys, *grads], expected, strict=True):
        assert one is other or torch.allclose(one, other, rtol=1e-4, atol=1e-6)
    sizes = {w.shape.numel() for w in call.weights}
    (saved,) = graphs
    assert saved
    assert not [t for t in saved if isinstance(t, torch.Tensor) and t.is_floating_point() and t.numel() in sizes]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing(kind, reentrant, device):
    call = Call(kind, "nf4", torch.float32, device, "torch", p=0.5)
    expected = call.run(call.weights)
    plain = call.call

    def again(x, weights):
        call.x, x_was = x, call.x
        try:
            return plain(weights)
        finally:
            call.x = x_was

    call.call = lambda weights: checkpoint(functools.partial(again, weights=weights), call.x, use_reentrant=reentrant)
    if reentrant:  # which knows no torch.autograd.grad
        leaves = [call.x, *(t for pair in call.pairs for t in pair)]
        torch.manual_seed(2)
        ys = call.call(call.weights)
        torch.autograd.backward([y.float().square().mean() for y in ys])
        got = [*ys, *(t.grad for t in leaves)]
    else:
        got = call.run(call.weights)
    assert all(one is other or torch.equal(one, other) for one, other in zip(got, expected, strict=True))
