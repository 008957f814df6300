"""Blocks whose layers have to be called one by one: why, that they then are, and that a call leaves nothing behind."""

import copy
import gc
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("peft")
pytest.importorskip("transformers")

from block_samples import WIDTH, Attention, Functional, Gated, block
from peft import LoraConfig
from peft_samples import call, check, truth
from transformers.activations import ACT2FN

from lora_kernels import patch_peft, unpatch_peft
from lora_kernels.peft import blocks, explain

IN_A_ROW = "its forward does not call q_proj, k_proj and v_proj one after another, come what may"
ONE_INPUT = "its forward does not call q_proj, k_proj and v_proj on one input"
ONCE = "its forward does not call each of q_proj, k_proj and v_proj once"


def only(report):
    (found,) = report.blocks
    return found


def hook(module):
    module.register_forward_hook(lambda module, args, y: y * 1.5)


def pre_hook(module):
    module.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def replaced_forward(module):
    forward = module.forward
    module.forward = lambda x: forward(x) * 3


def second_adapter(model):
    """Active beside the first on k_proj, and with dropout."""
    model.add_adapter("second", LoraConfig(target_modules=["k_proj"], lora_dropout=0.5))
    model.base_model.set_adapter(["default", "second"])
    patch_peft(model)


def fancy(module):
    class FancyLinear(nn.Linear):
        pass

    module.base_layer.__class__ = FancyLinear


STATES = {
    "hook on k_proj": (Attention, lambda part: hook(part.k_proj), "k_proj has a hook"),
    "pre-hook on up_proj": (Gated, lambda part: pre_hook(part.up_proj), "up_proj has a hook"),
    "forward of v_proj": (
        Attention, lambda part: replaced_forward(part.v_proj),
        "v_proj is stock: its forward is replaced on the instance (X-LoRA, or a hook from before)",
    ),
    "hook on the activation": (
        Gated, lambda part: hook(part.act_fn), "act_fn has a hook, or is not what it was when the model was patched"
    ),
    "another activation": (
        Gated, lambda part: setattr(part, "act_fn", nn.Tanh()),
        "act_fn has a hook, or is not what it was when the model was patched",
    ),
    "merged": (Gated, lambda part: part.down_proj.merge(), "down_proj is stock: merged: default"),
    "disabled": (Attention, lambda part: part.q_proj.enable_adapters(False), "q_proj is stock: adapters are disabled"),
    "base of another class": (
        Gated, lambda part: fancy(part.gate_proj),
        "gate_proj is low-rank: the base layer is a FancyLinear, not a plain nn.Linear",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STATES)
def test_a_layer_that_has_to_be_called(case, joined):
    part, change, reason = STATES[case]
    model, one = block(part())
    assert only(patch_peft(model)).form == "joined"
    change(one)
    alone(model, reason, joined)


def test_several_adapters_join_unless_they_have_masks_of_their_own(joined):
    model, _ = block(Attention())
    second_adapter(model)
    alone(model, "k_proj has 2 active adapters, and dropout", joined)
    model.eval()
    stock, x = copy.deepcopy(model), torch.randn(3, WIDTH, requires_grad=True)
    unpatch_peft(stock)
    assert only(explain(model, x)).form == "joined"
    check(call(model, x), call(stock, x), truth(stock, x), torch.float32)
    assert joined == ["lora_projections"]


def alone(model, reason, joined):
    """Each layer is called, for this reason."""
    x = torch.randn(3, WIDTH, requires_grad=True)
    assert only(explain(model)).reason == only(explain(model, x)).reason == reason
    twin = copy.deepcopy(model)
    unpatch_peft(twin)
    patch_peft(twin, blocks=False)
    torch.manual_seed(0)
    expected = call(twin, x)
    torch.manual_seed(0)
    actual = call(model, x)
    assert not joined
    for name, t in expected.items():
        assert torch.equal(actual[name], t), name


@pytest.mark.parametrize(
    ("part", "reason"),
    [(Attention, "k_proj is a Fancy, not a plain nn.Linear"), (Gated, "up_proj has a hook")],
)
def test_a_layer_without_an_adapter_that_has_to_be_called(part, reason, joined):
    class Fancy(nn.Linear):
        pass

    model, one = block(part(), target_modules=["q_proj", "gate_proj"])
    patch_peft(model)
    if part is Attention:
        one.k_proj.__class__ = Fancy
    else:
        hook(one.up_proj)
    x = torch.randn(3, WIDTH)
    assert only(explain(model)).reason == only(explain(model, x)).reason == reason
    model(x)
    assert not joined


def test_what_only_a_call_shows(joined):
    model, one = block(Attention(), target_modules=["q_proj"])
    patch_peft(model)
    x = torch.randn(3, WIDTH)
    assert only(explain(model, x)).form == "joined"
    one.v_proj.double()
    assert only(explain(model)).form == "joined", "v_proj fits some x"
    with pytest.raises(RuntimeError, match="dtype"):  # PyTorch says what is wrong, not this library
        model(x)
    assert not joined


def test_a_batch_of_mixed_adapters(joined):
    model, _ = block(Attention())
    model.eval()
    names, x = ["default", "__base__", "default"], torch.randn(3, WIDTH)
    expected = model(x, adapter_names=names)
    patch_peft(model)
    assert torch.equal(model(x, adapter_names=names), expected)
    assert not joined
    assert only(explain(model, x, adapter_names=names)).reason == "q_proj is stock: called with adapter_names"
    model(x)
    assert joined == ["lora_projections"]


class Cross(Attention):
    def forward(self, x, memory=None):
        memory = x if memory is None else memory
        return torch.cat([self.q_proj(x), self.k_proj(memory), self.v_proj(memory)], -1)


class Branch(Attention):
    def forward(self, x, alone=False):
        q = self.q_proj(x)
        if alone:
            return q
        k = self.k_proj(x)
        v = self.v_proj(x)
        return torch.cat([q, k, v], -1)


class Choice(Attention):
    def forward(self, x, alone=False):
        q, k, v = self.q_proj(x), None if alone else self.k_proj(x), self.v_proj(x)
        return torch.cat([q, v] if alone else [q, k, v], -1)


class Rewritten(Attention):
    def forward(self, x):
        q = self.q_proj(x)
        x = x * 2
        k, v = self.k_proj(x), self.v_proj(x)
        return torch.cat([q, k, v], -1)


class Twice(Attention):
    def forward(self, x):
        q, k = self.q_proj(x), self.k_proj(x)
        v = self.v_proj(x) + self.v_proj(x)
        return torch.cat([q, k, v], -1)


class Scaled(Gated):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * 0.5)


