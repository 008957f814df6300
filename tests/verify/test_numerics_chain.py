"""Rule 2's allowance for a sum taken one term after the other: as derived, enough, and little beside any mistake."""

import math

import numpy as np
import pytest
import torch

from lora_kernels.verify import numerics
from lora_kernels.verify.problems import make_problem

U = numerics.unit_roundoff(torch.float32)
COLUMNS = 2048  # independent sums


def chain(left, right):
    """Each sum of products `[n]` x `[n, c]` one after the other, with a fused multiply-add: one rounding a term."""
    acc = np.zeros(right.shape[1], np.float32)
    for a, b in zip(left.astype(np.float64), right.astype(np.float64), strict=True):
        acc = (acc + a * b).astype(np.float32)  # float64 holds a product of fp32 exactly
    return acc


def split(left, right, parts):
    """The same in parts, as a library sums for one row, whose sums are added pairwise."""
    sums = np.stack([chain(left[i::parts], right[i::parts]) for i in range(parts)])
    while len(sums) > 1:
        sums = sums[0::2] + sums[1::2]
    return sums[0]


def rms(t):
    return float(np.sqrt(np.mean(np.square(t, dtype=np.float64))))


DRAWN = {
    "normal": lambda g, shape: g.standard_normal(shape),
    "positive": lambda g, shape: g.random(shape),
    "a few large": lambda g, shape: g.standard_normal(shape) ** 5,
    "signs": lambda g, shape: g.choice([-1.0, 1.0], shape) * g.random(shape),
}


@pytest.mark.parametrize("drawn", DRAWN)
@pytest.mark.parametrize("n", [64, 512, 4096])
def test_a_chain_errs_as_derived(n, drawn):
    """At most u sqrt(n/6) of the result, and near it: a rounding to nearest errs less than one uniform in +-u."""
    generator = np.random.default_rng(n)
    left, right = (DRAWN[drawn](generator, shape).astype(np.float32) for shape in (n, (n, COLUMNS)))
    truth = left.astype(np.float64) @ right.astype(np.float64)
    used = rms(chain(left, right) - truth) / (U * math.sqrt(n / 6) * rms(truth))
    assert 0.4 < used < 1


@pytest.fixture(scope="module")
def one_row():
    """A layer of one row, its y by a chain, and the eager outputs of a library that splits the sum 128 ways."""
    problem = make_problem((1,), 4096, COLUMNS, 16, torch.float32, "cpu")
    x, w, a, b = (t.numpy() for t in (problem.x, problem.weight, problem.lora_A, problem.lora_B))
    scaling = np.float32(problem.scaling)

    def y(product):
        s = scaling * product(x[0], np.ascontiguousarray(a.T))
        return product(np.concatenate([x[0], s]), np.concatenate([w.T, b.T])), s

    (ours, _), (library, _) = y(chain), y(lambda left, right: split(left, right, 16 if len(left) % 128 else 128))
    baseline = numerics.eager(problem) | {"y": torch.from_numpy(library)[None]}
    return problem, torch.from_numpy(ours)[None], baseline


def used(problem, y, baseline):
    (found,) = numerics.check({"y": y}, problem, baseline)
    return found


def test_a_right_chain_passes_beside_a_library_that_splits_one_row(one_row, monkeypatch):
    problem, y, baseline = one_row
    found = used(problem, y, baseline)
    assert found.ok
    assert found.rms_ratio > 3
    monkeypatch.setattr(numerics, "terms", lambda problem: dict.fromkeys(("y", "dx", "d_lora_A", "d_lora_B"), 0))
    assert used(problem, y, baseline).rule_2 > 1.2, "without the allowance it is what fails"


MISTAKES = {
    "x rounded to TF32": lambda q, y: y + _difference(q, x=_truncated(q.x, 13)),
    "W rounded to TF32": lambda q, y: y + _difference(q, weight=_truncated(q.weight, 13)),
    "s rounded to bf16": lambda q, y: y + _difference(q, lora_A=_truncated(q.lora_A, 16)),
    "one column of x lost": lambda q, y: y + _difference(q, x=_zeroed(q.x, 77)),
    "one column of A lost": lambda q, y: y + _difference(q, lora_A=_zeroed(q.lora_A, 4095)),
    "scaling off by a thousandth": lambda q, y: y + _difference(q, scaling=1.001 * q.scaling),
    "the last rank lost": lambda q, y: y + _difference(q, lora_B=_zeroed(q.lora_B, 15)),
    "y rounded to 16 bits more": lambda q, y: _truncated(y, 8),
}


def _difference(problem, **changed):
    changed = numerics.exact(numerics.replace(problem, **changed))["y"] - numerics.exact(problem)["y"]
    return changed.float()


def _truncated(t, bits):
    return (t.view(torch.int32) & -(1 << bits)).view(torch.float32)


def _zeroed(t, column):
    t = t.clone()
    t[:, column] = 0
    return t


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_far_beyond_it(one_row, mistake):
    problem, y, baseline = one_row
    assert used(problem, MISTAKES[mistake](problem, y), baseline).rule_2 > 3


def test_the_allowance_does_not_loosen_the_rule_where_eager_is_a_chain_itself():
    eager = U * math.sqrt(4096 / 13)  # what a chain comes to
    assert numerics.allowed_rms(eager, 1.0, torch.float32, 4096) == 2 * eager + U
    for dtype in (torch.float16, torch.bfloat16):  # there a sum in fp32 is nothing beside one rounding
        unit = numerics.unit_roundoff(dtype)
        assert numerics.allowed_rms(0.0, 1.0, dtype, 100_000) < 1.02 * unit
