"""The demo's model: a small byte-level transformer, written to be read.

As in Llama, every projection is an `nn.Linear` of its own (q, k, v, o, gate, up, down), so that `LoRALinear` replaces
projections by name. Shapes: tokens `[batch, time]`, activations `[batch, time, width]`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels.measure.presets import PROJECTIONS
from lora_kernels.modules.linear import LoRALinear

__all__ = ["CONTEXT", "Transformer", "add_lora", "lora_layers"]

# Number of bytes in the attention window.
CONTEXT = 64


def rotate(x: Tensor) -> Tensor:
    """Encode positions by rotating pairs of features, `[..., time, features]` (RoPE, arXiv:2104.09864)."""
    time, half = x.shape[-2], x.shape[-1] // 2
    speed = 100.0 ** (-torch.arange(half, device=x.device) / half)
    angle = torch.arange(time, device=x.device)[:, None] * speed
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    left, right = x.chunk(2, -1)
    return torch.cat((left * cos - right * sin, left * sin + right * cos), -1)


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Mix information across time, `[batch, time, width]`."""
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        return self.o(mixed.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """Gated feed-forward (SwiGLU)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position on its own, `[batch, time, width]`."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """A decoder layer: attention, then MLP, each on normalised input and added to the stream."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = (nn.RMSNorm(width) for _ in range(2))
        self.attention, self.mlp = Attention(width, heads), MLP(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer, `[batch, time, width]`."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """Maps bytes to logits of the next byte; the output layer is the transposed embedding."""

    def __init__(self, width: int = 64, layers: int = 3, heads: int = 4, hidden: int = 192) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        nn.init.normal_(self.embedding.weight, std=0.05)
        # each block starts as the identity, because the model then trains sooner
        for block in self.blocks:
            nn.init.zeros_(block.attention.o.weight)
            nn.init.zeros_(block.mlp.down.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute logits, `[batch, time, 256]`."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embedding.weight)

    def loss(self, tokens: Tensor) -> Tensor:
        """Compute the mean cross-entropy, in nats a byte, of bytes `[batch, time + 1]`, each given those before it."""
        logits = self(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    @torch.no_grad()
    def generate(self, prompt: bytes, length: int, seed: int, temperature: float = 0.6) -> bytes:
        """Continue a prompt by `length` sampled bytes; the same seed gives the same bytes."""
        generator = torch.Generator().manual_seed(seed)
        tokens = list(prompt)
        for _ in range(length):
            window = torch.tensor([tokens[-CONTEXT:]], device=self.embedding.weight.device)
            odds = (self(window)[0, -1].float().cpu() / temperature).softmax(-1)
            tokens.append(int(torch.multinomial(odds, 1, generator=generator)))
        return bytes(tokens)


def add_lora(
    model: Transformer, r: int, lora_alpha: float, lora_dropout: float, dtype: torch.dtype = torch.float32
) -> None:
    """Freeze a model and replace every projection of its blocks by a `LoRALinear`.

    Args:
        model: Changed in place; its weights are shared, not copied.
        r: Rank.
        lora_alpha: Numerator of the scaling.
        lora_dropout: Drop probability of the adapters' input.
        dtype: Dtype of the adapters; float32 over a 16-bit base is PEFT's default.
    """
    model.requires_grad_(False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in PROJECTIONS:
                setattr(module, name, LoRALinear.from_linear(child, r, lora_alpha, lora_dropout, dtype=dtype))


def lora_layers(model: nn.Module) -> list[LoRALinear]:
    """List every `LoRALinear` of a model, in order."""
    return [module for module in model.modules() if isinstance(module, LoRALinear)]
