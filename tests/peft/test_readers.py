"""Layers whose weights are read and that are not called: adapters there work, or a warning names them."""

import copy
import warnings

import pytest
import torch
from adapter_samples import fill
from encoder_samples import MASK, D, Encoder, slow
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_kernels import LoRALinear, explain, merge_and_unload, patch_peft, swap_linear, unpatch_peft
from lora_kernels.peft import fast_path
from lora_kernels.peft.classes import stock_class

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


class ReadAndCalled(nn.Module):
    """A module that reads one layer's weight, calls another, and does both with a third."""

    def __init__(self):
        super().__init__()
        self.dt_proj, self.in_proj, self.out_proj = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x):
        assert self.in_proj.weight.dtype is x.dtype
        assert self.in_proj.weight is not None
        return self.last(self.in_proj(x) @ self.dt_proj.weight.T)

    def last(self, x):
        return x @ self.out_proj.weight.T if x.shape[0] > 8 else self.out_proj(x)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("targets", [["linear1", "linear2"], r"encoder\.layers\.1\.linear2"])
def test_an_encoder_in_eval_mode_has_its_adapters(activation, mask, targets):
    torch.manual_seed(0)
    model, x = Encoder(activation).eval(), torch.randn(2, 5, D)
    plain, before = model(x, mask), [dict(vars(m)) for m in model.modules()]
    swap_linear(model, targets, r=4, lora_alpha=8)
    torch.testing.assert_close(model(x, mask)[~MASK], plain[~MASK])
    y = fill(model)(x, mask)
    torch.testing.assert_close(y, slow(model, x, mask))
    assert (y - plain)[~MASK].abs().max() > 0.05
    y.square().sum().backward()
    adapters = [p for m in model.modules() if isinstance(m, LoRALinear) for p in (m.lora_A, m.lora_B)]
    assert adapters
    assert all(p.grad.abs().max() > 0 for p in adapters)
    with torch.no_grad():
        torch.testing.assert_close(copy.deepcopy(model)(x, mask), y)
        merge_and_unload(model)
        torch.testing.assert_close(model(x, mask)[~MASK], y[~MASK], rtol=1e-4, atol=1e-4)
    # The fast path is taken again.
    fields = "activation_relu_or_gelu", "use_nested_tensor"
    for old, new in zip(before, model.modules(), strict=True):
        assert all(old.get(name) == getattr(new, name, None) for name in fields)
        assert not isinstance(new, fast_path.CallsLayers)


@pytest.mark.parametrize("targets", [["linear1", "linear2"], ["self_attn"]])
@pytest.mark.parametrize("mask", [None, MASK])
def test_a_patched_encoder_in_eval_mode_has_its_adapters(targets, mask):
    torch.manual_seed(0)
    x = torch.randn(2, 5, D)
    model = fill(get_peft_model(Encoder(), LoraConfig(r=4, target_modules=targets))).eval()
    with torch.no_grad():
        stock, right = model(x, mask), slow(model, x, mask)
        assert (stock - right)[~MASK].abs().max() > 0.02
        for _ in range(2):
            patch_peft(model)
            torch.testing.assert_close(model(x, mask), right)
        unpatch_peft(model)
        # PEFT's attention merges and unmerges at each call.
        torch.testing.assert_close(model(x, mask), stock)
    patch_peft(model)
    model(x, mask).square().sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name and "linear" in name)


def test_explain_does_not_switch_the_fast_path_off_and_say_fused():
    model = get_peft_model(Encoder(), LoraConfig(r=4, target_modules=["linear1", "linear2"])).eval()
    patch_peft(model)
    found = explain(model, torch.randn(2, 5, D))
    assert [one.form for one in found.layers] == ["fused"] * 4
    # Someone switches it on again.
    for module in model.modules():
        if isinstance(module, fast_path.CallsLayers):
            module.__class__ = stock_class(type(module))
    found = explain(model, torch.randn(2, 5, D))
    assert [one.form for one in found.layers] == ["stock"] * 4
    assert all("fast path" in one.reason and "patch_peft" in one.reason for one in found.layers)
    assert [one.form for one in explain(model.train(), torch.randn(2, 5, D)).layers] == ["fused"] * 4


