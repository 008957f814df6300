"""What the fused path does not take, PEFT's own forward computes, bit for bit, and the reason given is the reason."""

import math
import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft_samples import IN, OUT, Tiny, call, config, layer, tiny

from lora_kernels import patch_peft
from lora_kernels.peft import explain


def edited(edit, **changes):
    """A model with an adapter, then changed."""

    def build():
        model = tiny(**changes)
        edit(layer(model))
        return model

    return build


class Subclass(torch.Tensor):
    pass


class FancyLinear(nn.Linear):
    pass


def hook(module):
    module.register_forward_hook(lambda module, args, y: y * 1.5)


def pre_hook(module):
    module.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def backward_hook(module):
    module.register_full_backward_hook(lambda module, given, got: None)


def replaced_forward(module):
    forward = module.forward
    module.forward = lambda x: forward(x) * 3


def subclassed_weight(module):
    weight = nn.Parameter(module.weight.detach().as_subclass(Subclass))
    assert type(weight) is not nn.Parameter
    module._parameters["weight"] = weight


def view_of_weight(module):
    """As FSDP1 leaves it in forward: a plain tensor in the place of the parameter."""
    weight = module._parameters.pop("weight")
    module.weight = weight.view_as(weight)


def change_class(module):
    module.__class__ = FancyLinear


def set_scaling(value):
    return lambda one: one.scaling.__setitem__("default", value)


def set_dropout(value):
    return lambda one: one.lora_dropout.__setitem__("default", value)


def half(one):
    one.lora_A.bfloat16()
    one.lora_B.bfloat16()


def merged(one):
    one.merge()


def deactivated(one):
    one.set_adapter([])


FALLBACKS = {
    "disabled": (edited(lambda one: one.enable_adapters(False)), "adapters are disabled"),
    "merged": (edited(merged), "merged: default"),
    "none active": (edited(deactivated), "no active adapter on this layer"),
    "DoRA": (lambda: tiny(use_dora=True), "adapter 'default' is a variant: Dora"),
    "lora_bias": (lambda: tiny(lora_bias=True), "lora_bias=True: lora_B.default has a bias"),
    "hook on A": (edited(lambda one: hook(one.lora_A["default"])), "lora_A.default has a hook"),
    "hook on B": (edited(lambda one: hook(one.lora_B["default"])), "lora_B.default has a hook"),
    "pre-hook on A": (edited(lambda one: pre_hook(one.lora_A["default"])), "lora_A.default has a hook"),
    "backward hook on B": (edited(lambda one: backward_hook(one.lora_B["default"])), "lora_B.default has a hook"),
    "backward pre-hook on A": (
        edited(lambda one: one.lora_A["default"].register_full_backward_pre_hook(lambda module, got: None)),
        "lora_A.default has a hook",
    ),
    "hook on dropout": (edited(lambda one: hook(one.lora_dropout["default"])), "lora_dropout.default has a hook"),
    "forward of A": (
        edited(lambda one: replaced_forward(one.lora_A["default"])),
        "lora_A.default has its forward replaced on the instance",
    ),
    "forward of the layer": (edited(replaced_forward), "its forward is replaced on the instance"),
    "class of A": (
        edited(lambda one: change_class(one.lora_A["default"])), "lora_A.default is a FancyLinear, not a plain nn.Linear"
    ),
    "parametrized B": (
        edited(lambda one: parametrizations.weight_norm(one.lora_B["default"])),
        "lora_B.default is a ParametrizedLinear, not a plain nn.Linear",
    ),
    "subclassed weight": (
        edited(lambda one: subclassed_weight(one.lora_A["default"])), "lora_A.default.weight is a Subclass"
    ),
    "view of a weight": (
        edited(lambda one: view_of_weight(one.lora_A["default"])), "lora_A.default.weight is a Tensor"
    ),
    "dropout of another class": (
        edited(set_dropout(nn.AlphaDropout(0.5))), "lora_dropout.default is a AlphaDropout, not a plain nn.Dropout"
    ),
    "scaling of a shape": (
        edited(set_scaling(torch.full((OUT,), 2.0))), r"scaling['default'] is a tensor of shape (20,), not a number"
    ),
    "infinite scaling": (edited(set_scaling(math.inf)), "scaling['default'] is inf, not a finite number"),
    "scaling of no number": (edited(set_scaling(math.nan)), "scaling['default'] is nan, not a finite number"),
    "half adapters under fp32": (edited(half), "x is float32, lora_A.default bfloat16, lora_B.default bfloat16"),
}  # fmt: skip
IN_BASE_ONLY = ("disabled", "merged", "none active")


