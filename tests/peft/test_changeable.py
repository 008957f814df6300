"""What can change and stay the same object: lists, dictionaries and objects that a forward reads, and none of them hashed."""

import dataclasses
import functools
import types
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from peft import LoHaConfig, LoraConfig, get_peft_model
from torch import nn

from lora_kernels import patch_peft, swap_linear

WIDTH = 8
TABLE = {"act": F.silu}
SCALES = [1.0]
FILE = types.ModuleType("file")
FILE.scales = [1.0]


@dataclasses.dataclass
class Activation:
    """Compared by its fields, and so without a hash."""

    scale: float = 1.0

    def __call__(self, x):
        return F.silu(self.scale * x)


def scaled(scales, x):
    return F.silu(scales[0] * x)


class MLP(nn.Module):
    def __init__(self, act_fn=None):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 16)
        self.down_proj = nn.Linear(16, WIDTH)
        if act_fn is not None:
            self.act_fn = act_fn

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class OfClass(MLP):
    scales = (1.0, [1.0])

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x) * self.scales[1][0]) * self.up_proj(x))


class ListOfClass(OfClass):
    scales: ClassVar = [1.0, [1.0]]


class DictionaryOfClass(OfClass):
    scales: ClassVar = {1: [1.0]}


class ActivationOfClass(MLP):
    act_fn = Activation()


class Global(MLP):
    def forward(self, x):
        return self.down_proj(TABLE["act"](self.gate_proj(x)) * self.up_proj(x))


class GlobalList(MLP):
    def forward(self, x):
        return self.down_proj(self.activated(self.gate_proj(x)) * self.up_proj(x))

    def activated(self, gate):
        return F.silu(SCALES[0] * gate)


class OfFile(MLP):
    def forward(self, x):
        return self.down_proj(F.silu(FILE.scales[0] * self.gate_proj(x)) * self.up_proj(x))


class Part(nn.Module):
    """An activation that keeps something of its own."""

    def __init__(self, kept):
        super().__init__()
        self.kept = kept

    def forward(self, x):
        return self.kept(x) if callable(self.kept) else F.silu(self.kept[0] * x)


class PartOfGlobal(nn.Module):
    def forward(self, x):
        return F.silu(SCALES[0] * x)


def put(owner, place, value):
    return lambda model: owner(model).__setitem__(place, value)


def act_fn(model):
    return model.base_model.model.act_fn


CASES = {
    "an object of the block": (lambda: MLP(Activation()), lambda m: setattr(act_fn(m), "scale", 3.0), "act_fn"),
    "an object of the class": (
        ActivationOfClass, lambda m: setattr(ActivationOfClass.act_fn, "scale", 3.0), "its forward reads act_fn"
    ),
    "arguments of a partial": (
        lambda: MLP(functools.partial(scaled, [1.0])), put(lambda m: act_fn(m).args[0], 0, 3.0), "its forward reads act_fn"
    ),
    "a tuple with a list": (OfClass, put(lambda m: OfClass.scales[1], 0, 3.0), "its forward reads scales"),
    "a list": (ListOfClass, put(lambda m: ListOfClass.scales, 1, [3.0]), "its forward reads scales"),
    "a dictionary": (DictionaryOfClass, put(lambda m: DictionaryOfClass.scales, 1, [3.0]), "its forward reads scales"),
    "a global dictionary": (Global, put(lambda m: TABLE, "act", F.relu), "its forward reads TABLE, which may change"),
    "a global list": (GlobalList, put(lambda m: SCALES, 0, 3.0), "its forward reads SCALES, which may change"),
    "a list of a file": (OfFile, put(lambda m: FILE.scales, 0, 3.0), "its forward reads scales, which may change"),
    "a list of the activation": (
        lambda: MLP(Part([1.0])), put(lambda m: act_fn(m).kept, 0, 3.0), "act_fn uses kept, which may change"
    ),
    "an object of the activation": (
        lambda: MLP(Part(Activation())), lambda m: setattr(act_fn(m).kept, "scale", 3.0), "act_fn uses kept"
    ),
    "a list of the activation's file": (
        lambda: MLP(PartOfGlobal()), put(lambda m: SCALES, 0, 3.0), "act_fn uses SCALES, which may change"
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def put_back():
    yield
    TABLE["act"], SCALES[0], FILE.scales[0] = F.silu, 1.0, 1.0
    OfClass.scales[1][0], ListOfClass.scales[1], DictionaryOfClass.scales[1] = 1.0, [1.0], [1.0]
    ActivationOfClass.act_fn.scale = 1.0


def close(model, stock, x):
    """Compare the outputs, and the gradients of the adapters."""
    results = []
    for one in (model, stock):
        one.zero_grad()
        y = one(x)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in one.parameters() if p.grad is not None)])
    ours, theirs = results
    assert len(ours) == len(theirs) > 4
    for t, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(t, right)


