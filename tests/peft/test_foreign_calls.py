"""Functions and calls of PyTorch that others have replaced: patched models run them, and the report says so."""

import contextlib
import copy
import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft.tuners.lora as lora
from block_samples import WIDTH, Gated, adapted, block
from foreign_samples import PARTS, part_and_x, same, twice
from peft_samples import IN, layer, tiny

from lora_kernels import explain, patch_peft
from lora_kernels.peft import accelerated, forwards

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*config.*:UserWarning")

PLACES = [
    (F, "linear"),
    (F, "dropout"),
    (nn.Module, "__call__"),
    (nn.Module, "_call_impl"),
    (nn.Linear, "__call__"),
    (nn.Dropout, "_call_impl"),
]
each_place = pytest.mark.parametrize("place", PLACES, ids=[f"{owner.__name__}.{name}" for owner, name in PLACES])


def counting(function, seen):
    """As a profiler does it: the result is what it was."""

    def foreign(*args, **kwargs):
        seen.append(function)
        return function(*args, **kwargs)

    return foreign


@each_place
@pytest.mark.parametrize("when", ["before the patch", "after the patch"])
def test_a_layer_runs_what_others_set(place, when, computed):
    stock, x, seen = tiny(lora_dropout=0.5), torch.randn(5, IN), []
    patched, foreign = copy.deepcopy(stock), counting(getattr(*place), seen)
    if when == "after the patch":
        patch_peft(patched)
        patched(x)
        assert computed
    with pytest.MonkeyPatch.context() as theirs:
        theirs.setattr(*place, foreign)
        patch_peft(patched)
        computed.clear()
        counts = []
        for model in (patched, stock):
            seen.clear()
            model(x)
            counts.append(len(seen))
        assert counts[0] == counts[1] > 0
        same(patched, stock, x)
        assert not computed
        for found in (explain(patched, x), explain(patched)):
            assert [one.form for one in found.layers] == ["stock"]
            assert place[1] in found.layers[0].reason
            assert "foreign" in found.layers[0].reason
    patched(x)
    assert len(computed) == 1


@each_place
@pytest.mark.parametrize("part", PARTS)
def test_the_layers_of_a_block_run_what_others_set(place, part, joined, monkeypatch):
    (model, _), x = part_and_x(part)
    patched = copy.deepcopy(model)
    assert patch_peft(patched).count("joined") == 1
    monkeypatch.setattr(*place, counting(getattr(*place), []))
    same(patched, model, x)
    assert not joined
    assert [one.form for one in explain(patched, x).blocks] == ["per layer"]


def _tripled(self, x, *args):
    return 3 * x


# What PEFT's forward calls and reads of its class, and another of the same name.
MEMBERS = {
    "_check_forward_args": lambda self, x, *args, **kwargs: x.mul_(2),
    "_cast_input_dtype": _tripled,
    "active_adapters": property(lambda self: []),
    "disable_adapters": property(lambda self: True),
    "merged": property(lambda self: True),
}


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("place", ["a subclass", "PEFT's class"])
@pytest.mark.parametrize("how", ["patch_peft", "accelerated"])
def test_a_member_of_a_layer_s_class(name, place, how, computed, monkeypatch):
    """PEFT's forward is in force, and calls and reads what a subclass or others have defined."""
    stock, x = tiny(), torch.randn(5, IN)
    if place == "a subclass":
        layer(stock).__class__ = type("Linear", (lora.Linear,), {name: MEMBERS[name]})
    patched = copy.deepcopy(stock)
    if how == "patch_peft":
        patch_peft(patched)
    with accelerated() if how == "accelerated" else contextlib.nullcontext():
        if place == "PEFT's class":
            owner = next(kind for kind in lora.Linear.__mro__ if name in vars(kind))
            monkeypatch.setattr(owner, name, MEMBERS[name])
        y = patched(x.clone())
        (found,) = explain(patched, x.clone()).layers
    assert torch.equal(y, stock(x.clone()))
    assert not computed
    assert (found.form, name in found.reason) == ("stock", True)


class Theirs(lora.Linear):
    def _cast_input_dtype(self, x, dtype):
        return 3 * super()._cast_input_dtype(x, dtype)


def test_a_member_that_another_library_s_subclass_defines(computed):
    stock, x = tiny(), torch.randn(5, IN)
    layer(stock).__class__ = Theirs
    patched = copy.deepcopy(stock)
    (found,) = patch_peft(patched).layers
    same(patched, stock, x)
    assert not computed
    assert found.reason == f"_cast_input_dtype of its class is not PEFT's own, but {__name__}.Theirs._cast_input_dtype"


@pytest.mark.parametrize("kind", [nn.SiLU, lora.Linear])
@pytest.mark.parametrize("name", ["__call__", "_call_impl"])
def test_a_call_of_one_class_in_a_block(kind, name, joined, monkeypatch):
    model, _ = block(Gated())
    x = torch.randn(3, WIDTH)
    patched = copy.deepcopy(model)
    assert patch_peft(patched).count("joined") == 1
    monkeypatch.setattr(kind, name, twice(getattr(kind, name)))
    torch.testing.assert_close(patched(x), model(x))
    assert not joined
    (found,) = explain(patched, x).blocks
    assert found.form == "per layer"
    assert ("act_fn" if kind is nn.SiLU else "call") in found.reason


@pytest.mark.parametrize("name", ["silu", "gelu"])
@pytest.mark.parametrize("when", ["before the patch", "after the patch"])
def test_a_function_of_an_activation(name, when, joined):
    class Own(Gated):
        def forward(self, x):
            return self.down_proj(getattr(F, name)(self.gate_proj(x)) * self.up_proj(x))

    class Named(Gated):
        def __init__(self):
            super().__init__()
            self.act_fn = {"silu": nn.SiLU, "gelu": nn.GELU}[name]()

    other = twice(getattr(F, name))
    for part in (Own, Named) if when == "before the patch" else (Named,):
        model, x = adapted(part()), torch.randn(3, WIDTH)
        patched = copy.deepcopy(model)
        if when == "after the patch":
            assert patch_peft(patched).count("joined") == 1
        with pytest.MonkeyPatch.context() as theirs:
            theirs.setattr(F, name, other)
            torch.testing.assert_close(patched(x), model(x))
            assert "lora_mlp" not in joined
            assert patch_peft(patched).count("joined") == 0


def test_a_compiler_that_traces_the_first_call_sees_pytorch_s_own(monkeypatch):
    """As `accelerate` and then `torch.compile` do, where nothing has been called or reported before."""
    spec = importlib.util.spec_from_file_location("forwards_afresh", forwards.__file__)
    fresh = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "forwards_afresh", fresh)
    spec.loader.exec_module(fresh)
    torch._dynamo.reset()
    own = torch.compile(lambda x: x + fresh.parts_are_own(), backend="eager", fullgraph=True)
    assert own(torch.zeros(1)) == 1
