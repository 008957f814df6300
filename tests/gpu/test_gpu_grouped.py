"""Groups of rows on a GPU: the rules at real shapes, graphs whose replays follow new offsets, repeatability."""

import pytest
import torch

from lora_kernels import lora_grouped_linear
from lora_kernels.verify.grouped_problems import check_grouped, make_grouped, run_grouped

pytestmark = pytest.mark.gpu

# Rows of each group, rows of none, in_features, out_features, rank.
SHAPES = {
    "many experts": ([0, 1, 127, 128, 129, 513] * 16, 40, 2048, 1536, 16),
    "few experts": ([2048, 0, 5000, 33], 0, 4096, 2048, 16),
    "one row each": ([1] * 64, 3, 1024, 768, 8),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_by_the_rules_and_repeatable(shape, dtype):
    sizes, beyond, k, n, r = SHAPES[shape]
    problem = make_grouped(sizes, k, n, (r,), dtype, "cuda", beyond=beyond, seed=0, bias=True)
    actual, again = (run_grouped(problem, "triton") for _ in range(2))
    findings = check_grouped(actual, problem)
    assert all(f.ok for f in findings), [f.message for f in findings if not f.ok]
    assert all(torch.equal(actual[name], again[name]) for name in actual)


def test_a_graph_follows_the_offsets():
    """A training step is captured once; its replays compute what plain calls compute for other sizes of the groups."""
    experts, rows, k, n, r = 8, 1024, 512, 768, 16
    like = dict(device="cuda", dtype=torch.bfloat16)
    weight, offsets = torch.randn(experts, n, k, **like), torch.zeros(experts + 1, device="cuda", dtype=torch.int64)
    leaves = [torch.randn(*shape, **like).requires_grad_() for shape in ((rows, k), (experts, r, k), (experts, n, r))]

    def place(seed: int) -> None:
        ids, _ = torch.sort(torch.randint(0, experts + 1, (rows,), generator=torch.Generator().manual_seed(seed)))
        offsets.copy_(torch.searchsorted(ids, torch.arange(experts + 1)))

    def step() -> list[torch.Tensor]:
        x, lora_A, lora_B = leaves
        y = lora_grouped_linear(x, weight, lora_A, lora_B, offsets, scaling=0.5, backend="triton")
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)]

    place(0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # Compile before the capture.
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2, 3):
        place(seed)
        graph.replay()
        assert all(map(torch.equal, captured, step()))


def test_the_host_waits_for_nothing():
    problem = make_grouped([5, 0, 300, 64], 256, 128, (8,), torch.bfloat16, "cuda", beyond=7, seed=0)
    # Compile first.
    run_grouped(problem, "triton")
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_grouped(problem, "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
