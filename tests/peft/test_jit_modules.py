"""Models with modules of `torch.jit` inside, whose classes have no forward to look at: patched, computed, explained."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from block_samples import WIDTH, Block, Gated, adapted
from peft_samples import IN, layer, tiny

from lora_kernels import patch_peft, unpatch_peft
from lora_kernels.peft import explain

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning")


def patched_and_stock(stock):
    model = copy.deepcopy(stock)
    return model, patch_peft(model)


@pytest.mark.parametrize("how", ["scripted", "traced"])
def test_a_module_beside_the_layers(how):
    """As in a vision model with a scripted preprocessing."""
    x = torch.randn(3, WIDTH)
    beside = torch.jit.script(nn.Tanh()) if how == "scripted" else torch.jit.trace(nn.Tanh(), x)
    stock = adapted(nn.Sequential(nn.Linear(WIDTH, WIDTH), beside))
    model, report = patched_and_stock(stock)
    torch.testing.assert_close(model(x), stock(x))
    assert report.count("fused") == explain(model, x).count("fused") == explain(model).count("fused") == 1
    assert unpatch_peft(model) == 1


def test_the_activation_of_an_mlp(joined):
    part = Gated()
    part.act_fn = torch.jit.script(nn.SiLU())
    stock, x = adapted(Block(part)), torch.randn(3, WIDTH)
    model, report = patched_and_stock(stock)
    torch.testing.assert_close(model(x), stock(x))
    assert not joined
    assert "act_fn" in report.blocks[0].reason


def test_the_base_layer(computed):
    """`torch.utils.mkldnn` puts such a module in the place of a linear layer."""
    from torch.utils.mkldnn import to_mkldnn

    stock, x = tiny(), torch.randn(3, IN)
    model = copy.deepcopy(stock)
    layer(model).base_layer = to_mkldnn(layer(model).base_layer)
    patch_peft(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), stock(x))
    assert computed == ["lora_add"]
    (found,) = explain(model, x).layers
    assert (found.form, found.reason) == ("low-rank", "the base layer is a MkldnnLinear, not a plain nn.Linear")
