"""Experts in the benchmark: every form is right before it is timed, its costs, and what the command takes."""

import dataclasses
import json
import math

import pytest
import torch
from bench_samples import arguments, printed, settings

from bench import subjects
from lora_kernels.bench import estimate, levels
from lora_kernels.bench.cases import grouped as grouped_case
from lora_kernels.bench.cost import grouped as grouped_cost
from lora_kernels.bench.providers import grouped as grouped_providers
from lora_kernels.bench.show import tables
from lora_kernels.cli import bench
from lora_kernels.measure import timing
from lora_kernels.measure.presets import PRESETS, ExpertShape, Shape
from lora_kernels.verify.provider import Provider

# five experts, two a token
SHAPE = ExpertShape(48, 40, 56, experts=5, top_k=2)
STACK_BYTES = 5 * 40 * 56


# --- nothing wrong is timed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_every_form_is_right_and_timed(dtype):
    case = grouped_case.run_case(SHAPE, 8, settings(dtype))
    rows, half = case["providers"], dtype.itemsize == 2
    assert set(rows) == set(grouped_providers.PROVIDERS) - (set() if half else {"ours_fp32", "peft_fp32"})
    for row in rows.values():
        assert row["reason"] == ""
        assert 0 < row["check"]["worst"] <= 1
        assert set(row["seconds"]) == {"forward", "backward", "both"}
        assert row["peak_bytes"] > 0
    assert rows["ours"]["check"]["rule"] == "numerics rules 1 and 2"
    assert rows["frozen"]["seconds"]["both"]["to_floor"] == 1
    # the dense form keeps W + B A of all experts, the others an s
    stack, s = STACK_BYTES * dtype.itemsize, 48 * 8 * dtype.itemsize
    saved = {name: row["saved_bytes"] for name, row in rows.items()}
    assert (saved["frozen"], saved["ours"], saved["split_best"]) == (0, s, s)
    assert saved["peft"] >= stack
    assert saved["peft_once"] >= stack
    shown = printed(tables.case_table(case))
    assert "5 experts, 2 a token: 48 x 40 x 56" in shown
    assert "lora_kernels [torch]" in shown


def test_the_kernels_are_right_as_well():
    shape = dataclasses.replace(SHAPE, m=18, k=24)
    chosen = settings(backend="triton", only=("ours",), passes=())
    row = grouped_case.run_case(shape, 4, chosen)["providers"]["ours"]
    assert row["reason"] == ""
    assert row["check"]["rule"] == "numerics rules 1 and 2"
    assert row["label"] == "lora_kernels [triton]"
    assert row["model"]["launches"] == 5


def off(which):
    def change(provider):
        place = list(provider.leaves).index(which)

        class Off(Provider):
            def backward(self, ys, dys=None):
                return tuple(g * (1.001 if i == place else 1) for i, g in enumerate(super().backward(ys, dys)))

        return Off(**{f.name: getattr(provider, f.name) for f in dataclasses.fields(provider)})

    return change


def with_forward(change):
    return lambda provider: dataclasses.replace(provider, forward=lambda: change(provider.forward()))


def of_other_groups(provider):
    """The same layer with the first row of the second group given to the first."""
    problem = provider.problem
    offsets = problem.offsets.clone()
    offsets[1] += 1
    other = grouped_providers.build("ours", dataclasses.replace(problem, offsets=offsets))
    return dataclasses.replace(other, problem=problem)


BREAKS = {
    "y is off": (with_forward(lambda y: y * 1.001), "y"),
    "y has a NaN": (with_forward(lambda y: y + math.nan), "y"),
    "dx is off": (off("dx"), "dx"),
    "dA is off": (off("d_lora_A[0]"), "d_lora_A[0]"),
    "dB is off": (off("d_lora_B[0]"), "d_lora_B[0]"),
    "a row of another group": (of_other_groups, "y"),
}


@pytest.mark.parametrize("name", ["ours", "split"])
@pytest.mark.parametrize("what", BREAKS)
def test_no_time_for_a_wrong_result(what, name):
    breaks, said = BREAKS[what]

    def build(asked, problem, backend):
        provider = grouped_providers.build(asked, problem, backend)
        return breaks(provider) if asked == name else provider

    only = ("frozen", "ours", "split", "peft")
    rows = grouped_case.run_case(SHAPE, 8, settings(only=only, passes=("both",)), build=build)["providers"]
    assert rows[name]["seconds"] == {}
    assert rows[name]["reason"].startswith("wrong result, not timed: ")
    assert said in rows[name]["reason"]
    assert rows["peft"]["seconds"]


