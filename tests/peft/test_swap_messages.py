"""What `swap_linear`, `load_adapter` and `patch_peft` say of what they do not take: the way to go."""

import re

import pytest
from adapter_samples import Net
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_kernels import load_adapter, patch_peft, save_adapter, swap_linear


def linears(model):
    return [(name, type(m).__name__) for name, m in model.named_modules()]


def test_swap_errors():
    with pytest.raises(
        ValueError, match=r"no linear layer of Net matches 'c_attn' of target_modules\. .*head, o_proj, q_proj"
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


LAYERS = "Its linear layers end in: head, o_proj, q_proj."


@pytest.mark.parametrize(
    ("targets", "error", "said"),
    [
        (["q_proj", "c_attn", "w"], ValueError, f"no linear layer of Net matches 'c_attn', 'w' of target_modules. {LAYERS}"),
        ("all_linear", ValueError, f'{LAYERS} For all of them pass target_modules="all-linear".'),
        ("All Linear", ValueError, f'{LAYERS} For all of them pass target_modules="all-linear".'),
        (["all-linear"], ValueError, f'{LAYERS} For all of them pass target_modules="all-linear".'),
        (LoraConfig(target_modules=["q_proj"]), TypeError, "is a LoraConfig. Pass its fields: swap_linear(model, config"),
        (None, TypeError, 'must be names, a regular expression or "all-linear", got None.'),
        ([3], TypeError, 'must be names, a regular expression or "all-linear", got [3].'),
    ],
)  # fmt: skip
def test_targets_that_target_nothing(targets, error, said):
    model = Net()
    before = linears(model)
    with pytest.raises(error, match=re.escape(said)):
        swap_linear(model, targets)
    assert linears(model) == before
    assert all(p.requires_grad for p in model.parameters())


def test_the_fields_of_peft_s_config_are_taken():
    config = LoraConfig(r=2, target_modules=["q_proj", "head"], exclude_modules=["head"])
    assert isinstance(config.target_modules, set)
    swapped = swap_linear(Net(), config.target_modules, config.r, exclude_modules=config.exclude_modules)
    assert swapped == [f"layers.{i}.q_proj" for i in range(3)]


def test_a_layer_by_itself_has_a_way_of_its_own():
    for targets in ("all-linear", ["weight"]):
        with pytest.raises(ValueError, match=r"use LoRALinear\.from_linear\(layer, r=\.\.\.\)"):
            swap_linear(nn.Linear(3, 4), targets)


def test_the_path_of_a_file_is_not_a_folder_s(tmp_path):
    swap_linear(model := Net(), ["q_proj"], r=2)
    save_adapter(model, tmp_path)
    with pytest.raises(
        NotADirectoryError, match=re.escape(f"is a file; pass the folder it lies in: {str(tmp_path)!r}.")
    ):
        load_adapter(model, tmp_path / "adapter_model.safetensors")


@pytest.mark.parametrize("blocks", ["no", None, 0])
def test_blocks_are_joined_or_not(blocks):
    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(TypeError, match=rf"patch_peft: blocks must be True or False, got {blocks!r}\."):
        patch_peft(model, blocks=blocks)
