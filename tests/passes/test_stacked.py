"""Thin products of several projections as one in dx: when, the same result, and when not."""

import pytest
import torch
from projection_samples import assert_accurate, draw, run

from lora_kernels import kernels, plan
from lora_kernels.kernels import hybrid
from lora_kernels.plan import model

STACKED = ((48, 8, 0.0), (16, 0, 0.0), (16, 16, 0.0), (24, 8, 0.0))  # out_features, rank, dropout of each
LLAMA = (8192, 4096)


@pytest.fixture
def of_dx(monkeypatch):
    """How many sources each launch for several outputs, or for a sum of several large products, has."""
    counts = []
    real = kernels.matmul_expand_all

    def counted(outputs, *args, **kwargs):
        counts.append([len(sources) for sources, _ in outputs])
        return real(outputs, *args, **kwargs)

    monkeypatch.setitem(hybrid._STRATEGIES, "fused", counted)
    return counts


@pytest.mark.parametrize(
    ("shape", "ranks", "element", "copied", "expected"),
    [
        (LLAMA, (16, 16, 16), 2, False, True), ((256, 4096), (16, 16, 16), 2, False, False),
        ((256, 4096), (16, 16, 16), 2, True, True), (LLAMA, (32, 32, 32), 2, False, True),
        (LLAMA, (64, 64, 64), 2, True, False), (LLAMA, (16,), 2, True, False), (LLAMA, (), 2, True, False),
        (LLAMA, (12, 12, 12), 2, True, False), (LLAMA, (16, 16, 16), 4, True, False),
        (LLAMA, (40, 8, 8), 2, True, False),  # a launch of its own makes that ds
    ],
)  # fmt: skip
def test_where_it_pays(shape, ranks, element, copied, expected):
    assert model.stacks(*shape, ranks, element, copied) is expected


def test_short_steps_save_less():
    assert model.stacks(*LLAMA, (32, 32), 2, True)
    assert not model.stacks(*LLAMA, (32, 32), 2, True, k_step=32)


@pytest.mark.parametrize("adapters", [torch.float32, None])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_within_the_rules(dtype, adapters, device, monkeypatch):
    monkeypatch.setattr(model, "_STACKED", 0)
    assert_accurate(*draw(STACKED, dtype, device, adapter_dtype=adapters), "triton")


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16])
def test_the_same_sums_in_fewer_steps(adapters, of_dx, device, monkeypatch):
    """Small whole numbers: every sum is exact, so one product gives the bits of several."""
    block, _ = draw(STACKED, torch.bfloat16, device, adapter_dtype=adapters)
    block.scalings = [2.0] * len(STACKED)
    generator = torch.Generator().manual_seed(0)  # one for all: two A of a rank must differ
    with torch.no_grad():
        for t in (*block.leaves(), *block.weights, *block.dys):
            t.copy_(torch.randint(-1, 2, t.shape, generator=generator))
    monkeypatch.setattr(model, "_STACKED", 0)
    with plan.force_form("fused"):
        own, dx = run(block, lambda: block.together("triton"))
        monkeypatch.setattr(model, "stacks", lambda *_: False)
        plan.forget()
        alone, dx_alone = run(block, lambda: block.together("triton"))
    assert of_dx[1::2] == [[5], [7]]  # four of W, and one of A in place of three
    assert torch.equal(dx, dx_alone)
    for one, other in zip(own, alone, strict=True):
        for name in one:
            assert torch.equal(one[name], other[name]), name


def test_only_where_ds_and_dB_come_together_and_nothing_is_dropped(device, monkeypatch):
    def stack(*_):
        raise AssertionError("these products should not be one")

    monkeypatch.setattr(model, "_STACKED", 0)
    monkeypatch.setattr(kernels, "stack", stack)
    taken, _ = draw(STACKED, torch.float16, device)
    with pytest.raises(AssertionError, match="should not"):
        run(taken, lambda: taken.together("triton"))
    dropped, _ = draw((*STACKED[:2], (16, 16, 0.5)), torch.float16, device)
    run(dropped, lambda: dropped.together("triton"))
    frozen, _ = draw(STACKED, torch.float16, device)
    with plan.force_form("beta1"):  # the thin products are a launch of their own, which writing its result takes
        run(frozen, lambda: frozen.together("triton"))
    frozen.adapters[0][1].requires_grad_(False)
    torch.autograd.grad(frozen.together("triton"), frozen.x, frozen.dys)
