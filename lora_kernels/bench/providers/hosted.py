"""transformers' Llama as `bench --model` times it: built from its configuration, with random weights, nothing loaded.

PEFT puts the adapters in and `patch_peft` makes them fast, as in anybody's training script. Seen from outside it is
what `providers.llama.LanguageModel` is: it embeds tokens, and takes embedded tokens to logits.
"""

import importlib

import torch
from torch import Tensor, nn

from lora_kernels.measure.presets import HostedDims

__all__ = ["HostedModel", "missing"]


class HostedModel(nn.Module):
    """`LlamaForCausalLM` between embedded tokens and logits.

    Args:
        dims: The model.
        dtype: Of its weights; the angles of its positions stay float32, as transformers keeps them.
    """

    def __init__(self, dims: HostedDims, dtype: torch.dtype) -> None:
        super().__init__()
        transformers = importlib.import_module("transformers")
        config = transformers.LlamaConfig(
            vocab_size=dims.vocab, hidden_size=dims.hidden, intermediate_size=dims.intermediate,
            num_hidden_layers=dims.layers, num_attention_heads=dims.heads, num_key_value_heads=dims.kv_heads,
            max_position_embeddings=dims.seq, tie_word_embeddings=dims.tied, use_cache=False,
        )  # fmt: skip
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # built in it: an 8B model in float32 first would not fit
        try:
            self.llama = transformers.LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)

    def embedding(self, tokens: Tensor) -> Tensor:
        """Embed tokens `[batch, seq]`, `[batch, seq, hidden]`.

        In unit variance, as a trained model's stream has: layers would drown it otherwise, and whatever changes in one
        would change all of the output, which is no measure of how much it changed.
        """
        return self.llama.get_input_embeddings()(tokens) / self.llama.config.initializer_range

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[batch, seq, vocab]` from embedded tokens `[batch, seq, hidden]`."""
        return self.llama(inputs_embeds=x, use_cache=False).logits


def missing() -> str:
    """Why there can be no such model here, or ""."""
    for package in ("transformers", "peft"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            return f"needs transformers and PEFT: pip install 'peft>=0.19' brings both ({error})"
    return ""
