"""The kernels move what their formulas say, counted load by load in the interpreter, and not a byte more."""

import pytest
import torch
from oracles import stored

from bench import roofline
from lora_kernels import Projection, lora_mlp, lora_projections
from lora_kernels.autograd.linear import LoRALinearFunction
from lora_kernels.bench.cost import layer as layer_cost
from lora_kernels.bench.cost import traffic
from lora_kernels.kernels import _configs, dequantize, matmul_expand, shrink, shrink_wgrad, wgrad
from lora_kernels.kernels._configs import MatmulConfig, ShrinkConfig
from lora_kernels.kernels._launch import num_sms
from lora_kernels.kernels._wgrad_config import WgradConfig

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter, which a GPU bypasses")

MIB = 2**20


def check(launches, expected):
    assert [f"_{moved.kernel}_kernel" for moved in expected] == [launch.kernel for launch in launches]
    for launch, moved in zip(launches, expected, strict=True):
        counted = launch.moved
        assert counted["parts_read"] == counted["parts"], f"{moved.kernel}: parts are not read back once"
        said = {name: getattr(moved, name) for name in ("touched", "issued", "stored", "parts")}
        assert {name: counted[name] for name in said} == said, moved.kernel


@pytest.mark.parametrize("p", [pytest.param(0.0, marks=pytest.mark.slow), 0.3])
@pytest.mark.parametrize(
    ("m", "k", "n", "r", "dtype"),
    [
        (33, 40, 72, 5, torch.float32), (200, 72, 40, 16, torch.float16), (1, 130, 65, 1, torch.float32),
        (20, 48, 24, 40, torch.float32), (17, 1200, 16, 8, torch.float16),
    ],
)  # fmt: skip
def test_a_layer_moves_what_its_formulas_say(m, k, n, r, dtype, p, log):
    x, w, a, b = (torch.ones(s, dtype=dtype) for s in ((m, k), (n, k), (r, k), (n, r)))
    for t in (x, a, b):
        t.requires_grad_()
    y = LoRALinearFunction.apply(x, w, a, b, torch.ones(n, dtype=dtype), (2.0, p, "triton", False, None))
    y.backward(torch.ones_like(y))
    sms = num_sms(torch.device("cpu"))
    check(log, traffic.layer(m, k, n, r, dtype, p > 0, sms, tma=False, bias=dtype.itemsize))


@pytest.mark.parametrize("p", [pytest.param(0.0, marks=pytest.mark.slow), 0.3])
@pytest.mark.parametrize(
    ("m", "k", "widths", "ranks"), [(70, 40, (72, 24), (5, 16)), (20, 300, (16, 40, 8), (3, 0, 40))]
)
def test_projections_move_what_their_formulas_say(m, k, widths, ranks, p, log):
    x = torch.ones(m, k, requires_grad=True)
    weights, biases = [torch.ones(n, k) for n in widths], [torch.ones(n) for n in widths]
    adapters = [
        (torch.ones(r, k, requires_grad=True), torch.ones(n, r, requires_grad=True)) if r else None
        for n, r in zip(widths, ranks, strict=True)
    ]
    ys = lora_projections(x, weights, adapters, biases=biases, dropout_p=p, backend="triton")
    torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
    sms = num_sms(torch.device("cpu"))
    check(log, traffic.block(m, k, widths, ranks, torch.float32, p > 0, sms, tma=False, bias=4))


@pytest.mark.parametrize("p", [pytest.param(0.0, marks=pytest.mark.slow), 0.3])
@pytest.mark.parametrize(
    ("m", "k", "hidden", "n", "ranks"),
    [(20, 24, 40, 17, (5, 5, 5)), (70, 9, 70, 33, (3, 16, 8)), (5, 16, 24, 16, (40, 4, 70)), (150, 8, 20, 8, (4, 6))],
)
def test_a_gated_mlp_moves_what_its_formulas_say(m, k, hidden, n, ranks, p, log):
    *before, down = [
        Projection(torch.ones(out, inner), torch.ones(r, inner, requires_grad=True),
                   torch.ones(out, r, requires_grad=True), torch.ones(out), 1.0, p)
        for r, out, inner in zip(ranks[::-1], (n, hidden, hidden), (hidden, k, k), strict=False)
    ][::-1]  # fmt: skip
    x = torch.ones(m, k, requires_grad=True)
    y = lora_mlp(x, *([None] * (2 - len(before))), *before, down, backend="triton")
    y.backward(torch.ones_like(y))
    sms = num_sms(torch.device("cpu"))
    check(log, traffic.mlp(m, k, hidden, n, ranks, torch.float32, p > 0, sms, tma=False, bias=4))


