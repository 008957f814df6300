"""What adapter files and swapping must refuse or look through: nothing is half changed, nothing is written wrongly."""

import json
import math
import re
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

pytest.importorskip("peft")

from peft import PeftModel

from lora_kernels import LoRALinear, load_adapter, merge_and_unload, save_adapter, swap_linear

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
X = torch.linspace(-1, 1, 24).view(4, 6)


class Net(nn.Module):
    def __init__(self, dtype=None):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 6, dtype=dtype), nn.Linear(6, 6, dtype=dtype)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def adapted(net=None, **changes):
    """A net whose adapters are not zero."""
    net = Net() if net is None else net
    swap_linear(net, **dict(target_modules=["a", "b"], r=2, lora_alpha=3) | changes)
    torch.manual_seed(7)
    for name, p in net.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.3)
    return net


def edit_config(folder, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@contextmanager
def unchanged(model):
    """Nothing of a model is another after the block: its layers, their settings and every number."""

    def look():
        state = {name: t.clone() for name, t in model.state_dict().items()}
        grads = {name: p.requires_grad for name, p in model.named_parameters()}
        return repr(model), [getattr(m, "scaling", None) for m in model.modules()], grads, state

    *before, old = look()
    yield
    *after, new = look()
    assert before == after
    for name, t in old.items():
        t, u = (getattr(t, "full_tensor", lambda t=t: t)() for t in (t, new[name]))
        assert torch.equal(t, u), name


@pytest.fixture
def saved(tmp_path):
    save_adapter(adapted(), tmp_path)
    return tmp_path


def test_a_merged_layer_is_not_loaded_into(saved):
    model = adapted(r=2, lora_alpha=5)
    model.b.merge()
    with (
        unchanged(model),
        pytest.raises(RuntimeError, match=r"LoRALinear b is merged; call unmerge\(\) before loading"),
    ):
        load_adapter(model, saved)
    model.b.unmerge()
    load_adapter(model, saved)
    torch.testing.assert_close(model(X), adapted()(X))


@pytest.mark.parametrize("base", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("file", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_new_layers_can_be_called_whatever_the_dtype_of_the_file(file, base, saved):
    tensors = {key: t.to(file) for key, t in load_file(saved / TENSORS).items()}
    save_file(tensors, saved / TENSORS)
    load_adapter(net := Net(base), saved)
    theirs = PeftModel.from_pretrained(Net(base), saved)
    x = X.to(base)
    assert net(x).dtype == base
    half = (torch.float16, torch.bfloat16)
    assert (
        net.a.lora_A.dtype == net.b.lora_B.dtype == (file if file == base else torch.float32 if base in half else base)
    )
    tolerance = {} if base.itemsize > 2 else dict(rtol=0.02, atol=0.02)
    torch.testing.assert_close(net(x), theirs(x).to(base), **tolerance)
    torch.testing.assert_close(net.a.lora_A, tensors["base_model.model.a.lora_A.weight"].to(net.a.lora_A.dtype))


@pytest.mark.parametrize("ending", [".pt", ".bin"])
def test_a_folder_may_be_named_like_a_pickle(ending, tmp_path):
    folder = tmp_path / f"adapter{ending}"
    save_adapter(adapted(), folder)
    load_adapter(net := Net(), folder)
    assert torch.equal(net(X), adapted()(X))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("r", [1, 3, 5, 6, 12])
def test_scalings_set_by_hand_come_back_bit_by_bit(r, rslora, tmp_path):
    model = adapted(r=r, use_rslora=rslora)
    for scaling in (0.1, 0.7, 1 / 3, 2 / 3, 1.1, 1e-3, -0.3, 0.0):
        model.a.scaling = model.b.scaling = scaling
        save_adapter(model, tmp_path)
        load_adapter(again := Net(), tmp_path)
        theirs = PeftModel.from_pretrained(Net(), tmp_path)
        assert again.a.scaling == again.b.scaling == theirs.base_model.model.a.scaling["default"] == scaling
    model.b.scaling = 0.7  # beside lora_alpha's own
    model.a.scaling = 3 / r
    save_adapter(model, tmp_path)
    load_adapter(again := Net(), tmp_path)
    assert math.isclose(again.b.scaling, 0.7, rel_tol=1e-15)


def test_swapping_again_leaves_standing_adapters_as_they_are():
    model = Net()
    model.c, model.d = nn.Linear(6, 6), nn.Linear(6, 6)
    swap_linear(model, ["a", "b"], r=2)
    model.b.lora_A.requires_grad_(False)
    swap_linear(model, ["c"], r=3)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"a.lora_A", "a.lora_B", "b.lora_B", "c.lora_A", "c.lora_B"}


NUMBERS = {
    "alpha in words": (dict(lora_alpha="6"), "lora_alpha='6'; it must be a finite number"),
    "alpha not a number": (dict(lora_alpha=math.nan), "lora_alpha=nan; it must be a finite number"),
    "alpha of one layer": (dict(alpha_pattern={"b": None}), "alpha_pattern['b']=None; it must be a finite number"),
    "rank": (dict(r=2.0), "r=2.0; it must be an integer of at least 1"),
    "rank of one layer": (dict(rank_pattern={"b": 0}), "rank_pattern['b']=0; it must be an integer of at least 1"),
    "no pattern": (dict(rank_pattern=[2]), "rank_pattern=[2]; it must be an object"),
    "dropout": (dict(lora_dropout=1.5), "lora_dropout=1.5; it must be a number in [0, 1]"),
}


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("fault", NUMBERS)
def test_a_number_that_is_none_changes_nothing(fault, swapped, saved):
    changes, text = NUMBERS[fault]
    edit_config(saved, **changes)
    model = adapted(lora_alpha=9) if swapped else Net()
    with unchanged(model), pytest.raises(ValueError, match=re.escape(f"{CONFIG} has {text}")):
        load_adapter(model, saved)


@contextmanager
def one_rank():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


def shard(model, mesh, how):
    if how == "FSDP2":
        return torch.distributed.fsdp.fully_shard(model, mesh=mesh)
    from torch.distributed.tensor.parallel import parallelize_module

    from lora_kernels.parallel import LoRAColwise, LoRARowwise

    return parallelize_module(model, mesh, {"a": LoRAColwise(), "b": LoRARowwise()})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["FSDP2", "tensor parallel"])
def test_sharded_layers_are_neither_read_nor_written(how, saved, tmp_path):
    with one_rank() as mesh:
        model = shard(adapted(lora_alpha=9), mesh, how)
        with unchanged(model):
            for call in (load_adapter, save_adapter):
                text = rf"{call.__name__}: a\.lora_A is a DTensor of shape \(2, 6\); gather it into a plain tensor"
                with pytest.raises(TypeError, match=text):
                    call(model, saved)


@pytest.mark.filterwarnings("ignore")
def test_adapters_are_not_put_beside_sharded_weights(saved):
    with one_rank() as mesh:
        model = shard(Net(), mesh, "FSDP2")
        for call in (lambda: load_adapter(model, saved), lambda: swap_linear(model, ["a"])):
            with (
                unchanged(model),
                pytest.raises(TypeError, match=r"a\.weight is a DTensor.* shard the model after that"),
            ):
                call()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["FSDP2", "tensor parallel"])
