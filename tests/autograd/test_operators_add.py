"""The registered operators of the low-rank term: PyTorch's own checks, the plain call's numbers and its masks."""

import functools

import pytest
import torch
from operator_samples import Watch
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels import autograd, plan
from lora_kernels.functional import lora_add

BACKENDS = ["torch", "triton"]
both = pytest.mark.parametrize("backend", BACKENDS)
NEEDED = [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
M, K, N, R = 10, 12, 9, 3


def operands(device, dtype=torch.float32, adapters=None, base=None):
    torch.manual_seed(0)
    shapes = {(2, 5, N): base or dtype, (2, 5, K): dtype, (R, K): adapters or dtype, (N, R): adapters or dtype}
    return [torch.randn(shape, device=device).to(t).requires_grad_() for shape, t in shapes.items()]


def draw(x, p, backend):
    return plan.contractions(backend).draw_noise(x) if p else None


@pytest.mark.parametrize("p", [0.0, 0.3])
@both
def test_opcheck_of_add_and_add_forward(backend, p, device):
    tensors = operands(device)
    # two runs of `add` draw two masks, so only without dropout may they be compared
    checks = ["test_schema", "test_autograd_registration"] + ([] if p else ["test_aot_dispatch_dynamic"])
    opcheck(autograd.add.add, (*tensors, 2.0, p, backend), test_utils=checks)
    opcheck(autograd.add.add_forward, (*tensors, draw(tensors[1], p, backend), 2.0, p, backend))


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("needed", NEEDED, ids=str)
@both
def test_opcheck_of_add_backward(backend, needed, adapters, device):
    base, x, a, b = (t.detach() for t in operands(device, torch.bfloat16, adapters, torch.float32))
    need_x, need_A, need_B = needed
    y, s, keep = autograd.add.add_forward(base, x, a, b, draw(x, 0.3, backend), 2.0, 0.3, backend)
    opcheck(
        autograd.add.add_backward,
        (
            torch.randn_like(y), x if need_A else None, a if need_x else None, b if need_x or need_A else None,
            s if need_B else None, keep if need_x or need_A else None, 2.0, backend, x.dtype, adapters, adapters,
            list(needed),
        ),
        test_utils=["test_schema", "test_autograd_registration", "test_faketensor"],
    )  # fmt: skip


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
@both
def test_the_operators_give_what_the_plain_call_gives(backend, p, base, adapters, device):
    tensors = operands(device, torch.bfloat16, adapters, base)
    outcomes = []
    for call in (functools.partial(lora_add, backend=backend), functools.partial(watched, backend=backend)):
        torch.manual_seed(3)
        y = call(*tensors, scaling=1.5, dropout_p=p)
        outcomes.append([y, *torch.autograd.grad(y, tensors, torch.ones_like(y))])
    assert all(map(torch.equal, *outcomes))
    assert [t.dtype for t in outcomes[1]] == [base, *(t.dtype for t in tensors)]


def watched(*args, **kwargs):
    with Watch() as mode:
        y = lora_add(*args, **kwargs)
    assert autograd.add.add_forward in mode.seen
    return y


@both
def test_only_what_is_needed_is_saved(backend, device):
    base, x, a, b = (t.detach() for t in operands(device))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        autograd.add.add(base, x, a, b.requires_grad_(), 2.0, 0.0, backend)
    assert saved == [(M, R)]


@pytest.mark.parametrize("policy", ["the operator", "PyTorch's products"])
@both
def test_selective_checkpointing_and_a_compiler_replay_the_masks(policy, backend, device, monkeypatch):
    monkeypatch.setattr(plan.backend, "_environment_backend", lambda: backend)
    torch.compiler.reset()  # the graph holds the other backend's name
    base, x, a, b = operands(device)

    def f(x):
        return lora_add(base, torch.relu(x), a, b, scaling=2.0, dropout_p=0.5).square().sum()

    def gradients(run):
        torch.manual_seed(7)
        return torch.autograd.grad(run(x), [base, x, a, b])

    saved = [autograd.add.add_forward] if policy == "the operator" else [torch.ops.aten.mm.default]
    contexts = functools.partial(create_selective_checkpoint_contexts, saved)
    expected = gradients(f)
    for run in (
        lambda x: checkpoint(f, x, use_reentrant=False, context_fn=contexts),
        torch.compile(f, backend="aot_eager", fullgraph=True),
    ):
        for got, value in zip(gradients(run), expected, strict=True):
            torch.testing.assert_close(got, value, rtol=1e-5, atol=1e-5)


@both
def test_flops_are_counted(backend, device):
    base, x, a, b = operands(device)
    with FlopCounterMode(display=False) as counter:
        y = lora_add(base, x, a, b, backend=backend)
        assert counter.get_total_flops() == 2 * M * R * (K + N)
        y.sum().backward()
    assert counter.get_total_flops() == 2 * M * R * (K + N) + 2 * M * R * (2 * K + 2 * N)


def test_double_backward_raises(device):
    base, x, a, b = operands(device)
    y = autograd.add.add(base, x, a, b, 2.0, 0.0, "torch")
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y).requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match=r"twice.*once_differentiable"):
        dx.sum().backward()
