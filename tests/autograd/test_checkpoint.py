"""Activation checkpointing and mixed precision: gradients of the plain run with the same seed, dropout on."""

import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from lora_kernels import LoRALinear, autograd, plan
from lora_kernels.dropout import keep_scale

BACKENDS = ["torch", "triton"]
SELECTED = {
    "the operator": lambda: [autograd.linear.linear_forward],
    "PyTorch's products": lambda: [torch.ops.aten.mm.default, torch.ops.aten.addmm.default],
}


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """What "auto" takes in every layer."""
    monkeypatch.setattr(plan.backend, "_environment_backend", lambda: request.param)
    return request.param


def block(device, p=0.5):
    torch.manual_seed(0)
    up, down = (LoRALinear(k, n, r=3, lora_dropout=p, device=device) for k, n in ((12, 20), (20, 12)))
    for layer in (up, down):
        nn.init.normal_(layer.lora_B)
    return nn.Sequential(up, nn.GELU(), down, nn.Dropout(p))


def gradients(model, run, x):
    """Those of the parameters that are trained and of x, the generator where it was at the start."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    torch.manual_seed(7)
    run(x).square().sum().backward()
    return {"x": x.grad} | {name: q.grad.clone() for name, q in model.named_parameters() if q.requires_grad}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert value.any(), name
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6 + 1e-4 * value.abs().max().item())


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_a_checkpointed_block(use_reentrant, backend, device):
    model, x = block(device), torch.randn(9, 12, device=device)
    expected = gradients(model, model, x)
    assert_same(gradients(model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant), x), expected)
    # and it is dropout that was held equal: with other masks it would not be
    other = gradients(model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant, preserve_rng_state=False), x)
    assert (other["x"] - expected["x"]).abs().max() > 0.01


@pytest.mark.parametrize("selected", SELECTED)
def test_selective_checkpointing(selected, backend, device):
    model, x = block(device), torch.randn(9, 12, device=device)
    contexts = functools.partial(create_selective_checkpoint_contexts, SELECTED[selected]())
    expected = gradients(model, model, x)
    assert_same(gradients(model, lambda x: checkpoint(model, x, use_reentrant=False, context_fn=contexts), x), expected)


@pytest.mark.parametrize(("saved", "runs"), [(True, 2), (False, 4)])
def test_an_operator_that_is_saved_does_not_run_again(saved, runs, backend, device, monkeypatch):
    calls = []
    contractions = plan.contractions(backend)
    shrink = contractions.shrink

    def counted(x, a, alpha, p=0.0, **more):
        calls.extend([alpha] if p else [])  # forward alone has a probability
        return shrink(x, a, alpha, p, **more)

    monkeypatch.setattr(contractions, "shrink", counted)
    model, x = block(device), torch.randn(9, 12, device=device)
    policy = [autograd.linear.linear_forward if saved else torch.ops.aten.gelu.default]
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    gradients(model, lambda x: checkpoint(model, x, use_reentrant=False, context_fn=contexts), x)
    assert calls == [model[0].scaling * keep_scale(0.5)] * runs


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_under_autocast(use_reentrant, backend, device):
    model, x = block(device), torch.randn(9, 12, device=device)

    def run(x, f=model):
        with torch.autocast(device, dtype=torch.bfloat16):
            return f(x).float()

    def checkpointed(x):
        return checkpoint(model, x, use_reentrant=use_reentrant)

    expected = gradients(model, run, x)
    assert_same(gradients(model, functools.partial(run, f=checkpointed), x), expected)


@pytest.mark.filterwarnings(
    "ignore:invalid value|overflow:RuntimeWarning"
)  # the interpreter's, of the infinite gradient
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_training_in_float16_with_a_scaler(p, backend, device):
    """Scaled, unscaled and stepped as without a scaler; an overflow skips the step and halves the scale."""
    model, x = block(device, p), torch.randn(9, 12, device=device)

    def loss():
        torch.manual_seed(3)
        with torch.autocast(device, dtype=torch.float16):
            return model(x).float().square().mean()

    trained = {name: q for name, q in model.named_parameters() if q.requires_grad}
    expected = torch.autograd.grad(loss(), list(trained.values()))
    optimizer = torch.optim.SGD(trained.values(), lr=1e-4)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**8)
    scaler.scale(loss()).backward()
    assert all(q.grad.dtype == torch.float32 for q in trained.values())
    scaler.unscale_(optimizer)
    for (name, q), value in zip(trained.items(), expected, strict=True):
        # float16 holds 11 bits, and what was too small for it before it was scaled is there now
        torch.testing.assert_close(q.grad, value, rtol=1e-2, atol=5e-3 * value.abs().max().item(), msg=name)
    before = loss().item()
    scaler.step(optimizer)
    scaler.update()
    assert loss().item() < before
    scale = scaler.get_scale()

    optimizer.zero_grad()
    kept = [q.detach().clone() for q in trained.values()]
    (scaler.scale(loss()) * 2.0**40).backward()
    assert not all(q.grad.isfinite().all() for q in trained.values())
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == scale / 2
    assert all(map(torch.equal, kept, trained.values()))
