"""What users have by name stays: functions, modules, operators, commands, environment variables, files of results."""

import importlib

import pytest
import torch

import lora_kernels
from lora_kernels import cli

NAMES = (
    "LoRALinear", "LoRAQKV", "LoRAMLP", "Projection", "lora_linear", "lora_projections", "lora_qkv", "lora_mlp",
    "reference", "patch_peft", "unpatch_peft", "explain", "swap_linear", "save_adapter", "load_adapter",
    "merge_and_unload",
)  # fmt: skip
OPERATORS = ("linear", "add", "projections", "mlp")
COMMANDS = ("bench", "demo", "doctor", "inspect", "tune", "verify")
PLACES = {
    "lora_kernels.functional": ("lora_add", "lora_linear", "lora_mlp", "lora_projections", "lora_qkv"),
    "lora_kernels.reference": ("keep_mask", "lora_add", "lora_linear"),
    "lora_kernels.parallel": ("LoRAColwise", "LoRARowwise"),
    "lora_kernels.peft": ("accelerate", "accelerated", "explain", "patch_peft", "unpatch_peft"),
}


@pytest.mark.parametrize("name", NAMES)
def test_the_package_has_it(name):
    assert name in lora_kernels.__all__
    assert getattr(lora_kernels, name) is not None


@pytest.mark.parametrize("module", PLACES)
def test_a_module_has_its_names(module):
    loaded = importlib.import_module(module)
    assert [name for name in PLACES[module] if not callable(getattr(loaded, name, None))] == []


@pytest.mark.parametrize("name", [f"{name}{half}" for name in OPERATORS for half in ("", "_forward", "_backward")])
def test_an_operator_is_registered(name):
    assert isinstance(getattr(torch.ops.lora_kernels, name).default, torch._ops.OpOverload)


def test_the_commands_are_these():
    assert set(COMMANDS) == set(cli._COMMANDS)


def test_functions_compute_what_the_reference_computes():
    torch.manual_seed(0)
    x, weight, a, b = torch.randn(5, 12), torch.randn(7, 12), torch.randn(3, 12), torch.randn(7, 3)
    y = lora_kernels.reference.lora_linear(x, weight, a, b, scaling=0.5)
    base = x @ weight.T
    layer = lora_kernels.LoRALinear(12, 7, r=3, lora_alpha=1.5, bias=False)
    with torch.no_grad():
        for parameter, value in zip((layer.weight, layer.lora_A, layer.lora_B), (weight, a, b), strict=True):
            parameter.copy_(value)
    for found in (
        lora_kernels.lora_linear(x, weight, a, b, scaling=0.5),
        lora_kernels.functional.lora_add(base, x, a, b, scaling=0.5),
        lora_kernels.lora_projections(x, [weight], [(a, b)], scaling=0.5)[0],
        lora_kernels.lora_qkv(x, [weight] * 3, [(a, b)] * 3, scaling=0.5)[2],
        layer(x),
    ):
        torch.testing.assert_close(found, y)
    up, down = lora_kernels.Projection(weight, a, b, scaling=0.5), lora_kernels.Projection(torch.eye(7))
    torch.testing.assert_close(lora_kernels.lora_mlp(x, None, up, down, activation="relu2"), y.relu().square())
