"""Passes by plans: the same bits and launches as without one, for tensors of the same kinds and no others."""

import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from pass_samples import IN, OUT, M, R, adapter, add, linear, mlp, mlp_made_again, qkv, results

from lora_kernels import kernels, lora_linear, lora_mlp, lora_qkv, plan
from lora_kernels.passes.layer import Projection
from lora_kernels.plan import steps as plans

FORMS = ("fused", "beta1", "padded", "joint")
PS = [pytest.param(0.0, marks=pytest.mark.slow), 0.3]
ALL = [linear, add, qkv, mlp, mlp_made_again]


class _Forgetful(kernels.Slot):
    """Keeps nothing: each launcher settles each launch anew, as it does when it is called alone."""

    @property
    def settled(self):
        return None

    @settled.setter
    def settled(self, launch):
        pass

    def part(self, name):
        return _Forgetful()


class _Checked(kernels.Slot):
    """Settles each launch anew, and compares it with the launch of the first pass."""

    first = None
    compared = 0

    @property
    def settled(self):
        return None

    @settled.setter
    def settled(self, launch):
        assert self.first is None or launch is self.first, "a plan would take another launch"
        _Checked.compared += self.first is not None
        self.first = launch

    def part(self, name):
        if name not in self._parts:
            self._parts[name] = _Checked()
        return self._parts[name]


@pytest.fixture
def checked(monkeypatch):
    """Settle each launch twice; give the number of launches that a plan would have taken."""
    monkeypatch.setattr(kernels, "Slot", _Checked)
    monkeypatch.setattr(_Checked, "compared", 0)
    return _Checked


@pytest.fixture
def made(monkeypatch):
    """All `Steps` of kinds of passes, in order."""
    seen = []

    class Listed(plans.Steps):
        def __init__(self, backend):
            super().__init__(backend)
            seen.append(self)

    monkeypatch.setattr(plans, "Steps", Listed)
    return seen


@pytest.mark.parametrize("make", ALL, ids=lambda f: f.__name__)
@pytest.mark.parametrize("p", PS)
@pytest.mark.parametrize("adapters", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str)
def test_a_planned_pass_gives_the_bits_of_the_launchers_alone(make, p, adapters, device, monkeypatch):
    args = make, device, torch.bfloat16, adapters, p
    planned = [results(*args, seed=i) for i in range(2)]
    plan.forget()
    monkeypatch.setattr(kernels, "Slot", _Forgetful)
    for i, got in enumerate(planned):
        assert all(map(torch.equal, got, results(*args, seed=i))), i


@pytest.mark.parametrize(
    ("make", "form"),
    [
        *itertools.product(ALL, ("fused",)), *itertools.product((linear, mlp), FORMS[2:]),
        *(pytest.param(make, "beta1", marks=pytest.mark.slow) for make in ALL),
    ],
)  # fmt: skip
@pytest.mark.parametrize("p", PS)
def test_a_plan_takes_the_launches_that_would_be_settled(make, form, p, device, checked):
    with plan.force_form(form):
        for seed in range(2):
            results(make, device, torch.float32, torch.float32, p, seed=seed)
    assert checked.compared >= 3


@pytest.mark.parametrize(
    "form", [pytest.param("fused", marks=pytest.mark.slow), *FORMS[1:3], pytest.param("joint", marks=pytest.mark.slow)]
)
def test_parameters_in_one_buffer(form, device, checked):
    """As sharded and bucketed parameters lie, on addresses of any alignment."""
    shapes = (16, IN), (16, IN), (OUT, 16), (R, IN), (16, R), (R, IN), (16, R), (R, 16), (OUT, R)
    for gap in (0, 1, 1):
        buffer, tensors, at = torch.randn(2000, device=device), [], 0
        for shape in shapes:
            size = torch.Size(shape).numel()
            tensors.append(buffer[at : at + size].view(shape))
            at += size + gap
        pairs = [tuple(t.detach().requires_grad_() for t in tensors[i : i + 2]) for i in (3, 5, 7)]
        layers = [Projection(w, *pair, None, 0.5, 0.3) for w, pair in zip(tensors, pairs, strict=False)]
        x = torch.randn(M, IN, device=device).requires_grad_()
        with plan.force_form(form):
            y = lora_mlp(x, *layers, backend="triton", activation="relu2")
            ys = lora_qkv(x, [*tensors[:2], tensors[0][1:6]], [*pairs[:2], None], backend="triton")
            torch.autograd.grad([y, *ys], [x, *itertools.chain(*pairs)], [torch.ones_like(each) for each in (y, *ys)])
    assert checked.compared >= 8


def test_gradients_are_added_to(device):
    torch.manual_seed(0)
    x, w = torch.randn(M, IN, device=device), torch.randn(OUT, IN, device=device)
    (a, b), (c, d) = adapter(device, IN, OUT, x.dtype), adapter(device, IN, OUT, x.dtype)
    with torch.no_grad():
        c.copy_(a)
        d.copy_(b)
    for _ in range(3):
        dy = torch.randn(M, OUT, device=device)
        lora_linear(x, w, a, b, backend="triton", accumulate_grad=True).backward(dy)
        lora_linear(x, w, c, d, backend="triton").backward(dy)
    torch.testing.assert_close(a.grad, c.grad)
    torch.testing.assert_close(b.grad, d.grad)