@pytest.mark.parametrize("name", FALLBACKS)
def test_falls_back(name, computed):
    build, reason = FALLBACKS[name]
    model, patched = build(), build()
    x = torch.randn(5, IN, requires_grad=True)
    patch_peft(patched)
    torch.manual_seed(1)
    expected = call(model, x)
    torch.manual_seed(1)
    actual = call(patched, x)
    assert not computed
    assert actual.keys() == expected.keys()
    assert all(torch.allclose(t, expected[key], 0, 0, equal_nan=True) for key, t in actual.items())
    if name not in IN_BASE_ONLY:
        assert any("lora_" in key for key in actual)
    (found,) = explain(patched, x).layers
    assert found.form == "stock"
    assert reason in found.reason
    if name != "half adapters under fp32":  # only a call can show that
        (still,) = explain(patched).layers
        assert still == found


def test_disabling_while_merged_unmerges_as_peft_does(computed):
    model = tiny()
    patch_peft(model)
    before = layer(model).base_layer.weight.clone()
    layer(model).merge()
    with model.disable_adapter():
        model(torch.randn(2, IN))
    assert not layer(model).merged
    torch.testing.assert_close(layer(model).base_layer.weight, before)
    assert not computed


def test_mixed_batches(computed):
    model = tiny()
    model.add_adapter("second", config(r=2))
    model.eval()
    x, names = torch.randn(4, IN), ["default", "second", "__base__", "default"]
    expected = model(x, adapter_names=names)
    patch_peft(model)
    assert torch.equal(model(x, adapter_names=names), expected)
    (found,) = explain(model, x, adapter_names=names).layers
    assert found.reason == "called with adapter_names"
    assert not computed
    with pytest.raises(TypeError):  # what PEFT hands to the base layer still gets there
        layer(model)(x, no_such_argument=1)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        layer(model)(x, adapter_names=names[:2])
    assert not computed
    model(x)
    assert computed == ["lora_linear"]


def test_kinds_of_x(computed):
    model = tiny()
    patch_peft(model)
    plain = torch.randn(3, IN)
    assert isinstance(layer(model)(plain.as_subclass(Subclass)), Subclass)
    assert "x is a Subclass" in explain(layer(model), plain.as_subclass(Subclass)).layers[0].reason
    with pytest.raises(RuntimeError, match="dtype"):  # PyTorch's own words, as before
        layer(model)(plain.double())
    assert not computed


def test_input_casting_switched_off(computed):
    model, x = tiny(torch.bfloat16), torch.randn(3, IN).bfloat16()
    patch_peft(model)
    with disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="dtype"):
        model(x)
    assert not computed
    model(x)
    assert computed == ["lora_linear"]


def test_global_hooks_see_every_module(computed):
    model, seen = tiny(), []
    patch_peft(model)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(module))
    try:
        model(torch.randn(2, IN))
        assert "a hook on all modules" in explain(model).layers[0].reason
    finally:
        handle.remove()
    assert layer(model).lora_A["default"] in seen
    assert not computed


