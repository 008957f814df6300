"""Blocks whose layers have to be called one by one: why, and that they then are."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

from block_samples import WIDTH, Attention, Functional, Gated, block
from peft import LoraConfig
from peft_samples import call, check, truth
from transformers.activations import ACT2FN

from lora_kernels import patch_peft, unpatch_peft
from lora_kernels.peft import explain

IN_A_ROW = "its forward does not call q_proj, k_proj and v_proj one after another, come what may"
ONE_INPUT = "its forward does not call q_proj, k_proj and v_proj on one input"
ONCE = "its forward does not call each of q_proj, k_proj and v_proj once"


def only(report):
    (found,) = report.blocks
    return found


def hook(module):
    module.register_forward_hook(lambda module, args, y: y * 1.5)


def pre_hook(module):
    module.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def replaced_forward(module):
    forward = module.forward
    module.forward = lambda x: forward(x) * 3


def second_adapter(model):
    """Active beside the first on k_proj, and with dropout."""
    model.add_adapter("second", LoraConfig(target_modules=["k_proj"], lora_dropout=0.5))
    model.base_model.set_adapter(["default", "second"])
    patch_peft(model)


def fancy(module):
    class FancyLinear(nn.Linear):
        pass

    module.base_layer.__class__ = FancyLinear


STATES = {
    "hook on k_proj": (Attention, lambda part: hook(part.k_proj), "k_proj has a hook"),
    "pre-hook on up_proj": (Gated, lambda part: pre_hook(part.up_proj), "up_proj has a hook"),
    "forward of v_proj": (
        Attention, lambda part: replaced_forward(part.v_proj),
        "v_proj is stock: its forward is replaced on the instance (X-LoRA, or a hook from before)",
    ),
    "hook on the activation": (
        Gated, lambda part: hook(part.act_fn), "act_fn has a hook, or is not what it was when the model was patched"
    ),
    "another activation": (
        Gated, lambda part: setattr(part, "act_fn", nn.Tanh()),
        "act_fn has a hook, or is not what it was when the model was patched",
    ),
    "merged": (Gated, lambda part: part.down_proj.merge(), "down_proj is stock: merged: default"),
    "disabled": (Attention, lambda part: part.q_proj.enable_adapters(False), "q_proj is stock: adapters are disabled"),
    "base of another class": (
        Gated, lambda part: fancy(part.gate_proj),
        "gate_proj is low-rank: the base layer is a FancyLinear, not a plain nn.Linear",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STATES)
def test_a_layer_that_has_to_be_called(case, joined):
    part, change, reason = STATES[case]
    model, one = block(part())
    assert only(patch_peft(model)).form == "joined"
    change(one)
    alone(model, reason, joined)


def test_several_adapters_join_unless_they_have_masks_of_their_own(joined):
    model, _ = block(Attention())
    second_adapter(model)
    alone(model, "k_proj has 2 active adapters, and dropout", joined)
    model.eval()
    stock, x = copy.deepcopy(model), torch.randn(3, WIDTH, requires_grad=True)
    unpatch_peft(stock)
    assert only(explain(model, x)).form == "joined"
    check(call(model, x), call(stock, x), truth(stock, x), torch.float32)
    assert joined == ["lora_projections"]


def alone(model, reason, joined):
    """Each layer is called, for this reason."""
    x = torch.randn(3, WIDTH, requires_grad=True)
    assert only(explain(model)).reason == only(explain(model, x)).reason == reason
    twin = copy.deepcopy(model)
    unpatch_peft(twin)
    patch_peft(twin, blocks=False)
    torch.manual_seed(0)
    expected = call(twin, x)
    torch.manual_seed(0)
    actual = call(model, x)
    assert not joined
    for name, t in expected.items():
        assert torch.equal(actual[name], t), name


@pytest.mark.parametrize(
    ("part", "reason"),
    [(Attention, "k_proj is a Fancy, not a plain nn.Linear"), (Gated, "up_proj has a hook")],
)
def test_a_layer_without_an_adapter_that_has_to_be_called(part, reason, joined):
    class Fancy(nn.Linear):
        pass

    model, one = block(part(), target_modules=["q_proj", "gate_proj"])
    patch_peft(model)
    if part is Attention:
        one.k_proj.__class__ = Fancy
    else:
        hook(one.up_proj)
    x = torch.randn(3, WIDTH)
    assert only(explain(model)).reason == only(explain(model, x)).reason == reason
    model(x)
    assert not joined


def test_what_only_a_call_shows(joined):
    model, one = block(Attention(), target_modules=["q_proj"])
    patch_peft(model)
    x = torch.randn(3, WIDTH)
    assert only(explain(model, x)).form == "joined"
    one.v_proj.double()
    assert only(explain(model)).form == "joined", "v_proj fits some x"
    with pytest.raises(RuntimeError, match="dtype"):  # PyTorch says what is wrong, not this library
        model(x)
    assert not joined


def test_a_batch_of_mixed_adapters(joined):
    model, _ = block(Attention())
    model.eval()
    names, x = ["default", "__base__", "default"], torch.randn(3, WIDTH)
    expected = model(x, adapter_names=names)
    patch_peft(model)
    assert torch.equal(model(x, adapter_names=names), expected)
    assert not joined
    assert only(explain(model, x, adapter_names=names)).reason == "q_proj is stock: called with adapter_names"
    model(x)
    assert joined == ["lora_projections"]


class Cross(Attention):
    def forward(self, x, memory=None):
        memory = x if memory is None else memory
        return torch.cat([self.q_proj(x), self.k_proj(memory), self.v_proj(memory)], -1)


class Branch(Attention):
    def forward(self, x, alone=False):
        q = self.q_proj(x)
        if alone:
            return q
        k = self.k_proj(x)
        v = self.v_proj(x)
        return torch.cat([q, k, v], -1)


class Choice(Attention):
    def forward(self, x, alone=False):
        q, k, v = self.q_proj(x), None if alone else self.k_proj(x), self.v_proj(x)
        return torch.cat([q, v] if alone else [q, k, v], -1)


class Rewritten(Attention):
    def forward(self, x):
        q = self.q_proj(x)
        x = x * 2
        k, v = self.k_proj(x), self.v_proj(x)
        return torch.cat([q, k, v], -1)


class Twice(Attention):
    def forward(self, x):
        q, k = self.q_proj(x), self.k_proj(x)
        v = self.v_proj(x) + self.v_proj(x)
        return torch.cat([q, k, v], -1)


class Scaled(Gated):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * 0.5)


class Added(Gated):
    def forward(self, x):
        return super().forward(x) + x


class Doubled(Gated):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(2 * x))


class Swapped(Gated):
    def forward(self, x):
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))


class Dropped(Gated):
    """Dropout that is off while the model is patched."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.1).eval()

    def forward(self, x):
        return self.dropout(super().forward(x))


