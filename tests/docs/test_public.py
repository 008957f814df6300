"""Commands, environment variables and files that users have stay as they are; test_public_calls.py has the functions."""

import json
from importlib import metadata

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from tuned_samples import CUDA, DX, DX_KEY, FORWARD, GPU, KEY, ask, folder_of_its_own, put  # noqa: F401  a fixture

import lora_kernels
from lora_kernels import cli, plan
from lora_kernels.plan import tuned

# the commands, each with its options
COMMANDS = {
    "doctor": "",
    "verify": "quick device dtype backend emulate minutes seed",
    "bench": "level block preset model shape m layers batch seq target-modules r p dtype backend pass providers "
    "no-compile memory-only device rounds cuda-graph cache minutes quick full plot",
    "tune": "preset shape m r p dtype rounds minutes dry-run show clear",
    "inspect": "arch kernel dtype quick jobs budgets renew",
    "demo": "steps lora-steps r seed device dtype out quick",
}


def test_the_commands_are_these(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out.split()
    assert [word for word in said if word in COMMANDS] == list(cli._COMMANDS)
    assert set(cli._COMMANDS) == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_its_options(name, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out.replace("[", " ").replace("]", " ").replace(",", " ").split()
    assert {f"--{option}" for option in [*COMMANDS[name].split(), "json"]} <= set(said)


def test_the_version_is_said(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"lora-kernels {lora_kernels.__version__}\n"


# the environment variables; LORA_KERNELS_CACHE is the folder of the tables below


@pytest.mark.parametrize(("value", "other"), [("triton", "torch"), ("torch", "triton")])
def test_lora_kernels_backend_overrides_auto(value, other, device, monkeypatch):
    x, weight, a, b = (torch.randn(shape, device=device) for shape in ((5, 12), (7, 12), (3, 12), (7, 3)))

    def dropped(**how):
        torch.manual_seed(0)
        return lora_kernels.lora_linear(x, weight, a, b, dropout_p=0.5, **how)

    monkeypatch.setenv("LORA_KERNELS_BACKEND", value)
    plan.backend._environment_backend.cache_clear()
    try:
        found = dropped()
    finally:
        monkeypatch.undo()
        plan.backend._environment_backend.cache_clear()
    # the backends draw other masks from a seed
    assert torch.equal(found, dropped(backend=value))
    assert not torch.allclose(found, dropped(backend=other))


# the files


def versions():
    return f"torch {torch.__version__}, triton {metadata.version('triton')}, tiles 2"


def test_a_tuned_table_is_read_and_written_as_it_was(folder):
    choices = {KEY: ["fused", 2], DX_KEY: ["beta1", None]}
    path = put(folder, json.dumps({"format": 1, "gpu": GPU, "tables": {versions(): choices}}))
    assert path == folder / "tuned-nvidia-h200-84ff98ac.json"
    assert (ask(FORWARD), ask(DX)) == (("fused", 2), ("beta1", None))
    assert tuned.lookup(CUDA, torch.float16, FORWARD, False) is None
    more = "float16 forward 8192x4096x14336 r16"
    assert tuned.save(GPU, {more: ("padded", None)})
    assert json.loads(path.read_text()) == {
        "format": 1, "gpu": GPU, "tables": {versions(): choices | {more: ["padded", None]}},
    }  # fmt: skip
    assert (ask(FORWARD), ask(DX), ask(FORWARD, torch.float16)) == (("fused", 2), ("beta1", None), ("padded", None))


def test_adapter_files_are_read_as_they_were(tmp_path):
    """As PEFT writes them; what `save_adapter` writes is in test_public_calls.py."""
    a, b = torch.randn(3, 12), torch.randn(7, 3)
    keys = "base_model.model.0.lora_A.weight", "base_model.model.0.lora_B.weight"
    save_file(dict(zip(keys, (a, b), strict=True)), tmp_path / "adapter_model.safetensors")
    config = dict(peft_type="LORA", r=3, lora_alpha=6, lora_dropout=0.1, target_modules=["0"], use_rslora=False)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = nn.Sequential(nn.Linear(12, 7))
    assert lora_kernels.load_adapter(model, tmp_path) == ["0"]
    (layer,) = model
    assert (layer.r, layer.lora_alpha, layer.scaling, layer.lora_dropout) == (3, 6, 2.0, 0.1)
    assert torch.equal(layer.lora_A, a)
    assert torch.equal(layer.lora_B, b)


MACHINE = {"gpu", "cpu", "torch", "cuda", "triton", "peft", "python", "platform", "lora_kernels"}


def written(path, *command):
    assert cli.main([*command, "--device", "cpu", "--json", str(path)]) == 0
    whole = json.loads(path.read_text())
    assert whole["command"] == command[0]
    assert whole["machine"].keys() >= MACHINE
    return whole


def test_verify_writes_its_results_as_it_did(tmp_path):
    whole = written(tmp_path / "verify.json", "verify", "--quick", "--backend", "torch", "--dtype", "fp32")
    assert whole.keys() >= {"device", "seed", "quick", "notes", "summary", "passed", "failed", "not_run", "cases"}
    assert whole["passed"] == len(whole["cases"]) > 0
    first = whole["cases"][0]
    assert first.keys() >= {"backend", "dtype", "m", "k", "n", "r", "layout", "p", "form", "ok", "rule_1", "message"}
    assert first["findings"][0].keys() >= {"name", "ok", "rule_1", "rule_2", "rms_ratio", "message"}


def test_bench_writes_its_results_as_it_did(tmp_path):
    how = "--shape", "32x48x40", "--r", "4", "--p", "0", "--rounds", "2", "--no-compile", "--providers", "ours"
    whole = written(tmp_path / "bench.json", "bench", *how)
    assert whole.keys() >= {"level", "preset", "model", "complete", "skipped", "method", "peaks", "speedups", "cases"}
    assert (whole["level"], whole["complete"], whole["skipped"]) == ("layer", True, [])
    (case,) = whole["cases"]
    assert case.keys() >= {"level", "shape", "r", "p", "dtype", "flops", "providers"}
    ours = case["providers"]["ours"]
    assert ours.keys() >= {"label", "reason", "check", "seconds", "saved_bytes", "peak_bytes"}
    assert ours["seconds"].keys() == {"forward", "backward", "both"}
    assert ours["seconds"]["both"].keys() >= {"median", "q1", "q3", "min", "max", "n", "flops_per_second"}
