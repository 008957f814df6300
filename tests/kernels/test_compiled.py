"""O12: what the compiler makes of the kernels, with no GPU; each script runs where Triton does not interpret."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import report

ORACLES = Path(__file__).parents[1] / "oracles"
BUDGETS = Path(__file__).parents[1] / "budgets"
ROOT = Path(__file__).parents[2]


def run_compiled(*command):
    """Run Python in a process where Triton does not interpret."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=env, timeout=2000, check=False
    )


# launches, five a layer, one more where the rank is too large to read dy once, n + 4 for n projections with adapters;
# and descriptors
LAID_OUT = {
    "dtypes": (30, 36), "tiles": (11, 18), "edges": (20, 8), "projections": (23, 55), "forms": (10, 10),
    "blocks": (14, 46), "overlap": (5, 8), "replays": (20, 32), "profiled": (20, 40), "nothing_between": (5, 10),
    "binaries": (185, 207),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("part", LAID_OUT)
def test_every_launch_is_laid_out_as_its_kernel_takes_it(part):
    done = run_compiled(ORACLES / "dry_launch.py", part)
    assert done.returncode == 0, done.stderr[-3000:]
    launches, descriptors = LAID_OUT[part]
    kernels = "_matmul_expand_kernel _shrink_kernel _wgrad_kernel"
    assert (
        done.stdout.splitlines()[-1] == f"dry launch: {launches} launches of {kernels} with {descriptors} descriptors"
    )


@pytest.mark.slow
def test_the_host_is_timed_without_a_gpu(tmp_path):
    done = run_compiled("-m", "bench.host", "--rounds", 2, "--json", tmp_path / "cpu" / "host.json")
    assert done.returncode == 0, done.stderr[-3000:]
    content = json.loads((tmp_path / "cpu" / "host.json").read_text())
    assert {"nn.Linear", "bound", "lora_kernels"} <= set(content["rows"])
    assert all(row[which]["median"] > 0 for row in content["rows"].values() for which in ("forward", "both"))
    page = report.render(tmp_path)
    assert "### Host time of a call" in page
    assert "No GPU has been measured yet" in page


@pytest.mark.slow
def test_every_kernel_keeps_its_budgets(tmp_path):
    path = tmp_path / "report.json"
    done = run_compiled(
        "-m", "lora_kernels", "inspect", "--quick", "--arch", "sm_90", "--jobs", 1, "--budgets", BUDGETS, "--json", path
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "Compiled properties, not performance." in done.stdout
    kernels = json.loads(path.read_text())["kernels"]
    assert {(k["name"], k["case"]["dtype"]) for k in kernels} == {
        (name, dtype) for name in ("shrink", "matmul_expand", "wgrad", "dequantize") for dtype in ("bf16", "fp32")
    } | {("segments", "bf16")}
    assert {k["backward"] for k in kernels} == {True, False}
    flags = ("USE_TMA", "HAS_BIAS", "HAS_KEEP", "HAS_DROPOUT", "HAS_SHRINK", "IS_SPLIT", "PDL", "Q_ROWS_ARE_N", "READY")
    for flag in flags:
        assert any(k["constants"].get(flag) for k in kernels), f"{flag} was never compiled"
    figures_follow_from_the_tile(next(k for k in kernels if k["constants"].get("BLOCK_N") == 256))


def figures_follow_from_the_tile(kernel):
    """What is read of the machine code of the large product, by hand."""
    facts, loop, sides = kernel["facts"], kernel["facts"]["loop"], kernel["constants"]
    groups = kernel["num_warps"] // 4  # warpgroups of the program, each of which takes its rows 64 at a time
    assert facts["mma"] == {"HGMMA.64x256x16": sides["BLOCK_M"] // 64 // groups * sides["BLOCK_K"] // 16}
    assert (loop["arrives"], loop["waits"], loop["tma_loads"], loop["async_copies"]) == (1, 1, 2, 0)
    assert 0 < facts["registers"] <= 255
    stages = kernel["num_stages"] * sides["BLOCK_K"] * (sides["BLOCK_M"] + sides["BLOCK_N"]) * 2
    assert stages < facts["shared"] <= 232_448
    assert facts["dependent"] == "waits"


PLANTED = {
    "a 32-bit product": ["multiplies in 32 bits for a pointer"],
    "TF32": ["rounds fp32 to TF32 unasked"],
    "few warps": ["spills", "waits 8 times"],
    "too many programs": ["launches 264 programs at once and 132 fit"],
    "narrow loads": ["narrower than 128 bits"],
    "no pipeline": ["is not pipelined"],
    "a contracted scale": ["contracts a product and a sum, which are rounded apart, 1 times"],
    "a contracted scale on AMD": ["contracts a product and a sum"],
}


@pytest.mark.slow
def test_planted_faults_are_found():
    done = run_compiled(ORACLES / "planted_kernels.py")
    assert done.returncode == 0, done.stderr[-3000:]
    planted = json.loads(done.stdout.splitlines()[-1])
    for fault, findings in PLANTED.items():
        for finding in findings:
            assert any(finding in words for words in planted[fault]["broken"]), (fault, planted[fault])
    assert planted["a wait"]["dependent"] == "waits"
    assert planted["a read before the wait"]["dependent"] == "waits to write"
    assert planted["a write before the wait"]["dependent"] == "waits late"
    assert planted["none"] == {"broken": [], "dependent": "waits", "warnings": []}


@pytest.mark.slow
def test_each_wave_of_an_amd_gpu_waits_for_its_stores_before_it_is_counted():
    done = run_compiled(ORACLES / "amd_barrier.py")
    assert done.returncode == 0, done.stderr[-3000:]
    late = json.loads(done.stdout)
    assert {arch: counts["with"] for arch, counts in late.items()} == dict.fromkeys(late, 0)
    # LLVM waits by itself on RDNA, and does not on CDNA: there the wait of `last_to_arrive` is what orders the stores.
    assert {arch for arch, counts in late.items() if counts["without"]} == {"gfx942", "gfx950"}
