"""Small PEFT models, and one call of them with every gradient, for the tests of lora_kernels.peft."""

import copy
import pickle
from contextlib import nullcontext

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_kernels.verify import numerics

IN, OUT = 24, 20


class Tiny(nn.Module):
    """A linear layer that can be targeted, `lin`, and one that is not, `head`."""

    def __init__(self, dtype=torch.float32, bias=True, lin=None):
        super().__init__()
        self.lin = lin if lin is not None else nn.Linear(IN, OUT, bias, dtype=dtype)
        self.head = nn.Linear(OUT, OUT, dtype=dtype)

    def forward(self, x):
        return self.lin(x)


def config(**changes):
    return LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": ["lin"], "init_lora_weights": False} | changes))


def tiny(dtype=torch.float32, bias=True, lin=None, autocast_adapter_dtype=True, **changes):
    """A PEFT model with an adapter whose B is not zero."""
    torch.manual_seed(0)
    return get_peft_model(Tiny(dtype, bias, lin), config(**changes), autocast_adapter_dtype=autocast_adapter_dtype)


class Foreign(pickle.Unpickler):
    """Where this library is not."""

    def find_class(self, module, name):
        assert not module.startswith("lora_kernels")
        return super().find_class(module, name)


def layer(model):
    return model.base_model.model.lin


def call(model, x, autocast=None, dy_seed=1):
    """Call a model and let a gradient flow back: y, the gradient of x and of whatever else has one."""
    model.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(x.requires_grad)
    with torch.autocast("cpu", dtype=autocast) if autocast else nullcontext():
        y = model(x)
    outputs = {"y": y.detach()}
    if y.requires_grad:
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(dy_seed)).to(y.dtype)
        y.backward(dy)
        if x.grad is not None:
            outputs["dx"] = x.grad
        outputs |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return outputs


def truth(model, x):
    """What a model computes in float64 from the same rounded numbers."""
    exact = copy.deepcopy(model).double()
    for module in exact.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            for name, value in module.scaling.items():
                module.scaling[name] = value.double() if isinstance(value, torch.Tensor) else value
    return call(exact, x.detach().double().requires_grad_(x.requires_grad))


def check(actual, stock, exact, dtype):
    """Each output is there, of stock's dtype and shape, and at most twice as far off as stock's, or off by roundings."""
    assert actual.keys() == stock.keys() == exact.keys()
    for name, t in actual.items():
        assert (t.dtype, t.shape) == (stock[name].dtype, stock[name].shape), name
        assert t.isfinite().all(), name
        if not t.numel():
            continue
        error, theirs = (numerics.rms(other.double() - exact[name]) for other in (t, stock[name]))
        # in 16 bits a few roundings, else those of each sum's terms; a lost or doubled term is off by far more
        limit = 2 * theirs + (2 if dtype.itemsize == 2 else 16) * numerics.unit_roundoff(dtype) * numerics.rms(
            exact[name]
        )
        assert error <= limit, f"{name}: rms error {error:.3g}, stock's {theirs:.3g}, limit {limit:.3g}"
