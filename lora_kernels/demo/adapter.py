"""Save and load the demo's trained adapter, and compare three ways to compute the same model."""

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_kernels import reference
from lora_kernels.demo.model import Transformer, add_lora, lora_layers
from lora_kernels.measure.presets import PROJECTIONS
from lora_kernels.modules.linear import LoRALinear
from lora_kernels.verify import numerics

__all__ = ["Agreement", "compare", "load", "merged_copy", "reference_copy", "save"]

_ADAPTER, _CONFIG, _BASE = "adapter.safetensors", "adapter_config.json", "base.safetensors"


def save(model: Transformer, folder: Path, lora_dropout: float) -> dict[str, Path]:
    """Write the adapter, its configuration and its base model, each to a file of its own."""
    state = {name: t.detach().contiguous().cpu() for name, t in model.state_dict().items()}
    adapter = {name: t for name, t in state.items() if name.endswith((".lora_A", ".lora_B"))}
    paths = {"adapter": folder / _ADAPTER, "config": folder / _CONFIG, "base": folder / _BASE}
    save_file(adapter, paths["adapter"])
    save_file({name: t for name, t in state.items() if name not in adapter}, paths["base"])
    layer = lora_layers(model)[0]
    config = dict(r=layer.r, lora_alpha=layer.lora_alpha, lora_dropout=lora_dropout, target_modules=PROJECTIONS)
    paths["config"].write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return paths


def load(folder: Path, device: torch.device, dtype: torch.dtype) -> Transformer:
    """Build a new model from the files that `save` wrote, in evaluation mode."""
    model = Transformer()
    model.load_state_dict(load_file(folder / _BASE))
    config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    model.to(device, dtype)
    add_lora(model, config["r"], config["lora_alpha"], config["lora_dropout"])
    missing, unexpected = model.load_state_dict(load_file(folder / _ADAPTER), strict=False)
    left_out = [name for name in missing if name.endswith((".lora_A", ".lora_B"))]
    if left_out or unexpected:
        raise RuntimeError(f"{folder / _ADAPTER} does not fit the model: {left_out + unexpected}")
    return model.eval()


class _ReferenceLinear(nn.Module):
    """A `LoRALinear` computed by the reference in place of a backend."""

    def __init__(self, layer: LoRALinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        adapter = (layer.lora_A.to(x.dtype), layer.lora_B.to(x.dtype))
        return reference.lora_linear(x, layer.weight, *adapter, scaling=layer.scaling, bias=layer.bias)


def reference_copy(model: Transformer) -> Transformer:
    """Copy the model with every adapter computed by the plain PyTorch reference, without fusion."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LoRALinear):
                setattr(module, name, _ReferenceLinear(child))
    return model


def merged_copy(model: Transformer) -> Transformer:
    """Copy the model with every adapter merged into its weight."""
    model = copy.deepcopy(model)
    for layer in lora_layers(model):
        layer.merge()
    return model


@dataclass(frozen=True)
class Agreement:
    """The difference between two models' logits.

    Attributes:
        rms: The rms of the difference, relative to the rms of the logits.
        largest: The largest difference of any logit.
        limit: The largest allowed `rms`.
    """

    rms: float
    largest: float
    limit: float

    @property
    def ok(self) -> bool:
        """Return whether the difference is within the limit; NaN is not."""
        return self.rms <= self.limit


def compare(actual: Tensor, expected: Tensor, dtype: torch.dtype, layers: int) -> Agreement:
    """Compare logits of models that differ only in rounding.

    Each of the `layers` rounds its output by at most one unit roundoff u. Independent errors add up to
    sqrt(layers) · u, which is the limit. In float32 the limit is four times that, because the sums inside a layer round
    by a few u as well. A lost update is far beyond the limit; the demo shows how far the adapter moves the logits.
    """
    difference, expected = actual.double() - expected.double(), expected.double()
    factor = 4 if dtype == torch.float32 else 1
    limit = factor * math.sqrt(layers) * numerics.unit_roundoff(dtype)
    return Agreement(numerics.rms(difference) / numerics.rms(expected), difference.abs().max().item(), limit)
