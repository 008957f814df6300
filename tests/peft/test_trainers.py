"""Training as users run it, by `transformers.Trainer` and TRL's `SFTTrainer`: stock PEFT and patched, side by side."""

import gc
import os
import socket

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers reads it
pytest.importorskip("trl")

from peft import PeftModel
from trainer_samples import BATCH, STEPS, TRAINERS, adapted, llama, paragraphs, tokenizer

from lora_kernels import patch_peft, unpatch_peft
from lora_kernels.peft import blocks, layer

# what these libraries tell one another to rename
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
LAYERS = 14
SMALL_TRL = pytest.param("trl", marks=pytest.mark.small)  # what calls of this size take outside of tests
CLOSE = dict(rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module", autouse=True)
def cheap_collections():
    """accelerate collects garbage whenever training begins; what so many libraries loaded is none, and takes a second."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(self, address):
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def fused(monkeypatch):
    """The masks of the layers that were fused so far: what fell back to PEFT would agree with PEFT, and show nothing."""
    masks = []

    def spy(module, name, its_masks):
        right = getattr(module, name)

        def count(*args, **kwargs):
            masks.extend(its_masks(*args, **kwargs))
            return right(*args, **kwargs)

        monkeypatch.setattr(module, name, count)

    spy(layer, "lora_linear", lambda *_, dropout_p, **how: [dropout_p])
    spy(blocks, "lora_projections", lambda *_, dropout_p, **how: dropout_p)
    spy(blocks, "lora_mlp", lambda x, *layers, **how: [one.dropout_p for one in layers])
    return masks


def trained(by, folder, patched, p=0.0, resume=None, **changes):
    """A trainer that has trained."""
    model = adapted(p)
    if patched:
        report = patch_peft(model)
        assert report.count("fused") == len(report.layers) == LAYERS
        assert report.count("joined") == len(report.blocks) == 4
    trainer = TRAINERS[by](model, folder, **changes)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer


def losses(trainer):
    found = torch.tensor(trainer.losses)
    assert found.isfinite().all()
    return found


def adapters(trainer):
    return {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}


def prompt():
    return tokenizer()(paragraphs()[-1][:60], return_tensors="pt")


def logits(model):
    with torch.no_grad():
        return model.eval()(**prompt()).logits


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=[pytest.mark.small, pytest.mark.slow]), 2])
@pytest.mark.parametrize("by", TRAINERS)
def test_the_same_losses_step_by_step(by, accumulate, tmp_path, fused):
    how = dict(gradient_accumulation_steps=accumulate, per_device_train_batch_size=BATCH // accumulate)
    stock = trained(by, tmp_path, patched=False, **how)
    assert fused == []
    patched = trained(by, tmp_path, patched=True, **how)
    # TRL checkpoints activations: each layer's forward runs once more in backward
    assert len(fused) == LAYERS * STEPS * accumulate * (2 if by == "trl" else 1)
    expected = losses(stock)
    assert len(expected) == STEPS * accumulate
    assert expected[-2:].mean() < expected[:2].mean() - 0.5 / accumulate
    torch.testing.assert_close(losses(patched), expected, **CLOSE)
    assert len(adapters(stock)) == 2 * LAYERS
    for name, weight in adapters(stock).items():
        torch.testing.assert_close(
            adapters(patched)[name], weight, rtol=1e-3, atol=2e-4, msg=lambda said, name=name: f"{name}: {said}"
        )


def test_sft_in_bf16_autocast_as_trl_has_it_by_default(tmp_path, fused):
    expected, actual = (losses(trained("trl", tmp_path, patched, bf16=True)) for patched in (False, True))
    assert len(fused) == 2 * LAYERS * STEPS
    torch.testing.assert_close(actual, expected, rtol=3e-3, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["transformers", SMALL_TRL])
def test_with_dropout_both_fall_and_end_near_each_other(by, tmp_path, fused):
    stock, patched = (trained(by, tmp_path, patched, p=0.2) for patched in (False, True))
    assert set(fused) == {0.2}
    curves = losses(stock), losses(patched)
    assert not torch.equal(*curves)  # the masks differ
    for curve in curves:
        assert curve[-2:].mean() < curve[:2].mean() - 0.4
    assert (curves[0][-3:].mean() - curves[1][-3:].mean()).abs() < 0.05
    as_patched = logits(patched.model)  # in evaluation nothing is dropped
    assert unpatch_peft(patched.model) == LAYERS
    torch.testing.assert_close(logits(patched.model), as_patched, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["transformers", SMALL_TRL])
def test_resumes_from_a_checkpoint(by, tmp_path, fused):
    """The masks as well: the state of PyTorch's generator, which the checkpoint holds, decides them."""
    half = STEPS // 2
    saving = dict(save_strategy="steps", save_steps=half)
    whole = trained(by, tmp_path, patched=True, p=0.2, **saving)
    assert len(whole.losses) == STEPS
    again = trained(by, tmp_path, patched=True, p=0.2, resume=tmp_path / f"checkpoint-{half}")
    assert len(again.losses) == STEPS - half
    torch.testing.assert_close(losses(again), losses(whole)[half:], rtol=1e-6, atol=0)
    for name, weight in adapters(whole).items():
        torch.testing.assert_close(adapters(again)[name], weight, rtol=1e-5, atol=1e-6)


def test_stock_peft_resumes_what_a_patched_model_began(tmp_path, fused):
    half = STEPS // 2
    whole = trained("transformers", tmp_path, patched=True, save_strategy="steps", save_steps=half)
    calls = len(fused)
    again = trained("transformers", tmp_path, patched=False, resume=tmp_path / f"checkpoint-{half}")
    assert len(fused) == calls
    torch.testing.assert_close(losses(again), losses(whole)[half:], **CLOSE)


@pytest.mark.slow
def test_generates_saves_and_merges_after_sft(tmp_path, fused):
    stock, patched = (trained("trl", tmp_path / str(on), on) for on in (False, True))

    def text(model):
        said = model.eval().generate(**prompt(), max_new_tokens=12, do_sample=False)
        assert said.shape[1] > prompt()["input_ids"].shape[1]
        return tokenizer().decode(said[0])

    calls, written, expected = len(fused), text(patched.model), logits(patched.model)
    assert len(fused) > calls
    assert written == text(stock.model)
    torch.testing.assert_close(logits(stock.model), expected, rtol=1e-3, atol=1e-3)
    untrained = logits(llama())
    assert (expected - untrained).abs().max() > 0.5
    patched.save_model(str(tmp_path / "saved"))
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path / "saved")), expected, **CLOSE)
    merged = patched.model.merge_and_unload()
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert text(merged) == written
