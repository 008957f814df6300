"""Attention and MLP blocks of patched models: found by what they do, computed in one call each, to PEFT's numbers."""

import copy
import io
import pickle

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from block_samples import (
    MAKERS,
    WIDTH,
    Attention,
    Functional,
    Gated,
    Replayed,
    adapted,
    block,
    exactly,
    ids,
    maker,
    outputs,
)
from llama_samples import train
from peft_samples import call, check, truth

from lora_kernels import patch_peft, unpatch_peft
from lora_kernels.peft import explain

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*config.*:UserWarning")

ONE_QKV, ONE_GATE = "one layer holds Q, K and V: qkv_proj", "one layer holds gate and up: gate_up_proj"
JOINED = ["lora_projections", "lora_mlp"]
UNPATCHED = "not patched: call patch_peft(model), again for layers added later"
EXPECTED = {name: [("attention", ""), ("mlp", "")] for name in MAKERS} | {
    "Phi3": [("attention", ONE_QKV), ("mlp", ONE_GATE)],
}


def own(model, **how):
    """A copy that is patched layer by layer."""
    twin = copy.deepcopy(model)
    unpatch_peft(twin)
    patch_peft(twin, blocks=False, **how)
    return twin


@pytest.mark.parametrize("name", MAKERS)
def test_models_of_many_makers(name, joined, computed):
    stock = maker(name)
    patched = copy.deepcopy(stock)
    report = patch_peft(patched)
    assert sorted((one.kind, one.reason) for one in report.blocks) == EXPECTED[name]
    assert {one.form for one in report.layers} == {"fused"}
    actual = outputs(patched)
    reasons = [reason for _, reason in EXPECTED[name]]
    assert joined == [how for how, reason in zip(JOINED, reasons, strict=True) if not reason]
    in_joined = (5 if name == "Phi" else 6) if joined else 0  # Phi's MLP has no gate
    assert computed == ["lora_linear"] * (len(report.layers) - in_joined), "a layer was computed twice"
    check(actual, outputs(stock), exactly(stock), torch.float32)


@pytest.mark.parametrize("case", ["bf16 with fp32 adapters", "autocast"])
def test_dtypes(case, joined):
    stock = maker("Qwen3", torch.bfloat16 if case.startswith("bf16") else torch.float32)
    patched = copy.deepcopy(stock)
    assert patch_peft(patched).count("joined") == 2
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        actual, theirs = outputs(patched), outputs(stock)
    assert joined == JOINED
    check(actual, theirs, exactly(stock), torch.bfloat16)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj", "down_proj"], ["k_proj", "gate_proj"]])
def test_layers_without_an_adapter_join(targets, joined, computed):
    stock = maker("Llama", target_modules=targets)
    patched = copy.deepcopy(stock)
    assert patch_peft(patched).count("joined") == 2
    actual = outputs(patched)
    assert joined == JOINED
    assert not computed
    check(actual, outputs(stock), exactly(stock), torch.float32)


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Gemma"])
def test_trains_to_the_stock_losses(name, joined):
    stock = maker(name, init_lora_weights=True)
    stock.resize_token_embeddings(128)
    patched = copy.deepcopy(stock)
    assert patch_peft(patched).count("joined") == 2
    expected = train(stock, steps=5)
    assert expected[-1] < expected[0] - 0.02
    torch.testing.assert_close(train(patched, steps=5), expected, rtol=1e-5, atol=1e-5)
    assert joined == JOINED * 5


def test_masks_of_a_block_are_independent():
    """Layers with the same weights, over x of ones: their results are dropped sums of the same terms."""
    p, n = 0.25, 400
    model, part = block(Attention(narrow=WIDTH), lora_dropout=p, r=WIDTH, lora_alpha=WIDTH)
    patch_peft(model)
    with torch.no_grad():
        for layer in (part.q_proj, part.k_proj, part.v_proj):
            layer.base_layer.weight.zero_()
            for low in (layer.lora_A, layer.lora_B):
                low["default"].weight.copy_(torch.eye(WIDTH))
            if layer.base_layer.bias is not None:
                layer.base_layer.bias.zero_()
        torch.manual_seed(0)
        masks = model(torch.ones(n, WIDTH)).view(n, 3, WIDTH).transpose(0, 1).flatten(1)
        assert masks.unique().tolist() == pytest.approx([0, 1 / (1 - p)], rel=1e-4)
        assert (masks.mean(1) - 1).abs().max() < 6 * (p / (1 - p) / masks.shape[1]) ** 0.5
        off = torch.corrcoef(masks) - torch.eye(3)
        assert off.abs().max() < 6 / masks.shape[1] ** 0.5
        torch.manual_seed(0)
        assert torch.equal(model(torch.ones(n, WIDTH)).view(n, 3, WIDTH).transpose(0, 1).flatten(1), masks)
        model.eval()
        assert torch.equal(model(torch.ones(n, WIDTH)), torch.ones(n, 3 * WIDTH))


def test_dropout_reaches_every_layer_of_an_mlp(joined):
    model, _ = block(Gated(), lora_dropout=0.5)
    patch_peft(model)
    x = torch.randn(6, WIDTH, requires_grad=True)
    torch.manual_seed(5)
    first = call(model, x)
    torch.manual_seed(5)
    again = call(own(model), x)
    check(first, again, again, torch.float32)
    assert joined == ["lora_mlp"]
    assert not torch.equal(call(model, x)["y"], first["y"])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("part", [Attention, Gated])
