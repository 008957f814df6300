"""O1: exact-integer inputs, so that the kernels must agree with int64 arithmetic bit for bit."""

import pytest
import torch
from oracles import exact, philox

from lora_kernels import dropout, lora_linear
from lora_kernels.kernels import matmul_expand, shrink, shrink_wgrad, wgrad
from lora_kernels.kernels._configs import MatmulConfig, ShrinkConfig
from lora_kernels.kernels._wgrad_config import WgradConfig

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SHAPES = [  # M, K, N, r: ones, primes, a tile and one more or less, ranks that are no power of two
    (1, 1, 1, 1),
    (1, 17, 33, 2),
    (15, 16, 17, 3),
    (31, 33, 32, 5),
    (33, 31, 33, 8),
    (64, 65, 63, 12),
    (37, 129, 41, 17),
    (20, 48, 70, 33),
]


def case_with_mask(shape, p, seed=7):
    """A case whose mask is what the kernels draw after `torch.manual_seed(seed)`."""
    rows, k, n, r = shape
    keep = None
    if p:
        torch.manual_seed(seed)
        keep = philox.keep_mask(int(dropout.draw_seed("cpu")), rows, k, p)
    case = exact.draw(rows, k, n, r, factor=round(2 / (1 - p)), keep=keep)
    return case


def assert_exact(actual, truth):
    for name, value in truth.items():
        if name in actual:
            assert value.abs().max() <= 256 if value.numel() else True, f"{name} is not exact in bf16: a bad case"
            assert torch.equal(actual[name].double().cpu(), value.double()), name


# each dtype with and without dropout, each p; the other four pairs add time and no new code path
PAIRS = [(F32, 0.0), (F32, 0.75), (F16, 0.0), (F16, 0.5), (BF16, 0.0), (BF16, 0.5)]


