"""A patched PEFT layer computes what PEFT computes: outputs and every gradient, against float64 and stock PEFT."""

import copy
import re

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

import peft
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from peft_samples import IN, OUT, call, check, config, layer, tiny, truth

from lora_kernels import patch_peft, torch_backend
from lora_kernels.dropout import keep_scale
from lora_kernels.peft import explain

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def inputs(dtype, *shape):
    return torch.randn(*(shape or (3, 7)), IN, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()


def two_adapters(**second):
    def build(dtype, **kwargs):
        model = tiny(dtype, **kwargs)
        model.add_adapter("second", config(**({"r": 7, "lora_alpha": 3} | second)))
        model.base_model.set_adapter(["default", "second"])
        return model

    return build


class FakeQuantized(nn.Linear):
    """As bitsandbytes' layers: a subclass of nn.Linear whose weight is something else."""

    def __init__(self, dtype):
        super().__init__(IN, OUT, dtype=dtype)
        self.weight.requires_grad_(False)
        codes = (self.weight * 64).round().clamp(-127, 127).to(torch.int8)
        del self.weight
        self.register_buffer("weight", codes)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) / 64, self.bias.to(x.dtype))


def tensor_scaling(dtype):
    model = tiny(dtype)
    prepare_model_for_compiled_hotswap(model, target_rank=9)
    assert isinstance(layer(model).scaling["default"], torch.Tensor)
    assert layer(model).lora_A["default"].weight.shape[0] == 9 != layer(model).r["default"]
    return model


def aliased(dtype):
    """Tied embeddings: A is the transpose of another parameter, so its rows are not contiguous."""
    model = tiny(dtype)
    storage = nn.Parameter(torch.randn(IN, 4, dtype=layer(model).lora_A["default"].weight.dtype))
    layer(model).lora_A["default"].weight = nn.Parameter(storage.t())
    assert not layer(model).lora_A["default"].weight.is_contiguous()
    return model


def with_grad(*names, on=True):
    def build(dtype):
        model = tiny(dtype)
        for name, p in model.named_parameters():
            if name.endswith(names):
                p.requires_grad_(on)
        return model

    return build


def hooked_base(dtype):
    model = tiny(dtype)
    layer(model).base_layer.register_forward_hook(lambda module, args, y: y * 2)
    return model


def conv1d(dtype):
    transformers = pytest.importorskip("transformers")
    return tiny(dtype, lin=transformers.pytorch_utils.Conv1D(OUT, IN).to(dtype), fan_in_fan_out=True)


def absent_adapter(dtype):
    model = tiny(dtype)
    model.add_adapter("elsewhere", config(target_modules=["head"]))
    model.base_model.set_adapter(["elsewhere", "default"])
    return model


def rescaled(dtype):
    model = tiny(dtype)
    layer(model).set_scale("default", 3)
    return model


def repeated(*names, quantized=False):
    """An adapter that is active twice: PEFT adds it twice."""

    def build(dtype):
        model = two_adapters()(dtype, lin=FakeQuantized(dtype) if quantized else None)
        model.base_model.set_adapter(list(names))
        return model

    return build


MODELS = {
    "plain": (tiny, "fused"),
    "adapters in the model's dtype": (lambda dtype: tiny(dtype, autocast_adapter_dtype=False), "fused"),
    "no bias": (lambda dtype: tiny(dtype, bias=False), "fused"),
    "rslora": (lambda dtype: tiny(dtype, use_rslora=True), "fused"),
    "rank above both sizes": (lambda dtype: tiny(dtype, r=33), "fused"),
    "rank 1": (lambda dtype: tiny(dtype, r=1), "fused"),
    "set_scale": (rescaled, "fused"),
    "tensor scaling and padded rank": (tensor_scaling, "fused"),
    "aliased weight": (aliased, "fused"),
    "two adapters, one scaling": (two_adapters(r=4, lora_alpha=6), "fused"),
    "two adapters": (two_adapters(), "fused"),
    "two adapters in the model's dtype": (lambda dtype: two_adapters()(dtype, autocast_adapter_dtype=False), "fused"),
    "an adapter twice": (repeated("default", "default"), "fused"),
    "one of two adapters twice": (repeated("default", "second", "default"), "fused"),
    "an adapter twice over a fake quantized base": (repeated("default", "default", quantized=True), "low-rank"),
    "an adapter that this layer lacks": (absent_adapter, "fused"),
    "trained base bias": (with_grad("lin.base_layer.bias"), "fused"),
    "trained base": (with_grad("base_layer.weight", "base_layer.bias"), "fused"),
    "frozen A": (with_grad("lora_A.default.weight", on=False), "fused"),
    "frozen B": (with_grad("lora_B.default.weight", on=False), "fused"),
    "frozen adapter": (with_grad("lora_A.default.weight", "lora_B.default.weight", on=False), "fused"),
    "hooked base": (hooked_base, "low-rank"),
    "Conv1D": (conv1d, "low-rank"),
    "fake quantized base": (lambda dtype: tiny(dtype, lin=FakeQuantized(dtype)), "low-rank"),
    "two adapters over a fake quantized base": (
        lambda dtype: two_adapters()(dtype, lin=FakeQuantized(dtype)), "low-rank",
    ),
}  # fmt: skip
INTERPRETED = ("plain", "two adapters", "tensor scaling and padded rank", "aliased weight", "fake quantized base")


