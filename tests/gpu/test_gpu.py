"""What only a GPU shows: real shapes on both load paths, graphs, big tensors, repeatability. Skipped without one."""

import sys

import pytest
import torch
from gpu_shapes import SHAPES
from mlp_samples import assert_accurate as assert_mlp_accurate
from mlp_samples import draw as draw_mlp
from mlp_samples import run as run_mlp
from projection_samples import assert_accurate, draw

from lora_kernels import LoRALinear, lora_linear, lora_projections, lora_qkv, plan
from lora_kernels.activations import ACTIVATIONS
from lora_kernels.kernels import matmul_expand, shrink
from lora_kernels.verify import numerics
from lora_kernels.verify.problems import make_problem, run_problem, with_mask

pytestmark = pytest.mark.gpu


def assert_accurate_layer(shape, dtype, p):
    rows, k, n, r = shape
    problem = make_problem((rows,), k, n, r, dtype, "cuda", bias=True, dropout_p=p)
    problem = with_mask(problem, "triton", 5)
    findings = numerics.check(run_problem(problem, "triton", 5), problem, numerics.eager(problem))
    assert all(f.ok for f in findings), [f.message for f in findings]


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_real_shapes(shape, dtype, p):
    assert_accurate_layer(shape, dtype, p)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_nobody_wrote_is_not_read(shape):
    """Of launches one after the other: what is allocated is filled with NaN."""
    assert_accurate_layer(shape, torch.bfloat16, 0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rank", [3, 8, 40, 128])
@pytest.mark.parametrize("rows", [40, 500, 5000])
def test_descriptors_and_pointers_give_the_same(rows, rank, dtype):
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("descriptors need sm_90")
    generator = torch.Generator("cuda").manual_seed(0)
    x, w, a, b, dy = (
        torch.randn(s, generator=generator, device="cuda", dtype=dtype)
        for s in ((rows, 1024), (768, 1024), (rank, 1024), (768, rank), (rows, 768))
    )
    s, keep = shrink(x, a, 0.1, 0.3)
    ds, _ = shrink(dy, b.t(), 0.1)
    for sources, mask in (
        ([(x, w), (s, b)], None),
        ([(dy, w.t()), (ds, a.t())], keep),
        ([(dy, w.t()), (ds, a.t())], None),
    ):
        by_descriptor = matmul_expand(sources, keep=mask, tma=True)
        by_pointer = matmul_expand(sources, keep=mask, tma=False)
        unit = numerics.unit_roundoff(dtype)
        # one rounding each, of sums that differ in fp32's order of addition
        error = (by_descriptor.double() - by_pointer.double()).abs()
        assert (error <= 2.1 * unit * by_pointer.double().abs() + 1e-2).all()


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("widths", [(4096, 1024, 1024), (1000, 520, 0, 336)], ids=str)
@pytest.mark.parametrize("form", ["fused", "beta1"])
def test_projections_of_real_shapes(form, widths, dtype, p):
    """Queries, keys and values; and four of odd sizes, one of them without an adapter."""
    case = tuple((n or 264, 16 if n else 0, p if n else 0.0) for n in widths)
    with plan.force_form(form):
        assert_accurate(*draw(case, dtype, "cuda", batch=(2048,), k=1032), "triton", split=form != "fused")


@pytest.mark.parametrize("r", [16, 4])  # of rank 4 TMA cannot read the B, so each launch has copies of several
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_queries_keys_and_values_are_projections(dtype, r):
    case = ((1024, r, 0.1), (256, r, 0.1), (256, r, 0.1))
    block, problems = draw(case, dtype, "cuda", batch=(2, 300), k=1024)
    results = []
    with plan.force_form("fused"):
        assert_accurate(block, problems, "triton")
        for call in (lora_qkv, lora_projections):
            torch.manual_seed(1)
            ys = block.together("triton", call)
            results.append([*ys, *torch.autograd.grad(ys, block.leaves(), block.dys)])
    assert all(map(torch.equal, *results))


MLPS = {  # rows, in, hidden, out; ranks
    "a decoder's": dict(batch=(2048,), sizes=(1024, 3584, 1024), ranks=(16, 16, 16)),
    "odd sizes": dict(batch=(3, 259), sizes=(520, 1001, 336), ranks=(8, 24, 17)),
    "large ranks": dict(batch=(1000,), sizes=(512, 1536, 512), ranks=(64, 40, 128)),
    "copies for TMA": dict(batch=(1000,), sizes=(512, 1536, 512), ranks=(4, 12, 4)),
    "decode": dict(batch=(3,), sizes=(1024, 2816, 1024), ranks=(16, 8, 16)),
}


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("mlp", MLPS)
@pytest.mark.parametrize("form", ["fused", "beta1"])
def test_mlps_of_real_shapes(form, mlp, dtype, p):
    problem = draw_mlp(**MLPS[mlp], ps=(p,) * 3, dtype=dtype, device="cuda", biased=True)
    with plan.force_form(form):
        assert_mlp_accurate(problem, "triton", split=form != "fused")


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, gated):
    """And recomputing what backward takes gives the same bits."""
    how = dict(gated=gated, activation=activation, ps=(0.0, 0.0, 0.1), dtype=torch.bfloat16, device="cuda")
    problem = draw_mlp((16, 16, 16), batch=(512,), sizes=(256, 768, 256), **how)
    with plan.force_form("fused"):
        assert_mlp_accurate(problem, "triton")
        kept, made_again = (run_mlp(problem, "triton", recompute) for recompute in (False, True))
    assert all(torch.equal(kept[name], t) for name, t in made_again.items())