def test_checkpointing_computes_the_same_again(part, reentrant, joined):
    model, _ = block(part(), lora_dropout=0.3)
    patch_peft(model)
    x = torch.randn(5, WIDTH, requires_grad=True)
    torch.manual_seed(3)
    expected = call(model, x)
    torch.manual_seed(3)
    actual = {name.removeprefix("model."): t for name, t in call(Replayed(model, reentrant), x).items()}
    assert len(joined) == 3, "the block's, and the checkpointed one's twice"
    assert actual.keys() == expected.keys()
    for name, t in actual.items():
        assert torch.equal(t, expected[name]), name


def test_triton_computes_blocks():
    for part in (Attention(), Functional()):
        stock, _ = block(part)
        patched = copy.deepcopy(stock)
        assert patch_peft(patched, backend="triton").count("joined") == 1
        x = torch.randn(2, 3, WIDTH, requires_grad=True)
        check(call(patched, x), call(stock, x), truth(stock, x), torch.float32)


def test_nothing_else_changes_and_all_is_undone(joined):
    model = maker("Llama")
    kinds = {name: type(module) for name, module in model.named_modules()}
    expected, seen = outputs(model), (repr(model), list(model.state_dict()))
    report = patch_peft(model)
    assert "\n2 blocks: 2 joined, 0 per layer" in str(report)
    assert seen == (repr(model), list(model.state_dict()))
    changed = {name for name, module in model.named_modules() if type(module) is not kinds[name]}
    assert changed == {one.name for one in (*report.layers, *report.blocks)}
    assert all(isinstance(module, kinds[name]) for name, module in model.named_modules())
    before = {name: type(module) for name, module in model.named_modules()}
    assert patch_peft(model) == report
    assert before == {name: type(module) for name, module in model.named_modules()}
    report = patch_peft(model, blocks=False)
    assert {one.reason for one in report.blocks} == {"left alone: patch_peft was called with blocks=False"}
    assert explain(model) == explain(copy.deepcopy(model)) == report
    assert all(type(model.get_submodule(one.name)) is kinds[one.name] for one in report.blocks)
    assert patch_peft(model).count("joined") == 2
    assert unpatch_peft(model) == 7
    assert kinds == {name: type(module) for name, module in model.named_modules()}
    actual = outputs(model)
    assert not joined
    assert all(torch.equal(actual[name], t) for name, t in expected.items())


def test_copies_stay_patched_and_pickles_do_not(joined):
    model = maker("Gemma")
    expected = outputs(model)
    patch_peft(model)
    twin = copy.deepcopy(model)
    assert explain(twin, input_ids=ids()).count("joined") == 2
    assert not joined, "explain looks at each layer"
    outputs(twin)
    assert len(joined) == 2
    again = pickle.load(io.BytesIO(pickle.dumps(model)))
    assert all("_Patched" not in str(type(module).__mro__) for module in again.modules())
    actual = outputs(again)
    assert all(torch.equal(actual[name], t) for name, t in expected.items())


def test_generate_and_merge(joined):
    model = maker("Llama").eval()
    how = dict(input_ids=ids(), attention_mask=torch.ones_like(ids()), max_new_tokens=4, do_sample=False)
    expected = model.generate(**how)
    patch_peft(model)
    assert torch.equal(model.generate(**how), expected)
    assert joined == JOINED * 4
    merged = model.merge_and_unload()
    joined.clear()
    assert torch.equal(merged.generate(**how), expected)
    assert not joined, "there is nothing to fuse"
    twice = adapted(merged)
    assert patch_peft(twice).count("joined") == 2


def test_explain_tells_of_blocks(capsys):
    model = maker("Phi3")
    patch_peft(model)
    report = explain(model, input_ids=ids())
    text = capsys.readouterr().out
    for word in ("block", "attention", "per layer", "qkv_proj"):
        assert word in text
    assert str(report).splitlines()[1:] == [
        "2 blocks: 0 joined, 2 per layer", f"  1 attention per layer: {ONE_QKV}", f"  1 mlp per layer: {ONE_GATE}"
    ]  # fmt: skip


@pytest.mark.parametrize("first", ["patched", "hooked"])
def test_accelerate_s_hook_on_a_block_goes_with_its_class(first, joined):
    hooks = pytest.importorskip("accelerate.hooks")
    model = maker("Llama")
    parts = [module for name, module in model.named_modules() if name.endswith(("self_attn", "mlp"))]
    expected = outputs(model)

    def hook(model):
        for part in parts:
            hooks.add_hook_to_module(part, hooks.AlignDevicesHook(execution_device="cpu"))

    for step in (patch_peft, hook)[:: 1 if first == "patched" else -1]:
        step(model)
    assert explain(model).count("joined") == 2
    outputs(model)
    assert joined == JOINED
    unpatch_peft(model)
    assert {one.reason for one in explain(model).blocks} == {UNPATCHED}
    actual = outputs(model)
    assert joined == JOINED
    assert all(torch.equal(actual[name], t) for name, t in expected.items())