@pytest.mark.parametrize(("dtype", "p"), PAIRS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer(shape, dtype, p, device):
    if device == "cuda" and p:
        torch.cuda.manual_seed(7)
        seed = int(dropout.draw_seed(device))
        case = exact.draw(*shape, factor=round(2 / (1 - p)), keep=philox.keep_mask(seed, shape[0], shape[1], p))
    else:
        case = case_with_mask(shape, p)
    names = ("x", "weight", "lora_A", "lora_B", "bias")
    t = {name: getattr(case, name).to(device, dtype) for name in names}
    for name in ("x", "lora_A", "lora_B", "bias"):
        t[name].requires_grad_()
    torch.manual_seed(7)
    y = lora_linear(
        t["x"], t["weight"], t["lora_A"], t["lora_B"], scaling=2.0, bias=t["bias"], dropout_p=p, backend="triton"
    )
    y.backward(case.dy.to(device, dtype))
    gradients = {"dx": t["x"], "d_lora_A": t["lora_A"], "d_lora_B": t["lora_B"], "dbias": t["bias"]}
    assert_exact({"y": y.detach()} | {name: leaf.grad for name, leaf in gradients.items()}, case.truth())


TILES = [
    MatmulConfig(16, 16, 16, 1, 1, 4, 2),
    MatmulConfig(32, 64, 16, 2, 2, 4, 2),
    MatmulConfig(16, 64, 32, 8, 4, 4, 2),
    MatmulConfig(64, 32, 64, 3, 2, 4, 2, 2),
]


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_matmul_expand_in_every_tile(dtype, tile, tma, device):
    if device == "cuda" and tma and (torch.cuda.get_device_capability() < (9, 0) or dtype == torch.float32):
        pytest.skip("descriptors need sm_90 and 16-bit operands; bf16 runs there, and pointers everywhere")
    case = exact.draw(50, 40, 72, 5)
    t = {name: getattr(case, name).to(device, dtype) for name in ("x", "weight", "lora_A", "lora_B", "dy", "bias")}
    s, _ = shrink(t["x"], t["lora_A"], 1.0)
    ds, _ = shrink(t["dy"], t["lora_B"].t(), 1.0)
    y = matmul_expand([(t["x"], t["weight"]), (s, t["lora_B"])], t["bias"], config=tile, tma=tma)
    dx = matmul_expand([(t["dy"], t["weight"].t()), (ds, t["lora_A"].t())], config=tile, tma=tma)
    assert_exact({"y": y, "dx": dx}, case.truth())


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_masked_product_in_every_tile(tile, tma, path_dtype, device):
    generator = torch.Generator().manual_seed(0)
    p1, q1, p2, q2 = (torch.randint(-1, 2, s, generator=generator) for s in ((50, 24), (72, 24), (50, 40), (72, 40)))
    keep = torch.rand(50, 72, generator=generator) < 0.5
    packed = philox.packed(keep).to(device)
    f = [t.to(device, path_dtype) for t in (p1, q1, p2, q2)]
    y = matmul_expand([(f[0], f[1]), (f[2], f[3])], keep=packed, config=tile, tma=tma)
    assert torch.equal(y.cpu().long(), p1 @ q1.T + (p2 @ q2.T) * keep)


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
def test_any_number_of_sources(tma, path_dtype, device):
    generator = torch.Generator().manual_seed(0)
    inner = (40, 8, 64, 4)
    pairs = [
        tuple(torch.randint(-1, 2, (size, k), generator=generator).to(device, path_dtype) for size in (33, 20))
        for k in inner
    ]
    for count in (1, 2, 3, 4):
        y = matmul_expand(pairs[:count], config=MatmulConfig(16, 32, 32, 2, 1, 4, 2), tma=tma)
        expected = sum(p.float() @ q.float().T for p, q in pairs[:count])
        assert torch.equal(y.float(), expected), f"{count} sources"


@pytest.mark.parametrize("config", [ShrinkConfig(16, 16, 16, 32, 4, 2), ShrinkConfig(32, 64, 32, 128, 4, 2)], ids=str)
@pytest.mark.parametrize("r", [1, 16, 40])
def test_shrink_in_every_tile(config, r, device):
    case = exact.draw(45, 70, 9, r)
    torch.manual_seed(3)
    keep = philox.keep_mask(int(dropout.draw_seed(device)), 45, 70, 0.5)
    torch.manual_seed(3)
    s, packed = shrink(case.x.float().to(device), case.lora_A.float().to(device), 4.0, 0.5, config=config)
    assert torch.equal(s.cpu().long(), 4 * (case.x * keep) @ case.lora_A.T)
    assert torch.equal(philox.unpacked(packed.cpu(), 70), keep)


@pytest.mark.parametrize("rows_per_split", [16, 48, 96])
@pytest.mark.parametrize(("left", "right", "masked"), [(5, 40, True), (40, 5, False), (40, 5, True), (24, 24, True)])
def test_wgrad_split_anyhow(rows_per_split, left, right, masked, device):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-1, 2, (75, size), generator=generator) for size in (left, right))
    keep = torch.rand(75, right, generator=generator) < 0.5
    packed = philox.packed(keep).to(device)
    config = WgradConfig(16, 32, 16, rows_per_split, 4, 2)
    g = wgrad(a.float().to(device), b.float().to(device), torch.float32, packed if masked else None, config=config)
    assert torch.equal(g.cpu().long(), a.T @ (b * keep if masked else b))


@pytest.mark.parametrize("rows_per_split", [16, *(pytest.param(rows, marks=pytest.mark.slow) for rows in (48, 96))])
@pytest.mark.parametrize(("width", "r"), [(40, 5), (5, 16), (129, 1), (64, 17)])
def test_shrink_and_wgrad_from_one_read(rows_per_split, width, r, device):
    generator = torch.Generator().manual_seed(0)
    dy, s, b = (torch.randint(-1, 2, size, generator=generator) for size in ((75, width), (75, r), (width, r)))
    ds = torch.full((75, r + 3), torch.nan, device=device)[:, :r]
    config = WgradConfig(16, 32, 16 if r <= 16 else 32, rows_per_split, 4, 2)
    operands = [t.float().to(device) for t in (dy, s, b)]
    assert shrink_wgrad(*operands, 4.0, torch.float32, ds=ds, config=config)[0] is ds
    g = shrink_wgrad(*operands, 4.0, torch.float32, config=config)[1]
    assert torch.equal(g.cpu().long(), dy.T @ s)
    assert torch.equal(ds.cpu().long(), 4 * dy @ b)


@pytest.mark.parametrize("r", [1, 32, 33, 70])
def test_ds_and_dB_together_at_any_rank(r, device):
    generator = torch.Generator().manual_seed(0)
    dy, s, b = (torch.randint(-1, 2, size, generator=generator) for size in ((33, 40), (33, r), (40, r)))
    ds, d_lora_B = shrink_wgrad(*(t.float().to(device) for t in (dy, s, b)), 2.0, torch.float32)
    assert torch.equal(d_lora_B.cpu().long(), dy.T @ s)
    assert torch.equal(ds.cpu().long(), 2 * dy @ b)
