"""A tiny Llama, made from a configuration, with PEFT's adapters; text to train it on; and its losses step by step."""

from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(dtype=torch.float32, layers=2):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, attention_bias=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype)


def adapted(dtype=torch.float32, layers=2, **changes):
    torch.manual_seed(1)
    options = dict(r=4, lora_alpha=8, target_modules=LINEARS) | changes
    return get_peft_model(llama(dtype, layers), LoraConfig(**options))


def tokens():
    text = Path(__file__).read_bytes()[: 8 * 4 * 24]
    ids = torch.tensor(list(text)) % 128
    return ids.view(8, 4, 24)


def train(model, steps=6, autocast=None, seed=2, accumulate=1, scaler=None):
    """Losses step by step."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    losses, data = [], tokens()
    model.train()
    for step in range(steps):
        for part in data[step % len(data)].chunk(accumulate):
            with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
                loss = model(input_ids=part, labels=part).loss
            scaler.scale(loss / accumulate).backward()
            losses.append(loss.item())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return torch.tensor(losses)
