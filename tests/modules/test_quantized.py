"""`LoRALinear` and the blocks over 4-bit and FP8 layers: what goes in, what is saved, and what comes out again."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")
bnb = pytest.importorskip("bitsandbytes")

from llama_samples import LINEARS, llama, tokens  # noqa: E402
from stored_samples import four_bits, fp8, quantised  # noqa: E402

from lora_kernels import (  # noqa: E402
    LoRALinear,
    LoRAMLP,
    LoRAQKV,
    load_adapter,
    merge_and_unload,
    reference,
    save_adapter,
    swap_linear,
)
from lora_kernels.parallel import LoRAColwise  # noqa: E402
from lora_kernels.quantized import QuantizedWeight  # noqa: E402

CHANGES = {"nf4": four_bits, "fp8": fp8}


def linear(outer=40, inner=48, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(inner, outer, dtype=dtype)


def adapted(change, seed=0, shape=(40, 48), **how):
    made = LoRALinear.from_linear(
        change(linear(*shape, seed=seed)), r=4, lora_alpha=8, **{"dtype": torch.float32} | how
    )
    nn.init.normal_(made.lora_B, std=0.1)
    return made


def over_dense(made):
    """The same layer over the dense W."""
    plain = nn.Linear(made.in_features, made.out_features, made.bias is not None)
    plain.weight = nn.Parameter(reference.dequantize(made.whole_weight(), torch.float32))
    plain.bias = made.bias
    other = LoRALinear.from_linear(plain, r=made.r, lora_alpha=made.lora_alpha)
    other.lora_A, other.lora_B = made.lora_A, made.lora_B
    return other


@pytest.mark.parametrize("kind", CHANGES)
def test_shares_the_parameters_of_the_layer_and_computes_with_its_dense_weight(kind):
    base = CHANGES[kind](linear())
    made = LoRALinear.from_linear(base, r=4)
    assert made.weight is base.weight
    assert made.bias is base.bias
    assert {n for n, p in made.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert made.lora_A.dtype == made.whole_weight().dtype
    made, x = adapted(CHANGES[kind]), torch.randn(9, 48, requires_grad=True)
    y, expected = made(x), over_dense(made)(x)
    torch.testing.assert_close(y, expected)
    for found, other in zip(
        *(torch.autograd.grad(t.square().sum(), (x, made.lora_A)) for t in (y, expected)), strict=True
    ):
        torch.testing.assert_close(found, other)


def test_what_is_not_quantised_yet_changes_nothing():
    base = bnb.nn.Linear4bit(8, 8)
    base.bias.requires_grad_(True)
    with pytest.raises(ValueError, match="quant_state is None: the weight is not quantised yet"):
        LoRALinear.from_linear(base)
    assert base.bias.requires_grad
    with pytest.raises(TypeError, match=r"is a Linear8bitLt, not exactly an nn\.Linear"):
        LoRALinear.from_linear(bnb.nn.Linear8bitLt(8, 8))


@pytest.mark.parametrize("kind", CHANGES)
def test_state_dict_copy_and_pickle(kind):
    made, other, x = adapted(CHANGES[kind]), adapted(CHANGES[kind], seed=1), torch.randn(9, 48)
    expected = made(x)
    assert not torch.allclose(other(x), expected)
    other.load_state_dict(made.state_dict())
    assert torch.equal(other(x), expected)
    assert torch.equal(copy.deepcopy(made)(x), expected)
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)


def test_a_packed_weight_without_its_scales_is_refused():
    made = adapted(four_bits)
    state = {name: t for name, t in adapted(four_bits, seed=1).state_dict().items() if "weight." not in name}
    y = made(x := torch.randn(2, 48))
    with pytest.raises(RuntimeError, match=r"weight, which is packed, and no weight\.absmax"):
        made.load_state_dict(state)
    assert torch.equal(made(x), y)


def test_the_keys_are_those_of_bitsandbytes():
    base = four_bits(linear())
    keys = set(LoRALinear.from_linear(base).state_dict())
    assert keys == set(base.state_dict()) | {"lora_A", "lora_B"}


@pytest.mark.filterwarnings("ignore:.*quantised again")
def test_merge_quantises_again_and_unmerge_is_exact():
    made, x = adapted(four_bits).eval(), torch.randn(9, 48)
    before, y, weight = made.weight, made(x), over_dense(made)
    with pytest.warns(UserWarning, match="quantised again, to 4 bits"):
        made.merge()
    update = made.scaling * made.lora_B @ made.lora_A
    again = bnb.functional.dequantize_4bit(*bnb.functional.quantize_4bit(weight.weight + update, quant_type="nf4"))
    # the scales of the scales of so few blocks are coarse
    torch.testing.assert_close(reference.dequantize(made.whole_weight()), again, rtol=0.1, atol=0.01)
    torch.testing.assert_close(made(x), F.linear(x, reference.dequantize(made.whole_weight()), made.bias))
    assert (made(x) - y).norm() < 0.2 * y.norm()
    made.unmerge()
    assert made.weight is before
    assert torch.equal(made(x), y)


def test_fp8_is_not_merged():
    made = adapted(fp8)
    with pytest.raises(TypeError, match="an FP8 weight cannot take the update"):
        made.merge()
    assert not made.merged
    made(torch.randn(2, 48))


@pytest.mark.parametrize("kind", CHANGES)
def test_blocks_compute_quantised_children_together(kind, monkeypatch):
    from lora_kernels.modules import blocks

    change = CHANGES[kind]
    qkv = LoRAQKV.from_linears(*(adapted(change, seed=i) for i in range(3)))
    mlp = LoRAMLP.from_linears(*(adapted(change, i, shape) for i, shape in enumerate([(40, 48)] * 2 + [(48, 40)])))
    x, made = torch.randn(9, 48), []
    for name in ("project", "lora_mlp"):
        whole = getattr(blocks, name)
        monkeypatch.setattr(blocks, name, lambda *a, _of=whole, _n=name, **k: made.append(_n) or _of(*a, **k))
    for found, child in zip(qkv(x), (qkv.q_proj, qkv.k_proj, qkv.v_proj), strict=True):
        torch.testing.assert_close(found, over_dense(child)(x))
    gate, up, down = (over_dense(child) for child in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    torch.testing.assert_close(mlp(x), down(F.silu(gate(x)) * up(x)))
    assert made == ["project", "lora_mlp"]


def test_styles_refuse_storage_that_no_rank_can_share():
    with pytest.raises(TypeError, match="LoRAColwise: weight is quantised"):
        LoRAColwise()._apply(adapted(four_bits), None)


@pytest.mark.filterwarnings("ignore:.*quantised again")
@pytest.mark.parametrize("kind", CHANGES)
def test_swap_save_load_and_unload(kind, tmp_path):
    model, ids = quantised(llama(), CHANGES[kind]), tokens()[0]
    kinds = {name: type(module) for name, module in model.named_modules()}
    swapped = copy.deepcopy(model)
    swap_linear(swapped, LINEARS, r=4)
    assert sum(isinstance(module, LoRALinear) for module in swapped.modules()) == 14
    for module in swapped.modules():
        if isinstance(module, LoRALinear):
            assert isinstance(module.whole_weight(), QuantizedWeight)
            nn.init.normal_(module.lora_B, std=0.02)
    out = swapped(input_ids=ids, labels=ids)
    out.loss.backward()
    assert all(p.grad is not None for n, p in swapped.named_parameters() if "lora_" in n)
    save_adapter(swapped, tmp_path)
    loaded = copy.deepcopy(model)
    assert len(load_adapter(loaded, tmp_path)) == 14
    assert torch.equal(loaded(input_ids=ids).logits, out.logits)
    if kind == "fp8":
        with pytest.raises(TypeError, match="FP8"):
            merge_and_unload(loaded)
        return
    merged = merge_and_unload(loaded).eval()
    assert {name: type(module) for name, module in merged.named_modules()} == kinds
    found = merged(input_ids=ids).logits
    assert (found - out.logits).norm() < 0.3 * out.logits.norm()


def test_fp8_weights_that_require_grad_are_frozen():
    """As transformers makes them."""
    base = fp8(linear())
    base.weight.requires_grad_(True), base.weight_scale_inv.requires_grad_(True)
    made = LoRALinear.from_linear(base, r=4)
    assert {n for n, p in made.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_subclass_with_a_forward_of_its_own_is_refused(kind):
    base = CHANGES[kind](linear())
    cls = type(base)
    base.__class__ = type("Doubled", (cls,), {"forward": lambda self, x: 2 * cls.forward(self, x)})
    with pytest.raises(TypeError, match=rf"is a Doubled with a forward of its own, .* than {cls.__name__}"):
        LoRALinear.from_linear(base)
    base.__class__ = type("Same", (cls,), {})
    LoRALinear.from_linear(base)


@pytest.mark.filterwarnings("ignore:.*quantised again")
def test_the_layers_state_is_that_of_its_weight():
    """It is read where FSDP1 makes a plain parameter of the weight."""
    made, other = adapted(four_bits), adapted(four_bits, seed=1)
    made.load_state_dict(other.state_dict())
    assert made.quant_state is made.weight.quant_state
    before = made.quant_state
    made.merge()
    assert made.quant_state is made.weight.quant_state
    bare = merge_and_unload(nn.Sequential(copy.deepcopy(made)))[0]
    assert bare.quant_state is bare.weight.quant_state
    made.unmerge()
    assert made.quant_state is made.weight.quant_state is before
