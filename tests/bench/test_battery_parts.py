"""What the battery is made of besides `bench`: kernels compiled ahead, and variants of the package."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench import variants, warm_up
from bench.processes import ROOT
from lora_kernels.constants import DTYPES
from lora_kernels.inspect.kernel import Case
from lora_kernels.verify.matrix import matrix

# --- kernels compiled ahead


def test_what_is_compiled_ahead_is_what_verify_runs_on_a_gpu():
    cases = [case for case, _ in warm_up.work(on_gpu=True, quick=False)]
    for dtype in DTYPES:
        assert set(matrix("triton", dtype, True, False)) <= set(cases)
    timed = [case for case in cases if isinstance(case, Case) and case.m == 8192]
    assert {case.activation for case in timed} == {"", "silu"}
    assert {case.p for case in timed} == {0.0, 0.1}
    assert any(case.others for case in timed)


COMPILE = """
import sys
from bench import warm_up
from lora_kernels.inspect.kernel import Case
warm_up._begin(warm_up._gpu("sm_90"), False)
print(warm_up._compile((Case(40, 48, 56, 16, p=0.1), "fused")))
name, found, problem = warm_up._compile((Case(8192, 4096, 14336, 16), "beta1"))
assert found and not problem, problem  # and a library's product of 2 TFLOP was not computed
"""


@pytest.mark.slow
def test_another_process_finds_what_was_compiled(tmp_path):
    """In Triton's cache, by the same key: nothing is compiled twice."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    files = []
    for _ in range(2):
        ran = subprocess.run(
            [sys.executable, "-c", COMPILE], cwd=ROOT, capture_output=True, text=True,
            env=env | {"TRITON_CACHE_DIR": str(tmp_path)},
        )  # fmt: skip
        assert "40x48x56 r=16 bf16 p=0.1 fused" in ran.stdout, ran.stderr
        files.append({path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.cubin")})
    assert len(files[0]) >= 4
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("capability", "name", "arch"),
    [((9, 0), "", "sm_90"), ((12, 0), "", "sm_120"), (None, "gfx942:sramecc+:xnack-", "gfx942")],
)
def test_the_gpu_that_is_imagined_is_like_this_machine_s(capability, name, arch, monkeypatch):
    from lora_kernels.kernels import _launch

    monkeypatch.setattr(_launch, "capability", lambda device: capability)
    monkeypatch.setattr(_launch, "num_sms", lambda device: 132)
    monkeypatch.setattr(_launch, "shared_per_sm", lambda device: 1 << 16)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=name))
    gpu = warm_up._gpu(None)
    assert (gpu.arch, gpu.num_sms, gpu.shared_per_sm, gpu.capability) == (arch, 132, 1 << 16, capability)
    assert warm_up._gpu("sm_90").num_sms == 132


@pytest.mark.parametrize("a_launcher_each", [False, True])
def test_launchers_are_compiled_where_each_signature_has_one(a_launcher_each, monkeypatch):
    from triton.backends.nvidia import driver

    made = []
    if a_launcher_each:
        monkeypatch.setattr(driver, "make_launcher", None, raising=False)
        monkeypatch.setattr(driver, "CudaLauncher", lambda *args: made.append(args))
        assert warm_up._launcher()("source", "metadata")("a launch") is None
        assert made == [("source", "metadata")]
    else:
        monkeypatch.delattr(driver, "make_launcher", raising=False)
        assert warm_up._launcher() is None


def test_a_case_that_cannot_be_compiled_is_told_and_not_the_end():
    class Wrong(Case):
        pass

    name, found, problem = warm_up._compile((Wrong(4, 4, 4, 0), "fused"))
    assert name == "4x4x4 r=0 bf16 p=0 fused"
    assert not found
    assert problem


def test_what_there_is_no_time_for_is_left(monkeypatch, capsys):
    ones, begun = [(Case(8, 8, 8, i), "fused") for i in range(9)], []

    class Pool(ThreadPoolExecutor):
        def __init__(self, jobs, context, begin, given):
            super().__init__(jobs)

    monkeypatch.setattr(warm_up, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(warm_up, "work", lambda on_gpu, quick: ones)
    monkeypatch.setattr(warm_up, "_gpu", lambda arch: None)
    monkeypatch.setattr(warm_up.compiled, "problem", lambda: "")
    monkeypatch.setattr(warm_up, "_compile", lambda one: begun.append(one) or (str(one[0]), {"a"}, ""))
    assert warm_up.main(["--arch", "sm_90"]) == 0
    assert "1 kernels of 9 of 9 cases" in capsys.readouterr().out
    monkeypatch.setattr(warm_up, "_compile", lambda one: time.sleep(0.2) or (str(one[0]), {"a"}, ""))
    assert warm_up.main(["--arch", "sm_90", "--minutes", "0"]) == 0
    assert " of 9 cases" in (shown := capsys.readouterr().out)
    assert "9 of 9" not in shown


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_asks_which_to_compile_for(capsys):
    assert warm_up.main([]) == 2
    assert "--arch sm_90" in capsys.readouterr().err


# --- variants


@pytest.mark.parametrize("name", [name for name, variant in variants.VARIANTS.items() if variant])
def test_a_variant_stands_in_the_source(name, tmp_path):
    variant = variants.VARIANTS[name]
    copy = variants.copied(variant, tmp_path)
    changed = (copy / variant.file).read_text()
    assert changed != (variants.PACKAGE / variant.file).read_text()
    compile(changed, variant.file, "exec")


def test_a_text_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ValueError, match="renew the table"):
        variants.copied(variants.Variant("parallel.py", "no such text", ""), tmp_path)


@pytest.mark.slow
def test_it_is_the_copy_that_is_timed(monkeypatch, tmp_path, capsys):
    broken = variants.Variant("cli/bench.py", "def run(args", "raise SystemExit('the copy')\ndef run(args")
    monkeypatch.setattr(variants, "VARIANTS", {"as it is": None, "broken": broken})
    file = tmp_path / "v.json"
    assert variants.main(["--rehearse", "--json", str(file), "--only", "as it is", "broken"]) == 1
    written = json.loads(file.read_text())
    assert written["complete"]
    assert written["variants"]["broken"]["problem"] == "the copy"
    (case,) = written["variants"]["as it is"]["cases"]
    assert case["ours"]["both"] > 0
    shown = capsys.readouterr().out
    assert "of the floor" in shown
    assert "broken: the copy" in shown
