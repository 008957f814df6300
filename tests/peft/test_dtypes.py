"""Dtypes that do not fit together: PEFT's own forward serves the call, and PyTorch's error says what is wrong."""

import copy

import pytest
import torch

pytest.importorskip("peft")

from peft_samples import IN, call, config, layer, tiny

from lora_kernels import patch_peft
from lora_kernels.peft import explain

HALF, WIDE = torch.bfloat16, torch.float32


@pytest.mark.parametrize(("dtype_A", "dtype_B"), [(WIDE, HALF), (HALF, WIDE)])
def test_adapters_of_two_dtypes(dtype_A, dtype_B, computed):
    model, x = tiny(HALF), torch.randn(3, IN).to(HALF)
    layer(model).lora_A.to(dtype_A)
    layer(model).lora_B.to(dtype_B)
    patched = copy.deepcopy(model)
    patch_peft(patched)
    for each in (model, patched):
        with pytest.raises(RuntimeError, match="same dtype"):
            each(x)
    assert not computed
    assert explain(layer(patched)).count("stock") == 0, "they fit under autocast"
    with torch.autocast("cpu", HALF):
        torch.testing.assert_close(patched(x), model(x), rtol=0.05, atol=0.05)
    assert computed == ["lora_linear"]


def test_a_bias_of_another_dtype_than_x(computed):
    """The base layer is called, and raises as it does without a patch."""
    model, x = tiny(HALF), torch.randn(3, IN).to(HALF)
    layer(model).base_layer.bias.data = layer(model).base_layer.bias.data.double()
    patch_peft(model)
    with pytest.raises(RuntimeError, match="dtype"):
        model(x)
    assert not computed


@pytest.mark.parametrize("p", [0.0, 1e-4])
def test_adapters_that_are_joined_beside_one_with_a_mask(p, computed):
    """Two without dropout are one term, and the third one's mask, which hardly ever drops, is another."""
    model = tiny(r=4)
    model.add_adapter("second", config(r=2, lora_alpha=3))
    model.add_adapter("third", config(r=3, lora_alpha=9, lora_dropout=p))
    model.base_model.set_adapter(["default", "second", "third"])
    patched, x = copy.deepcopy(model), torch.randn(5, IN, requires_grad=True)
    patch_peft(patched)
    torch.manual_seed(0)
    expected = call(model, x)
    torch.manual_seed(0)
    actual = call(patched, x)
    assert computed == ["lora_linear"] + ["lora_add"] * (p > 0)
    assert len(expected) == 2 + 6
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
