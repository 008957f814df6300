"""Tiny mixtures of experts with PEFT's adapters on their parameters, and steps of training of them."""

import copy

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

__all__ = ["KINDS", "Alone", "Waits", "call", "experts", "gradients", "ids", "model", "train", "twins"]

KINDS = ("qwen3", "mixtral", "gpt-oss")
_PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
_COMMON = dict(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64,
)  # fmt: skip


def model(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> nn.Module:
    """A PEFT model whose adapters, biases and sinks are not zero; `changes` are of the LoraConfig."""
    torch.manual_seed(seed)
    if kind == "qwen3":
        config = Qwen3MoeConfig(
            **_COMMON, intermediate_size=48, moe_intermediate_size=24, num_experts=8, num_experts_per_tok=2, head_dim=8
        )
        base = Qwen3MoeForCausalLM(config)
    elif kind == "mixtral":
        base = MixtralForCausalLM(
            MixtralConfig(**_COMMON, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2)
        )
    else:
        # Without rotary scaling, of which transformers warns at these sizes.
        config = GptOssConfig(
            **_COMMON, intermediate_size=32, num_local_experts=4, num_experts_per_tok=2, head_dim=8,
            layer_types=["full_attention"] * 2, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )  # fmt: skip
        base = GptOssForCausalLM(config)
    defaults = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], target_parameters=_PARAMETERS)
    found = get_peft_model(base.to(dtype), LoraConfig(**(defaults | changes)))
    for name, parameter in found.named_parameters():
        if any(word in name for word in ("lora_B", "sinks", "bias")):
            nn.init.normal_(parameter, std=0.1)
    return found


def twins(kind: str, **changes) -> tuple[nn.Module, nn.Module]:
    """Two equal models."""
    one = model(kind, **changes)
    return one, copy.deepcopy(one)


def ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(seed))


def gradients(of: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.detach().clone() for name, p in of.named_parameters() if p.grad is not None}


def train(of: nn.Module, steps: int, rate: float = 0.1) -> list[float]:
    """The losses of steps of SGD."""
    optimizer = torch.optim.SGD([p for p in of.parameters() if p.requires_grad], lr=rate)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = of(input_ids=ids(step), labels=ids(step)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class Waits(TorchDispatchMode):
    """Refuses what makes the host wait for the device."""

    WORDS = ("_local_scalar_dense", "nonzero", "bincount", "unique", "masked_select", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(word in str(func) for word in self.WORDS), func
        return func(*args, **(kwargs or {}))


def experts(kind: str, number: int, dtype: torch.dtype = torch.float64, r: int = 3, **changes) -> nn.Module:
    """The experts of a model alone, with PEFT's wrappers over both parameters; gpt-oss has [in, out] and biases."""
    torch.manual_seed(0)
    if kind == "gpt-oss":
        config = GptOssConfig(hidden_size=16, intermediate_size=8, num_local_experts=number)
        base = GptOssExperts(config)
    else:
        config = Qwen3MoeConfig(hidden_size=16, moe_intermediate_size=8, num_experts=number)
        base = Qwen3MoeExperts(config)
    config._experts_implementation = "grouped_mm"
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.5)
    whole = Alone(base).to(dtype)
    lora = dict(
        r=r, lora_alpha=5, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        init_lora_weights=False,
    )  # fmt: skip
    return get_peft_model(whole, LoraConfig(**(lora | changes)), autocast_adapter_dtype=False)


class Alone(nn.Module):
    """A model of one experts module."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, *args, **kwargs):
        return self.experts(*args, **kwargs)


def call(of: nn.Module, tokens: int, number: int, chosen: str = "random", dtype=torch.float64) -> dict:
    """y, dx and every gradient of a call, by the way in which tokens choose their two experts.

    "sentinels" are ids of no expert, and "their zeros" is the same for a forward that knows none.
    """
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, 16, generator=generator, dtype=dtype).requires_grad_()
    index = torch.randint(0, number, (tokens, 2), generator=generator)
    if chosen == "one":
        index[:] = number - 1
    elif chosen == "few":
        # Experts with one row, and many with none.
        index[:] = 0
        index[0, 0] = number - 1
    weights = torch.rand(tokens, 2, generator=generator, dtype=dtype)
    if chosen == "sentinels":
        index[::2] = number
    elif chosen == "their zeros":
        weights[::2] = 0
    of.zero_grad()
    y = of(x, index, weights)
    y.backward(torch.randn(y.shape, generator=generator, dtype=y.dtype))
    return {"y": y.detach(), "dx": x.grad} | gradients(of)
