"""Whoever reads a layer of an attention block during its call gets the model's own; only forward's calls are joined."""

import collections
import contextlib
import copy
import dis
import functools
import gc
import operator
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import set_checkpoint_early_stop

pytest.importorskip("peft")
pytest.importorskip("transformers")

from block_samples import WIDTH, Attention, Between, Replayed, block
from peft.tuners.lora import Linear
from peft_samples import call

from lora_kernels import patch_peft
from lora_kernels.peft.structure import ATTENTION, call_sites


def in_a_thread(part):
    found = []
    thread = threading.Thread(target=lambda: found.extend(getattr(part, name) for name in ATTENTION))
    thread.start()
    thread.join()
    return found


READERS = {
    "attributes": lambda part: [part.q_proj, part.k_proj, part.v_proj],
    "getattr": lambda part: [getattr(part, name) for name in ATTENTION],
    "attrgetter": operator.attrgetter(*ATTENTION),
    "get_submodule": lambda part: [part.get_submodule(name) for name in ATTENTION],
    "children": lambda part: list(part.children()),
    "a thread": in_a_thread,
}


@pytest.mark.parametrize("reader", READERS)
def test_another_reader_between_the_calls(reader, joined):
    stock, _ = block(Between())
    patched = copy.deepcopy(stock)
    assert patch_peft(patched).count("joined") == 1
    one, x = patched.base_model.model.part, torch.randn(3, WIDTH, requires_grad=True)
    one.happens = READERS[reader]
    torch.testing.assert_close(call(patched, x), call(stock, x))
    assert joined == ["lora_projections"]
    own = [one._modules[name] for name in ATTENTION]
    assert len(one.happened) == 3
    assert all(seen is layer for seen, layer in zip(one.happened, own, strict=True))


def test_functions_that_keep_something_by_layer(joined):
    """By identity, equality, weak reference and attribute; a count by layer does not grow with the calls."""
    model, one = block(Between())
    patch_peft(model)
    counted, weakly, ids_seen = collections.Counter(), weakref.WeakKeyDictionary(), set()

    def keep(part):
        for layer in (part.q_proj, part.k_proj, part.v_proj):
            assert isinstance(layer, Linear)
            assert layer in {*part.children()}
            counted[layer] += 1
            weakly[layer] = weakly.get(layer, 0) + 1
            ids_seen.add(id(layer))
            layer.counted = counted[layer]
            layer.register_buffer("scale", torch.ones(1), persistent=False)

    one.happens = keep
    for _ in range(5):
        model(torch.randn(3, WIDTH))
        gc.collect()
    layers = list(one.children())
    assert {*counted} == {*weakly} == {*layers}
    assert ids_seen == {*map(id, layers)}
    for layer in layers:
        assert counted[layer] == weakly[layer] == layer.counted == 5
        assert dict(layer.named_buffers()).keys() == {"scale"}
    assert joined == ["lora_projections"] * 5


def test_a_layer_that_another_reader_calls_is_called(joined, computed):
    """With the same x, too: its result is its own, and the forward's call still gets the joint one."""
    stock, part = block(Between())
    patched = copy.deepcopy(stock)
    patch_peft(patched)
    one, x = patched.base_model.model.part, torch.randn(3, WIDTH)
    for each in (part, one):
        each.happens = lambda part: part.v_proj(x).mul_(2)
    with torch.no_grad():
        torch.testing.assert_close(patched(x), stock(x))
        torch.testing.assert_close(one.happened, part.happened)
    assert (joined, computed) == (["lora_projections"], ["lora_linear"])


