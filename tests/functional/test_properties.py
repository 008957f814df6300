"""Properties over random shapes, layouts, tiles and numbers: integers stay exact, floats stay within rule 1."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracles import exact, philox

from lora_kernels import dropout, lora_linear
from lora_kernels.kernels import matmul_expand, shrink, shrink_wgrad, wgrad
from lora_kernels.kernels._configs import MatmulConfig, ShrinkConfig
from lora_kernels.kernels._wgrad_config import WgradConfig
from lora_kernels.verify import numerics
from lora_kernels.verify.problems import make_problem, run_problem, with_mask

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the same examples everywhere: what is red on one machine is red on all
examples = settings(max_examples=20, deadline=None, derandomize=True, database=None)

dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
sizes = st.one_of(st.integers(1, 40), st.sampled_from([15, 16, 17, 31, 32, 33]))
ranks = st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 33]))
powers = st.sampled_from([16, 32, 64])
layouts = st.sampled_from(["contiguous", "transposed", "sliced", "offset"])
matmul_tiles = st.builds(
    MatmulConfig, st.sampled_from([16, 32]), powers, powers, st.integers(1, 4), st.just(1), st.just(4), st.just(2),
    st.integers(1, 2),
)  # fmt: skip


def laid_out(t, layout):
    """The same values with other strides, NaN wherever the buffer has room to spare."""
    rows, cols = t.shape
    if layout == "transposed":
        return t.t().contiguous().t()
    if layout == "sliced":
        return t.new_full((rows + 2, 2 * cols + 1), float("nan"))[1:-1, 1::2].copy_(t)
    if layout == "offset":
        return t.new_full((t.numel() + 3,), float("nan"))[3:].view(rows, cols).copy_(t)
    return t


def integers(generator, *shape):
    return torch.randint(-1, 2, shape, generator=generator)


@pytest.mark.slow
@examples
@given(
    st.tuples(sizes, sizes, sizes, ranks), dtypes, st.sampled_from([0.0, 0.5, 0.75]), st.sampled_from([-4.0, 1.0, 2.0]),
    st.lists(layouts, min_size=5, max_size=5), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_the_layer_is_exact_for_integers(shape, dtype, p, scaling, strides, seed):
    rows, k, n, r = shape
    torch.manual_seed(seed)
    keep = philox.keep_mask(int(dropout.draw_seed(DEVICE)), rows, k, p) if p else None
    case = exact.draw(rows, k, n, r, factor=round(scaling / (1 - p)), keep=keep, seed=seed)
    truth = case.truth()
    assume(all(value.abs().max() <= 256 for value in truth.values()))  # what bf16 holds exactly
    names = ("x", "weight", "lora_A", "lora_B", "dy")
    x, w, a, b, dy = (
        laid_out(getattr(case, name).to(DEVICE, dtype), how).requires_grad_(name in ("x", "lora_A", "lora_B"))
        for name, how in zip(names, strides, strict=True)
    )
    torch.manual_seed(seed)
    y = lora_linear(
        x, w, a, b, scaling=scaling, bias=case.bias.to(DEVICE, dtype), dropout_p=p, backend="triton"
    )  # fmt: skip
    y.backward(dy)
    actual = {"y": y, "dx": x.grad, "d_lora_A": a.grad, "d_lora_B": b.grad}
    for name, value in actual.items():
        assert torch.equal(value.detach().double().cpu(), truth[name].double()), name


@examples
@given(
    sizes, sizes, st.lists(st.tuples(sizes, layouts, layouts), min_size=1, max_size=4), st.booleans(), st.booleans(),
    st.booleans(), matmul_tiles, st.integers(0, 99),
)  # fmt: skip
def test_matmul_expand_adds_what_it_is_given(rows, cols, inner, masked, biased, tma, tile, seed):
    if DEVICE == "cuda" and tma and torch.cuda.get_device_capability() < (9, 0):
        tma = False
    generator = torch.Generator().manual_seed(seed)
    masked = masked and len(inner) > 1  # a masked product comes on top of another
    dtype = torch.float16  # exact for these integers, and what descriptors take on a GPU
    truth, sources = torch.zeros(rows, cols, dtype=torch.int64), []
    keep = torch.rand(rows, cols, generator=generator) < 0.5
    for i, (k, p_layout, q_layout) in enumerate(inner):
        p, q = integers(generator, rows, k), integers(generator, cols, k)
        truth += p @ q.T * (keep if masked and i == len(inner) - 1 else 1)
        sources.append((laid_out(p.to(DEVICE, dtype), p_layout), laid_out(q.to(DEVICE, dtype), q_layout)))
    bias = integers(generator, cols) if biased else None
    y = matmul_expand(
        sources, None if bias is None else bias.to(DEVICE, dtype), philox.packed(keep).to(DEVICE) if masked else None, tile, tma
    )  # fmt: skip
    assert torch.equal(y.cpu().long(), truth + (0 if bias is None else bias))


@examples
@given(
    sizes, sizes, ranks, layouts, layouts, st.sampled_from([0.0, 0.25, 0.5]), st.integers(0, 2**63 - 1),
    st.builds(ShrinkConfig, powers, powers, powers, st.just(0), st.just(4), st.just(2)), st.integers(1, 4),
)  # fmt: skip
def test_shrink_and_its_mask_do_not_depend_on_the_tile(rows, k, r, x_layout, a_layout, p, seed, tile, steps):
    tile = replace(tile, k_per_split=steps * tile.block_k)
    generator = torch.Generator().manual_seed(seed % 2**32)
    x, a = integers(generator, rows, k), integers(generator, r, k)
    torch.manual_seed(seed)
    whole = philox.keep_mask(int(dropout.draw_seed(DEVICE)), rows, -(-k // 8) * 8, p)  # bytes are drawn whole
    keep = whole[:, :k]
    torch.manual_seed(seed)
    s, bits = shrink(laid_out(x.float().to(DEVICE), x_layout), laid_out(a.float().to(DEVICE), a_layout), 4.0, p, tile)
    assert torch.equal(s.cpu().long(), 4 * (x * keep) @ a.T)
    assert bits is None if p == 0 else torch.equal(bits.cpu(), philox.packed(whole))


@examples
@given(
    sizes, sizes, ranks, layouts, layouts, st.booleans(), st.booleans(), st.integers(0, 99),
    st.builds(WgradConfig, st.just(16), powers, powers, st.sampled_from([16, 32, 48, 64]), st.just(4), st.just(2)),
)  # fmt: skip
def test_wgrad_sums_all_rows_in_any_split(rows, wide, thin, l_layout, r_layout, masked, flip, seed, tile):
    generator = torch.Generator().manual_seed(seed)
    left, right = integers(generator, rows, thin), integers(generator, rows, wide)
    if flip:
        left, right = right, left
    keep = torch.rand(right.shape, generator=generator) < 0.5
    g = wgrad(
        laid_out(left.float().to(DEVICE), l_layout), laid_out(right.float().to(DEVICE), r_layout), torch.float32,
        philox.packed(keep).to(DEVICE) if masked else None, config=tile,
    )  # fmt: skip
    assert torch.equal(g.cpu().long(), left.T @ (right * keep if masked else right))


@pytest.mark.slow
@examples
@given(
    st.tuples(sizes, sizes, sizes, ranks), dtypes, st.floats(0, 0.99), st.floats(-8, 8, width=32), st.booleans(),
    st.integers(0, 2**16),
)  # fmt: skip
def test_floats_stay_within_rule_1(shape, dtype, p, scaling, bias, seed):
    rows, k, n, r = shape
    problem = make_problem((rows,), k, n, r, dtype, DEVICE, bias=bias, scaling=scaling, dropout_p=p, seed=seed)
    problem = with_mask(problem, "triton", seed)
    if dtype == torch.float16:
        scale = abs(problem.scaling) * dropout.keep_scale(p)
        assume(scale < 2000)  # s must fit float16
    findings = numerics.check(run_problem(problem, "triton", seed), problem)
    assert all(f.ok for f in findings), [f.message for f in findings if not f.ok]


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "offset"])
def test_layouts_keep_the_values(layout):
    t = torch.arange(12.0).view(3, 4)
    assert torch.equal(laid_out(t, layout), t)


@examples
@given(
    sizes, sizes, ranks, layouts, layouts, st.integers(0, 99),
    st.builds(WgradConfig, st.just(16), powers, st.just(64), st.sampled_from([16, 32, 48, 64]), st.just(4), st.just(2)),
)  # fmt: skip
def test_shrink_and_wgrad_of_one_read_in_any_split(rows, wide, r, dy_layout, b_layout, seed, tile):
    generator = torch.Generator().manual_seed(seed)
    dy, s, b = integers(generator, rows, wide), integers(generator, rows, r), integers(generator, wide, r)
    ds = torch.full((rows, r), torch.nan, device=DEVICE)
    _, g = shrink_wgrad(
        laid_out(dy.float().to(DEVICE), dy_layout), s.float().to(DEVICE), laid_out(b.float().to(DEVICE), b_layout), 4.0,
        torch.float32, ds=ds, config=tile,
    )  # fmt: skip
    assert torch.equal(g.cpu().long(), dy.T @ s)
    assert torch.equal(ds.cpu().long(), 4 * dy @ b)
