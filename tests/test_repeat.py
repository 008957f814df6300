"""Passes that are noted and repeated do what they do as written: with other tensors of the same kinds, and no others."""

import itertools
import sys
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from oracles import repeated

from lora_kernels import lora_linear, lora_mlp, lora_qkv, plan
from lora_kernels.functional import lora_add
from lora_kernels.kernels import _launch, _replay
from lora_kernels.kernels.repeat import _AS_WRITTEN, forget, repeat
from lora_kernels.projections import Projection

WRITTEN = _AS_WRITTEN + 1  # passes of a kind that run, the one that is noted among them


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    """Nothing is known at first; all kinds that come to be, in order."""
    module, kinds = sys.modules[repeat.__module__], []

    class Listed(module._Kind):
        def __init__(self):
            super().__init__()
            kinds.append(self)

    monkeypatch.setattr(module, "_Kind", Listed)
    forget()
    yield kinds
    forget()


ELSEWHERE = torch.ones(6, 4)


class Pass:
    """A function that counts how often it ran as written."""

    def __init__(self, function):
        self.function, self.runs = function, 0

    def __call__(self, *arguments):
        self.runs += 1
        return self.function(*arguments)


def outcomes(function, make, times=WRITTEN + 3, state=None):
    """The results of a pass called again and again, each beside what it gives as written; and the pass."""
    counted, pairs = Pass(function), []
    for _ in range(times):
        arguments = make()
        seed = torch.get_rng_state()
        expected = function(*arguments)
        torch.set_rng_state(seed)
        pairs.append((repeat(counted, state, *arguments), expected))
    return pairs, counted


def same(got, expected):
    if isinstance(expected, torch.Tensor):
        assert got.stride() == expected.stride()
        return torch.equal(got, expected)
    if isinstance(expected, (tuple, list)):
        assert type(got) is type(expected)
        return len(got) == len(expected) and all(map(same, got, expected))
    return got == expected


def two():
    return torch.randn(6, 4), torch.randn(5, 4)


def products(x, w):
    y = torch.mm(x, w.t())
    buffer = y.new_empty(y.shape[0], y.shape[1] + 3)
    left, right = buffer[:, :5], buffer[:, 5:]
    left.copy_(y)
    right.zero_()
    left.addmm_(x, w.t(), alpha=2.0)
    return left, [buffer.sum(0), None], (y.t(), "how", 3)


def drawn(x, w):
    seed = torch.empty(2, dtype=torch.int64).random_()
    return seed, x * torch.empty(6, 4).uniform_()


def reused(x, w):
    total = x.new_zeros(6, 5)
    for i in range(3):
        part = torch.mm(x, w.t()) * i  # lies where the one before it lay
        total.add_(part[:, :5])
        del part
    return total


def joined(x, w):
    out = x.new_empty(11, 4)
    return torch.cat([x, w], out=out), torch.cat([out, out], 1)


def alike(x, w):
    return x.to(torch.float32), x.to(torch.bfloat16), x.contiguous(), w.t().contiguous(), x.reshape(3, 8)


def read(t):
    return t.sum()


def turned(x, w):
    y = torch.mm(x, w.t())
    by_address = [_replay.call(read, t, by_address=True) for t in (x.t(), y.t(), y[1:].t(), y[1:])]
    return by_address, torch.mm(y.t(), y), torch.mm(y[1:].t(), y[1:]), x.t() + 1, y[1:].t().contiguous()


