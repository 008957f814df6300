"""Patching changes nothing but the forward, is undone without a trace, and costs less than it may."""

import copy
import functools
import io
import pickle
import sys
import timeit

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

import peft
from peft.tuners.lora.layer import Linear
from peft_samples import IN, Foreign, Tiny, config, layer, tiny

import lora_kernels
from lora_kernels.peft import accelerate, accelerated, bases, explain, patch_peft, unpatch_peft
from lora_kernels.peft import layer as forward_module

STOCK_FORWARD = Linear.forward


@pytest.fixture
def x():
    return torch.randn(4, IN)


def is_fast(model, x):
    (found,) = [one for one in explain(model, x).layers if one.name.endswith("lin")]
    return found.form == "fused"


def test_nothing_else_changes(x):
    model = tiny(lora_dropout=0.1)
    stock, seen = (
        layer(model),
        (repr(model), str(type(layer(model))), list(model.state_dict()), vars(layer(model)).keys()),
    )
    before = dict(vars(stock))
    patch_peft(model)
    assert layer(model) is stock
    assert seen == (repr(model), str(type(stock)), list(model.state_dict()), vars(stock).keys())
    assert all(vars(stock)[key] is value for key, value in before.items())
    assert isinstance(stock, Linear)
    assert type(stock).__module__ == Linear.__module__
    assert type(stock).__doc__ == Linear.__doc__
    assert is_fast(model, x)
    assert unpatch_peft(model) == 1
    assert type(stock) is Linear
    assert unpatch_peft(model) == 0
    assert Linear.forward is STOCK_FORWARD


def test_twice_is_once_and_backends_change(x):
    model = tiny()
    patch_peft(model)
    first = type(layer(model))
    assert str(patch_peft(model)) == "1 LoRA layers: 1 fused, 0 low-rank, 0 stock"
    assert type(layer(model)) is first
    patch_peft(model, backend="torch")
    assert type(layer(model)) is not first
    assert type(layer(model)).__mro__[2] is Linear
    assert unpatch_peft(model) == 1


def test_deepcopy_stays_patched_and_shares_nothing(x):
    model = tiny()
    patch_peft(model)
    twin = copy.deepcopy(model)
    assert type(layer(twin)) is type(layer(model))
    assert torch.equal(twin(x), model(x))
    nn.init.zeros_(layer(twin).lora_B["default"].weight)
    assert not torch.equal(twin(x), model(x))
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert unpatch_peft(twin) == 1
    assert is_fast(model, x)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_load_without_this_library(protocol, x):
    model = tiny()
    expected = model(x)
    patch_peft(model)
    again = Foreign(io.BytesIO(pickle.dumps(model, protocol))).load()
    assert type(layer(again)) is Linear
    assert torch.equal(again(x), expected)


def test_layers_added_later_are_named_and_then_taken(x):
    model = tiny()
    patch_peft(model)
    model.add_adapter("second", config(target_modules=["head"]))
    model.base_model.set_adapter(["default", "second"])
    lin, head = explain(model).layers
    assert (lin.form, head.form) == ("fused", "stock")
    assert head.reason == "not patched: call patch_peft(model), again for layers added later"
    assert patch_peft(model).count("fused") == 2


def test_peft_goes_on_working(x, tmp_path):
    """Merge, unmerge, disable, save and load as PEFT does them, on a patched model."""
    model = tiny(lora_dropout=0.3).eval()
    base, expected = layer(model).base_layer(x), model(x)
    patch_peft(model)
    torch.testing.assert_close(model(x), expected)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), expected)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), base)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = peft.PeftModel.from_pretrained(Tiny(), tmp_path)
    patch_peft(again)
    torch.testing.assert_close(again(x), expected)
    merged = model.merge_and_unload()
    assert type(merged.lin) is nn.Linear
    torch.testing.assert_close(merged(x), expected)


