"""bitsandbytes' own 4-bit and 8-bit layers on a CPU, where it is installed: fused, and added to the layer's result."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
bnb = pytest.importorskip("bitsandbytes")

from peft import get_peft_model  # noqa: E402
from peft_samples import config, layer  # noqa: E402

from lora_kernels.peft import patch_peft, unpatch_peft  # noqa: E402

SIZE = 64


class Model(nn.Module):
    def __init__(self, bits, dtype):
        super().__init__()
        weight = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)).to(dtype)
        if bits == 4:
            self.lin = bnb.nn.Linear4bit(SIZE, SIZE, compute_dtype=dtype, quant_type="nf4")
            self.lin.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
            self.is_loaded_in_4bit = True
        else:
            self.lin = bnb.nn.Linear8bitLt(SIZE, SIZE, has_fp16_weights=False)
            self.lin.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
            self.is_loaded_in_8bit = True

    def forward(self, x):
        return self.lin(x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized(bits, dtype, computed):
    torch.manual_seed(0)
    model = get_peft_model(Model(bits, dtype).to("cpu"), config(lora_alpha=5))
    assert type(layer(model)).__name__ == {4: "Linear4bit", 8: "Linear8bitLt"}[bits]
    x = torch.randn(9, SIZE, dtype=dtype, requires_grad=True)
    dy = torch.randn(9, SIZE, dtype=dtype)

    def run():
        model.zero_grad()
        x.grad = None
        y = model(x)
        y.backward(dy)
        return {"y": y.detach(), "dx": x.grad} | {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    expected = run()
    (found,) = patch_peft(model).layers
    assert found.form == {4: "fused", 8: "low-rank"}[bits]
    actual = run()
    assert computed == [{4: "lora_linear", 8: "lora_add"}[bits]]
    tolerance = dict(rtol=2e-2, atol=5e-2) if dtype == torch.bfloat16 else dict(rtol=1e-5, atol=1e-5)
    assert actual.keys() == expected.keys()
    for name, t in actual.items():
        torch.testing.assert_close(t, expected[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)
    assert not torch.equal(model(x), layer(model).base_layer(x))
    assert unpatch_peft(copy.deepcopy(model)) == 1
