"""Blocks in the benchmark: their arithmetic, their masks, and that no time is shown for a wrong result."""

import dataclasses
import json
import math
import warnings

import pytest
import torch
from bench_samples import CPU, arguments, printed, sample_case, settings

from lora_kernels import torch_backend
from lora_kernels.bench import levels
from lora_kernels.bench.cases import block as block_case
from lora_kernels.bench.cases import model as model_case
from lora_kernels.bench.cost import block as block_cost
from lora_kernels.bench.cost import traffic
from lora_kernels.bench.providers import block as block_providers
from lora_kernels.bench.providers import llama
from lora_kernels.bench.show import levels as level_tables
from lora_kernels.bench.show import tables
from lora_kernels.cli import bench
from lora_kernels.measure import timing
from lora_kernels.measure.presets import PRESETS, Shape, block_shape, parse_shape
from lora_kernels.verify import judge
from lora_kernels.verify.block_problems import outputs
from lora_kernels.verify.provider import Provider, Rounding

QKV, MLP = Shape(48, 40, 36, others=(12, 20)), Shape(48, 40, 56)
SHAPES = {"qkv": QKV, "mlp": MLP}
MIB = 2**20

# --- arithmetic

LLAMA = {
    "qkv": lambda adapter=0: block_cost.projections(8192, 4096, (4096, 1024, 1024), 16, 2, adapter),
    "mlp": lambda adapter=0: block_cost.mlp(8192, 4096, 14336, 16, 2, adapter),
}


@pytest.mark.parametrize(
    ("block", "formula", "dropout", "mib", "launches"),
    [
        ("qkv", "peft", False, 3174, 38), ("qkv", "peft", True, 4134, 44), ("qkv", "unsloth", False, 2248, 30),
        ("qkv", "lorafusion", True, 2126, 32), ("qkv", "ours", False, 647, 8), ("qkv", "ours", True, 682, 7), ("qkv", "frozen", False, 1056, 8),
        ("qkv", "floor", True, 416, 2),
        ("mlp", "peft", False, 12970, 42), ("mlp", "peft", True, 14730, 48), ("mlp", "unsloth", False, 8813, 32),
        ("mlp", "lorafusion", True, 8024, 36), ("mlp", "ours", False, 4265, 9), ("mlp", "floor", False, 3168, 4),
    ],
)  # fmt: skip
def test_bytes_of_llama_8b_s_blocks(block, formula, dropout, mib, launches):
    cost = block_cost.COSTS[formula](LLAMA[block](), dropout)
    assert cost.total / MIB == pytest.approx(mib, rel=2e-3)
    assert cost.launches == launches