@pytest.mark.parametrize("first", ["patched", "hooked"])
def test_accelerate_s_hook_on_a_layer_goes_with_its_class(first, x):
    """The hook replaces forward on the instance, and calls the one of the class that the layer had then."""
    hooks = pytest.importorskip("accelerate.hooks")
    model, seen = tiny(), []
    expected = model(x)

    class Hook(hooks.AlignDevicesHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(module)
            return super().pre_forward(module, *args, **kwargs)

    def hook():
        hooks.add_hook_to_module(layer(model), Hook(execution_device="cpu"))

    for step in (patch_peft, lambda _: hook())[:: 1 if first == "patched" else -1]:
        step(model)
    assert is_fast(model, x)
    torch.testing.assert_close(model(x), expected)
    assert is_fast(copy.deepcopy(model), x)
    patch_peft(model, backend="torch")
    assert layer(model)._old_forward.__func__ is type(layer(model)).forward
    assert unpatch_peft(model) == 1
    assert layer(model)._old_forward == Linear.forward.__get__(layer(model))
    assert not is_fast(model, x)
    seen.clear()
    assert torch.equal(model(x), expected)
    assert seen == [layer(model)], "the hook is still there"
    patch_peft(model)
    hooks.remove_hook_from_module(layer(model))
    assert "forward" in vars(layer(model)), "accelerate leaves it there"
    assert is_fast(model, x)
    assert unpatch_peft(model) == 1
    assert not is_fast(model, x)
    assert torch.equal(model(x), expected)
    with accelerated():
        (found,) = explain(model, x).layers
        assert "replaced on the instance" in found.reason
        assert torch.equal(model(x), expected)


def test_accelerated_reaches_models_built_before_and_inside(x):
    before = tiny()
    with accelerated():
        inside = tiny()
        assert is_fast(before, x)
        assert is_fast(inside, x)
        assert type(layer(inside)) is Linear
        torch.testing.assert_close(inside(x), before(x))
        patch_peft(inside)
    assert Linear.forward is STOCK_FORWARD
    assert not is_fast(before, x)
    assert is_fast(inside, x)  # patched on its own
    unpatch_peft(inside)
    assert not is_fast(inside, x)


def test_accelerated_nests_and_survives_errors(x):
    model = tiny()
    with pytest.raises(KeyError), accelerated():
        raise KeyError
    assert not is_fast(model, x)
    accelerate()
    try:
        with accelerated():
            assert is_fast(model, x)
        assert is_fast(model, x)
        accelerate()
    finally:
        accelerate(False)
    assert Linear.forward is STOCK_FORWARD
    assert "not patched" in explain(model, x).layers[0].reason


def test_explain_says_that_there_is_nothing_to_explain(capsys):
    assert explain(nn.Linear(3, 3)).layers == ()
    assert capsys.readouterr().out.startswith("The model has no PEFT LoRA layers:")


@pytest.mark.parametrize("call", [explain, patch_peft, unpatch_peft])
def test_what_is_no_module_is_refused(call):
    with pytest.raises(TypeError, match=rf"{call.__name__}: model must be a torch\.nn\.Module, got NoneType\."):
        call(None)


@pytest.mark.parametrize("terminal", [True, False])
def test_explain_shows_the_end_of_long_names(terminal, capsys, monkeypatch):
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "dumb")  # of 80 columns
    prefix = "a" * 50
    explain(nn.ModuleDict({prefix: tiny()}))
    text = capsys.readouterr().out
    assert "…" not in text
    assert (f"{prefix}.base_model.model.lin " in text) != terminal
    assert "lin " in text
    assert max(map(len, text.splitlines())) == 80 or not terminal


def test_explain_prints_a_table(capsys, x):
    model = tiny()
    model.add_adapter("second", config(target_modules=["head"], use_dora=True))
    model.base_model.set_adapter(["default", "second"])
    patch_peft(model)
    report = explain(model)
    text = capsys.readouterr().out
    for word in ("layer", "computed", "reason", "base_model.model.lin", "fused", "stock", "Dora"):
        assert word in text
    assert str(report).splitlines()[0] in text
    lin, head = explain(model, x).layers
    assert lin.form == "fused"
    assert head.form == "stock"
    idle = explain(layer(model), x).layers
    assert [one.form for one in idle] == ["fused"]


