"""The other levels of the benchmark: single launches, a decoder layer, a small model; and buffers in turn."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from bench_samples import SHAPE, printed, sample_launch, sample_model, settings

from lora_kernels import torch_backend
from lora_kernels.bench.cases import kernel as kernel_case
from lora_kernels.bench.cases import layer as layer_case
from lora_kernels.bench.cases import model as model_case
from lora_kernels.bench.cases.kernel import LAUNCHES, Sum, share_used
from lora_kernels.bench.cost import layer as layer_cost
from lora_kernels.bench.providers import llama
from lora_kernels.bench.show import levels as level_tables
from lora_kernels.measure import timing
from lora_kernels.measure.presets import PRESETS, with_tokens

TINY = PRESETS["quick"].model

# --- single launches


def test_a_launch_beside_the_library_s_product_alone():
    """Ours over it is what `plan.model` assumes of the slowdown."""
    case = sample_launch(ours=2e-3)
    case["providers"]["base"] = sample_launch(ours=1.6e-3)["providers"]["ours"]
    row = dict(zip(level_tables.KERNEL_HEADING, level_tables.kernel_row(case), strict=True))
    assert (row["base ms"], row["ours / base"], row["operators / ours"]) == ("1.600 ±0%", "1.250", "1.500")


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(
    ("dtype", "backend"), [(torch.float32, "torch"), (torch.bfloat16, "torch"), (torch.float32, "triton")]
)
def test_every_launch_is_right_and_timed(dtype, backend, p):
    cases = kernel_case.run_case(SHAPE, 4, p, settings(dtype, backend=backend))
    assert [case["launch"] for case in cases] == list(LAUNCHES)
    for case in cases:
        with_base = case["launch"] in ("y", "dx")
        assert set(case["providers"]) == {"ours", "operators"} | ({"base"} if with_base else set())
        for name, row in case["providers"].items():
            assert row["reason"] == ""
            assert 0 < row["check"]["worst"] <= 1
            taken = row["seconds"]["forward"]
            assert taken["n"] == 2
            assert taken["bytes_per_second"] == case["bytes"] / taken["median"]
            flops = case["flops"] if name != "base" else 2 * 48 * 64 * 40
            assert taken["flops_per_second"] == flops / taken["median"]
    size = layer_cost.Size(48, 64, 40, 4, dtype.itemsize)
    assert sum(case["bytes"] for case in cases) == layer_cost.COSTS["triton"](size, p > 0).total
    assert sum(case["flops"] for case in cases) == sum(layer_cost.flops(48, 64, 40, 4))


def off(name, change):
    """A contraction of the torch backend with something wrong in it."""
    right = getattr(torch_backend, name)
    return name, lambda *args, **kwargs: change(right, *args, **kwargs)


WRONG = {
    "s": off("shrink", lambda f, x, a, alpha, p=0.0: (f(x, a, alpha, p)[0] * (1.001 if p else 1), f(x, a, 1, p)[1])),
    "s, a share of": off("shrink", lambda f, x, a, alpha, p=0.0: f(x, a, alpha, min(2 * p, 0.9))),
    "y": off(
        "matmul_expand", lambda f, sources, *a, **k: f(sources[:1] if k.get("keep") is None else sources, *a, **k)
    ),
    "ds, dB": off("shrink_wgrad", lambda f, *a: (f(*a)[0], f(*a)[1] * 1.001)),
    "dx": off("matmul_expand", lambda f, sources, *a, keep=None: f(sources, *a)),
    "dA": off("wgrad", lambda f, left, right, dtype, keep=None, **k: f(left, right, dtype, **k)),
}


@pytest.mark.parametrize("what", WRONG)
def test_no_time_for_a_wrong_launch(what, monkeypatch):
    monkeypatch.setattr(torch_backend, *WRONG[what])
    cases = {case["launch"]: case for case in kernel_case.run_case(SHAPE, 4, 0.1, settings())}
    name = what.partition(", a share")[0]
    row = cases[name]["providers"]["ours"]
    assert row["seconds"] == {}
    assert row["reason"].startswith("wrong result, not timed: ")
    assert cases[name]["providers"]["operators"]["seconds"]
    assert "not timed" in printed(level_tables.kernel_table(list(cases.values())))
    others = [case for launch, case in cases.items() if launch != name]
    assert all(case["providers"]["ours"]["seconds"] for case in others)


@pytest.mark.parametrize(
    ("ulps", "fused", "ok"), [(6, True, True), (7, True, False), (7, False, True), (8, False, False)]
)
def test_an_element_may_be_off_by_its_sum_and_its_roundings(ulps, fused, ok):
    """1 = 4 · 1/4: 12 u of the sum and 1 u of the result, times 1.05, and 1 u of the term itself where it is stored."""
    one = Sum(((torch.ones(1, 4), torch.full((4, 1), 0.25)),))
    used = share_used(torch.tensor([[1 + ulps * 2**-23]]), one, fused, dropped=False)
    assert used == pytest.approx(2 * ulps / 1.05 / (13 if fused else 14))
    assert (used <= 1) == ok
    assert share_used(torch.tensor([[float("nan")]]), one, fused, dropped=False) == float("inf")


def test_a_packed_mask_unpacks_to_the_bool_one():
    packed = torch.tensor([[0b110000001]], dtype=torch.int32)
    assert kernel_case.unpack_mask(packed, 10).tolist() == [[True, *[False] * 6, True, True, False]]


# --- buffers in turn


@pytest.mark.slow
@pytest.mark.usefixtures("no_peft")
def test_rotated_providers_read_their_own_copies(monkeypatch):
    monkeypatch.setattr(timing, "_MOST_COPIES", 3)
    built = []

    def build(name, problem, backend):
        built.append((name, problem.x.data_ptr()))
        return layer_case.providers.build(name, problem, backend)

    case = layer_case.run_case(
        SHAPE, 4, 0.1, settings(cache="rotate", build=build, only=("frozen", "ours", "peft_compiled"))
    )
    rows = case["providers"]
    assert case["copies"] == 3
    assert len({pointer for name, pointer in built if name == "ours"}) == 3
    assert {pointer for name, pointer in built if name == "ours"} == {p for name, p in built if name == "frozen"}
    assert rows["ours"]["seconds"]["both"]["n"] == 2
    assert rows["peft_compiled"]["seconds"] == {}
    assert {case["copies"] for case in kernel_case.run_case(SHAPE, 4, 0.0, settings(cache="rotate"))} == {3}


# --- models


@pytest.mark.slow
@pytest.mark.usefixtures("no_peft")
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("dtype", "p"), [(torch.float32, 0.0), (torch.bfloat16, 0.1)])
def test_every_model_is_right_and_timed(dtype, p, whole):
    case = model_case.run_case(TINY, 4, p, settings(dtype), whole=whole)
    rows = case["providers"]
    half = dtype == torch.bfloat16
    assert set(rows) == {"frozen", "ours", "per_layer", "peft"} | ({"ours_fp32", "peft_fp32"} if half else set())
    assert (case["level"], case["tokens"]) == ("model" if whole else "decoder", 64)
    for row in rows.values():
        assert row["reason"] == ""
        assert row["check"]["ok"]
        assert 0 < row["check"]["worst"] <= 1
        assert set(row["seconds"]) == set(timing.PASSES)
        taken = row["seconds"]["both"]
        assert taken["tokens_per_second"] == 64 / taken["median"]
        assert row["peak_bytes"] > row["saved_bytes"]
    assert rows["frozen"]["seconds"]["both"]["to_floor"] == 1
    s = 7 * 64 * 4 * dtype.itemsize * (TINY.layers if whole else 1)  # of every projection
    assert rows["ours"]["saved_bytes"] >= rows["frozen"]["saved_bytes"] + s
    if p:
        assert rows["ours"]["saved_bytes"] < rows["peft"]["saved_bytes"] < rows["peft_fp32"]["saved_bytes"]
    assert rows["peft"]["label"].startswith("PEFT arithmetic")


def break_scaling(model, held):
    next(m for m in model.modules() if isinstance(m, llama.LoRALinear)).scaling *= 1.01


def break_dropout(model, held):
    for module in model.modules():
        if isinstance(module, llama.LoRALinear):
            module.lora_dropout = 0.5


def break_adapter(model, held):
    held["blocks.0.attention.v.B"].data.zero_()


BREAKS = {
    break_scaling: "has rms error", break_adapter: "has rms error", break_dropout: "dropout moves the output by"
}  # fmt: skip


@pytest.mark.usefixtures("no_peft")
@pytest.mark.parametrize("breaks", BREAKS)
def test_no_time_for_a_wrong_model(breaks, monkeypatch):
    def adapted(base, form, *args):
        model, held = llama.copy_with_adapters(base, form, *args)
        if form == "ours":
            breaks(model, held)
        return model, held

    monkeypatch.setattr(model_case, "copy_with_adapters", adapted)
    case = model_case.run_case(TINY, 4, 0.1, settings(only=("frozen", "ours", "peft")))
    row = case["providers"]["ours"]
    assert row["seconds"] == {}
    assert "wrong result, not timed" in row["reason"]
    assert BREAKS[breaks] in row["reason"]
    assert case["providers"]["peft"]["seconds"]
    assert "not timed" in printed(level_tables.model_table(case))


@pytest.mark.usefixtures("no_peft")
@pytest.mark.parametrize("whole", [False, True])
def test_a_training_step_moves_the_adapters_and_nothing_else(whole):
    bench = model_case.Bench(TINY, 4, 0.0, settings(), whole)
    frozen = [t.clone() for t in bench.base.parameters()]
    trial = bench.trial("ours")
    before = {name: t.detach().clone() for name, t in trial.leaves.items()}
    gradients = trial.backward(trial.forward())
    assert len(gradients) == 1 + 2 * 7 * (TINY.layers if whole else 1)
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    moved = {name for name, t in trial.leaves.items() if not torch.equal(t, before[name])}
    assert moved == (set(before) - {"dx"} if whole else set())
    assert all(map(torch.equal, bench.base.parameters(), frozen))
    other = bench.trial("peft")
    assert all(torch.equal(other.leaves[name], before[name]) for name in before)  # adapters of its own
    weights = {t.data_ptr() for t in bench.base.parameters()}
    for model in (trial.model, other.model):  # and the frozen weights of all
        assert {t.data_ptr() for t in model.parameters() if not t.requires_grad} == weights


def test_a_model_by_peft_itself():
    if importlib.util.find_spec("peft") is None:
        pytest.skip("PEFT is not installed")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that PEFT imports
        rows = model_case.run_case(TINY, 4, 0.1, settings(torch.bfloat16, only=("peft", "peft_fp32")))["providers"]
    assert {row["label"] for row in rows.values()} == {"PEFT bf16", "PEFT fp32"}
    assert all(row["reason"] == "" and row["seconds"] for row in rows.values())


def test_the_layer_is_that_of_llama_8b():
    with torch.device("meta"):
        layer = llama.Stack(PRESETS["llama-8b"].model)
    assert sum(t.numel() for t in layer.parameters()) == 218_112_000
    assert len(llama.projections(layer)) == 7


def test_attention_is_causal_and_knows_distances():
    torch.manual_seed(0)
    layer = llama.Stack(TINY).double()
    x = torch.randn(1, TINY.seq, TINY.hidden, dtype=torch.float64)
    later = x.clone()
    later[:, 9:] = 0
    assert torch.equal(layer(x)[:, :9], layer(later)[:, :9])
    q, k = torch.randn(2, 1, TINY.head_dim, dtype=torch.float64)

    def score(i, j):
        q_i, k_j = (llama._rotate(t, layer.cos[n], layer.sin[n]) for t, n in ((q, i), (k, j)))
        return (q_i * k_j).sum()

    assert torch.allclose(score(5, 3), score(20, 18), rtol=1e-6)
    assert not torch.allclose(score(5, 3), score(5, 4), rtol=1e-3)


def test_tokens_are_whole_sequences():
    dims = PRESETS["llama-8b"].model
    assert (with_tokens(dims, 16384).batch, with_tokens(dims, 16384).seq) == (8, 2048)
    assert (with_tokens(dims, 512).batch, with_tokens(dims, 512).seq) == (1, 512)
    with pytest.raises(ValueError, match="whole sequences of 2048"):
        with_tokens(dims, 3000)


# --- tables


def test_tables_of_launches_and_models():
    text = printed(level_tables.kernel_table([sample_launch()]))
    assert "1.500" in text
    assert "single launches: lora_kernels [triton] beside" in text
    assert "4000" in text
    text = printed(level_tables.model_table(sample_model("model")))
    assert "training step ms" in text
    assert "2 layers, vocabulary 128" in text
    assert " 32000 " in text
    one = sample_model("model")
    one["model"]["layers"] = 1
    assert "1 layer, vocabulary 128" in printed(level_tables.model_table(one))
    assert str(replace(TINY, layers=1)).endswith(", 1 layer")