def compare(model, x, computed, form, backend="torch", autocast=None, tolerance=None):
    stock, exact = call(model, x, autocast), truth(model, x)
    patched = copy.deepcopy(model)
    patch_peft(patched, backend)
    assert not computed
    actual = call(patched, x, autocast)
    assert computed == {"fused": ["lora_linear"], "low-rank": ["lora_add"]}[form]
    check(actual, stock, exact, tolerance or x.dtype)
    computed.clear()
    return patched


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in MODELS for dtype in ("fp32", "bf16")]
    + [(name, dtype) for name in ("plain", "two adapters") for dtype in ("fp16", "fp64")]
    + [("fake quantized base", "fp16")],
)
def test_models(name, dtype, computed):
    build, form = MODELS[name]
    x = inputs(DTYPES[dtype])
    patched = compare(build(DTYPES[dtype]), x, computed, form)
    (found,) = [one for one in explain(patched, x).layers if one.name.endswith(".lin")]
    assert (found.form, bool(found.reason)) == (form, form != "fused")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", INTERPRETED)
def test_models_in_the_kernels(name, dtype, computed):
    build, form = MODELS[name]
    compare(build(DTYPES[dtype]), inputs(DTYPES[dtype]), computed, form, backend="triton")


@pytest.mark.parametrize("base", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["plain", "adapters in the model's dtype", "two adapters", "fake quantized base"])
def test_autocast(name, base, computed):
    build, form = MODELS[name]
    for x_dtype in (torch.float32, torch.bfloat16):
        compare(build(DTYPES[base]), inputs(x_dtype), computed, form, autocast=torch.bfloat16, tolerance=torch.bfloat16)


