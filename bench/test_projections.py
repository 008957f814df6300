"""`lora_qkv`, three projections of one x, beside PEFT, an addmm chain and the frozen floor."""

import pytest

from lora_kernels.measure.timing import PASSES

OPERATION = "qkv"


@pytest.mark.parametrize("which", PASSES)
def test_projections(timed, admitted, which):
    timed(admitted, which)
