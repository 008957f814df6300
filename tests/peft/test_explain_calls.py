"""`explain(model, inputs)` calls the model once, and reports every call of a layer in it."""

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from block_samples import WIDTH, Attention, Block, adapted, maker
from encoder_samples import D, Encoder
from peft import LoraConfig, get_peft_model
from peft_samples import IN, Tiny, config

from lora_kernels import explain, patch_peft

pytestmark = pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors", "ignore::FutureWarning", "ignore:.*config.*:UserWarning"
)


class Shared(Tiny):
    """The layer is called after each of the changes to it."""

    def forward(self, x, *changes):
        ys = []
        for change in changes:
            change(self.lin)
            ys.append(self.lin(x))
        return torch.stack(ys)


class Consuming(Encoder):
    """An encoder that reads its input from an iterator."""

    def forward(self, rows, mask=None):
        return super().forward(torch.stack(list(rows)), mask)


@pytest.mark.parametrize("patched", [True, False])
def test_an_encoder_is_called_once(patched):
    model = get_peft_model(Consuming(), LoraConfig(r=4, target_modules=["linear1", "linear2"])).eval()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    if patched:
        patch_peft(model)
    rows = torch.randn(2, 5, D)
    found = explain(model, iter(rows))
    assert calls == [1]
    assert [one.form for one in found.layers] == ["fused" if patched else "stock"] * 4
    assert all(("fast path" in one.reason) != patched for one in found.layers)
    assert torch.backends.mha.get_fastpath_enabled()
    assert all("forward" not in vars(module) for module in model.modules())


def test_what_the_fast_path_passes_by_in_one_of_two_calls():
    class Twice(Encoder):
        def forward(self, x):
            with torch.no_grad():
                y = self.encoder(x)
            return y + self.encoder(x[0], mask=torch.zeros(5, 5))

    model = get_peft_model(Twice(), LoraConfig(r=4, target_modules=["linear1", "self_attn"])).eval()
    found = {one.name.split("layers.0.")[-1]: one for one in explain(model, torch.randn(2, 5, D)).layers}
    for name in ("linear1", "self_attn"):
        assert found[name].form == "stock"
        assert "in 1 of 2 calls: not called: the fast path" in found[name].reason
    assert "in 1 of 2 calls: not patched" in found["linear1"].reason


def test_a_cache_has_one_call_in_it():
    from transformers import DynamicCache

    model, cache = maker("Llama").eval(), DynamicCache()
    patch_peft(model)
    assert explain(model, torch.ones(1, 3, dtype=torch.long), past_key_values=cache).count("fused") == 7
    assert cache.get_seq_length() == 3


def nothing(_):
    pass


def hook(lin):
    lin.base_layer.register_forward_hook(lambda *_: None)


def no_number(lin):
    lin.scaling["default"] = float("inf")


HOOKED, ENDLESS = "the base layer has a hook", "scaling['default'] is inf, not a finite number"


@pytest.mark.parametrize(
    ("changes", "form", "reason"),
    [
        ([nothing] * 3, "fused", ""),
        ([hook] * 2, "low-rank", HOOKED),
        ([nothing, nothing, hook], "low-rank", f"in 1 of 3 calls: {HOOKED}; fused in 2 of 3 calls"),
        ([hook, no_number], "stock", f"in 1 of 2 calls: {ENDLESS}; low-rank in 1 of 2 calls: {HOOKED}"),
        (
            [nothing, hook, no_number],
            "stock",
            f"in 1 of 3 calls: {ENDLESS}; low-rank in 1 of 3 calls: {HOOKED}; fused in 1 of 3 calls",
        ),
        (
            [no_number, lambda lin: lin.merge()],
            "stock",
            f"in 1 of 2 calls: {ENDLESS}; in 1 of 2 calls: merged: default",
        ),
    ],
)
def test_all_outcomes_of_a_layer_that_is_called_several_times(changes, form, reason, computed):
    torch.manual_seed(0)
    model = get_peft_model(Shared(), config())
    patch_peft(model)
    (found,) = explain(model, torch.randn(3, IN), *changes).layers
    assert (found.form, found.reason) == (form, reason)
    assert len(computed) == sum(part is not no_number and "lambda" not in part.__name__ for part in changes)


def test_arguments_of_one_of_two_calls():
    class Named(Tiny):
        def forward(self, x):
            return self.lin(x) + self.lin(x, adapter_names=["default"] * len(x))

    model = get_peft_model(Named(), config()).eval()
    patch_peft(model)
    (found,) = explain(model, torch.randn(3, IN)).layers
    assert found.reason == "in 1 of 2 calls: called with adapter_names; fused in 1 of 2 calls"


@pytest.mark.parametrize("name", ["q_proj", "k_proj"])
def test_a_block_that_is_called_twice(name):
    class Twice(Block):
        def forward(self, x):
            y, own = super().forward(x), getattr(self.part, name)
            getattr(own, "base_layer", own).register_forward_hook(lambda *_: None)
            return y + super().forward(x)

    model = adapted(Twice(Attention()), target_modules=["q_proj", "v_proj"])
    assert patch_peft(model).count("joined") == 1
    (found,) = explain(model, torch.randn(3, WIDTH)).blocks
    assert found.form == "per layer"
    assert name in found.reason
    assert "in 1 of 2 calls" in found.reason


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_model_is_observed_without_its_compiler(fullgraph):
    torch.manual_seed(0)
    model, x = get_peft_model(Shared(), config()), torch.randn(3, IN)
    patch_peft(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    for _ in range(2):
        (found,) = explain(compiled, x, nothing, nothing).layers
        assert (found.form, found.reason) == ("fused", "")
        torch.testing.assert_close(compiled(x, nothing, nothing), model(x, nothing, nothing))