LAYOUTS = {
    "one dim": lambda x: x[0, 0],
    "two dims": lambda x: x[0],
    "four dims": lambda x: x.view(1, 3, 7, IN),
    "no rows": lambda x: x[:, :0],
    "transposed": lambda x: x.transpose(0, 1),
    "expanded": lambda x: x[:1].expand(5, 7, IN),
    "every other": lambda x: torch.cat((x, x), -1)[..., ::2],
    "no gradient": lambda x: x.detach(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["plain", "fake quantized base"])
def test_layouts(name, layout, computed):
    x = LAYOUTS[layout](inputs(torch.float32).detach())
    if layout != "no gradient":
        x = x.requires_grad_()
    build, form = MODELS[name]
    compare(build(torch.float32), x, computed, form)


def test_without_gradients(computed):
    model, x = tiny(), inputs(torch.float32)
    with torch.no_grad():
        expected = model(x)
        patch_peft(model)
        actual = model(x)
    assert not actual.requires_grad
    assert computed == ["lora_linear"]
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("lin", [None, FakeQuantized])
def test_each_adapter_draws_its_own_mask_with_its_own_probability(dtype, lin, computed, monkeypatch):
    dtype, masks = DTYPES[dtype], []
    draw = torch_backend.draw_mask
    monkeypatch.setattr(torch_backend, "draw_mask", lambda *args: masks.append((args[1], draw(*args))) or masks[-1][1])
    model = two_adapters(lora_dropout=0.5)(dtype, lin=lin and lin(dtype), lora_dropout=0.25)
    exact = copy.deepcopy(model).double()
    model.add_adapter("third", config(r=2))
    exact.add_adapter("third", config(r=2))
    exact.load_state_dict(model.state_dict())
    for m in (model, exact):
        m.base_model.set_adapter(["default", "second", "third"])
    patch_peft(model)
    x = inputs(dtype)
    actual = call(model, x)
    assert [p for p, _ in masks] == [0.25, 0.5]
    # the third has no dropout; one call serves it, or joins it to others without
    assert computed == ["lora_linear" if lin is None else "lora_add", "lora_add", "lora_add"]
    torch.testing.assert_close(masks[0][1].float().mean(), torch.tensor(0.75), atol=0.1, rtol=0)
    factors = {name: keep.view(x.shape).double() * keep_scale(p)
               for name, (p, keep) in zip(("default", "second"), masks, strict=True)}  # fmt: skip
    for name, factor in factors.items():
        layer(exact).lora_dropout[name].register_forward_hook(lambda module, args, y, f=factor: args[0] * f)
    expected = call(exact, x.detach().double().requires_grad_())
    check(actual, {name: t.to(actual[name].dtype) for name, t in expected.items()}, expected, dtype)


def test_dropout_in_expectation_and_in_evaluation():
    model = tiny(lora_dropout=0.5)
    x = inputs(torch.float32).detach()
    patch_peft(model)
    model.eval()
    still = model(x)
    assert torch.equal(still, model(x))
    model.train()
    torch.manual_seed(3)
    first = model(x)
    drawn = torch.stack([model(x).detach() for _ in range(600)])
    torch.manual_seed(3)
    assert torch.equal(first, model(x)), "torch.manual_seed governs the mask"
    error = (drawn.mean(0) - still) / (drawn.std(0) / 600**0.5)
    assert error.abs().max() < 6
    assert (drawn.std(0) > 0).all()
    layer(model).lora_dropout["default"].p = 0.0  # PEFT's users edit it
    torch.testing.assert_close(model(x), still)


def test_numbers_are_read_at_each_call(computed):
    """What PEFT and its users change between calls takes effect: nothing is remembered."""
    model = tiny()
    patch_peft(model)
    one, x = layer(model), inputs(torch.float32).detach()

    def agrees():
        expected = nn.functional.linear(x, one.base_layer.weight, one.base_layer.bias)
        expected = (
            expected + one.scaling["default"] * x @ one.lora_A["default"].weight.T @ one.lora_B["default"].weight.T
        )
        torch.testing.assert_close(one(x), expected)

    agrees()
    one.scaling["default"] = 7
    agrees()
    one.lora_A["default"] = nn.Linear(IN, 5, bias=False)
    one.lora_B["default"] = nn.Linear(5, OUT, bias=False)
    agrees()
    one.lora_B["default"].weight = nn.Parameter(torch.randn(OUT, 5))
    agrees()
    one.base_layer = nn.Linear(IN, OUT)
    agrees()
    assert computed == ["lora_linear"] * 5


def test_no_wide_copy_of_x_is_kept():
    """PEFT's default, fp32 adapters over a bf16 base, keeps an fp32 copy of x for backward; patched there is none."""
    model, x = tiny(torch.bfloat16), inputs(torch.bfloat16, 64)

    def saved():
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append((t.dtype, tuple(t.shape))) or t, lambda t: t
        ):
            model(x)
        return sizes

    assert (torch.float32, (64, IN)) in saved()
    patch_peft(model)
    kept = saved()
    assert (torch.bfloat16, (64, IN)) in kept
    assert not [shape for dtype, shape in kept if dtype == torch.float32 and shape[0] == 64]


@pytest.mark.skipif(tuple(map(int, peft.__version__.split(".")[:2])) < (0, 20), reason="MiCA came with PEFT 0.20")
def test_mica_is_fast(computed):
    model = tiny(init_lora_weights="mica")
    assert not layer(model).lora_B["default"].weight.requires_grad
    compare(model, inputs(torch.float32), computed, "fused")


def test_double_backward_says_so():
    model, x = tiny(), inputs(torch.float32)
    patch_peft(model)
    (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=re.escape("once_differentiable")):
        dx.sum().backward()