@pytest.mark.parametrize("block", LLAMA)
def test_dropout_costs_a_bit_an_element_each_of_three_times(block):
    b = LLAMA[block]()
    plain, dropped = (block_cost.COSTS["ours"](b, dropout) for dropout in (False, True))
    of_A = 2 * sum(z.a for z in b.layers) if block == "qkv" else 0  # copied side by side without dropout
    assert dropped.total - plain.total == 3 * sum(z.m * z.k // 8 for z in b.layers) - of_A


@pytest.mark.parametrize("block", LLAMA)
def test_fp32_adapters_cost_a_copy_of_each_B_and_without_dropout_of_each_A(block):
    launches = {"qkv": 7, "mlp": 9}[block]
    for dropout, copies in ((False, 6), (True, 3)):
        assert block_cost.COSTS["ours"](LLAMA[block](4), dropout).launches == launches + copies


@pytest.mark.parametrize("r", [5, 16, 64])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_the_model_of_projections_agrees_with_the_kernels(r, p):
    widths = (2048, 512, 256)
    launches = traffic.block(4096, 2048, widths, (r,) * 3, torch.bfloat16, p > 0, num_sms=132, tma=True)
    modelled = block_cost.COSTS["ours"](block_cost.projections(4096, 2048, widths, r), p > 0)
    copies = [2 * 2 * 3 * r * 2048] if r == 16 and not p else []  # of all A side by side, by PyTorch
    assert modelled.launches == len(launches) + len(copies)
    moved = sum(copies) + sum(one.total for one in launches)
    assert modelled.total == pytest.approx(moved, rel=1e-4)  # but seeds and counters


def test_flops_are_those_of_the_layers():
    block = block_cost.mlp(2, 3, 5, 7)
    assert block_cost.flops(block, 0) == (3 * 2 * 2 * 15,) * 2
    assert block_cost.flops(block, 7) == (3 * 2 * 2 * (15 + 7 * 8), 3 * 2 * 2 * (15 + 2 * 7 * 8))


def test_blocks_of_presets_and_shapes_of_one_s_own():
    dims = PRESETS["llama-8b"].model
    assert str(block_shape(dims, "qkv")) == "8192x4096x4096+1024+1024"
    assert str(block_shape(dims, "mlp")) == "8192x4096x14336"
    assert block_shape(PRESETS["qwen-7b"].model, "qkv").widths == (3584, 512, 512)
    assert {"llama-1b", "qwen-32b", "tiny"} <= set(PRESETS)
    assert parse_shape("8x4x4+2+1", several=True) == Shape(8, 4, 4, others=(2, 1))
    for wrong, several in (("8x4x4+", True), ("8x4+4x4", True), ("8x4x4+0", True), ("8x4x4+2+1", False)):
        with pytest.raises(ValueError, match="ROWSxINxOUT"):
            parse_shape(wrong, several)


# --- nothing wrong is timed


@pytest.mark.usefixtures("no_peft")
@pytest.mark.parametrize("block", SHAPES)
@pytest.mark.parametrize(("dtype", "p"), [(torch.float32, 0.0), (torch.float32, 0.1), (torch.bfloat16, 0.1)])
def test_every_provider_is_right_and_timed(block, dtype, p):
    case = block_case.run_case(block, SHAPES[block], 8, p, settings(dtype))
    rows = case["providers"]
    half = dtype == torch.bfloat16
    assert set(rows) == {"frozen", "ours", "per_layer", "peft", "addmm"} | (
        {"ours_fp32", "peft_fp32"} if half else set()
    )
    for row in rows.values():
        assert row["reason"] == ""
        assert row["check"]["ok"]
        assert 0 < row["check"]["worst"] <= 1
        assert set(row["seconds"]) == {"forward", "backward", "both"}
        assert row["peak_bytes"] > 0
    own_rules = rows["ours"]["check"]["rule"] == "numerics rules 1 and 2"
    assert own_rules == (block == "qkv")
    assert rows["frozen"]["seconds"]["both"]["to_floor"] == 1
    assert rows["ours"]["saved_bytes"] < rows["peft"]["saved_bytes"] or not p
    assert rows["peft"]["model"]["forward_bytes"] > rows["frozen"]["model"]["forward_bytes"] > 0
    shown = printed(tables.case_table(case))
    assert "lora_kernels [torch]" in shown
    assert "lora_linear alone [torch]" in shown
    assert "if frozen and each large tensor once a pass" in shown


@pytest.mark.parametrize(("block", "p", "rule"), [("qkv", 0.0, "numerics rules 1 and 2"), ("mlp", 0.0, "rms error")])
def test_the_kernels_are_right_as_well(block, p, rule):
    chosen = settings(backend="triton", only=("ours",), passes=())
    shape = dataclasses.replace(SHAPES[block], m=9, k=24)
    row = block_case.run_case(block, shape, 4, p, chosen)["providers"]["ours"]
    assert row["reason"] == ""
    assert rule in row["check"]["rule"]
    assert row["label"] == "lora_kernels [triton]"
    assert row["model"]["launches"] == (7 if block == "qkv" else 9)


@pytest.mark.parametrize("block", SHAPES)
def test_peft_itself(block):
    pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that PEFT imports
        case = block_case.run_case(block, SHAPES[block], 8, 0.1, settings(torch.bfloat16, only=("peft", "peft_fp32")))
    assert [row["label"] for row in case["providers"].values()] == ["PEFT bf16", "PEFT fp32"]
    assert all(row["reason"] == "" and row["seconds"] for row in case["providers"].values())


def off(which):
    """A change of what a provider's backward gives: one of its gradients is a little off."""

    def change(provider):
        place = list(provider.leaves).index(which)

        class Off(Provider):
            def backward(self, ys, dys=None):
                return tuple(g * (1.001 if i == place else 1) for i, g in enumerate(super().backward(ys, dys)))

        return Off(**{f.name: getattr(provider, f.name) for f in dataclasses.fields(provider)})

    return change


def with_layers(change):
    """A provider of other layers than it is asked for, which says that they are those."""

    def changed(provider):
        problem = provider.problem
        other = dataclasses.replace(problem, layers={n: change(n, q) for n, q in problem.layers.items()})
        return dataclasses.replace(block_providers.build("per_layer", other), problem=problem)

    return changed


def with_forward(change):
    return lambda provider: dataclasses.replace(provider, forward=lambda: change(provider.forward()))


LAST = {"qkv": "v", "mlp": "down"}
BREAKS = {
    "y is off": (lambda block: with_forward(lambda ys: (*ys[:-1], ys[-1] * 1.001)), "y"),
    "y has a NaN": (lambda block: with_forward(lambda ys: (ys[0] + math.nan, *ys[1:])), "y"),
    "dx is off": (lambda block: off("dx"), "dx has rms error"),
    "dA is off": (lambda block: off(f"dA {LAST[block]}"), "has rms error"),
    "dB is off": (lambda block: off(f"dB {LAST[block]}"), "has rms error"),
    "a scaling": (lambda block: with_layers(lambda n, q: q._replace(scaling=q.scaling * (1 + (n == LAST[block]) / 100))),
                  "has rms error"),
    "a layer that drops nothing": (lambda block: with_layers(lambda n, q: q._replace(dropout_p=q.dropout_p * (n != LAST[block]))),
                                   "keeps a share of 1.0000, 0.9000 expected"),
    "a first layer that drops more": (lambda block: with_layers(lambda n, q: q._replace(dropout_p=0.3 if n in "q gate" else 0.1)),
                                      ": dropout keeps a share of 0."),
}  # fmt: skip


@pytest.mark.parametrize("block", SHAPES)
@pytest.mark.parametrize("what", BREAKS)
def test_no_time_for_a_wrong_result(what, block):
    breaks, said = BREAKS[what]

    def build(name, problem, backend):
        provider = block_providers.build(name, problem, backend)
        return breaks(block)(provider) if name == "per_layer" else provider

    case = block_case.run_case(
        block, SHAPES[block], 8, 0.1, settings(only=("frozen", "ours", "per_layer"), passes=("both",)), build=build
    )
    row = case["providers"]["per_layer"]
    assert row["seconds"] == {}
    assert row["reason"].startswith("wrong result, not timed: ")
    assert said in row["reason"]
    assert case["providers"]["ours"]["seconds"]
    assert "not timed" in printed(tables.case_table(case))


def test_other_masks_than_those_that_were_found_are_an_error():
    problem = block_case.draw("mlp", MLP, 8, 0.3, settings())
    provider = block_providers.build("per_layer", problem)
    forward = provider.forward

    def draws_others():
        torch.rand(1)
        return forward()

    verdict = judge.judge(provider, judge.Truth())
    assert verdict.ok, verdict.reason
    masks = judge.find_masks(problem, provider.leaves, lambda dys: judge.run_once(provider, dys, 1)["dx"])
    other = dataclasses.replace(provider, forward=draws_others)
    actual = judge.run_once(other, problem.dys, 1)
    truth = [outputs(problem, masks, dtype) for dtype in (torch.float64, torch.float32)]
    assert not all(finding.ok for finding in judge.check_rms(actual, *truth, torch.float32, problem.terms_summed))


@pytest.mark.parametrize(
    ("rounding", "named"),
    [(Rounding.OWN, ["y q", "y k", "y v"]), (Rounding.OPERATORS, ["y q", "dA q", "dB q"])],
)
def test_of_a_block_s_wrong_outputs_the_first_three_are_named(rounding, named):
    problem = block_case.draw("qkv", QKV, 8, 0.0, settings())
    provider = with_forward(lambda ys: tuple(2 * y for y in ys))(block_providers.build("per_layer", problem))
    reason = judge.judge(dataclasses.replace(provider, rounding=rounding), judge.Truth()).reason
    every = [f"y {name}" for name in problem.layers] + list(provider.leaves)
    assert {name for name in every if f"; {name}" in f"; {reason}"} == set(named)


@pytest.mark.parametrize("block", SHAPES)
def test_masks_are_read_off_the_provider(block):
    problem = block_case.draw(block, SHAPES[block], 8, 0.3, settings())
    before = {name: [t.clone() for t in q[:3]] for name, q in problem.layers.items()}
    provider = block_providers.build("per_layer", problem)
    found = judge.find_masks(problem, provider.leaves, lambda dys: judge.run_once(provider, dys, 5)["dx"])
    torch.manual_seed(5)
    for name, q in problem.layers.items():
        width = q.weight.shape[1]
        assert torch.equal(found[name], torch_backend.draw_mask(torch.Size((48, width)), q.dropout_p, CPU).bool()), name
        assert all(map(torch.equal, q[:3], before[name]))  # and nothing is left changed


@pytest.mark.parametrize(("times", "ok"), [(1.0, True), (1.9, True), (3.5, False), (math.nan, False)])
def test_an_mlp_may_be_twice_as_far_off_as_pytorch(times, ok):
    problem = block_case.draw("mlp", MLP, 8, 0.0, settings())
    exact, by_pytorch = (outputs(problem, {}, dtype) for dtype in (torch.float64, torch.float32))
    actual = {name: exact[name] + times * (by_pytorch[name].double() - exact[name]) for name in exact}
    findings = judge.check_rms(actual, exact, by_pytorch, torch.float32, summed=0)
    assert [finding.name for finding in findings] == list(exact)
    assert {finding.ok for finding in findings} == {ok}
    assert all((finding.rule_2 <= 1) == ok for finding in findings)


@pytest.mark.usefixtures("no_peft")
def test_blocks_in_rotated_buffers(monkeypatch):
    monkeypatch.setattr(timing, "_MOST_COPIES", 3)
    built = []

    def build(name, problem, backend):
        built.append((name, problem.x.data_ptr(), problem.layers["down"].weight.data_ptr()))
        return block_providers.build(name, problem, backend)

    chosen = settings(cache="rotate", only=("frozen", "ours"))
    case = block_case.run_case("mlp", MLP, 8, 0.0, chosen, build=build)
    assert case["copies"] == 3
    assert len({place for name, *place in map(tuple, built) if name == "ours" for place in [tuple(place)]}) == 3
    assert case["providers"]["ours"]["seconds"]["both"]["n"] == 2


# --- the decoder layer


def test_the_decoder_s_own_row_is_made_of_blocks(monkeypatch):
    calls = []
    for name in ("lora_qkv", "lora_mlp"):
        real = getattr(llama, name)
        monkeypatch.setattr(
            llama, name, lambda *args, _real=real, _name=name, **more: calls.append(_name) or _real(*args, **more)
        )
    bench_of_one = model_case.Bench(PRESETS["quick"].model, 4, 0.1, settings(targets=("q", "v", "up")), False)
    for name, expected in (("ours", ["lora_qkv", "lora_mlp"]), ("per_layer", [])):
        calls.clear()
        trial = bench_of_one.trial(name)
        assert model_case.check(trial, bench_of_one).reason == ""
        assert calls == expected * 2  # without dropout and with it
        assert trial.label.startswith("lora_kernels" if name == "ours" else "lora_linear alone")


# --- the command


@pytest.mark.usefixtures("no_peft")
def test_the_command_times_all_blocks(tmp_path, capsys):
    file = tmp_path / "b.json"
    argv = ("--quick", "--block", "qkv", "mlp", "layer", "--r", 4, "--pass", "both", "--json", file)
    assert bench.run(arguments(*argv)) == 0
    shown, written = capsys.readouterr().out, json.loads(file.read_text())
    assert (written["command"], written["level"], written["complete"]) == ("bench", "blocks", True)
    assert [(case["level"], case["p"]) for case in written["cases"]] == [
        (level, p) for level in ("qkv", "mlp", "decoder") for p in (0, 0.1)
    ]
    assert written["cases"][0]["shape"] == {"m": 64, "k": 64, "n": 64, "label": "q, k, v", "others": [32, 32]}
    assert written["machine"]["torch"] == torch.__version__
    assert isinstance(written["unsteady"], list)
    assert written["speedups"]["per_layer"]["cases"] == 6
    for words in ("Queries, keys and values: 64 x 64 x 64 + 32 + 32", "Gated MLP: 64 x 64 x 96", "One decoder layer"):
        assert words in shown


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--block", "mlp", "--level", "decoder"), "--block: in place of --level and of --model"),
        (("--block", "qkv", "--shape", "8x8x8"), "--shape 8x8x8: here a shape is ROWSxINxOUT+OUT+OUT, 3 of out_features"),
        (("--block", "mlp", "--shape", "8x8x8+4+4"), "here a shape is ROWSxINxOUT, 1 of"),
        (("--shape", "8x8x8+4+4",), "here a shape is ROWSxINxOUT, 1 of"),
        (("--block", "qkv", "--preset", "lorafusion"), "--block qkv takes a --preset that is a model: llama-8b,"),
        (("--block", "qkv", "--providers", "split"), "--providers split: --block qkv has frozen, ours,"),
        (("--block", "qkv", "--target-modules", "q"), "--target-modules: of a model"),
        (("--block", "qkv", "layer", "--backend", "torch"), "a model takes --backend auto"),
    ],
)  # fmt: skip
def test_what_a_block_does_not_have_is_refused(argv, message, capsys):
    assert bench.run(arguments(*argv)) == 2
    assert message in capsys.readouterr().err


