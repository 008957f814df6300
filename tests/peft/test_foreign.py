"""Forwards of classes that others have replaced: patched models compute what is in force, and the report says so."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft.tuners.lora as lora
from block_samples import WIDTH, Attention, Block, Gated, adapted, block
from foreign_samples import PARTS, alike, own_forwards, part_and_x, same, twice  # noqa: F401 a fixture
from peft_samples import IN, tiny
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from lora_kernels import patch_peft, unpatch_peft
from lora_kernels.peft import accelerate, accelerated, explain

pytestmark = [
    pytest.mark.usefixtures("own_forwards"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*config.*:UserWarning"),
]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("earlier", [False, True], ids=["first of its class", "after another model"])
def test_a_block_whose_class_was_given_a_forward_before_the_patch(part, earlier, joined):
    if earlier:
        model, _ = block(part())
        patch_peft(model)

    def other(self, x, *more):
        return self.q_proj(x) * 3 if part is Attention else self.down_proj(torch.tanh(self.up_proj(x)))

    part.forward = other
    (model, _), x = part_and_x(part)
    patched = copy.deepcopy(model)
    report = patch_peft(patched)
    alike(patched, model, x)
    assert not joined
    assert [one.form for one in report.blocks] == ["per layer"]
    assert "forward" in report.blocks[0].reason or "it is not" in report.blocks[0].reason


@pytest.mark.parametrize("part", PARTS)
def test_a_forward_that_can_be_joined_is_the_one_in_force(part, joined):
    """The class was patched for an earlier model, whose forward was another."""
    earlier, _ = block(part())
    patch_peft(earlier)

    def attention(self, x):
        q, k = self.q_proj(x), self.k_proj(x)
        v = self.v_proj(x)
        return 3 * torch.cat((q, k, v), -1)

    def mlp(self, x):
        return self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x))

    part.forward = attention if part is Attention else mlp
    (model, _), x = part_and_x(part)
    patched = copy.deepcopy(model)
    assert patch_peft(patched).count("joined") == 1
    joined.clear()
    torch.testing.assert_close(patched(x), model(x))
    assert len(joined) == 1
    # The earlier model's class has another forward than it was patched for.
    stock = copy.deepcopy(earlier)
    unpatch_peft(stock)
    torch.testing.assert_close(earlier(x), stock(x))
    assert len(joined) == 1


@pytest.mark.parametrize("part", PARTS)
def test_a_block_whose_class_is_given_a_forward_after_the_patch(part, joined):
    (model, _), x = part_and_x(part)
    patched = copy.deepcopy(model)
    assert patch_peft(patched).count("joined") == 1
    patched(x)
    assert joined
    part.forward = twice(part.forward)
    patched(x)
    joined.clear()
    alike(patched, model, x)
    assert not joined
    (found,) = explain(patched, x).blocks
    assert found.form == "per layer"
    assert "foreign" in found.reason


@pytest.mark.parametrize("part", PARTS)
def test_a_forward_that_its_class_makes_anew_at_each_look(part):
    """As `functools.partialmethod` does; it is set on the class, and not on the instance."""
    part.forward = functools.partialmethod(lambda self, factor, x: factor * self.q_proj(x) * self.k_proj(x), 2.0)
    (report,) = patch_peft(block(part())[0]).blocks
    assert report.form == "per layer"
    assert "instance" not in report.reason


@pytest.mark.parametrize("kind", [LlamaAttention, LlamaMLP])
def test_classes_of_transformers(kind, joined):
    """As LongLoRA, llm-foundry and Unsloth do it."""
    from block_samples import ids, maker

    stock = maker("Llama")
    patched = copy.deepcopy(stock)
    patch_peft(patched)
    own = kind.forward

    def other(self, *args, **kwargs):
        result = own(self, *args, **kwargs)
        return (result[0] * 0.5, *result[1:]) if isinstance(result, tuple) else result * 0.5

    kind.forward = other
    again = copy.deepcopy(stock)
    report = patch_peft(again)
    expected = stock(input_ids=ids()).logits
    joined.clear()
    for model in (patched, again):
        torch.testing.assert_close(model(input_ids=ids()).logits, expected, rtol=1e-4, atol=1e-5)
    if kind is LlamaMLP:
        assert "lora_mlp" not in joined
        assert [one.form for one in report.blocks if one.kind == "mlp"] == ["per layer"]


@pytest.mark.parametrize("when", ["before the patch", "after the patch"])
@pytest.mark.parametrize("kind", [lora.Linear, nn.Linear, nn.Dropout, nn.Identity])
def test_a_layer_whose_class_has_another_forward(kind, when, computed):
    stock = tiny(lora_dropout=0.0 if kind is nn.Identity else 0.5)
    patched, x = copy.deepcopy(stock), torch.randn(5, IN)
    own = kind.forward

    def foreign(self, x):
        return own(self, x) * 0.5 if kind is not nn.Dropout else x * 0.25

    if when == "before the patch":
        kind.forward = foreign
    patch_peft(patched)
    kind.forward = foreign
    same(patched, stock, x)
    assert not computed
    (found,) = explain(patched, x).layers
    assert found.form == "stock"
    assert "forward" in found.reason
    assert "foreign" in found.reason
    assert str(found) == str(next(iter(explain(patched).layers)))


def test_a_forward_set_on_the_class_that_a_patched_layer_has(computed):
    model, x = tiny(r=5), torch.randn(5, IN)
    patch_peft(model)
    kind = type(model.base_model.model.lin)
    single, own = model(x), kind.forward
    kind.forward = twice(own)
    try:
        torch.testing.assert_close(model(x), 2 * single)
        (found,) = explain(model).layers
        assert found.form == "stock"
        assert "foreign" in found.reason
    finally:
        kind.forward = own


def test_what_is_in_force_again_is_computed_together_again(joined):
    (model, _), x = part_and_x(Gated)
    patch_peft(model)
    own = Gated.forward
    Gated.forward = twice(own)
    model(x)
    Gated.forward = own
    model(x)
    assert joined == ["lora_mlp"]


def test_accelerated_leaves_a_foreign_forward_in_force(computed):
    model, x = tiny(), torch.randn(5, IN)
    lora.Linear.forward = twice(lora.Linear.forward)
    expected = model(x)
    with accelerated():
        assert torch.equal(model(x), expected)
        (found,) = explain(model).layers
        assert found.form == "stock"
        assert "foreign" in found.reason
    assert not computed


@pytest.mark.parametrize("how", ["wrapped", "replaced"])
def test_a_forward_set_inside_accelerated_stays(how, computed):
    model, x = tiny(), torch.randn(5, IN)
    stock = lora.Linear.forward
    single = model(x)
    with accelerated():
        lora.Linear.forward = theirs = twice(lora.Linear.forward if how == "wrapped" else stock)
        torch.testing.assert_close(model(x), 2 * single)
        assert bool(computed) == (how == "wrapped")
    computed.clear()
    assert lora.Linear.forward is theirs
    assert torch.equal(model(x), 2 * single)
    assert not computed, "accelerated() has ended"


def wrapped_twice(forward):
    """As libraries wrap: with the name and the attributes of what they wrap."""

    @functools.wraps(forward)
    def foreign(self, *args, **kwargs):
        return 2 * forward(self, *args, **kwargs)

    return foreign


def test_a_wrapper_of_ours_is_not_ours(computed):
    model, x = tiny(), torch.randn(5, IN)
    single = model(x)
    with accelerated():
        lora.Linear.forward = theirs = wrapped_twice(lora.Linear.forward)
        with accelerated():
            torch.testing.assert_close(model(x), 2 * single)
        later = copy.deepcopy(model)
        assert patch_peft(later).count("stock") == 1
        torch.testing.assert_close(later(x), 2 * single)
        assert "foreign" in explain(later, x).layers[0].reason
    assert lora.Linear.forward is theirs
    computed.clear()
    assert torch.equal(model(x), 2 * single)
    accelerate(False)
    assert torch.equal(model(x), 2 * single)
    assert not computed


@pytest.mark.parametrize("part", PARTS)
def test_a_wrapper_on_the_class_of_a_patched_layer_or_block(part, joined):
    (model, one), x = part_and_x(part)
    expected = model(x)
    patch_peft(model)
    for module in (one, next(m for m in one.modules() if isinstance(m, lora.Linear))):
        kind, own = type(module), type(module).forward
        kind.forward = wrapped_twice(own)
        joined.clear()
        try:
            y = model(x)
            assert not torch.allclose(y, expected)
            (found,) = explain(model, x).blocks
            assert found.form == "per layer"
            assert "foreign" in found.reason
            if module is one:
                torch.testing.assert_close(y, 2 * expected)
            else:
                assert not joined
        finally:
            kind.forward = own


@pytest.mark.parametrize("part", [*PARTS, None])
def test_a_forward_taken_from_a_patched_class_and_set_on_the_librarys(part):
    """Ours calls the forward in force, and that one calls ours: each is called once."""
    if part is None:
        model, x = tiny(), torch.randn(5, IN)
        one = model.base_model.model.lin
    else:
        (model, one), x = part_and_x(part)
    stock, expected = copy.deepcopy(model), model(x)
    patch_peft(model)
    kind = lora.Linear if part is None else part
    ours = type(one).forward
    kind.forward = lambda self, *args: 2 * ours(self, *args)
    if part is not None:
        for own in (model, stock):
            torch.testing.assert_close(own(x), 2 * expected)
    else:
        torch.testing.assert_close(model(x), 2 * expected)


def test_accelerate_off_ends_it_under_a_forward_set_since(computed):
    model, x = tiny(), torch.randn(5, IN)
    single = model(x)
    accelerate()
    lora.Linear.forward = twice(lora.Linear.forward)
    model(x)
    assert computed
    computed.clear()
    accelerate(False)
    assert torch.equal(model(x), 2 * single)
    assert not computed


def test_accelerated_inside_accelerated(computed):
    model, x = tiny(), torch.randn(5, IN)
    with accelerated():
        with accelerated():
            model(x)
        model(x)
        assert len(computed) == 2
    model(x)
    assert len(computed) == 2


@pytest.mark.parametrize("place", ["layer", "class"])
def test_a_forward_that_a_library_keeps_from_an_accelerated_that_has_ended(place, computed):
    model, x = tiny(), torch.randn(5, IN)
    owner, expected = model.base_model.model.lin if place == "layer" else lora.Linear, model(x)
    with accelerated():
        kept = owner.forward
        model(x)
    assert len(computed) == 1
    owner.forward = kept
    assert torch.equal(model(x), expected)
    for found in (explain(model), explain(model, x)):
        assert (found.layers[0].form, "has ended" in found.layers[0].reason) == ("stock", True)
    with accelerated():
        assert explain(model, x).count("fused") == (place == "class")
        model(x)
    assert len(computed) == 1 + 2 * (place == "class")


def test_a_patched_model_under_accelerated_is_patched(computed):
    model, x = tiny(), torch.randn(5, IN)
    patch_peft(model)
    with accelerated():
        model(x)
    model(x)
    assert len(computed) == 2
    assert unpatch_peft(model) == 1


def test_subclasses_of_others_follow_their_own_forward(computed):
    class Theirs(lora.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    model, x = tiny(), torch.randn(5, IN)
    layer = model.base_model.model.lin
    single = model(x)
    layer.__class__ = Theirs
    report = patch_peft(model)
    assert report.count("stock") == 1
    assert torch.equal(model(x), 2 * single)
    assert not computed


def test_a_block_of_two_models_each_with_its_forward(joined):
    """The class is patched once for each forward that is in force."""
    own = Attention.forward
    first = adapted(Block(Attention()))
    patch_peft(first)
    Attention.forward = twice(own)
    second = adapted(Block(Attention()))
    report = patch_peft(second)
    x = torch.randn(3, WIDTH)
    joined.clear()
    second(x)
    first(x)
    assert bool(joined) == (report.blocks[0].form == "joined")
    Attention.forward = own
    joined.clear()
    first(x)
    assert joined == ["lora_projections"]
