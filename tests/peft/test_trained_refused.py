"""Modules and files of modules trained whole that cannot be taken: named, and nothing is changed or written."""

import copy
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

pytest.importorskip("peft")

from peft.utils.other import ModulesToSaveWrapper
from trained_samples import CONFIG, TENSORS, Net, moved, ours, same_state

from lora_kernels import load_adapter, save_adapter, swap_linear

SWAPS = {
    "a string": (dict(modules_to_save="norm"), TypeError, "modules_to_save must be a list of names, got 'norm'; pass ['norm']"),
    "no names": (dict(modules_to_save=[1]), TypeError, "modules_to_save must be a list of names, got [1]"),
    "no list": (dict(modules_to_save=3), TypeError, "modules_to_save must be a list of names, got 3"),
    "a stranger": (dict(modules_to_save=["norm", "score"]), ValueError, "modules_to_save has 'score', in which no module's"),
    "a list": (dict(target_modules=["lm_head"], modules_to_save=["layers"]), TypeError, "takes layers, a ModuleList, which is not called"),
    "what is targeted": (
        dict(modules_to_save=["proj"]), ValueError,
        "takes layers.0.q_proj whole, and target_modules an adapter for layers.0.q_proj",
    ),
    "all that is targeted": (
        dict(modules_to_save=["q_proj"]), ValueError,
        "no linear layer of Net matches target_modules=['q_proj'] outside of modules_to_save=['q_proj'].",
    ),
    "one in another": (dict(modules_to_save=["tail", "tail.0"]), ValueError, "takes tail.0 as well as tail, in which it"),
}  # fmt: skip


@pytest.mark.parametrize("fault", SWAPS)
def test_modules_that_cannot_be_saved_are_named(fault):
    fields, error, text = SWAPS[fault]
    model = Net()
    with pytest.raises(error, match=re.escape(text)):
        swap_linear(model, **dict(target_modules=["q_proj"], r=2) | fields)
    assert all(p.requires_grad for p in model.parameters())
    same_state(model, Net())


def test_modules_with_adapters_in_them_are_named():
    model = ours(None)
    with pytest.raises(ValueError, match=r"takes layers\.0 whole, and layers\.0\.q_proj is a LoRALinear"):
        swap_linear(model, ["lm_head"], modules_to_save=["layers.0"])
    model = ours(["lm_head"])
    with pytest.raises(
        ValueError, match=r"an earlier call takes lm_head whole, and target_modules an adapter for lm_head"
    ):
        swap_linear(model, ["lm_head"])


class Numbers(nn.Module):
    def __init__(self):
        super().__init__()
        self.codes = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)


def test_integers_cannot_be_trained():
    model = Net()
    model.quantised = Numbers()
    with pytest.raises(
        TypeError, match=r"takes quantised, and quantised\.codes is torch\.int8, which cannot be trained"
    ):
        ours(["quantised"], model)
    assert all(p.requires_grad for p in Net().parameters())


def lose_root(model):
    model.gain = nn.Parameter(torch.ones(1))


def lose_gamma(model):
    model.layers[1].gamma = nn.Parameter(torch.ones(1))


def lose_weight(model):
    model.layers[0].q_proj.weight.requires_grad_()


def lose_proj(model):
    model.proj = nn.Linear(2, 2)


def lose_nested(model):
    model.mix = nn.Sequential()
    model.mix.mix = nn.Linear(2, 2)
    model.mix.scale = nn.Parameter(torch.ones(1))


LOST = {
    lose_root: "gain is trained and held by the model itself",
    lose_gamma: "layers.1.gamma is trained and held by layers.1 with layers.1.q_proj in it",
    lose_weight: "layers.0.q_proj.weight is trained, and an adapter file does not hold it",
    lose_proj: "takes layers.0.q_proj whole, and layers.0.q_proj is a LoRALinear",
    lose_nested: "takes mix.mix as well as mix, in which it lies",
}