def test_a_shape_of_one_s_own_at_other_rows():
    args = arguments("--block", "qkv", "--shape", "8x16x16+4+4", "--m", 3, 5, "--p", 0.2)
    cases = bench._cases(args)
    assert [(level, str(shape), r, p) for level, shape, r, p in cases] == [
        ("qkv", "3x16x16+4+4", 16, 0.2), ("qkv", "5x16x16+4+4", 16, 0.2)
    ]  # fmt: skip
    assert "per_layer" in levels.names("qkv", settings(), 16)


# --- times that mean nothing


def test_times_that_spread_too_far_are_said_to_mean_nothing(capsys):
    steady, shaky = sample_case(), sample_case()
    shaky["providers"]["ours"]["seconds"]["both"] |= {"median": 1.0, "q1": 0.8, "q3": 1.4}
    assert tables.unsteady([steady]) == []
    assert tables.unsteady_words([steady]) == ""
    (found,) = tables.unsteady([steady, shaky])
    assert (found["case"], found["provider"], found["pass"]) == (1, "ours", "both")
    assert found["spread"] == pytest.approx(0.6)
    words = tables.unsteady_words([steady, shaky])
    assert "in 1 of 6 times the middle half of the rounds spans more than 50% of the median" in words
    assert "ratios of those mean nothing. Worst: lora_kernels [triton], forward + backward, 60%." in words


def test_the_command_warns_of_them(monkeypatch, tmp_path, capsys):
    real = bench.levels.run

    def shaky(*args):
        cases = real(*args)
        taken = cases[0]["providers"]["ours"]["seconds"]["both"]
        taken["q3"] = taken["q1"] + 2 * taken["median"]
        return cases

    monkeypatch.setattr(bench.levels, "run", shaky)
    file = tmp_path / "b.json"
    argv = ("--block", "qkv", "--quick", "--p", 0, "--providers", "frozen", "ours", "--json", file)
    assert bench.run(arguments(*argv)) == 0
    assert "ratios of those mean nothing" in " ".join(capsys.readouterr().out.split())
    found = json.loads(file.read_text())["unsteady"]
    assert {"case": 0, "provider": "ours", "pass": "both", "spread": pytest.approx(2.0)} in found


def test_tables_of_several_levels():
    from rich.console import Console

    console = Console(width=150, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    block = sample_case() | {"level": "mlp", "floor_bytes": 2**20}
    level_tables.show(console, [sample_case(), block], full=False)
    console.file.close()
    text = console.export_text()
    assert "1 x 2 x 3 (q, o), r=16" in text
    assert "Gated MLP: 1 x 2 x 3" in text
