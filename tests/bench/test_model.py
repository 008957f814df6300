"""`bench --model`: transformers' Llama with PEFT's adapters, stock and patched, in one run."""

import importlib.util
import json

import pytest
import torch
from bench_samples import CPU, arguments, settings

from lora_kernels.bench.cases import layer as layer_case
from lora_kernels.bench.cases import model as model_case
from lora_kernels.bench.providers import llama
from lora_kernels.cli import bench
from lora_kernels.measure import timing
from lora_kernels.measure.presets import MODELS, HostedDims

HAS_BOTH = all(importlib.util.find_spec(name) for name in ("transformers", "peft"))
needs_both = pytest.mark.skipif(not HAS_BOTH, reason="needs transformers and PEFT")
# of packages that these import
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
SMALL = HostedDims(32, 4, 2, 48, vocab=64, layers=2, batch=2, seq=16, name="tiny")


@needs_both
def test_the_command_times_stock_and_patched(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", SMALL)
    file = tmp_path / "m.json"
    assert bench.run(arguments("--model", "tiny", "--r", 4, "--p", 0, 0.2, "--json", file)) == 0
    shown, written = capsys.readouterr().out, json.loads(file.read_text())
    assert (written["level"], written["model"], written["preset"]) == ("model", "tiny", None)
    assert [case["p"] for case in written["cases"]] == [0, 0.2]
    for case in written["cases"]:
        rows = case["providers"]
        assert {name: row["label"] for name, row in rows.items()} == {
            "frozen": "frozen model", "ours": "patched PEFT fp32 [torch]", "peft": "PEFT fp32",
        }  # fmt: skip
        for row in rows.values():
            assert row["check"]["ok"]
            assert row["check"]["worst"] > 0
            assert row["seconds"]["both"]["tokens_per_second"] == 32 / row["seconds"]["both"]["median"]
            assert row["peak_bytes"] > row["saved_bytes"] > 0
        ours, peft = rows["ours"], rows["peft"]
        if case["p"]:  # PEFT's mask is as wide as x, and the dropped x is kept beside it
            assert ours["saved_bytes"] < peft["saved_bytes"]
            assert ours["peak_bytes"] < peft["peak_bytes"]
        else:
            assert ours["saved_bytes"] <= peft["saved_bytes"]
    assert written["speedups"]["peft"]["cases"] == 2
    assert "tiny (transformers, PEFT), 2 layers, vocabulary 64: hidden 32" in " ".join(shown.split())
    assert "over PEFT fp32" in shown


@needs_both
def test_in_16_bits_with_peft_s_fp32_adapters_as_well():
    case = model_case.run_case(SMALL, 4, 0.0, settings(torch.bfloat16, passes=()), whole=True)
    rows = case["providers"]
    assert list(rows) == ["frozen", "ours", "ours_fp32", "peft", "peft_fp32"]
    assert all(row["check"]["ok"] and not row["seconds"] for row in rows.values())
    assert rows["ours_fp32"]["saved_bytes"] < rows["peft_fp32"]["saved_bytes"]  # no copy of x in fp32


@needs_both
def test_it_is_peft_s_model_and_patched_where_it_says_so():
    trials = {name: model_case.Bench(SMALL, 4, 0.0, settings(), True).trial(name) for name in ("ours", "peft")}
    for name, trial in trials.items():
        layers = [m for m in trial.model.modules() if type(m).__module__ == "peft.tuners.lora.layer"]
        linear = [m for m in layers if type(m).__name__ == "Linear"]
        assert len(linear) == 7 * SMALL.layers
        assert {hasattr(m, "_lora_kernels_class") for m in linear} == {name == "ours"}
        assert type(trial.model.llama).__name__ == "LlamaForCausalLM"


def break_scaling(model):
    for module in model.modules():
        if hasattr(module, "scaling") and isinstance(module.scaling, dict) and module.scaling:
            module.scaling["default"] *= 1.01
            return


def break_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5


@needs_both
@pytest.mark.parametrize(
    ("breaks", "said"), [(break_scaling, "has rms error"), (break_dropout, "dropout moves the output by")]
)
def test_no_time_for_a_wrong_patch(breaks, said, monkeypatch, capsys):
    def adapted(base, form, *args):
        model, held = llama.copy_with_adapters(base, form, *args)
        if form == "patched":
            breaks(model)
        return model, held

    monkeypatch.setitem(MODELS, "tiny", SMALL)
    monkeypatch.setattr(model_case, "copy_with_adapters", adapted)
    assert bench.run(arguments("--model", "tiny", "--r", 4, "--p", 0.2, "--pass", "both")) == 1
    shown = capsys.readouterr().out
    assert "patched PEFT fp32 [torch]: wrong result, not timed: " in shown
    assert said in " ".join(shown.split())
    assert "over PEFT" not in shown  # there is nothing to compare it with


@needs_both
def test_its_size_and_its_adapters_can_be_chosen(tmp_path, capsys):
    file = tmp_path / "m.json"
    sizes = ("--layers", 1, "--batch", 1, "--seq", 8, "--target-modules", "q_proj", "v_proj", "--r", 2)
    assert bench.run(arguments("--model", "tiny", *sizes, "--memory-only", "--json", file)) == 0
    (case,) = json.loads(file.read_text())["cases"]
    assert (case["model"]["layers"], case["tokens"], case["targets"]) == (1, 8, ["q_proj", "v_proj"])
    assert "r=2 on q_proj v_proj, p=0" in " ".join(capsys.readouterr().out.split())
    bench_of_two = model_case.Bench(SMALL, 2, 0.0, settings(targets=("q_proj", "v")), True)
    assert {name.rpartition(".")[2] for name in bench_of_two.adapters} == {"q_proj", "v_proj"}
    assert len(bench_of_two.adapters) == 2 * SMALL.layers


def test_the_named_models_are_those_of_llama():
    transformers = pytest.importorskip("transformers")
    for name, parameters in (("llama-1b", 1_235_814_400), ("llama-8b", 8_030_261_248)):
        dims = MODELS[name]
        from lora_kernels.bench.providers.hosted import HostedModel

        with torch.device("meta"):
            model = HostedModel(dims, torch.bfloat16)
        assert isinstance(model.llama, transformers.LlamaForCausalLM)
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert torch.get_default_dtype() == torch.float32


@pytest.mark.usefixtures("no_peft")
def test_without_peft_it_says_what_to_install(capsys):
    assert bench.run(arguments("--model", "tiny")) == 2
    said = capsys.readouterr().err
    assert "--model tiny needs transformers and PEFT: pip install 'peft>=0.19' brings both" in said


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--model", "tiny", "--level", "layer"), "--model tiny: a whole model, so not --level layer"),
        (("--layers", 2), "--layers: of a model, so with --model or --level decoder or model"),
        (("--level", "kernel", "--target-modules", "q"), "--target-modules: of a model"),
        (("--model", "tiny", "--target-modules", "q", "wte"), "--target-modules wte: a model has q, k, v, o, gate"),
        (("--model", "tiny", "--m", 8, "--batch", 2), "--m and --batch: both say how many sequences"),
        (("--model", "tiny", "--seq", 0), "--seq 0: at least 1"),
        (("--model", "tiny", "--providers", "addmm"), "--providers addmm: --level model has frozen, ours"),
    ],
)
def test_what_a_model_does_not_have_is_refused(argv, message, capsys, monkeypatch):
    monkeypatch.setattr(bench, "_run_all", lambda *_: pytest.fail("it was measured first"))
    monkeypatch.setattr(bench.hosted, "missing_requirement", lambda: "")
    assert bench.run(arguments(*argv)) == 2
    assert message in capsys.readouterr().err


def test_peak_memory_of_a_cpu_is_what_lives_at_once():
    def forward():
        a = torch.ones(1000)  # 4000 bytes
        b = torch.cat([a, a])  # 8000 more
        del a
        return b * 1  # 8000 more, without the first

    calls = timing.Calls(forward, lambda y: (y.new_ones(500),))
    assert layer_case.peak_bytes(calls, CPU) == pytest.approx(16_000, abs=1000)
    held = torch.ones(10_000)
    calls = timing.Calls(lambda: torch.ones(100), lambda y: held)
    assert layer_case.peak_bytes(calls, CPU) == pytest.approx(400, abs=200)


def test_profiling_says_nothing_on_the_terminal(capfd):
    layer_case.peak_bytes(timing.Calls(lambda: torch.ones(3), lambda y: y), CPU)
    assert capfd.readouterr() == ("", "")
