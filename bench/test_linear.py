"""`lora_linear` beside PEFT, the same compiled, a chain of in-place addmm, and the frozen floor."""

import pytest

from lora_kernels.measure.timing import PASSES

OPERATION = "linear"


@pytest.mark.parametrize("which", PASSES)
def test_linear(timed, admitted, which):
    timed(admitted, which)
