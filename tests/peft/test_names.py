"""What the forwards of an MLP and of its activation reach by names: once it is replaced, the layers are called."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

from block_samples import WIDTH, Gated, block
from foreign_samples import alike, own_forwards, part_and_x  # noqa: F401 a fixture

from lora_kernels import patch_peft
from lora_kernels.peft import explain

pytestmark = [
    pytest.mark.usefixtures("own_forwards"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*config.*:UserWarning"),
]


def test_an_activation_whose_class_is_given_another_forward(joined):
    model, _ = block(Gated())
    patched, x = copy.deepcopy(model), torch.randn(3, WIDTH)
    patch_peft(patched)
    nn.SiLU.forward = lambda self, t: torch.tanh(t)
    alike(patched, model, x)
    assert not joined
    (found,) = explain(patched, x).blocks
    assert found.form == "per layer"
    assert "act_fn" in found.reason


class Methodical(Gated):
    """An MLP with its activation in a method."""

    def act(self, t):
        return F.silu(t)

    def forward(self, x):
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


def test_a_method_of_an_mlp_is_replaced(joined):
    model, _ = block(Methodical())
    patched, x = copy.deepcopy(model), torch.randn(3, WIDTH)
    assert patch_peft(patched).count("joined") == 1
    own = Methodical.act
    try:
        Methodical.act = lambda self, t: torch.tanh(t)
        alike(patched, model, x)
        assert not joined
    finally:
        Methodical.act = own
    patch_peft(patched)
    patched(x)
    assert joined == ["lora_mlp"]


def helper(t):
    return F.silu(t)


class Base(Gated):
    def act(self, t):
        return helper(t)


class Derived(Base):
    """An MLP that reaches its activation by a base class's method, a global function and F.silu."""

    LIMIT = 1.0

    def act(self, t):
        return super().act(t) * Derived.LIMIT

    def forward(self, x):
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Inner(nn.SiLU):
    def forward(self, t):
        return super().forward(t)


class Held(nn.Module):
    """An activation that keeps its function, as transformers' GELUActivation does."""

    def __init__(self):
        super().__init__()
        self.act = F.silu

    def forward(self, t):
        return self.own(t)

    def own(self, t):
        return self.act(t)


class Child(Gated):
    def forward(self, x):
        return super().forward(x)


class Nested(Gated):
    """An MLP whose activation is reached inside an inner function."""

    def forward(self, x):
        def act(t):
            return helper(t)

        return self.down_proj(act(self.gate_proj(x)) * self.up_proj(x))


def tanh(*args):
    return torch.tanh(args[-1])


REACHED = {
    "a global function": (Derived, lambda: globals(), "helper"),
    "a global function of an inner function": (Nested, lambda: globals(), "helper"),
    "a base class's method": (Derived, lambda: Base, "act"),
    "a constant by the class's name": (Derived, lambda: Derived, "LIMIT"),
    "F.silu": (Derived, lambda: F, "silu"),
    "a base class's forward": (Child, lambda: Gated, "forward"),
    "the forward of an activation's base class": (lambda: Gated(Inner()), lambda: nn.SiLU, "forward"),
    "a method of an activation": (lambda: Gated(Held()), lambda: Held, "own"),
}


@pytest.mark.parametrize("what", REACHED)
def test_what_the_forward_of_an_mlp_reaches_by_name(what, joined, monkeypatch):
    part, place, name = REACHED[what]
    model, _ = block(part())
    patched, x = copy.deepcopy(model), torch.randn(3, WIDTH)
    assert patch_peft(patched).count("joined") == 1
    patched(x)
    assert joined == ["lora_mlp"]
    place = place()
    new = 3.0 if name == "LIMIT" else (lambda self, x: self.down_proj(self.up_proj(x))) if place is Gated else tanh
    if isinstance(place, dict):
        monkeypatch.setitem(place, name, new)
    else:
        monkeypatch.setattr(place, name, new)
    alike(patched, model, x)
    assert joined == ["lora_mlp"]
    assert explain(patched).count("joined") == 0


def test_a_function_that_an_activation_keeps(joined):
    model, _ = block(Gated(Held()))
    patched, x = copy.deepcopy(model), torch.randn(3, WIDTH)
    assert patch_peft(patched).count("joined") == 1
    for m in (model, patched):
        m.base_model.model.part.act_fn.act = torch.tanh
    alike(patched, model, x)
    assert not joined


def test_an_mlp_called_by_name(joined):
    (model, one), x = part_and_x(Gated)
    patch_peft(model)
    expected = one(x)
    torch.testing.assert_close(one(x=x), expected)
    assert joined == ["lora_mlp"] * 2