def test_hooks_around_a_block_and_after_its_layers_see_the_layers(joined):
    class Output(Between):
        def __init__(self):
            super().__init__()
            self.o_proj = nn.Linear(WIDTH + 16, WIDTH)

        def forward(self, x):
            q = self.q_proj(x)
            k = self.k_proj(x)
            v = self.v_proj(x)
            return self.o_proj(torch.cat([q, k, v], -1))

    model, one = block(Output())
    patch_peft(model)
    seen = []

    def see(*_):
        seen.append([one.q_proj, one.k_proj, one.v_proj])

    one.register_forward_pre_hook(see)
    one.o_proj.register_forward_pre_hook(see)
    one.register_forward_hook(see)
    y = model(torch.randn(3, WIDTH, requires_grad=True))
    y.sum().backward()
    assert joined == ["lora_projections"]
    assert len(seen) == 3
    assert all(a is b for layers in seen for a, b in zip(layers, [*one.children()][:3], strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_in_both_runs_of_a_checkpoint(reentrant, joined):
    stock, _ = block(Between())
    patched = copy.deepcopy(stock)
    patch_peft(patched)
    one, seen = patched.base_model.model.part, []
    one.happens = lambda part: seen.append(part.k_proj)
    x = torch.randn(3, WIDTH, requires_grad=True)
    with set_checkpoint_early_stop(False):
        actual, expected = (call(Replayed(model, reentrant), x) for model in (patched, stock))
    assert "dx" in actual
    torch.testing.assert_close(actual, expected)
    assert joined == ["lora_projections"] * 2
    assert len(seen) == 2
    assert all(layer is one._modules["k_proj"] for layer in seen)


def test_in_a_call_that_an_exception_ends(joined):
    model, one = block(Between())
    patch_peft(model)
    kept = []

    def fail(part):
        kept.extend((part.k_proj, part.v_proj))
        raise KeyError("no")

    one.happens = fail
    x = torch.randn(3, WIDTH)
    with pytest.raises(KeyError):
        model(x)
    assert all(a is b for a, b in zip(kept, [*one.children()][1:], strict=True))
    one.happens = lambda part: None
    model(x)
    assert joined == ["lora_projections"] * 2


def test_a_block_that_calls_itself(joined):
    stock, part = block(Between())
    patched = copy.deepcopy(stock)
    patch_peft(patched)
    other = torch.randn(3, WIDTH)

    def again(part):
        part.happens = lambda part: None
        return part(other)

    one, x = patched.base_model.model.part, torch.randn(3, WIDTH)
    part.happens = one.happens = again
    torch.testing.assert_close(patched(x), stock(x))
    torch.testing.assert_close(one.happened, part.happened)
    assert joined == ["lora_projections"] * 2


class Getter(Attention):
    """Reads the layers by their names in the middle of its calls."""

    def forward(self, x):
        before = [getattr(self, name) for name in ATTENTION]
        q = self.q_proj(x)
        between = operator.attrgetter(*ATTENTION)(self)
        k = self.k_proj(x)
        last = getattr(self, "v" + "_proj")
        v = self.v_proj(x)
        self.seen = [before, between, (self.q_proj, self.k_proj, last)]
        return torch.cat([q, k, v], -1)


class Interrupted(Attention):
    """Keeps the layers when a call has failed."""

    def forward(self, x):
        try:
            q = self.q_proj(x)
            none = self.none()
            k, v = self.k_proj(x), self.v_proj(x)
        except AttributeError:
            self.seen = [[self.q_proj, self.k_proj, self.v_proj]]
            q, k, v = (layer(x) for layer in self.seen[0])
            none = None
        return torch.cat([q, k, v], -1) if none is None else none


@pytest.mark.parametrize("part", [Getter, Interrupted])
def test_other_reads_of_the_forward_itself(part, joined):
    stock, _ = block(part())
    patched = copy.deepcopy(stock)
    assert patch_peft(patched).count("joined") == 1
    one, x = patched.base_model.model.part, torch.randn(3, WIDTH, requires_grad=True)
    torch.testing.assert_close(call(patched, x), call(stock, x))
    assert joined == ["lora_projections"]
    own = [one._modules[name] for name in ATTENTION]
    assert all(a is b for seen in one.seen for a, b in zip(seen, own, strict=True))


class Listed(Attention):
    def forward(self, x):
        layers = [self.q_proj, self.k_proj, self.v_proj]
        q = layers[0](x)
        return torch.cat([q, *[layer(x) for layer in layers[1:]]], -1)


class Local(Attention):
    def forward(self, x):
        late = self.v_proj
        q, k = self.q_proj(x), self.k_proj(x)
        return torch.cat([q, k, late(x)], -1)


class Partial(Attention):
    def forward(self, x):
        late = functools.partial(self.v_proj, x)
        q, k = self.q_proj(x), self.k_proj(x)
        return torch.cat([q, k, late()], -1)


class Comprehended(Attention):
    def forward(self, x):
        return torch.cat([layer(x) for layer in (self.q_proj, self.k_proj, self.v_proj)], -1)


class Generated(Attention):
    def forward(self, x):
        return torch.cat(tuple(self._modules[name](x) for name in ATTENTION), -1)


class Named(Attention):
    def forward(self, x):
        made = []
        for name in ("q_proj", "k_proj", "v_proj"):
            made.append(getattr(self, name)(x))
        return torch.cat(made, -1)


class CalledAgain(Attention):
    def forward(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return torch.cat([q, k, v + self.v_proj(x)], -1)


class AnotherSelf(Attention):
    """After the three calls it calls a layer once more, of an object that is the block itself."""

    def forward(self, x):
        this = self
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return torch.cat([q, k, v + this.v_proj(x)], -1)


class AtLast(Attention):
    """Python compiles the body of `finally` twice."""

    def forward(self, x):
        try:
            self.calls += 1
        finally:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return torch.cat([q, k, v], -1)


@pytest.mark.parametrize(
    "part", [Listed, Local, Partial, Comprehended, Generated, Named, CalledAgain, AnotherSelf, AtLast]
)
def test_layers_that_are_kept_or_called_otherwise_are_called_one_by_one(part, joined, computed):
    stock, _ = block(part())
    patched = copy.deepcopy(stock)
    (found,) = patch_peft(patched).blocks
    assert found.reason == "its forward does not call each of q_proj, k_proj and v_proj once"
    x = torch.randn(3, WIDTH, requires_grad=True)
    torch.testing.assert_close(call(patched, x), call(stock, x))
    assert not joined
    assert len(computed) == (4 if part in (CalledAgain, AnotherSelf) else 3)


def decorated(forward):
    @functools.wraps(forward)
    def in_between(self, *args, **kwargs):
        with contextlib.nullcontext():
            return forward(self, *args, **kwargs)

    return in_between


class Decorated(Between):
    @decorated
    @decorated
    def forward(self, x):
        q = self.q_proj(x)
        self.happened = self.happens(self)
        k, v = self.k_proj(x), self.v_proj(x)
        return torch.cat([q, k, v], -1)


def test_a_decorated_forward(joined):
    stock, _ = block(Decorated())
    patched = copy.deepcopy(stock)
    assert patch_peft(patched).count("joined") == 1
    one, x = patched.base_model.model.part, torch.randn(3, WIDTH, requires_grad=True)
    one.happens = READERS["attributes"]
    torch.testing.assert_close(call(patched, x), call(stock, x))
    assert joined == ["lora_projections"]
    assert all(seen is layer for seen, layer in zip(one.happened, one.children(), strict=True))


def test_only_the_three_calls_are_call_sites():
    code, sites = call_sites(Getter.forward)
    assert code is Getter.forward.__code__
    read = [one for one in dis.get_instructions(code) if one.offset in sites]
    assert [one.argval for one in read] == list(ATTENTION)
    assert len([one for one in dis.get_instructions(code) if one.argval in ATTENTION]) > len(read)
    assert call_sites(Decorated.forward)[0] is Decorated.forward.__wrapped__.__wrapped__.__code__


def test_each_call_is_found_once_python_has_specialised_its_instructions(joined):
    model, one = block(Getter())
    patch_peft(model)
    for count in range(1, 101):
        model(torch.randn(1, WIDTH))
        assert len(joined) == count
        assert all(isinstance(layer, Linear) for seen in one.seen for layer in seen)
