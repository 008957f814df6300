"""The launches of groups of rows move what `cost.grouped` says, counted load by load in the interpreter.

Beyond that they read of the map of tiles at most what was written of it, and set a few counters back to 0.
"""

import pytest
import torch

from lora_kernels import lora_grouped_linear
from lora_kernels.bench.cost import grouped as grouped_cost

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter, which a GPU bypasses")


def launches_of(sizes, k, n, r, dtype, log):
    """Run forward and backward; return the two maps' bytes, and the bytes of every other launch."""
    m, groups = sum(sizes), len(sizes)
    x, weight, lora_A, lora_B = (
        torch.ones(s, dtype=dtype) for s in ((m, k), (groups, n, k), (groups, r, k), (groups, n, r))
    )
    for t in (x, lora_A, lora_B):
        t.requires_grad_()
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    y = lora_grouped_linear(x, weight, lora_A, lora_B, offsets, scaling=2.0, backend="triton")
    y.backward(torch.ones_like(y))
    maps = [launch.moved["stored"] for launch in log if launch.kernel == "_segments_kernel"]
    counted = [launch for launch in log if launch.kernel != "_segments_kernel"]
    assert [launch.kernel for launch in counted] == [
        "_shrink_kernel", "_matmul_expand_kernel", "_wgrad_kernel", "_matmul_expand_kernel", "_wgrad_kernel"
    ]  # fmt: skip
    return maps, [launch.moved["touched"] + launch.moved["stored"] for launch in counted]


def said_of(sizes, k, n, r, dtype):
    """Return what the formula says, in the order of the launches."""
    z = grouped_cost.GroupSize(sum(sizes), k, n, r, dtype.itemsize, dtype.itemsize, len(sizes))
    cost = grouped_cost.COSTS["ours"](z, False)
    (shrunk, y), (ds_and_dB, dx, dA) = cost.forward, cost.backward
    return z, [shrunk, y, ds_and_dB, dx, dA]


@pytest.mark.parametrize(
    ("sizes", "k", "n", "r", "dtype"),
    [
        ((16, 13, 19), 72, 40, 16, torch.float32), ((1, 33), 40, 24, 5, torch.float16), ((20,), 24, 56, 8, torch.float32),
        ((7, 1, 2, 30), 24, 24, 32, torch.float16),
    ],
)  # fmt: skip
def test_groups_move_what_their_formula_says(sizes, k, n, r, dtype, log):
    (forward, backward), counted = launches_of(sizes, k, n, r, dtype, log)
    _, said = said_of(sizes, k, n, r, dtype)
    for which, (found, expected) in enumerate(zip(counted, said, strict=True)):
        assert 0 <= found - expected <= (forward if which < 2 else backward), which


def test_the_large_products_of_a_group_without_rows_read_nothing(log):
    sizes, k, n, r = (16, 0, 13), 72, 40, 16
    (forward, backward), counted = launches_of(sizes, k, n, r, torch.float32, log)
    z, said = said_of(sizes, k, n, r, torch.float32)
    a, b, w = z.a // 3, z.b // 3, z.w // 3
    # the thin products read their A_e or B_e all the same
    for which, (found, expected, less) in enumerate(zip(counted, said, (0, w + b, 0, w + a, 0), strict=True)):
        assert 0 <= found - (expected - less) <= (forward if which < 2 else backward), which
