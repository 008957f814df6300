"""A model with an embedding, norms and a head that are trained whole beside adapters, in our words and in PEFT's."""

import torch
from peft import LoraConfig
from torch import nn

from lora_kernels import swap_linear

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
IDS = torch.tensor([[1, 3, 5], [0, 2, 6]])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.q_proj = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.q_proj(self.norm(x))


class Net(nn.Module):
    """An embedding, blocks with a norm each, a last norm, a block without adapters, and a head that may be tied."""

    def __init__(self, tied=False, dtype=None):
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(7, 8)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(8)
        self.tail = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh())
        self.lm_head = nn.Linear(8, 7, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight
        self.to(dtype)

    def forward(self, ids):
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x).flatten(0, 1)
        return self.lm_head(self.tail(x))


WAYS = {
    "head": ["lm_head"], "every norm": ["norm"], "last norm": ["embed_tokens", "norm"], "embedding": ["embed_tokens"],
    "block": ["tail"], "by full name": ["layers.1.norm", "tail.1"], "in the middle of a word": ["_head", "tokens"],
}  # fmt: skip


def config(names, **fields):
    return LoraConfig(**dict(r=2, lora_alpha=3, target_modules=["q_proj"], modules_to_save=names) | fields)


def ours(names, model=None):
    model = Net() if model is None else model
    swap_linear(model, ["q_proj"], r=2, lora_alpha=3, modules_to_save=names)
    return model


def moved(model):
    """Give everything that is trained other numbers."""
    torch.manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape) * 0.1)
    return model


def same_state(model, other):
    state = other.state_dict()
    assert model.state_dict().keys() == state.keys()
    for key, t in model.state_dict().items():
        assert torch.equal(t, state[key]), key
