"""O7 to O9: the sanitizer sees planted faults, NaN canaries, guard pages, and offsets beyond 2^31."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from oracles import sanitizer
from oracles.memory import virtual

from lora_kernels.kernels import matmul_expand, shrink, wgrad
from lora_kernels.kernels._configs import MatmulConfig

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="watches Triton's interpreter, which a GPU bypasses")


@triton.jit
def _planted(x_ptr, y_ptr, n, stride, FAULT: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    limit = n + 1 if FAULT == "load" else n
    x = tl.load(x_ptr + offs * stride, mask=offs < limit, other=0.0)
    if FAULT == "gap":
        x += tl.load(x_ptr + offs * stride + 1, mask=offs < n, other=0.0)
    if FAULT == "store":
        tl.store(y_ptr + offs, x, mask=offs < n + 1)
    elif FAULT == "input":
        tl.store(x_ptr + offs * stride, x, mask=offs < n)
    elif FAULT == "missing":
        tl.store(y_ptr + offs, x, mask=offs < n - 1)
    else:
        tl.store(y_ptr + offs, x, mask=offs < n)
        if FAULT == "twice":
            tl.store(y_ptr + tl.arange(0, 1), tl.zeros((1,), tl.float32))


@interpreted
@pytest.mark.parametrize("fault", ["none", "load", "gap", "store", "input", "missing", "twice"])
def test_the_sanitizer_sees(fault, monkeypatch):
    monkeypatch.setitem(sanitizer.OUTPUTS, "_planted", {"y_ptr"})
    x = torch.ones(33)[::3]
    before = sanitizer.state.launches

    def launch():
        _planted[(2,)](x, torch.empty(11), 11, 3, FAULT=fault, BLOCK=8)

    if fault == "none":
        launch()
    else:
        with pytest.raises(sanitizer.MemoryFault, match=r"outside|more than once|never"):
            launch()
    assert sanitizer.state.launches == before + 1


@interpreted
def test_the_sanitizer_watches_the_library_and_its_descriptors():
    before = sanitizer.state.launches
    x, w = torch.ones(20, 24), torch.ones(17, 24)
    for tma in (False, True):
        matmul_expand([(x, w)], tma=tma, config=MatmulConfig(16, 16, 16, 1, 1, 4, 2))
    assert sanitizer.state.launches == before + 2
    launch = sanitizer.Launch("_matmul_expand_kernel", {"p0": x, "y0": w})
    with pytest.raises(sanitizer.MemoryFault, match="near"):
        launch.load(launch.readable[-1:] + 400_000, 4)


def framed(t, margin=4096, gap=7):
    """The tensor in a buffer whose margins and gaps between rows are NaN."""
    rows, cols = t.shape
    buffer = torch.full((2 * margin + rows * (cols + gap),), float("nan"), dtype=t.dtype, device=t.device)
    inside = buffer.as_strided((rows, cols), (cols + gap, 1), margin + 3)
    inside.copy_(t)
    return inside, buffer


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (17, 33, 15, 3), (64, 31, 65, 20)], ids=str)
def test_canaries_around_every_operand(sizes, device):
    rows, k, n, r = sizes
    tensors = [torch.randn(shape, device=device) for shape in ((rows, k), (n, k), (r, k), (n, r), (rows, n))]
    framed_tensors, buffers = zip(*map(framed, tensors), strict=True)
    before = [b.clone() for b in buffers]
    x, w, a, b, dy = framed_tensors
    s, keep = shrink(x, a, 2.0, 0.5)
    ds, _ = shrink(dy, b.t(), 2.0)
    results = [
        s, ds,
        matmul_expand([(x, w), (s, b)]),
        matmul_expand([(dy, w.t()), (ds, a.t())], keep=keep),
        wgrad(ds, x, torch.float32, keep),
        wgrad(dy, s, torch.float32),
    ]  # fmt: skip
    assert all(t.isfinite().all() for t in results)
    for buffer, was in zip(buffers, before, strict=True):
        assert torch.equal(buffer.nan_to_num(123.0), was.nan_to_num(123.0)), "an input or its surroundings changed"


GUARDED = """
    import ctypes, sys
    sys.path.insert(0, {tests!r})
    import conftest, torch
    from oracles import sanitizer
    sanitizer.state.on = False
    from oracles.memory import before_guard_page
    from lora_kernels.kernels import matmul_expand, shrink, wgrad
    x, w, a, b, dy = (before_guard_page(torch.randn(s)) for s in ((19, 35), (21, 35), (3, 35), (21, 3), (19, 21)))
    if {overrun}:
        ctypes.string_at(x.data_ptr() + 4 * x.numel(), 1)
    s, keep = shrink(x, a, 2.0, 0.5)
    ds, _ = shrink(dy, b.t(), 2.0)
    matmul_expand([(x, w), (s, b)]), matmul_expand([(dy, w.t()), (ds, a.t())], keep=keep)
    wgrad(ds, x, torch.float32, keep), wgrad(dy, s, torch.float32)
    print("survived")
