"""A tiny Llama, made from a configuration, trained stock and patched: the same losses, files and text."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

from llama_samples import adapted, llama, tokens, train
from peft import PeftModel

from lora_kernels import load_adapter, merge_and_unload, patch_peft, save_adapter, swap_linear, unpatch_peft
from lora_kernels.peft import explain

# transformers warns of its own names, and looks for a configuration that PEFT asks it for
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*config.*:UserWarning")


CASES = {
    "fp32": (dict(), {}, dict(rtol=1e-5, atol=1e-5)),
    "bf16 with fp32 adapters": (dict(dtype=torch.bfloat16), {}, dict(rtol=0.01, atol=0.01)),
    "autocast": (dict(), dict(autocast=torch.bfloat16), dict(rtol=0.01, atol=0.01)),
    "accumulated": (dict(use_rslora=True), dict(accumulate=2), dict(rtol=1e-5, atol=1e-5)),
}


@pytest.mark.parametrize("case", CASES)
def test_trains_to_the_same_losses(case):
    made, how, tolerance = CASES[case]
    stock = adapted(**made)
    patched = copy.deepcopy(stock)
    fused = "14 LoRA layers: 14 fused, 0 low-rank, 0 stock\n4 blocks: 4 joined, 0 per layer"
    assert str(patch_peft(patched)) == fused
    expected = train(stock, **how)
    assert expected[-1] < expected[0] - 0.1
    torch.testing.assert_close(train(patched, **how), expected, **tolerance)
    for (name, p), q in zip(stock.named_parameters(), patched.parameters(), strict=True):
        assert p.requires_grad == ("lora_" in name)
        if tolerance["rtol"] < 1e-4:
            torch.testing.assert_close(q, p, rtol=1e-3, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def test_trains_in_fp16_with_a_gradient_scaler():
    """Autocast to fp16 over fp32 weights; the first scales overflow, so that stock skips those steps, and so must we."""
    ends, losses = [], []
    stock = adapted()
    patched = copy.deepcopy(stock)
    assert patch_peft(patched).count("fused") == 14
    for model in (stock, patched):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, backoff_factor=2.0**-4, growth_interval=3)
        losses.append(train(model, steps=8, autocast=torch.float16, scaler=scaler))
        ends.append(scaler.state_dict())
    assert ends[0] == ends[1]
    assert ends[0]["scale"] < 2.0**22, "nothing overflowed"
    assert losses[0].min() < losses[0][0] - 0.1
    torch.testing.assert_close(losses[1], losses[0], rtol=0.005, atol=0.005)


def test_with_dropout_the_losses_have_the_same_distribution():
    stock = adapted(lora_dropout=0.3)
    patched = copy.deepcopy(stock)
    patch_peft(patched)
    end = {"stock": [], "patched": []}
    for seed in range(5):
        for name, model in (("stock", stock), ("patched", patched)):
            end[name].append(train(copy.deepcopy(model), steps=4, seed=seed)[-1])
    theirs, ours = (torch.stack(values) for values in end.values())
    assert ours.std() > 0, "the seed governs the mask"
    spread = (theirs.var() / 5 + ours.var() / 5).sqrt()
    assert (theirs.mean() - ours.mean()).abs() < 6 * spread + 1e-3
    again = train(copy.deepcopy(patched), steps=4, seed=4)[-1]
    assert torch.equal(again, ours[-1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_replays_the_mask(reentrant):
    model = adapted(lora_dropout=0.3)
    patch_peft(model)
    model.train()

    def gradients():
        torch.manual_seed(3)
        ids = tokens()[0]
        model(input_ids=ids, labels=ids).loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    expected = gradients()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    actual = gradients()
    assert expected.keys() == actual.keys()
    for name, t in actual.items():
        torch.testing.assert_close(t, expected[name], rtol=1e-4, atol=1e-6)


def test_generate_save_and_merge_after_training(tmp_path):
    model = adapted()
    patch_peft(model)
    train(model, steps=3)
    model.eval()
    ids = tokens()[0][:1, :8]

    def text(m):
        return m.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0
        )

    logits, written = model(input_ids=ids).logits, text(model)
    assert torch.equal(written[:, :8], ids)
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(llama(), tmp_path).eval()
    torch.testing.assert_close(stock(input_ids=ids).logits, logits)
    ours = llama()
    assert len(load_adapter(ours, tmp_path)) == 14
    torch.testing.assert_close(ours.eval()(input_ids=ids).logits, logits)
    merged = model.merge_and_unload()
    assert not [m for m in merged.modules() if "lora" in type(m).__module__]
    torch.testing.assert_close(merged(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(text(merged), written)
    torch.testing.assert_close(merge_and_unload(ours)(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-4)


def test_lora_linear_layers_train_as_peft_s(tmp_path):
    """swap_linear and PEFT, from the same adapter: the same losses."""
    ours, theirs = llama(), adapted(init_lora_weights=False)
    names = swap_linear(ours, "all-linear", r=4, lora_alpha=8)
    assert len(names) == 14
    assert type(ours.lm_head) is nn.Linear
    theirs.save_pretrained(tmp_path / "first")
    load_adapter(ours, tmp_path / "first")
    torch.testing.assert_close(train(ours), train(theirs), rtol=1e-5, atol=1e-5)
    save_adapter(ours, tmp_path / "second", task_type="CAUSAL_LM")
    again = PeftModel.from_pretrained(llama(), tmp_path / "second")
    assert type(again).__name__ == "PeftModelForCausalLM"
    ids = tokens()[0]
    torch.testing.assert_close(again.eval()(input_ids=ids).logits, ours.eval()(input_ids=ids).logits)


def test_explain_accounts_for_every_layer(capsys):
    model = adapted()
    patch_peft(model)
    ids = tokens()[0]
    report = explain(model, input_ids=ids)
    assert {one.form for one in report.layers} == {"fused"}
    assert len(report.layers) == 14
    assert "14 fused" in capsys.readouterr().out
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].register_forward_hook(lambda *_: None)
    q, *rest = explain(model, input_ids=ids).layers
    assert q.reason == "lora_A.default has a hook"
    assert {one.form for one in rest} == {"fused"}
    assert unpatch_peft(model) == 14