def test_explain_leaves_the_random_numbers_as_they_are(x):
    model = tiny(lora_dropout=0.5)
    patch_peft(model)
    for patched in (True, False):
        torch.manual_seed(5)
        expected = model(x)
        torch.manual_seed(5)
        assert explain(model, x).count("fused") == patched
        assert torch.equal(model(x), expected)
        unpatch_peft(model)


def test_explain_says_what_was_not_called(x):
    model = tiny(target_modules=["lin", "head"])
    patch_peft(model)
    assert [(one.form, one.reason) for one in explain(model, x).layers] == [("fused", ""), ("stock", "not called")]


def test_errors():
    with pytest.raises(TypeError, match=r"patch_peft: model must be a torch\.nn\.Module, got str\."):
        patch_peft("gpt2")
    with pytest.raises(ValueError, match=r"has no PEFT LoRA layers\. Call it after get_peft_model"):
        patch_peft(Tiny())
    for call in (lambda: patch_peft(tiny(), backend="cuda"), lambda: accelerate(backend="cuda")):
        with pytest.raises(ValueError, match=r"backend='cuda' is not one of: auto, triton, torch\."):
            call()
    model = tiny()
    patch_peft(model)
    layer(model).__class__ = type("FSDPLinear", (type(layer(model)),), {})
    with pytest.raises(
        RuntimeError, match=r"base_model\.model\.lin was given another class, FSDPLinear, after it was patched"
    ):
        unpatch_peft(model)


def test_without_peft(no_peft, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("peft.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"needs PEFT 0\.19 or later: pip install 'peft>=0\.19'"):
        patch_peft(Tiny())


def test_names_are_public_and_lazy():
    assert lora_kernels.patch_peft is patch_peft
    for name in lora_kernels.__all__:
        assert getattr(lora_kernels, name) is not None
    assert not hasattr(lora_kernels, "no_such_name")


def test_the_guard_costs_about_what_a_small_linear_layer_costs():
    """6 µs where calling an nn.Linear of 8 x 8 takes 6: measured in turn, the best of each, half as much to spare."""
    model = tiny(lora_dropout=0.1)
    one, x, linear, small = layer(model), torch.randn(2, IN), nn.Linear(8, 8), torch.randn(2, 8)
    assert forward_module.read(one, x)
    assert bases.base_of(one.base_layer, x)
    guards, linears = [], []
    for _ in range(60):
        guards.append(timeit.timeit(lambda: (forward_module.read(one, x), bases.base_of(one.base_layer, x)), number=50))
        linears.append(timeit.timeit(lambda: linear(small), number=50))
    assert min(guards) < 1.5 * min(linears)


def wrap(module):
    """Set a forward on the instance that doubles the result, and says what it calls, as the hooks of diffusers do."""

    def new_forward(module, *args, **kwargs):
        return 2 * before(*args, **kwargs)

    before = module.forward
    module.forward = functools.update_wrapper(functools.partial(new_forward, module), before)


@pytest.mark.parametrize("first", ["patched", "hooked"])
def test_a_report_looks_through_hooks_that_say_what_they_call(first, x, monkeypatch):
    model, stock, called = tiny(), tiny(), []
    linear = forward_module.lora_linear
    monkeypatch.setattr(forward_module, "lora_linear", lambda *args, **how: called.append(1) or linear(*args, **how))
    if first == "patched":
        patch_peft(model)
    for one in (model, model, stock, stock):
        wrap(layer(one))
    patch_peft(model)
    torch.testing.assert_close(model(x), stock(x))
    assert len(called) == (first == "patched")
    assert is_fast(model, x) == (first == "patched")
