"""The oracles themselves: bf16 as on a GPU, memory that is poisoned, rules that fail, counters that have 64 bits."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from oracles import philox, sanitizer

from lora_kernels import dropout, reference
from lora_kernels.kernels import matmul_expand
from lora_kernels.kernels._device import _kept_halves, keep_bits
from lora_kernels.verify import numerics
from lora_kernels.verify.problems import make_problem, with_mask

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="is about Triton's interpreter, which a GPU bypasses"
)


@triton.jit
def _cast(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n).to(y_ptr.dtype.element_ty), mask=offs < n)


@triton.jit
def _add_bf16(x_ptr):
    tl.store(x_ptr, tl.load(x_ptr) + tl.load(x_ptr))


@triton.jit
def _read_own_output(y_ptr):
    tl.store(y_ptr, 1.0)
    tl.store(y_ptr + 1, tl.load(y_ptr))


@triton.jit
def _draw(counter_ptr, bits_ptr, seed_ptr, threshold, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(bits_ptr + offs, keep_bits(tl.load(seed_ptr), tl.load(counter_ptr + offs), threshold).to(tl.uint8))


@pytest.fixture(autouse=True)
def outputs_of_planted_kernels(monkeypatch):
    for kernel, output in (
        ("_cast", "y_ptr"),
        ("_read_own_output", "y_ptr"),
        ("_draw", "bits_ptr"),
        ("_compare", "flags_ptr"),
    ):
        monkeypatch.setitem(sanitizer.OUTPUTS, kernel, {output})


def same_bits(a, b):
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_bf16_widens_and_rounds_as_torch_does(device):
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    patterns = patterns[~patterns.isnan()].to(device)
    wide = torch.empty(patterns.shape, device=device)
    _cast[(triton.cdiv(patterns.numel(), 8192),)](patterns, wide, patterns.numel(), BLOCK=8192)
    assert same_bits(wide, patterns.float())

    bits = np.random.default_rng(0).integers(0, 2**32, 2**17, dtype=np.uint32)
    bits[:4096] = np.arange(4096, dtype=np.uint32) << 20 | 0x8000  # ties
    singles = torch.from_numpy(bits.view(np.float32).copy())
    singles = singles[~singles.isnan()].to(device)
    narrow = torch.empty(singles.shape, dtype=torch.bfloat16, device=device)
    _cast[(triton.cdiv(singles.numel(), 8192),)](singles, narrow, singles.numel(), BLOCK=8192)
    assert same_bits(narrow, singles.bfloat16())


@interpreted
def test_bf16_arithmetic_that_would_be_wrong_is_refused():
    with pytest.raises(triton.runtime.interpreter.InterpreterError) as error:
        _add_bf16[(1,)](torch.ones(1, dtype=torch.bfloat16))
    assert "bit patterns" in str(error.value.__cause__)


def test_bf16_products_are_products(device):
    x = torch.tensor([[3.0, -0.5]], dtype=torch.bfloat16, device=device)
    assert matmul_expand([(x, x)]).item() == 9.25


@interpreted
def test_a_kernel_that_reads_what_its_launch_writes_is_caught():
    """On a GPU such a read races with the program that writes."""
    with pytest.raises(sanitizer.MemoryFault, match="load outside"):
        _read_own_output[(1,)](torch.zeros(2))


def test_memory_that_the_library_allocates_is_poisoned(device):
    scope = {"__name__": "lora_kernels.kernels.planted", "torch": torch}
    exec("def floats(d): return torch.empty(50, device=d)\ndef grown(t): return t.new_empty(50)", scope)
    exec("def whole(d): return torch.empty(50, dtype=torch.uint8, device=d)", scope)
    assert scope["floats"](device).isnan().all()
    assert scope["grown"](torch.ones(1, device=device)).isnan().all()
    assert (scope["whole"](device) == 0x5A).all()


def test_counters_and_seeds_of_the_kernel_have_64_bits(device):
    """Row 2^31 of a wide input has a counter beyond 32 bits; the wrapped one would repeat the mask of row 0."""
    counters = torch.cat([torch.arange(first - 8, first + 8) for first in (8, 2**31, 2**32, 2**40)]).to(device)
    for seed in (5, 2**32 + 5, 2**63 - 1):
        bits = torch.zeros(64, dtype=torch.uint8, device=device)
        _draw[(1,)](counters, bits, torch.tensor([seed], device=device), dropout.threshold(0.4), BLOCK=64)
        expected = [philox.keep_mask(seed, 1, 8, 0.4, first_byte=int(c))[0] for c in counters.cpu()]
        got = np.unpackbits(bits.cpu().numpy()[:, None], axis=1, bitorder="little").astype(bool)
        assert np.array_equal(got, torch.stack(expected).numpy())


@triton.jit
def _compare(words_ptr, flags_ptr, threshold, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    t = tl.cast(threshold, tl.uint32)
    flags = _kept_halves(tl.load(words_ptr + offs).to(tl.uint32), t | (t << 16))
    tl.store(flags_ptr + offs, flags.to(tl.int64))


MORE = [pytest.param(threshold, marks=pytest.mark.slow) for threshold in (0, 2, 32767, 32769, 65534)]


@pytest.mark.parametrize("threshold", [1, 6554, 32768, 65535, *MORE])
def test_both_halves_of_a_word_are_compared_with_any_threshold(threshold, device):
    """Every 16-bit number in either half, beside another one in the other."""
    low = torch.arange(1 << 16)
    for high in (low, low.flip(0), torch.zeros_like(low), low * 0 + 65535, low * 0 + max(threshold - 1, 0)):
        flags = torch.zeros(1 << 16, dtype=torch.int64, device=device)
        _compare[(16,)]((low | high << 16).to(device), flags, threshold, BLOCK=4096)
        expected = (low >= threshold).long() << 15 | (high >= threshold).long() << 31
        assert torch.equal(flags.cpu(), expected)


def test_the_threshold_keeps_something_of_any_p_below_1():
    """From where 16 bits end on, the smallest share they have is kept; only p = 1 keeps nothing."""
    assert [dropout.threshold(p) for p in (0.0, 0.5, 1 - 2**-16, 1 - 2**-20, 1.0)] == [0, 32768, 65535, 65535, 65536]
    assert [dropout.keep_scale(p) for p in (0.0, 0.5, 1 - 2**-20, 1.0)] == [1.0, 2.0, 65536.0, 0.0]


def changed(t, value):
    t = t.clone()
    t[1, 1] = value
    return t


FAULTS = {  # y, what rule 1 allows of it and eager's y, to a wrong y
    "one NaN": lambda y, allowed, eager: changed(y, float("nan")),
    "an inf": lambda y, allowed, eager: changed(y, float("inf")),
    "one element beyond its bound": lambda y, allowed, eager: changed(y, y[1, 1] + 1.01 * allowed[1, 1]),
    "another dtype": lambda y, allowed, eager: y.double(),
    "a row too few": lambda y, allowed, eager: y[:-1],
    "four times eager's error": lambda y, allowed, eager: y + 4 * (eager - y),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_rules_fail(fault):
    problem = with_mask(make_problem((64,), 96, 48, 5, torch.float32, "cpu", dropout_p=0.2), "triton", 0)
    truth, allowed, eager = numerics.exact(problem), numerics.bounds(problem), numerics.eager(problem)
    good = {name: value.float() for name, value in truth.items()}
    assert all(f.ok for f in numerics.check(good, problem, eager))
    y = FAULTS[fault](truth["y"], allowed["y"], eager["y"].double())
    findings = numerics.check(good | {"y": y if fault == "another dtype" else y.float()}, problem, eager)
    (bad,) = [f for f in findings if not f.ok]
    assert bad.name == "y"
    assert bad.message
    if fault.startswith("four"):
        assert bad.rule_1 <= 1 < bad.rule_2, "rule 2 is there for what rule 1 does not see"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", ["mask of another seed", "scaling off by 2 %", "A of fewer rows"])
def test_rule_1_sees_small_faults_in_16_bit(dtype, change):
    problem = with_mask(make_problem((64,), 96, 48, 5, dtype, "cpu", dropout_p=0.2), "triton", 0)
    wrong = {
        "mask of another seed": replace(problem, keep=reference.keep_mask(1, 64, 96, 0.2)),
        "scaling off by 2 %": replace(problem, scaling=1.02 * problem.scaling),
        "A of fewer rows": replace(problem, lora_A=problem.lora_A * torch.tensor([1, 1, 1, 1, 0])[:, None].to(dtype)),
    }[change]
    outputs = {name: value.to(dtype) for name, value in numerics.exact(wrong).items()}
    assert any(not f.ok for f in numerics.check(outputs, problem))
