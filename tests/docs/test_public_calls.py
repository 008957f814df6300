"""Every public function and class is there under its name, and a call of it does what it did."""

import contextlib
import importlib
import json

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

import lora_kernels
from lora_kernels import LoRALinear, Projection, explain, reference
from lora_kernels.quantized import QuantizedWeight

IN, OUT, R, SCALING = 12, 7, 3, 0.5
_draw = torch.Generator().manual_seed(0)
X, DY, WEIGHT, BIAS, A, B, BASE, SQUARE = (
    torch.randn(shape, generator=_draw)
    for shape in ((5, IN), (5, OUT), (OUT, IN), (OUT,), (R, IN), (OUT, R), (5, OUT), (OUT, OUT))
)
Y = X @ WEIGHT.T + BIAS + SCALING * (X @ A.T) @ B.T
LAYER = Projection(WEIGHT, A, B, BIAS, SCALING)

same = torch.testing.assert_close


def randomised(module):
    """Give every B its numbers, because an adapter with B = 0 changes nothing."""
    torch.manual_seed(1)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return module


def layer():
    """A `LoRALinear` that computes Y from X."""
    made = LoRALinear(IN, OUT, r=R, lora_alpha=R * SCALING)
    made.load_state_dict(dict(weight=WEIGHT, bias=BIAS, lora_A=A, lora_B=B))
    return made


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, OUT), nn.ReLU(), nn.Linear(OUT, IN))


def of_peft():
    """A PEFT model with one LoRA layer."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    config = peft.LoraConfig(r=R, lora_alpha=6, target_modules=["0"], init_lora_weights=False)
    return peft.get_peft_model(model(), config)


# The functions and modules. Each call takes the public object; where it needs a folder, it takes the current one.


def linear(lora_linear):
    same(lora_linear(X, WEIGHT, A, B, scaling=SCALING, bias=BIAS, dropout_p=0.0), Y)


def add(lora_add):
    same(lora_add(X @ WEIGHT.T + BIAS, X, A, B, scaling=SCALING, dropout_p=0.0), Y)


def projections(lora_projections):
    first, second = lora_projections(X, [WEIGHT] * 2, [(A, B), None], biases=[BIAS, None], scaling=[SCALING, 1.0])
    same(first, Y)
    same(second, X @ WEIGHT.T)


def qkv(lora_qkv):
    for found in lora_qkv(X, [WEIGHT] * 3, [(A, B)] * 3, biases=[BIAS] * 3, scaling=SCALING):
        same(found, Y)


def grouped(lora_grouped_linear):
    """Rows 0 to 2 belong to a layer of zeros, the others but the last to the layer of Y."""
    stacks = [torch.stack((torch.zeros_like(t), t)) for t in (WEIGHT, A, B, BIAS)]
    y = lora_grouped_linear(X, *stacks[:3], torch.tensor([0, 2, 4]), scaling=SCALING, bias=stacks[3])
    same(y, torch.cat((torch.zeros(2, OUT), Y[2:4], torch.zeros(1, OUT))))


def mlp(lora_mlp):
    same(lora_mlp(X, LAYER, LAYER, Projection(SQUARE)), (nn.functional.silu(Y) * Y) @ SQUARE.T)
    same(lora_mlp(X, None, LAYER, Projection(SQUARE), activation="relu2"), Y.relu().square() @ SQUARE.T)


def projection(cls):
    made = cls(WEIGHT, A, B, scaling=SCALING)
    assert made._fields == ("weight", "lora_A", "lora_B", "bias", "scaling", "dropout_p")
    assert (made.bias, made.scaling, made.dropout_p) == (None, SCALING, 0.0)


def module(cls):
    one = layer()
    same(one(X), Y)
    same(one.weight, WEIGHT)
    assert {name for name, _ in one.named_parameters() if "lora" in name} == {"lora_A", "lora_B"}
    one.merge()
    with torch.no_grad():
        same(one(X), Y)
    one.unmerge()
    same(one.weight, WEIGHT)
    same(cls.from_linear(base := nn.Linear(IN, OUT), r=R, lora_alpha=1, lora_dropout=0.1, use_rslora=True)(X), base(X))


def module_of_qkv(cls):
    block = randomised(cls(IN, 8, 4, r=R, lora_alpha=6, targets=["q_proj", "v_proj"]))
    children = block.q_proj, block.k_proj, block.v_proj
    assert [type(child) is LoRALinear for child in children] == [True, False, True]
    same(list(block(X)), [child(X) for child in children])
    same(cls.from_linears(*children)(X)[0], block.q_proj(X))


def module_of_mlp(cls):
    block = randomised(cls(IN, 8, r=R, lora_alpha=6, activation="gelu", recompute=True))
    children = block.gate_proj, block.up_proj, block.down_proj
    expected = block.down_proj(nn.functional.gelu(block.gate_proj(X)) * block.up_proj(X))
    same(block(X), expected)
    same(cls.from_linears(*children, activation="gelu")(X), expected)


# The reference


def random_words(philox4x32):
    found = [int(word) for word in philox4x32(0, torch.zeros((), dtype=torch.int64), rounds=10)]
    assert found == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8], "the published answer"


def mask(keep_mask):
    keep = keep_mask(1, 40, 50, 0.3)
    assert (keep.shape, keep.dtype) == ((40, 50), torch.bool)
    assert 0.65 < keep.float().mean() < 0.75
    assert torch.equal(keep, keep_mask(1, 40, 50, 0.3))


def quantized(cls, dequantize=QuantizedWeight.dequantize):
    made = cls.nf4(torch.tensor([0x1F], dtype=torch.uint8), torch.tensor([2.0]), shape=(1, 2))
    same(dequantize(made, torch.float32), torch.tensor([[-2 * 0.6961928, 2.0]]))  # the second value of NF4, and 1


KEEP = torch.arange(X.numel()).view(X.shape) % 3 > 0


def dropping(dropped):
    same(dropped(X, KEEP, 0.5), X * KEEP * 2)
    assert dropped(X, None, 0.0) is X


def activating(activated):
    same(activated(X, X, "silu"), nn.functional.silu(X) * X)
    same(activated(X, None, "gelu_tanh"), nn.functional.gelu(X, approximate="tanh"))


def gradients():
    """Of the reference's arguments, by autograd, with dropout."""
    leaves = [t.clone().requires_grad_() for t in (X, A, B, WEIGHT, BIAS)]
    x, a, b, weight, bias = leaves
    y = reference.forward(x, weight, a, b, bias, SCALING, KEEP, 0.5)
    return dict(zip(("x", "a", "b", "weight", "bias"), torch.autograd.grad(y, leaves, DY), strict=True))


