"""The demo in its short form: losses fall, the models agree, the files are there; and it fails when they do not."""

import json

import pytest
import torch
from safetensors.torch import load_file

from lora_kernels import LoRALinear, cli
from lora_kernels.cli import demo
from lora_kernels.demo import adapter as demo_adapter
from lora_kernels.demo import chart as demo_chart
from lora_kernels.demo import text as demo_text
from lora_kernels.demo.model import CONTEXT, Transformer, add_lora, lora_layers
from lora_kernels.measure.presets import PROJECTIONS

SHORT = ("demo", "--quick", "--device", "cpu", "--dtype", "fp32")


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """Exit status, report and folder of one short run."""
    folder = tmp_path_factory.mktemp("demo")
    status = cli.main([*SHORT, "--out", str(folder), "--json", str(folder / "demo.json")])
    return status, json.loads((folder / "demo.json").read_text()), folder


@pytest.mark.slow
def test_losses_fall_and_models_agree(short_run):
    status, report, _ = short_run
    assert status == 0
    assert len(report["checks"]) == 6
    assert all(report["checks"].values())
    for losses in (report["prose_loss"], report["code_loss"]):
        assert losses[1] < losses[0] - 0.05
    for pair in ("fused and reference", "fused and merged"):
        assert report[pair]["rms"] <= report[pair]["limit"] < 2e-6
    assert len(report["curves"]["prose, training"]) == report["options"]["steps"]
    assert len(report["curves"]["code, adapting"]) == report["options"]["lora_steps"]


@pytest.mark.slow
def test_files_hold_the_adapter_alone_and_its_config(short_run):
    _, report, folder = short_run
    adapter = load_file(folder / "adapter.safetensors")
    assert len(adapter) == 2 * report["lora_layers"] == 2 * 3 * len(PROJECTIONS)
    assert all(name.endswith((".lora_A", ".lora_B")) for name in adapter)
    assert sum(t.numel() for t in adapter.values()) == report["trained_parameters"]
    assert any(t.any() for name, t in adapter.items() if name.endswith("lora_B"))
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == report["options"]["r"]
    assert (folder / "adapter.safetensors").stat().st_size == report["adapter_bytes"] < report["base_bytes"]
    pytest.importorskip("matplotlib")
    assert (folder / "losses.png").read_bytes().startswith(b"\x89PNG")


TINY = (*SHORT, "--steps", "4", "--lora-steps", "12", "--r", "4")


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run(tmp_path):
    curves = []
    for name in ("a.json", "b.json"):
        torch.rand(1)  # what the process drew before must not matter
        cli.main([*TINY, "--seed", "3", "--out", str(tmp_path), "--json", str(tmp_path / name)])
        curves.append(json.loads((tmp_path / name).read_text())["curves"])
    assert curves[0] == curves[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "merge",
    [
        lambda self: setattr(self, "merged", True),
        lambda self: self._add_update(self.lora_A, self.lora_B, 0.9 * self.scaling),
    ],
)
def test_a_broken_merge_fails(merge, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(LoRALinear, "merge", torch.no_grad()(merge))
    assert cli.main([*TINY, "--out", str(tmp_path)]) == 1
    assert "FAIL: fused and merged" in capsys.readouterr().out


@pytest.mark.slow
def test_a_loss_that_does_not_fall_fails(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "_ADAPT_RATE", 0.0)
    assert cli.main([*TINY, "--out", str(tmp_path)]) == 1
    assert "code loss falls" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_fails(monkeypatch, tmp_path, capsys):
    loss = Transformer.loss
    monkeypatch.setattr(Transformer, "loss", lambda self, tokens: loss(self, tokens) * float("nan"))
    assert cli.main([*TINY, "--out", str(tmp_path)]) == 1
    assert "the loss is nan at step 1" in capsys.readouterr().out


def test_an_adapter_that_does_not_fit_is_refused(tmp_path):
    model = Transformer()
    add_lora(model, 4, 8, 0.0)
    paths = demo_adapter.save(model, tmp_path, 0.0)
    adapter = load_file(paths["adapter"])
    adapter.pop("blocks.0.attention.q.lora_A")
    demo_adapter.save_file(adapter, paths["adapter"])
    with pytest.raises(RuntimeError, match=r"blocks\.0\.attention\.q\.lora_A"):
        demo_adapter.load(tmp_path, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_three_models_agree_in_every_dtype_and_half_an_update_shows(dtype):
    torch.manual_seed(0)
    model = Transformer()
    for block in model.blocks:  # they start as zero
        torch.nn.init.normal_(block.attention.o.weight, std=0.1)
        torch.nn.init.normal_(block.mlp.down.weight, std=0.1)
    model.to(dtype).eval()
    add_lora(model, 8, 16, 0.0)
    for layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.05)
    tokens = torch.randint(256, (4, CONTEXT))
    with torch.no_grad():
        fused = model(tokens)
        for other in (demo_adapter.reference_copy(model), demo_adapter.merged_copy(model)):
            assert demo_adapter.compare(other(tokens), fused, dtype, len(lora_layers(model))).ok
        for layer in lora_layers(model):
            layer.scaling *= 0.5
        assert not demo_adapter.compare(model(tokens), fused, dtype, len(lora_layers(model))).ok


def test_the_model_is_causal():
    torch.manual_seed(0)
    model = Transformer().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    tokens = torch.randint(256, (2, 12))
    changed = tokens.clone()
    changed[:, 8] = (changed[:, 8] + 1) % 256
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :8], after[:, :8], rtol=0, atol=0)
    assert not torch.equal(before[:, 8:], after[:, 8:])


def test_held_out_text_is_not_trained_on():
    for corpus in (demo_text.prose(), demo_text.code()):
        train = bytes(corpus.train.tolist())
        windows = corpus.measure(64, CONTEXT + 1)
        assert windows.shape == (64, CONTEXT + 1)
        seen = sum(bytes(window.tolist()) in train for window in windows)
        assert seen <= 2, "held-out windows that stand in the training text, too"


def test_chart_fits_its_width_and_shows_both_curves():
    curves = {
        "prose, training": [(i, 5 - i / 20) for i in range(60)],
        "code, adapting": [(60 + i, 3) for i in range(9)],
    }
    chart = demo_chart.draw_text(curves, 80).plain
    assert max(len(line) for line in chart.splitlines()) <= 80
    assert "•" in chart.splitlines()[0]
    assert "+" in chart


@pytest.mark.parametrize("option", [("--r", "0"), ("--steps", "-1"), ("--lora-steps", "many"), ("--dtype", "int8")])
def test_bad_options_are_named(option, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["demo", *option])
    assert option[0] in capsys.readouterr().err