PASSES = {f.__name__: f for f in (products, drawn, reused, joined, alike, turned)}


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("grad", [False, True])
def test_what_is_noted_is_what_was_done(name, grad):
    with torch.set_grad_enabled(grad):
        pairs, counted = outcomes(PASSES[name], two)
    assert all(same(*pair) for pair in pairs)
    assert counted.runs == WRITTEN, "as written, then noted, then by notes"


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x, w: x * x.sum().item(), "gives no tensor"),
        (lambda x, w: torch.ops.aten.min.dim(x, 1)[0], "gives no tensor"),
        (lambda x, w: x + ELSEWHERE, "comes from nowhere"),
        (lambda x, w: Projection(x), "a Projection is not known"),
        (lambda x, w: x * torch.tensor(2.0), "comes from nowhere"),
        (lambda x, w: (x.view(torch.int32).clone(), 0), "comes from nowhere"),
        (lambda x, w: x * _replay.call(float, 2), "a float may not be what it was"),
        (lambda x, w: (_replay.call(lambda held: held["x"] + 1, {"x": x}), 0), "a dict may hold anything"),
    ],
)
def test_what_cannot_be_told_by_the_tensors_stays_as_written(function, why, nothing_known):
    pairs, counted = outcomes(function, two)
    assert all(torch.equal(got[0], expected[0]) for got, expected in pairs)
    assert counted.runs == len(pairs)
    (kind,) = nothing_known
    assert why in kind.problem


def test_two_tensors_at_one_address_stay_as_written():
    def make():
        x = torch.randn(6, 4)
        return x, x

    pairs, counted = outcomes(lambda x, w: x + 2 * w, make)
    assert all(same(*pair) for pair in pairs)
    assert counted.runs == len(pairs)
    pairs, counted = outcomes(lambda x, w: x + 2 * w, lambda: (torch.randn(6, 4), torch.randn(6, 4)))
    assert all(same(*pair) for pair in pairs)
    assert counted.runs < len(pairs), "others of that kind are repeated"


def on_an_odd_address(x):
    return torch.randn(25)[1:].view(6, 4)


@pytest.mark.parametrize(
    "other",
    [
        lambda x: (torch.randn(7, 4), 2.0), lambda x: (torch.randn(4, 6).t(), 2.0), lambda x: (x.double(), 2.0),
        lambda x: (on_an_odd_address(x), 2.0), lambda x: (x, 3.0), lambda x: ([x], 2.0),
    ],
    ids=["shape", "strides", "dtype", "alignment", "number", "list"],
)  # fmt: skip
def test_other_kinds_are_not_taken_for_it(other):
    counted = Pass(lambda x, number: (x[0] if isinstance(x, (list, tuple)) else x) * number)
    for _ in range(WRITTEN + 1):
        repeat(counted, None, torch.randn(6, 4), 2.0)
    assert counted.runs == WRITTEN
    x, number = other(torch.randn(6, 4))
    y = repeat(counted, None, x, number)
    assert counted.runs == WRITTEN + 1
    assert torch.equal(y, (x[0] if isinstance(x, list) else x) * number)


def test_another_state_is_another_kind():
    counted = Pass(torch.neg)
    for states, runs in (("a" * 9, WRITTEN), ("b", WRITTEN + 1), ("a", WRITTEN + 1), ("b" * 9, 2 * WRITTEN)):
        for state in states:
            repeat(counted, state, torch.randn(6, 4))
        assert counted.runs == runs


def test_forgetting_begins_anew():
    counted = Pass(torch.neg)
    for _ in range(WRITTEN + 1):
        repeat(counted, None, torch.randn(6, 4))
    plan.forget()
    repeat(counted, None, torch.randn(6, 4))
    assert counted.runs == WRITTEN + 1


def test_a_kind_in_use_outlives_a_thousand_others():
    counted = Pass(torch.neg)
    for i in range(3000):
        repeat(torch.abs, i, torch.randn(2, 2))
        repeat(counted, None, torch.randn(2, 2))
    assert counted.runs == WRITTEN


def test_noting_holds_nothing_of_what_the_pass_let_go():
    made, gone = [], []

    def look(t):
        gone.append([reference() is None for reference in made])
        return t.clone()

    def watched(x):
        first = x * 2
        made.append(weakref.ref(first))
        second = first + 1
        del first
        return _replay.call(look, second)

    for _ in range(WRITTEN):
        repeat(watched, None, torch.randn(6, 4))
    assert all(map(all, gone))
    assert len(gone) == WRITTEN


def test_a_recording_frees_as_early_as_the_pass():
    seen, sizes = [], []

    def step(t):
        seen.append(weakref.ref(t))
        sizes.append(sum(reference() is not None for reference in seen))
        return t + 1

    def chain(x):
        for _ in range(5):
            x = _replay.call(step, x)
        return x

    x = torch.zeros(6, 4)
    for _ in range(WRITTEN + 2):
        seen.clear()
        sizes.clear()
        assert torch.equal(repeat(chain, None, x), x + 5)
        assert max(sizes) <= 3, "what was given, the step's own, and the one before it"


