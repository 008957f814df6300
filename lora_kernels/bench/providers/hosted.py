"""transformers' Llama as `bench --model` times it: built from its configuration with random weights, nothing loaded.

PEFT adds the adapters and `patch_peft` makes them fast, as in a usual training script. The model has the interface of
`providers.llama.LanguageModel`: it embeds tokens, and maps embedded tokens to logits.
"""

import importlib

import torch
from torch import Tensor, nn

from lora_kernels.measure.presets import HostedDims

__all__ = ["HostedModel", "missing_bitsandbytes", "missing_requirement"]


class HostedModel(nn.Module):
    """`LlamaForCausalLM` from embedded tokens to logits.

    Args:
        dims: The model's sizes.
        dtype: Dtype of the weights; the rotary angles stay float32, as transformers keeps them.
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
        # build the weights in `dtype`, because an 8B model in float32 first would not fit
        torch.set_default_dtype(dtype)
        try:
            self.llama = transformers.LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)

    def embedding(self, tokens: Tensor) -> Tensor:
        """Embed tokens `[batch, seq]` to `[batch, seq, hidden]`, with unit variance.

        A trained model's residual stream has unit variance as well. The layers' outputs would drown a smaller
        embedding. A change in one layer would then change the whole output, so that the size of the change could not
        be judged by the output.
        """
        return self.llama.get_input_embeddings()(tokens) / self.llama.config.initializer_range

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits `[batch, seq, vocab]` from embedded tokens `[batch, seq, hidden]`."""
        return self.llama(inputs_embeds=x, use_cache=False).logits


def missing_requirement() -> str:
    """Return why this machine cannot build the model, or ""."""
    for package in ("transformers", "peft"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            return f"needs transformers and PEFT: pip install 'peft>=0.19' brings both ({error})"
    return ""


def missing_bitsandbytes() -> str:
    """Return why this machine cannot build a quantised model, or ""."""
    try:
        importlib.import_module("bitsandbytes")
    except ImportError as error:
        return f"needs bitsandbytes: pip install bitsandbytes ({error})"
    return ""
