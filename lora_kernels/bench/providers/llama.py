"""A Llama-shaped model with random weights, and its adapters in every form that `bench` compares.

The model has grouped-query attention with rotary positions, RMSNorm and SwiGLU, and no biases. All forms of one model
share its frozen weights, and their adapters hold the same numbers. Shapes: activations `[batch, seq, hidden]`, tokens
`[batch, seq]`.
"""

import copy
import importlib
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels import reference
from lora_kernels.bench.providers.quantised import linear4bit
from lora_kernels.demo.model import MLP
from lora_kernels.functional import lora_mlp, lora_qkv
from lora_kernels.measure.presets import PROJECTIONS, Dims
from lora_kernels.modules.linear import LoRALinear
from lora_kernels.passes.layer import Projection
from lora_kernels.peft import patch_peft
from lora_kernels.quantized import layers as quantized_layers
from lora_kernels.verify.stored import quantise

__all__ = [
    "Adapters", "LanguageModel", "Stack", "copy_with_adapters", "draw_adapters", "projections", "store",
    "stored_tensors",
]  # fmt: skip

# Name of a projection to its A and B.
Adapters = dict[str, tuple[Tensor, Tensor]]


class GroupedAttention(nn.Module):
    """Causal self-attention with fewer key and value heads than query heads."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.head_dim = dims.head_dim
        self.q, self.o = (nn.Linear(dims.hidden, dims.hidden, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(dims.hidden, dims.kv_heads * dims.head_dim, bias=False) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Mix information across positions, `[batch, seq, hidden]`."""
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in self.project(x))
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(mixed.transpose(1, 2).flatten(-2))

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute queries, keys and values."""
        return self.q(x), self.k(x), self.v(x)


class BlockAttention(GroupedAttention):
    """`GroupedAttention` with queries, keys and values by `lora_qkv`."""

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute queries, keys and values."""
        layers = [_projection(layer) for layer in (self.q, self.k, self.v)]
        adapters = [None if q.lora_A is None else (q.lora_A, q.lora_B) for q in layers]
        numbers = {what: [getattr(q, what) for q in layers] for what in ("scaling", "dropout_p")}
        return lora_qkv(x, [_weight(q) for q in layers], adapters, **numbers)


