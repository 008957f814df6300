"""The battery of a GPU machine: its steps, its time, and that nothing of it is lost or left running."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from bench_samples import arguments, settings

from lora_kernels.bench import levels
from lora_kernels.cli import bench

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench import battery, processes, steps, verifying
from bench.processes import Log, Step, run_together


@pytest.fixture
def time_up_after_a_line(monkeypatch):
    """The time of every step is up when it has printed a line, however long that takes."""
    stock = processes._Process.ended

    def ended(self):
        if self.lines:
            self.limit = 0.0
        return stock(self)

    monkeypatch.setattr(processes._Process, "ended", ended)


@pytest.fixture
def log(tmp_path):
    log = Log(tmp_path / "log.txt")
    yield log
    log.close()


HANG_S = 600.0  # a limit against hangs alone: nothing here takes so long, on a busy machine either
SLEEP = "import time; time.sleep(3600)"


def wait_for(condition):
    end = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def alive(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()  # a zombie runs no more
    except (FileNotFoundError, ProcessLookupError):
        return False


# --- processes


def test_steps_run_at_once_and_each_is_recorded(tmp_path, log):
    meet = "import pathlib, sys, time\nmine, other = map(pathlib.Path, sys.argv[1:])\nmine.touch()\n"
    meet += "while not other.exists(): time.sleep(0.01)\nprint('met')"
    one, two = (str(tmp_path / name) for name in "ab")
    found = run_together(
        [Step("one", ("-c", meet, one, two), HANG_S), Step("two", ("-c", meet, two, one), HANG_S)],
        tmp_path, HANG_S, log,
    )  # fmt: skip
    assert [record["state"] for record in found] == ["ok", "ok"]
    assert [record["output"] for record in found] == [["met"], ["met"]]
    assert set((tmp_path / "log.txt").read_text().splitlines()) == {"[one] met", "[two] met"}


@pytest.mark.parametrize(("cap", "left"), [(0.1, HANG_S), (HANG_S, 0.1)])
def test_a_step_has_its_limit_and_no_more_than_is_left(cap, left, tmp_path, log):
    (record,) = run_together([Step("sleeps", ("-c", SLEEP), cap)], tmp_path, left, log)
    assert record["state"] == "out of time"
    assert record["exit_status"] != 0


@pytest.mark.usefixtures("time_up_after_a_line")
def test_a_step_whose_time_is_up_says_what_it_was_doing(tmp_path, log, monkeypatch):
    monkeypatch.setattr(processes, "GRACE_S", HANG_S)
    doing = (
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"def testing_a_kernel():\n    print('here', flush=True)\n    {SLEEP}\ntesting_a_kernel()"
    )
    (record,) = run_together([Step("slow", ("-c", doing), HANG_S)], tmp_path, HANG_S, log)
    assert record["state"] == "out of time"
    assert "KeyboardInterrupt" in record["output"][-1]
    assert any("in testing_a_kernel" in line for line in record["output"])


@pytest.mark.usefixtures("time_up_after_a_line")
def test_a_step_that_does_not_listen_is_killed_with_its_children(tmp_path, log, monkeypatch):
    monkeypatch.setattr(processes, "GRACE_S", 0.5)
    deaf = (
        "import os, signal, subprocess, sys\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"child = subprocess.Popen([sys.executable, '-c', {SLEEP!r}])\n"
        f"print(child.pid, flush=True)\n{SLEEP}"
    )
    (record,) = run_together([Step("deaf", ("-c", deaf), HANG_S)], tmp_path, HANG_S, log)
    assert (record["state"], record["exit_status"]) == ("out of time", -signal.SIGKILL)
    wait_for(lambda: not alive(int(record["output"][0])))


def test_children_that_a_step_leaves_are_ended(tmp_path, log):
    leaves = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {SLEEP!r}]).pid)"
    (record,) = run_together([Step("leaves", ("-c", leaves), HANG_S)], tmp_path, HANG_S, log)
    assert record["state"] == "ok"
    wait_for(lambda: not alive(int(record["output"][0])))


@pytest.mark.usefixtures("time_up_after_a_line")
def test_the_log_has_what_was_printed_before_a_cut(tmp_path, log):
    (record,) = run_together([Step("cut", ("-c", f"print('so far'); {SLEEP}"), HANG_S)], tmp_path, HANG_S, log)
    assert (tmp_path / "log.txt").read_text().startswith("[cut] so far\n")
    assert record["output"][0] == "so far"


def test_of_tests_more_is_kept(tmp_path, log):
    talks = "import sys; print('\\n'.join(map(str, range(1000))))"
    few, many = run_together(
        [Step("few", ("-c", talks), HANG_S), Step("many", ("-c", talks, "pytest"), HANG_S)], tmp_path, HANG_S, log
    )
    assert (len(few["output"]), len(many["output"])) == (40, 400)


# --- the battery


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_battery_refuses_without_a_gpu(tmp_path, capsys):
    assert battery.main(["--out", str(tmp_path / "b")]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_battery_keeps_its_time_and_says_what_happened(tmp_path, monkeypatch):
    monkeypatch.setattr(battery, "_LEAST_S", 1.0)
    monkeypatch.setattr(battery, "_RESERVE_S", 0.0)
    write = "import sys; open(sys.argv[1], 'w').write('{}')"
    stages = [
        (
            Step("good", ("-c", write, "{file}"), HANG_S),
            Step("bad", ("-c", "print('why'); raise SystemExit(3)"), HANG_S),
        ),
        (Step("none", ("-c", "raise SystemExit(5)"), HANG_S, fine=(0, 5)),),
        (Step("tests", ("-c", write, "{xml}"), HANG_S),),
        (Step("hangs", ("-c", SLEEP), 1.5),),
        (Step("late", ("-c", write, "{file}"), HANG_S),),
    ]
    real, jumps, written = time.monotonic, [0.0], []
    run = battery.run_together
    monkeypatch.setattr(battery.time, "monotonic", lambda: real() + jumps[0])

    def then_the_clock_jumps(stage, *args):
        found = run(stage, *args)
        jumps[0] += 2 * 60 * HANG_S if stage[0].name == "hangs" else 0
        written.append((tmp_path / "summary.json").exists())
        return found

    monkeypatch.setattr(battery, "run_together", then_the_clock_jumps)
    battery.run_stages(stages, tmp_path, minutes=HANG_S)
    summary = json.loads((tmp_path / "summary.json").read_text())
    states = {step["name"]: step["state"] for step in summary["steps"]}
    assert states == {
        "good": "ok", "bad": "failed", "none": "ok", "tests": "ok", "hangs": "out of time", "late": "skipped"
    }  # fmt: skip
    assert written == [False, True, True, True], "there after the first stage"
    assert summary["steps"][1]["output"] == ["why"]
    assert summary["complete"] is True
    written = {"good.json", "tests.xml", "summary.json", "log.txt"}
    assert {path.name for path in tmp_path.iterdir()} == {*written, "results.tar.gz"}
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        assert set(archive.getnames()) == written


@pytest.mark.slow
@pytest.mark.parametrize("spread", [False, True])
def test_battery_runs_the_tests_that_it_can(spread, tmp_path, monkeypatch, log):
    """A machine without pytest-timeout, perhaps without pytest-xdist, and without a package that some test imports."""
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nfilterwarnings = error\nof_a_missing_plugin = 1\naddopts = --of-xdist 2\nmarkers = gpu\n"
    )
    files = tmp_path / "tests" / "gpu"
    files.mkdir(parents=True)
    (files / "test_gpu_a.py").write_text("import of_a_missing_package")
    (files / "test_gpu.py").write_text("import pytest\n@pytest.mark.gpu\ndef test(): pass\ndef test_not(): pass")
    (files / "test_other.py").write_text("raise KeyError")
    monkeypatch.setenv("PYTHONPATH", str(processes.ROOT))  # for bench.failing
    for module in (steps, processes):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(steps.importlib.util, "find_spec", lambda name: spread or None)
    if not spread:
        monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    (record,) = run_together([steps._tests("gpu_tests", False, HANG_S)], tmp_path, HANG_S, log)
    assert "1 passed" in record["output"][-1]
    assert "1 error" in record["output"][-1]
    assert (record["state"], record["file"]) == ("failed", "gpu_tests.xml")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_battery_that_is_ended_leaves_nothing_running(number, tmp_path):
    """`timeout` and schedulers end it by SIGTERM; a step is in a session of its own and would hold the GPU."""
    pid_file = tmp_path / "pid"
    step = f"import os, pathlib; pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid())); {SLEEP}"
    script = (
        "import sys; from bench import battery, steps\n"
        f"steps.everything = lambda rehearse: [(battery.steps.Step('long', ('-c', {step!r}), {HANG_S}),)]\n"
        f"sys.exit(battery.main(['--rehearse', '--out', {str(tmp_path)!r}]))"
    )
    # as a shell begins what it runs in the background
    ended = subprocess.Popen(
        [sys.executable, "-c", script], cwd=processes.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )  # fmt: skip
    try:
        wait_for(lambda: pid_file.exists() and pid_file.read_text())
        pid = int(pid_file.read_text())
        ended.send_signal(number)
        assert ended.wait(HANG_S) != 0
        wait_for(lambda: not alive(pid))
    finally:
        ended.kill()
        ended.wait()
        if pid_file.exists() and alive(int(pid_file.read_text())):
            os.kill(int(pid_file.read_text()), signal.SIGKILL)


# --- what it runs


def stage_seconds(stages):
    return [max(step.cap_s for step in stage) for stage in stages]


def names(stages):
    return [step.name for stage in stages for step in stage]


def test_all_levels_have_their_turn_whatever_the_others_take():
    stages = steps.everything(rehearse=False)
    assert names(stages)[:8] == ["warm_up", "gpu_tests", "verify", "llama-8b", "blocks", "kernels", "model", "experts"]
    assert sum(stage_seconds(stages)[:6]) <= 8.5 * 60 - battery._RESERVE_S


def test_a_first_run_is_right_before_it_is_fast():
    stages = steps.first(rehearse=False)
    assert names(stages)[:7] == ["warm_up", "gpu_tests", "verify", "races", "graphs", "kernels", "variants"]
    assert sum(stage_seconds(stages)[:6]) <= 8.5 * 60 - battery._RESERVE_S
    (races,) = (step for stage in stages for step in stage if step.name == "races")
    assert "--rounds" not in races.command, "three thousand, as it is by default"


@pytest.mark.parametrize("plan", [steps.everything, steps.first])
def test_a_rehearsal_has_the_same_steps(plan):
    real, rehearsed = names(plan(rehearse=False)), names(plan(rehearse=True))
    assert rehearsed == real
    assert len(real) == len(set(real))


@pytest.mark.parametrize("rehearse", [False, True])
@pytest.mark.parametrize("plan", [steps.everything, steps.first])
def test_every_command_line_of_bench_is_one_that_it_takes(plan, rehearse):
    for stage in plan(rehearse):
        for step in stage:
            if "bench" not in step.command:
                continue
            argv = [{"{file}": "f", "{minutes}": "1"}.get(part, part) for part in step.command[3:]]
            args = arguments(*argv)
            cases = bench._cases(args)
            assert cases
            assert all(levels.names(level, settings(only=tuple(args.providers)), r) for level, _, r, _ in cases)


@pytest.mark.slow
def test_the_tests_of_a_first_run_are_all_there_is_between_its_steps():
    """Races have a step of their own, and so have graphs: chosen by words that no other test has in its name."""
    ran = subprocess.run(
        [sys.executable, *steps._tests("all", True, 60).command], cwd=processes.ROOT, capture_output=True, text=True
    )  # fmt: skip
    found = [line for line in ran.stdout.splitlines() if "::" in line]
    assert len(found) > 100
    for word in ("races", "compiled"):
        of_word = {test for test in found if word in test.lower()}
        assert of_word
        assert of_word == {test for test in found if test.startswith(f"tests/gpu/test_gpu_{word}.py")}


@pytest.mark.slow
def test_the_tests_that_need_a_gpu_load_no_more_than_they_need():
    listing = "import sys; sys.path[:0] = ['tests', 'tests/samples', 'tests/gpu']; import glob, pathlib\n"
    listing += "for file in glob.glob('tests/gpu/test_gpu*.py'): __import__(pathlib.Path(file).stem)\n"
    listing += (
        "print(*(name for name in ('peft', 'transformers', 'torch._dynamo', 'matplotlib') if name in sys.modules))"
    )
    env = os.environ | {"TRITON_INTERPRET": "1"}
    ran = subprocess.run([sys.executable, "-c", listing], cwd=processes.ROOT, capture_output=True, text=True, env=env)
    assert (ran.stdout, ran.returncode) == ("\n", 0), ran.stderr


def test_a_verification_of_every_dtype_is_one_result():
    one = dict(device="cuda", seed=0, quick=False, notes=["a", "b"], summary="5 passed", passed=5, failed=0, not_run=1)
    two = one | dict(notes=["b"], summary="2 passed", passed=2, failed=3, cases=[{"dtype": "fp16"}])
    found = verifying.merged([one | {"cases": [{"dtype": "bf16"}]}, two], ["fp32"])
    assert (found["passed"], found["failed"], found["not_run"]) == (7, 3, 2)
    assert found["notes"] == ["a", "b"]
    assert found["summary"].splitlines() == ["5 passed", "2 passed", "fp32: no result"]
    assert [case["dtype"] for case in found["cases"]] == ["bf16", "fp16"]
    assert verifying.merged([], ["bf16"])["missing"] == ["bf16"]


@pytest.mark.slow
def test_battery_rehearsal(tmp_path, monkeypatch):
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "peft.py").write_text("raise ImportError")  # the real one takes seconds to load
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "without"))
    out = tmp_path / "out"
    assert battery.main(["--rehearse", "--out", str(out), "--only", "large"]) == 0
    written = json.loads((out / "large.json").read_text())
    assert written["complete"] is True
    assert written["cases"][0]["providers"]["ours"]["saved_bytes"] > 0
    assert written["cases"][0]["providers"]["ours"]["seconds"] == {}
    assert json.loads((out / "summary.json").read_text())["rehearsal"] is True
    assert battery.main(["--rehearse", "--out", str(out), "--only", "large", "--minutes", "0"]) == 0
    assert json.loads((out / "summary.json").read_text())["steps"][0]["state"] == "skipped"
