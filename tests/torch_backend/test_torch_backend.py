"""The torch backend on a CPU: what it allocates, what it keeps, and that blocks and tiles change no number's rules."""

import pytest
import torch
from bench_samples import settings
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels import lora_linear, torch_backend
from lora_kernels.autograd.linear import LoRALinearFunction
from lora_kernels.bench.cases.layer import draw, saved_bytes
from lora_kernels.bench.providers import layer as providers
from lora_kernels.constants import HALF
from lora_kernels.dropout import threshold
from lora_kernels.measure.presets import Shape
from lora_kernels.verify import numerics
from lora_kernels.verify.problems import make_problem, run_problem, with_mask


class Allocations(TorchDispatchMode):
    """The tensors that operators give out, from a number of elements up; not views, nor what is written in place."""

    def __init__(self, at_least):
        super().__init__()
        self.at_least, self.large, self._alive = at_least, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {
            t.untyped_storage().data_ptr() for t in (*args, *(kwargs or {}).values()) if isinstance(t, torch.Tensor)
        }
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                self._alive.append(t)  # so that no address is given out twice
                if t.numel() >= self.at_least:
                    self.large.append((str(func), t.dtype))
        return out


@pytest.fixture(params=["native", "in fp32"])
def products(request, monkeypatch):
    """Both ways to multiply 16-bit matrices, whatever this machine would take."""
    monkeypatch.setattr(torch_backend, "_slow", lambda dtype: request.param == "in fp32" and dtype in HALF)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks, tiles and draws so small that a small problem has many, and a last one that is not full."""
    for name, value in (("_BLOCK", 96), ("_LEAST_ROWS", 3), ("_DRAWN", 40), ("_TILE", (7, 64))):
        monkeypatch.setattr(torch_backend, name, value)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_size_of_x_is_made_but_y_dx_and_the_mask(dtype, p, monkeypatch):
    rows, width = 8192, 128  # eight blocks, and two draws
    monkeypatch.setattr(torch_backend, "_slow", lambda dtype: False)
    problem = make_problem((rows,), width, width, 4, dtype, "cpu", dropout_p=p)
    x, a, b = (t.requires_grad_() for t in (problem.x, problem.lora_A, problem.lora_B))
    with Allocations(at_least=rows * width) as forward:
        y = lora_linear(x, problem.weight, a, b, dropout_p=p, backend="torch")
    with Allocations(at_least=rows * width) as backward:
        torch.autograd.grad(y, (x, a, b), problem.dy)
    assert sorted(str(t) for _, t in forward.large) == sorted([str(dtype), *["torch.uint8"] * bool(p)])
    assert [t for _, t in backward.large] == [dtype]


@pytest.mark.usefixtures("products", "small_blocks")
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("dtype", "adapters"),
    [(t, None) for t in (torch.float32, torch.bfloat16, torch.float16, torch.float64)]
    + [(t, torch.float32) for t in (torch.bfloat16, torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("shape", [(23, 33, 21, 5), (50, 8, 40, 16), (1, 300, 7, 3)], ids=str)
def test_blocks_and_tiles_keep_the_rules(shape, dtype, adapters, p):
    rows, k, n, r = shape
    problem = make_problem((rows,), k, n, r, dtype, "cpu", adapter_dtype=adapters, bias=True, dropout_p=p)
    problem = with_mask(problem, "torch", 1)
    findings = numerics.check(run_problem(problem, "torch", 1), problem, numerics.eager(problem), split=True)
    assert all(f.ok for f in findings), [f.message for f in findings]


@pytest.mark.small
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_calls_keep_the_rules_and_draw_the_same_mask(dtype, bias, p, monkeypatch):
    problem = make_problem((3, 11), 33, 21, 5, dtype, "cpu", bias=bias, dropout_p=p)
    problem = with_mask(problem, "torch", 1)
    monkeypatch.setattr(LoRALinearFunction, "apply", None)  # not taken
    got = run_problem(problem, "torch", 1)
    findings = numerics.check(got, problem, numerics.eager(problem), split=True)
    assert all(f.ok for f in findings), [f.message for f in findings]


@pytest.mark.small
@pytest.mark.parametrize(
    ("rows", "dtype", "adapters", "small"),
    [
        (2048, torch.float32, None, True),
        (2049, torch.float32, None, False),
        (64, torch.bfloat16, None, False),
        (64, torch.bfloat16, torch.float32, False),
    ],
    ids=str,
)
def test_which_calls_are_small(rows, dtype, adapters, small, monkeypatch):
    q = make_problem((rows,), 16, 32, 2, dtype, "cpu", adapter_dtype=adapters)
    a, b = q.lora_A.requires_grad_(), q.lora_B.requires_grad_()

    def name(**options):
        return lora_linear(q.x, q.weight, a, b, backend="torch", **options).grad_fn.name()

    assert ("Addmm" in name()) == small
    assert "LoRALinear" in name(accumulate_grad=True)


@pytest.mark.usefixtures("small_blocks")
def test_sums_in_fp32_tiles_are_rounded_once(monkeypatch):
    monkeypatch.setattr(torch_backend, "_slow", lambda dtype: True)
    problem = make_problem((64,), 96, 80, 5, torch.bfloat16, "cpu", bias=True)
    outputs = run_problem(problem, "torch", 0)
    findings = numerics.check(outputs, problem, split=False)  # the kernels' own, stricter rule
    assert all(f.ok for f in findings), [f.message for f in findings]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("products", "small_blocks")
def test_a_masked_product_alone(dtype):
    p, q, bias = torch.randn(9, 3, dtype=dtype), torch.randn(40, 3, dtype=dtype), torch.randn(40, dtype=dtype)
    keep = torch_backend.draw_mask(torch.Size((9, 40)), 0.5, torch.device("cpu"))
    expected = keep * (p.double() @ q.double().t())
    for with_bias, total in ((None, expected), (bias, expected + bias.double())):
        y = torch_backend.matmul_expand([(p, q)], with_bias, keep)
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), total, rtol=2 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_a_mask_drawn_in_parts_is_the_mask_drawn_at_once(monkeypatch):
    shape = torch.Size((37, 11))
    torch.manual_seed(2)
    at_once = torch_backend.draw_mask(shape, 0.3, torch.device("cpu"))
    monkeypatch.setattr(torch_backend, "_DRAWN", 40)
    torch.manual_seed(2)
    assert torch.equal(torch_backend.draw_mask(shape, 0.3, torch.device("cpu")), at_once)
    assert set(at_once.unique().tolist()) == {0, 1}


def test_gradients_of_fp32_adapters_stay_fp32_sums_inside_autocast():
    problem = make_problem((40,), 32, 24, 4, torch.bfloat16, "cpu", adapter_dtype=torch.float32)
    outside = run_problem(problem, "torch", 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run_problem(problem, "torch", 0)  # its backward, too
    assert all(torch.equal(inside[name], outside[name]) for name in outside)
    for name in ("d_lora_A", "d_lora_B"):
        assert not torch.equal(inside[name], inside[name].bfloat16().float())


@pytest.mark.usefixtures("no_peft")
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("r", [8, 64])
@pytest.mark.parametrize("shape", [Shape(32, 256, 256), Shape(32, 2048, 2048), Shape(512, 1024, 256)], ids=str)
def test_fewer_bytes_are_saved_than_by_peft(shape, r, p):
    """As many, where there is no dropout and one dtype: then s is all that either holds."""
    s, mask = shape.m * r, shape.m * shape.k * bool(p)
    for dtype, suffix in ((torch.float32, ""), (torch.bfloat16, ""), (torch.bfloat16, "_fp32")):
        problem = draw(shape, r, p, settings(dtype))
        ours, peft = (saved_bytes(providers.build(name + suffix, problem, "torch")) for name in ("ours", "peft"))
        assert ours == s * dtype.itemsize + mask
        assert ours < peft if p or suffix else ours == peft


@pytest.mark.small
@pytest.mark.usefixtures("no_peft")
@pytest.mark.parametrize(("p", "saved"), [(0.0, 0), (0.1, 5)])
def test_small_calls_save_no_more_than_peft(p, saved):
    """s, and with dropout the dropped x in fp32 and a byte of mask an element."""
    problem = draw(Shape(32, 256, 256), 8, p, settings(torch.float32))
    ours, peft = (saved_bytes(providers.build(name, problem, "torch")) for name in ("ours", "peft"))
    assert ours == 32 * 8 * 4 + 32 * 256 * saved
    assert ours <= peft


@pytest.mark.parametrize("drawn", ["noise", "at once", "narrow", "in parts"])
@pytest.mark.parametrize("p", [0.0, 2**-16, 0.1, 0.5, 1 - 2**-16, 1 - 2**-20])
def test_a_mask_drops_as_many_of_all_words_as_its_probability_says(p, drawn, monkeypatch):
    """Each of the 65,536 words once: an element more or less would be a bias that no sample of masks shows."""
    words = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.int64)
    # Four words a draw; rows of two elements are drawn flat.
    drawn_at_once, shape = (
        (1 << 14 if drawn == "in parts" else 1 << 16),
        (1 << 15, 2) if drawn == "narrow" else (256, 256),
    )
    monkeypatch.setattr(torch_backend, "_DRAWN", drawn_at_once)
    parts = iter(words.split(drawn_at_once // 4))
    monkeypatch.setattr(torch_backend, "_draw", lambda shape, device: next(parts).view(shape))
    noise = words if drawn == "noise" else None
    keep = torch_backend.draw_mask(torch.Size(shape), p, torch.device("cpu"), noise)
    assert drawn == "noise" or next(parts, None) is None
    assert keep.sum() == 2**16 - threshold(p)
