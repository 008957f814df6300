"""The contractions of groups of rows: maps of tiles, exact integers, and an order of sums that only a group decides."""

import sys

import pytest
import torch
from samples.exact_groups import COUNTS, Groups, tiles

from lora_kernels.kernels import _launch, matmul_expand_all, segments, shrink_all, shrink_wgrad, wgrad, wgrad_all
from lora_kernels.kernels._configs import matmul_configs
from lora_kernels.kernels._wgrad_config import WgradConfig
from lora_kernels.kernels.segments import place

F32, BF16 = torch.float32, torch.bfloat16
FACTOR = 2


def assert_exact(actual: torch.Tensor, truth: torch.Tensor, name: str) -> None:
    assert truth.abs().max() <= 256 if truth.numel() else True, f"{name} is not exact in bf16: a bad case"
    assert torch.equal(actual.double().cpu(), truth.double()), name


def forward(groups: Groups, seg, tma=None, config=None):
    t = groups.tensors
    (s,), _ = shrink_all(t["x"], [(t["lora_A"], float(FACTOR), 0.0)], segments=seg)
    sources = [(t["x"], t["weight"]), (s, t["lora_B"])]
    return s, *matmul_expand_all([(sources, t["bias"])], tma=tma, config=config, segments=seg)


def backward(groups: Groups, seg, s, tma=None):
    t, dtype = groups.tensors, groups.tensors["x"].dtype
    ds, d_lora_B = shrink_wgrad(t["dy"], s, t["lora_B"], float(FACTOR), dtype, segments=seg)
    sources = [(t["dy"], t["weight"].mT), (ds, t["lora_A"].mT)]
    (dx,) = matmul_expand_all([(sources, None)], tma=tma, segments=seg)
    (d_lora_A,) = wgrad_all([(ds, dtype, None)], t["x"], segments=seg)
    return ds, dx, d_lora_A, d_lora_B


