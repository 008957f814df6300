"""What the tests of forwards that others replace share: the forwards put back, a wrapper, equality to the last bit."""

import peft.tuners.lora as lora
import pytest
import torch
from block_samples import WIDTH, Attention, Gated, block
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

PARTS = [Attention, Gated]


def part_and_x(part):
    return block(part()), torch.randn(3, WIDTH)


@pytest.fixture
def own_forwards():
    """What a test replaces is put back, also where the test fails."""
    kinds = (nn.Linear, nn.Dropout, nn.Identity, nn.SiLU, lora.Linear, LlamaAttention, LlamaMLP, Attention, Gated)
    before = {kind: kind.forward for kind in kinds}
    yield
    for kind, forward in before.items():
        kind.forward = forward


def twice(forward):
    def foreign(self, *args, **kwargs):
        return 2 * forward(self, *args, **kwargs)

    return foreign


def compared(model, stock, x):
    """Output, dx and the gradients of each parameter, of both models."""
    results = []
    for one in (model, stock):
        one.zero_grad()
        torch.manual_seed(0)
        given = x.clone().requires_grad_()
        y = one(given)
        y.backward(torch.ones_like(y))
        results.append([y, given.grad, *(p.grad for p in one.parameters() if p.grad is not None)])
    ours, theirs = results
    assert len(ours) == len(theirs) > 3
    return ours, theirs


def same(model, stock, x):
    """Equal to the last bit, with gradients."""
    assert all(torch.equal(*pair) for pair in zip(*compared(model, stock, x), strict=True))


def alike(model, stock, x):
    """Equal up to rounding, with gradients: the layers of the model are patched, so that a block could be joined."""
    assert any(vars(type(module)).get("_lora_kernels_class") is lora.Linear for module in model.modules())
    torch.testing.assert_close(*compared(model, stock, x))