@pytest.mark.parametrize("k_per_split", [16, 32, 96])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_a_split_shrink(k_per_split, p, log):
    config = ShrinkConfig(16, 16, 16, k_per_split, 4, 2)
    shrink(torch.ones(37, 70), torch.ones(20, 70), 1.0, p, config)
    check(log, [traffic.shrink(37, 70, 20, 4, p > 0, config)])


@pytest.mark.parametrize("shrinks", [False, True])
@pytest.mark.parametrize("rows_per_split", [16, 64])
def test_a_split_wgrad(rows_per_split, shrinks, log):
    config = WgradConfig(16, 32, 32, rows_per_split, 4, 2)
    dy, s, b = torch.ones(60, 70), torch.ones(60, 20), torch.ones(70, 20)
    if shrinks:
        shrink_wgrad(dy, s, b, 1.0, torch.float16, ds=torch.empty(60, 20), config=config)
    else:
        wgrad(dy, s, torch.float16, config=config)
    check(log, [traffic.wgrad(60, 70, 20, 4, 2, config, shrinks=shrinks)])


@pytest.mark.parametrize(
    ("format", "shape", "block", "nested"),
    [
        ("nf4", (130, 132), 64, False), ("fp4", (333, 101), 32, True), ("nf4", (3, 1700), 20, False),
        ("fp8", (40, 300), (16, 128), False), ("fp8", (3, 5000), (3, 5000), False), ("int8", (40, 97), (1, 97), False),
    ],
)  # fmt: skip
def test_a_stored_weight(format, shape, block, nested, log):
    weight = stored.draw(format, shape, block, nested)
    if nested:
        # every entry of the table
        weight.scale.copy_(torch.arange(weight.scale.numel()) % 256)
    dequantize(weight, torch.float16)
    check(log, [traffic.dequantize(*shape, 2, 4 if isinstance(block, int) else 8, block, nested)])


def test_a_weight_in_4_bits_moves_a_quarter_more_than_its_16_bit_copy():
    """An NF4 weight of Llama-8B: half a byte, its scales, and two bytes written."""
    moved = traffic.dequantize(14336, 4096, 2, nested=True)
    assert moved.total / (14336 * 4096) == pytest.approx(0.5 + 1 / 64 + 4 / 64 / 256 + 2, rel=1e-4)
    assert traffic.dequantize(14336, 4096, 2, 8, (128, 128)).total / (14336 * 4096) == pytest.approx(3.0, rel=1e-3)


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_a_matmul_of_many_tiles(masked, tma, log):
    config = MatmulConfig(16, 32, 16, 2, 2, 4, 2)
    keep = torch.full((50, 3), -1, dtype=torch.int32) if masked else None
    sources = [(torch.ones(50, k), torch.ones(68, k)) for k in (36, 8)]
    matmul_expand(sources, torch.ones(68), keep, config=config, tma=tma)
    check(log, [traffic.matmul_expand(50, 68, (36, 8), 4, config, 4, masked)])