class Added(Gated):
    def forward(self, x):
        return super().forward(x) + x


class Doubled(Gated):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(2 * x))


class Swapped(Gated):
    def forward(self, x):
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))


class Dropped(Gated):
    """Dropout that is off while the model is patched."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.1).eval()

    def forward(self, x):
        return self.dropout(super().forward(x))


class DroppedInside(Gated):
    def forward(self, x):
        h = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(F.dropout(h, 0.1, self.training))


class Normed(Gated):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)

    def forward(self, x):
        return self.down_proj(self.norm(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


class Chunked(Gated):
    def forward(self, x):
        return torch.cat([super(Chunked, self).forward(part) for part in x.split(2)])


scope = dict(Attention=Attention, torch=torch)
exec("class Unread(Attention):\n    def forward(self, x):\n        return self.q_proj(x)", scope)

NO_MLP = "it is not down_proj(act(gate_proj(x)) · up_proj(x)) with act one of silu, gelu, gelu_tanh, relu2"
SHAPES = {
    Cross: ONE_INPUT, Branch: IN_A_ROW, Choice: IN_A_ROW, Twice: ONCE, scope["Unread"]: "the source of its forward cannot be read",
    Rewritten: "its forward uses x between q_proj, k_proj and v_proj",
    Scaled: NO_MLP, Added: NO_MLP, Doubled: NO_MLP, Swapped: NO_MLP, Dropped: NO_MLP, DroppedInside: NO_MLP, Chunked: NO_MLP,
    Normed: "it has more than three layers and an activation: norm",
}  # fmt: skip


@pytest.mark.parametrize("part", SHAPES)
def test_what_is_no_such_block_is_left_alone(part, joined):
    model, one = block(part())
    patch_peft(model)
    assert type(one) is part
    assert only(explain(model)).reason == SHAPES[part]
    x = torch.randn(3, WIDTH)
    model(x)
    assert not joined


@pytest.mark.parametrize("act", ["silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_python", "relu2"])
def test_activations_that_are_known(act, joined):
    stock, _ = block(Gated(ACT2FN[act]))
    patched = copy.deepcopy(stock)
    assert only(patch_peft(patched)).form == "joined"
    x = torch.randn(3, WIDTH, requires_grad=True)
    check(call(patched, x), call(stock, x), truth(stock, x), torch.float32)
    assert joined == ["lora_mlp"]


@pytest.mark.parametrize("act", ["relu", "quick_gelu", "gelu_10", "tanh", "linear"])
def test_activations_that_are_not(act):
    model, _ = block(Gated(ACT2FN[act]))
    assert only(patch_peft(model)).reason == NO_MLP


def test_functions_for_activations(joined):
    model, one = block(Functional())
    del one.act_fn
    one.act = F.silu  # not used, but a part that is watched
    x = torch.randn(3, WIDTH)
    expected = model(x)
    assert only(patch_peft(model)).form == "joined"
    torch.testing.assert_close(model(x), expected)
    assert joined == ["lora_mlp"]
    one.act = F.gelu
    assert "act has a hook, or is not what it was" in only(explain(model)).reason
    torch.testing.assert_close(model(x), expected)
    assert joined == ["lora_mlp"]


def test_one_layer_in_two_places(joined):
    stock, part = block(Attention())
    part.v_proj = part.k_proj
    patched = copy.deepcopy(stock)
    one = patched.base_model.model.part
    assert one.v_proj is one.k_proj
    assert only(patch_peft(patched)).form == "joined"
    x = torch.randn(3, WIDTH, requires_grad=True)
    assert only(explain(patched, x)).form == "joined"
    check(call(patched, x), call(stock, x), truth(stock, x), torch.float32)
    assert joined == ["lora_projections"]


class Between(Attention):
    """Something happens between q and k."""

    happens = staticmethod(lambda part: None)

    def forward(self, x):
        q = self.q_proj(x)
        self.happened = self.happens(self)
        k, v = self.k_proj(x), self.v_proj(x)
        return torch.cat([q, k, v], -1)


@pytest.fixture
def watched_outputs(monkeypatch):
    """Weak references to all that blocks computed together."""
    seen = []

    def spy(*args, _function=blocks.lora_projections, **kwargs):
        ys = _function(*args, **kwargs)
        seen.extend(map(weakref.ref, ys))
        return ys

    monkeypatch.setattr(blocks, "lora_projections", spy)
    return seen


def test_nothing_outlives_a_call(watched_outputs):
    model, _ = block(Attention())
    patch_peft(model)
    x = torch.randn(3, WIDTH)
    given = weakref.ref(x)
    gc.disable()
    try:
        with torch.no_grad():
            y = model(x, lambda q, k, v: q.clone())
        assert len(watched_outputs) == 3
        assert not any(t() is not None for t in watched_outputs)
        del x
        assert given() is None
        assert y.isfinite().all()
    finally:
        gc.enable()


class Freed(Between):
    def forward(self, x):
        q = self.q_proj(x).sum()
        self.happened = self.happens(self)
        k, v = self.k_proj(x), self.v_proj(x)
        return q + k + v


def test_what_was_handed_out_is_not_held(watched_outputs):
    model, one = block(Freed())
    patch_peft(model)
    one.happens = lambda _: [t() is not None for t in watched_outputs]
    with torch.no_grad():
        model(torch.randn(3, WIDTH))
    assert one.happened == [False, True, True]


def test_another_x_is_another_call(joined):
    stock, part = block(Between())
    patched = copy.deepcopy(stock)
    patch_peft(patched)
    x, other = torch.randn(3, WIDTH), torch.randn(3, WIDTH)
    for model in (stock, patched):
        model.base_model.model.part.happens = lambda part: part.k_proj(other)
    torch.testing.assert_close(patched(x), stock(x))
    torch.testing.assert_close(patched.base_model.model.part.happened, part.happened)
    assert joined == ["lora_projections"]


@pytest.mark.parametrize("part", [Attention, Gated])
def test_a_dispatch_mode_sees_each_layer(part, joined):
    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **kwargs or {})

    model, _ = block(part())
    patch_peft(model)
    x = torch.randn(3, WIDTH)
    with Watching():
        seen = model(x)
    assert not joined
    torch.testing.assert_close(seen, model(x))
    assert len(joined) == 1


def test_an_exception_leaves_nothing_behind(watched_outputs):
    """Not even where somebody keeps it, and with it the frames that it went through."""
    model, one = block(Between())
    patch_peft(model)
    x = torch.randn(3, WIDTH)
    expected = model(x)
    watched_outputs.clear()
    one.happens = lambda _: 1 / 0
    with pytest.raises(ZeroDivisionError) as kept, torch.no_grad():
        model(x)
    q, k, v = (t() for t in watched_outputs)
    assert q is not None, "the frame of the block's forward is still there"
    assert k is v is None
    del kept
    one.happens = lambda _: None
    assert torch.equal(model(x), expected)


def test_a_stand_in_that_is_kept_is_the_block(watched_outputs):
    kept = []
    model, one = block(Between())
    patch_peft(model)
    one.happens = kept.append
    x = torch.randn(3, WIDTH)
    model(x)
    (stand_in,) = kept
    assert stand_in is not one
    assert isinstance(stand_in, Between)
    assert type(stand_in).__name__ == "Between"
    assert stand_in.q_proj.scaling == one.q_proj.scaling
    assert list(stand_in.modules())[1:] == list(one.modules())[1:]
    torch.testing.assert_close(stand_in.k_proj(x), one.k_proj(x))
    assert len(watched_outputs) == 3, "after its call each layer is called"


def test_what_a_forward_writes_is_written_to_the_block(joined):
    model, one = block(Between())
    patch_peft(model)
    one.happens = lambda part: part.k_proj.scaling["default"]
    model(torch.randn(3, WIDTH))
    assert joined == ["lora_projections"]
    assert one.happened == 1.5
    model, one = block(Attention())
    patch_peft(model)
    model(torch.randn(3, WIDTH))
    assert one.calls == 1


def test_x_may_change_between_the_layers(joined):
    stock, part = block(Between())
    patched = copy.deepcopy(stock)
    assert only(patch_peft(patched)).form == "joined"
    one = patched.base_model.model.part
    x, y = torch.randn(3, WIDTH), torch.randn(3, WIDTH)
    part.happens = lambda _: x.add_(1)
    one.happens = lambda _: y.copy_(x)
    y.copy_(x)
    with torch.no_grad():
        expected = stock(x)
        torch.testing.assert_close(patched(y), expected)
    assert joined == ["lora_projections"]


def test_results_may_be_written_to(joined):
    stock, _ = block(Attention())
    patched = copy.deepcopy(stock)
    patch_peft(patched)

    def mixed(q, k, v):
        q.mul_(2)
        k[..., 0] = 0
        return torch.cat([q, k, v], -1)

    x = torch.randn(2, 3, WIDTH, requires_grad=True)
    stock, patched = (lambda t, model=model: model(t, mixed) for model in (stock, patched))
    expected, actual = stock(x), patched(x)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (actual, expected)))
    assert joined == ["lora_projections"]


def test_in_inference_mode(joined):
    for part in (Attention(), Gated()):
        model, _ = block(part)
        x = torch.randn(3, WIDTH)
        expected = model(x)
        patch_peft(model)
        with torch.inference_mode():
            torch.testing.assert_close(model(x), expected)
            torch.testing.assert_close(model(x.clone()), expected)
    assert joined == ["lora_projections"] * 2 + ["lora_mlp"] * 2


def test_threads_do_not_mix():
    """Both are between q and k at a time."""
    model, one = block(Between())
    xs = [torch.randn(3, WIDTH), torch.randn(3, WIDTH)]
    expected = [model(x) for x in xs]
    patch_peft(model)
    meet, actual = threading.Barrier(2, timeout=30), [None, None]
    one.happens = lambda _: meet.wait()

    def run(i):
        actual[i] = model(xs[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(actual, expected)
