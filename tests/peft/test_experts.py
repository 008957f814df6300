"""Experts of PEFT models by `lora_grouped_linear`: the numbers of PEFT's own forward, without a tensor of the stack's size."""

import copy

import pytest
import torch
from peft import PeftModel
from samples import expert_samples as samples
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers.integrations import moe
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from lora_kernels import explain, patch_peft, unpatch_peft
from lora_kernels.peft import accelerated

pytestmark = [
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]


def stock_and_patched(kind: str, number: int, **changes) -> tuple:
    """PEFT's own forward by the formula, because the grouped product of PyTorch has no float64; and ours."""
    one = samples.experts(kind, number, **changes)
    two = copy.deepcopy(one)
    one.base_model.model.experts.get_base_layer().config._experts_implementation = "eager"
    return one, two


def assert_close(actual: dict, expected: dict, rtol: float) -> None:
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        scale = want.abs().max().item() or 1.0
        assert (actual[name] - want).abs().max().item() <= rtol * scale, name


@pytest.mark.parametrize("chosen", ["random", "one", "few", "sentinels"])
@pytest.mark.parametrize("number", [3, 8, 128])
@pytest.mark.parametrize("kind", ["qwen3", "gpt-oss"])
def test_float64_is_that_of_peft(kind, number, chosen):
    one, two = stock_and_patched(kind, number)
    assert patch_peft(two).count("fused") == 2
    two.base_model.model.experts.get_base_layer()._is_expert_parallel = chosen == "sentinels"
    want = samples.call(one, 17, number, "their zeros" if chosen == "sentinels" else chosen)
    assert_close(samples.call(two, 17, number, chosen), want, 1e-12)


@pytest.mark.parametrize("kind", ["qwen3", "gpt-oss"])
def test_one_expert_is_left_to_peft(kind):
    one = samples.experts(kind, 1)
    report = patch_peft(one)
    assert report.count("stock") == 2
    assert "1 experts of 1" in report.layers[0].reason


def test_one_parameter_alone_and_two_adapters():
    for changes in (
        dict(target_parameters=["experts.down_proj"]), dict(target_parameters=["experts.gate_up_proj"]), {},
    ):  # fmt: skip
        one, two = stock_and_patched("gpt-oss", 4, **changes)
        for of in (one, two):
            torch.manual_seed(3)
            of.add_adapter("other", of.peft_config["default"])
            of.base_model.set_adapter(["default", "other"])
        assert patch_peft(two).count("stock") == 0
        assert_close(samples.call(two, 17, 4), samples.call(one, 17, 4), 1e-12)


