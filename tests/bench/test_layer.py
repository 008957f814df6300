"""The benchmark: its arithmetic, its fairness, and that no time is shown for a wrong result."""

import dataclasses
import importlib.util
import math

import pytest
import torch
from bench_samples import CPU, SHAPE, broken, printed, settings
from oracles import philox

from lora_kernels import dropout, torch_backend
from lora_kernels.bench.cases.layer import draw, run_case, saved_bytes
from lora_kernels.bench.cost import layer as layer_cost
from lora_kernels.bench.providers import layer as providers
from lora_kernels.bench.show import tables
from lora_kernels.measure import timing
from lora_kernels.measure.presets import PRESETS, Shape, parse_shape, with_rows
from lora_kernels.verify import judge
from lora_kernels.verify.provider import Provider, Rounding

# --- arithmetic


@pytest.mark.parametrize(
    ("formula", "dropout_", "adapter", "mib", "launches"),
    [
        ("frozen", False, 2, 320.0, 2),
        ("peft", False, 2, 1346.2, 12),
        ("peft", True, 2, 1666.2, 14),
        ("peft", False, 4, 3076.5, 17),
        ("peft", True, 4, 3652.5, 19),
        ("addmm", False, 2, 834.2, 8),
        ("split", False, 2, 514.2, 5),
        ("split", True, 2, 714.5, 8),
        ("triton", False, 2, 514.2, 5),
        ("triton", True, 2, 526.2, 5),
    ],
)
def test_bytes_at_8192_rows_of_4096_squared(formula, dropout_, adapter, mib, launches):
    cost = layer_cost.COSTS[formula](layer_cost.Size(8192, 4096, 4096, 16, 2, adapter), dropout_)
    assert round(cost.total / 2**20, 1) == mib
    assert cost.launches == launches


def test_bytes_of_the_split_minimum_and_of_others():
    size = layer_cost.Size(8192, 4096, 4096, 16)
    assert round(layer_cost.split_minimum(size).total / 2**20, 1) == 514.2
    assert layer_cost.split_minimum(size).launches == 5
    assert layer_cost.unsloth(size).total == 963 * 2**20
    published = [layer_cost.lorafusion(size, dropout_) for dropout_ in (False, True)]
    assert [cost.total / 2**20 for cost in published] == [516.5, 708.5]
    assert [cost.launches for cost in published] == [9, 10]
    wide = layer_cost.Size(8192, 4096, 14336, 16)  # tells in_features from out_features
    assert round(layer_cost.COSTS["peft"](wide, True).total / 2**20) == 3747
    assert round(layer_cost.split_minimum(wide).total / 2**20) == 1155


def test_flops():
    base = sum(layer_cost.flops(8192, 4096, 4096, 0))
    assert base == 4 * 8192 * 4096**2
    assert sum(layer_cost.flops(8192, 4096, 4096, 16)) - base == 6 * 2 * 8192 * 4096 * 16
    assert layer_cost.flops(2, 3, 5, 7) == (2 * 2 * (15 + 7 * 8), 2 * 2 * (15 + 2 * 7 * 8))


def test_presets():
    assert {"llama-8b", "llama-70b", "qwen-32b", "lorafusion"} <= set(PRESETS)
    sweep = PRESETS["lorafusion"]
    assert (sweep.r, sweep.p, len(sweep.shapes)) == ((16,), (0.1,), 75)
    assert {(s.k, s.n) for s in sweep.shapes} == {(d, d) for d in (4096, 5120, 8192)}
    assert sorted({s.m for s in sweep.shapes}) == list(range(2048, 8193, 256))
    assert (8192, 14336, 4096) in {(s.m, s.k, s.n) for s in PRESETS["llama-8b"].shapes}
    assert len(with_rows(sweep.shapes, [2048, 8192])) == 6


def test_the_sweep_for_a_cpu_spans_what_it_claims():
    sweep = PRESETS["cpu-sweep"]
    assert {s.m for s in sweep.shapes} == {32, 512, 4096}
    assert (min(sweep.r), max(sweep.r), sweep.p) == (8, 64, (0.0, 0.1))
    widths = {width for s in sweep.shapes for width in (s.k, s.n)}
    assert (min(widths), max(widths)) == (256, 2048)
    assert any(s.k < s.n for s in sweep.shapes)
    assert any(s.k > s.n for s in sweep.shapes)


