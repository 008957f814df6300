"""`lora_projections` that adds to the gradients of adapters itself: the same sums, and only where autograd would add."""

import functools

import pytest
import torch
from projection_samples import BACKENDS, CASES, draw

from lora_kernels import lora_projections


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_adds_to_gradients_that_are_there(backend, adapters, device):
    """In place for those that let it and nobody listens to; the others come back and autograd adds them."""
    block, _ = draw(CASES["dropout"], torch.bfloat16, device, adapter_dtype=adapters)
    flags = [True, True, False]
    heard = block.adapters[1][0].register_post_accumulate_grad_hook(lambda t: None)
    for call in (lora_projections, functools.partial(lora_projections, accumulate_grad=flags)):
        for leaf in block.leaves():
            leaf.grad = torch.ones_like(leaf)
        torch.manual_seed(3)
        ys, returned = block.together(backend, call), []
        function, _ = ys[0].grad_fn.next_functions[0]  # under the view of its rows
        function.register_hook(lambda gradients, _, to=returned: to.extend(g is not None for g in gradients))
        torch.autograd.backward(ys, block.dys)
        found = [t.grad for t in block.leaves()]
        if call is lora_projections:
            expected = found
    heard.remove()
    x, *given = returned  # then W, A, B and bias of the first, W, A, B of the second, all of the third
    assert x
    assert given == [False, False, False, True, False, True, False, False, True, True, True]
    u = torch.finfo(adapters).eps
    for value, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(value, exact, rtol=2 * u, atol=2 * u * exact.abs().max().item())


def test_a_gradient_that_two_projections_share_is_left_to_autograd(device):
    block, _ = draw(CASES["two"], torch.float32, device)
    block.adapters[1] = block.adapters[0]
    for leaf in block.leaves():
        leaf.grad = torch.ones_like(leaf)
    torch.manual_seed(3)
    ys = block.together("triton", functools.partial(lora_projections, accumulate_grad=True))
    expected = torch.autograd.grad(ys, block.adapters[0], block.dys, retain_graph=True)
    torch.autograd.backward(ys, block.dys)
    for t, gradient in zip(block.adapters[0], expected, strict=True):
        torch.testing.assert_close(t.grad, 1 + gradient)


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True:UserWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_of_backward_gets_gradients_of_its_own(backend, device):
    """With create_graph=True the engine adds out of place, and what stood in .grad stays as it was."""
    block, _ = draw(CASES["two"], torch.float32, device)
    ys = block.together(backend, functools.partial(lora_projections, accumulate_grad=True))
    expected = torch.autograd.grad(ys, block.leaves(), block.dys, create_graph=True)
    for leaf in block.leaves():
        leaf.grad = torch.ones_like(leaf)
    first = [leaf.grad for leaf in block.leaves()]
    torch.autograd.backward(ys, block.dys, create_graph=True)
    for leaf, gradient, before in zip(block.leaves(), expected, first, strict=True):
        assert torch.equal(before, torch.ones_like(leaf))
        torch.testing.assert_close(leaf.grad, gradient + 1)
        leaf.grad = None  # holds the graph, which holds the leaf


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradients_of_an_unused_output_s_adapter_are_not_touched(backend, device):
    """Neither their values nor their versions, which other backwards compare."""
    block, _ = draw(CASES["two"], torch.float32, device)
    for leaf in block.leaves():
        leaf.grad = torch.ones_like(leaf)
    ys = block.together(backend, functools.partial(lora_projections, accumulate_grad=True))
    used, unused = block.adapters
    before = [t.grad._version for t in (*used, *unused)]
    torch.autograd.backward(ys[:1], block.dys[:1])
    assert all(torch.equal(t.grad, torch.ones_like(t)) for t in unused)
    assert not any(torch.equal(t.grad, torch.ones_like(t)) for t in used)
    added = [t.grad._version - was for t, was in zip((*used, *unused), before, strict=True)]
    assert min(added[:2]) > 0
    assert added[2:] == [0, 0]