@pytest.mark.parametrize("lose", LOST)
def test_what_would_be_lost_is_named_and_nothing_is_written(lose, tmp_path):
    lose(model := ours(None))
    with pytest.raises(ValueError, match=re.escape(LOST[lose])):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_module_that_peft_has_wrapped_is_named(tmp_path):
    model = ours(None)
    model.embed_tokens = ModulesToSaveWrapper(model.embed_tokens, "default")
    for call in (
        lambda: save_adapter(model, tmp_path / "new"), lambda: swap_linear(model, ["lm_head"]),
        lambda: load_adapter(model, tmp_path),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"embed_tokens is a ModulesToSaveWrapper of PEFT's"):
            call()
    assert not (tmp_path / "new").exists()


def test_a_model_without_numbers_is_neither_read_nor_written(tmp_path):
    save_adapter(ours(["lm_head"]), tmp_path)
    for names in (None, ["lm_head"]):
        with torch.device("meta"):
            bare, standing = Net(), ours(names)
        for call, name in (
            (lambda: load_adapter(bare, tmp_path), r"(lm_head|q_proj)\.weight"),  # noqa: B023
            (lambda: load_adapter(standing, tmp_path), r"(lm_head\.weight|q_proj\.lora_A)"),  # noqa: B023
            (lambda: save_adapter(standing, tmp_path / "new"), r"q_proj\.lora_A"),  # noqa: B023
        ):
            with pytest.raises(TypeError, match=rf"{name} is on the meta device and has no numbers"):
                call()
    assert not (tmp_path / "new").exists()


def test_the_path_of_a_file_is_not_a_folder_s(tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(NotADirectoryError, match=r"save_adapter: .*file is a file; pass a folder"):
        save_adapter(ours(None), tmp_path / "file")


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    model = ours(["lm_head"])
    save_adapter(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.keys() == {TENSORS, CONFIG}

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        save_adapter(moved(model), tmp_path)
    with pytest.raises(TypeError, match="JSON"):
        save_adapter(model, tmp_path / "new", task_type=object())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


HEAD = "base_model.model.lm_head.weight"
FILES = {
    "a key missing": (lambda t: t.pop(HEAD), f"lacks {HEAD}, for which the model has a layer"),
    "another name": (lambda t: t.update({HEAD + "s": t.pop(HEAD)}), f"has {HEAD}s, for which the model has no LoRA layer; expected {HEAD}"),
    "another shape": (lambda t: t.update({HEAD: torch.ones(9, 8)}), "lm_head.weight is (9, 8) in the file and (7, 8) in the model"),
    "integers": (lambda t: t.update({HEAD: torch.ones(7, 8, dtype=torch.int8)}), "lm_head.weight is torch.int8 in the file and torch.float32"),
    "a float count": (
        lambda t: t.update({"base_model.model.tail.1.num_batches_tracked": torch.tensor(1.0)}),
        "tail.1.num_batches_tracked is torch.float32 in the file and torch.int64 in the model",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "make", [Net, lambda: ours(None), lambda: ours(["lm_head", "tail"])], ids=["bare", "swapped", "same"]
)
@pytest.mark.parametrize("fault", FILES)
def test_a_file_that_does_not_fit_changes_nothing(fault, make, tmp_path):
    edit, text = FILES[fault]
    save_adapter(moved(ours(["lm_head", "tail"])), tmp_path)
    edit(tensors := load_file(tmp_path / TENSORS))
    save_file(tensors, tmp_path / TENSORS)
    model = make()
    grads, before = [p.requires_grad for p in model.parameters()], copy.deepcopy(model)
    with pytest.raises(ValueError, match=re.escape(text)):
        load_adapter(model, tmp_path)
    assert [p.requires_grad for p in model.parameters()] == grads
    same_state(model, before)


def test_a_file_without_what_the_model_trains_is_refused(tmp_path):
    save_adapter(ours(None), tmp_path)
    with pytest.raises(ValueError, match=r"lacks base_model\.model\.lm_head\.weight"):
        load_adapter(ours(["lm_head"]), tmp_path)