def test_a_shape_is_rows_in_out():
    assert parse_shape("8192x4096x1024") == Shape(8192, 4096, 1024)
    for wrong in ("8192x4096", "1x2x3x4", "0x2x3", "axbxc", "-1x2x3", ""):
        with pytest.raises(ValueError, match="ROWSxINxOUT"):
            parse_shape(wrong)


# --- nothing wrong is timed


@pytest.mark.usefixtures("no_peft")
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_provider_is_right_and_timed(dtype, p):
    case = run_case(SHAPE, 4, p, settings(dtype))
    rows = case["providers"]
    half = dtype == torch.bfloat16
    assert set(rows) == {"frozen", "ours", "peft", "addmm"} | ({"ours_fp32", "peft_fp32"} if half else set())
    for row in rows.values():
        assert row["reason"] == ""
        assert row["check"]["ok"]
        assert 0 < row["check"]["worst"] <= 1
        assert set(row["seconds"]) == set(timing.PASSES)
        assert all(taken["median"] > 0 and taken["n"] == 2 for taken in row["seconds"].values())
    assert rows["frozen"]["seconds"]["both"]["to_floor"] == 1
    assert rows["peft"]["label"].startswith("PEFT arithmetic")


BREAKS = {
    "y is off": dict(forward=lambda y, problem: y * 1.001),
    "y has a NaN": dict(forward=lambda y, problem: y + torch.where(torch.arange(40) == 3, math.nan, 0.0)),
    "no adapter": dict(forward=lambda y, problem: y * 0 + problem.x @ problem.weight.T),
    "dx is off": dict(gradients=lambda g: (g[0] * 1.001, *g[1:])),
    "dA is off": dict(gradients=lambda g: (g[0], g[1] * 1.001, g[2])),
    "dB is missing": dict(gradients=lambda g: (*g[:2], torch.zeros_like(g[2]))),
}


@pytest.mark.usefixtures("no_peft")
@pytest.mark.parametrize("rounding", [Rounding.OWN, Rounding.OPERATORS])
@pytest.mark.parametrize("what", BREAKS)
def test_no_time_for_a_wrong_result(what, rounding):
    build, calls = broken(**BREAKS[what])

    def one(name, problem, backend):
        if name != "peft":
            return providers.build(name, problem, backend)
        return dataclasses.replace(build(problem, backend), rounding=rounding)

    case = run_case(SHAPE, 4, 0.0, settings(build=one, only=("frozen", "ours", "peft")))
    row = case["providers"]["peft"]
    assert row["seconds"] == {}
    assert "wrong result, not timed" in row["reason"]
    assert not row["check"]["ok"]
    assert len(calls) == 1  # the check, and never again
    assert case["providers"]["ours"]["seconds"]
    text = printed(tables.case_table(case))
    shown = next(line for line in text.splitlines() if line.strip().startswith("broken "))
    assert not any(character.isdigit() for character in shown)
    assert "broken: wrong result, not timed" in text
    assert tables.speedups([case]).keys() == {"frozen"}


@pytest.mark.usefixtures("no_peft")
@pytest.mark.parametrize("rounding", [Rounding.OWN, Rounding.OPERATORS])
def test_every_wrong_output_of_a_layer_is_named(rounding):
    build, _ = broken(lambda y, problem: 2 * y, lambda gradients: tuple(2 * g for g in gradients))
    provider = dataclasses.replace(build(draw(SHAPE, 4, 0.0, settings()), "torch"), rounding=rounding)
    reason = judge.judge(provider, judge.Truth()).reason
    assert all(f"; {name}" in f"; {reason}" for name in ("y", "dx", "d_lora_A", "d_lora_B"))


@pytest.mark.parametrize(("times", "ok"), [(1.0, True), (1.9, True), (3.5, False)])
def test_peers_may_be_twice_as_far_off_as_pytorch(times, ok):
    problem = draw(SHAPE, 4, 0.0, settings())
    exact, by_pytorch = judge.Truth().of(problem, {})
    actual = {name: exact[name] + times * (by_pytorch[name].double() - exact[name]) for name in exact}
    findings = judge.check_rms(actual, exact, by_pytorch, problem.x.dtype, problem.terms_summed)
    verdict = judge.Verdict.of(findings, judge.BY_RMS)
    assert verdict.ok == ok
    assert (verdict.worst <= 1) == ok


