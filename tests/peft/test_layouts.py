"""Layouts that stock PEFT takes: a patched model takes them, by PEFT's own forward, and says so."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from peft_samples import IN, layer, tiny

from lora_kernels import patch_peft
from lora_kernels.peft import explain


def nested(layout):
    rows = [torch.randn(n, IN) for n in (2, 5, 3)]
    return torch.nested.nested_tensor(rows, layout=layout)


INPUTS = {
    "sparse COO": lambda: torch.randn(6, IN).relu().to_sparse(),
    "sparse CSR": lambda: torch.randn(6, IN).relu().to_sparse_csr(),
    "nested": lambda: nested(torch.strided),
    "jagged": lambda: nested(torch.jagged),
    "MKLDNN": lambda: torch.randn(6, IN).to_mkldnn(),
}
WORDS = {"sparse COO": "sparse_coo", "sparse CSR": "sparse_csr", "nested": "nested", "jagged": "NestedTensor", "MKLDNN": "mkldnn"}  # fmt: skip


def dense(y):
    """The numbers of a result of any layout."""
    parts = y.unbind() if y.is_nested else [y.to_dense() if y.layout is not torch.strided else y]
    return [part.detach() for part in parts]


@pytest.mark.filterwarnings("ignore:.*(S|s)parse.*:UserWarning", "ignore:.*nested.*:UserWarning")
@pytest.mark.parametrize("kind", INPUTS)
def test_an_input(kind, computed):
    torch.manual_seed(0)
    stock, x = tiny(), INPUTS[kind]()
    patched = copy.deepcopy(stock)
    patch_peft(patched)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            ours, theirs = dense(patched(x)), dense(stock(x))
        assert len(ours) == len(theirs)
        assert all(map(torch.equal, ours, theirs))
    assert not computed
    (found,) = explain(patched, x).layers
    assert found.form == "stock"
    assert WORDS[kind] in found.reason


def changed(model, part, change):
    own = layer(model) if part == "base_layer" else getattr(layer(model), part)
    linear = layer(model).base_layer if part == "base_layer" else own["default"]
    linear.weight = nn.Parameter(change(linear.weight.detach()), requires_grad=False)
    return model


@pytest.mark.filterwarnings("ignore:.*(S|s)parse.*:UserWarning")
@pytest.mark.parametrize("part", ["base_layer", "lora_A", "lora_B"])
@pytest.mark.parametrize("change", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr], ids=["COO", "CSR"])
def test_a_weight(part, change, computed):
    # Sparse parameters have no copy.
    stock, patched = (changed(tiny(bias=False), part, change) for _ in range(2))
    x = torch.randn(6, IN)
    patch_peft(patched)
    torch.testing.assert_close(patched(x), stock(x))
    assert computed == (["lora_add"] if part == "base_layer" else [])
    for report in (explain(patched), explain(patched, x)):
        (found,) = report.layers
        assert found.form == ("low-rank" if part == "base_layer" else "stock")
        assert "sparse" in found.reason


@pytest.mark.parametrize(("model_dtype", "other"), [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)])
@pytest.mark.parametrize("scalings", [(1.5, 1.5), (1.5, 0.5)], ids=["one scaling", "two scalings"])
def test_two_adapters_under_the_other_half(model_dtype, other, scalings, computed):
    """Joining adapters comes before autocast is switched off; it refuses to join one half under the other."""
    stock = tiny(model_dtype, autocast_adapter_dtype=False)
    stock.add_adapter("second", copy.deepcopy(stock.peft_config["default"]))
    stock.base_model.set_adapter(["default", "second"])
    one = layer(stock)
    one.scaling.update(zip(("default", "second"), scalings, strict=True))
    for module in (one.lora_A, one.lora_B):
        module["second"].to(model_dtype)
    patched, x = copy.deepcopy(stock), torch.randn(6, IN, dtype=model_dtype, requires_grad=True)
    patch_peft(patched)
    results = []
    for model in (patched, stock):
        model.zero_grad()
        x.grad = None
        with torch.autocast("cpu", dtype=other):
            y = model(x)
        y.backward(torch.ones_like(y))
        results.append({"y": y.detach(), "dx": x.grad} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None})  # fmt: skip
    assert computed
    ours, theirs = results
    assert ours.keys() == theirs.keys()
    for name, t in ours.items():
        assert t.dtype is theirs[name].dtype, name
        torch.testing.assert_close(t, theirs[name], rtol=0.04, atol=0.04)


class Subclass(torch.Tensor):
    pass


def test_a_base_whose_result_is_of_another_kind(computed):
    """The weight makes every result one of a subclass; the low-rank term is added by plain operators."""
    torch.manual_seed(0)
    stock, x = tiny(), torch.randn(6, IN)
    patched = copy.deepcopy(stock)
    for model in (stock, patched):
        base = layer(model).base_layer
        base.weight = nn.Parameter(base.weight.detach().as_subclass(Subclass), requires_grad=False)
    patch_peft(patched)
    y, expected = patched(x), stock(x)
    assert type(y) is type(expected) is Subclass
    torch.testing.assert_close(y.as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor))
    assert not computed
    assert explain(patched, x).count("fused") == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("scaling", [1 / 3, torch.tensor(1 / 3)], ids=["number", "tensor"])
def test_a_scaled_adapter_is_rounded_once(dtype, scaling):
    """In 16 bits the product is left in fp32, and rounded as the kernels read it."""
    from lora_kernels.peft.layer import _scale_adapter

    adapter = torch.randn(3, 7).to(dtype)
    scaled = _scale_adapter(adapter, scaling)
    assert scaled.dtype is (torch.float32 if dtype.itemsize == 2 else dtype)
    torch.testing.assert_close(scaled.double(), adapter.double() / 3, rtol=1e-6, atol=0)


class Doubled(torch.overrides.TorchFunctionMode):
    """Replaces F.linear, as quantisers in training do."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        y = function(*args, **(kwargs or {}))
        return 2 * y if function is torch.nn.functional.linear else y


def test_a_mode_that_replaces_functions(computed):
    stock, x = tiny(), torch.randn(6, IN)
    patched = copy.deepcopy(stock)
    patch_peft(patched)
    with Doubled():
        assert torch.equal(patched(x), stock(x))
        assert explain(patched, x).layers[0].reason == "inside a TorchFunctionMode"
    assert not computed
    with torch.device("cpu"):
        patched(x)
    assert computed == ["lora_linear"]
