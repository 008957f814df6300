"""`pytest bench/`: what it writes, that nothing wrong is timed, and what `lora_add` and its rivals are held to."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_samples import CPU, SHAPE, settings

from bench import subjects
from lora_kernels.bench.cases import layer
from lora_kernels.bench.cost import add as add_cost
from lora_kernels.bench.cost import layer as layer_cost
from lora_kernels.bench.providers import add as add_providers
from lora_kernels.measure.presets import Shape
from lora_kernels.measure.timing import PASSES
from lora_kernels.verify import judge

ROOT = Path(__file__).parents[2]


def options(shape=None, p=0.0, dtype=torch.float32):
    return subjects.Options(shape, 4, p, settings(dtype))


@pytest.mark.slow
def test_the_groups_are_written_and_a_wrong_provider_is_not_timed(tmp_path):
    file = tmp_path / "b.json"
    # this test's own pytest, of which the other must know nothing: under xdist it would time nothing
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    samples = ROOT / "tests" / "samples"
    ran = subprocess.run(
        [
            sys.executable, "-m", "pytest", "bench/test_linear.py", "-p", "wrong_provider",
            "-k", "frozen or ours or addmm", "--shape", "48x64x40", "--r", "4", "--dtype", "fp32",
            "--benchmark-json", file, "--benchmark-min-rounds=1", "--benchmark-max-time=0.01",
        ],
        capture_output=True, text=True, cwd=ROOT, env=env | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, samples)))},
    )  # fmt: skip
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert ran.stdout.count("Failed: wrong result, not timed: ") >= 3
    written = json.loads(file.read_text())
    assert written["machine_info"]["measured_on"]["torch"] == torch.__version__
    timed = {(one["group"], one["name"]) for one in written["benchmarks"]}
    assert {(group, name) for group, name in timed if "ours_torch" not in name} == {
        (f"lora_linear, {which}: 48x64x40 r=4 p=0", f"test_linear[{name}-{which}]")
        for which, name in itertools.product(PASSES, ("frozen", "ours"))
    }
    facts = {one["name"]: one["extra_info"] for one in written["benchmarks"]}
    ours, floor = (facts[f"test_linear[{name}-both]"] for name in ("ours", "frozen"))
    assert ours["flops"] == sum(layer_cost.flops(48, 64, 40, 4))
    assert floor["flops"] == sum(layer_cost.flops(48, 64, 40, 0))
    assert ours["rule"] == "numerics rules 1 and 2"
    assert 0 < ours["share_of_allowed_error"] <= 1
    assert ours["bytes"] > floor["bytes"] > 0
    assert (ours["dtype"], ours["shape"], ours["pass"]) == ("float32", "48x64x40", "both")
    assert f"torch {torch.__version__}" in ours["machine"]


@pytest.mark.usefixtures("no_peft")
@pytest.mark.parametrize("operation", subjects.SUBJECTS)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_every_provider_is_admitted_with_its_costs(operation, p):
    asked = options(Shape(48, 40, 36, others=(12, 20)), p)
    admit = subjects.SUBJECTS[operation](asked)
    for name in subjects.names(operation, asked):
        admitted = admit(name)
        assert admitted.calls is not None, admitted.row["reason"]
        facts = admitted.facts("forward", asked)
        assert facts["flops"] > 0
        assert 0 < facts["share_of_allowed_error"] <= 1
        assert facts["bytes"] is None or facts["bytes"] > 0
        json.dumps(facts, allow_nan=False)


def test_shapes_are_made_to_fit_their_operation():
    assert str(options().shape_of("qkv")) == "256x256x256+128+128"
    assert str(options().shape_of("mlp")) == "256x256x688"
    own = options(Shape(8, 4, 6))
    assert str(own.shape_of("qkv")) == "8x4x6+6+6"
    assert str(options(Shape(8, 4, 6, others=(2, 2))).shape_of("linear")) == "8x4x6"


def test_who_does_which_launch():
    names = subjects.names("contractions", options())
    assert {"s: ours", "y: base", "dx: base", "ds, dB: operators", "dA: ours"} <= set(names)
    assert "s: base" not in names


# --- lora_add


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_provider_of_lora_add_is_right(dtype, p):
    problem = add_providers.without_base(layer.draw(SHAPE, 4, p, settings(dtype)))
    names, truth = add_providers.names_for(dtype, "torch", compiled=False), judge.Truth()
    wide = {"ours_fp32", "peft_fp32"} if dtype == torch.bfloat16 else set()
    assert set(names) == {"ours", "peft", "addmm"} | wide
    for name in names:
        verdict = judge.judge(add_providers.build(name, problem), truth)
        assert verdict.ok, (name, verdict.reason)


def test_a_wrong_lora_add_is_found():
    problem = add_providers.without_base(layer.draw(SHAPE, 4, 0.0, settings()))
    assert problem.x.device == CPU
    provider = add_providers.build("ours", problem)
    object.__setattr__(provider, "forward", lambda right=provider.forward: right() + 1e-3)
    assert "y" in judge.judge(provider, judge.Truth()).reason


@pytest.mark.parametrize(
    ("name", "dropout", "mib", "launches"),
    [
        ("peft", False, 834.25, 9), ("peft", True, 1154.25, 11), ("addmm", False, 578.25, 7), ("addmm", True, 898.25, 9),
        ("torch", False, 578.25, 7), ("torch", True, 1090.25, 11), ("triton", False, 514.25, 6), ("triton", True, 526.25, 6),
    ],
)  # fmt: skip
def test_bytes_of_lora_add(name, dropout, mib, launches):
    size = layer_cost.Size(8192, 4096, 4096, 16)
    cost = add_cost.COSTS[name](size, dropout)
    assert cost.total / 2**20 == pytest.approx(mib)
    assert cost.launches == launches
    assert sum(cost.forward) > size.x + 2 * size.y  # x and base read, y written


def test_flops_of_lora_add():
    assert add_cost.flops(2, 3, 5, 7) == (2 * 2 * 7 * 8, 2 * 2 * 2 * 7 * 8)
