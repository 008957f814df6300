"""`lora_grouped_linear`, a stack of experts, beside PEFT's form, the split form and the frozen floor."""

import pytest

from lora_kernels.measure.timing import PASSES

OPERATION = "grouped"


@pytest.mark.parametrize("which", PASSES)
def test_grouped(timed, admitted, which):
    timed(admitted, which)