@pytest.mark.parametrize("kind", COUNTS)
def test_maps_of_tiles(kind, device):
    counts, tail = COUNTS[kind]
    rows, offsets = sum(counts) + tail, torch.tensor([0, *counts]).cumsum(0)
    for dtype in (torch.int32, torch.int64):
        table = segments(offsets.to(device, dtype), rows).table.cpu()
        assert table[: len(counts) + 1].tolist() == offsets.tolist()
        for block in (16, 32, 64, 128, 256):
            start, entries = place(rows, len(counts), block)
            found = table[start : start + 3 * entries].view(3, entries).T.tolist()
            assert list(map(tuple, found)) == tiles(counts, tail, block)
            of_rows = sum(-(-n // block) for n in (*counts, tail))
            assert int(table[start + 3 * entries]) == of_rows


def test_no_offset_leads_outside_of_a_tensor(device):
    offsets = torch.tensor([-5, 3, 2, 900, 40], device=device)
    table = segments(offsets, 20).table.cpu()
    assert table[:5].tolist() == [0, 3, 2, 20, 20]
    start, entries = place(20, 4, 16)
    _, firsts, ends = table[start : start + 3 * entries].view(3, entries)
    assert firsts.min() >= 0
    assert ends.max() <= 20


# fp16 as bf16
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("kind", COUNTS)
def test_layer_of_groups(kind, dtype, device):
    groups = Groups.draw(*COUNTS[kind], 48, 40, 5, dtype, device, FACTOR)
    seg = segments(groups.offsets, groups.rows)
    s, y = forward(groups, seg)
    ds, dx, d_lora_A, d_lora_B = backward(groups, seg, s)
    last, truth = int(groups.offsets[-1]), groups.truth
    for name, actual in dict(s=s[:last], ds=ds[:last], y=y, dx=dx, d_lora_A=d_lora_A, d_lora_B=d_lora_B).items():
        assert_exact(actual, truth[name], name)
    assert_exact(wgrad(groups.tensors["dy"], groups.tensors["x"], dtype, segments=seg), truth["dweight"], "dweight")


@pytest.mark.parametrize("transposed", [False, True], ids=["as out x in", "as in x out"])
@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("r", [3, 16, 40])
def test_both_paths_and_layouts(r, tma, transposed, path_dtype, device):
    counts, tail = COUNTS["uneven"]
    groups = Groups.draw(
        counts, tail, 64, 80, r, path_dtype, device, FACTOR, transposed=transposed, expert_minor=True, seed=3
    )
    seg = segments(groups.offsets, groups.rows)
    s, y = forward(groups, seg, tma)
    _, dx, d_lora_A, d_lora_B = backward(groups, seg, s, tma)
    for name, actual in dict(y=y, dx=dx, d_lora_A=d_lora_A, d_lora_B=d_lora_B).items():
        assert_exact(actual, groups.truth[name], name)


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
def test_every_tile(tma, path_dtype, device):
    groups = Groups.draw([130, 0, 7], 3, 72, 264, 8, path_dtype, device, FACTOR, seed=5)
    seg = segments(groups.offsets, groups.rows)
    for config in matmul_configs(path_dtype, tma, False, grouped=True):
        _, y = forward(groups, seg, tma, config)
        assert_exact(y, groups.truth["y"], str(config))


def test_several_adapters_share_a_read_of_x(device):
    counts, tail = COUNTS["uneven"]
    one, two = (Groups.draw(counts, tail, 48, 40, r, F32, device, FACTOR, seed=2) for r in (4, 7))
    seg, t = segments(one.offsets, one.rows), one.tensors
    rows = [(g.tensors["lora_A"], float(FACTOR), 0.0) for g in (one, two)]
    ss, _ = shrink_all(t["x"], rows, segments=seg)
    sources = [(t["x"], t["weight"]), *((s, g.tensors["lora_B"]) for s, g in zip(ss, (one, two), strict=True))]
    (y,) = matmul_expand_all([(sources, None)], segments=seg)
    last = int(one.offsets[-1])
    for group in range(len(counts)):
        here = slice(int(one.offsets[group]), int(one.offsets[group + 1]))
        want = t["x"][here].double() @ t["weight"][group].double().T
        for g in (one, two):
            A, B = (g.tensors[name][group].double() for name in ("lora_A", "lora_B"))
            want += FACTOR * t["x"][here].double() @ A.T @ B.T
        assert torch.equal(y[here].double(), want)
    assert not y[last:].any()


def test_sums_of_one_two_and_more_parts(device):
    groups = Groups.draw([20, 40, 100, 0, 64], 5, 40, 48, 6, F32, device, FACTOR)
    t, seg = groups.tensors, segments(groups.offsets, groups.rows)
    dweight = wgrad(t["dy"], t["x"], F32, config=WgradConfig(16, 32, 16, 32, 4, 2), segments=seg)
    assert_exact(dweight, groups.truth["dweight"], "dweight")


def test_a_gradient_of_a_group_depends_on_its_rows_alone(device):
    generator = torch.Generator().manual_seed(0)
    rows, k, r, mine = 400, 40, 6, 150
    x, ds = (torch.randn(mine, width, generator=generator).to(device) for width in (k, r))
    config = WgradConfig(16, 32, 16, 32, 4, 2)
    results = []
    for before in (0, 17, 250):
        counts = [before, mine, rows - mine - before]
        whole, thin = (torch.randn(rows, width, generator=generator).to(device) for width in (k, r))
        whole[before : before + mine], thin[before : before + mine] = x, ds
        seg = segments(torch.tensor([0, *counts], device=device).cumsum(0), rows)
        results.append(wgrad(thin, whole, F32, config=config, segments=seg)[1])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_the_same_bits_whatever_the_number_of_programs(device, monkeypatch):
    counts, tail = COUNTS["around a tile"]
    generator, shapes = torch.Generator().manual_seed(0), dict(k=72, n=88, r=5)
    groups = Groups.draw(counts, tail, *shapes.values(), F32, device, FACTOR)
    for name, t in groups.tensors.items():
        groups.tensors[name] = torch.randn(t.shape, generator=generator).to(device)
    found = []
    for sms in (1, 3, 50):
        monkeypatch.setattr(_launch, "num_sms", lambda device, sms=sms: sms)
        for contraction in ("shrink", "matmul_expand", "wgrad"):
            sys.modules[f"lora_kernels.kernels.{contraction}"]._settle.cache_clear()
        seg = segments(groups.offsets, groups.rows)
        s, y = forward(groups, seg)
        last = int(groups.offsets[-1])
        ds, *rest = backward(groups, seg, s)
        found.append([s[:last], y, ds[:last], *rest])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