def test_stacks_in_rotated_buffers(monkeypatch):
    monkeypatch.setattr(timing, "_MOST_COPIES", 3)
    built = []

    def build(name, problem, backend):
        built.append((name, problem.x.data_ptr(), problem.weight.data_ptr(), problem.lora_Bs[0].data_ptr()))
        return grouped_providers.build(name, problem, backend)

    case = grouped_case.run_case(SHAPE, 8, settings(cache="rotate", only=("frozen", "ours")), build=build)
    assert case["copies"] == 3
    assert len({place for place in built if place[0] == "ours"}) == 3
    assert case["providers"]["ours"]["seconds"]


# --- sizes and costs


def test_every_token_goes_to_top_k_experts():
    problem = grouped_case.draw(SHAPE, 8, settings())
    assert sum(problem.sizes) == SHAPE.m == problem.offsets[-1]
    assert max(problem.sizes) <= SHAPE.m // SHAPE.top_k
    assert problem.offsets.diff().tolist() == list(problem.sizes)
    size = grouped_case.size_of(problem)
    assert size.w == problem.weight.nbytes
    assert (size.a, size.b) == (problem.lora_As[0].nbytes, problem.lora_Bs[0].nbytes)


def test_published_models_have_the_costs_of_the_roofline():
    of_model = {"mixtral-8x7b": (2, 8, 4096, 14336), "qwen3-30b-a3b": (8, 128, 2048, 768),
                "gpt-oss-20b": (4, 32, 2880, 2880)}  # fmt: skip
    for name, (top_k, count, hidden, inner) in of_model.items():
        stacks = PRESETS[name].experts
        assert {(s.experts, s.top_k) for s in stacks} == {(count, top_k)}
        made = tuple(grouped_cost.GroupSize(s.m, s.k, s.n, 16, 2, 0, s.experts) for s in stacks)
        assert made == grouped_cost.experts(8192, top_k, count, hidden, inner, 16)
        assert estimate.flops("experts", stacks[0], 16) == sum(grouped_cost.flops("ours", made[0]))


@pytest.mark.parametrize("name", ["frozen", "ours", "peft", "peft_once", "split", "split_best"])
def test_the_pytest_suite_admits_every_form_with_its_costs(name):
    options = subjects.Options(Shape(48, 40, 56), 4, 0.0, settings())
    admitted = subjects.SUBJECTS["grouped"](options)(name)
    facts = admitted.facts("both", options)
    assert facts["shape"] == "48x40x56 of 8 experts"
    assert facts["flops"] > 0
    assert facts["bytes"] is None or facts["bytes"] > 0
    json.dumps(facts, allow_nan=False)


# --- the command


def test_the_command_times_experts(tmp_path, capsys):
    file = tmp_path / "b.json"
    assert bench.run(arguments("--quick", "--block", "experts", "--r", 4, "--pass", "both", "--json", file)) == 0
    written = json.loads(file.read_text())
    assert (written["level"], written["preset"], written["complete"]) == ("experts", "quick", True)
    assert [case["shape"]["label"] for case in written["cases"]] == ["gate and up", "down"]
    assert {(case["p"], case["shape"]["experts"]) for case in written["cases"]} == {(0.0, 4)}
    assert written["speedups"]["split"]["cases"] == 2
    assert "4 experts, 2 a token: 64 x 64 x 96 (gate and up)" in capsys.readouterr().out


def test_experts_beside_other_blocks_are_without_dropout():
    cases = bench._cases(arguments("--quick", "--block", "qkv", "experts", "--m", 8, "--p", 0, 0.1))
    assert [(level, subject.m, p) for level, subject, _, p in cases] == [
        ("qkv", 8, 0.0), ("qkv", 8, 0.1), ("experts", 16, 0.0), ("experts", 16, 0.0)
    ]  # fmt: skip
    assert set(levels.names("experts", settings(torch.bfloat16), 4)) == set(grouped_providers.PROVIDERS)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--block", "experts", "--shape", "8x8x8"), "takes a --preset that has experts: cpu, tiny, quick, mixtral-8x7b"),
        (("--block", "experts", "--preset", "llama-8b"), "takes a --preset that has experts"),
        (("--block", "experts", "--quick", "--p", 0.1), "--p 0.1: experts have no dropout"),
        (("--block", "experts", "--quick", "--quantise", "nf4"), "not of --block experts"),
        (("--block", "experts", "--quick", "--providers", "addmm"), "--providers addmm: --block experts has frozen, ours,"),
        (("--preset", "gpt-oss-20b"), "--preset gpt-oss-20b has experts alone, so it goes with --block experts"),
        (("--block", "qkv", "experts", "--preset", "gpt-oss-20b"), "has experts alone"),
    ],
)  # fmt: skip
def test_what_experts_do_not_have_is_refused(argv, message, capsys):
    assert bench.run(arguments(*argv)) == 2
    assert message in capsys.readouterr().err
