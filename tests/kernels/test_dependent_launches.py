"""Who may begin before the launch in front of it has ended: only dA, right behind a dx that the kernel computed whole."""

import sys

import pytest
import torch
from mlp_samples import ADAPTERS, draw, run

import lora_kernels.kernels  # noqa: F401  its modules, whose functions of the same names hide them
from lora_kernels import lora_projections, plan

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="looks at launches in the interpreter")
wgrad = sys.modules["lora_kernels.kernels.wgrad"]
READY = 11  # its place among the arguments of wgrad's `_settle`
RANKS = {"up to 32": (5, 5, 5), "above 32": (40, 3, 70), "not of all": (0, 5, 0)}


@pytest.fixture
def order(monkeypatch):
    """What ran, in order: "shrink", "expand", "wgrad", "early" for a wgrad that may overlap, "library"."""
    seen = []

    def spied(owner, name, word):
        real = getattr(owner, name)

        def spy(*args, **more):
            result = real(*args, **more)
            seen.append(word(*args))
            return result

        monkeypatch.setattr(owner, name, spy)

    def module(name):
        return sys.modules[f"lora_kernels.kernels.{name}"]

    spied(module("shrink"), "_settle", lambda *args: "shrink")
    spied(module("matmul_expand"), "_settle", lambda *args: "expand")
    spied(module("wgrad"), "_settle", lambda *args: "early" if args[READY] else "wgrad")
    for owner, name in ((torch, "mm"), (torch, "addmm"), (torch.Tensor, "addmm_")):
        spied(owner, name, lambda *args: "library")
    return seen


def held(order, form):
    early = [order[i - 1] for i, what in enumerate(order) if what == "early"]
    assert early == (["expand"] if form == "fused" else [])


@pytest.mark.parametrize("form", ["fused", "beta1"])
@pytest.mark.parametrize("ranks", RANKS)
def test_of_an_mlp(ranks, form, order):
    with plan.force_form(form):
        run(draw(RANKS[ranks], (0.3, 0.0, 0.3)), "triton", names=("dx", *ADAPTERS))
    held(order, form)


@pytest.mark.parametrize("form", ["fused", "beta1"])
@pytest.mark.parametrize("ranks", RANKS)
def test_of_projections(ranks, form, order):
    q = draw(RANKS[ranks])
    x, layers = q.x.requires_grad_(), (q.gate, q.up)
    adapters = [None if one.lora_A is None else (one.lora_A.requires_grad_(), one.lora_B) for one in layers]
    with plan.force_form(form):
        ys = lora_projections(x, [one.weight for one in layers], adapters, backend="triton")
        torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
    held(order, form)
    order.clear()
    with plan.force_form(form):
        ys = lora_projections(x.detach(), [one.weight for one in layers], adapters, backend="triton")
        torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
    held(order, "no dx")


@pytest.mark.parametrize("of", ["b", "an activation"])
def test_what_stores_on_the_way_is_not_ready_early(of):
    """A launch that makes ds, dg or du writes them before it waits, and that memory may still be read."""
    dy, s, b = (torch.zeros(size) for size in ((75, 40), (75, 5), (40, 5)))
    product = wgrad.ThinProduct(s, torch.float32, False, b=b if of == "b" else None)
    activation = wgrad.NO_ACTIVATION if of == "b" else wgrad.Activation("silu", dy, dy, dy, dy)
    with pytest.raises(ValueError, match="pass ready=False"):
        wgrad.settle(None, dy, [product], activation, ready=True)
