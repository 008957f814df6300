"""Adapter files go both ways between LoRALinear and PEFT, bit for bit; swapping in and out; every refusal's words."""

import json
import re

import pytest
import torch
from adapter_samples import Block, Net
from safetensors.torch import load_file, save_file
from torch import nn

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model

from lora_kernels import LoRALinear, load_adapter, merge_and_unload, save_adapter, swap_linear
from lora_kernels.peft.targets import select

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def randomized(model):
    torch.manual_seed(7)
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.3)
    return model


X = torch.linspace(-1, 1, 16).view(2, 8)
SWAPS = {
    "names": dict(target_modules=["q_proj", "o_proj"], r=4, lora_alpha=6),
    "one layer": dict(target_modules=["layers.1.q_proj"], r=3),
    "expression": dict(target_modules=r"layers\.[02]\..*_proj", r=2, lora_alpha=3, lora_dropout=0.1),
    "all-linear": dict(target_modules="all-linear", r=2),
    "excluded": dict(target_modules=["q_proj", "o_proj"], exclude_modules=["layers.1.o_proj", "layers.0.q_proj"], r=4),
    "patterns": dict(
        target_modules=["q_proj", "o_proj"], r=4, lora_alpha=8,
        rank_pattern={r"layers\.[01]\.q_proj": 7, "o_proj": 2}, alpha_pattern={r"^layers\.2\.o_proj": 3},
    ),
    "rslora": dict(target_modules=["q_proj"], r=4, lora_alpha=5, use_rslora=True, rank_pattern={"layers.1.q_proj": 3}),
}  # fmt: skip


@pytest.mark.parametrize("name", SWAPS)
def test_swap_means_what_peft_s_config_means(name):
    ours, theirs = Net(), get_peft_model(Net(), LoraConfig(**SWAPS[name]))
    names = swap_linear(ours, **SWAPS[name])
    expected = {
        n.removeprefix("base_model.model."): (m.r["default"], m.scaling["default"])
        for n, m in theirs.named_modules() if hasattr(m, "base_layer")
    }  # fmt: skip
    assert {n: (ours.get_submodule(n).r, ours.get_submodule(n).scaling) for n in names} == expected
    assert sum(isinstance(m, LoRALinear) for m in ours.modules()) == len(names)
    trained = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert trained == {f"{n}.{part}" for n in names for part in ("lora_A", "lora_B")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SWAPS)
def test_ours_to_peft_and_back(name, dtype, tmp_path):
    ours = Net(dtype)
    swap_linear(ours, **SWAPS[name])
    randomized(ours).eval()
    save_adapter(ours, tmp_path / "new" / "ours")
    theirs = PeftModel.from_pretrained(Net(dtype), tmp_path / "new" / "ours").eval()
    state = {n: p for n, p in theirs.named_parameters() if "lora_" in n}
    for layer, module in ours.named_modules():
        if isinstance(module, LoRALinear):
            for part in ("lora_A", "lora_B"):
                kept = state.pop(f"base_model.model.{layer}.{part}.default.weight")
                assert torch.equal(kept, getattr(module, part))
                assert kept.dtype == torch.float32, "PEFT's default over any base, and ours"
            assert theirs.get_submodule(f"base_model.model.{layer}").scaling["default"] == module.scaling
    assert not state, "PEFT has a layer that the file does not know"
    x = X.to(dtype)
    tolerance = dict(rtol=0.02, atol=0.1) if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(ours(x), theirs(x), **tolerance)
    assert theirs.peft_config["default"].lora_dropout == SWAPS[name].get("lora_dropout", 0)

    theirs.save_pretrained(tmp_path / "theirs")
    sent, returned = (load_file(tmp_path / folder / TENSORS) for folder in ("new/ours", "theirs"))
    assert sent.keys() == returned.keys()
    assert all(torch.equal(t, returned[key]) and t.dtype == returned[key].dtype for key, t in sent.items())
    again = Net(dtype)
    load_adapter(again, tmp_path / "theirs")
    assert torch.equal(again.eval()(x), ours(x))


