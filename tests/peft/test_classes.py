"""What others set on the patched class of a layer, a block or an encoder stays there, and is named where it is lost."""

import copy
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

from block_samples import WIDTH, Gated, block
from encoder_samples import D, Encoder
from foreign_samples import PARTS, part_and_x, twice
from peft import LoraConfig, get_peft_model
from peft_samples import IN, layer, tiny

from lora_kernels import explain, merge_and_unload, patch_peft, swap_linear, unpatch_peft


def foreign(self, x):
    return x.new_full((1,), 7.0)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_forward_set_on_a_patched_class_is_left_alone_until_it_is_unpatched(backend, computed):
    model, x = tiny(), torch.randn(5, IN)
    patch_peft(model, backend=backend)
    expected, theirs = model(x), type(layer(model))
    theirs.forward = foreign
    for again in (model, copy.deepcopy(model)):
        for _ in range(2):
            assert patch_peft(again, backend="torch").count("stock") == 1
            assert again(x).item() == 7
        assert "foreign" in explain(again, x).layers[0].reason
    later = tiny()
    assert patch_peft(later, backend=backend).count("fused") == 1
    torch.testing.assert_close(later(x), expected)
    assert type(layer(later)) is not theirs
    with pytest.warns(UserWarning, match=r"unpatch_peft: forward, set by others on the patched class of base_") as said:
        assert unpatch_peft(model) == 1
    (text,) = [str(one.message) for one in said]
    assert "base_model.model.lin, is left behind" in text
    assert "Set it on peft.tuners.lora.layer.Linear, or on the modules." in text
    assert said[0].filename == __file__
    torch.testing.assert_close(model(x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert patch_peft(model, backend=backend).count("fused") == 1
        computed.clear()
        torch.testing.assert_close(model(x), expected)
        assert unpatch_peft(model) == unpatch_peft(later) == 1
    assert len(computed) == 1


def test_other_members_of_a_patched_class_are_left_behind_as_well():
    model = tiny(target_modules=["lin", "head"])
    patch_peft(model)
    kind = type(layer(model))
    kind.merge, kind.__call__, kind.of_theirs = lambda self: None, twice(nn.Module.__call__), 1
    kind.__annotations__.clear()
    names = "__call__, merge, of_theirs"
    with pytest.warns(UserWarning, match=rf"{names}, set by .* of base_model.model.lin and 1 more modules, is left"):
        assert unpatch_peft(model) == 2
    patch_peft(other := tiny())
    assert type(layer(other)) is not kind
    del type(layer(other)).forward
    with pytest.warns(UserWarning, match=r"unpatch_peft: forward, set by others"):
        unpatch_peft(other)
    patch_peft(other)
    kind = type(layer(other))
    assert kind.__annotations__ == {}
    unpatch_peft(other)
    patch_peft(other)
    assert type(layer(other)) is kind


@pytest.mark.parametrize("part", PARTS)
def test_a_forward_set_on_the_patched_class_of_a_block(part, joined):
    (model, one), x = part_and_x(part)
    patch_peft(model)
    expected, own = model(x), type(one).forward
    type(one).forward = twice(own)
    for blocks in (True, False):
        (found,) = patch_peft(model, blocks=blocks).blocks
        assert "foreign" in found.reason
        torch.testing.assert_close(model(x), 2 * expected)
    later, _ = block(part())
    assert patch_peft(later).count("joined") == 1
    assert torch.isfinite(later(x)).all()
    with pytest.warns(UserWarning, match=rf"unpatch_peft: forward, .*block_samples\.{part.__name__}, or on"):
        unpatch_peft(model)
    torch.testing.assert_close(model(x), expected)


def test_a_forward_set_on_the_patched_class_of_an_encoder():
    model, x = get_peft_model(Encoder(), LoraConfig(r=2, target_modules=["linear1"])).eval(), torch.randn(2, 5, D)
    patch_peft(model)
    type(model.base_model.model.encoder).forward = lambda self, x, **_: foreign(self, x)
    for _ in range(2):
        assert model(x).item() == 7
        patch_peft(model)
    ours = Encoder()
    swap_linear(ours, ["linear1"], r=2)
    assert ours(x).shape == x.shape
    with pytest.warns(UserWarning, match=r"unpatch_peft: forward, .*TransformerEncoder, or on"):
        unpatch_peft(model)
    assert model(x).shape == x.shape
    type(ours.encoder).forward = lambda self, x, **_: foreign(self, x)
    with pytest.warns(UserWarning, match=r"merge_and_unload: forward, .*TransformerEncoder, or on") as said:
        merge_and_unload(ours)
    assert said[0].filename == __file__
    assert ours(x).shape == x.shape


def test_the_classes_are_few():
    model = tiny()
    patch_peft(model)
    kind = type(layer(model))
    for _ in range(3):
        patch_peft(other := tiny())
        assert type(layer(other)) is kind
    mlp, one = block(Gated())
    patch_peft(mlp)
    again, other = block(Gated())
    patch_peft(again)
    assert type(other) is type(one)
    assert torch.isfinite(again(torch.randn(2, WIDTH))).all()
