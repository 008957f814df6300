"""The benchmark on a GPU: every level runs, is right and is timed. Skipped without one."""

import pytest
import torch
from bench_samples import SHAPE

from lora_kernels.bench import levels
from lora_kernels.bench.cases.layer import Settings
from lora_kernels.measure import timing
from lora_kernels.measure.presets import PRESETS

pytestmark = pytest.mark.gpu
TINY = PRESETS["quick"].model


@pytest.mark.usefixtures("no_peft")
@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize(
    ("level", "cache"),
    [("layer", "flush"), ("layer", "rotate"), ("kernel", "rotate"), ("decoder", "warm"), ("model", "flush")],
)
def test_every_level_on_a_gpu(level, cache, cuda_graph, monkeypatch):
    monkeypatch.setattr(timing, "_MOST_COPIES", 3)
    subject = TINY if level in ("decoder", "model") else SHAPE
    on_gpu = Settings(
        torch.device("cuda"), torch.bfloat16, compiled=False, rounds=2, cache=cache, cuda_graph=cuda_graph,
        passes=("forward",) if level == "kernel" else timing.PASSES,
    )  # fmt: skip
    for case in levels.run(level, subject, 4, 0.1, on_gpu, lambda doing: None):
        assert ("split" in case["providers"]) == (level == "layer")
        for row in case["providers"].values():
            assert row["reason"] == ""
            assert all(taken["median"] > 0 for taken in row["seconds"].values())
            assert row["seconds"]