class DroppedInside(Gated):
    def forward(self, x):
        h = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(F.dropout(h, 0.1, self.training))


class Normed(Gated):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)

    def forward(self, x):
        return self.down_proj(self.norm(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


class Chunked(Gated):
    def forward(self, x):
        return torch.cat([super(Chunked, self).forward(part) for part in x.split(2)])


scope = dict(Attention=Attention, torch=torch)
exec("class Unread(Attention):\n    def forward(self, x):\n        return self.q_proj(x)", scope)

NO_MLP = "it is not down_proj(act(gate_proj(x)) · up_proj(x)) with act one of silu, gelu, gelu_tanh, relu2"
SHAPES = dict.fromkeys((Scaled, Added, Doubled, Swapped, Dropped, DroppedInside, Chunked), NO_MLP) | {
    Normed: "it has more than gate_proj, up_proj, down_proj and an activation: norm",
    Cross: ONE_INPUT,
    Branch: IN_A_ROW,
    Choice: IN_A_ROW,
    Twice: ONCE,
    Rewritten: "its forward uses x between q_proj, k_proj and v_proj",
    scope["Unread"]: "the source of its forward cannot be read",
}


@pytest.mark.parametrize("part", SHAPES)
def test_what_is_no_such_block_is_left_alone(part, joined):
    model, one = block(part())
    patch_peft(model)
    assert type(one) is part
    assert only(explain(model)).reason == SHAPES[part]
    x = torch.randn(3, WIDTH)
    model(x)
    assert not joined


@pytest.mark.parametrize("act", ["silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_python", "relu2"])
def test_activations_that_are_known(act, joined):
    stock, _ = block(Gated(ACT2FN[act]))
    patched = copy.deepcopy(stock)
    assert only(patch_peft(patched)).form == "joined"
    x = torch.randn(3, WIDTH, requires_grad=True)
    check(call(patched, x), call(stock, x), truth(stock, x), torch.float32)
    assert joined == ["lora_mlp"]


@pytest.mark.parametrize("act", ["relu", "quick_gelu", "gelu_10", "tanh", "linear"])
def test_activations_that_are_not(act):
    model, _ = block(Gated(ACT2FN[act]))
    assert only(patch_peft(model)).reason == NO_MLP


def test_functions_for_activations(joined):
    model, one = block(Functional())
    del one.act_fn
    one.act = F.silu  # not used, but a part that is watched
    x = torch.randn(3, WIDTH)
    expected = model(x)
    assert only(patch_peft(model)).form == "joined"
    torch.testing.assert_close(model(x), expected)
    assert joined == ["lora_mlp"]
    one.act = F.gelu
    assert "act has a hook, or is not what it was" in only(explain(model)).reason
    torch.testing.assert_close(model(x), expected)
    assert joined == ["lora_mlp"]


def test_one_layer_in_two_places(joined):
    stock, part = block(Attention())
    part.v_proj = part.k_proj
    patched = copy.deepcopy(stock)
    one = patched.base_model.model.part
    assert one.v_proj is one.k_proj
    assert only(patch_peft(patched)).form == "joined"
    x = torch.randn(3, WIDTH, requires_grad=True)
    assert only(explain(patched, x)).form == "joined"
    check(call(patched, x), call(stock, x), truth(stock, x), torch.float32)
    assert joined == ["lora_projections"]
