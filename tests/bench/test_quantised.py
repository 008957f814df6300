"""`bench --quantise`: bytes by arithmetic, providers that read one stored weight, and no time for a wrong result."""

import copy
import importlib.util
import json

import pytest
import torch
from bench_samples import arguments, settings

from bench import roofline
from lora_kernels import reference, torch_backend
from lora_kernels.bench.cases import block as block_case
from lora_kernels.bench.cases import layer as layer_case
from lora_kernels.bench.cases import model as model_case
from lora_kernels.bench.cost import block as block_cost
from lora_kernels.bench.cost import layer as layer_cost
from lora_kernels.bench.cost import stored as stored_cost
from lora_kernels.bench.cost import traffic
from lora_kernels.bench.providers import llama, quantised, unsloth
from lora_kernels.cli import bench
from lora_kernels.measure.presets import MODELS, Dims, HostedDims, Shape
from lora_kernels.quantized import layers as quantized_layers
from lora_kernels.verify.stored import quantise

HAS_BITSANDBYTES = all(importlib.util.find_spec(name) for name in ("bitsandbytes", "peft", "transformers"))
needs_bitsandbytes = pytest.mark.skipif(not HAS_BITSANDBYTES, reason="needs bitsandbytes, PEFT and transformers")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
SHAPES = {"layer": Shape(48, 40, 36), "qkv": Shape(48, 40, 36, others=(12, 20)), "mlp": Shape(48, 40, 56)}
TINY = HostedDims(32, 4, 2, 48, vocab=64, layers=2, batch=2, seq=16, name="tiny")
MIB = 2**20

# --- arithmetic


