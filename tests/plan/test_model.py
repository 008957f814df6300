"""The rules that choose a strategy: their arithmetic, and what follows from it."""

import itertools

import pytest
import torch

from bench import roofline
from lora_kernels.bench.cost import layer as layer_cost
from lora_kernels.constants import ONE_READ_RANK
from lora_kernels.kernels import _configs
from lora_kernels.plan import model
from lora_kernels.plan.model import Limits, Product

H200 = Limits(700e12, 4.8e12, 0.05)
GPUS = {name: model.limits(capability, torch.bfloat16)
        for name, capability in (("sm_80", (8, 0)), ("sm_89", (8, 9)), ("sm_90", (9, 0)), ("sm_100", (10, 0)),
                                  ("sm_120", (12, 0)), ("amd", None))}  # fmt: skip


def crossing(q, gpu=H200):
    """The slowdown at which the fused kernel and beta = 1 take equally long, by bisection; no launch, no K step."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        limits = gpu._replace(slowdown=middle)
        fused, beta1 = (model.seconds(name, q, limits) for name in ("fused", "beta1"))
        low, high = (middle, high) if fused < beta1 else (low, middle)
    return low


@pytest.mark.parametrize("inner", [4096, 8192, 14336])
def test_break_even_is_the_formula_of_the_docstring(monkeypatch, inner):
    monkeypatch.setattr(model, "_LAUNCH", 0.0)
    q = Product(8192, inner, 4096, 0, 2)  # rank 0: the low-rank K step costs nothing on either side
    formula = q.element * H200.flops / (inner * H200.bandwidth)
    assert crossing(q) == pytest.approx(formula, rel=1e-9)
    assert {4096: 0.071, 8192: 0.036, 14336: 0.020}[inner] == pytest.approx(formula, abs=5e-4)


def test_the_low_rank_step_shifts_it_by_its_share_of_k(monkeypatch):
    monkeypatch.setattr(model, "_LAUNCH", 0.0)
    at_0, at_16 = (1 + crossing(Product(8192, 4096, 4096, r, 2)) for r in (0, 16))
    assert at_0 / at_16 == pytest.approx((4096 + 64) / 4096, rel=1e-9)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("backward", [False, True])
def test_few_rows_take_the_fused_kernel(gpu, backward):
    """There W is all there is to read, and every other launch is a loss."""
    for rows, (inner, cols) in itertools.product((1, 2, 16, 64), roofline.SHAPES):
        for rank, masked in itertools.product((1, 16, 64), {False, backward}):
            assert model.best(Product(rows, inner, cols, rank, 2, masked, backward), GPUS[gpu]) == "fused"


def every_product():
    for rows, (k, n), rank in itertools.product(roofline.ROWS, roofline.SHAPES, (16, 64, 256)):
        yield Product(rows, k, n, rank, 2)
        yield Product(rows, n, k, rank, 2, False, True)
        yield Product(rows, n, k, rank, 2, True, True)


@pytest.mark.parametrize("slowdown", [0.0, 0.05, 0.3, 3.0])
def test_only_what_can_compute_a_product_is_chosen(slowdown):
    for q in every_product():
        allowed = model.allowed_strategies(q)
        assert ("padded" in allowed) == (not q.masked)
        assert ("joint" in allowed) == q.backward
        assert model.best(q, H200._replace(slowdown=slowdown)) in allowed


def test_joint_pays_where_its_pass_of_dy_is_more_than_its_copy_of_w():
    slow = H200._replace(slowdown=3.0)
    for rank, masked in itertools.product((16, 32), (False, True)):  # ds and dB come from one read in any case
        assert model.best(Product(65536, 14336, 1024, rank, 2, masked, True), slow) != "joint"
    assert model.best(Product(65536, 14336, 1024, 64, 2, False, True), slow) == "joint"
    assert model.best(Product(1024, 14336, 65536, 64, 2, False, True), slow) != "joint"


def test_padded_pays_where_both_operands_are_less_than_the_result():
    slow = H200._replace(slowdown=3.0)
    assert model.best(Product(16384, 1024, 28672, 16, 2), slow) == "padded"
    assert model.best(Product(16384, 28672, 1024, 16, 2), slow) == "beta1"


def test_the_rank_of_one_read_is_the_kernels_own():
    ranks = range(1, 513)
    assert [r <= ONE_READ_RANK for r in ranks] == [_configs.shrink_wgrad_pays(r) for r in ranks]


@pytest.mark.parametrize("name", model.NAMES)
def test_more_work_never_takes_less_time(name):
    for q in every_product():
        if name not in model.allowed_strategies(q):
            continue
        for field in ("rows", "inner", "cols"):
            more = q._replace(**{field: 2 * getattr(q, field)})
            saved = name == "joint" and q.rank > ONE_READ_RANK  # a saved pass of dy grows with dy
            if not (saved and field in ("rows", "inner")):
                assert model.seconds(name, more, H200) >= model.seconds(name, q, H200)
        faster = Limits(2 * H200.flops, 2 * H200.bandwidth, H200.slowdown)
        assert model.seconds(name, q, faster) <= model.seconds(name, q, H200)


def test_a_slower_kernel_is_never_chosen_where_a_faster_one_was_not():
    for q in every_product():
        chosen = [model.best(q, H200._replace(slowdown=step / 100)) == "fused" for step in range(0, 60, 2)]
        assert chosen == sorted(chosen, reverse=True)
        assert chosen[0]
    large = Product(8192, 14336, 4096, 16, 2)
    assert model.best(large, H200) == "beta1"
    assert model.best(large, H200._replace(slowdown=0.0)) == "fused"


def layer_seconds(z, dropout, gpu, pick=model.best):
    """Forward and backward with the strategies that the rules pick, by the model that the baselines are timed by."""
    cost = layer_cost.COSTS["triton"](z, dropout)
    other = (cost.total - sum(cost.base)) / gpu.bandwidth + cost.launches * roofline.LAUNCH
    forward = Product(z.m, z.k, z.n, z.r, z.element)
    backward = Product(z.m, z.n, z.k, z.r, z.element, dropout, True)
    return other + sum(model.seconds(pick(q, gpu), q, gpu) for q in (forward, backward))


def worst_against_baselines(gpu, dropout, pick=model.best):
    """Our modelled time over the least of PEFT's, the addmm chain's and Unsloth's, the library's rate for all."""
    library = roofline.Limits(gpu.flops, gpu.bandwidth)
    baselines = [layer_cost.COSTS["peft"], layer_cost.COSTS["addmm"]] + [lambda z, _: layer_cost.unsloth(z)] * (
        not dropout
    )
    return max(
        layer_seconds(z, dropout, gpu, pick) / min(roofline.seconds(cost(z, dropout), z, library) for cost in baselines)
        for z in (
            layer_cost.Size(m, k, n, r) for m in roofline.ROWS for k, n in roofline.SHAPES for r in (16, 64, 256)
        )
    )  # fmt: skip


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("slowdown", [0.0, 0.05, 0.1, 0.15, 0.25, 1.0])
def test_the_choice_is_never_slower_than_the_best_baseline(gpu, dropout, slowdown):
    """By the model; a hundredth is what `best` asks of a change of strategy."""
    assert worst_against_baselines(GPUS[gpu]._replace(slowdown=slowdown), dropout) <= 1.01


@pytest.mark.parametrize("name", ["fused", "beta1"])
def test_one_strategy_for_everything_would_be_slower(name):
    """So that the test before has something to find."""
    gpu = GPUS["sm_90"]._replace(slowdown=0.15)
    sizes = [layer_cost.Size(m, k, n, 16) for m in roofline.ROWS for k, n in roofline.SHAPES]
    gains = [layer_seconds(z, False, gpu, lambda q, gpu: name) / layer_seconds(z, False, gpu) for z in sizes]
    assert min(gains) > 0.99
    assert max(gains) > 1.03


def test_a_gpu_is_like_its_own_architecture():
    """FLOPs a byte decide: consumer GPUs have fewer than the data centre's of their generation."""
    intensity = {name: gpu.flops / model._REACHED / gpu.bandwidth for name, gpu in GPUS.items()}
    assert intensity["sm_120"] == pytest.approx(117, abs=1)
    assert intensity["sm_89"] == pytest.approx(164, abs=1)
    assert intensity["sm_100"] == pytest.approx(281, abs=1)
    like = {(8, 6): "8", (8, 9): "8.9", (9, 0): "9", (10, 3): "10", (12, 1): "12", (13, 0): "10"}
    assert {capability: model._like(capability) for capability in like} == like


def test_limits_know_every_gpu_and_dtype():
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (13, 0), None):
        half, tf32, fp32 = (
            model.limits(capability, dtype, tf32)
            for dtype, tf32 in ((torch.float16, False), (torch.float32, True), (torch.float32, False))
        )
        assert half.flops > tf32.flops >= fp32.flops > 0  # tensor cores of GeForce have no more in TF32
        assert 0 < half.slowdown <= tf32.slowdown <= fp32.slowdown < 1