def test_transforms_and_tracing(computed):
    model, x = tiny(), torch.randn(3, IN)
    patch_peft(model)
    gradient = torch.func.grad(lambda x: model(x).square().sum())(x)
    (expected,) = torch.autograd.grad(model(y := x.clone().requires_grad_()).square().sum(), y)
    torch.testing.assert_close(gradient, expected)
    assert computed == ["lora_linear"]
    computed.clear()
    with warnings.catch_warnings(), torch.autograd.forward_ad.dual_level():
        warnings.simplefilter("ignore")  # torch scripts its formulas, and says that scripting is old
        dual = model(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
    assert tangent.abs().sum() > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.trace says that it is old
        graph = torch.jit.trace(layer(model), x, check_trace=False).inlined_graph
    assert not computed
    assert str(graph).count("aten::linear") == 3


def test_other_layers_are_reported():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.lin = nn.Embedding(9, IN), nn.Linear(IN, OUT)
            self.attention = nn.MultiheadAttention(OUT, 2)

        def forward(self, ids):
            h = self.lin(self.emb(ids))
            return self.attention(h, h, h)[0]

    model = get_peft_model(
        Words(), LoraConfig(r=2, target_modules=["emb", "lin", "attention"], init_lora_weights=False)
    )
    ids = torch.arange(6).view(3, 2)
    expected = model(ids)
    report = patch_peft(model)
    torch.testing.assert_close(model(ids), expected)
    found = {one.name.rpartition("model.")[2]: one for one in report.layers}
    assert found.keys() == {"emb", "lin", "attention", "attention.base_layer.out_proj"}
    assert found["lin"].form == "fused"
    assert "lora.Embedding computes something else" in found["emb"].reason
    assert "lora.MultiheadAttention computes something else" in found["attention"].reason
    assert "its forward is not used" in found["attention.base_layer.out_proj"].reason
    text = str(report)
    assert text.startswith("4 LoRA layers: 1 fused, 0 low-rank, 3 stock")
    assert re.search(r"^  1 stock: lora\.Embedding", text, re.M)


@pytest.mark.parametrize("where", ["lora_A", "base_layer", "layer"])
def test_accelerate_device_hooks(where, computed):
    hooks = pytest.importorskip("accelerate.hooks")
    model, x = tiny(), torch.randn(3, IN)
    expected = model(x)
    patch_peft(model)
    one = layer(model)
    target = {"lora_A": one.lora_A["default"], "base_layer": one.base_layer, "layer": one}[where]
    hooks.add_hook_to_module(target, hooks.AlignDevicesHook(execution_device="cpu"))
    torch.testing.assert_close(model(x), expected)
    assert computed == {"lora_A": [], "base_layer": ["lora_add"], "layer": ["lora_linear"]}[where]
    (found,) = explain(model, x).layers
    assert found.form == {"lora_A": "stock", "base_layer": "low-rank", "layer": "fused"}[where]
    assert ("instance" in found.reason) == (where != "layer")


def test_a_subclass_that_inherits_peft_s_forward_is_fast(computed):
    from peft.tuners.lora.layer import Linear

    class Mine(Linear):
        pass

    class Other(Linear):
        def forward(self, x, *args, **kwargs):
            return super().forward(x, *args, **kwargs) + 1

    for cls, expected in ((Mine, "fused"), (Other, "stock")):
        model = get_peft_model(Tiny(), config())
        layer(model).__class__ = cls
        (found,) = patch_peft(model).layers
        assert found.form == expected
        assert isinstance(layer(model), cls)
    assert "Other computes something else" in found.reason


def test_gptq_s_own_class(computed):
    """A class of PEFT's that is not lora.Linear, over a base layer that has no weight to speak of."""
    from peft.tuners.lora.gptq import GPTQLoraLinear

    class Packed(nn.Module):
        infeatures, outfeatures = IN, OUT

        def __init__(self):
            super().__init__()
            self.register_buffer("qweight", torch.randint(-9, 9, (OUT, IN), dtype=torch.int8))

        def forward(self, x):
            return nn.functional.linear(x, self.qweight.to(x.dtype) / 16)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = GPTQLoraLinear(Packed(), "default", config(), r=4, lora_alpha=8)

        def forward(self, x):
            return self.lin(x)

    model, x = Model(), torch.randn(6, IN, requires_grad=True)
    expected = call(model, x)
    (found,) = patch_peft(model).layers
    assert (found.form, found.reason) == ("low-rank", "the base layer is a Packed, not a plain nn.Linear")
    actual = call(model, x)
    assert computed == ["lora_add"]
    for key, t in expected.items():
        torch.testing.assert_close(actual[key], t, msg=key)
    model.lin.enable_adapters(False)
    assert torch.equal(model(x), model.lin.base_layer(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", ["patched", "sharded"])
@pytest.mark.parametrize("unit", ["model", "layer", "leaves"])
def test_fsdp2(unit, first, computed):
    """One rank is enough to see who gathers the parameters, and when."""
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        model, x = tiny(), torch.randn(3, IN, requires_grad=True)
        expected = call(model, x)
        one = layer(model)
        if first == "patched":
            patch_peft(model)
        units = {"model": [], "layer": [one], "leaves": [one.lora_A["default"], one.lora_B["default"]]}[unit]
        for module in [*units, model]:
            fully_shard(module, mesh=mesh)
        patch_peft(model)
        assert "DTensor" in explain(model).layers[0].reason or unit == "leaves"
        actual = {key: getattr(t, "full_tensor", lambda t=t: t)() for key, t in call(model, x).items()}
        assert actual.keys() == expected.keys()
        for key, t in actual.items():
            torch.testing.assert_close(t, expected[key], msg=key)
        assert computed == ([] if unit == "leaves" else ["lora_linear"])
        (found,) = explain(model, x).layers
        assert found.form == ("stock" if unit == "leaves" else "fused")
        assert found.reason == ("lora_A.default is a FSDPLinear, not a plain nn.Linear" if unit == "leaves" else "")
    finally:
        torch.distributed.destroy_process_group()