def protocol(cls):
    assert set(cls.__annotations__) == {"weight", "lora_A", "lora_B", "bias", "scaling", "dropout_p"}


# What is made for PEFT, and what writes and reads its files


def patched(patch_peft):
    net = of_peft()
    y = net(X)
    report = patch_peft(net, backend="auto", blocks=True)
    assert (report.count("fused"), len(report.layers)) == (1, 1)
    same(net(X), y)


def unpatched(unpatch_peft):
    net = of_peft()
    stock = type(net.base_model.model[0])
    lora_kernels.patch_peft(net)
    assert type(net.base_model.model[0]) is not stock
    assert unpatch_peft(net) == 1
    assert type(net.base_model.model[0]) is stock


def explained(explain):
    net = of_peft()
    found = explain(net, X)
    assert [one.form for one in found.layers] == ["stock"]
    assert found.layers[0].reason


def accelerated(context):
    net = of_peft()
    with context():
        assert explain(net).layers[0].form == "fused"
    assert explain(net).layers[0].form == "stock"


def accelerating(accelerate):
    net = of_peft()
    try:
        accelerate()
        assert explain(net).layers[0].form == "fused"
    finally:
        accelerate(False)
    assert explain(net).layers[0].form == "stock"


def report(cls):
    from lora_kernels.peft import BlockReport, LayerReport

    made = cls((LayerReport("a", "Linear", "fused"),), (BlockReport("b", "mlp", "joined"),))
    assert (made.count("fused"), made.count("joined"), made.count("stock")) == (1, 1, 0)
    assert str(made).splitlines()[0].startswith("1 LoRA layers: 1 fused")


def line_of_report(cls):
    made = cls("name", "kind", "form", "reason")
    assert (made.name, made.kind, made.form, made.reason) == ("name", "kind", "form", "reason")
    assert cls("name", "kind", "form").reason == ""


def swapped(swap_linear):
    net = model()
    y = net(X)
    assert swap_linear(net, ["0"], r=R, lora_alpha=6, lora_dropout=0.1) == ["0"]
    assert isinstance(net[0], LoRALinear)
    same(net(X), y)