def test_sharded_layers_are_not_unloaded(how):
    with one_rank() as mesh:
        model = shard(adapted(), mesh, how)
        text = r"merge_and_unload: a\.weight is a DTensor.*load it into a model that is not sharded"
        with unchanged(model), pytest.raises(TypeError, match=text):
            merge_and_unload(model)


def test_a_layer_in_two_places_is_written_and_read(tmp_path):
    model = Net()
    model.c = model.a
    adapted(model, target_modules=["a", "c"])
    model.b = LoRALinear.from_linear(model.b, 2)
    model.b.lora_A = model.a.lora_A  # tied: one parameter of two layers
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    assert torch.equal(tensors["base_model.model.c.lora_A.weight"], model.a.lora_A)
    again = Net()
    again.c = again.a
    assert load_adapter(again, tmp_path) == ["a", "b", "c"]
    assert again.c is again.a
    assert torch.equal(again(X), model(X))
    tensors["base_model.model.c.lora_A.weight"] += 1
    save_file(tensors, tmp_path / TENSORS)
    text = "a and c are one layer of the model and two in the file"
    with unchanged(again), pytest.raises(ValueError, match=text):
        load_adapter(again, tmp_path)
    apart = Net()
    apart.c = nn.Linear(6, 6)
    assert load_adapter(apart, tmp_path) == ["a", "b", "c"]
    tensors["base_model.model.c.lora_A.weight"] -= 1
    save_file(tensors, tmp_path / TENSORS)
    edit_config(tmp_path, alpha_pattern={"c": 5})
    with unchanged(again), pytest.raises(ValueError, match=text):
        load_adapter(again, tmp_path)


def compiled(module):
    return torch.compile(module, backend="eager")


def checkpointed(module):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(module)


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.module, self.then = Net(), Net()  # "module" is no wrapper here

    def forward(self, x):
        return self.then(self.module(x))


@pytest.mark.filterwarnings("ignore")  # torch's own, when dynamo and the checkpoint wrapper are first imported
@pytest.mark.parametrize("wrap", [compiled, checkpointed, nn.DataParallel])
def test_wrappers_inside_a_model_are_looked_through(wrap, tmp_path):
    model, other = adapted(Outer()), Outer()
    model.then = wrap(model.then)
    save_adapter(model, tmp_path)
    names = ["module.a", "module.b", "then.a", "then.b"]
    assert {key.rpartition(".lora_")[0] for key in load_file(tmp_path / TENSORS)} == {
        f"base_model.model.{n}" for n in names
    }
    load_adapter(plain := Outer(), tmp_path)
    assert torch.equal(plain(X), model(X))
    theirs = PeftModel.from_pretrained(Outer(), tmp_path)
    torch.testing.assert_close(theirs(X), model(X))
    other.then = wrap(other.then)
    assert load_adapter(other, tmp_path) == names
    assert torch.equal(other(X), model(X))
    for p in other.parameters():
        nn.init.zeros_(p) if p.requires_grad else None
    load_adapter(other, tmp_path)
    assert torch.equal(other(X), model(X))
    expected = model(X)
    torch.testing.assert_close(merge_and_unload(other)(X), expected)
    assert not any(isinstance(m, LoRALinear) for m in other.modules())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrap", [compiled, checkpointed, nn.DataParallel])
def test_a_wrapped_layer_s_place_cannot_be_taken(wrap, saved):
    """torch.compile, for one, would go on calling the layer that it was given."""
    model = Net()
    model.b = wrap(model.b)
    text = r"swap_linear: b is wrapped by \w+\. Take that off; wrap the new layer after that"
    for call in (lambda: swap_linear(model, "all-linear"), lambda: load_adapter(model, saved)):
        with unchanged(model), pytest.raises(ValueError, match=text):
            call()
    model = adapted()
    model.b = wrap(model.b)
    with unchanged(model), pytest.raises(ValueError, match=r"merge_and_unload: b is wrapped by \w+"):
        merge_and_unload(model)
