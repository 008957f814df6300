"""Compiled kernels, executed: the quick set of the emulator's table, on sm_80 and sm_90."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from emulator import build, cases, launches
from emulator import run as command

from lora_kernels.kernels import _imagined
from lora_kernels.kernels._configs import matmul_configs

ROOT = Path(__file__).parents[2]
RUN = ROOT / "tests" / "emulator" / "run.py"


@pytest.fixture(scope="module", autouse=True)
def compiler():
    if problem := build.missing():
        pytest.skip(problem)


def run(*options):
    """The table in a process of its own: here kernels are interpreted."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, str(RUN), *options], env=env, capture_output=True, text=True)


# Thirds of the quick table, so that no test takes long; the first has each kernel, fp32 and 16 bits, masks, few rows, an
# activation. The limit is against hangs, as for slow tests.
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("third", [0, *(pytest.param(third, marks=pytest.mark.slow) for third in (1, 2))])
@pytest.mark.parametrize("arch", [pytest.param("sm_80", marks=pytest.mark.slow), "sm_90"])
def test_compiled_kernels_compute_right(arch, third):
    done = run("--quick", "--arch", arch, "--share", f"{third}/3")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith("ok ") for line in lines) == (8, 7, 7)[third], done.stdout


def test_what_is_wrong_is_said(tmp_path):
    """A kernel that reads what nobody wrote: the pipeliner's fault, in a program with no code of the project."""
    program, env = RUN.with_name("upstream.py"), os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir()), "PTX lies where others look for machine code"
    early, late = (json.loads(line) for line in done.stdout.splitlines())
    assert early["wrong"] == 0
    assert not early["problems"]
    assert late["wrong"] > 0
    assert any("another warp" in line for line in late["problems"])


@pytest.mark.slow
def test_the_race_of_the_pipeliner_is_found_in_a_kernel_of_ours(tmp_path):
    """Without the cure for few rows, ds + dB takes a tile by tensor cores and by registers: see docs/traps.md."""
    shutil.copytree(ROOT / "lora_kernels", tmp_path / "lora_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    source = tmp_path / "lora_kernels" / "kernels" / "_wgrad_config.py"
    cure = "    if case.shrinks and not case.activated and case.rows <= block_m:\n"
    text = source.read_text()
    assert text.count(cure) == 1
    chosen = "--quick", "--arch", "sm_90", "--filter", "layer bf16 24x144x208"

    right = run(*chosen, "--path", str(tmp_path))
    assert right.returncode == 0, right.stdout + right.stderr
    source.write_text(text.replace(cure, "    if False:\n"))
    wrong = run(*chosen, "--path", str(tmp_path))
    assert wrong.returncode == 1, wrong.stdout + wrong.stderr
    (first,) = (line for line in wrong.stdout.splitlines() if line.startswith("WRONG"))
    assert "layer bf16 24x144x208" in first
    assert "d_lora_B has NaN" in wrong.stdout
    assert "_wgrad_kernel" in wrong.stdout
    assert "another warp" in wrong.stdout


def dry(case):
    with _imagined.imagine(_imagined.GPUS["sm_90"]), launches.recorded(dry=True) as seen:
        case.launch()
    return set(seen)


def test_a_shipped_tile_that_was_never_executed_is_named():
    largest = matmul_configs(torch.bfloat16, tma=True, masked=False)[0]
    before = launches.missing_tiles(set(), tma=True)
    after = launches.missing_tiles(dry(cases.layer("bf16", 300, 208, 304, 16, place=0)), tma=True)
    assert set(before) - set(after) == {f"torch.bfloat16 ieee tma {largest}"}
    assert len(before) == 27
    assert len(launches.missing_tiles(set(), tma=False)) == 14


def test_a_tile_or_flag_that_was_never_executed_fails_the_full_table():
    seen = dry(cases.layer("bf16", 72, 96, 80, 16))
    features = set().union(*(one.features() for one in seen))
    unbiased, biased = (("matmul_expand", 2, "HAS_BIAS", on) for on in (False, True))
    assert unbiased in features
    ended = dict(
        arch="sm_90", tiles=[one.tile() for one in seen], covered=sorted(map(repr, features)), missing=["a tile"],
        everything=sorted(map(repr, features | {biased})),
    )  # fmt: skip
    lines, lacking = command.coverage([ended], "sm_90")
    assert any("matmul_expand 16 bit" in line for line in lines)
    assert lacking == sorted(["never executed on sm_90: a tile", f"never executed on sm_90: {biased!r}"])
    assert not command.coverage([ended, ended | dict(covered=[repr(biased)], missing=[])], "sm_90")[1]
