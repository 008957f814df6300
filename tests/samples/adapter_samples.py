"""A small net whose linear layers get adapters."""

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, dtype=None):
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(8, 12, dtype=dtype), nn.Linear(12, 8, bias=False, dtype=dtype)

    def forward(self, x):
        return x + self.o_proj(torch.tanh(self.q_proj(x)))


class Net(nn.Module):
    def __init__(self, dtype=None):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block(dtype) for _ in range(3))
        self.head = nn.Linear(8, 5, dtype=dtype)

    def forward(self, x):
        for block in self.layers:
            x = block(x)
        return self.head(x)


def fill(model, seed=1):
    """Give every adapter of a model other numbers, B too, and return the model."""
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p.data, std=0.3)
    return model
