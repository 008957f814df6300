"""torch.compile with CUDA graphs on a GPU: what warms up, is captured and is replayed gives what a plain call gives."""

import pytest
import torch

from lora_kernels import LoRALinear, LoRAMLP, LoRAQKV

# what Inductor warns of differs from version to version, and nothing of it is about us
pytestmark = [
    pytest.mark.gpu,
    *(pytest.mark.filterwarnings(f"ignore::{kind}Warning") for kind in ("Deprecation", "User", "Future")),
]
STEPS = 5  # a warm-up, a recording and replays


def layers(kind, rows, p):
    """A module over rows of 1024, and an input of its."""
    # without a bias, whose gradient a compiler sums in an order of its own
    more = dict(r=16, lora_alpha=32, lora_dropout=p, bias=False, device="cuda", dtype=torch.bfloat16)
    make = {
        "linear": lambda: LoRALinear(1024, 768, **more),
        "qkv": lambda: LoRAQKV(1024, 768, 256, **more),
        "mlp": lambda: LoRAMLP(1024, 1536, **more),
    }[kind]
    torch.manual_seed(0)
    layer = make()
    for name, parameter in layer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return layer, torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16)


def step(call, layer, x):
    """Outputs and gradients of a training step, copies that outlive the next replay."""
    torch.compiler.cudagraph_mark_step_begin()
    x = x.detach().requires_grad_()
    ys = call(x)
    ys = ys if isinstance(ys, tuple) else (ys,)
    inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
    gradients = torch.autograd.grad(ys, inputs, [torch.ones_like(y) for y in ys])
    return [t.detach().clone() for t in (*ys, *gradients)]


@pytest.mark.parametrize("rows", [3, 2048])  # sums that are split, and not
@pytest.mark.parametrize("kind", ["linear", "qkv", "mlp"])
def test_reduce_overhead_gives_what_a_plain_call_gives(kind, rows):
    from torch._dynamo.utils import counters

    layer, x = layers(kind, rows, 0.0)
    compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    expected = [step(layer, layer, (1 + i) * x) for i in range(STEPS)]
    counters.clear()
    for i, wanted in enumerate(expected):
        found = step(compiled, layer, (1 + i) * x)
        assert all(map(torch.equal, found, wanted)), f"call {i}"
    assert not counters["inductor"]["cudagraph_skips"], "it was compiled without graphs"


def test_every_replay_draws_a_mask_of_its_own():
    layer, x = layers("linear", 512, 0.5)
    compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    ys = [step(compiled, layer, x)[0] for _ in range(STEPS)]
    assert not any(torch.equal(ys[-1], y) for y in ys[:-1])


def test_eager_calls_between_replays_do_not_disturb_them():
    """Their launches are of the same streams, or are given the same memory."""
    layer, x = layers("linear", 3, 0.0)
    compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    wanted = step(layer, layer, x)
    for _ in range(STEPS):
        found, plain = step(compiled, layer, x), step(layer, layer, x)
        assert all(map(torch.equal, found, wanted))
        assert all(map(torch.equal, plain, wanted))
