"""O1 for rows: several adapters, outputs and masked products in one launch, in every kind of tile and split, exactly."""

import functools

import pytest
import torch
from oracles import philox

from lora_kernels.kernels import matmul_expand_all, shrink_all, wgrad_all
from lora_kernels.kernels._configs import MatmulConfig, ShrinkConfig
from lora_kernels.kernels._wgrad_config import WgradConfig

TILES = [
    MatmulConfig(16, 16, 16, 1, 1, 4, 2),
    MatmulConfig(32, 64, 16, 2, 2, 4, 2),
    MatmulConfig(16, 64, 32, 8, 4, 4, 2),
]


@pytest.fixture
def draw(device):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, dtype=torch.float32):
        return torch.randint(-1, 2, shape, generator=generator).to(device, dtype)

    return draw


def mask(rows, cols, device, seed=0):
    """A mask as booleans, and packed."""
    keep = torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) < 0.5
    return keep.to(device), philox.packed(keep).to(device)


@pytest.mark.parametrize("tma", [pytest.param(False, marks=pytest.mark.slow), True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_outputs_side_by_side(tile, tma, path_dtype, draw):
    draw = functools.partial(draw, dtype=path_dtype)
    x, s, bias = draw(50, 40), draw(50, 20), draw(8, 2)[:, 0]
    ws, bs = [draw(n, 40) for n in (72, 8, 100, 4)], [draw(n, 20) for n in (72, 8, 100, 4)]
    outputs = [
        ([(x, ws[0]), (s, bs[0])], None), ([(x, ws[1])], bias), ([(x, ws[2]), (s[:, 3:], bs[2][:, 3:])], None),
        ([(x, ws[3]), (s, bs[3]), (s, bs[3])], None),
    ]  # fmt: skip
    ys = matmul_expand_all(outputs, config=tile, tma=tma)
    for y, (sources, added) in zip(ys, outputs, strict=True):
        expected = sum(p.float() @ q.float().T for p, q in sources)
        assert y.is_contiguous()
        assert y.dtype == path_dtype
        assert torch.equal(y.float(), expected if added is None else expected + added)


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("summed", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_several_masked_products(summed, tile, tma, path_dtype, draw, device):
    draw = functools.partial(draw, dtype=path_dtype)
    sources = [(draw(50, k), draw(72, k)) for k in (24, 33)[:summed]]
    masks = [mask(50, 72, device, seed) for seed in range(3)]
    masked = [(draw(50, k), draw(k, 72).t(), packed) for k, (_, packed) in zip((5, 40, 16), masks, strict=True)]
    (y,) = matmul_expand_all([(sources, None)], masked, wide=summed, config=tile, tma=tma)
    expected = sum(p.float() @ q.float().T for p, q in sources)
    expected += sum((p.float() @ q.float().T) * keep for (p, q, _), (keep, _) in zip(masked, masks, strict=True))
    assert torch.equal(y.float(), expected)


@pytest.mark.parametrize("k_per_split", [pytest.param(16, marks=pytest.mark.slow), 32, 96])
@pytest.mark.parametrize("ps", [(0.0, 0.0), (0.5, 0.0, 0.25)], ids=str)
def test_shrinks_of_one_read(k_per_split, ps, draw, device):
    x, ranks = draw(37, 70), (5, 20, 16)[: len(ps)]
    rows = [(draw(rank, 70), 2.0 + i, p) for i, (rank, p) in enumerate(zip(ranks, ps, strict=True))]
    torch.manual_seed(0)
    s, keeps = shrink_all(x, rows, ShrinkConfig(16, 16, 16, k_per_split, 4, 2))
    assert len({t.untyped_storage().data_ptr() for t in s}) == 1  # side by side
    assert all(t.data_ptr() % 16 == 0 and t.stride(0) % 4 == 0 for t in s)
    kept = [0]
    for (a, alpha, p), t, keep in zip(rows, s, keeps, strict=True):
        assert (keep is None) == (p == 0)
        bits = 1
        if keep is not None:
            bits = philox.unpacked(keep, 70)
            kept.append(bits.float().mean().item())
            assert abs(kept[-1] - (1 - p)) < 0.05
        assert torch.equal(t, alpha * (x * bits) @ a.T)
    assert len(set(kept)) == len(kept), "two adapters, one mask"


@pytest.mark.parametrize("rows_per_split", [pytest.param(16, marks=pytest.mark.slow), 48, 96])
@pytest.mark.parametrize("masks", [0, 2])
def test_wgrads_of_one_read(rows_per_split, masks, draw, device):
    x, lefts = draw(75, 70), [draw(75, rank) for rank in (5, 20, 16)]
    keeps = [mask(75, 70, device, seed) if seed < masks else (1, None) for seed in range(3)]
    dtypes = [torch.float32, torch.float16, torch.float32]
    rows = [(left, dtype, packed) for left, dtype, (_, packed) in zip(lefts, dtypes, keeps, strict=True)]
    gs = wgrad_all(rows, x, config=WgradConfig(16, 32, 16, rows_per_split, 4, 2))
    for g, left, dtype, (keep, _) in zip(gs, lefts, dtypes, keeps, strict=True):
        assert g.dtype == dtype
        assert torch.equal(g.float(), left.T @ (x * keep))
