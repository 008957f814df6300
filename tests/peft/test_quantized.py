"""PEFT models over 4-bit and FP8 layers: fused and joined, with stock's losses, files and text."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")
bnb = pytest.importorskip("bitsandbytes")

from llama_samples import tokens, train  # noqa: E402
from peft import PeftModel, prepare_model_for_kbit_training  # noqa: E402
from stored_samples import four_bits, fp8, quantised, quantised_llama  # noqa: E402

from lora_kernels import patch_peft, reference, unpatch_peft  # noqa: E402
from lora_kernels.peft import explain  # noqa: E402

# transformers warns of its own names, and PEFT looks for a configuration and warns of rounding
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*config.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*rounding errors:UserWarning", "ignore:.*use_reentrant:UserWarning"),
]


def pair(*arguments, prepare=False, **how):
    """A stock model and its patched copy."""
    stock = quantised_llama(*arguments, **how)
    if prepare:
        stock = prepare_model_for_kbit_training(stock)
        for name, p in stock.named_parameters():
            p.requires_grad_("lora_" in name)
    patched = copy.deepcopy(stock)
    found = patch_peft(patched)
    kind = how.get("quant_type", "nf4").upper()
    assert str(found) == (
        f"14 LoRA layers: 14 fused, 0 low-rank, 0 stock\n  14 fused ({kind}, dequantised a pass)\n"
        "4 blocks: 4 joined, 0 per layer"
    )
    return stock, patched


def outcome(model, autocast=None, seed=3):
    """Logits, and the gradient of each adapter."""
    model.zero_grad()
    torch.manual_seed(seed)
    ids = tokens()[0]
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    return {"logits": out.logits.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def near(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, t in found.items():
        assert t.dtype == expected[name].dtype, name
        other = expected[name].float()
        assert (t.float() - other).norm() <= tolerance * other.norm(), name


@pytest.mark.parametrize(
    "how",
    [
        dict(), dict(quant_type="fp4"), dict(nested=False), dict(blocksize=128), dict(storage=torch.bfloat16),
        dict(storage=torch.float32),
    ],
    ids=str,
)  # fmt: skip
def test_the_numbers_of_stock(how):
    stock, patched = pair(torch.float32, **how)
    near(outcome(patched), outcome(stock), 1e-5)


def test_twenty_steps_give_the_losses_of_stock():
    stock, patched = pair()
    expected, found = train(stock, steps=20), train(patched, steps=20)
    assert expected[-1] < expected[0] - 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("how", "autocast", "prepare"),
    [(dict(dtype=torch.bfloat16), None, False), (dict(dtype=torch.bfloat16), torch.bfloat16, True),
     (dict(), torch.bfloat16, False)],
    ids=["bf16", "prepared, autocast", "fp32 under autocast"],
)  # fmt: skip
def test_sixteen_bits_are_as_exact_as_stock(how, autocast, prepare):
    """Against fp32 over the same W, ours is no further off than stock, and both return one dtype."""
    stock, patched = pair(**how, prepare=prepare)
    if prepare:
        stock.train(), patched.train()
    exact = copy.deepcopy(stock).float()
    for module in exact.modules():
        if isinstance(getattr(module, "base_layer", None), bnb.nn.Linear4bit):
            module.base_layer.compute_dtype = torch.float32
    truth, ours, theirs = outcome(exact), outcome(patched, autocast), outcome(stock, autocast)

    def off(found):
        return {n: ((t.float() - truth[n].float()).norm() / truth[n].float().norm()).item() for n, t in found.items()}

    mine, yours = off(ours), off(theirs)
    assert {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in theirs.items()}
    assert max(mine.values()) < 0.06
    assert sum(mine.values()) < 1.5 * sum(yours.values())


def test_checkpointing_and_dropout():
    """Masks differ from stock's, so the same layers patched without checkpointing are the measure."""
    _, patched = pair(lora=dict(lora_dropout=0.2))
    expected = outcome(patched.train())
    patched.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    patched.enable_input_require_grads()
    near(outcome(patched), expected, 1e-5)


def test_generation_saving_merging_and_the_way_back(tmp_path):
    stock, patched = pair()
    stock.eval(), patched.eval()
    ids, how = tokens()[0][:1, :5], dict(max_new_tokens=8, do_sample=False)
    assert torch.equal(stock.generate(input_ids=ids, **how), patched.generate(input_ids=ids, **how))
    expected = stock(input_ids=ids).logits
    patched.save_pretrained(tmp_path)
    torch.manual_seed(0)
    from llama_samples import llama

    loaded = PeftModel.from_pretrained(quantised(llama()), tmp_path)
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected)
    once = copy.deepcopy(patched)
    assert unpatch_peft(once) == 14
    assert torch.equal(once(input_ids=ids).logits, expected)
    merged, stock_merged = patched.merge_and_unload(), stock.merge_and_unload()
    assert torch.equal(merged(input_ids=ids).logits, stock_merged(input_ids=ids).logits)