@pytest.mark.parametrize("warm_ups", [1, 3], ids=["planned", "by a plan"])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_cuda_graph_of_a_training_step(p, warm_ups):
    plan.forget()
    layer = LoRALinear(4096, 1024, r=16, lora_dropout=p, device="cuda", dtype=torch.bfloat16)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(1024, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compile before capture
        for _ in range(warm_ups):
            layer(x).sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    layer.zero_grad(set_to_none=True)
    x.grad = None
    with torch.cuda.graph(graph):
        y = layer(x)
        y.sum().backward()
    results = []
    for _ in range(3):
        graph.replay()
        results.append((y.clone(), layer.lora_A.grad.clone(), x.grad.clone()))
    same = [all(map(torch.equal, results[0], other)) for other in results[1:]]
    assert all(same) if p == 0 else not any(same), "a replay must draw a new mask, and only with dropout"
    if p == 0:
        assert torch.equal(results[0][0], layer(x)), (
            "a plan that was made before or in a capture must serve the calls after it"
        )


def test_more_than_two_to_the_31_elements():
    rows, k = 2**31 // 1024 + 8, 1024
    x = torch.zeros(rows, k, device="cuda", dtype=torch.bfloat16)
    x[-3:] = torch.randn(3, k, device="cuda", dtype=torch.bfloat16)
    w, a, b = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in ((64, k), (8, k), (64, 8)))
    y = lora_linear(x, w, a, b, backend="triton")
    torch.testing.assert_close(y[-3:], lora_linear(x[-3:].clone(), w, a, b, backend="torch"), rtol=0.05, atol=1.0)
    assert not y[:-3].any()


def test_bitwise_repeatable():
    problem = with_mask(make_problem((2000,), 1024, 1024, 16, torch.bfloat16, "cuda", dropout_p=0.1), "triton", 1)
    first = run_problem(problem, "triton", 1)
    for _ in range(20):
        again = run_problem(problem, "triton", 1)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_new_scaling_seed_or_batch_does_not_recompile():
    kernel = sys.modules["lora_kernels.kernels.shrink"]._shrink_kernel
    a = torch.randn(16, 1024, device="cuda", dtype=torch.bfloat16)
    before = None
    for i, rows in enumerate((2048, 2064, 2080, 2096)):
        shrink(torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16), a, 1.0 + i / 7, 0.1)
        count = sum(len(caches[0]) for caches in kernel.device_caches.values())
        assert before in (None, count)
        before = count


def test_auto_takes_the_kernels():
    assert plan.backend.automatic(torch.device("cuda"), torch.bfloat16).backend == "triton"
    x, w = torch.randn(4, 32, device="cuda"), torch.randn(8, 32, device="cuda")
    assert lora_linear(x, w, torch.randn(2, 32, device="cuda"), torch.randn(8, 2, device="cuda")).shape == (4, 8)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_gpu_than_the_current():
    problem = make_problem((64,), 256, 128, 8, torch.bfloat16, "cuda:1")
    findings = numerics.check(run_problem(problem, "triton", 0), problem)
    assert all(f.ok for f in findings)
