"""Bytes and FLOPs of LoRA on experts: the figures of three published models, and PyTorch's own count of FLOPs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels.bench.cost import grouped, layer

# Per model: top k, experts, hidden, inner; MiB of forward and backward with A, B and their gradients left out.
MODELS = {
    "Mixtral-8x7B": ((2, 8, 4096, 14336), {"frozen": 8576, "peft": 28992, "split": 22278, "ours": 10758}),
    "Qwen3-30B-A3B": ((8, 128, 2048, 768), {"frozen": 3904, "peft": 12768, "split": 10520, "ours": 5080}),
    "gpt-oss-20b": ((4, 32, 2880, 2880), {"frozen": 4838, "peft": 16369, "split": 12410, "ours": 6110}),
}
# How often a form reads or writes A (or dA), and B (or dB).
ADAPTER_PASSES = {"frozen": 0, "peft": 4, "split": 3, "ours": 3}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("form", ADAPTER_PASSES)
def test_published_models(name, form):
    (top_k, count, hidden, inner), expected = MODELS[name]
    stacks = grouped.experts(8192, top_k, count, hidden, inner, 16)
    moved = sum(grouped.COSTS[form](z, False).total - ADAPTER_PASSES[form] * (z.a + z.b) for z in stacks)
    assert round(moved / 2**20) == expected[form]


@pytest.mark.parametrize("form", ["frozen", "split", "ours"])
def test_one_expert_moves_what_a_layer_moves(form):
    z, plain = grouped.GroupSize(96, 64, 48, 8), layer.Size(96, 64, 48, 8)
    if form == "split":
        # A layer's chain in PEFT's form scales and adds in the same way.
        assert grouped.COSTS[form](z, False).total == layer.COSTS["peft"](plain, False).total
    else:
        assert grouped.COSTS[form](z, False) == layer.COSTS["triton" if form == "ours" else form](plain, False)


def test_an_expert_minor_b_is_copied_in_each_pass():
    z = grouped.GroupSize(96, 64, 48, 8, experts=4, expert_minor=True)
    plain = grouped.GroupSize(96, 64, 48, 8, experts=4)
    assert grouped.COSTS["ours"](z, False).total - grouped.COSTS["ours"](plain, False).total == 4 * z.b
    assert grouped.COSTS["peft"](z, False) == grouped.COSTS["peft"](plain, False)


def test_flops_of_peft_agree_with_a_count_of_its_calls():
    z = grouped.GroupSize(24, 16, 20, 4, experts=3)
    x, w = torch.randn(3, 8, 16, requires_grad=True), torch.randn(3, 20, 16)
    a, b = torch.randn(3, 4, 16, requires_grad=True), torch.randn(3, 20, 4, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        # PEFT makes W + B A once as it registers the parametrization, and again at the access.
        torch.baddbmm(w, b, a)
        y = torch.bmm(x, torch.baddbmm(w, b, a).mT)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert grouped.flops("peft", z) == (forward.get_total_flops(), backward.get_total_flops())


def test_a_merge_left_out_and_passes_left_out():
    z = grouped.GroupSize(24, 16, 20, 4, experts=3)
    cost = {form: grouped.COSTS[form](z, False) for form in grouped.COSTS}
    assert cost["peft"].total - cost["peft_once"].total == 2 * z.w + z.a + z.b
    assert grouped.flops("peft", z)[0] - grouped.flops("peft_once", z)[0] == 2 * 3 * 20 * 16 * 4
    assert grouped.flops("peft", z)[1] == grouped.flops("peft_once", z)[1]
    # The scale of y and of dy are passes over y there and over s here.
    assert cost["split"].total - cost["split_best"].total == 4 * z.y - 4 * z.s


def test_an_unknown_form_is_an_error():
    with pytest.raises(
        ValueError, match="form is 'fused', but it must be one of frozen, peft, peft_once, split, split_best, ours"
    ):
        grouped.flops("fused", grouped.GroupSize(8, 8, 8, 4))