def adapted(module):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(module, config)


@pytest.mark.parametrize("name", CASES)
def test_an_mlp_that_reads_it_is_computed_layer_by_layer(name):
    build, change, reason = CASES[name]
    torch.manual_seed(0)
    model = adapted(build())
    stock = adapted(build())
    stock.load_state_dict(model.state_dict())
    (block,) = patch_peft(model).blocks
    assert block.form == "per layer"
    assert reason in block.reason
    x = torch.randn(5, WIDTH)
    before = model(x)
    for one in (model, stock):
        change(one)
    assert not torch.allclose(model(x), before)
    close(model, stock, x)


class Forward:
    """A forward that is an object on the class, without a hash."""

    __hash__ = None

    def __init__(self, compute):
        self.compute = compute

    def __get__(self, module, kind=None):
        return self if module is None else functools.partial(self.compute, module)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(3))


Attention.forward = Forward(lambda self, x: self.q_proj(x) + self.k_proj(x) * self.v_proj(x))


class ByObject(MLP):
    forward = Forward(lambda self, x: self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))


@pytest.mark.parametrize("build", [Attention, ByObject])
def test_a_forward_that_is_no_function_is_called(build):
    model, stock = (adapted(build()) for _ in range(2))
    stock.load_state_dict(model.state_dict())
    (block,) = patch_peft(model).blocks
    assert block.reason == "its forward is a Forward, not a function"
    close(model, stock, torch.randn(5, WIDTH))


@pytest.mark.parametrize("build", [ListOfClass, DictionaryOfClass, ActivationOfClass, ByObject])
def test_swap_linear_looks_for_readers_past_what_has_no_hash(build):
    module = build()
    assert len(swap_linear(module, "all-linear", r=2)) == 3
    assert module(torch.randn(5, WIDTH)).shape == (5, WIDTH)


OTHER = "the base layer is a peft.tuners.loha.layer.Linear, not a plain nn.Linear"


@pytest.mark.parametrize(("order", "gate"), [((0, 1), ("fused", "")), ((1, 0), ("low-rank", OTHER))])
def test_a_mixed_model_is_patched_and_another_tuner_s_layer_named(order, gate):
    """LoHa's layer has lists on its class that its forward reads, and is called Linear as well."""
    model, stock = (mixed(order) for _ in range(2))
    stock.load_state_dict(model.state_dict())
    forms = {layer.name.rpartition("_proj")[0][-4:]: (layer.form, layer.reason) for layer in patch_peft(model).layers}
    assert forms == {"gate": gate, "l.up": ("fused", "")}
    close(model, stock, torch.randn(5, WIDTH))


def mixed(order):
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=["gate_proj", "up_proj"], init_lora_weights=False)
    loha = LoHaConfig(r=2, target_modules=["gate_proj", "down_proj"], init_weights=False)
    first, second = ((lora, loha)[i] for i in order)
    model = get_peft_model(MLP(F.silu), first, adapter_name="first", mixed=True)
    model.add_adapter("second", second)
    model.set_adapter(["first", "second"])
    return model
