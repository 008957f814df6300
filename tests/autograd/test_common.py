"""What all Functions share: sums into gradients of any kind, and a backward that autocast does not change."""

import contextlib

import pytest
import torch
from operator_samples import Watch
from torch.utils.checkpoint import checkpoint

from lora_kernels import Projection, lora_linear, lora_mlp, lora_projections, lora_qkv
from lora_kernels.functional import lora_add

BACKENDS = ["triton", "torch"]


def operands(device, dtype=torch.float32):
    torch.manual_seed(0)
    x, w = torch.randn(8, 16, device=device), torch.randn(16, 16, device=device)
    a, b = (torch.randn(*shape, device=device) for shape in ((4, 16), (16, 4)))
    return [t.to(dtype).requires_grad_(t is not w) for t in (x, w, a, b)]


CALLS = {
    "lora_linear": lambda x, w, a, b, **how: lora_linear(x, w, a, b, **how),
    "lora_add": lambda x, w, a, b, **how: lora_add(x.detach(), x, a, b, **how),
    "lora_qkv": lambda x, w, a, b, **how: sum(lora_qkv(x, [w] * 3, [(a, b)] * 3, **how)),
    "lora_mlp": lambda x, w, a, b, **how: lora_mlp(x, *[Projection(w, a, b)] * 3, **how),
}
GRADIENTS = {  # what stands in A's .grad: all of them hold ones
    "its transpose is contiguous": lambda a: torch.ones_like(a.t(), memory_format=torch.contiguous_format).t(),
    "a slice": lambda a: a.new_ones(len(a), 2 * a.shape[1])[:, ::2],
    "negative by a bit": lambda a: torch.full_like(a, -1, dtype=torch.complex64).mul(1j).conj().imag,
    "sparse": lambda a: torch.ones_like(a).to_sparse(),
}


@pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout contract:UserWarning")
@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_into_a_gradient_of_any_kind(backend, kind, device):
    x, w, a, b = operands(device)
    y = lora_linear(x, w, a, b, backend=backend, accumulate_grad=True)
    expected = torch.autograd.grad(y.sum(), a, retain_graph=True)[0] + 1
    a.grad = there = GRADIENTS[kind](a)
    assert torch.equal(there.to_dense(), torch.ones_like(a))
    y.sum().backward()
    assert kind in ("sparse", "negative by a bit") or a.grad is there
    torch.testing.assert_close(a.grad, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sum_is_added_to_a_16_bit_gradient_before_it_is_rounded(backend, device):
    """256 and 257/256 lie above the middle of two bf16 neighbours; 256 and 1, its rounding, on it, and 256 is even."""
    kind = dict(dtype=torch.bfloat16, device=device)
    x, w = torch.ones(257, 8, **kind), torch.zeros(1, 8, **kind)
    a, b = torch.full((1, 8), 2.0**-11, **kind).requires_grad_(), torch.full((1, 1), 2.0**-8, **kind).requires_grad_()
    for t in (a, b):
        t.grad = torch.full_like(t, 256)
    lora_linear(x, w, a, b, backend=backend, accumulate_grad=True).backward(torch.ones(257, 1, **kind))
    for t in (a, b):
        assert torch.equal(t.grad, torch.full_like(t, 258))


@pytest.mark.parametrize("operator", [False, True])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_around_backward_changes_nothing(backend, call, operator, device):
    """Of a plain call and of the registered operator, which a dispatch mode sees."""
    found = []
    for enabled in (False, True):
        x, w, a, b = operands(device)
        with Watch() if operator else contextlib.nullcontext() as seen:
            y = CALLS[call](x, w, a, b, backend=backend).sum()
        assert not operator or any("lora_kernels" in str(name) for name in seen.seen)
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            y.backward()
        found.append([x.grad, a.grad, b.grad])
    for plain, cast in zip(*found, strict=True):
        assert torch.equal(plain, cast)


def test_each_of_many_projections_has_its_own_flag(device):
    """Past the fourth, where the next launches begin, and behind one that adds nothing and is left out of them."""
    x, w, *_ = operands(device)
    pairs = [operands(device)[2:] for _ in range(7)]
    flags, given = [i in (2, 5) for i in range(7)], {}
    for i, (a, _) in enumerate(pairs):
        a.grad = torch.zeros_like(a)
        (node, _), *_ = a.expand_as(a).grad_fn.next_functions
        node.register_prehook(lambda grads, i=i, node=node: given.update({i: grads[0]}))
    p = [float(i == 0) for i in range(7)]
    ys = lora_projections(x, [w] * 7, pairs, dropout_p=p, backend="torch", accumulate_grad=flags)
    sum(y.sum() for y in ys).backward()
    assert [given.get(i) is None for i in range(7)] == flags


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpoints_hand_out_what_a_graph_of_backward_saved(backend, call, device):
    """Once: a checkpoint refuses to hand a tensor out again, so the guard of backward and backward share what they read."""
    x, w, a, b = operands(device)
    expected = torch.autograd.grad(CALLS[call](x, w, a, b, backend=backend).sum(), (x, a, b))
    y = checkpoint(CALLS[call], x, w, a, b, backend=backend, use_reentrant=False)
    for found, right in zip(torch.autograd.grad(y.sum(), (x, a, b), create_graph=True), expected, strict=True):
        assert torch.equal(found, right)
        assert found.requires_grad