def test_the_count_sees_a_second_read(log):
    """Twice as many column blocks read x twice: the count must say so, and the formula of one block must not pass."""
    x, a = torch.ones(20, 40), torch.ones(32, 40)
    shrink(x, a, 1.0, config=ShrinkConfig(32, 64, 16, 64, 4, 2))
    assert log[0].moved["issued"] - log[0].moved["touched"] == x.numel() * 4
    with pytest.raises(AssertionError):
        check(log, [traffic.shrink(20, 40, 32, 4, False, ShrinkConfig(32, 64, 32, 64, 4, 2))])


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_the_split_minimum_in_five_launches(p):
    """M = 8192, 4096 x 4096, r = 16, bf16: every operand once, and a bit an element for the mask, three times."""
    launches = traffic.layer(8192, 4096, 4096, 16, torch.bfloat16, p > 0, num_sms=132, tma=True)
    mask = 8192 * 4096 / 8
    assert len(launches) == 5
    assert sum(moved.total for moved in launches) / MIB == pytest.approx(514.2 + 3 * (p > 0) * mask / MIB, abs=0.1)
    assert sum(2 * moved.parts for moved in launches) / MIB < 32  # out of L2 for the most part


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_queries_keys_and_values_in_seven_launches(p):
    """Llama-8B's, M = 8192, r = 16, bf16: x twice forward and once backward, and a bit an element for each mask."""
    launches = traffic.block(8192, 4096, (4096, 1024, 1024), (16,) * 3, torch.bfloat16, p > 0, num_sms=132, tma=True)
    mask = 8192 * 4096 / 8 / MIB
    assert len(launches) == 7
    assert sum(moved.total for moved in launches) / MIB == pytest.approx(646.2 + 9 * (p > 0) * mask, abs=0.1)
    assert sum(2 * moved.parts for moved in launches) / MIB < 60  # out of L2 for the most part
    alone = [traffic.layer(8192, 4096, n, 16, torch.bfloat16, p > 0, num_sms=132, tma=True) for n in (4096, 1024, 1024)]
    assert sum(moved.total for layer in alone for moved in layer) / MIB > 1.5 * (646.2 + 9 * (p > 0) * mask)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_gated_mlp_in_nine_launches(p):
    """Llama-8B's, M = 8192, r = 16, bf16: g, u and h once each way, dh, dg and du; no more than the plan allows."""
    launches = traffic.mlp(8192, 4096, 14336, 4096, (16,) * 3, torch.bfloat16, p > 0, num_sms=132, tma=True)
    total = sum(moved.total for moved in launches) / MIB
    assert len(launches) == 9
    assert total <= 1.05 * 4490
    x, wide = 8192 * 4096 / MIB, 8192 * 14336 / MIB
    weights, masks = 3 * 4096 * 14336 / MIB, (p > 0) * (6 * x + 3 * wide) / 16
    # x thrice, y, dy twice, dx; g and u thrice, h twice, dh twice, dg and du twice
    assert total == pytest.approx(2 * (7 * x + 14 * wide + 2 * weights + masks), rel=0.003)
    # out of L2 for the most part; 26 MiB of it fill the multiprocessors, see `_configs._whole_rounds`
    assert sum(2 * moved.parts for moved in launches) / MIB < 310


def test_the_wave_that_runs_together_touches_less_than_in_the_usual_order():
    def footprint(config):
        tiles_m, tiles_n = -(-8192 // config.block_m), -(-8192 // config.block_n)
        wave = [position(tile, tiles_m, tiles_n, config.group_m) for tile in range(132)]
        return len({m for m, _ in wave}) * config.block_m + len({n for _, n in wave}) * config.block_n

    def position(tile, num_m, num_n, group):
        first = tile // (group * num_n) * group
        height = min(num_m - first, group)
        return first + tile % (group * num_n) % height, tile % (group * num_n) // height

    config = _configs.matmul_config(8192, 8192, 8192, torch.bfloat16, True, False, 132)
    assert footprint(config) <= 4352
    assert footprint(MatmulConfig(128, 256, 64, 8, 2, 8, 4)) == 5376


@pytest.mark.parametrize("r", [1, 16, 32, 33, 64, 256])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_the_model_of_the_chain_agrees_with_the_kernels(r, p):
    launches = traffic.layer(4096, 2048, 4096, r, torch.bfloat16, p > 0, num_sms=132, tma=True)
    modelled = layer_cost.COSTS["triton"](layer_cost.Size(4096, 2048, 4096, r), p > 0)
    assert modelled.launches == len(launches)
    assert modelled.total == pytest.approx(sum(moved.total for moved in launches), rel=1e-4)  # but seed and counters


def test_the_page_is_what_the_formulas_say(monkeypatch, tmp_path, capsys):
    assert roofline.main(["--check"]) == 0
    monkeypatch.setattr(roofline, "PAGE", tmp_path / "roofline.md")
    assert roofline.main(["--check"]) == 1
    assert roofline.main([]) == 0
    assert roofline.main(["--check"]) == 0


def test_time_at_the_limits_is_bound_by_whichever_is_slower():
    z, limits = layer_cost.Size(1024, 1024, 1024, 16), roofline.Limits(flops=1e12, bandwidth=1e30)
    frozen = layer_cost.COSTS["frozen"](z, False)
    assert roofline.seconds(frozen, z, limits) == pytest.approx(2 * 2 * 1024**3 / 1e12 + 2 * roofline.LAUNCH)
    slow_memory = roofline.Limits(flops=1e30, bandwidth=1e9)
    assert roofline.seconds(frozen, z, slow_memory) == pytest.approx(frozen.total / 1e9 + 2 * roofline.LAUNCH)
