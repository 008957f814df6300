"""The entry of each call: one check for each layer, and one choice of a backend."""

import pytest
import torch

from lora_kernels import Projection, lora_linear, lora_mlp, lora_projections, lora_qkv, plan
from lora_kernels.functional import checks

X, W = torch.randn(3, 6), torch.randn(6, 6)
ADAPTER = torch.randn(2, 6), torch.randn(6, 2)
LAYER = Projection(W, *ADAPTER)
CALLS = {
    "lora_linear": (1, lambda: lora_linear(X, W, *ADAPTER)),
    "one projection": (1, lambda: lora_projections(X, [W], [ADAPTER])),
    "two projections, one that drops all": (2, lambda: lora_projections(X, [W] * 2, [ADAPTER] * 2, dropout_p=[0, 1])),
    "Q/K/V": (3, lambda: lora_qkv(X, [W] * 3, [ADAPTER] * 3)),
    "MLP": (3, lambda: lora_mlp(X, LAYER, LAYER, LAYER)),
    "MLP without a gate": (2, lambda: lora_mlp(X, None, LAYER, LAYER)),
    "MLP computed again": (3, lambda: lora_mlp(X, LAYER, LAYER, LAYER._replace(bias=W[0]), recompute=True)),
}


def counted(monkeypatch, owner, name):
    """Count the calls of a function from now on."""
    function, calls = getattr(owner, name), []

    def count(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, count)
    return calls


@pytest.mark.parametrize("size", [pytest.param("small", marks=pytest.mark.small), "large"])
@pytest.mark.parametrize("case", CALLS)
def test_each_layer_is_checked_once_and_a_backend_chosen_once(case, size, monkeypatch):
    layers, call = CALLS[case]
    checked, chosen = counted(monkeypatch, checks, "check_call"), counted(monkeypatch, plan, "choose")
    call()
    assert (len(checked), len(chosen)) == (layers, 1)