def test_out_proj_of_an_attention_is_named():
    model = nn.TransformerEncoderLayer(D, 2, 24, batch_first=True)
    with pytest.warns(UserWarning, match=r'"all-linear" leaves out self_attn\.out_proj: MultiheadAttention reads'):
        assert swap_linear(model, "all-linear", r=2) == ["linear1", "linear2"]
    with pytest.raises(
        TypeError, match=r"self_attn\.out_proj.*MultiheadAttention reads out_proj\.weight and never calls"
    ):
        swap_linear(nn.TransformerEncoderLayer(D, 2, 24), ["out_proj"], r=2)
    with pytest.raises(ValueError, match=r"MultiheadAttention reads out_proj\.weight.* no other linear layer"):
        swap_linear(nn.MultiheadAttention(D, 2), "all-linear", r=2)
    peft = get_peft_model(Encoder(), LoraConfig(r=2, target_modules=["out_proj", "linear1"]))
    with pytest.warns(
        UserWarning, match=r"patch_peft: MultiheadAttention reads.*layers\.0\.self_attn\.out_proj"
    ) as said:
        found = patch_peft(peft)
    assert "linear1" not in str(said[0].message)
    for report in (found, explain(peft), explain(peft, torch.randn(2, 5, D))):
        forms = {one.name.rpartition(".")[2]: (one.form, one.reason) for one in report.layers}
        assert forms["linear1"] == ("fused", "")
        assert forms["out_proj"][0] == "stock"
        assert "reads out_proj.weight" in forms["out_proj"][1]


def test_what_a_source_reads_is_named():
    names = ["dt_proj", "in_proj", "out_proj"]
    with pytest.warns(UserWarning, match="swap_linear") as said:
        assert swap_linear(ReadAndCalled(), names, r=2) == names
    (text,) = [str(one.message) for one in said]
    assert "ReadAndCalled reads dt_proj.weight and never calls the layer, so the adapters of dt_proj have" in text
    assert "reads out_proj.weight in a part of its forward that does not call" in text
    assert "in_proj.w" not in text
    assert said[0].filename == __file__
    with pytest.warns(UserWarning, match="swap_linear") as said:
        assert swap_linear(ReadAndCalled(), "all-linear", r=2) == names[1:]
    assert "so the adapters of out_proj have" in str(said[0].message)
    assert "leaves out dt_proj: ReadAndCalled" in str(said[1].message)
    with pytest.warns(UserWarning, match=r"patch_peft: ReadAndCalled reads dt_proj.weight"):
        patch_peft(get_peft_model(ReadAndCalled(), LoraConfig(r=2, target_modules=names)))


def test_a_subclass_is_read_with_what_it_inherits():
    class Child(ReadAndCalled):
        def forward(self, x):
            return super().forward(x) + 1

    class Quiet(ReadAndCalled):
        def forward(self, x):
            return self.out_proj(self.dt_proj(self.in_proj(x)))

    with pytest.warns(UserWarning, match="Child reads dt_proj.weight"):
        swap_linear(Child(), ["dt_proj"], r=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        swap_linear(Quiet(), "all-linear", r=2)
        # This one calls its layers.
        swap_linear(torch.ao.nn.quantizable.MultiheadAttention(D, 2), ["out_proj"], r=2)


def test_mamba_is_named():
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=2)
    model = transformers.MambaForCausalLM(config)
    with pytest.warns(UserWarning, match=r"MambaMixer reads dt_proj.weight.*layers\.0\.mixer\.dt_proj.*layers\.1"):
        swap_linear(model, ["dt_proj"], r=2)


class Hidden(nn.Module):
    """A module that reads a weight by a name that no source says."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x, *, factor=1):
        return self.a(x) @ vars(self)["_modules"]["b"].weight * factor


@pytest.mark.parametrize("inputs", [torch.randn(3, D), (torch.randn(3, D),), {"x": torch.randn(3, D), "factor": 2}])
def test_example_inputs_show_what_is_called(inputs):
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match=r"with example_inputs the model does not call b\. Leave"):
        assert swap_linear(model := Hidden(), "all-linear", r=2, example_inputs=inputs) == ["a", "b"]
    assert "forward" not in vars(model.a)
    swap_linear(Encoder().eval(), ["linear1"], r=2, example_inputs=torch.randn(2, 5, D))
    assert torch.backends.mha.get_fastpath_enabled()
    assert state.shape == torch.get_rng_state().shape


def test_example_inputs_go_before_the_source():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = ReadAndCalled()

        def forward(self, x):
            return self.inner.dt_proj(self.inner.in_proj(x)) + self.inner.last(x)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = swap_linear(Outer(), "all-linear", r=2, example_inputs=torch.randn(3, D))
    assert names == ["inner.dt_proj", "inner.in_proj", "inner.out_proj"]


def test_a_wrong_example_changes_nothing():
    for inputs, error in ((torch.randn(3, D + 1), RuntimeError), (3, TypeError)):
        model = Hidden()
        with pytest.raises(error):
            swap_linear(model, ["a"], r=2, example_inputs=inputs)
        assert type(model.a) is nn.Linear
        assert model.a.weight.requires_grad
        assert "forward" not in vars(model.a)
