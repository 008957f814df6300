"""Compiled kernels, executed: the quick set of the emulator's table, on sm_80 and sm_90."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from emulator import build

RUN = Path(__file__).with_name("emulator") / "run.py"


@pytest.fixture(scope="module", autouse=True)
def compiler():
    if problem := build.missing():
        pytest.skip(problem)


def run(*options):
    """The table in a process of its own: here kernels are interpreted."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, str(RUN), *options], env=env, capture_output=True, text=True)


# two halves of the table an architecture, for two workers; a busy machine takes its time to compile
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("half", range(2))
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_compiled_kernels_compute_right(arch, half):
    done = run("--quick", "--arch", arch, "--share", f"{half}/2")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith("ok ") for line in lines) >= 7, done.stdout


def test_what_is_wrong_is_said():
    """A kernel that reads what nobody wrote: the pipeliner's fault, in a program with no code of the project."""
    program = RUN.with_name("upstream.py")
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    early, late = (json.loads(line) for line in done.stdout.splitlines())
    assert early["wrong"] == 0
    assert not early["problems"]
    assert late["wrong"] > 0
    assert any("another warp" in line for line in late["problems"])
