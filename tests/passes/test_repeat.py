"""Passes that are noted and repeated do what they do as written: with other tensors of the same kinds, and no others."""

import itertools
import threading
import weakref

import pytest
import torch
from repeat_samples import WRITTEN, flat

from lora_kernels import plan
from lora_kernels.kernels import _replay
from lora_kernels.kernels.repeat import _AS_WRITTEN, repeat
from lora_kernels.passes.layer import Projection

pytestmark = pytest.mark.usefixtures("nothing_known")
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


def test_what_a_call_gives_is_its_own_though_it_gave_the_same_before():
    buffer, asked, fresh = torch.zeros(64, dtype=torch.int32), [], []

    def lent(count):
        return torch.zeros(count, dtype=torch.int32) if fresh else buffer

    def counts(x):
        first, second = (_replay.call(lent, count) for count in (3, 50))
        del first
        return _replay.call(lambda counters: asked.append(counters.numel()), second)

    for _ in range(WRITTEN):
        repeat(counts, None, torch.randn(6, 4))
    fresh.append(True)
    repeat(counts, None, torch.randn(6, 4))
    assert asked[-1] == 50


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