"""


@interpreted
@pytest.mark.parametrize("overrun", [pytest.param(False, marks=pytest.mark.slow), True])
def test_guard_pages(overrun):
    """Independent of the sanitizer: a read past the end kills the process, and the kernels survive."""
    script = textwrap.dedent(GUARDED).format(tests=str(Path(__file__).parents[1]), overrun=overrun)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    if overrun:
        assert run.returncode < 0, "the guard page did not guard"
    else:
        assert "survived" in run.stdout, run.stderr[-2000:]


SPREADS = {"rows": (715_827_900, 1), "columns": (1, 226_050_911), "both": (613_566_757, 33_554_467)}


@interpreted
@pytest.mark.parametrize("spread", SPREADS)
def test_offsets_beyond_32_bits(spread):
    strides = SPREADS[spread]
    generator = torch.Generator().manual_seed(0)

    def draw(rows, cols):
        near = torch.randint(-2, 3, (rows, cols), generator=generator).float()
        return near, virtual(rows, strides[0], cols, strides[1]).copy_(near)

    (x, far_x), (w, far_w), (a, far_a) = draw(5, 19), draw(4, 19), draw(3, 19)
    keep = torch.full((5, 1), 0b0101, dtype=torch.int32)
    assert torch.equal(shrink(far_x, far_a, 1.0)[0], x @ a.T)
    assert torch.equal(matmul_expand([(far_x, far_w), (far_x, far_w)]), 2 * x @ w.T)
    assert torch.equal(matmul_expand([(x, w), (far_x, far_w)], keep=keep), x @ w.T * torch.tensor([2, 1, 2, 1]))
    assert torch.equal(wgrad(far_x, far_x, torch.float32), x.T @ x)
    assert torch.equal(wgrad(far_x.t(), far_w.t(), torch.float32), x @ w.T)


@triton.jit
def _first_column(x_ptr, y_ptr, stride, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    if WIDE:
        rows = rows.to(tl.int64)
    tl.store(y_ptr + rows, tl.load(x_ptr + rows * stride))


@interpreted
@pytest.mark.parametrize("wide", [True, False])
def test_a_32_bit_offset_is_caught(wide, monkeypatch):
    monkeypatch.setitem(sanitizer.OUTPUTS, "_first_column", {"y_ptr"})
    x, y = virtual(4, SPREADS["rows"][0], 1, 1).fill_(3.0), torch.empty(4)
    if wide:
        _first_column[(1,)](x, y, x.stride(0), WIDE=True, BLOCK=4)
        assert (y == 3).all()
    else:
        with pytest.raises(triton.runtime.interpreter.InterpreterError) as error:
            _first_column[(1,)](x, y, x.stride(0), WIDE=False, BLOCK=4)
        assert "int32 overflow" in str(error.value.__cause__)
