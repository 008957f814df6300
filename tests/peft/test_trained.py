"""Modules that are trained whole beside adapters go both ways between LoRALinear and PEFT."""

import copy
import json
import re

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from trained_samples import CONFIG, IDS, TENSORS, WAYS, Net, config, moved, ours, same_state

from lora_kernels import LoRALinear, load_adapter, merge_and_unload, save_adapter, swap_linear


@pytest.mark.parametrize("way", WAYS)
def test_training_is_peft_s(way):
    model, theirs = ours(WAYS[way]), get_peft_model(Net(), config(WAYS[way]))
    named = {name.removeprefix("base_model.model."): p for name, p in theirs.named_parameters() if p.requires_grad}
    named = {
        re.sub(r"(lora_[AB])\.default\.weight|\.modules_to_save\.default", lambda found: found[1] or "", n): p
        for n, p in named.items()
    }
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == named.keys()
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(named[name])
    for net in (model, theirs):
        optimizer = torch.optim.SGD((p for p in net.parameters() if p.requires_grad), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            net(IDS).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(model.eval()(IDS), theirs.eval()(IDS))
    for name, p in trained.items():
        torch.testing.assert_close(p, named[name])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_ours_to_peft_and_back(way, dtype, tmp_path):
    model = moved(ours(WAYS[way], Net(dtype=dtype)))
    if way == "block":
        model(IDS)  # BatchNorm's buffers move
    save_adapter(model.eval(), tmp_path / "ours")
    theirs = PeftModel.from_pretrained(Net(dtype=dtype), tmp_path / "ours").eval()
    tolerance = {} if dtype is None else dict(rtol=0.02, atol=0.02)
    torch.testing.assert_close(theirs(IDS), model(IDS), **tolerance)
    theirs.save_pretrained(tmp_path / "theirs")
    sent, returned = (load_file(tmp_path / folder / TENSORS) for folder in ("ours", "theirs"))
    assert sent.keys() == returned.keys()
    assert all(torch.equal(t, returned[key]) and t.dtype == returned[key].dtype for key, t in sent.items())
    for again in (Net(dtype=dtype), ours(WAYS[way], Net(dtype=dtype)), ours(None, Net(dtype=dtype))):
        load_adapter(again.eval(), tmp_path / "theirs")
        same_state(again, model)
        save_adapter(again.requires_grad_(False), tmp_path / "again")  # what was read is written, trained or not
        assert load_file(tmp_path / "again" / TENSORS).keys() == sent.keys()
    bare = Net(dtype=dtype)
    load_adapter(bare, tmp_path / "ours")
    assert [n for n, p in bare.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]


@pytest.mark.parametrize("way", WAYS)
def test_peft_s_files_are_read(way, tmp_path):
    theirs = moved(get_peft_model(Net(), config(WAYS[way], init_lora_weights=False))).eval()
    theirs.save_pretrained(tmp_path)
    for model in (Net(), ours(WAYS[way])):
        load_adapter(model.eval(), tmp_path)
        torch.testing.assert_close(model(IDS), theirs(IDS))


def test_a_file_of_another_dtype_is_read_in_the_model_s(tmp_path):
    save_adapter(moved(ours(["lm_head"], Net(dtype=torch.bfloat16))).eval(), tmp_path)
    assert load_file(tmp_path / TENSORS)["base_model.model.lm_head.weight"].dtype == torch.bfloat16
    load_adapter(model := Net(), tmp_path)
    theirs = PeftModel.from_pretrained(Net(), tmp_path).eval()
    assert model.lm_head.weight.dtype == torch.float32
    torch.testing.assert_close(model.eval()(IDS), theirs(IDS))


def test_a_target_whose_name_begins_with_a_saved_module_s_gets_an_adapter(tmp_path):
    """As in PEFT; `head` is trained whole and `header`, and a layer in `heads`, are not."""

    def make():
        torch.manual_seed(0)
        inner = nn.ModuleDict({"0": nn.Linear(8, 8)})
        return nn.ModuleDict({"head": nn.Linear(8, 8), "header": nn.Linear(8, 8), "heads": inner})

    how = dict(target_modules=["head", "header", "heads.0"], r=2, modules_to_save=["head"])
    theirs = get_peft_model(make(), LoraConfig(**how))
    adapted = {name.split(".", 2)[2] for name, module in theirs.named_modules() if hasattr(module, "lora_A")}
    names = swap_linear(model := make(), **how)
    assert set(names) == adapted == {"header", "heads.0"}
    save_adapter(model, tmp_path)
    assert load_adapter(make(), tmp_path) == names


HANDS = {
    "a head": ["lm_head"],
    "a norm": ["layers.1.norm"],
    "the last norm": ["norm"],
    "in a list": ["tail.0", "tail.1"],
}


@pytest.mark.parametrize("way", HANDS)
def test_what_a_user_trains_by_hand_is_saved(way, tmp_path):
    model = ours(None)
    for name in HANDS[way]:
        model.get_submodule(name).requires_grad_()
    save_adapter(moved(model).eval(), tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["modules_to_save"] == HANDS[way]
    theirs = PeftModel.from_pretrained(Net(), tmp_path).eval()
    torch.testing.assert_close(theirs(IDS), model(IDS))
    load_adapter(again := Net().eval(), tmp_path)
    same_state(again, model)


def test_a_parameter_of_a_container_is_saved_with_what_is_around_it(tmp_path):
    def net():
        made = Net()
        made.tail.gains = nn.ParameterList([torch.ones(8)])
        made.tail.forward = lambda x: made.tail[1](made.tail[0](x)) * made.tail.gains[0]
        return made

    model = net()
    model.tail.__dict__.pop("forward")
    swap_linear(model, ["q_proj"], r=2)
    model.tail.gains[0].requires_grad_()
    save_adapter(moved(model), tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["modules_to_save"] == ["tail"]
    load_adapter(again := net(), tmp_path)
    assert torch.equal(again.tail.gains[0], model.tail.gains[0])


def test_nothing_else_is_listed_as_trained(tmp_path):
    save_adapter(ours(None), tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["modules_to_save"] is None
    assert all("lora_" in key for key in load_file(tmp_path / TENSORS))


def test_swapping_again_and_copies_keep_what_is_trained(tmp_path):
    model = ours(["norm"])
    model.layers[0].norm.requires_grad_(False)
    swap_linear(model, ["lm_head"], r=2)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert trained == {"norm.weight", "norm.bias", "layers.1.norm.weight", "layers.1.norm.bias"}
    model = copy.deepcopy(model).requires_grad_(False)
    save_adapter(model, tmp_path)
    assert "base_model.model.layers.0.norm.weight" in load_file(tmp_path / TENSORS)
    merge_and_unload(model)
    assert not any(isinstance(m, LoRALinear) for m in model.modules())


@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_a_tied_module_is_trained_as_a_copy_as_in_peft(names, tmp_path):
    with pytest.warns(UserWarning, match=rf"{names[-1]}\.weight is \w+\.weight.* as well\. Trained is a copy of "):
        model = ours(names, Net(tied=True))
    assert model.lm_head.weight is not model.embed_tokens.weight
    theirs = get_peft_model(Net(tied=True), config(names))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(
        p.numel() for p in theirs.parameters() if p.requires_grad
    )
    save_adapter(moved(model).eval(), tmp_path)
    back = PeftModel.from_pretrained(Net(tied=True), tmp_path).eval()
    torch.testing.assert_close(back(IDS), model(IDS))
    with pytest.warns(UserWarning, match="as well"):
        load_adapter(again := Net(tied=True).eval(), tmp_path)
    assert torch.equal(again(IDS), model(IDS))


def test_a_tied_weight_that_is_trained_by_hand_stays_tied_here(tmp_path):
    model = ours(None, Net(tied=True))
    model.embed_tokens.weight.requires_grad_()
    save_adapter(moved(model).eval(), tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["modules_to_save"] == ["embed_tokens", "lm_head"]
    back = PeftModel.from_pretrained(Net(tied=True), tmp_path).eval()
    torch.testing.assert_close(back(IDS), model(IDS))
    load_adapter(standing := ours(None, Net(tied=True)).eval(), tmp_path)
    assert standing.lm_head.weight is standing.embed_tokens.weight
    assert torch.equal(standing(IDS), model(IDS))


def test_tied_values_that_differ_are_not_read_into_one_tensor(tmp_path):
    with pytest.warns(UserWarning, match="as well"):
        model = moved(ours(["lm_head"], Net(tied=True)))
    save_adapter(model, tmp_path)
    standing = ours(None, Net(tied=True))
    before = copy.deepcopy(standing.state_dict())
    text = r"lm_head\.weight is embed_tokens\.weight, too, of which the file has no new value.*modules_to_save=\['lm_head'\]"
    with pytest.raises(ValueError, match=text):
        load_adapter(standing, tmp_path)
    assert all(torch.equal(t, before[key]) for key, t in standing.state_dict().items())


def test_a_module_in_two_places_is_trained_where_it_is_named():
    model = Net()
    model.extra = model.lm_head
    with pytest.warns(UserWarning, match=r"extra\.weight is lm_head\.weight as well"):
        ours(["extra"], model)
    assert model.extra is not model.lm_head
    assert (model.extra.weight.requires_grad, model.lm_head.weight.requires_grad) == (True, False)


def test_embeddings_that_peft_saves_when_they_were_resized(tmp_path):
    class Sized(Net):
        def get_input_embeddings(self):
            return self.embed_tokens

        def get_output_embeddings(self):
            return self.lm_head

    theirs = get_peft_model(Sized(), config(None, init_lora_weights=False)).eval()
    with torch.no_grad():
        theirs.base_model.model.embed_tokens.weight.add_(1)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    load_adapter(model := Sized().eval(), tmp_path)
    torch.testing.assert_close(model(IDS), theirs(IDS))
    assert not model.embed_tokens.weight.requires_grad
    save_adapter(model, tmp_path / "ours")
    back = PeftModel.from_pretrained(Sized(), tmp_path / "ours").eval()
    torch.testing.assert_close(back(IDS), theirs(IDS))


def compiled(module):
    return torch.compile(module, backend="eager")


def checkpointed(module):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(module)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrap", [compiled, checkpointed, nn.DataParallel])
def test_wrappers_leave_no_trace_in_the_names(wrap, tmp_path):
    model = ours(["tail", "lm_head"])
    model.lm_head, model.tail[0] = wrap(model.lm_head), wrap(model.tail[0])
    save_adapter(moved(wrap(model)), tmp_path)
    keys = load_file(tmp_path / TENSORS).keys()
    assert {key for key in keys if "lora_" not in key} == {
        *(f"base_model.model.tail.0.{part}" for part in ("weight", "bias")), "base_model.model.lm_head.weight",
        *(f"base_model.model.tail.1.{part}" for part in Net().tail[1].state_dict()),
    }  # fmt: skip
    other = Net()
    other.lm_head = wrap(other.lm_head)
    load_adapter(wrap(other), tmp_path)
    assert torch.equal(other.eval()(IDS), model.eval()(IDS))


def test_an_embedding_that_is_named_like_a_target_gets_no_adapter(tmp_path):
    def net():
        made = Net()
        made.position = nn.Module()
        made.position.lm_head = nn.Embedding(3, 3)
        return made

    model = net()
    swap_linear(model, ["lm_head"], r=2)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == "lm_head"
    theirs = PeftModel.from_pretrained(net(), tmp_path)
    assert type(theirs.base_model.model.position.lm_head) is nn.Embedding


def classifiers():
    from transformers import (
        BertConfig,
        BertForQuestionAnswering,
        BertForSequenceClassification,
        LlamaConfig,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        RobertaConfig,
        RobertaForTokenClassification,
    )

    sizes = dict(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, pad_token_id=0
    )
    return {
        "BERT": (BertForSequenceClassification, BertConfig(**sizes), "SEQ_CLS", {"classifier"}),
        "Llama": (LlamaForSequenceClassification, LlamaConfig(**sizes), "SEQ_CLS", {"score"}),
        "RoBERTa, tokens": (RobertaForTokenClassification, RobertaConfig(**sizes), "TOKEN_CLS", {"classifier"}),
        "BERT, answers": (BertForQuestionAnswering, BertConfig(**sizes), "QUESTION_ANS", {"qa_outputs"}),
        "Llama, text": (LlamaForCausalLM, LlamaConfig(**sizes), "CAUSAL_LM", set()),
    }


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT's call of transformers
@pytest.mark.parametrize("name", ["BERT", "Llama", "RoBERTa, tokens", "BERT, answers", "Llama, text"])
def test_all_linear_leaves_the_head_alone_and_trains_a_fresh_one(name, tmp_path):
    cls, settings, task, heads = classifiers()[name]

    def make():
        torch.manual_seed(0)
        return cls(copy.deepcopy(settings)).eval()

    fields = dict(modules_to_save=[*heads]) if task in ("TOKEN_CLS", "QUESTION_ANS") else {}
    theirs = get_peft_model(make(), LoraConfig(r=2, target_modules="all-linear", task_type=task, **fields)).eval()
    names = swap_linear(model := make(), "all-linear", r=2)
    assert set(names) == {
        n.removeprefix("base_model.model.") for n, m in theirs.named_modules() if hasattr(m, "lora_A")
    }
    trained = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert trained == heads
    save_adapter(moved(model), tmp_path, task_type=task)
    ids = torch.arange(1, 9).view(2, 4)
    expected = model(ids)[0]
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    assert loaded.peft_config["default"].task_type == TaskType[task].value
    torch.testing.assert_close(loaded(ids)[0], expected)
    loaded.save_pretrained(tmp_path / "theirs")
    load_adapter(again := make(), tmp_path / "theirs")
    torch.testing.assert_close(again(ids)[0], expected)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_the_heads_that_peft_expects_for_a_task_are_written_though_frozen(tmp_path):
    cls, settings, task, _ = classifiers()["BERT"]
    swap_linear(model := cls(settings).eval(), ["query"], r=2)
    save_adapter(model, tmp_path, task_type=task)
    theirs = PeftModel.from_pretrained(cls(settings), tmp_path).eval()
    assert torch.equal(theirs.base_model.model.classifier.modules_to_save["default"].weight, model.classifier.weight)
    swap_linear(model, ["classifier"], r=2)
    with pytest.raises(ValueError, match="takes classifier whole, and classifier is a LoRALinear"):
        save_adapter(model, tmp_path / "new", task_type=task)
    save_adapter(model, tmp_path / "new")
