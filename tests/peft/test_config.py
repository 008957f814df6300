"""A field of an adapter's configuration is read, is without effect, is neutral, or is refused by its name."""

import dataclasses
import json
import re
import sys

import pytest
import torch
from adapter_samples import Net
from safetensors.torch import load_file, save_file

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model

from lora_kernels import load_adapter, save_adapter, swap_linear
from lora_kernels.peft import config as rules

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
X = torch.linspace(-1, 1, 16).view(2, 8)


@pytest.fixture
def saved(tmp_path):
    """A folder as PEFT writes it, with every field of its configuration."""
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(Net(), config).save_pretrained(tmp_path)
    return tmp_path


def edit(folder, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder, text, error=ValueError):
    """The folder is refused by a bare model and by a swapped one, with this text, and neither is changed."""
    bare, standing = Net(), Net()
    swap_linear(standing, ["q_proj"], r=4)
    for model in (bare, standing):
        before = repr(model), {name: t.clone() for name, t in model.state_dict().items()}
        grads = [p.requires_grad for p in model.parameters()]
        with pytest.raises(error, match=re.escape(text)):
            load_adapter(model, folder)
        assert repr(model) == before[0]
        assert grads == [p.requires_grad for p in model.parameters()]
        assert all(torch.equal(t, before[1][name]) for name, t in model.state_dict().items())


def test_every_field_of_this_peft_is_known():
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    known = {*rules._READ, *rules._WITHOUT_EFFECT, *rules._BEYOND}
    later = {"lora_ga_config", "arrow_config", "kasa_config", "monteclora_config", "use_bdlora", "velora_config"}
    assert fields <= known
    assert known - fields <= later, "a field that no PEFT has"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scaling_multiplier", 2.0), ("use_future_lora", True), ("future_config", {"gain": 3}), ("lora_gamma", 0),
        ("temperature", "auto"), ("ensure_weight_tying", True), ("megatron_config", {"tp": 2}), ("use_dora", True),
        ("use_qalora", True), ("layer_replication", [[0, 2], [1, 3]]), ("lora_bias", True), ("fan_in_fan_out", True),
        ("trainable_token_indices", [1, 2]), ("target_parameters", ["head.weight"]), ("kasa_config", {"beta": 0.1}),
    ],
)  # fmt: skip
def test_a_field_that_may_change_the_numbers_is_named(field, value, saved):
    edit(saved, **{field: value})
    refused(saved, f"{CONFIG} has {field}={value!r}")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("future_config", None), ("use_future_lora", False), ("future_pattern", {}), ("future_names", []),
        ("qalora_group_size", 32), ("revision", "main"), ("peft_version", "0.99.0"), ("task_type", "CAUSAL_LM"),
        ("inference_mode", False), ("auto_mapping", {"base_model_class": "Net"}), ("runtime_config", {"x": False}),
        ("eva_config", {"rho": 2.0}), ("loftq_config", {"loftq_bits": 4}), ("megatron_core", "megatron.other"),
        ("use_rslora", None), ("rank_pattern", None), ("layers_to_transform", []), ("exclude_modules", []),
    ],
)  # fmt: skip
def test_a_field_without_effect_passes(field, value, saved):
    load_adapter(expected := Net(), saved)
    edit(saved, **{field: value})
    load_adapter(model := Net(), saved)
    assert torch.equal(model(X), expected(X))


def test_the_installed_peft_is_asked_for_the_default_of_a_field_that_came_later(saved, monkeypatch):
    @dataclasses.dataclass
    class Later(LoraConfig):
        future_rate: float = 0.25
        future_part: bool = True
        future_method: dict | None = None

    edit(saved, future_rate=0.25)
    refused(saved, f"{CONFIG} has future_rate=0.25, which is no field that load_adapter knows")
    rules._peft_defaults.cache_clear()
    monkeypatch.setattr("peft.LoraConfig", Later)
    load_adapter(Net(), saved)
    edit(saved, future_rate=0.5)
    refused(saved, f"{CONFIG} has future_rate=0.5")
    edit(saved, future_rate=0.25, future_part=False)
    refused(saved, f"{CONFIG} has future_part=False")
    edit(saved, future_part=True, future_method={})
    load_adapter(Net(), saved)
    rules._peft_defaults.cache_clear()
    monkeypatch.setitem(sys.modules, "peft", None)  # as if it were not installed
    refused(saved, f"{CONFIG} has future_rate=0.25")
    rules._peft_defaults.cache_clear()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (dict(use_rslora="no"), "has use_rslora='no'; it must be true or false"),
        (dict(target_modules=5), "has target_modules=5; it must be a list of names or a regular expression"),
        (dict(target_modules=["q_proj", 1]), "has target_modules=['q_proj', 1]; it must be a list of names"),
        (dict(target_modules="(q_proj"), "has '(q_proj' in target_modules, which is no regular expression"),
        (dict(rank_pattern={"q_proj)": 4}), "has 'q_proj)' in rank_pattern, which is no regular expression"),
        (dict(alpha_pattern={"*": 4}), "has '*' in alpha_pattern, which is no regular expression"),
        (dict(exclude_modules={"a": 1}), "has exclude_modules={'a': 1}; it must be a list of names"),
        (dict(layers_to_transform="1"), "has layers_to_transform='1'; it must be an integer or a list of integers"),
        (dict(layers_to_transform=True), "has layers_to_transform=True; it must be an integer"),
        (dict(layers_pattern=3), "has layers_pattern=3; it must be a name or a list of names"),
        (
            dict(target_modules=r".*q_proj", layers_to_transform=[0]),
            "has layers_to_transform=[0] beside target_modules='.*q_proj'; PEFT takes it beside a list of names alone",
        ),
    ],
)  # fmt: skip
def test_a_value_of_another_kind_is_named(changes, text, saved):
    edit(saved, **changes)
    refused(saved, text)