class Pointer:
    """Goes by the address of a tensor that it does not hold, as a kept descriptor does."""

    def __init__(self, t):
        self.of = weakref.ref(t)


def test_what_is_pointed_to_is_there_as_long_as_the_pointer():
    there = []

    def read(pointers, other):
        there.extend(pointer.of() is not None for pointer in pointers)
        return other + 1

    def pointed(x):
        scaled, more = x * 2, x * 3
        pointers = tuple([_replay.call(Pointer, t, by_address=True) for t in (scaled, more)])
        return _replay.call(read, pointers, x.clone())

    for _ in range(WRITTEN + 2):
        repeat(pointed, None, torch.randn(6, 4))
    assert all(there)


def test_what_a_call_gives_is_its_own_though_it_gave_the_same_before(device, monkeypatch):
    """As counters of arrivals are one buffer in eager mode, and one for each launch in a CUDA graph."""
    buffer, asked, capturing = torch.zeros(64, dtype=torch.int32), [], []

    def counters(device, count):
        return torch.zeros(count, dtype=torch.int32) if capturing else buffer

    monkeypatch.setattr(_launch, "_arrivals", counters)

    def counts(x):
        first, second = (_launch.arrivals(x.device, count) for count in (3, 50))
        del first
        return _replay.call(lambda counters: asked.append(counters.numel()), second)

    for _ in range(WRITTEN):
        repeat(counts, None, torch.randn(6, 4))
    capturing.append(True)
    repeat(counts, None, torch.randn(6, 4))
    assert asked[-1] == 50


