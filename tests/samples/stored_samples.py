"""Models whose linear layers are quantised, as bitsandbytes and transformers leave them."""

import bitsandbytes as bnb
import torch
from llama_samples import LINEARS, llama
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.integrations.finegrained_fp8 import FP8Linear


def four_bits(linear, quant_type="nf4", compute_dtype=None, nested=True, storage=torch.uint8, blocksize=64):
    """The layer as a `Linear4bit` on a CPU."""
    how = dict(compress_statistics=nested, quant_type=quant_type, quant_storage=storage)
    has_bias, compute_dtype = linear.bias is not None, compute_dtype or linear.weight.dtype
    made = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, has_bias, compute_dtype=compute_dtype, **how
    )  # fmt: skip
    made.weight = bnb.nn.Params4bit(linear.weight.data, False, blocksize=blocksize, module=made, **how).to("cpu")
    if has_bias:
        made.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
    return made


def fp8(linear, block=(16, 16)):
    """The layer as an `FP8Linear`, with scales for blocks, or for the tensor if `block` is None."""
    made = FP8Linear(linear.in_features, linear.out_features, block, has_bias=linear.bias is not None)
    (rows, inner), weight = linear.weight.shape, linear.weight.detach().float()
    if block is None:
        scale = weight.abs().amax() / 448
        stored = weight / scale
    else:
        across, down = -(-rows // block[0]), -(-inner // block[1])
        scale = torch.stack([
            torch.stack([part.abs().amax() / 448 for part in strip.split(block[1], 1)])
            for strip in weight.split(block[0])
        ])  # fmt: skip
        assert scale.shape == (across, down)
        stored = weight / scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:rows, :inner]
    made.weight = nn.Parameter(stored.to(torch.float8_e4m3fn), requires_grad=False)
    made.weight_scale_inv = nn.Parameter(scale, requires_grad=False)
    if linear.bias is not None:
        made.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
    return made


def quantised(model, change=four_bits, **how):
    """The model with every targeted layer quantised, in place."""
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] in LINEARS:
            model.set_submodule(name, change(module, **how))
    model.is_loaded_in_4bit = change is four_bits
    return model


def quantised_llama(dtype=torch.float32, change=four_bits, lora=None, **how):
    """A tiny Llama with quantised layers and PEFT's adapters, whose B are not zero."""
    model = quantised(llama(dtype), change, **how)
    torch.manual_seed(1)
    options = dict(r=4, lora_alpha=8, target_modules=LINEARS, init_lora_weights=False) | (lora or {})
    return get_peft_model(model, LoraConfig(**options))
