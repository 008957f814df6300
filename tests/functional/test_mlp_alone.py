"""`lora_mlp` where one tensor alone requires grad: what backward takes for it is saved, whatever the others need."""

import pytest
import torch

from lora_kernels import Projection, lora_mlp

NAMES = [f"{layer}.{part}" for layer in ("gate", "up", "down") for part in ("weight", "lora_A", "lora_B", "bias")]


def operands(device):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).mul(0.4).to(device)

    layers = {
        layer: Projection(draw(n, k), draw(3, k), draw(n, 3), draw(n))
        for layer, n, k in (("gate", 24, 16), ("up", 24, 16), ("down", 12, 24))
    }
    return draw(7, 16), layers


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("name", ["x", *NAMES])
def test_one_gradient_alone(name, backend, recompute, device):
    def gradients(*wanted):
        x, layers = operands(device)
        leaves = {"x": x} | {n: getattr(layers[n.partition(".")[0]], n.partition(".")[2]) for n in NAMES}
        for one in wanted:
            leaves[one].requires_grad_()
        y = lora_mlp(x, *layers.values(), backend=backend, recompute=recompute)
        return dict(zip(wanted, torch.autograd.grad(y.square().sum(), [leaves[one] for one in wanted]), strict=True))

    torch.testing.assert_close(gradients(name)[name], gradients("x", *NAMES)[name], rtol=1e-4, atol=1e-4)