@pytest.mark.parametrize("name", SWAPS)
def test_peft_s_files_into_new_and_into_standing_layers(name, tmp_path):
    theirs = randomized(get_peft_model(Net(), LoraConfig(**SWAPS[name], bias="none"))).eval()
    theirs.save_pretrained(tmp_path)
    bare, standing = Net(), Net()
    swap_linear(standing, **SWAPS[name] | {"alpha_pattern": {}, "lora_alpha": 99, "use_rslora": False})
    for model in (bare, standing):
        names = load_adapter(model, tmp_path)
        torch.testing.assert_close(model.eval()(X), theirs(X))
        for n in names:
            other = theirs.get_submodule(f"base_model.model.{n}")
            assert model.get_submodule(n).scaling == other.scaling["default"]
            assert model.get_submodule(n).lora_alpha == other.lora_alpha["default"]
            assert model.get_submodule(n).use_rslora == SWAPS[name].get("use_rslora", False)
            assert torch.equal(model.get_submodule(n).lora_A, other.lora_A["default"].weight)
    assert {p for n, p in bare.named_parameters() if p.requires_grad} == {
        p for n, p in bare.named_parameters() if "lora" in n
    }


def test_layers_to_transform(tmp_path):
    config = LoraConfig(target_modules=["q_proj"], layers_to_transform=[0, 2], layers_pattern="layers", r=2)
    theirs = randomized(get_peft_model(nn.Sequential(Net()), config))
    theirs.save_pretrained(tmp_path)
    model = nn.Sequential(Net())
    assert load_adapter(model, tmp_path) == ["0.layers.0.q_proj", "0.layers.2.q_proj"]
    torch.testing.assert_close(model(X), theirs(X))
    assert select(model, ["q_proj"], None, 1, "layers") == ["0.layers.1.q_proj"]
    assert select(model, ["q_proj"], None, 1, ["blocks"]) == []
    assert select(model, ["q_proj"], None, 1) == ["0.layers.1.q_proj"]


NEAR = {  # a key or a name that others begin or end with
    "one of ten": dict(target_modules=["layers.1", "layers.10"], rank_pattern={"layers.1": 5}),
    "ten of ten": dict(target_modules=["layers.1", "layers.10"], rank_pattern={"layers.10": 5}),
    "a number": dict(target_modules=["layers.1", "layers.10"], alpha_pattern={"1": 5}),
    "an end that is no part": dict(target_modules=["proj", "q_proj", "q_proj_2"], alpha_pattern={"proj": 5}),
    "a name that others begin with": dict(target_modules=["q_proj", "q_proj_2"], rank_pattern={"q_proj": 5}),
    "the first key of several": dict(
        target_modules=["q_proj", "proj"], rank_pattern={".*proj": 5, "q_proj": 6}, alpha_pattern={"proj": 3, ".*": 7}
    ),
    "two names in one key": dict(target_modules="all-linear", alpha_pattern={"layers.1|q_proj": 5}),
    "targets": dict(target_modules=["layers.1"]),
    "a target that is no whole part": dict(target_modules=["proj"]),
    "an excluded one": dict(target_modules=["layers.1", "layers.10"], exclude_modules=["layers.1"]),
    "targets by expression": dict(target_modules=r"layers\.1|.*q_proj", exclude_modules=r".*proj_2"),
}


class Near(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(12))
        self.proj, self.q_proj, self.q_proj_2 = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return sum(module(x) for module in self.modules() if hasattr(module, "in_features"))


@pytest.mark.parametrize("name", NEAR)
def test_a_key_that_only_begins_or_ends_a_name_is_not_meant(name, tmp_path):
    config = dict(r=2, lora_alpha=4) | NEAR[name]
    ours, theirs = Near(), get_peft_model(Near(), LoraConfig(**config))
    swap_linear(ours, **config)
    expected = {
        n.removeprefix("base_model.model."): (m.r["default"], m.scaling["default"])
        for n, m in theirs.named_modules() if hasattr(m, "base_layer")
    }  # fmt: skip
    save_adapter(ours, tmp_path)
    again = Near()
    load_adapter(again, tmp_path)
    for model in (ours, again):
        assert {n: (m.r, m.scaling) for n, m in model.named_modules() if isinstance(m, LoRALinear)} == expected


def test_a_scaling_set_by_hand_is_kept(tmp_path):
    model = Net()
    swap_linear(model, ["q_proj"], r=4)
    randomized(model)
    for i, block in enumerate(model.layers):
        block.q_proj.scaling = 0.3 + i
    save_adapter(model, tmp_path)
    again = Net()
    load_adapter(again, tmp_path)
    assert torch.equal(again(X), model(X))