def test_few_rows_without_gradients_go_to_the_layers_own_kernel(computed):
    _, patched = pair()
    patched.eval()
    ids = tokens()[0]
    with torch.no_grad():
        patched(input_ids=ids[:1, :8])
        assert set(computed) == {"lora_add"}
        computed.clear()
        patched(input_ids=ids[:, :16])  # 64 rows
    assert "lora_add" not in computed
    found = explain(patched, input_ids=ids[:1, :8])
    assert {(layer.form, layer.note) for layer in found.layers} == {("low-rank", "")}
    assert "a kernel of its own for fewer than 64 rows without gradients" in found.layers[0].reason


@pytest.mark.parametrize("block", [None, (16, 16), (8, 128)])
def test_fp8_layers_compute_with_the_dense_weight(block):
    """Their own forward quantises x as well and needs a GPU: held to the same model over the dense W."""
    model = quantised_llama(change=fp8, block=block)
    dense = copy.deepcopy(model)
    for module in dense.modules():
        if type(base := getattr(module, "base_layer", None)).__name__ == "FP8Linear":
            from lora_kernels.quantized import QuantizedWeight

            plain = nn.Linear(base.in_features, base.out_features, base.bias is not None)
            w = QuantizedWeight.from_fp8(base.weight, base.weight_scale_inv, base.block_size)
            plain.weight = nn.Parameter(reference.dequantize(w, torch.float32), requires_grad=False)
            plain.bias = base.bias
            module.base_layer = plain
    found = patch_peft(model)
    assert (found.count("fused"), found.count("joined")) == (14, 4)
    near(outcome(model), outcome(dense), 1e-5)


def test_a_plain_layer_beside_quantised_ones_joins_them():
    stock = quantised_llama(lora=dict(target_modules=["q_proj", "v_proj"]))
    patched = copy.deepcopy(stock)
    found = patch_peft(patched)
    assert (found.count("fused"), found.count("joined")) == (4, 2)
    near(outcome(patched), outcome(stock), 1e-5)
    for model in (stock, patched):
        for module in model.modules():
            if type(k := getattr(module, "k_proj", None)) is bnb.nn.Linear4bit:
                plain = nn.Linear(k.in_features, k.out_features)
                with torch.no_grad():
                    plain.weight.copy_(torch.arange(plain.weight.numel()).view_as(plain.weight).sin() / 6)
                    plain.bias.zero_()
                module.k_proj = plain.requires_grad_(False)
    near(outcome(patched), outcome(stock), 1e-5)
    assert {block.form for block in explain(patched).blocks} == {"joined"}


def _not_quantised(base):
    base.weight = bnb.nn.Params4bit(torch.randn(base.out_features, base.in_features), requires_grad=False)
    base.quant_state = None


def _list_state(base):
    base.weight.quant_state = [base.weight.quant_state]


def _packed_for_cpu(base):
    base.weight.quant_state.packing_format_for_cpu = True


def _turned(base):
    base.weight.quant_state.shape = torch.Size([base.in_features + 1, base.out_features])


def _other_blocks(base):
    base.weight.quant_state.state2.blocksize = 128


def _hook(base):
    base.register_forward_hook(lambda *_: None)