def flat(shapes, order, gap=4):
    """Tensors of these shapes in one buffer, in an order of places."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    buffer, starts, at = torch.randn(sum(sizes) + gap * len(sizes)), {}, 0
    for i in order:
        starts[i], at = at, at + sizes[i] + gap
    return [buffer[starts[i] : starts[i] + sizes[i]].view(shape) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("noted", [*itertools.permutations(range(3))])
def test_tensors_that_share_a_memory_are_told_apart(noted):
    def sums(x, y, z):
        right = torch.cat([x[:, 1:], y.t()[:, 1:], z[1:].t()[:, :3]], 1)
        return right, x[2:].t(), torch.cat([z, z], 1)

    shapes = (4, 6), (5, 4), (5, 4)
    counted = Pass(sums)
    for _ in range(WRITTEN):
        repeat(counted, None, *flat(shapes, noted))
    for order in itertools.permutations(range(3)):
        given = flat(shapes, order)
        assert same(repeat(counted, None, *given), sums(*given)), (noted, order)
    assert counted.runs == WRITTEN


def test_rows_of_two_that_overlap_stay_as_written():
    """Here x[2:] and z are one and the same; elsewhere they are not."""

    def overlapping():
        buffer = torch.randn(6, 4)
        return buffer, buffer[2:]

    def sums(x, z):
        rows = x[2:]
        return torch.mm(rows.t(), z.view(16).view(4, 4)), rows + 1

    counted = Pass(sums)
    for _ in range(WRITTEN + 1):
        given = overlapping()
        assert same(repeat(counted, None, *given), sums(*given))
    for _ in range(3):
        given = torch.randn(6, 4), torch.randn(4, 4)
        assert same(repeat(counted, None, *given), sums(*given))


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


def test_an_error_leaves_no_one_noting():
    def fails(x):
        raise ValueError("as any may")

    for _ in range(WRITTEN + 1):
        with pytest.raises(ValueError, match="as any may"):
            repeat(fails, None, torch.randn(6, 4))
        assert not _replay.noting()
    assert torch.equal(*outcomes(torch.neg, lambda: (torch.randn(6, 4),))[0][-1])


def test_a_pass_within_a_pass_is_part_of_it():
    inner = Pass(torch.neg)
    outer = Pass(lambda x: repeat(inner, None, x) + 1)
    for _ in range(WRITTEN + 2):
        x = torch.randn(6, 4)
        assert torch.equal(repeat(outer, None, x), 1 - x)
    assert (outer.runs, inner.runs) == (WRITTEN, WRITTEN)


def test_threads_do_not_note_for_each_other(nothing_known):
    inside, done = threading.Event(), threading.Event()

    def slow(x):
        y = x * 2
        inside.set()
        done.wait(5)
        return y + 1

    def other():
        inside.wait(5)
        assert not _replay.noting()
        torch.mm(torch.randn(3, 3), torch.randn(3, 3))
        done.set()

    done.set()
    for _ in range(_AS_WRITTEN):
        repeat(slow, None, torch.randn(6, 4))
    inside.clear()
    done.clear()
    thread = threading.Thread(target=other)
    thread.start()
    repeat(slow, None, torch.randn(6, 4))
    thread.join()
    (kind,) = nothing_known
    assert len(kind.recording.steps) == 2


# the passes of the package

M, IN, OUT, R = 9, 12, 10, 3


def adapter(device, inner, outer, dtype, rank=R):
    a, b = torch.randn(rank, inner, device=device, dtype=dtype), torch.randn(outer, rank, device=device, dtype=dtype)
    return a.requires_grad_(), b.requires_grad_()


def linear(device, dtype, adapters, p, **more):
    x, w = torch.randn(2, M, IN, device=device, dtype=dtype), torch.randn(OUT, IN, device=device, dtype=dtype)
    a, b = adapter(device, IN, OUT, adapters)
    bias = torch.randn(OUT, device=device, dtype=dtype)
    y = lora_linear(x.requires_grad_(), w, a, b, scaling=1.5, bias=bias, dropout_p=p, backend="triton", **more)
    return [y], [x, a, b]


def add(device, dtype, adapters, p):
    x, base = torch.randn(M, IN, device=device, dtype=dtype), torch.randn(M, OUT, device=device, dtype=dtype)
    a, b = adapter(device, IN, OUT, adapters)
    y = lora_add(base.requires_grad_(), x.requires_grad_(), a, b, scaling=1.5, dropout_p=p, backend="triton")
    return [y], [base, x, a, b]


def qkv(device, dtype, adapters, p):
    widths = (OUT, 7, 7)
    x = torch.randn(M, IN, device=device, dtype=dtype).requires_grad_()
    weights = [torch.randn(n, IN, device=device, dtype=dtype) for n in widths]
    pairs = [adapter(device, IN, n, adapters, r) for n, r in zip(widths, (8, 8, 16), strict=True)]
    ys = lora_qkv(x, weights, pairs, dropout_p=p, backend="triton")
    return ys, [x, *itertools.chain(*pairs)]


def mlp(device, dtype, adapters, p, **more):
    x = torch.randn(M, IN, device=device, dtype=dtype).requires_grad_()
    sizes = (IN, 16), (IN, 16), (16, OUT)
    weights = [torch.randn(n, k, device=device, dtype=dtype) / 4 for k, n in sizes]
    pairs = [adapter(device, *size, adapters) for size in sizes]
    layers = [Projection(w, *pair, None, 0.5, p) for w, pair in zip(weights, pairs, strict=True)]
    return [lora_mlp(x, *layers, backend="triton", **more)], [x, *itertools.chain(*pairs)]


def mlp_made_again(*args):
    return mlp(*args, recompute=True)


def results(make, *args, seed):
    torch.manual_seed(seed)
    ys, inputs = make(*args)
    return [*ys, *torch.autograd.grad(ys, inputs, [torch.randn_like(y) for y in ys])]


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


def launches(log):
    return [launch.name for launch in log]


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts launches as the interpreter makes them")
def test_a_form_that_is_forced_is_taken(device, log):
    args = linear, device, torch.float32, torch.float32, 0.0
    plain = [results(*args, seed=i) for i in range(WRITTEN + 1)]
    log.clear()
    with plan.forced("beta1"), torch.profiler.profile() as profile:
        forced = [results(*args, seed=i) for i in range(WRITTEN + 1)]
    assert [event.key for event in profile.key_averages()].count("aten::addmm_") == 1
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
