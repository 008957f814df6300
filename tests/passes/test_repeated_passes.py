"""The passes of the package, repeated, do what they do as written: the same bits, the same launches, nothing decided."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from oracles import repeated
from pass_samples import IN, OUT, M, R, adapter, add, linear, mlp, mlp_made_again, qkv, results
from repeat_samples import WRITTEN, flat

from lora_kernels import lora_linear, lora_mlp, lora_qkv, plan
from lora_kernels.passes.layer import Projection

pytestmark = pytest.mark.usefixtures("nothing_known")


@pytest.mark.slow
@pytest.mark.parametrize("make", [linear, add, qkv, mlp, mlp_made_again], ids=lambda f: f.__name__)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("adapters", [torch.bfloat16, torch.float32], ids=str)
def test_every_pass_is_repeated_to_the_last_bit(make, p, adapters, device, monkeypatch, nothing_known):
    args = make, device, torch.bfloat16, adapters, p
    with monkeypatch.context() as patch:
        patch.setattr(plan, "repeat", lambda backend, pass_, *arguments: pass_(backend, *arguments))
        expected = [results(*args, seed=i) for i in range(WRITTEN + 2)]
    for i, wanted in enumerate(expected):
        assert all(map(torch.equal, results(*args, seed=i), wanted)), i
    recordings = [kind for kind in nothing_known if kind.recording]
    assert len(recordings) == 2, "forward and backward, with all that is in them"
    assert not any(kind.problem for kind in nothing_known)


@pytest.mark.parametrize("form", ["fused", "beta1", "padded", "joint"])
def test_parameters_in_one_buffer(form, device, monkeypatch):
    """As sharded and bucketed ones lie; by notes they lie apart, see `oracles.repeated`."""
    repeated.install(monkeypatch)
    shapes = (16, IN), (16, IN), (OUT, 16), (R, IN), (16, R), (R, IN), (16, R), (R, 16), (OUT, R)
    tensors = [t.to(device) for t in flat(shapes, range(len(shapes)), gap=0)]
    pairs = [tuple(t.detach().requires_grad_() for t in tensors[i : i + 2]) for i in (3, 5, 7)]
    layers = [Projection(w, *pair, None, 0.5, 0.3) for w, pair in zip(tensors, pairs, strict=False)]
    x = torch.randn(M, IN, device=device).requires_grad_()
    with plan.forced(form):
        y = lora_mlp(x, *layers, backend="triton", activation="relu2")
        ys = lora_qkv(x, [*tensors[:2], tensors[0][1:6]], [*pairs[:2], None], backend="triton")
        torch.autograd.grad([y, *ys], [x, *itertools.chain(*pairs)], [torch.ones_like(each) for each in (y, *ys)])


def test_gradients_are_added_to_by_notes(device):
    torch.manual_seed(0)
    x, w = torch.randn(M, IN, device=device), torch.randn(OUT, IN, device=device)
    (a, b), (c, d) = adapter(device, IN, OUT, x.dtype), adapter(device, IN, OUT, x.dtype)
    with torch.no_grad():
        c.copy_(a)
        d.copy_(b)
    for _ in range(WRITTEN + 2):
        dy = torch.randn(M, OUT, device=device)
        lora_linear(x, w, a, b, backend="triton", accumulate_grad=True).backward(dy)
        lora_linear(x, w, c, d, backend="triton").backward(dy)
    torch.testing.assert_close(a.grad, c.grad)
    torch.testing.assert_close(b.grad, d.grad)


def test_a_form_that_is_forced_is_taken(device):
    args = linear, device, torch.float32, torch.float32, 0.0
    plain = [results(*args, seed=i) for i in range(WRITTEN + 1)]
    with plan.forced("beta1"):
        forced = [results(*args, seed=i) for i in range(WRITTEN)]
        with torch.profiler.profile() as profile:
            forced.append(results(*args, seed=WRITTEN))
    assert [event.name for event in profile.events()].count("aten::addmm_") == 2, "y and dx, by notes"
    for one, other in zip(plain, forced, strict=True):
        for g, wanted in zip(one, other, strict=True):
            torch.testing.assert_close(g, wanted)


@pytest.mark.parametrize("make", [linear, add])
def test_tf32_is_another_kind(make, device, nothing_known):
    args = make, device, torch.float32, torch.float32, 0.0
    results(*args, seed=0)
    known = len(nothing_known)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        results(*args, seed=0)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert len(nothing_known) == 2 * known


def test_by_notes_nothing_is_decided_again(device, monkeypatch):
    args = linear, device, torch.bfloat16, torch.bfloat16, 0.3
    for i in range(WRITTEN):
        results(*args, seed=i)

    def decides(*args, **kwargs):
        raise AssertionError("nothing is left to decide")

    monkeypatch.setattr(plan, "expander", decides)
    for contraction in ("shrink", "matmul_expand", "wgrad", "shrink_wgrad"):
        monkeypatch.setattr(plan.contractions("triton"), contraction, decides)
    results(*args, seed=3)


def test_the_torch_backend_is_never_noted(nothing_known):
    x, w = torch.randn(M, IN), torch.randn(OUT, IN)
    a, b = adapter("cpu", IN, OUT, x.dtype)
    for _ in range(4):
        y = lora_linear(x, w, a, b, backend="torch")
    torch.testing.assert_close(y, F.linear(x, w) + x @ a.t() @ b.t())
    assert not nothing_known


@pytest.mark.parametrize("which", range(5))
@pytest.mark.parametrize("times", [1, WRITTEN + 1])
def test_one_that_stands_for_its_negative(which, times, device):
    def draw(*shape):
        return torch.randn(*shape, device=device)

    for _ in range(times):
        tensors = [draw(M, IN), draw(OUT, IN), draw(R, IN), draw(OUT, R), draw(OUT)]
        expected = lora_linear(*tensors[:4], bias=tensors[4], backend="triton")
        tensors[which] = torch._neg_view(-tensors[which])
        y = lora_linear(*tensors[:4], bias=tensors[4], backend="triton")
    assert torch.equal(y, expected)
