"""What compiled kernels do, counted as they are executed, held to budgets; and that a budget can be broken."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import counted

pytest.importorskip("triton")
from emulator import build, counters

COMMAND = Path(__file__).parents[1] / "emulator" / "counters.py"
NAME = "sm_90 512x512x512 r=16 bf16 p=0 tile 0: 1 shrink"


def figures(**more):
    """Of a launch that keeps to what it is held to."""
    return {
        "tile": "64x128x16", "aligned": True, "instructions": 1000, "products": 64, "read": 4096, "written": 512,
        "formula": [4096, 512], "requests": 10, "sectors": 160, "passes": {"cp.async": [32, 32], "ld": [8, 8]},
    } | more  # fmt: skip


def broken(now, stored=None):
    return list(counters.broken({NAME: now}, {NAME: stored or figures()}))


def test_launches_keep_to_their_budgets():
    assert not broken(figures())
    assert not broken(figures(instructions=1050, sectors=150))


@pytest.mark.parametrize(
    "change",
    [
        {"instructions": 1051},
        {"products": 65},
        {"sectors": 161},
        {"read": 4095},
        {"read": 4500},
        {"written": 511},
        {"written": 513},
        {"passes": {"cp.async": [33, 32], "ld": [8, 8]}},
        {"formula": None, "read": 4097},
    ],
)
def test_each_figure_is_held(change):
    assert broken(figures(**change))


def test_more_passes_than_the_fewest_want_a_reason_and_may_not_grow():
    over = figures(passes={"ld": [16, 8]})
    assert broken(over, over)
    explained = over | {"why": "because"}
    assert not broken(over, explained)
    assert broken(figures(passes={"ld": [17, 8]}), explained)
    # operands that lie anyhow are held to what they did
    anyhow = figures(aligned=False, passes={"ld": [16, 8]})
    assert not broken(anyhow, anyhow)
    assert broken(anyhow | {"passes": {"ld": [17, 8]}}, anyhow)


def test_a_launch_without_a_budget_is_broken():
    assert list(counters.broken({NAME: figures()}, {})) == [f"{NAME}: no budget is stored"]


def test_reasons_stay_as_long_as_they_are_needed():
    over = figures(passes={"ld": [16, 8]})
    before = {NAME: over | {"why": "because"}, "sm_80 other": figures(), "sm_90 gone": figures()}
    after = counters.renewed({NAME: over}, before)
    assert after == {NAME: over | {"why": "because"}, "sm_80 other": figures()}
    assert "why" not in counters.renewed({NAME: figures()}, before)[NAME]
    assert "why" not in counters.renewed({NAME: over}, {})[NAME]
    assert counters.renewed({NAME: over}, {}, "new")[NAME]["why"] == "new"


@pytest.mark.slow
@pytest.mark.parametrize("arch", counters.ARCHES)
def test_compiled_kernels_keep_to_their_budgets(arch):
    if problem := build.missing():
        pytest.skip(problem)
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(COMMAND), "--quick", "--arch", arch]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_tables_have_what_is_stored(tmp_path):
    with pytest.raises(FileNotFoundError):
        counted.stored(tmp_path)
    budgets = {"3.6": {NAME: figures(passes={"ld": [16, 8]}, why="because")}, "3.9": {NAME: figures()}}
    head, (row,) = counted.launches(budgets, NAME.split(": ")[0])
    cells = dict(zip(head[6:], row[6:], strict=True))
    assert cells["sectors / request"] == "16.0"
    assert (cells["passes / fewest, 3.6"], cells["passes / fewest, 3.9"]) == ("2.00", "1.00")
    assert counted.conflicts(budgets)[1] == [["`shrink`", "16 bit", "-", "-", "2.00", "1.00"]]
    assert list(counted.reasons(budgets)) == ["because"]
