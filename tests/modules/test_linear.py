"""LoRALinear: what a user of nn.Linear and of PEFT expects of a layer."""

import copy
import io
import math

import pytest
import torch
from torch import nn

from lora_kernels import LoRALinear
from lora_kernels.functional import lora_add
from lora_kernels.peft import swap_linear


def layer(dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    made = LoRALinear(12, 10, **({"r": 3, "lora_alpha": 6} | kwargs), dtype=dtype)
    nn.init.normal_(made.lora_B, std=0.1)
    return made


def test_starts_as_its_base():
    linear = nn.Linear(12, 10)
    made = LoRALinear.from_linear(linear, r=4)
    x = torch.randn(5, 12)
    torch.testing.assert_close(made(x), linear(x))
    assert made.lora_A.abs().max() <= 1 / math.sqrt(12)  # Kaiming uniform with a = √5
    assert made.lora_A.std() > 0.5 / math.sqrt(3 * 12)


def test_from_linear_shares_and_freezes():
    linear = nn.Linear(12, 10, dtype=torch.bfloat16).eval()
    made = LoRALinear.from_linear(linear, r=4, dtype=torch.float32)
    assert made.weight is linear.weight
    assert made.bias is linear.bias
    assert not made.weight.requires_grad
    assert made.lora_A.dtype == made.lora_B.dtype == torch.float32
    assert not made.training
    assert LoRALinear.from_linear(nn.Linear(3, 3, bias=False)).bias is None


def test_a_subclass_of_linear_is_refused():
    class Odd(nn.Linear):
        pass

    ways = r"linear is a Odd, .* to a plain nn\.Linear if .*, or .* with lora_kernels\.functional\.lora_add\."
    with pytest.raises(TypeError, match=ways):
        LoRALinear.from_linear(Odd(3, 3))
    base, x = Odd(3, 3), torch.randn(2, 3)
    torch.testing.assert_close(lora_add(base(x), x, torch.ones(1, 3), torch.zeros(3, 1), scaling=1.0), base(x))


@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook", "forward"]
)
def test_a_layer_with_hooks_is_refused(register):
    """They would silently run no more."""
    linear = nn.Linear(3, 3)
    if register == "forward":
        linear.forward = lambda x: x
    else:
        getattr(linear, register)(lambda *args: None)
    with pytest.raises(ValueError, match=r"from_linear: linear has .* set on it, which would no longer run"):
        LoRALinear.from_linear(linear)
    assert linear.weight.requires_grad
    model = nn.Sequential(nn.Linear(3, 3), linear)
    with pytest.raises(ValueError, match=r"swap_linear: 1 has .*exclude_modules=\['1'\]"):
        swap_linear(model, "all-linear")
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "wrong", [dict(r=0), dict(lora_alpha=math.nan), dict(lora_dropout=2.0), dict(rank_pattern={"1": 0})]
)
def test_wrong_numbers_leave_a_model_as_it_was(wrong):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"LoRALinear: (r|lora_alpha|lora_dropout) must be"):
        swap_linear(model, "all-linear", **wrong)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, 6 / 3), (True, 6 / math.sqrt(3))])
