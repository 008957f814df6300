"""The race of overlapping launches finds what it is there for: in the interpreter, and in the emulator that overlaps."""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench import races
from lora_kernels import plan

ROOT = Path(races.__file__).parent.parent
TINY = 5, 9, 7, 3
HERE = races.Machine(torch.device("cpu"))
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="runs on CPU tensors in the interpreter")


@interpreted
@pytest.mark.parametrize("shape", [TINY, (16, 40, 24, 16)], ids=str)
def test_right_launches_are_all_the_same(shape):
    assert not any(races.race(shape, 4, HERE).values())


STALE = {  # a kernel that gives what it gave the layer before, and the results that show it
    "shrink": {"s", "mask", "y", "dB", "dx", "dA"},
    "shrink_wgrad": {"ds", "dB", "dx", "dA"},
    "matmul_expand": {"y", "dx"},
    "wgrad": {"dA"},
}


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("name", STALE)
def test_what_lay_there_before_is_told_from_what_should(name, monkeypatch):
    ops, before = plan.contractions("triton"), {}
    real = getattr(ops, name)

    def late(*args, **kwargs):
        out = real(*args, **kwargs)
        shapes = str([t.shape for t in out] if isinstance(out, tuple) else out.shape)
        given, before[shapes] = before.get(shapes, out), out
        return given

    machine = races.Machine(HERE.device, before=lambda i: monkeypatch.setattr(ops, name, late))
    wrong = races.race(TINY, 4, machine)
    assert {result: count for result, count in wrong.items() if count} == dict.fromkeys(STALE[name], 3)


def test_without_a_gpu_it_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert races.main([]) == 2
    assert "--emulate sm_90" in capsys.readouterr().err


def test_the_command_writes_after_each_shape(monkeypatch, tmp_path, capsys):
    counts = iter([{"y": 0, "dA": 0}, {"y": 0, "dA": 2}])
    monkeypatch.setattr(races, "race", lambda *args: next(counts))
    args = argparse.Namespace(rounds=5, emulate=None, json=str(tmp_path / "r.json"))
    with pytest.raises(StopIteration):
        races._race_all(args, races.SMALL[:3], HERE, list)
    written = json.loads((tmp_path / "r.json").read_text())
    assert not written["complete"]
    assert [one["wrong"]["dA"] for one in written["shapes"]] == [0, 2]
    assert "33x" not in (shown := capsys.readouterr().out)
    assert "r16, 5 rounds: all the same" in shown
    assert "r40, 5 rounds: WRONG: dA in 2" in shown
    counts = iter([{"y": 1}])
    assert races._race_all(args, races.SMALL[:1], HERE, list) == 1
    counts = iter([{"y": 0}])
    assert races._race_all(args, races.SMALL[:1], HERE, lambda: ["a store outside"]) == 1


PLANTED = """
import re, sys
from bench import races
with races.emulated("sm_90") as (machine, problems):
    emulator = machine.wait.__self__
    emulator.edit = lambda name, ptx: re.sub("griddepcontrol.wait *;", "", ptx)
    wrong = races.race((40, 48, 56, 16), 9, machine)
print(emulator.edits, wrong)
sys.exit(not (emulator.edits and any(wrong.values())))
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is built by g++, and there is none")
def test_launches_that_do_not_wait_are_found_out():
    """By compiled kernels that overlap: their waits for the launch before taken out."""
    ran = subprocess.run([sys.executable, "-c", PLANTED], cwd=ROOT, capture_output=True, text=True, timeout=1000)
    assert ran.returncode == 0, ran.stdout + ran.stderr
