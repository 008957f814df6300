"""`lora_mlp`, a gated MLP, beside PEFT, an addmm chain and the frozen floor."""

import pytest

from lora_kernels.measure.timing import PASSES

OPERATION = "mlp"


@pytest.mark.parametrize("which", PASSES)
def test_mlp(timed, admitted, which):
    timed(admitted, which)
