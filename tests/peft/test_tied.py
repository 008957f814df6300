"""Weights that are shared: adapters belong to one layer, and merging changes no other."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from adapter_samples import fill
from torch import nn

from lora_kernels import LoRALinear, LoRAQKV, merge_and_unload, swap_linear

V, D = 20, 8


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.body, self.head = nn.Embedding(V, D), nn.Linear(D, D), nn.Linear(D, V, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.body(self.embed(ids))))


class TwoLayers(nn.Module):
    """Two layers of one weight, one of them a view of it under another parameter."""

    def __init__(self, view):
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)
        if view:
            self.b.weight.data = self.a.weight.data
        else:
            self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x))


IDS = torch.arange(V).view(2, 10)


def adapted(targets=("head",)):
    with pytest.warns(
        UserWarning, match=r"swap_linear: head\.weight is shared with embed\.weight\. Each adapter is its"
    ):
        swap_linear(model := Tied(), targets, r=4)
    return fill(model)


def test_merge_and_unload_unties():
    model = adapted(["head", "body"])
    right, embedding = model(IDS), model.embed.weight.clone()
    with pytest.warns(
        UserWarning, match=r"merge_and_unload: head\.weight is shared with embed\.weight; .*no longer tied"
    ):
        merge_and_unload(model)
    torch.testing.assert_close(model(IDS), right)
    assert torch.equal(model.embed.weight, embedding)
    assert type(model.head) is nn.Linear
    assert model.head.weight is not model.embed.weight


def test_a_layer_s_own_merge_unties_and_unmerge_ties():
    model = adapted()
    right, embedding = model(IDS), model.embed.weight.clone()
    model.eval()
    for twin in (model, copy.deepcopy(model)):
        with pytest.warns(UserWarning, match=r"LoRALinear\.merge: the weight is shared with embed\.weight"):
            twin.head.merge()
        torch.testing.assert_close(twin(IDS), right)
        assert torch.equal(twin.embed.weight, embedding)
        moved = copy.deepcopy(twin).double()
        moved.head.unmerge()
        assert moved.head.weight is moved.embed.weight
        twin.head.unmerge()
        assert twin.head.weight is twin.embed.weight
        assert torch.equal(twin(IDS), right)
    # The part of a model that does not have the embedding knows of it all the same.
    with pytest.warns(UserWarning, match=r"merge_and_unload: weight is shared with embed\.weight"):
        plain = merge_and_unload(model.head)
    assert plain.weight is not model.embed.weight
    assert torch.equal(model.embed.weight, embedding)


@pytest.mark.parametrize("view", [False, True])
def test_two_layers_of_one_weight(view):
    model, x = TwoLayers(view), torch.randn(3, D)
    with pytest.warns(UserWarning, match=r"a\.weight is shared with b\.weight; b\.weight is shared with a\.weight"):
        swap_linear(model, ["a", "b"], r=2)
    right = fill(model)(x)
    with pytest.warns(UserWarning, match="merge_and_unload: a.weight is shared"):
        merge_and_unload(model)
    torch.testing.assert_close(model(x), right)


def test_a_layer_made_by_hand_is_found_when_the_model_is_merged():
    model = Tied()
    model.head = LoRALinear.from_linear(model.head, r=4)
    right, embedding = fill(model)(IDS), model.embed.weight.clone()
    with pytest.warns(UserWarning, match=r"head\.weight is shared with embed\.weight"):
        merge_and_unload(model)
    torch.testing.assert_close(model(IDS), right)
    assert torch.equal(model.embed.weight, embedding)


def test_weights_of_two_dtypes_in_one_storage_are_compared_in_bytes():
    """Side by side they share nothing, though the first one's elements are more than the second one's offset."""
    flat, end = torch.zeros(3 * D * D, dtype=torch.bfloat16), D * D
    model = nn.Sequential(nn.Linear(D, D, dtype=torch.bfloat16), nn.Linear(D, D))
    model[0].weight.data, model[1].weight.data = (t.view(D, D) for t in (flat[:end], flat[end:].view(torch.float32)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        swap_linear(model, "all-linear", r=2)
    model = nn.Sequential(nn.Linear(D, D, dtype=torch.bfloat16), nn.Linear(D, D))
    flat = torch.zeros(3 * D * D, dtype=torch.bfloat16)
    model[0].weight.data, model[1].weight.data = (
        t.view(D, D) for t in (flat[2 * end - 2 :][: D * D], flat[: 2 * end].view(torch.float32))
    )
    with pytest.warns(UserWarning, match=r"0\.weight is shared with 1\.weight"):
        swap_linear(model, "all-linear", r=2)


def test_what_is_not_shared_is_not_named():
    class Views(nn.Module):
        """Layers that lie side by side in one storage, one of them under two names."""

        def __init__(self):
            super().__init__()
            both = torch.randn(2 * D, D)
            self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)
            self.a.weight.data, self.b.weight.data = both[:D], both[D:]
            self.again = self.a

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = Views()
        swap_linear(model, ["a", "b", "again"], r=2)
        assert model.a is model.again
        place = model.a.weight.data_ptr()
        merge_and_unload(model)
        assert model.a.weight.data_ptr() == place
        with torch.device("meta"):
            swap_linear(nn.Sequential(nn.Linear(D, D), nn.Linear(D, D)), "all-linear", r=2)


def test_a_block_s_merge_unties():
    block = LoRAQKV.from_linears(*(nn.Linear(D, D) for _ in range(3)), r=2)
    block.q_proj.shared_with = ("elsewhere.weight",)
    before = block.q_proj.weight
    values = before.clone()
    fill(block).eval()
    with pytest.warns(UserWarning, match="elsewhere.weight"):
        block.merge()
    assert torch.equal(before, values)
    block.unmerge()
    assert block.q_proj.weight is before


def test_transformers_models_stay_untied(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with pytest.warns(UserWarning, match=r"lm_head\.weight is shared with model\.embed_tokens\.weight"):
        swap_linear(model, ["lm_head"], r=4)
    with torch.no_grad():
        right = fill(model)(IDS).logits
        with pytest.warns(UserWarning, match=r"LlamaForCausalLM\.config\.tie_word_embeddings is False now"):
            merge_and_unload(model)
        model.tie_weights()
        torch.testing.assert_close(model(IDS).logits, right)
        model.save_pretrained(tmp_path)
        again = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(again(IDS).logits, right)
        assert F.mse_loss(again.lm_head.weight, again.model.embed_tokens.weight) > 1e-4