def test_bytes_of_a_weight_of_nf4():
    # 0.5 + 1/64 + 4/(64 * 256) read, 2 written
    assert stored_cost.launches("nf4", 4096, 4096) == (4096**2 * 2 + 4096**2 // 2 + 4096**2 // 64 + 4096**2 // 4096,)
    assert round(stored_cost.launches("nf4", 4096, 4096, element=0)[0] / 4096**2, 3) == 0.516


@pytest.mark.parametrize(
    ("kind", "by", "nested", "element", "launches"),
    [
        # 3 x 100 = 300 weights: 150 bytes, 5 scales, 1 scale of theirs
        ("nf4", "ours", True, 2, (150 + 5 + 4 + 600,)), ("fp4", "ours", False, 2, (150 + 20 + 600,)),
        ("nf4", "bitsandbytes", True, 2, (5 + 4 + 20, 40, 150 + 20 + 600)),
        ("nf4", "bitsandbytes", False, 4, (150 + 20 + 1200,)),
        ("fp8", "ours", False, 2, (300 + 4 + 600,)), ("int8", "ours", False, 2, (300 + 12 + 600,)),
        ("fp8", "operators", False, 2, (300 + 1200, 2400 + 4, 1200 + 600)),
        ("fp8", "operators", False, 4, (300 + 1200, 2400 + 4)),
    ],
)  # fmt: skip
def test_bytes_of_each_launch(kind, by, nested, element, launches):
    assert stored_cost.launches(kind, 3, 100, by, element, nested) == launches


@pytest.mark.parametrize(("kind", "how", "tables"), [
    # the 16 nibbles; nested: the 256 values of a scale and their mean
    ("nf4", dict(block=64, nested=True), 64 + 1024 + 4), ("nf4", dict(block=64), 64),
    ("fp8", dict(bits=8, block=(128, 128)), 0), ("int8", dict(bits=8, block=(1, 4096)), 0),
])  # fmt: skip
def test_one_launch_of_ours_moves_what_the_kernel_touches(kind, how, tables):
    moved = traffic.dequantize(1024, 4096, 2, **how)
    (launch,) = stored_cost.launches(kind, 1024, 4096, nested=how.get("nested", False))
    assert moved.touched + moved.stored == launch + tables


def test_both_passes_dequantise():
    cost = stored_cost.over(layer_cost.Cost((1, 2), (3,), (1, 3)), (10, 20))
    assert cost == layer_cost.Cost((10, 20, 1, 2), (10, 20, 3), (1, 3))


@pytest.mark.parametrize(
    ("block", "formula", "by", "mib"),
    [
        ("queries", "ours", "ours", 768), ("queries", "peft", "bitsandbytes", 3307), ("queries", "unsloth", "bitsandbytes", 2381),
        ("gated", "ours", "ours", 5111), ("gated", "peft", "bitsandbytes", 13899), ("gated", "unsloth", "bitsandbytes", 9742),
    ],
)  # fmt: skip
def test_bytes_of_llama_8b_s_blocks_over_nf4(block, formula, by, mib):
    (sizes,) = (make(2) for title, make in roofline.BLOCKS.items() if title.startswith(block))
    cost = roofline.quantised_cost(sizes, formula, by, dropout=False)
    assert round(cost.total / MIB) == mib
    if formula == "ours":
        # of the issue
        assert mib <= {"queries": 770, "gated": 5120}[block]
        dense = block_cost.COSTS["ours"](sizes, False)
        # one launch a weight and pass
        assert cost.launches == dense.launches + 2 * len(sizes.layers)
        weights = sum(z.n * z.k for z in sizes.layers)
        assert cost.total - dense.total == 2 * sum(stored_cost.launches("nf4", z.n, z.k)[0] for z in sizes.layers)
        assert (cost.total - dense.total) / (2 * weights) == pytest.approx(2.516, abs=5e-4)


# --- providers


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_reads_the_stored_weight(kind, nested):
    weight = quantise(torch.randn(40, 96, generator=torch.Generator().manual_seed(0)), kind, nested=nested)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(quantised.dequantiser(weight, dtype)(), reference.dequantize(weight, dtype))
    layer = quantised.linear4bit(weight, torch.ones(40))
    assert torch.equal(layer(torch.eye(96)).t(), reference.dequantize(weight, torch.float32) + 1)
    (packed,) = (p for p in layer.parameters() if p.dtype == torch.uint8)
    assert packed.data_ptr() == weight.packed.data_ptr()


@pytest.mark.parametrize("shape", [(32, 48), (33, 50)])
def test_operators_read_fp8(shape):
    weight = quantise(torch.randn(shape, generator=torch.Generator().manual_seed(0)), "fp8", block=16)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(quantised.dequantiser(weight, dtype)(), reference.dequantize(weight, dtype))
    with pytest.raises(ValueError, match="Linear4bit holds nf4 and fp4, not fp8"):
        quantised.linear4bit(weight)


def run(what, dtype, p, **more):
    chosen = settings(dtype, **more)
    if what == "layer":
        return layer_case.run_case(SHAPES[what], 8, p, chosen)
    return block_case.run_case(what, SHAPES[what], 8, p, chosen)


@needs_bitsandbytes
@pytest.mark.parametrize("what", SHAPES)
@pytest.mark.parametrize(("dtype", "p"), [(torch.float32, 0.0), (torch.bfloat16, 0.1)])
def test_every_provider_is_right_and_timed(what, dtype, p):
    case = run(what, dtype, p, quantise="nf4")
    rows = case["providers"]
    names = {"frozen", "ours", "peft", "addmm", "unsloth"} | ({"per_layer"} if what != "layer" else set())
    assert set(rows) == names | ({"ours_fp32", "peft_fp32"} if dtype == torch.bfloat16 else set())
    assert case["quantise"] == "nf4"
    words = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    assert rows["peft"]["label"] == f"PEFT over bitsandbytes {words}"
    assert rows["addmm"]["label"] == "dequantise + addmm chain"
    if p:
        assert rows.pop("unsloth")["reason"] == "ValueError: Unsloth's order of calls: it has no dropout"
    for row in rows.values():
        assert row["reason"] == ""
        assert row["check"]["ok"]
        assert set(row["seconds"]) == {"forward", "backward", "both"}
    # the packed tensors are parameters, and no dense W is kept from forward to backward
    dense = SHAPES[what].n * SHAPES[what].k * dtype.itemsize
    plain = run(what, dtype, p, passes=(), only=("ours",))["providers"]["ours"]
    assert rows["ours"]["saved_bytes"] == plain["saved_bytes"]
    assert rows["ours"]["saved_bytes"] < plain["saved_bytes"] + dense


@pytest.mark.parametrize("what", SHAPES)
def test_fp8(what):
    case = run(what, torch.bfloat16, 0.0, quantise="fp8", passes=())
    names = {"frozen", "ours", "ours_fp32", "addmm"} | ({"per_layer"} if what != "layer" else set())
    assert set(case["providers"]) == names
    assert all(row["check"]["ok"] for row in case["providers"].values())


@needs_bitsandbytes
@pytest.mark.parametrize("what", SHAPES)
def test_moved_bytes_have_the_dequantisation(what):
    """Of each chain the bytes of a dense case, and those of the launches that dequantise, forward and backward."""
    chosen, plain = ({"passes": (), "only": ("frozen", "addmm", "unsloth")[: 3 if kind else 2]} for kind in ("nf4", ""))
    rows = run(what, torch.bfloat16, 0.0, quantise="nf4", **chosen)["providers"]
    dense = run(what, torch.bfloat16, 0.0, **plain)["providers"]
    assert rows["frozen"]["model"] == dense["frozen"]["model"]
    sides = {"layer": [(36, 40)], "qkv": [(36, 40), (12, 40), (20, 40)], "mlp": [(56, 40), (56, 40), (40, 56)]}[what]
    made = sum(sum(stored_cost.launches("nf4", n, k, "bitsandbytes")) for n, k in sides)
    for which in ("forward_bytes", "backward_bytes"):
        assert rows["addmm"]["model"][which] == dense["addmm"]["model"][which] + made
    assert rows["addmm"]["model"]["launches"] == dense["addmm"]["model"]["launches"] + 6 * len(sides)


@pytest.mark.parametrize("what", SHAPES)
def test_no_time_for_a_wrong_dequantisation(what, monkeypatch):
    real = torch_backend.dequantize
    monkeypatch.setattr(torch_backend, "dequantize", lambda *args, **named: real(*args, **named) * 1.01)
    row = run(what, torch.float32, 0.0, quantise="fp8", only=("ours",))["providers"]["ours"]
    assert row["reason"].startswith("wrong result, not timed")
    assert not row["seconds"]


def test_no_time_for_a_wrong_peer(monkeypatch):
    real = quantised._multiply_blocks
    monkeypatch.setattr(quantised, "_multiply_blocks", lambda weight, dtype: real(weight, dtype) * 1.01)
    row = run("layer", torch.float32, 0.0, quantise="fp8", only=("addmm",))["providers"]["addmm"]
    assert row["reason"].startswith("wrong result, not timed")


@needs_bitsandbytes
@pytest.mark.parametrize("what", SHAPES)
def test_unsloth_s_order_dequantises_in_both_passes_and_keeps_no_s(what, monkeypatch):
    made = []
    real = quantised.dequantiser

    def count(weight, dtype):
        make = real(weight, dtype)
        return lambda: made.append(1) or make()

    monkeypatch.setattr(unsloth, "dequantiser", count)
    row = run(what, torch.float32, 0.0, quantise="nf4", only=("unsloth",), passes=())["providers"]["unsloth"]
    assert row["check"]["ok"]
    # checked and weighed: three times forward, twice backward
    assert len(made) == 5 * (1 if what == "layer" else 3)
    # g and u of an MLP alone
    assert row["saved_bytes"] == (2 * 48 * 56 * 4 if what == "mlp" else 0)


def test_copies_have_their_own_stored_weights():
    chosen = settings(quantise="nf4")
    for problem, clone in (
        (layer_case.draw(SHAPES["layer"], 8, 0.0, chosen), layer_case.clone),
        (block_case.draw("mlp", SHAPES["mlp"], 8, 0.0, chosen), block_case.clone),
    ):
        other = clone(problem)
        assert [*other.stored] == [*problem.stored]
        for name, weight in problem.stored.items():
            for a, b in zip(weight.tensors(), other.stored[name].tensors(), strict=True):
                assert torch.equal(a, b)
                assert a.data_ptr() != b.data_ptr()


# --- models


@needs_bitsandbytes
def test_a_model_s_dense_weights_are_the_stored_ones():
    base = llama.LanguageModel(TINY).requires_grad_(False)
    before = copy.deepcopy(base)
    model = llama.store(base, "nf4")
    kept = {name: m for name, m in model.named_modules() if quantized_layers.kind_of(m)}
    assert [*kept] == [*llama.projections(base)]
    for name, layer in kept.items():
        w = base.get_submodule(name).weight
        assert torch.equal(quantized_layers.read(layer).dequantize(torch.float32), w)
        assert not torch.equal(w, before.get_submodule(name).weight)
    assert model.head.weight is base.head.weight
    assert len(llama.stored_tensors(model)) == 6 * len(kept)


@needs_bitsandbytes
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_the_command_times_stock_and_patched_over_nf4(p, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", TINY)
    file = tmp_path / "m.json"
    assert bench.run(arguments("--model", "tiny", "--quantise", "nf4", "--r", 4, "--p", p, "--json", file)) == 0
    shown, written = " ".join(capsys.readouterr().out.split()), json.loads(file.read_text())
    (case,) = written["cases"]
    assert (written["quantise"], case["quantise"]) == ("nf4", "nf4")
    assert {name: row["label"] for name, row in case["providers"].items()} == {
        "frozen": "frozen dense model", "ours": "patched PEFT fp32 [torch]", "peft": "PEFT over bitsandbytes fp32",
    }  # fmt: skip
    for row in case["providers"].values():
        assert row["check"]["ok"]
        assert row["seconds"]["both"]["tokens_per_second"] > 0
    assert case["providers"]["ours"]["saved_bytes"] < case["providers"]["peft"]["saved_bytes"]
    assert "float32 over NF4" in shown


@needs_bitsandbytes
def test_the_patched_model_is_fused_and_joined_and_a_wrong_one_is_not_timed(monkeypatch):
    chosen = settings(quantise="nf4")
    trial = model_case.Bench(TINY, 4, 0.0, chosen, True)
    reports = []
    real_patch = llama.patch_peft
    monkeypatch.setattr(llama, "patch_peft", lambda model: reports.append(real_patch(model)))
    trial.trial("ours")
    shown = str(reports[0])
    assert "14 fused, 0 low-rank, 0 stock" in shown
    assert "4 joined, 0 per layer" in shown
    real = torch_backend.dequantize
    monkeypatch.setattr(torch_backend, "dequantize", lambda *args, **named: real(*args, **named) * 1.02)
    row = model_case.run_case(TINY, 4, 0.0, settings(quantise="nf4", only=("ours",)), whole=True)["providers"]["ours"]
    assert row["reason"].startswith("wrong result, not timed")


@needs_bitsandbytes
def test_blocks_of_a_decoder_layer_over_fp4():
    dims = Dims(32, 4, 2, 48, vocab=64, layers=2, batch=2, seq=16)
    case = model_case.run_case(dims, 4, 0.0, settings(quantise="fp4", passes=(), targets=("q", "v", "up")))
    for name in ("ours", "per_layer", "peft"):
        assert case["providers"][name]["check"]["ok"], case["providers"][name]["reason"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--level", "kernel", "--quantise", "nf4"), "--quantise: of layers, blocks and models, not of --level kernel"),
        (("--model", "tiny", "--quantise", "fp8"), "--quantise fp8: of layers, --block qkv and mlp"),
        (
            ("--quantise", "fp8", "--providers", "peft"),
            "--providers peft: --level layer --quantise fp8 has frozen, ours",
        ),
        (("--providers", "unsloth"), "--providers unsloth: --level layer has frozen, ours"),
        (("--block", "qkv", "--preset", "quick", "--providers", "unsloth"), "--block qkv has frozen, ours"),
    ],
)
def test_what_cannot_be_quantised_is_refused(argv, message, capsys):
    assert bench.run(arguments(*argv)) == 2
    assert message in capsys.readouterr().err


def test_a_model_needs_bitsandbytes(monkeypatch, capsys):
    real = importlib.import_module

    def without(name, *args):
        if name.startswith("bitsandbytes"):
            raise ImportError("No module named 'bitsandbytes'")
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", without)
    assert bench.run(arguments("--model", "tiny", "--quantise", "nf4")) == 2
    assert "--quantise nf4 needs bitsandbytes: pip install bitsandbytes" in capsys.readouterr().err
    row = run("layer", torch.float32, 0.0, quantise="nf4", only=("addmm",))["providers"]["addmm"]
    assert row["reason"] == "ImportError: No module named 'bitsandbytes'"