def test_names_that_select_more_are_written_as_an_expression(tmp_path):
    model = Net()
    model.q_proj = nn.Linear(8, 8)
    swap_linear(model, r"layers\.\d\.q_proj|head", r=2)
    model.layers[1].q_proj = LoRALinear(8, 12, r=5)
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["target_modules"] == r"layers\.0\.q_proj|layers\.1\.q_proj|layers\.2\.q_proj|head"
    assert config["rank_pattern"] == {r"^layers\.1\.q_proj": 5}
    target = Net()
    target.q_proj = nn.Linear(8, 8)
    assert load_adapter(target, tmp_path) == ["layers.0.q_proj", "layers.1.q_proj", "layers.2.q_proj", "head"]
    assert type(target.q_proj) is nn.Linear


def test_names_for_peft_s_auto_classes_are_written(tmp_path):
    model = Net()
    swap_linear(model, ["q_proj"], r=2)
    save_adapter(model, tmp_path, base_model_name_or_path="some/model", task_type="CAUSAL_LM")
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == ("some/model", "CAUSAL_LM")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when dynamo is first imported
def test_wrappers_are_looked_through(tmp_path):
    model = Net()
    swap_linear(model, ["q_proj"], r=2)
    save_adapter(torch.compile(model), tmp_path)
    assert all(key.startswith("base_model.model.layers.") for key in load_file(tmp_path / TENSORS))
    load_adapter(torch.compile(model), tmp_path)


def test_merged_layers_are_saved_and_taken_out(tmp_path):
    model = Net()
    swap_linear(model, ["q_proj", "o_proj"], r=3, lora_alpha=5)
    randomized(model)
    expected = model(X).detach()
    weight = model.layers[0].q_proj.weight
    model.layers[1].q_proj.merge()
    save_adapter(model, tmp_path)
    assert merge_and_unload(model) is model
    assert {type(m) for m in model.modules()} == {Net, nn.ModuleList, Block, nn.Linear}
    assert model.layers[0].q_proj.weight is weight
    torch.testing.assert_close(model(X), expected)
    assert list(model.state_dict()) == list(Net().state_dict())
    again = Net()
    load_adapter(again, tmp_path)
    torch.testing.assert_close(again(X), expected)
    alone = LoRALinear(4, 6, r=2).eval()
    linear = merge_and_unload(alone)
    assert type(linear) is nn.Linear
    assert not linear.training
    assert linear.weight is alone.weight


def test_a_layer_in_two_places_stays_one():
    model = Net()
    model.layers[2].q_proj = model.layers[0].q_proj
    assert swap_linear(model, ["q_proj"], r=2) == [f"layers.{i}.q_proj" for i in range(3)]
    assert model.layers[2].q_proj is model.layers[0].q_proj
    assert isinstance(model.layers[0].q_proj, LoRALinear)
    merge_and_unload(model)
    assert model.layers[2].q_proj is model.layers[0].q_proj
    assert type(model.layers[0].q_proj) is nn.Linear


def test_dtypes_of_new_adapters(tmp_path):
    for dtype, wide, expected in (
        (torch.bfloat16, True, torch.float32), (torch.bfloat16, False, torch.bfloat16), (torch.float64, True, torch.float64),
    ):  # fmt: skip
        model = Net(dtype)
        swap_linear(model, ["q_proj"], autocast_adapter_dtype=wide)
        assert model.layers[0].q_proj.lora_A.dtype == expected
    swap_linear(half := Net(torch.bfloat16), ["q_proj"], autocast_adapter_dtype=False)
    save_adapter(half, tmp_path)
    load_adapter(again := Net(torch.bfloat16), tmp_path)
    assert again.layers[0].q_proj.lora_A.dtype == torch.bfloat16


@pytest.fixture
def saved(tmp_path):
    model = Net()
    swap_linear(model, ["q_proj", "o_proj"], r=4)
    save_adapter(randomized(model), tmp_path)
    return tmp_path


def edit_tensors(folder, edit):
    tensors = load_file(folder / TENSORS)
    edit(tensors)
    save_file({key: t.contiguous() for key, t in tensors.items()}, folder / TENSORS)


