"""O12: what the compiler makes of the kernels, with no GPU: 64-bit offsets, IEEE fp32, no spills on sm_90."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ORACLES = Path(__file__).parent / "oracles"


def run_compiled(script):
    """Run an oracle in a process where Triton does not interpret; its last line of output."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, str(ORACLES / script)], capture_output=True, text=True, env=env, timeout=280)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def facts():
    """Facts of every kernel variant."""
    return json.loads(run_compiled("compile_kernels.py"))


def test_no_32_bit_product_reaches_a_pointer(facts):
    assert facts["planted"]["narrow_products"], "the check does not see a planted 32-bit product"
    assert all(f["pointers"] for f in facts.values() if not f["tma"])
    assert not {name: f["narrow_products"] for name, f in facts.items() if f["narrow_products"] and name != "planted"}


def test_fp32_is_ieee_unless_asked(facts):
    precise = {name: f["tf32"] for name, f in facts.items() if f["dtype"] == "fp32" and not name.endswith("tf32")}
    assert len(precise) >= 3
    assert not any(precise.values()), precise
    assert facts["matmul fp32 tf32"]["tf32"], "the check does not see TF32 where it was asked for"


def test_nothing_spills(facts):
    spilled = {name: f["spills"] for name, f in facts.items() if f["spills"]}
    assert not spilled, spilled


def test_hopper_matmuls_use_wgmma_and_descriptors(facts):
    fast = {name: f for name, f in facts.items() if f["tma"]}
    assert len(fast) >= 4
    for name, f in fast.items():
        assert f["wgmma"], name
        assert f["tma_loads"] >= 2, name
        assert f["shared"] <= 232_448, name


def test_every_launch_is_laid_out_as_its_kernel_takes_it():
    # five a layer and one more where the rank is too large to read dy once
    assert "61 launches of _matmul_expand_kernel _shrink_kernel _wgrad_kernel" in run_compiled("dry_launch.py")
