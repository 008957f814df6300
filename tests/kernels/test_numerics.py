"""O2 to O5 and O10: rules 1 to 3 against float64, roundings counted, sums that cancel, the mask."""

import math
import sys

import numpy as np
import pytest
import torch
from layout_samples import LAYOUTS
from oracles import philox

from lora_kernels import dropout, reference
from lora_kernels.kernels import matmul_expand, shrink, wgrad
from lora_kernels.kernels._configs import ShrinkConfig
from lora_kernels.verify import numerics
from lora_kernels.verify.problems import make_problem, run_problem, with_mask

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def assert_accurate(problem, seed=11):
    problem = with_mask(problem, "triton", seed)
    findings = numerics.check(run_problem(problem, "triton", seed), problem, numerics.eager(problem))
    assert {f.name for f in findings} >= {"y", "dx", "d_lora_A", "d_lora_B"}
    assert all(f.ok for f in findings), [f.message for f in findings if not f.ok]
    return findings


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [((3, 17), 37, 53, 3), ((70,), 64, 80, 24), ((5, 2, 3), 130, 20, 70)], ids=str)
def test_rules_1_and_2(sizes, dtype, p, device):
    assert_accurate(make_problem(*sizes, dtype, device, bias=True, dropout_p=p))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fp32_adapters_over_a_16_bit_base(dtype, p, device):
    problem = make_problem((40,), 48, 56, 5, dtype, device, adapter_dtype=torch.float32, dropout_p=p)
    findings = {f.name: f for f in assert_accurate(problem)}
    assert findings["d_lora_A"].rule_1 > 0  # held to fp32's rounding, by dtype


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, device):
    dtype = torch.float16 if "x" in layout else torch.float32
    problem = make_problem((29,), 40, 36, 6, dtype, device, bias=True, dropout_p=0.3)
    assert_accurate(LAYOUTS[layout](problem))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rule_3_pooled_over_many_problems(dtype, device):
    """Errors pooled over random problems: no worse than eager's, and better where a rounding is saved."""
    generator = np.random.default_rng(5)
    ours, eagers = {}, {}
    for seed in range(35):  # times three dtypes
        rows, k, n = (int(v) for v in generator.integers(8, 48, 3))
        problem = make_problem((rows,), k, n, int(generator.integers(1, 20)), dtype, device, scaling=1.5, seed=seed)
        truth, base = numerics.exact(problem), numerics.eager(problem)
        for name, value in run_problem(problem, "triton", 0).items():
            scale = numerics.rms(truth[name])
            ours.setdefault(name, []).append(numerics.rms(value.double() - truth[name]) / scale)
            eagers.setdefault(name, []).append(numerics.rms(base[name].double() - truth[name]) / scale)
    for name in ours:
        ratio = math.hypot(*ours[name]) / math.hypot(*eagers[name])
        limit = 0.90 if dtype != torch.float32 and name in ("y", "dx") else 1.10
        assert ratio <= limit, f"{name}: pooled rms error is {ratio:.3f} of eager's, {limit} allowed"


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_each_value_is_rounded_once(dtype, p, device):
    """O4: round s, ds and the outputs once, everything else in float64; the kernels differ in a few ties at most."""
    problem = with_mask(make_problem((60,), 64, 72, 5, dtype, device, dropout_p=p), "triton", 3)
    x, w, a, b, dy = (getattr(problem, n).double() for n in ("x", "weight", "lora_A", "lora_B", "dy"))
    keep = 1.0 if problem.keep is None else problem.keep.double()
    alpha = problem.scaling * dropout.keep_scale(p)
    s, ds = ((alpha * t).to(dtype).double() for t in ((x * keep) @ a.T, dy @ b))
    emulated = {
        "y": x @ w.T + s @ b.T,
        "dx": dy @ w + keep * (ds @ a),
        "d_lora_A": ds.T @ (x * keep),
        "d_lora_B": dy.T @ s,
    }
    for name, value in run_problem(problem, "triton", 3).items():
        differ = (value != emulated[name].to(dtype)).double().mean().item()
        assert differ <= (0.05 if dtype == torch.float16 else 0.01), f"{name}: {differ:.1%} rounded otherwise"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_that_cancel_keep_fp32(dtype, device):
    """O10: partial sums are odd and beyond 2^11, the sum is small: a 16-bit accumulator loses it."""
    big = torch.tensor([64.0] * 64 + [1.0] + [-64.0] * 64, dtype=dtype, device=device)  # Σ big·64 = 64
    ones = torch.full((20, big.numel()), 64.0, dtype=dtype, device=device)
    y = matmul_expand([(big.expand(20, -1), ones)])
    assert torch.equal(y, torch.full_like(y, 64.0))
    s, _ = shrink(big.expand(20, -1), ones[:3], 0.5)
    assert torch.equal(s, torch.full_like(s, 32.0))
    g = wgrad(big[:, None].expand(-1, 20), ones[:3].t(), torch.float32)
    assert torch.equal(g, torch.full_like(g, 64.0))