@pytest.mark.parametrize("kind", samples.KINDS)
def test_training_is_that_of_stock(kind):
    one, two = samples.twins(kind)
    report = patch_peft(two)
    assert report.count("stock") == 0
    assert sum("experts" in layer.note for layer in report.layers) == 4
    losses = samples.train(one, 20), samples.train(two, 20)
    assert losses[0][-1] != losses[0][0]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-4, atol=1e-5)
    two.zero_grad()
    assert unpatch_peft(two) == 8
    torch.testing.assert_close(
        two(input_ids=samples.ids()).logits, one(input_ids=samples.ids()).logits, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("kind", samples.KINDS)
def test_all_linear_leaves_the_router_to_peft(kind):
    one, two = samples.twins(kind, target_modules="all-linear", target_parameters=None)
    report = patch_peft(two)
    reasons = {layer.reason for layer in report.layers if layer.form == "stock"}
    assert all("Router is no experts module" in reason for reason in reasons)
    losses = samples.train(one, 3), samples.train(two, 3)
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_and_autocast(dtype):
    one, two = samples.twins("qwen3", dtype=dtype)
    patch_peft(two)
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            want, got = (of(input_ids=samples.ids()).logits.float() for of in (one, two))
        torch.testing.assert_close(got, want, rtol=0.1, atol=0.05)


def largest_allocation(of) -> int:
    """The bytes of the largest block of memory that a step takes, inside of operators as well."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        samples.call(of, 9, 64, dtype=torch.float32)
    return max(event.self_cpu_memory_usage for event in seen.events())


@pytest.mark.parametrize("kind", ["qwen3", "gpt-oss"])
def test_no_tensor_of_the_size_of_the_stack(kind):
    of = samples.experts(kind, 64, torch.float32)
    size = of.base_model.model.experts.get_base_layer().down_proj.nbytes
    # PEFT's own forward makes W + scaling B A of all experts, and its gradient.
    assert largest_allocation(of) >= size
    patch_peft(of)
    assert largest_allocation(of) < size


def test_the_host_waits_for_nothing():
    of = samples.experts("qwen3", 8, torch.float32)
    patch_peft(of)
    with samples.Waits():
        samples.call(of, 9, 8, dtype=torch.float32)
    of.base_model.model.experts.get_base_layer().config._experts_implementation = "eager"
    with pytest.raises(AssertionError, match=r"_local_scalar_dense|nonzero"), samples.Waits():
        samples.call(of, 9, 8, dtype=torch.float32)


def test_more_adapters_than_a_call_adds_go_to_peft():
    of = samples.experts("qwen3", 4, torch.float32)
    names = ["default", "first", "second", "third", "fourth"]
    for name in names[1:]:
        of.add_adapter(name, of.peft_config["default"])
    of.base_model.set_adapter(names)
    assert "5 active adapters" in patch_peft(of).layers[0].reason
    samples.call(of, 9, 4, dtype=torch.float32)


def test_saved_for_backward_is_s_alone():
    number, tokens, r = 8, 40, 3
    of = samples.experts("qwen3", number, torch.float32, r)
    patch_peft(of)
    known = {p.untyped_storage().data_ptr() for p in of.parameters()}
    saved: dict[int, tuple] = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in known:
            saved[t.untyped_storage().data_ptr()] = tuple(t.shape)
        return t

    x, index = torch.randn(tokens, 16, requires_grad=True), torch.randint(0, number, (tokens, 2))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        of(x, index, torch.rand(tokens, 2))
    rows = 2 * tokens
    # Of each product its input, [rows, in], and s, [rows, r].
    assert sum(shape == (rows, r) for shape in saved.values()) == 2
    assert max(torch.Size(shape).numel() for shape in saved.values()) <= rows * 16


def test_merge_disable_and_files(tmp_path):
    one, two = samples.twins("mixtral")
    patch_peft(two)
    with one.disable_adapter(), two.disable_adapter():
        want, got = (of(input_ids=samples.ids()).logits for of in (one, two))
    torch.testing.assert_close(got, want)
    two.merge_adapter()
    assert "merged" in patch_peft(two).layers[-1].reason
    torch.testing.assert_close(two(input_ids=samples.ids()).logits, one(input_ids=samples.ids()).logits)
    two.unmerge_adapter()
    two.save_pretrained(tmp_path / "theirs")
    base = samples.model("mixtral").unload()
    again = PeftModel.from_pretrained(base, tmp_path / "theirs")
    patch_peft(again)
    torch.testing.assert_close(again(input_ids=samples.ids()).logits, one(input_ids=samples.ids()).logits)
    merged = two.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=samples.ids()).logits, one(input_ids=samples.ids()).logits)


def test_what_others_have_set_goes_to_pefts_forward():
    def reason(change) -> str:
        one, two = stock_and_patched("qwen3", 4)
        # In float32, which the stock forward of the patched model has, too.
        one, two = one.float(), two.float()
        patch_peft(two)
        change(two.base_model.model.experts)
        with torch.no_grad():
            report = explain(two, *_inputs(4))
        assert {layer.form for layer in report.layers} == {"stock"}
        change(one.base_model.model.experts)
        want = samples.call(one, 17, 4, dtype=torch.float32)
        assert_close(samples.call(two, 17, 4, dtype=torch.float32), want, 1e-5)
        return report.layers[0].reason

    hook = lambda *_: None  # noqa: E731
    assert "hook" in reason(lambda of: of.base_layer.register_forward_hook(hook))
    assert "hook" in reason(lambda of: of.get_base_layer().register_forward_hook(hook))
    assert "lora_A.default has a hook" in reason(lambda of: of.lora_A["default"].register_forward_hook(hook))
    assert "'eager'" in reason(lambda of: setattr(of.get_base_layer().config, "_experts_implementation", "eager"))
    assert "adapters are disabled" in reason(lambda of: of.enable_adapters(False))


def _inputs(number: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(5, 16), torch.randint(0, number, (5, 2)), torch.rand(5, 2)


def _tripled(module, *given):
    return 3 * moe.grouped_mm_experts_forward(module, *given)


def test_what_others_registered_computes_the_experts(monkeypatch):
    of, given = samples.experts("qwen3", 4, torch.float32), _inputs(4)
    patch_peft(of)
    base = of.base_model.model.experts.get_base_layer()
    y = of(*given)
    for name in ("grouped_mm", "lora_kernels"):
        base.config._experts_implementation = name
        torch.testing.assert_close(of(*given), y)
        with monkeypatch.context() as change:
            change.setitem(moe.ALL_EXPERTS_FUNCTIONS._global_mapping, name, _tripled)
            torch.testing.assert_close(of(*given), 3 * y)
            assert f"{name!r} was replaced" in explain(of, *given).layers[0].reason


def test_an_interface_of_the_class_s_own_computes_the_experts():
    class Experts(Qwen3MoeExperts):
        pass

    of, given = samples.experts("qwen3", 4, torch.float32), _inputs(4)
    want, interface = of(*given), moe.ExpertsInterface()
    interface["grouped_mm"] = _tripled
    of.base_model.model.experts.get_base_layer().__class__ = moe.use_experts_implementation(
        Experts, experts_interface=interface
    )
    patch_peft(of)
    torch.testing.assert_close(of(*given), 3 * want)
    assert "'grouped_mm' was replaced" in explain(of, *given).layers[0].reason


def test_a_class_s_own_call_computes_the_experts(monkeypatch):
    of, given = samples.experts("qwen3", 4, torch.float32), _inputs(4)
    patch_peft(of)
    y = of(*given)
    wrapper = of.base_model.model.experts
    for kind in (type(wrapper.get_base_layer()), type(wrapper.base_layer)):
        with monkeypatch.context() as change:
            change.setattr(kind, "__call__", lambda self, *args: 2 * nn.Module.__call__(self, *args), raising=False)
            # The outer wrapper has the class of the inner one.
            torch.testing.assert_close(of(*given), (2 if kind is not type(wrapper) else 4) * y)


def test_accelerated_computes_later_models_and_ends():
    one, two = samples.twins("qwen3")
    with accelerated():
        inside = two(input_ids=samples.ids()).logits
        assert sum("experts" in layer.note for layer in explain(two).layers) == 4
    torch.testing.assert_close(inside, one(input_ids=samples.ids()).logits)
    assert explain(two).count("stock") == 8


def test_generate_and_compile():
    one, two = samples.twins("qwen3")
    patch_peft(two)
    how = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(two.generate(samples.ids(), **how), one.generate(samples.ids(), **how))
    alone = samples.experts("qwen3", 4, torch.float32)
    patch_peft(alone)
    x, index, weights = _inputs(4)
    torch._dynamo.reset()
    compiled = torch.compile(alone, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, index, weights), alone(x, index, weights))


def test_the_implementation_is_registered_with_transformers():
    one = samples.model("mixtral")
    want = one(input_ids=samples.ids()).logits
    patch_peft(one)
    one.base_model.model.set_experts_implementation("lora_kernels")
    torch.testing.assert_close(one(input_ids=samples.ids()).logits, want)
    with one.disable_adapter():
        bare = one(input_ids=samples.ids()).logits
    assert not torch.allclose(bare, want)
