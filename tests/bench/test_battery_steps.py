"""The battery's steps keep what they had found when they are cut, and do not disturb one another."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench import processes, steps, verifying
from bench.processes import ROOT, Log, run_together


def test_a_race_has_the_gpu_to_itself():
    (stage,) = (stage for stage in steps.first(rehearse=False) if any(step.name == "races" for step in stage))
    assert len(stage) == 1


@pytest.mark.slow
@pytest.mark.parametrize("spread", [False, True])
def test_a_failure_is_printed_before_the_last_test_ends(spread, tmp_path, monkeypatch):
    """Its name and its traceback are in the log of a run that is killed while another test runs."""
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    files = tmp_path / "tests" / "gpu"
    files.mkdir(parents=True)
    (files / "test_gpu.py").write_text(
        "import pytest, time\npytestmark = pytest.mark.gpu\ndef test_good(): pass\n"
        "def test_bad(): assert 'why' == 'it failed'\ndef test_hangs(): time.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for module in (steps, processes):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(steps.importlib.util, "find_spec", lambda name: spread or None)
    monkeypatch.setattr(steps, "jobs", lambda: 2)
    step = steps._tests("gpu_tests", False, 600)
    # it is killed once the failure is there
    log, path = Log(tmp_path / "log.txt"), tmp_path / "log.txt"
    monkeypatch.setattr(processes, "GRACE_S", 0.0)
    stock = processes._Process.ended

    def ended(self):
        if "why" in path.read_text():
            self.limit = 0.0
        return stock(self)

    monkeypatch.setattr(processes._Process, "ended", ended)
    (record,) = run_together([step], tmp_path, 600, log)
    log.close()
    shown = path.read_text()
    assert record["state"] == "out of time"
    assert "test_bad (call)" in shown
    assert "AssertionError: assert 'why' == 'it failed'" in shown
    assert any("test_good" in line and "PASSED" in line for line in shown.splitlines())


def result(**content):
    same = dict(device="cuda", seed=0, quick=False, notes=[], summary="", passed=0, failed=0, not_run=0, cases=[])
    return json.dumps(same | content)


class Verify:
    """A process of `verify` that writes a result at each event and then ends."""

    returncode = 0

    def __init__(self, file, go):
        self.file, self.go = Path(file), go
        self.thread = threading.Thread(target=self.work)
        self.thread.start()

    def work(self):
        for passed in (1, 2):
            self.go.wait()
            self.go.clear()
            self.file.write_text(result(passed=passed, not_run=2 - passed))

    def poll(self):
        return None if self.thread.is_alive() else 0


def test_results_so_far_are_merged_as_they_come(tmp_path, monkeypatch):
    file, events, merged = tmp_path / "verify.json", {}, []

    def popen(command):
        dtype = command[command.index("--dtype") + 1]
        events[dtype] = threading.Event()
        return Verify(command[command.index("--json") + 1], events[dtype])

    monkeypatch.setattr(verifying.subprocess, "Popen", popen)
    monkeypatch.setattr(verifying, "write_json", lambda path, content: merged.append(content))
    running = threading.Thread(target=verifying.main, args=(["--json", str(file)],))
    running.start()

    def until(passed):
        end = time.monotonic() + 600
        while not merged or merged[-1]["passed"] != passed:
            assert time.monotonic() < end
            time.sleep(0.01)

    until(0)
    events["bf16"].set()
    until(1)
    assert (merged[-1]["not_run"], merged[-1]["missing"]) == (1, ["fp16", "fp32"])
    events["bf16"].set()
    until(2)
    for dtype in ("fp16", "fp32"):
        for _ in range(2):
            before = merged[-1]["passed"]
            events[dtype].set()
            until(before + 1)
    running.join()
    assert (merged[-1]["passed"], merged[-1]["not_run"], merged[-1]["missing"]) == (6, 0, [])


@pytest.mark.slow
def test_verify_writes_its_results_so_far(tmp_path):
    """Before it has printed the last case."""
    file = tmp_path / "verify.json"
    command = [sys.executable, "-m", "lora_kernels", "verify", "--backend", "torch", "--device", "cpu", "--quick"]
    with subprocess.Popen([*command, "--json", str(file)], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        cases = [line.startswith("torch") and file.exists() for line in process.stdout]
    assert any(cases)
    written = json.loads(file.read_text())
    assert written["not_run"] == 0
    assert written["passed"] == len(written["cases"]) > 10


def test_results_of_the_emulator_are_merged_too():
    """They have no device and no seed."""
    one = {"command": "verify", "emulated": "sm_90", "quick": True, "summary": "a", "passed": 2, "failed": 1}
    one |= {"cases": [{"name": "bf16"}], "executed": ["tiles"], "lacking": []}
    found = verifying.merged([one, one | {"passed": 3, "cases": [{"name": "fp16"}]}], ["fp32"])
    assert (found["emulated"], found["quick"]) == ("sm_90", True)
    assert (found["passed"], found["failed"], found["not_run"]) == (5, 2, 0)
    assert found["executed"] == ["tiles"]
    assert [case["name"] for case in found["cases"]] == ["bf16", "fp16"]
    assert not {"device", "seed"} & found.keys()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is built by g++, and there is none")
def test_a_rehearsal_of_a_first_run_executes_compiled_kernels(tmp_path):
    """In a process of its own: this one has Triton's interpreter."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = ["-m", "bench.battery", "--first", "--rehearse", "--minutes", "30", "--out", str(tmp_path)]
    ran = subprocess.run(
        [sys.executable, *command, "--only", "warm_up", "races", "verify"],
        cwd=ROOT, env=env, capture_output=True, text=True,
    )  # fmt: skip
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert ran.returncode == 0, summary
    assert {step["name"]: step["state"] for step in summary["steps"]} == {
        "warm_up": "ok",
        "verify": "ok",
        "races": "ok",
    }
    verified, raced = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("verify", "races"))
    assert (verified["emulated"], verified["failed"], verified["missing"]) == ("sm_90", 0, [])
    assert verified["passed"] == len(verified["cases"]) > 10
    assert any("wgrad" in line for line in verified["executed"])
    assert (raced["emulated"], raced["complete"]) == ("sm_90", True)
    assert not any(any(shape["wrong"].values()) or shape["problems"] for shape in raced["shapes"])
