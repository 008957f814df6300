"""One call of a patched block: what it holds, for how long, and whom it gives way to."""

import collections
import copy
import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("peft")
pytest.importorskip("transformers")

from block_samples import SIZES, WIDTH, Attention, Between, Gated, adapted, block, ids

from lora_kernels import patch_peft
from lora_kernels.peft import blocks, explain


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
def test_a_dispatch_mode_sees_each_layer_of_attention_and_a_whole_mlp(part, joined):
    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **kwargs or {})

    model, _ = block(part())
    patch_peft(model)
    x = torch.randn(3, WIDTH)
    with Watching():
        seen = model(x)
        (found,) = explain(model).blocks
    assert joined == ([] if part is Attention else ["lora_mlp"])
    assert found.reason == ("inside a compiler or a dispatch mode" if part is Attention else "")
    torch.testing.assert_close(seen, model(x))
    assert len(joined) == (1 if part is Attention else 2)


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


def test_a_forward_gets_the_block_itself(watched_outputs):
    kept = []
    model, one = block(Between())
    patch_peft(model)
    one.happens = kept.append
    x = torch.randn(3, WIDTH)
    model(x)
    (seen,) = kept
    assert seen is one
    torch.testing.assert_close(seen.k_proj(x), one.k_proj(x))
    assert len(watched_outputs) == 3, "after its call each layer is called"


def test_by_the_end_of_the_three_calls_the_block_has_its_layers(joined):
    """An attention function that is handed the module finds what it would find in the unpatched model."""
    model, one = block(Attention())
    patch_peft(model)
    layers, seen = dict(one.named_children()), []

    def mixed(q, k, v):
        seen.extend(getattr(one, name) for name in layers)
        return torch.cat((q, k, v), -1)

    model(torch.randn(3, WIDTH), mixed)
    assert joined == ["lora_projections"]
    assert all(a is b for a, b in zip(seen, layers.values(), strict=True))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_functions_that_keep_something_by_module(joined):
    """Caches by identity, by equality and by weak reference, as functions of transformers' AttentionInterface have."""
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import eager_attention_forward

    config = LlamaConfig(**SIZES | {"num_hidden_layers": 2}, attn_implementation="eager")
    stock = adapted(LlamaForCausalLM(config))
    calls, weakly, ids_seen = collections.Counter(), weakref.WeakKeyDictionary(), set()

    def counting(module, *args, **kwargs):
        calls[module] += 1
        weakly[module] = weakly.get(module, 0) + 1
        ids_seen.add(id(module))
        module.counted = calls[module]
        return eager_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("counting", counting)
    patched = copy.deepcopy(stock)
    assert patch_peft(patched).count("joined") == 4
    patched.set_attn_implementation("counting")
    for _ in range(5):
        patched(input_ids=ids())
        gc.collect()
    modules = [m for m in patched.modules() if hasattr(m, "q_proj")]
    assert len(joined) == 20
    assert {*calls} == {*modules}
    assert [calls[m] for m in modules] == [weakly[m] for m in modules] == [m.counted for m in modules] == [5, 5]
    assert ids_seen == {*map(id, modules)}


def test_a_layer_is_taken_out_and_put_in(joined):
    """The members of a patched class do not stand in the way of nn.Module's own attributes."""
    model, one = block(Attention())
    patch_peft(model)
    x, old = torch.randn(3, WIDTH), one.q_proj
    expected = model(x)
    del one.q_proj
    assert not hasattr(one, "q_proj")
    with pytest.raises(AttributeError, match="has no attribute 'q_proj'"):
        one.q_proj  # noqa: B018 the read is the test
    one.add_module("q_proj", old)
    assert one.q_proj is old
    torch.testing.assert_close(model(x), expected)
    one.q_proj = nn.Linear(WIDTH, WIDTH)
    assert one.q_proj is not old
    model(x)
    assert len(joined) == 3


def test_a_block_within_a_block(joined):
    """Of the calls that a thread is in, the innermost one has its results; the outer one goes on after it."""
    model, outer = block(Between())
    inner_model, inner = block(Attention())
    for one in (model, inner_model):
        patch_peft(one)
    x, seen = torch.randn(3, WIDTH), []
    expected, expected_inner = model(x), inner_model(x)
    joined.clear()

    outer.happens = lambda part: seen.append(inner(x))
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(seen[0], expected_inner)
    assert joined == ["lora_projections"] * 2


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
    assert patch_peft(patched).count("joined") == 1
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
    meet, actual = threading.Barrier(2, timeout=600), [None, None]
    one.happens = lambda _: meet.wait()

    def run(i):
        actual[i] = model(xs[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(actual, expected)