KEY = "base_model.model.layers.1.q_proj.lora_A.weight"
BROKEN = {
    "a key missing": (lambda t: t.pop(KEY), f"lacks {KEY}, for which the model has a layer"),
    "two missing": (lambda t: (t.pop(KEY), t.pop(KEY.replace("q_", "o_"))), "and 1 more, for which the model has a layer"),
    "a key too many": (
        lambda t: t.update({"base_model.model.head.lora_A.weight": torch.ones(4, 8)}),
        "has base_model.model.head.lora_A.weight, for which the model has no LoRA layer",
    ),
    "no prefix": (
        lambda t: t.update({KEY.removeprefix("base_model.model."): t.pop(KEY)}),
        "layers.1.q_proj.lora_A.weight does not begin with 'base_model.model.'",
    ),
    "another rank": (
        lambda t: t.update({KEY: torch.ones(6, 8)}), f"{KEY}: file rank 6, layer rank 4. Build the layer with r=6",
    ),
    "another size": (lambda t: t.update({KEY: torch.ones(4, 9)}), f"{KEY} is (4, 9) in the file, the layer needs (4, 8)"),
    "another number of dims": (lambda t: t.update({KEY: torch.ones(4)}), f"{KEY} is (4,) in the file"),
}  # fmt: skip


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("fault", BROKEN)
def test_a_file_that_does_not_fit_is_refused_and_changes_nothing(fault, swapped, saved):
    edit, text = BROKEN[fault]
    edit_tensors(saved, edit)
    model = Net()
    if swapped:
        swap_linear(model, ["q_proj", "o_proj"], r=4)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(text)):
        load_adapter(model, saved)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


CONFIGS = {
    "another method": (dict(peft_type="IA3"), "has peft_type 'IA3'"),
    "no method": (dict(peft_type=None), "has peft_type None"),
    "no rank": (dict(r=None), "has no 'r'"),
    "DoRA": (dict(use_dora=True), "has use_dora=True, which is more than LoRALinear computes. Load it with PEFT"),
    "lora_bias": (dict(lora_bias=True), "has lora_bias=True"),
    "modules_to_save": (dict(modules_to_save="head"), "has modules_to_save='head'; it must be a list of names"),
    "bias": (dict(bias="all"), "has bias='all'; LoRALinear keeps the base's bias frozen"),
    "PiSSA": (dict(init_lora_weights="pissa"), "has init_lora_weights='pissa', which changes the base"),
}


@pytest.mark.parametrize("fault", CONFIGS)
def test_a_configuration_beyond_plain_lora_is_refused(fault, saved):
    changes, text = CONFIGS[fault]
    path = saved / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=re.escape(text)):
        load_adapter(Net(), saved)


def test_pickle_is_refused(saved):
    state = load_file(saved / TENSORS)
    (saved / TENSORS).unlink()
    torch.save(state, saved / "adapter_model.bin")
    text = r"adapter_model\.bin is a pickle file and can run code when loaded\. Convert it to safetensors"
    for folder in (saved, saved / "adapter_model.bin"):
        with pytest.raises(ValueError, match=text):
            load_adapter(Net(), folder)
    (saved / "adapter_model.bin").rename(saved / TENSORS)
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_adapter(Net(), saved)


def test_files_that_are_not_there_or_not_json(saved):
    with pytest.raises(FileNotFoundError, match=r"there is no .*nowhere"):
        load_adapter(Net(), saved / "nowhere")
    (saved / CONFIG).write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json is not JSON"):
        load_adapter(Net(), saved)
    (saved / CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no .*adapter_config\.json"):
        load_adapter(Net(), saved)


def test_what_a_file_cannot_hold(tmp_path):
    for call in (lambda: save_adapter(Net(), tmp_path), lambda: merge_and_unload(Net())):
        with pytest.raises(ValueError, match="the model has no LoRALinear layers"):
            call()
    with pytest.raises(ValueError, match="is a LoRALinear itself and has no name"):
        save_adapter(LoRALinear(3, 3), tmp_path)
    model = Net()
    swap_linear(model, ["q_proj"], lora_dropout=0.1)
    model.layers[1].q_proj.lora_dropout = 0.2
    with pytest.warns(UserWarning, match=r"one lora_dropout for all layers; of \[0\.1, 0\.2\] the most frequent"):
        save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["lora_dropout"] == 0.1
    model.layers[2].q_proj.bias.requires_grad_()
    with pytest.raises(ValueError, match=r"layers\.2\.q_proj\.bias is trained"):
        save_adapter(model, tmp_path)
