"""`lora_linear` that adds to the gradients of adapters itself: the same sums, and only where autograd would add."""

import pytest
import torch

from lora_kernels import LoRALinear, LoRAMLP, LoRAQKV, Projection, lora_linear, lora_mlp, lora_qkv
from lora_kernels.verify import numerics
from lora_kernels.verify.problems import make_problem


def linear():
    return LoRALinear(16, 24, r=4)


def qkv():
    return LoRAQKV(16, 8, 8, r=4)


def mlp():
    return LoRAMLP(16, 24, r=4)


CALLS = {
    "lora_linear": lambda x, w, pairs, backend: lora_linear(x, w, *pairs[0], backend=backend, accumulate_grad=True),
    "lora_qkv": lambda x, w, pairs, backend: sum(
        lora_qkv(x, [w] * 3, pairs, backend=backend, accumulate_grad=True)
    ),
    "lora_mlp": lambda x, w, pairs, backend: lora_mlp(
        x, *(Projection(w, *pair) for pair in pairs), backend=backend, accumulate_grad=True
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(("dtype", "adapters"), [(torch.float32, None), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("r", [4, 40])
def test_adds_what_the_engine_would_add(backend, dtype, adapters, r, device):
    problem = make_problem((50,), 24, 28, r, dtype, device, adapter_dtype=adapters)

    def two_steps(accumulate):
        a, b = (t.detach().clone().requires_grad_() for t in (problem.lora_A, problem.lora_B))
        x = problem.x.detach().requires_grad_()
        for step in range(3):
            y = lora_linear(x, problem.weight, a, b, backend=backend, accumulate_grad=accumulate)
            y.backward(problem.dy * (step + 1))
        return a.grad, b.grad

    for ours, theirs in zip(two_steps(True), two_steps(False), strict=True):
        u = numerics.unit_roundoff(theirs.dtype)
        torch.testing.assert_close(ours, theirs, rtol=4 * u, atol=8 * u * theirs.abs().max().item())


def test_writes_into_the_gradient_that_is_there(device):
    layer = LoRALinear(16, 24, r=4, device=device)
    layer.accumulate_grad = True
    torch.nn.init.ones_(layer.lora_B)
    x = torch.randn(8, 16, device=device)
    layer(x).sum().backward()
    first = {name: (p.grad, p.grad.clone()) for name, p in layer.named_parameters() if p.requires_grad}
    assert set(first) == {"lora_A", "lora_B"}
    versions = {name: grad._version for name, (grad, _) in first.items()}
    layer(x).sum().backward()
    for name, (grad, before) in first.items():
        assert getattr(layer, name).grad is grad
        torch.testing.assert_close(grad, 2 * before)
        assert grad._version > versions[name], "autograd must see that it was written"


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("call", CALLS)
def test_a_sum_into_a_gradient_raises_its_version(call, backend, device):
    """Kernels write where PyTorch does not see it; a graph that saved the gradient must learn of it all the same."""
    x, w = torch.randn(8, 16, device=device), torch.randn(16, 16, device=device)
    pairs = [[torch.randn(*shape, device=device, requires_grad=True) for shape in ((4, 16), (16, 4))] for _ in range(3)]
    adapters = [t for pair in pairs for t in pair][: 2 * (1 if call == "lora_linear" else 3)]
    before = [(t.grad, t.grad._version) for t in adapters if setattr(t, "grad", torch.zeros_like(t)) is None]
    y, scale = CALLS[call](x, w, pairs, backend), torch.ones_like(adapters[0], requires_grad=True)
    later = (adapters[0].grad * scale).sum()
    y.sum().backward()
    for t, (gradient, version) in zip(adapters, before, strict=True):
        assert t.grad is gradient
        assert gradient.any()
        assert gradient._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        later.backward()


@pytest.mark.parametrize("make", [linear, qkv, mlp], ids=lambda make: make.__name__)
def test_the_engine_gets_nothing_to_add(make, device):
    """If it got the gradients, their sums would be right, and the copies that are to be saved would be there."""
    block, x, given = make().to(device), torch.randn(8, 16, device=device), []
    adapters = [p for name, p in block.named_parameters() if "lora_" in name]
    for p in adapters:
        torch.nn.init.normal_(p)
        p.grad = torch.ones_like(p)
        (node, _), *_ = p.expand_as(p).grad_fn.next_functions
        node.register_prehook(lambda grads, node=node: given.append((node, grads[0])))
    for layer in block.modules():
        if isinstance(layer, LoRALinear):
            layer.accumulate_grad = True
    ys = block(x)
    sum(y.sum() for y in (ys if isinstance(ys, tuple) else (ys,))).backward()
    assert all((p.grad != 1).any() for p in adapters)
    assert [grad for _, grad in given if grad is not None] == []


@pytest.mark.parametrize("kind", ["hook", "post-accumulate hook", "not a leaf"])
def test_leaves_it_to_the_engine_where_more_is_to_be_done(kind, device):
    x, w = torch.randn(8, 16, device=device), torch.randn(24, 16, device=device)
    a, b = (
        torch.randn(4, 16, device=device, requires_grad=True),
        torch.randn(24, 4, device=device, requires_grad=True),
    )
    seen = []
    if kind == "hook":
        a.register_hook(lambda g: seen.append(g) or 3 * g)
    if kind == "post-accumulate hook":
        a.register_post_accumulate_grad_hook(lambda p: seen.append(p))
    a.grad = torch.ones_like(a)
    use = a * 1 if kind == "not a leaf" else a
    lora_linear(x, w, use, b, accumulate_grad=True).sum().backward()
    expected = (b.sum(0)[:, None] * x.sum(0)).detach() * (3 if kind == "hook" else 1) + 1
    torch.testing.assert_close(a.grad, expected, rtol=1e-4, atol=1e-3)
    assert len(seen) == ("hook" in kind)


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True:UserWarning")
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_adds_out_of_place_where_the_engine_does(backend, device):
    """With create_graph=True, whose gradients may be differentiated again: what stood in .grad stays as it was."""
    x, w = torch.randn(8, 16, device=device), torch.randn(24, 16, device=device)
    a, b = (torch.randn(*shape, device=device, requires_grad=True) for shape in ((4, 16), (24, 4)))
    y = lora_linear(x, w, a, b, backend=backend, accumulate_grad=True).sum()
    expected = torch.autograd.grad(y, (a, b), create_graph=True)
    a.grad, b.grad = first = torch.ones_like(a), torch.ones_like(b)
    y.backward(create_graph=True)
    for t, gradient, before in zip((a, b), expected, first, strict=True):
        assert torch.equal(before, torch.ones_like(t))
        torch.testing.assert_close(t.grad, gradient + 1)
        t.grad = None  # holds the graph, which holds t


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_gradient_that_overlaps_itself_is_refused_by_the_engine(backend, device):
    x, w = torch.randn(8, 16, device=device), torch.randn(24, 16, device=device)
    a, b = (torch.randn(*shape, device=device, requires_grad=True) for shape in ((4, 16), (24, 4)))
    a.grad = torch.zeros(1, 1, device=device).expand_as(a)
    y = lora_linear(x, w, a, b, backend=backend, accumulate_grad=True)
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        y.sum().backward()
    assert not a.grad.any()


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("call", CALLS)
def test_adds_to_the_inputs_of_backward_alone(call, backend, device):
    """As the engine: to what `inputs` names, whatever else is trained; and `torch.autograd.grad` returns and adds nothing."""
    x, w = torch.randn(8, 16, device=device, requires_grad=True), torch.randn(16, 16, device=device)
    pairs = [[torch.randn(*shape, device=device, requires_grad=True) for shape in ((4, 16), (16, 4))] for _ in range(3)]
    used = [t for pair in pairs[: 1 if call == "lora_linear" else 3] for t in pair]
    leaves = [x, *used]
    expected = torch.autograd.grad(CALLS[call](x, w, pairs, backend).sum(), leaves)
    for wanted in ([x], [used[0]], [x, *used[1:]], leaves):
        for t in leaves:
            t.grad = torch.ones_like(t)
        y = CALLS[call](x, w, pairs, backend).sum()
        y.backward(inputs=wanted, retain_graph=True)
        for t, gradient in zip(leaves, expected, strict=True):
            added = any(t is one for one in wanted)
            torch.testing.assert_close(t.grad, 1 + gradient if added else torch.ones_like(t), rtol=1e-4, atol=1e-3)
        before = [t.grad.clone() for t in leaves]
        for gradient, t in zip(torch.autograd.grad(y, wanted), wanted, strict=True):
            right = next(right for right, leaf in zip(expected, leaves, strict=True) if leaf is t)
            torch.testing.assert_close(gradient, right, rtol=1e-4, atol=1e-3)
        assert all(torch.equal(t.grad, one) for t, one in zip(leaves, before, strict=True))
