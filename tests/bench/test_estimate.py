"""Before a long run on a CPU `bench` says how long, and how to make it shorter."""

import dataclasses

import pytest
import torch
from bench_samples import SHAPE, arguments, settings

from lora_kernels.bench import estimate
from lora_kernels.bench.cost import layer as layer_cost
from lora_kernels.cli import bench
from lora_kernels.measure.presets import MODELS, PRESETS, Shape

PEAKS = {"matmul_flops_per_second": 1e11}
SLOW = [("layer", shape, 16, 0.0) for shape in PRESETS["llama-8b"].shapes]


def test_the_flops_of_every_level():
    k, n = SHAPE.k, SHAPE.n
    one = sum(layer_cost.flops(48, k, n, 4))
    assert estimate.flops("layer", SHAPE, 4) == estimate.flops("kernel", SHAPE, 4) == one
    assert estimate.flops("mlp", SHAPE, 4) == 3 * one
    several = dataclasses.replace(SHAPE, others=(n, n))
    assert estimate.flops("qkv", several, 4) == 3 * one
    dims = PRESETS["tiny"].model
    layer, whole = (estimate.flops(level, dims, 16) for level in ("decoder", "model"))
    of_linears = 256 * 4 * (256 * 256 * 2 + 256 * 128 * 2 + 256 * 688 * 3)
    assert of_linears < layer < 1.5 * of_linears  # adapters and attention come on top
    assert whole == 2 * layer + 4 * 256 * 256 * 1024


def test_more_rounds_rows_and_providers_take_longer():
    few = settings(peaks=PEAKS, only=("frozen", "ours"))
    case = ("layer", SHAPE, 4, 0.0)
    taken = estimate.seconds(case, few)
    assert 0 < taken < 1
    assert estimate.seconds(case, dataclasses.replace(few, rounds=40)) > 5 * taken
    assert estimate.seconds(("layer", dataclasses.replace(SHAPE, m=4800), 4, 0.0), few) == pytest.approx(100 * taken)
    assert estimate.seconds(case, dataclasses.replace(few, only=("frozen", "ours", "peft"))) > 1.2 * taken


def test_a_long_run_says_so_with_the_ways_out():
    on_cpu = settings(peaks=PEAKS)
    words = estimate.warning(SLOW, on_cpu, None)
    assert "minutes on this CPU (4 cases; " in words or "hours on this CPU (4 cases; " in words
    assert "Less: --preset tiny, --m 64, --rounds 3, --minutes 5. Ctrl-C keeps the cases that are done." in words
    assert "\n" not in words
    assert "--model tiny, --layers 1" in estimate.warning([("model", MODELS["llama-1b"], 16, 0.0)], on_cpu, None)
    short = [("layer", Shape(512, 1024, 1024), 16, 0.0)]
    assert estimate.warning(short, on_cpu, None) == ""
    assert estimate.warning(short * 1000, on_cpu, None) != ""
    assert estimate.warning(short * 1000, on_cpu, 1.0) == ""  # none is begun after a minute
    assert estimate.warning(SLOW, dataclasses.replace(on_cpu, device=torch.device("cuda")), None) == ""
    assert "hours" in estimate.warning(
        SLOW * 9, dataclasses.replace(on_cpu, passes=(), peaks={}), None
    )  # weighed alone


def test_the_command_says_so_before_the_first_case(monkeypatch, capsys):
    def run(*given):
        print("the first case")
        return [], []

    monkeypatch.setattr(bench, "_run_all", run)
    assert bench.run(arguments("--preset", "llama-8b")) == 0
    said = capsys.readouterr()
    assert said.err.startswith("By arithmetic this takes about ")
    assert bench.run(arguments("--quick")) == 0
    assert capsys.readouterr().err == ""