def merged(merge_and_unload):
    net = model()
    lora_kernels.swap_linear(net, "all-linear", r=R)
    y = randomised(net)(X)
    assert merge_and_unload(net) is net
    assert [type(part) for part in net] == [nn.Linear, nn.ReLU, nn.Linear]
    same(net(X), y)


def saved(save_adapter):
    net = model()
    lora_kernels.swap_linear(net, ["0"], r=R, lora_alpha=6)
    save_adapter(randomised(net), "adapter", base_model_name_or_path="base", task_type="CAUSAL_LM")
    tensors = load_file("adapter/adapter_model.safetensors")
    assert {key: tuple(t.shape) for key, t in tensors.items()} == {
        "base_model.model.0.lora_A.weight": (R, IN), "base_model.model.0.lora_B.weight": (OUT, R),
    }  # fmt: skip
    with open("adapter/adapter_config.json") as file:
        config = json.load(file)
    expected = dict(
        peft_type="LORA", r=R, lora_alpha=6, lora_dropout=0.0, target_modules=["0"], base_model_name_or_path="base",
        task_type="CAUSAL_LM", use_rslora=False, bias="none", fan_in_fan_out=False,
    )  # fmt: skip
    assert config.items() >= expected.items()


def loaded(load_adapter):
    net, again = model(), model()
    lora_kernels.swap_linear(net, ["0", "2"], r=R, lora_alpha=6)
    lora_kernels.save_adapter(randomised(net), "adapter")
    assert load_adapter(again, "adapter") == ["0", "2"]
    same(again(X), net(X))


# Tensor parallelism


@contextlib.contextmanager
def mesh():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def parallel(style):
    with mesh() as ranks:
        net = parallelize_module(nn.Sequential(layer()), ranks, {"0": style()})
        same(net(X), Y)


LAYERS = {"lora_grouped_linear": grouped, "lora_linear": linear, "lora_mlp": mlp, "lora_projections": projections}
PEFT = {
    "explain": explained, "load_adapter": loaded, "merge_and_unload": merged, "patch_peft": patched,
    "save_adapter": saved, "swap_linear": swapped, "unpatch_peft": unpatched,
}  # fmt: skip
CALLS = {
    "lora_kernels": LAYERS | PEFT | {
        "LoRALinear": module, "LoRAMLP": module_of_mlp, "LoRAQKV": module_of_qkv, "Projection": projection,
        "__version__": lambda version: version.split("."), "lora_qkv": qkv,
        "reference": lambda module: linear(module.lora_linear),
    },
    "lora_kernels.functional": LAYERS | {"lora_add": add, "lora_qkv": qkv},
    "lora_kernels.peft": PEFT | {
        "BlockReport": line_of_report, "LayerReport": line_of_report, "Report": report, "accelerate": accelerating,
        "accelerated": accelerated,
    },
    "lora_kernels.parallel": {"LoRAColwise": parallel, "LoRARowwise": parallel},
    "lora_kernels.quantized": {"Nested": lambda cls: same(cls(A, B, BIAS).blocksize, 256), "QuantizedWeight": quantized},
    "lora_kernels.reference": LAYERS | {
        "Layer": protocol, "activated": activating, "dequantize": lambda call: quantized(QuantizedWeight, call), "dropped": dropping,
        "forward": lambda forward: same(forward(X, WEIGHT, A, B, BIAS, SCALING), Y),
        "grad_bias": lambda grad: same(grad(DY), gradients()["bias"]),
        "grad_lora_A": lambda grad: same(grad(DY, X, B, SCALING, KEEP, 0.5), gradients()["a"]),
        "grad_lora_B": lambda grad: same(grad(DY, X, A, SCALING, KEEP, 0.5), gradients()["b"]),
        "grad_weight": lambda grad: same(grad(DY, X), gradients()["weight"]),
        "grad_x": lambda grad: same(grad(DY, WEIGHT, A, B, SCALING, KEEP, 0.5), gradients()["x"]),
        "keep_mask": mask, "lora_add": add, "philox4x32": random_words,
    },
}  # fmt: skip


@pytest.mark.parametrize("place", CALLS)
def test_no_name_is_lost_and_each_has_a_call_here(place):
    names = importlib.import_module(place).__all__
    assert sorted(names) == sorted(CALLS[place])
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("place", "name"), [(place, name) for place, names in CALLS.items() for name in names])
def test_a_call_does_what_it_did(place, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    CALLS[place][name](getattr(importlib.import_module(place), name))
