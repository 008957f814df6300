"""Launches that overlap, thousands of times, on a GPU. Skipped without one; `test_races` tries the race itself."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench import races

pytestmark = pytest.mark.gpu
ROUNDS = 3000


@pytest.mark.parametrize("shape", races.LARGE, ids=str)
def test_launches_that_overlap_give_the_same_bits(shape):
    """shrink, shrink_wgrad and matmul_expand from run to run, and wgrad that may begin early beside one that may not."""
    assert not any(races.race(shape, ROUNDS, races.gpu()).values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_in_other_dtypes(dtype):
    assert not any(races.race(races.LARGE[2], ROUNDS // 10, races.gpu(), dtype).values())