@pytest.mark.usefixtures("no_peft")
def test_a_provider_that_drops_nothing_fails():
    def one(name, problem, backend):
        return dataclasses.replace(
            providers.build(name, dataclasses.replace(problem, dropout_p=0.0), backend), problem=problem
        )

    row = run_case(SHAPE, 4, 0.1, settings(build=one, only=("peft",)))["providers"]["peft"]
    assert row["seconds"] == {}
    assert "keeps a share of 1.0000, 0.9000 expected" in row["reason"]


def test_a_provider_that_cannot_run_says_why():
    def one(name, problem, backend):
        if name == "addmm":
            raise RuntimeError("no compiler\nand more")
        return providers.build(name, problem, backend)

    rows = run_case(SHAPE, 4, 0.0, settings(build=one, only=("frozen", "addmm")))["providers"]
    assert rows["addmm"]["reason"] == "RuntimeError: no compiler"
    assert rows["addmm"]["seconds"] == {}
    assert rows["frozen"]["seconds"]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_the_split_graph_is_right(backend, p):
    shape = Shape(48, 60, 40)  # a mask whose rows are no whole bytes
    provider = providers.build("split", draw(shape, 4, p, settings()), backend)
    verdict = judge.judge(provider, judge.Truth())
    assert verdict.ok, verdict.reason
    assert provider.label == f"split graph [{backend}]"
    assert provider.cost == ("split" if backend == "triton" else "")


def test_the_split_graph_stands_beside_kernels_alone():
    assert "split" in providers.names_for(torch.bfloat16, "triton", compiled=False)
    assert "split" not in providers.names_for(torch.bfloat16, "torch", compiled=False)


def test_a_mask_is_packed_little_end_first():
    keep = torch.rand(5, 70) < 0.5
    assert torch.equal(providers._pack_mask(keep), philox.packed(keep))


def test_the_mask_is_read_off_the_provider():
    problem = draw(SHAPE, 4, 0.3, settings())
    weight = problem.weight.clone()
    provider = providers.build("ours", problem)
    found = judge.find_masks(problem, provider.leaves, lambda dys: judge.run_once(provider, dys, 5)["dx"])
    keep = found.pop("")
    assert found == {}
    torch.manual_seed(5)
    assert torch.equal(keep, torch_backend.draw_mask(problem.x.shape, problem.dropout_p, CPU).bool())
    assert judge.wrong_share(keep, problem.dropout_p) == ""
    assert torch.equal(problem.weight, weight)
    assert problem.dropout_p == dropout.threshold(0.3) / 65536


def test_peft_itself():
    if importlib.util.find_spec("peft") is None:
        pytest.skip("PEFT is not installed")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that PEFT imports
        problem = draw(SHAPE, 4, 0.1, settings(torch.bfloat16))
        provider = providers.build("peft_fp32", problem)
        verdict = judge.judge(provider, judge.Truth())
    assert provider.label == "PEFT fp32"
    assert verdict.ok, verdict.reason
    assert provider.leaves["d_lora_A"].dtype == torch.float32
    # kept beyond x and parameters: x in fp32, its mask or scaled mask, the dropped x, s
    assert saved_bytes(provider) > 48 * 64 * 4


# --- memory


@pytest.mark.usefixtures("no_peft")
def test_saved_bytes():
    plain, dropping = (draw(SHAPE, 4, p, settings()) for p in (0.0, 0.1))
    s, x, mask = 48 * 4 * 4, 48 * 64 * 4, 48 * 64
    assert saved_bytes(providers.build("frozen", plain)) == 0
    assert saved_bytes(providers.build("ours", plain)) == s
    assert saved_bytes(providers.build("addmm", plain)) == s
    assert saved_bytes(providers.build("addmm", dropping)) == s + x + mask
    assert saved_bytes(providers.build("ours", dropping)) == s + mask
    assert saved_bytes(providers.build("split", dropping)) == s + x + mask  # what LoRAFusion keeps


def test_a_storage_is_saved_once_however_often_it_is_kept():
    problem = draw(SHAPE, 4, 0.0, settings())
    x = problem.x.detach().requires_grad_()

    def forward():
        h = x.exp()  # keeps its result, as does each factor of the product
        return h * h.view(-1).view_as(h)

    assert saved_bytes(Provider("twice", problem, forward, {"dx": x})) == 48 * 64 * 4
