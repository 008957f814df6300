"""What `swap_linear`, `load_adapter` and `patch_peft` say of what they do not take: the way to go."""

import pytest
from peft import LoraConfig, get_peft_model
from test_peft_adapters import Net
from torch import nn

from lora_kernels import load_adapter, patch_peft, swap_linear


def linears(model):
    return [(name, type(m).__name__) for name, m in model.named_modules()]


def test_swap_errors():
    with pytest.raises(
        ValueError, match=r"target_modules=\['c_attn'\] matches no linear layer of Net\. .*head, o_proj, q_proj"
    ):
        swap_linear(Net(), ["c_attn"])
    model = Net()
    model.layers[0].q_proj = nn.modules.linear.NonDynamicallyQuantizableLinear(8, 12)
    before = list(model.modules())
    with pytest.raises(
        TypeError, match=r"layers\.0\.q_proj is a NonDynamically.*exclude_modules=\['layers\.0\.q_proj'\]"
    ):
        swap_linear(model, ["q_proj"])
    assert list(model.modules()) == before
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="r must be at least 1, got 0"):
        swap_linear(Net(), ["q_proj"], r=0)


@pytest.mark.parametrize("patched", [False, True])
def test_peft_s_layers_are_not_taken_apart(patched, tmp_path):
    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["q_proj"]))
    if patched:
        patch_peft(model)
    before = linears(model)
    for call in (
        lambda: swap_linear(model, "all-linear"), lambda: swap_linear(model, ["head"]),
        lambda: load_adapter(model, tmp_path),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"PEFT LoRA layers \(base_.*q_proj\).*lora_kernels\.patch_peft\(model\)"):
            call()
    assert linears(model) == before
