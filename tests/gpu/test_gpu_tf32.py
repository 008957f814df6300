"""Products in TF32 on a GPU: how far off they are, and whether to one side. Skipped without one."""

import pytest
import torch

from lora_kernels.verify import numerics
from lora_kernels.verify.problems import make_problem, run_problem

UNIT = 2.0**-11  # half a unit in the last place of TF32
SHAPES = [(4096, 4096, 4096, 16), (777, 1001, 333, 17), (512, 1024, 1024, 16)]


def bias(t, truth):
    """The mean error along the truth, relative to it: below 0 where results are too small."""
    return (((t.double() - truth) * truth).sum() / truth.square().sum()).item()


def spread(t, truth):
    return numerics.rms(t.double() - truth) / numerics.rms(truth)


def dropped(t):
    """What tensor cores make of an fp32 operand that they take as it is: without the 13 bits that TF32 has not."""
    return (t.view(torch.int32) & -(1 << 13)).view(torch.float32)


def test_the_limits_are_those_of_dropped_bits():
    """Of two factors some 0.7 of a unit each; of ds, s and what comes of them as much once more."""
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(shape, generator=generator) for shape in ((256, 512), (512, 256), (256, 256)))
    truth, once = x.double() @ w.double(), dropped(x).double() @ dropped(w).double()
    twice = dropped(once.float()).double() @ dropped(b).double()
    assert bias(once, truth) / UNIT == pytest.approx(-1.4, abs=0.1)
    assert bias(twice, truth @ b.double()) / UNIT == pytest.approx(-2.8, abs=0.2)
    assert spread(once, truth) < 2.1 * UNIT
    assert spread(twice, truth @ b.double()) < 3.2 * UNIT


@pytest.fixture
def allowed():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.gpu
@pytest.mark.usefixtures("allowed")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_in_tf32(shape, record_property):
    rows, k, n, r = shape
    problem = make_problem((rows,), k, n, r, torch.float32, "cuda")
    truth, eager = numerics.exact(problem), numerics.eager(problem)
    for name, t in run_problem(problem, "triton", 5).items():
        found = [f"{of(other, truth[name]) / UNIT:+.2f}" for other in (t, eager[name]) for of in (bias, spread)]
        record_property(name, "in units: bias {}, rms error {}; of PyTorch bias {}, rms error {}".format(*found))
        print(name, *found)
        assert abs(bias(t, truth[name])) < 3.2 * UNIT
        assert spread(t, truth[name]) < 4 * UNIT