class BlockMLP(MLP):
    """`MLP` by `lora_mlp`."""

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position on its own, `[batch, seq, hidden]`."""
        return lora_mlp(x, *map(_projection, (self.gate, self.up, self.down)))


def _weight(layer: nn.Module) -> Any:
    """Return W as a call takes it."""
    if isinstance(layer, LoRALinear):
        return layer.whole_weight()
    return quantized_layers.read(layer) if quantized_layers.kind_of(layer) else layer.weight


def _projection(layer: nn.Module) -> Projection:
    if not isinstance(layer, LoRALinear):
        return Projection(_weight(layer))
    p = layer.lora_dropout if layer.training else 0.0
    return Projection(_weight(layer), layer.lora_A, layer.lora_B, None, layer.scaling, p)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Encode positions by rotating pairs of features half a head apart (RoPE, arXiv:2104.09864)."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


class DecoderLayer(nn.Module):
    """A decoder layer: attention, then MLP, each on normalised input and added to the stream."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = (nn.RMSNorm(dims.hidden, eps=1e-5) for _ in range(2))
        self.attention, self.mlp = GroupedAttention(dims), MLP(dims.hidden, dims.intermediate)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Apply the layer, `[batch, seq, hidden]`."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class Stack(nn.Module):
    """Decoder layers and the rotary angles of their positions."""

    def __init__(self, dims: Dims, layers: int = 1) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(DecoderLayer(dims) for _ in range(layers))
        speed = 500_000.0 ** (-torch.arange(0, dims.head_dim, 2) / dims.head_dim)
        angle = (torch.arange(dims.seq)[:, None] * speed).repeat(1, 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply all layers, `[batch, seq, hidden]`."""
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return x


class LanguageModel(nn.Module):
    """Embedding, decoder layers, norm and head."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.embedding = nn.Embedding(dims.vocab, dims.hidden)
        self.stack, self.norm = Stack(dims, dims.layers), nn.RMSNorm(dims.hidden, eps=1e-5)
        self.head = nn.Linear(dims.hidden, dims.vocab, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits `[batch, seq, vocab]` from embedded tokens `[batch, seq, hidden]`."""
        return self.head(self.norm(self.stack(x)))


def projections(model: nn.Module, targets: Sequence[str] = PROJECTIONS) -> dict[str, nn.Linear]:
    """Find the layers that get an adapter, by name; "q" stands for transformers' "q_proj" as well."""
    short = [target.removesuffix("_proj") for target in targets]
    return {
        name: module for name, module in model.named_modules() if name.rpartition(".")[2].removesuffix("_proj") in short
    }


def store(base: nn.Module, kind: str) -> nn.Module:
    """Quantise the projections of a model, and return a copy with bitsandbytes' layers in their places.

    Args:
        base: A frozen model; the weights of its projections are rounded in place to what the copy's layers hold, and
            the copy shares all others.
        kind: "nf4" or "fp4".
    """
    shared = {id(t): t for t in itertools.chain(base.parameters(), base.buffers())}
    model = copy.deepcopy(base, shared)
    for name, linear in projections(base).items():
        weight = quantise(linear.weight, kind)
        linear.weight.data.copy_(reference.dequantize(weight, weight.dtype))
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, linear4bit(weight))
    # PEFT reads this of the model that it adapts.
    model.is_loaded_in_4bit = True
    return model


def stored_tensors(model: nn.Module) -> list[Tensor]:
    """Return the tensors of all quantised weights of a model."""
    kept = (module for module in model.modules() if quantized_layers.kind_of(module))
    return [t for module in kept for t in quantized_layers.read(module).tensors()]


def draw_adapters(model: nn.Module, r: int, targets: Sequence[str] = PROJECTIONS, seed: int = 3) -> Adapters:
    """Draw adapters in which every term matters, in the dtype and on the device of the model."""
    drawn = {}
    for name, linear in projections(model, targets).items():
        n, k = linear.weight.shape
        generator = torch.Generator(linear.weight.device).manual_seed(seed + len(drawn))
        a, b = (torch.randn(size, generator=generator, device=linear.weight.device) for size in ((r, k), (n, r)))
        drawn[name] = ((a * k**-0.5).to(linear.weight.dtype), (b * 0.5 * r**-0.5).to(linear.weight.dtype))
    return drawn


class PeftArithmetic(nn.Module):
    """The arithmetic of PEFT's layer, for environments without PEFT."""

    def __init__(self, linear: nn.Linear, lora_A: nn.Parameter, lora_B: nn.Parameter, scaling: float, p: float) -> None:
        super().__init__()
        self.linear, self.scaling, self.p = linear, scaling, p
        self.lora_A, self.lora_B = lora_A, lora_B

    def forward(self, x: Tensor) -> Tensor:
        """Compute y, `[*, out]`."""
        y = self.linear(x)
        x = F.dropout(x.to(self.lora_A.dtype), self.p, self.training and self.p > 0)
        return (y + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scaling).to(y.dtype)


def copy_with_adapters(
    base: nn.Module, form: str, adapters: Adapters, dtype: torch.dtype, scaling: float, p: float
) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """Copy the model with adapters; the copy shares every frozen tensor of `base`.

    Args:
        base: A frozen model; not changed.
        form: "frozen" for no adapters, "layers" for `LoRALinear`, "ours" for `LoRALinear` in blocks (`lora_qkv` and
            `lora_mlp`), "peft" for PEFT's own layers and "patched" for those after `patch_peft` (both raise
            `ImportError` if PEFT is not installed), "arithmetic" for `PeftArithmetic`.
        adapters: The adapters' values.
        dtype: Dtype of the adapters' parameters.
        scaling: Multiplies the low-rank term.
        p: Drop probability in training mode.

    Returns:
        The model in training mode, and its trainable parameters: "<projection>.A" and "<projection>.B", in order.
    """
    shared = {id(t): t for t in itertools.chain(base.parameters(), base.buffers())}
    model = copy.deepcopy(base, shared).train()
    if form == "frozen":
        return model, {}
    held = {
        f"{name}.{which}": nn.Parameter(t.detach().to(dtype, copy=True))
        for name, pair in adapters.items() for which, t in zip("AB", pair, strict=True)
    }  # fmt: skip
    if form in ("peft", "patched"):
        _inject_peft(model, adapters, held, scaling, p)
        if form == "patched":
            patch_peft(model)
        return model, held
    for name in adapters:
        linear = model.get_submodule(name)
        parent, _, last = name.rpartition(".")
        a, b = held[f"{name}.A"], held[f"{name}.B"]
        if form in ("layers", "ours"):
            layer: nn.Module = LoRALinear.from_linear(linear, a.shape[0], scaling * a.shape[0], p, dtype=dtype)
            layer.lora_A, layer.lora_B = a, b
        else:
            layer = PeftArithmetic(linear, a, b, scaling, p)
        setattr(model.get_submodule(parent), last, layer)
    for module in model.modules() if form == "ours" else ():
        if isinstance(module, (GroupedAttention, MLP)):
            module.__class__ = BlockAttention if isinstance(module, GroupedAttention) else BlockMLP
    return model, held


def _inject_peft(model: nn.Module, adapters: Adapters, held: dict[str, Any], scaling: float, p: float) -> None:
    peft = importlib.import_module("peft")
    r = next(iter(adapters.values()))[0].shape[0]
    config = peft.LoraConfig(
        r=r, lora_alpha=scaling * r, lora_dropout=p, target_modules=list(adapters), init_lora_weights=False
    )  # fmt: skip
    peft.inject_adapter_in_model(config, model)
    for name in adapters:
        layer = model.get_submodule(name)
        layer.lora_A["default"].weight, layer.lora_B["default"].weight = held[f"{name}.A"], held[f"{name}.B"]
    model.train()
