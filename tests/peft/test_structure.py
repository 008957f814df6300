"""Blocks that nearly are what `lora_mlp` or `lora_projections` computes: what tells them apart."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

from block_samples import WIDTH, Attention, Gated, Ungated, block
from peft_samples import call
from torch.utils.checkpoint import checkpoint
from transformers.activations import NewGELUActivation

from lora_kernels import patch_peft, unpatch_peft
from lora_kernels.peft import explain

NO_MLP = "it is not down_proj(act(gate_proj(x)) · up_proj(x)) with act one of silu, gelu, gelu_tanh, relu2"
CHANGED = "has a hook, or is not what it was when the model was patched"


class Made(Gated):
    """A gated MLP of which each subclass changes a part."""

    def h(self, x):
        return self.act_fn(self.gate_proj(x)) * self.up_proj(x)

    def forward(self, x):
        return self.down_proj(self.h(x))


class ResultHalvedInPlace(Made):
    def forward(self, x):
        y = super().forward(x)
        y *= 0.5
        return y


class InputAddedInPlace(Made):
    def forward(self, x):
        y = super().forward(x)
        y += x
        return y


class InputWritten(Made):
    def forward(self, x):
        return super().forward(x.add_(1))


class UpDetached(Made):
    def h(self, x):
        return self.act_fn(self.gate_proj(x)) * self.up_proj(x).detach()


class NoGradient(Made):
    def forward(self, x):
        with torch.no_grad():
            h = self.h(x)
        return self.down_proj(h)


class StraightThrough(Made):
    def h(self, x):
        g = self.gate_proj(x)
        return (F.silu(g).detach() + g - g.detach()) * self.up_proj(x)


class UpLimited(Made):
    def h(self, x):
        return self.act_fn(self.gate_proj(x)) * self.up_proj(x).clamp(-10, 10)


class GateLimited(Made):
    def h(self, x):
        return self.act_fn(self.gate_proj(x).clamp(max=100)) * self.up_proj(x)


class OfLongInputs(Made):
    def forward(self, x):
        return super().forward(2 * x if x.shape[0] > 2 else x)


class OfItsValues(Made):
    def forward(self, x):
        return super().forward(2 * x if x.abs().sum() > 0 else x)


class Remembers(Made):
    def forward(self, x):
        self.last = self.h(x)
        return self.down_proj(self.last)


class Configured(Made):
    def __init__(self):
        super().__init__()
        self.config = {"scale": 1.0}

    def h(self, x):
        return super().h(x) * self.config["scale"]


class Checkpointed(Attention):
    def forward(self, x):
        def qkv(x):
            q = self.q_proj(x)
            k = self.k_proj(x)
            v = self.v_proj(x)
            return torch.cat([q, k, v], -1)

        return checkpoint(qkv, x, use_reentrant=False)


class Emptied(Attention):
    def forward(self, x):
        q = self.q_proj(x)
        self.k_proj.base_layer.weight.data[0] = 0
        k = self.k_proj(x)
        v = self.v_proj(x)
        return torch.cat([q, k, v], -1)


STRANGERS = dict.fromkeys(
    (
        ResultHalvedInPlace, InputAddedInPlace, InputWritten, UpDetached, NoGradient, StraightThrough, UpLimited,
        GateLimited, OfLongInputs, OfItsValues, Remembers,
    ), NO_MLP,
) | {
    Configured: "its forward reads config, which may change",
    Checkpointed: "its forward does not call q_proj, k_proj and v_proj one after another, come what may",
    Emptied: "its forward does more with q_proj, k_proj and v_proj before the last of them is called than call them",
}  # fmt: skip


@pytest.mark.parametrize("part", STRANGERS)
def test_nearly_a_block(part, joined):
    stock, _ = block(part())
    patched = copy.deepcopy(stock)
    (found,) = patch_peft(patched, backend="torch").blocks
    assert found.reason == STRANGERS[part]
    x = 3 * torch.randn(3, WIDTH)
    results = [call(model, x.clone().requires_grad_()) if part is not InputWritten else model(x.clone())
               for model in (stock, patched)]  # fmt: skip
    assert not joined
    torch.testing.assert_close(*results)


class Scaled(Made):
    def __init__(self):
        super().__init__()
        self.scale = 1.0

    def h(self, x):
        return super().h(x) * self.scale


class ScaledByClass(Made):
    scale = 1.0

    def h(self, x):
        return super().h(x) * self.scale


class Dropped(Made):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.0)

    def h(self, x):
        return self.dropout(super().h(x))


class Helped(Made):
    pass


CHANGES = {
    Scaled: (lambda part: setattr(part, "scale", 0.5), "scale"),
    ScaledByClass: (lambda part: setattr(part, "scale", 0.5), "scale"),
    Dropped: (lambda part: setattr(part.dropout, "p", 0.9), "dropout"),
    Helped: (lambda part: setattr(part, "h", lambda x: 2 * Made.h(part, x)), "h"),
}


@pytest.mark.parametrize("part", CHANGES)
def test_what_it_reads_may_change(part, joined):
    model, one = block(part())
    assert patch_peft(model).count("joined") == 1
    x = torch.randn(3, WIDTH)
    model(x)
    assert joined == ["lora_mlp"]
    change, name = CHANGES[part]
    change(one)
    (found,) = explain(model).blocks
    assert found.reason == f"{name} {CHANGED}"
    torch.manual_seed(0)
    y = model(x)
    assert joined == ["lora_mlp"]
    unpatch_peft(model)
    torch.manual_seed(0)
    torch.testing.assert_close(y, model(x))


class Particular(Attention):
    """Asks what a layer is before it calls it."""

    def forward(self, x):
        x = x if isinstance(self.q_proj, nn.Module) else 2 * x
        q = self.q_proj(x)
        k = self.k_proj(x)
        v = self.v_proj(x)
        return torch.cat([q, k, v], -1)


def test_a_layer_s_class_is_its_own(joined):
    stock, _ = block(Particular())
    patched = copy.deepcopy(stock)
    patch_peft(patched, backend="torch")
    x = torch.randn(3, WIDTH)
    torch.testing.assert_close(patched(x), stock(x))
    assert not joined, "the layers may not change once the first of them is called"


def test_what_others_add_changes_nothing(joined):
    """As `fully_shard` marks every module of a model."""
    model, _ = block(Dropped())
    patch_peft(model)
    for module in model.modules():
        module._managed, module.label = True, "new"
    model(torch.randn(3, WIDTH))
    assert joined == ["lora_mlp"]


def test_a_hook_inside_the_activation(joined):
    model, one = block(Gated(nn.Sequential(nn.SiLU())))
    (found,) = patch_peft(model).blocks
    assert found.reason == "it has more than gate_proj, up_proj, down_proj and an activation: act_fn"
    one.act_fn[0].register_forward_hook(lambda module, args, y: 2 * y)
    x = torch.randn(3, WIDTH)
    y = model(x)
    unpatch_peft(model)
    torch.testing.assert_close(y, model(x))
    assert not joined


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (None, ""), (nn.SiLU(), ""), (NewGELUActivation(), ""),
        (nn.ReLU(), "it is not fc2(act(fc1(x))) with act one of silu, gelu, gelu_tanh, relu2"),
        (nn.Sequential(nn.GELU(), nn.Dropout(0.1)), "it has more than fc1, fc2 and an activation: activation_fn"),
    ],
)  # fmt: skip
def test_an_mlp_of_two_layers(act, reason, joined):
    model, _ = block(Ungated(act))
    stock = copy.deepcopy(model)
    (found,) = patch_peft(model).blocks
    assert (found.kind, found.reason) == ("mlp", reason)
    model.eval()
    stock.eval()
    x = torch.randn(3, WIDTH)
    torch.testing.assert_close(model(x), stock(x))
    assert joined == ([] if reason else ["lora_mlp"])


def test_a_residual_inside_an_mlp_of_two_layers():
    class Residual(Ungated):
        def forward(self, x):
            return x + super().forward(x)

    model, _ = block(Residual())
    (found,) = patch_peft(model).blocks
    assert found.reason.startswith("it is not fc2(act(fc1(x)))")
