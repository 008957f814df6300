"""`lora-kernels verify --emulate`: what it says of right and wrong kernels, and of a machine that cannot run it."""

import json
import shutil
from pathlib import Path

import pytest

from lora_kernels import cli
from lora_kernels.verify import emulate

pytest.importorskip("triton")
from emulator import build

ROOT = Path(__file__).parents[2]
CASE = "layer fp16 72x96x80 r16 fp32 adapters p=0.1 fused"
needs_compiler = pytest.mark.skipif(bool(build.missing()), reason=build.missing())


def verify(*options):
    return cli.main(["verify", "--emulate", "sm_80", "--quick", *options])


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A copy of the sources, whose kernels are taken."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "lora_kernels", tmp_path / "lora_kernels", ignore=ignore)
    for folder in ("emulator", "oracles", "samples"):
        shutil.copytree(ROOT / "tests" / folder, tmp_path / "tests" / folder, ignore=ignore)
    monkeypatch.setattr(emulate, "_CHECKOUT", tmp_path)
    return tmp_path


@pytest.mark.slow
@needs_compiler
def test_right_kernels_pass(tmp_path, capsys):
    assert verify("--dtype", "fp16", "--json", str(tmp_path / "verify.json")) == 0
    said = capsys.readouterr().out
    assert "Not what ptxas makes of it" in said
    assert any(CASE in line and line.endswith("pass") for line in said.splitlines())
    report = json.loads((tmp_path / "verify.json").read_text())
    assert (report["emulated"], report["failed"]) == ("sm_80", 0)
    assert report["passed"] == len(report["cases"]) > 0
    assert "matmul_expand" in report["executed"][0]


@pytest.mark.slow
@needs_compiler
def test_wrong_kernels_fail(checkout, capsys):
    source = checkout / "lora_kernels" / "kernels" / "wgrad.py"
    text = source.read_text()
    scaled = "ds * tl.cast(alphas[i], tl.float32)"
    assert scaled in text
    source.write_text(text.replace(scaled, "ds"))
    assert verify("--dtype", "fp16") == 1
    said = capsys.readouterr().out
    assert any(CASE in line and line.endswith("FAIL") for line in said.splitlines())
    assert "dx" in said


@pytest.mark.slow
@needs_compiler
def test_no_time_is_nothing_to_execute(capsys):
    assert verify("--minutes", "0") == 2
    assert "nothing to execute" in capsys.readouterr().out


def test_without_a_checkout_it_says_where_the_emulator_is(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(emulate, "_CHECKOUT", tmp_path)
    assert verify() == 2
    assert "clone the repository" in capsys.readouterr().out


def test_without_a_compiler_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert verify() == 2
    assert "there is no no-such-compiler" in capsys.readouterr().out


@pytest.mark.parametrize("option", [("--backend", "torch"), ("--device", "cuda")], ids=" ".join)
def test_it_executes_kernels_and_on_a_cpu(option, capsys):
    assert verify(*option) == 2
    assert "leave out" in capsys.readouterr().out