KNOWN_ANSWERS = [  # Random123, kat_vectors: philox4x32 10
    ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0xA4093822, 0x299F31D0), (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("key", "counter", "expected"), KNOWN_ANSWERS)
def test_the_oracle_gives_the_published_answers(key, counter, expected):
    words = philox.philox4x32(key, tuple(np.array([word]) for word in counter))
    assert tuple(int(word[0]) for word in words) == expected


MORE_SEEDS = [pytest.param(seed, marks=pytest.mark.slow) for seed in (0, 2**31, 2**62 + 12345)]


@pytest.mark.parametrize("seed", [1, 2**32 + 5, 2**63 - 1, *MORE_SEEDS])
def test_the_mask_is_the_published_rule(seed, device, monkeypatch):
    """Kernel, reference and numpy draw the same bits, for seeds beyond 32 bits and whatever the tile."""
    rows, cols, p = 21, 83, 0.3
    expected = philox.keep_mask(seed, rows, cols, p)
    assert torch.equal(reference.keep_mask(seed, rows, cols, p), expected)
    x, a = torch.ones(rows, cols, device=device), torch.ones(4, cols, device=device)
    launcher = sys.modules["lora_kernels.kernels.shrink"]  # the package's attribute of that name is the function
    monkeypatch.setattr(launcher, "draw_seed", lambda device, count: torch.tensor([seed], device=device))
    for config in (ShrinkConfig(16, 16, 16, 16, 4, 2), ShrinkConfig(32, 128, 16, 4096, 4, 2)):
        s, packed = shrink(x, a, 1.0, p, config=config)
        assert torch.equal(philox.unpacked(packed.cpu(), cols), expected)
        assert torch.equal(s.cpu()[:, 0], expected.sum(1).float())


def test_counters_beyond_32_bits():
    first = 2**32 - 3
    ours = torch.stack(reference.philox4x32(9, torch.arange(first, first + 8)), -1)
    j = np.arange(8, dtype=np.uint64) + np.uint64(first)
    zero = np.zeros_like(j)
    theirs = philox.philox4x32((9, 0), (j & np.uint64(0xFFFFFFFF), j >> np.uint64(32), zero, zero))
    assert np.array_equal(ours.numpy().astype(np.uint64), np.stack(theirs, -1))


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_keep_rate_and_scale(p):
    n = 400_000
    kept = reference.keep_mask(123, 400, 1000, p).double().sum().item()
    probability = 1 - dropout.threshold(p) / 65536
    assert abs(kept - n * probability) < 5 * math.sqrt(n * probability * (1 - probability))
    assert dropout.keep_scale(p) * probability == pytest.approx(1, abs=1e-15)
    assert abs(probability - (1 - p)) <= 2**-17


def test_neighbours_are_independent():
    keep = reference.keep_mask(5, 500, 800, 0.5).double() - 0.5
    for shifted in (keep[:, 1:] * keep[:, :-1], keep[1:] * keep[:-1], keep[:, 8:] * keep[:, :-8]):
        assert abs(shifted.mean().item()) < 5 * 0.25 / math.sqrt(shifted.numel())