REFUSED = {
    "not quantised": (_not_quantised, "quant_state is None: the weight is not quantised yet"),
    "a list": (_list_state, "quant_state is a list, as bitsandbytes before 0.43 wrote"),
    "packed for a CPU": (_packed_for_cpu, "packed for a CPU's AVX512"),
    "another shape": (_turned, "quant_state.shape is (33, 32)"),
    "nested blocks": (_other_blocks, "nested.blocksize is 128; supported: 256"),
    "a hook": (_hook, "the base layer has a hook"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_called_with_the_reason(case):
    """And never raises: what it says is why the low-rank term is added to the layer's own result."""
    change, words = REFUSED[case]
    model = quantised_llama()
    base = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    change(base)
    found = patch_peft(model)
    (one,) = (layer for layer in found.layers if layer.form != "fused")
    assert one.form == "low-rank"
    assert words in one.reason
    (block,) = (block for block in found.blocks if block.form != "joined")
    assert f"q_proj is low-rank: {one.reason}" == block.reason


@pytest.mark.parametrize(
    ("compute", "x", "words"),
    [
        (torch.float32, torch.bfloat16, "the base layer computes in float32, and x is bfloat16"),
        (torch.float16, torch.bfloat16, "the base layer computes in float16, and x is bfloat16"),
    ],
    ids=str,
)
def test_compute_dtypes_that_no_pass_has_are_stocks(compute, x, words):
    stock = quantised_llama(dtype=x, compute_dtype=compute)
    patched = copy.deepcopy(stock)
    patch_peft(patched)
    near(outcome(patched), outcome(stock), 0.1)
    found = explain(patched, input_ids=tokens()[0])
    assert {layer.reason for layer in found.layers} == {words}


def test_the_low_rank_term_of_fp32_inputs_stays_in_fp32(computed):
    """Of a model that was prepared for k-bit training, outside autocast: as in stock, and the reason names the way."""
    stock, patched = pair(torch.bfloat16, prepare=True)
    stock.train(), patched.train()
    near(outcome(patched), outcome(stock), 1e-3)
    assert "lora_linear" not in computed
    found = explain(patched, input_ids=tokens()[0])
    words = "computes in bfloat16, and x is float32: inside torch.autocast one pass computes both"
    assert all(words in layer.reason for layer in found.layers)


def test_a_forward_of_the_class_that_others_set_runs(monkeypatch):
    stock = quantised_llama()
    patched = copy.deepcopy(stock)
    patch_peft(patched)
    plain = bnb.nn.Linear4bit.forward
    monkeypatch.setattr(bnb.nn.Linear4bit, "forward", lambda self, x: 2 * plain(self, x))
    near(outcome(patched), outcome(stock), 1e-5)
    assert "whose forward was replaced by" in explain(patched).layers[0].reason


def test_layers_of_other_kinds_are_low_rank():
    linear = nn.Linear(32, 32)
    assert type(four_bits(linear)).__name__ == "Linear4bit"
    from lora_kernels.peft.bases import quantized_base

    base = bnb.nn.Linear8bitLt(32, 32, has_fp16_weights=False)
    words = "is a Linear8bitLt, not a plain nn.Linear: LLM.int8 quantises x as well, so its product is x Wᵀ of no W"
    assert quantized_base(base, None) == words
    for name in ("TorchQuantLinear", "WQLinear_GEMM", "HQQLinear", "EetqLinear"):
        other = type(name, (nn.Linear,), {})(2, 2)
        assert (
            quantized_base(other, None)
            == f"is a {name}, not a plain nn.Linear: no pass reads weights packed as its are"
        )


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # PyTorch's own
@pytest.mark.parametrize("change", [four_bits, fp8])
def test_a_compiled_model_computes_what_the_report_says(change, monkeypatch):
    """A compiler sees that the layer's forward is its library's own, and sees when it no longer is."""
    model, ids, seen = quantised_llama(change=change), tokens()[0], []
    patch_peft(model)
    expected = model(input_ids=ids).logits

    def keep(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes if "lora_kernels" in str(node.target))
        return graph

    torch.compiler.reset()
    compiled = torch.compile(model, backend=keep, fullgraph=True)
    torch.testing.assert_close(compiled(input_ids=ids).logits, expected)
    assert sum(".mlp" in name for name in seen) == 2
    assert sum(".linear" in name for name in seen) == 8
    if change is four_bits:
        plain = bnb.nn.Linear4bit.forward
        monkeypatch.setattr(bnb.nn.Linear4bit, "forward", lambda self, x: 2 * plain(self, x))
        torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits)


def test_few_rows_of_a_layer_in_training_and_of_fp8_on_a_cpu_are_fused(computed):
    """Dropout needs the mode, and FP8Linear's own kernel a GPU."""
    _, patched = pair()
    other = quantised_llama(change=fp8).eval()
    patch_peft(other)
    for model in (patched.train(), other):
        computed.clear()
        with torch.no_grad():
            model(input_ids=tokens()[0][:1, :8])
        assert "lora_add" not in computed


def test_autocast_to_another_dtype_than_the_layers_is_stocks():
    _, patched = pair(compute_dtype=torch.float16)
    with torch.autocast("cpu", torch.bfloat16):
        found = explain(patched, input_ids=tokens()[0])
    words = "the base layer computes in float16, inside autocast to bfloat16 and with x in "
    assert all(layer.reason.startswith(words) for layer in found.layers)


def test_a_bias_of_another_dtype_is_cast_as_the_layer_does(computed):
    stock = quantised_llama(torch.bfloat16)
    for module in stock.modules():
        if isinstance(module, bnb.nn.Linear4bit) and module.bias is not None:
            module.bias = nn.Parameter(module.bias.float(), requires_grad=False)
    patched = copy.deepcopy(stock)
    patch_peft(patched)
    near(outcome(patched), outcome(stock), 0.1)
    assert "lora_add" not in computed
