"""Tiny models of many makers, and attention and MLP blocks of a few lines, with PEFT's adapters."""

import copy

import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=32, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
MAKERS = {
    "Llama": {}, "Mistral": {}, "Qwen2": {}, "Qwen3": dict(head_dim=8), "Gemma": dict(head_dim=8),
    "Gemma2": dict(head_dim=8, query_pre_attn_scalar=8), "Gemma3": dict(head_dim=8, query_pre_attn_scalar=8),
    "Phi": {}, "Phi3": {},
}  # fmt: skip
LINEARS = "all-linear"
WIDTH = 24


def maker(name, dtype=torch.float32, **changes):
    """A tiny causal model of this maker with adapters whose B is not zero."""
    torch.manual_seed(0)
    kind = "Gemma3Text" if name == "Gemma3" else name
    config = getattr(transformers, f"{kind}Config")(**SIZES, **MAKERS[name], attn_implementation="eager")
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype)
    return adapted(model, **(dict(target_modules=LINEARS) | changes))


def adapted(model, **changes):
    torch.manual_seed(1)
    options = dict(r=4, lora_alpha=6, target_modules=LINEARS, init_lora_weights=False) | changes
    return get_peft_model(model, LoraConfig(**options))


def ids(rows=2, columns=7):
    return torch.randint(3, 64, (rows, columns), generator=torch.Generator().manual_seed(3))


def outputs(model, seed=None):
    """Logits and the gradient of every adapter."""
    model.zero_grad()
    if seed is not None:
        torch.manual_seed(seed)
    logits = model(input_ids=ids()).logits
    dy = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4)).to(logits.dtype)
    logits.backward(dy)
    return {"logits": logits.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def exactly(model):
    return outputs(copy.deepcopy(model).double())


class Attention(nn.Module):
    """Q, K and V of one x, side by side; what happens between them and the output is `mixed`."""

    def __init__(self, narrow=8):
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH)
        self.k_proj = nn.Linear(WIDTH, narrow, bias=False)
        self.v_proj = nn.Linear(WIDTH, narrow)
        self.calls = 0

    def forward(self, x, mixed=lambda *qkv: torch.cat(qkv, -1)):
        q = self.q_proj(x)
        k = self.k_proj(x)
        v = self.v_proj(x)
        self.calls += 1
        return mixed(q, k, v)


class Gated(nn.Module):
    """A gated MLP, and what it may have beside."""

    def __init__(self, act=None, hidden=16):
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, hidden, bias=False)
        self.up_proj = nn.Linear(WIDTH, hidden)
        self.down_proj = nn.Linear(hidden, WIDTH)
        self.act_fn = act or nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Ungated(nn.Module):
    """An MLP of two layers."""

    def __init__(self, act=None, hidden=16):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)
        self.activation_fn = act or nn.GELU(approximate="tanh")

    def forward(self, x):
        return self.fc2(self.activation_fn(self.fc1(x)))


class Functional(Gated):
    def forward(self, hidden):
        up = self.up_proj(hidden)
        gate = self.gate_proj(hidden)
        return self.down_proj(up * F.gelu(gate, approximate="tanh"))


class Block(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x, *args, **kwargs):
        return self.part(x, *args, **kwargs)


def block(part, **changes):
    """A PEFT model of one block, and the block."""
    torch.manual_seed(0)
    model = adapted(Block(part), **changes)
    return model, model.base_model.model.part


class Between(Attention):
    """Something happens between q and k."""

    happens = staticmethod(lambda part: None)

    def forward(self, x):
        q = self.q_proj(x)
        self.happened = self.happens(self)
        k, v = self.k_proj(x), self.v_proj(x)
        return torch.cat([q, k, v], -1)


class Replayed(nn.Module):
    def __init__(self, model, reentrant):
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x):
        return checkpoint(self.model, x, use_reentrant=self.reentrant)