def test_a_form_that_is_forced_is_taken(device):
    args = linear, device, torch.float32, torch.float32, 0.0
    plain = [results(*args, seed=i) for i in range(3)]
    with plan.force_form("beta1"):
        forced = [results(*args, seed=i) for i in range(2)]
        with torch.profiler.profile() as profile:
            forced.append(results(*args, seed=2))
    assert [event.name for event in profile.events()].count("aten::addmm_") == 2, "y and dx"
    for one, other in zip(plain, forced, strict=True):
        for g, wanted in zip(one, other, strict=True):
            torch.testing.assert_close(g, wanted)


@pytest.mark.parametrize("make", [linear, add])
def test_tf32_is_another_kind(make, device, made):
    args = make, device, torch.float32, torch.float32, 0.0
    results(*args, seed=0)
    known = len(made)
    results(*args, seed=0)
    assert len(made) == known == 2, "forward and backward, once"
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        results(*args, seed=0)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert len(made) == 2 * known


def test_by_a_plan_nothing_is_decided_again(device, monkeypatch):
    args = linear, device, torch.bfloat16, torch.bfloat16, 0.3
    results(*args, seed=0)

    def decides(*args, **kwargs):
        raise AssertionError("nothing is left to decide")

    monkeypatch.setattr(plan.forms, "expander", decides)
    for contraction in ("shrink", "matmul_expand", "wgrad"):
        monkeypatch.setattr(sys.modules[f"lora_kernels.kernels.{contraction}"], "_settle", decides)
    results(*args, seed=3)


def test_the_torch_backend_keeps_no_plan():
    x, w = torch.randn(M, IN), torch.randn(OUT, IN)
    a, b = adapter("cpu", IN, OUT, x.dtype)
    for _ in range(2):
        y = lora_linear(x, w, a, b, backend="torch")
    torch.testing.assert_close(y, F.linear(x, w) + x @ a.t() @ b.t())
    assert plans._steps.cache_info().currsize == 0


@pytest.mark.parametrize("which", range(5))
@pytest.mark.parametrize("times", [1, 2])
def test_one_that_stands_for_its_negative(which, times, device):
    def draw(*shape):
        return torch.randn(*shape, device=device)

    for _ in range(times):
        tensors = [draw(M, IN), draw(OUT, IN), draw(R, IN), draw(OUT, R), draw(OUT)]
        expected = lora_linear(*tensors[:4], bias=tensors[4], backend="triton")
        tensors[which] = torch._neg_view(-tensors[which])
        y = lora_linear(*tensors[:4], bias=tensors[4], backend="triton")
    assert torch.equal(y, expected)


def _ran(*arguments, backend="triton"):
    """Return the steps that a pass is given for these arguments."""
    first, *settings = arguments
    return plan.run(backend, _steps_alone, tuple(settings), first)


def _steps_alone(steps, *_):
    return steps


def _on_an_odd_address():
    return torch.randn(25)[1:].view(6, 4)


@pytest.mark.parametrize(
    "other",
    [
        (torch.randn(7, 4), 2.0), (torch.randn(4, 6).t(), 2.0), (torch.randn(6, 4).double(), 2.0),
        (_on_an_odd_address(), 2.0), (torch.randn(6, 4), 3.0), ([torch.randn(6, 4)], 2.0), (torch.randn(6, 4), None),
        (torch.randn(6, 4), (2.0,)), ((torch.randn(6, 4), None), 2.0), (torch.randn(6, 4, device="meta"), 2.0),
    ],
    ids=["shape", "strides", "dtype", "alignment", "number", "list", "None", "tuple", "another", "device"],
)  # fmt: skip
def test_other_kinds_have_steps_of_their_own(other):
    steps = _ran(torch.randn(6, 4), 2.0)
    assert _ran(torch.randn(6, 4), 2.0) is steps
    assert _ran(*other) is not steps
    assert _ran(torch.randn(6, 4), 2.0) is steps


def test_another_pass_has_steps_of_its_own():
    x = torch.randn(6, 4)
    assert plan.run("triton", lambda steps, x: steps, (), x) is not _ran(x)


def test_forgetting_begins_anew():
    x = torch.randn(6, 4)
    steps = _ran(x)
    plan.forget()
    assert _ran(x) is not steps


def test_a_kind_in_use_outlives_a_thousand_others():
    x, small = torch.randn(6, 4), torch.randn(2, 2)
    steps = _ran(x)
    for i in range(3000):
        _ran(small, i)
        assert _ran(x) is steps


def test_what_the_first_pass_decides_is_kept_by_name():
    steps, asked = _ran(torch.randn(6, 4)), []
    for name in ("y", "dx", "y"):
        assert steps.once(name, lambda name=name: asked.append(name) or name) == name
    assert asked == ["y", "dx"]
    assert steps["s"] is steps["s"] is not steps["ds"]
    assert steps["s"].part(1) is steps["s"].part(1) is not steps["s"].part(2)
    assert steps.part("down") is steps.part("down")
    assert steps.part("down")["s"] is not steps["s"]


def test_a_pass_that_fails_leaves_nothing_half_decided():
    def fails(steps, x):
        steps.once("y", _raise)

    for _ in range(2):
        with pytest.raises(ValueError, match="no memory"):
            plan.run("triton", fails, (), torch.randn(6, 4))


def _raise():
    raise ValueError("no memory")