def test_targets_that_the_model_does_not_have_freeze_nothing(saved):
    edit(saved, target_modules=["k_proj"])
    (model := Net()).requires_grad_(True)
    with pytest.raises(ValueError, match=r"target_modules=\['k_proj'\] of .* matches no linear layer of Net"):
        load_adapter(model, saved)
    assert all(p.requires_grad for p in model.parameters())


def test_a_rank_that_the_adapters_do_not_have_is_named(saved):
    edit(saved, r=8)
    swap_linear(model := Net(), ["q_proj"], r=4)
    with pytest.raises(ValueError, match=r"gives layers\.0\.q_proj the rank 8, and .* has adapters of rank 4"):
        load_adapter(model, saved)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_adapters_that_are_not_floating_point_are_refused(dtype, saved):
    tensors = load_file(saved / TENSORS)
    key = "base_model.model.layers.1.q_proj.lora_B.weight"
    save_file(tensors | {key: torch.ones(12, 4, dtype=dtype)}, saved / TENSORS)
    refused(saved, f"load_adapter: {key} is {dtype} in the file; adapters are floating-point numbers")


def test_keys_of_a_state_dict_are_named_with_what_was_expected(saved):
    model = get_peft_model(Net(), LoraConfig(r=4, target_modules=["q_proj"]), adapter_name="mine")
    save_file({key: t for key, t in model.state_dict().items() if "lora_" in key}, saved / TENSORS)
    stem = "base_model.model.layers.0.q_proj.lora_A"
    refused(
        saved, f"has {stem}.mine.weight; expected {stem}.weight, as PEFT's files leave out an adapter's name ('mine')"
    )


@pytest.mark.parametrize("other", ["lora_A.weights", "lora_down.weight", "lora_embedding_A", "lora_magnitude_vector"])
def test_other_keys_are_named_with_what_was_expected(other, saved):
    tensors, stem = load_file(saved / TENSORS), "base_model.model.layers.1.q_proj"
    tensors[f"{stem}.{other}"] = tensors.pop(f"{stem}.lora_A.weight")
    save_file(tensors, saved / TENSORS)
    refused(saved, f"has {stem}.{other}, for which the model has no LoRA layer; expected {stem}.lora_A.weight")


def test_a_file_in_parts_is_named(saved):
    (saved / TENSORS).rename(saved / "adapter_model-00001-of-00002.safetensors")
    text = "but adapter_model-00001-of-00002.safetensors. PEFT keeps an adapter in one file"
    refused(saved, text, FileNotFoundError)


class Deep(torch.nn.Module):
    """Twelve layers, so that a number is the beginning of another one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(Net() for _ in range(12))

    def forward(self, x):
        return torch.stack([layer(x) for layer in self.layers])


@pytest.mark.parametrize(
    "fields",
    [
        dict(target_modules=["head"], rank_pattern={"layers.1.head": 5}, alpha_pattern={"layers.10.head": 3, "1.head": 7}),
        dict(target_modules=["layers.1.head", "layers.10.head"], rank_pattern={"layers.1": 5, "layers.1.h": 6}),
        dict(target_modules=["layers.3.head", "q_proj"], layers_to_transform=[1, 11], layers_pattern=["layers"]),
        dict(target_modules=["q_proj"], layers_to_transform=2, layers_pattern=["blocks", r"layers\.11\.layers", "layers"]),
        dict(target_modules=["q_proj"], layers_to_transform=[1]),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:The following")  # PEFT's, of a key that matches no layer
def test_the_beginning_of_a_name_is_not_the_name(fields, tmp_path):
    theirs = get_peft_model(Deep(), LoraConfig(r=2, lora_alpha=5, init_lora_weights=False, **fields)).eval()
    theirs.save_pretrained(tmp_path)
    names = load_adapter(model := Deep(), tmp_path)
    expected = {
        name.removeprefix("base_model.model."): (layer.r["default"], layer.scaling["default"])
        for name, layer in theirs.named_modules() if hasattr(layer, "base_layer")
    }  # fmt: skip
    assert {name: (model.get_submodule(name).r, model.get_submodule(name).scaling) for name in names} == expected
    torch.testing.assert_close(model(X), theirs(X))
    save_adapter(model, tmp_path / "ours")
    again = PeftModel.from_pretrained(Deep(), tmp_path / "ours").eval()
    torch.testing.assert_close(again(X), theirs(X))
