"""`lora_mlp` that adds to the gradients of adapters itself: the same sums, and only where autograd would add."""

import pytest
import torch
from mlp_samples import BACKENDS, draw, leaves_of

from lora_kernels import LoRAMLP, lora_mlp


def trained(problem, backend, flags, recompute=False, names=("dx", "d_lora_A", "d_lora_B", "dbias")):
    """The leaves after a backward into gradients of ones, and which gradients came back through autograd."""
    problem, leaves = leaves_of(problem, names)
    for leaf in leaves.values():
        leaf.grad = torch.ones_like(leaf)
    torch.manual_seed(3)
    y = lora_mlp(
        problem.x, problem.gate, problem.up, problem.down, activation=problem.activation, recompute=recompute,
        backend=backend, accumulate_grad=flags,
    )  # fmt: skip
    function, returned = y.grad_fn.next_functions[0][0] if y.dim() > 2 else y.grad_fn, []
    function.register_hook(lambda gradients, _: returned.extend(g is not None for g in gradients))
    y.backward(problem.dy)
    return {name: leaf.grad for name, leaf in leaves.items()}, returned


def came_back(problem, flags):
    """Of x, and of the weight and the adapters of each layer: the weights are frozen."""
    of_layers = zip(problem.layers().values(), flags, strict=True)
    return [True] + [came for q, added in of_layers for came in [False] + [not added] * 2 * (q.lora_A is not None)]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("ranks", "gated"), [((5, 3, 4), True), ((20, 3, 4), True), ((0, 3, 0), False)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_adds_to_gradients_that_are_there(backend, ranks, gated, recompute, device):
    """For those layers that let it; the others' come back. At ranks above 16 ds has a launch of its own."""
    problem = draw(ranks, (0.3, 0.0, 0.4), torch.bfloat16, device, gated=gated, adapters=torch.float32)
    flags = [True, False, True] if gated else [True, True]
    expected, came = trained(problem, backend, False, recompute)
    assert came == came_back(problem, [False] * len(flags))
    found, came = trained(problem, backend, flags, recompute)
    assert came == came_back(problem, flags)
    for name, gradient in expected.items():
        size = (gradient - 1).abs().max().item()
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=4e-7 * (1 + size), msg=name)
        assert size > 0, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_adds_without_what_comes_before(backend, device):
    """Only down is trained: its dA comes of h alone, and is added as well."""
    problem, names = draw((0, 0, 4), dtype=torch.float32, device=device), ("d_lora_A", "d_lora_B")
    expected, _ = trained(problem, backend, False, names=names)
    found, came = trained(problem, backend, True, names=names)
    assert not any(came)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True:UserWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_of_backward_gets_gradients_of_its_own(backend, device):
    """With create_graph=True the engine adds out of place, and what stood in .grad stays as it was."""
    problem, leaves = leaves_of(draw(device=device))
    layers = problem.gate, problem.up, problem.down
    y = lora_mlp(problem.x, *layers, activation=problem.activation, backend=backend, accumulate_grad=True)
    expected = torch.autograd.grad(y, list(leaves.values()), problem.dy, retain_graph=True, create_graph=True)
    for leaf in leaves.values():
        leaf.grad = torch.ones_like(leaf)
    first = [leaf.grad for leaf in leaves.values()]
    y.backward(problem.dy, create_graph=True)
    for leaf, gradient, before in zip(leaves.values(), expected, first, strict=True):
        assert torch.equal(before, torch.ones_like(leaf))
        torch.testing.assert_close(leaf.grad, gradient + 1)
        leaf.grad = None  # holds the graph, which holds the leaf


def test_small_calls_on_a_cpu_add_as_well():
    """Composed of operators, whose Functions add."""
    problem = draw()
    expected, _ = trained(problem, "auto", False)
    found, _ = trained(problem, "auto", True)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


def test_one_flag_for_each_layer():
    problem = draw()
    with pytest.raises(ValueError, match=r"lora_mlp: accumulate_grad is for 2 layers and there are 3\."):
        lora_mlp(problem.x, problem.gate, problem.up, problem.down, accumulate_grad=[True, True])


def test_the_module_says_it_for_each_child(monkeypatch):
    block, told = LoRAMLP(8, 12, r=2), []
    block.down_proj.accumulate_grad = True
    monkeypatch.setattr(
        "lora_kernels.modules.blocks.lora_mlp", lambda x, *_, accumulate_grad, **__: told.append(accumulate_grad) or x
    )
    block(torch.randn(2, 8))
    assert told == [[False, False, True]]
