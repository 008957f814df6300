"""LoRAQKV and LoRAMLP: their children's numbers in one call, and what walks a model for LoRALinear."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

from lora_kernels import LoRALinear, LoRAMLP, LoRAQKV, load_adapter, merge_and_unload, save_adapter
from lora_kernels.modules import blocks
from lora_kernels.parallel import LoRAColwise, LoRARowwise
from lora_kernels.peft import swap_linear

FUNCTIONS = {
    "silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
    "relu2": lambda t: F.relu(t) ** 2,
}  # fmt: skip
H, KINDS = 12, ["qkv", "mlp"]
kinds = pytest.mark.parametrize("kind", KINDS)


def make(kind, **kwargs):
    torch.manual_seed(0)
    sizes = (H, 16, 8) if kind == "qkv" else (H, 20)
    made = (LoRAQKV if kind == "qkv" else LoRAMLP)(*sizes, **({"r": 3, "lora_alpha": 6} | kwargs))
    for child in made.children():
        if isinstance(child, LoRALinear):
            nn.init.normal_(child.lora_B, std=0.3)
    return made


def linears(kind, **kwargs):
    sizes = [(H, 16), (H, 8), (H, 8)] if kind == "qkv" else [(H, 20), (H, 20), (20, H)]
    return [nn.Linear(*size, **kwargs) for size in sizes]


def x_of(rows=5):
    return torch.randn(2, rows, H, generator=torch.Generator().manual_seed(1))


def one_by_one(block, x):
    first, second, third = block.children()
    if isinstance(block, LoRAQKV):
        return torch.cat([first(x), second(x), third(x)], -1)
    return third(FUNCTIONS[block.activation](first(x)) * second(x))


def whole(block, x):
    y = block(x)
    return torch.cat(y, -1) if isinstance(y, tuple) else y


def outcome(block, run, x):
    leaf = x.clone().requires_grad_()
    torch.manual_seed(3)
    y = run(block, leaf)
    trained = [q for q in block.parameters() if q.requires_grad]
    return [y, *torch.autograd.grad(y.square().sum(), [leaf, *trained])]


def assert_same(got, expected):
    for value, exact in zip(got, expected, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-4, atol=1e-4 * exact.abs().max().item())


@pytest.fixture
def calls(monkeypatch):
    """Of the function that computes a block at once."""
    made = []
    for name in ("project", "lora_mlp"):
        function = getattr(blocks, name)

        def spy(*args, _function=function, **kwargs):
            made.append(kwargs)
            return _function(*args, **kwargs)

        monkeypatch.setattr(blocks, name, spy)
    return made


ALL = {"qkv": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("targets", [(0, 1, 2), (0, 2), (1,)], ids=str)
@kinds
def test_a_call_is_its_children_s(kind, targets, training, calls):
    block = make(kind, lora_dropout=0.4, targets=[ALL[kind][i] for i in targets]).train(training)
    assert [type(child) for child in block.children()] == [LoRALinear if i in targets else nn.Linear for i in range(3)]
    assert_same(outcome(block, whole, x_of()), outcome(block, one_by_one, x_of()))
    assert len(calls) == 1


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_activations_and_recompute(activation, calls):
    block = make("mlp", activation=activation, recompute=True, bias=False)
    assert_same(outcome(block, whole, x_of()), outcome(block, one_by_one, x_of()))
    assert calls == [{"activation": activation, "recompute": True, "accumulate_grad": [False] * 3}]
    assert repr(block).startswith(f"LoRAMLP(\n  activation='{activation}', recompute=True")


@kinds
def test_from_linears_shares_freezes_and_starts_as_the_base(kind):
    base = [q.eval() for q in linears(kind, dtype=torch.bfloat16)]
    kept = LoRALinear.from_linear(base[1], r=2)
    cls = LoRAQKV if kind == "qkv" else LoRAMLP
    block = cls.from_linears(base[0], kept, base[2], r=4, dtype=torch.float32, targets=ALL[kind][:2])
    first, second, third = block.children()
    assert not block.training
    assert (first.weight, first.bias) == (base[0].weight, base[0].bias)
    assert (second, third) == (kept, base[2])
    trained = [name for name, q in block.named_parameters() if q.requires_grad]
    assert trained == [f"{name}.lora_{side}" for name in ALL[kind][:2] for side in "AB"]
    assert first.lora_A.dtype == torch.float32
    x = x_of().bfloat16()
    torch.testing.assert_close(whole(block, x), one_by_one(block, x), rtol=0.02, atol=0.02)  # rounded less often


MIXED = {
    "qkv": r"lora_qkv: v: x is float32 but weights\[2\] is bfloat16\. Use torch\.autocast, or cast weights\[2\]",
    "mlp": r"lora_mlp: down: x is float32 but down\.weight is bfloat16\. Use torch\.autocast, or cast down\.weight",
}


@kinds
def test_layers_of_several_dtypes_are_for_autocast(kind, calls):
    """Which makes one of them; a call without it says which layer is at fault, and what to do."""
    base = linears(kind)
    block = (LoRAQKV if kind == "qkv" else LoRAMLP).from_linears(*base[:2], base[2].bfloat16(), r=2)
    assert [child.lora_A.dtype for child in block.children()] == [torch.float32] * 2 + [torch.bfloat16]
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = (outcome(block, run, x_of()) for run in (whole, one_by_one))
    assert len(calls) == 1
    for value, exact in zip(got, expected, strict=True):
        assert value.dtype == exact.dtype
        torch.testing.assert_close(value, exact, rtol=0.05, atol=0.05 * exact.abs().max().item())
    with pytest.raises(TypeError, match=f"^{MIXED[kind]}"):
        block(x_of())


@kinds
def test_state_dict_copies_and_merging(kind):
    block, x = make(kind, lora_dropout=0.5).eval(), x_of()
    names = [f"{name}.{q}" for name in ALL[kind] for q in ("weight", "bias", "lora_A", "lora_B")]
    assert list(block.state_dict()) == names
    other = make(kind).eval()
    for q in other.parameters():
        nn.init.zeros_(q)
    other.load_state_dict(block.state_dict())
    y = whole(block, x)
    assert torch.equal(whole(other, x), y)
    assert torch.equal(whole(copy.deepcopy(block), x), y)
    block.merge()
    assert list(block.state_dict()) == [name for name in names if "lora" not in name]
    torch.testing.assert_close(whole(block, x), y, rtol=1e-4, atol=1e-4)
    block.train()
    with pytest.raises(RuntimeError, match="merged; call unmerge"):
        block(x)
    block.unmerge()
    torch.testing.assert_close(whole(block.eval(), x), y, rtol=1e-4, atol=1e-4)
    block.reset_lora_parameters()
    assert not any(child.lora_B.any() for child in block.children())


@kinds
def test_peft_s_words(kind, tmp_path):
    """Adapters to a file and back into a model whose layers were swapped; merged for good."""
    model, x = nn.ModuleDict({"block": make(kind)}).eval(), x_of()
    expected = whole(model["block"], x)
    save_adapter(model, tmp_path)
    other = make(kind, targets=ALL[kind][:1])
    plain = nn.ModuleDict({"block": other}).eval()
    for name, q in model["block"].named_parameters():
        if "lora" not in name:
            other.get_parameter(name).data = q.data.clone()
    swap_linear(plain, r=3, lora_alpha=6, target_modules=list(ALL[kind][1:]))
    load_adapter(plain, tmp_path)
    assert [type(child) for child in other.children()] == [LoRALinear] * 3
    torch.testing.assert_close(whole(other.eval(), x), expected)
    merge_and_unload(plain)
    assert [type(child) for child in other.children()] == [nn.Linear] * 3
    torch.testing.assert_close(whole(other, x), expected, rtol=1e-4, atol=1e-4)


def pre(child, heard):
    child.register_forward_pre_hook(lambda *args: heard.append("pre"))


def full_backward(child, heard):
    child.register_full_backward_hook(lambda *args: heard.append("backward"))


def own_forward(child, heard):
    stock = child.forward
    child.forward = lambda x: (heard.append("forward"), stock(x))[1]


def subclass(child, heard):
    class Listening(LoRALinear):
        def forward(self, x):
            heard.append("class")
            return super().forward(x)

    child.__class__ = Listening


def everywhere(child, heard):
    return nn.modules.module.register_module_forward_hook(lambda module, *args: heard.append(type(module).__name__))


@pytest.mark.parametrize("listen", [pre, full_backward, own_forward, subclass, everywhere])
@kinds
def test_a_child_that_is_listened_to_is_called(kind, listen, calls):
    block, heard = make(kind), []
    expected = outcome(block, whole, x_of())
    calls.clear()
    handle = listen(list(block.children())[1], heard)
    try:
        assert_same(outcome(block, whole, x_of()), expected)
    finally:
        if handle is not None:
            handle.remove()
    assert len(heard) == (4 if listen is everywhere else 1)
    assert not calls


@pytest.mark.parametrize("listened", [True, False])
def test_an_activation_that_was_set_is_checked_at_the_call(listened):
    block, heard = make("mlp"), []
    if listened:
        pre(block.gate_proj, heard)
    block.activation = "swish"
    with pytest.raises(ValueError, match=r"activation='swish' is not one of: silu, .*Use \"silu\""):
        block(x_of())
    assert not heard


@kinds
def test_it_compiles_to_one_graph(kind, monkeypatch):
    # the tests' own, which poisons memory, is nothing that a compiler could trace
    monkeypatch.setattr(torch.Tensor, "new_empty", torch._C.TensorBase.new_empty)
    torch.compiler.reset()
    block, x = make(kind, lora_dropout=0.3), x_of()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    assert_same(outcome(block, lambda _, x: whole(compiled, x), x), outcome(block, whole, x))


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module.*returned a view:UserWarning")
@kinds
def test_sharded_parents_and_children(kind, mesh, calls):
    """A sharded block has its parameters whole while it runs; children that are parallelized do their own part."""
    x = x_of()
    block = make(kind)
    expected = outcome(block, whole, x)
    calls.clear()
    sharded = fully_shard(copy.deepcopy(block), mesh=mesh)
    torch.testing.assert_close(whole(sharded, x), expected[0])
    assert len(calls) == 1
    styles = LoRAColwise(), LoRAColwise(), LoRAColwise() if kind == "qkv" else LoRARowwise()
    plan = dict(zip(ALL[kind], styles, strict=True))
    parallel = parallelize_module(copy.deepcopy(block), mesh, plan)
    torch.testing.assert_close(whole(parallel, x), expected[0])
    assert len(calls) == 1


WRONG = {
    "rank": (lambda: LoRAQKV(4, 4, r=0), "^LoRAQKV: r must be at least 1, got 0"),
    "rank of new adapters": (
        lambda: LoRAMLP.from_linears(*linears("mlp"), r=0),
        "^LoRAMLP: r must be at least 1, got 0",
    ),
    "devices": (
        lambda: LoRAQKV.from_linears(*linears("qkv")[:2], nn.Linear(H, 8, device="meta")),
        "LoRAQKV.from_linears: the layers must have one device, got q_proj cpu, k_proj cpu, v_proj meta",
    ),
    "targets": (
        lambda: LoRAQKV(4, 4, targets=["q_proj", "o_proj"]),
        "^LoRAQKV: targets has 'o_proj', which is none of its layers: q_proj, k_proj, v_proj\\.$",
    ),
    "no targets": (lambda: LoRAMLP(4, 4, targets=()), r"a list of at least one of gate_proj, .*, down_proj, got \(\)"),
    "one string": (lambda: LoRAMLP(4, 4, targets="up_proj"), "got 'up_proj'"),
    "activation": (lambda: LoRAMLP(4, 4, activation="tanh"), "^LoRAMLP: activation='tanh' is not one of: silu, gelu"),
    "widths": (
        lambda: LoRAQKV.from_linears(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(5, 4)),
        "must take the same number of features, got 4, 4 and 5",
    ),
    "shapes": (
        lambda: LoRAMLP.from_linears(nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(5, 4)),
        "got layers of 4 to 6, 4 to 6, 5 to 4 features",
    ),
    "hooks": (lambda: LoRAQKV.from_linears(*[hooked()] * 3), "q_proj has _forward_hooks set on it"),
}


def hooked():
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda *args: None)
    return layer


@pytest.mark.parametrize("wrong", WRONG)
def test_errors(wrong):
    call, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        call()


def test_nothing_is_changed_by_a_refusal():
    base = linears("qkv")
    with pytest.raises(TypeError, match=r"v_proj is a Bilinear, not exactly an nn\.Linear"):
        LoRAQKV.from_linears(base[0], base[1], nn.Bilinear(4, 4, 4))
    with pytest.raises(ValueError, match="one device, got q_proj cpu, k_proj cpu, v_proj meta"):
        LoRAQKV.from_linears(*base[:2], LoRALinear(H, 8, device="meta"))
    assert all(q.requires_grad for layer in base for q in layer.parameters())