def test_scaling(use_rslora, scaling):
    made = layer(use_rslora=use_rslora)
    assert made.scaling == pytest.approx(scaling)
    x = torch.randn(4, 12)
    expected = nn.functional.linear(x, made.weight + scaling * made.lora_B @ made.lora_A, made.bias)
    torch.testing.assert_close(made(x), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_merge_and_unmerge_are_exact_to_rounding(dtype):
    made = layer(dtype)
    before = made.weight.detach().clone()
    update = made.scaling * made.lora_B.detach().double() @ made.lora_A.detach().double()
    unit = torch.finfo(dtype).eps
    made.merge()
    assert made.merged
    error = (made.weight.double() - (before.double() + update)).abs()
    # rounded once from float32 (or float64) sums
    assert (error <= unit * (before.double().abs() + update.abs())).all()
    merged = made.weight.detach().clone()
    made.merge()
    assert torch.equal(made.weight, merged), "merging twice added it twice"
    made.scaling *= 2  # what was added is what is taken out
    made.unmerge()
    made.unmerge()
    assert not made.merged
    assert ((made.weight.double() - before.double()).abs() <= 2 * unit * (before.double().abs() + update.abs())).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fp32_adapters_are_merged_in_fp32(dtype):
    """Rounded to the weight's dtype, A's two rows were the same and the first update 0; the second was rounded twice."""
    made = LoRALinear.from_linear(nn.Linear(1, 2, bias=False, dtype=dtype), r=2, lora_alpha=2, dtype=torch.float32)
    unit = torch.finfo(dtype).eps
    first, second = torch.tensor([[1 + unit / 8], [1.0]]), torch.tensor([[1 + unit / 4], [0.0]])
    for lora_A, lora_B, update, weight in (
        (first, [[1024.0, -1024.0], [0.0, 0.0]], [128 * unit, 0.0], [0.0, 0.0]),
        # the sum lies above the middle of two neighbours, and on it once the update is rounded
        (second, [[1.0, 0.0], [0.0, 0.0]], [1 + unit / 4, 0.0], [2 / unit, 0.0]),
    ):
        with torch.no_grad():
            made.lora_A.copy_(lora_A)
            made.lora_B.copy_(torch.tensor(lora_B))
            made.weight.copy_(torch.tensor(weight)[:, None])
        made.merge()
        expected = (torch.tensor(weight).double() + torch.tensor(update).double()).to(dtype)
        assert torch.equal(made.weight[:, 0], expected)
        made.unmerge()


def test_merged_forward_agrees_and_refuses_to_train():
    made = layer().eval()
    x = torch.randn(7, 12)
    expected = made(x)
    made.merge()
    torch.testing.assert_close(made(x), expected)
    made.train()
    with pytest.raises(RuntimeError, match=r"LoRALinear is merged; call unmerge\(\) before training"):
        made(x)
    with torch.no_grad():
        torch.testing.assert_close(made(x), expected)
    with pytest.raises(RuntimeError, match="is merged"):
        made.reset_lora_parameters()


def test_state_dict_round_trip():
    made = layer()
    assert list(made.state_dict()) == ["weight", "bias", "lora_A", "lora_B"]
    other = LoRALinear(12, 10, r=3, lora_alpha=6)
    other.load_state_dict(made.state_dict())
    x = torch.randn(4, 12)
    assert torch.equal(other(x), made(x))
    with pytest.raises(RuntimeError, match="lora_A"):
        LoRALinear(12, 10, r=4).load_state_dict(made.state_dict())


def test_a_merged_state_dict_is_a_plain_linears():
    made = layer()
    x = torch.randn(4, 12)
    expected = made(x)
    made.merge()
    plain = nn.Linear(12, 10)
    plain.load_state_dict(made.state_dict())
    torch.testing.assert_close(plain(x), expected)


@pytest.mark.parametrize("merged", [False, True])
def test_deepcopy_and_pickle(merged):
    made = layer(lora_dropout=0.2).eval()
    if merged:
        made.merge()
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    x = torch.randn(4, 12)
    for twin in (copy.deepcopy(made), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x), made(x))
        assert twin.weight.data_ptr() != made.weight.data_ptr()
        assert (twin.merged, twin.scaling, twin.lora_dropout) == (merged, made.scaling, 0.2)
        twin.unmerge()


def test_repr():
    assert repr(layer(lora_dropout=0.1, use_rslora=True)) == (
        "LoRALinear(in_features=12, out_features=10, r=3, lora_alpha=6, lora_dropout=0.1, bias=True, use_rslora=True)"
    )
    made = layer(bias=False)
    made.merge()
    assert "bias=False, merged=True" in repr(made)


def test_dropout_in_training_alone():
    made = layer(lora_dropout=0.5)
    x = torch.randn(50, 12)
    assert not torch.equal(made(x), made(x))
    made.eval()
    assert torch.equal(made(x), made(x))
    base = nn.functional.linear(x, made.weight, made.bias)
    made.train()
    torch.manual_seed(0)
    mean = torch.stack([made(x) - base for _ in range(600)]).mean(0)
    made.eval()
    torch.testing.assert_close(mean, made(x) - base, atol=0.15, rtol=0)


def test_an_optimizer_moves_the_adapter_alone():
    made = layer()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    optimizer = torch.optim.SGD((p for p in made.parameters() if p.requires_grad), lr=0.1)
    made(torch.randn(4, 12)).square().sum().backward()
    optimizer.step()
    moved = {name for name, value in made.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"lora_A", "lora_B"}


def test_moves_like_any_module():
    made = layer().to(torch.bfloat16)
    assert made(torch.randn(2, 12, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert LoRALinear(4, 4, r=1, device="meta", dtype=torch.float16).lora_A.is_meta


def test_unmerge_takes_out_what_was_added_though_the_adapters_changed():
    made = layer()
    base = made.weight.detach().clone()
    made.merge()
    with torch.no_grad():
        made.lora_A.mul_(3)
        made.lora_B.zero_()
    made.unmerge()
    torch.testing.assert_close(made.weight.detach(), base, rtol=1e-5, atol=1e-5)


def test_a_merged_layer_refuses_to_load():
    made = layer()
    state = made.state_dict()
    made.merge()
    with pytest.raises(RuntimeError, match=r"is merged; call unmerge\(\) before loading"):
        made.load_state_dict(state)
    made.unmerge()
    made.load_state_dict(state)


@pytest.mark.parametrize(
    ("bad", "words"),
    [({"r": 2.5}, "r must be an int, got float 2.5"), ({"lora_alpha": math.nan}, "lora_alpha must be finite, got nan")],
)
def test_arguments_that_do_not_fit(bad, words):
    with pytest.raises((TypeError, ValueError), match=words):
        LoRALinear(4, 4, **bad)
