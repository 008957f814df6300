"""The fast path of PyTorch's encoders is off while an adapted layer is inside, and no longer; files say nothing of it."""

import copy
import io
import pickle

import pytest
import torch
from adapter_samples import fill
from block_samples import Attention, Gated, block
from encoder_samples import MASK, D, Encoder, slow
from peft import LoraConfig, get_peft_model
from peft_samples import Foreign
from torch import nn

from lora_kernels import merge_and_unload, patch_peft, swap_linear, unpatch_peft
from lora_kernels.peft.fast_path import CallsLayers

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
KINDS = nn.TransformerEncoder, nn.TransformerEncoderLayer


@pytest.fixture
def fused(monkeypatch):
    """A list that grows as an encoder layer takes its fast path."""
    calls, own = [], torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: (calls.append(1), own(*args))[1])
    return calls


def peft_encoder(targets=("linear1", "linear2")):
    torch.manual_seed(0)
    return fill(get_peft_model(Encoder(), LoraConfig(r=4, target_modules=list(targets)))).eval(), torch.randn(2, 5, D)


def encoders(model):
    return [module for module in model.modules() if isinstance(module, KINDS)]


def fields(model):
    return [set(vars(module)) for module in model.modules()]


def test_a_patched_encoder_has_the_attributes_and_the_pickle_of_a_stock_one(fused):
    model, x = peft_encoder()
    before, values = fields(model), [dict(vars(module)) for module in encoders(model)]
    with torch.no_grad():
        stock = model(x, MASK)
        assert len(fused) == 2
        patch_peft(model)
        assert fields(model) == before
        for module, old in zip(encoders(model), values, strict=True):
            assert all(vars(module)[name] is value for name, value in old.items())
        again = Foreign(io.BytesIO(pickle.dumps(model))).load()
        assert {type(module) for module in encoders(again)} == set(KINDS)
        fused.clear()
        assert torch.equal(again(x, MASK), stock)
        assert len(fused) == 2
        fused.clear()
        twin = copy.deepcopy(model)
        torch.testing.assert_close(twin(x, MASK), slow(model, x, MASK))
        assert not fused


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("how", ["merge_and_unload", "unload"])
@pytest.mark.parametrize("targets", [("linear1", "linear2"), ("self_attn",)])
def test_the_fast_path_is_back_after_peft_takes_its_adapters_out(targets, how, mask, fused):
    model, x = peft_encoder(targets)
    patch_peft(model)
    with torch.no_grad():
        y = model(x, mask)
        assert not fused
        plain = getattr(model, how)()
        twin = copy.deepcopy(plain)
        for one in (plain, twin):
            fused.clear()
            if how == "merge_and_unload":
                torch.testing.assert_close(one(x, mask)[~MASK], y[~MASK], rtol=1e-4, atol=1e-4)
            else:
                torch.testing.assert_close(one(x, mask)[~MASK], slow(one, x, mask)[~MASK])
            assert len(fused) == 2
        again = get_peft_model(plain, LoraConfig(r=4, target_modules=["linear1"])).eval()
        fused.clear()
        again(x, mask)
        assert not fused


@pytest.mark.parametrize("whole", [True, False], ids=["the model", "a layer"])
def test_a_saved_model_of_ours_loads_with_its_adapters(whole, fused):
    torch.manual_seed(0)
    model, x = Encoder().eval(), torch.randn(2, 5, D)
    swap_linear(model, ["linear1", "linear2"], r=4, lora_alpha=8)
    saved, given = (fill(model), (x, MASK)) if whole else (fill(model).encoder.layers[1], (x,))
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    with torch.no_grad():
        torch.testing.assert_close(loaded(*given), slow(saved, *given))
        torch.testing.assert_close(copy.copy(saved)(*given), slow(saved, *given))
        assert not fused
        merge_and_unload(loaded)(*given)
    assert fused
    assert not any(isinstance(module, CallsLayers) for module in loaded.modules())


def test_unpatching_leaves_an_encoder_of_swapped_layers_as_it_is(fused):
    model, x = Encoder().eval(), torch.randn(2, 5, D)
    swap_linear(model, ["linear1"], r=4)
    assert unpatch_peft(model) == 0
    with torch.no_grad():
        model(x)
    assert not fused


def test_a_switch_that_is_set_by_hand_stays():
    model, _ = peft_encoder()
    layer = encoders(model)[-1]
    patch_peft(model)
    layer.activation_relu_or_gelu = 0
    unpatch_peft(model)
    assert vars(layer)["activation_relu_or_gelu"] == 0
    assert [vars(module).get("activation_relu_or_gelu", 1) for module in encoders(model)] == [1, 1, 0]


def test_a_compiled_encoder_has_its_adapters():
    model, x = peft_encoder()
    patch_peft(model)
    with torch.no_grad():
        y = model(x)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), y)


@pytest.mark.parametrize("make", [lambda: block(Attention())[0], lambda: block(Gated())[0], lambda: peft_encoder()[0]])
def test_what_peft_has_merged_gets_its_classes_back(make):
    model = make()
    before = {
        name: type(module) for name, module in model.base_model.model.named_modules() if "lora" not in str(type(module))
    }
    patch_peft(model)
    merged = model.merge_and_unload()
    assert unpatch_peft(merged) == 0
    now = {name: type(module) for name, module in merged.named_modules()}
    assert now.keys() & before.keys()
    assert all(now[name] is before[name] for name in now.keys() & before.keys())
