"""`lora_add`, the low-rank term over a result that is there, beside PEFT and a chain of addmm."""

import pytest

from lora_kernels.measure.timing import PASSES

OPERATION = "add"


@pytest.mark.parametrize("which", PASSES)
def test_add(timed, admitted, which):
    timed(admitted, which)
