"""The cases: what is run for an architecture, each a name and a function that gives "" or what is wrong."""

import contextlib
import itertools
from collections.abc import Callable, Iterator

import torch

from lora_kernels import plan
from lora_kernels.cli import _verify_blocks, verify
from lora_kernels.functional import lora_linear

CPU = torch.device("cpu")
Case = tuple[str, Callable[[], str]]
DTYPES = verify.DTYPES


@contextlib.contextmanager
def _stock(precision: str = "ieee") -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def layer(dtype, m, k, n, r, layout="contiguous", p=0.0, form="fused", place=None) -> Case:
    """A layer, forward and backward, twice, held to the project's rules (`lora-kernels verify`)."""
    case = verify.Case("triton", dtype, m, k, n, r, layout, p, form)

    def run() -> str:
        forced = plan.forced
        plan.forced = lambda name, _=None: forced(name, place)
        try:
            result = verify._examine(case, CPU, 0)
        finally:
            plan.forced = forced
        return "" if result.ok else result.message

    tile = "" if place is None else f" tile{place}"
    return f"layer {dtype} {m}x{k}x{n} r{r} {layout} p={p:g} {form}{tile}", run


def block(dtype, m, k, widths, ranks, ps, activation="", place=None, **more) -> Case:
    """Queries, keys and values, or an MLP."""
    case = _verify_blocks.BlockCase("triton", dtype, m, k, widths, ranks, ps, activation, **more)

    def run() -> str:
        with plan.forced("fused", place) if place is not None else contextlib.nullcontext():
            findings, messages = _verify_blocks.examine(case, DTYPES[dtype], CPU, 0)
        return "; ".join(messages + [f.message for f in findings if not f.ok])

    kind = f"mlp {activation}" if activation else "qkv"
    words = " ".join(name for name, on in more.items() if on) + ("" if place is None else f" tile{place}")
    name = f"{kind} {dtype} {m}x{k}x{'+'.join(map(str, widths))} r{'/'.join(map(str, ranks))} p={'/'.join(f'{p:g}' for p in ps)}"
    return f"{name} {words}".rstrip(), run


def _signs(*shape, generator, share=1.0, dtype=torch.float64):
    t = torch.randint(-1, 2, shape, generator=generator).to(dtype)
    return t * (torch.rand(shape, generator=generator) < share)


def exact(dtype, m, k, n, r, precision="ieee", accumulate=False, place=None, strided=False) -> Case:
    """Inputs of -1, 0 and 1, so that every sum is exact: y, dx, dA and dB are the truth rounded once, bit for bit."""

    def run() -> str:
        g, t = torch.Generator().manual_seed(3), DTYPES[dtype]

        def make(*shape, share=1.0):
            values = _signs(*shape, generator=g, share=share)
            if not strided:
                return values, values.to(t)
            buffer = torch.full((shape[0], 2 * shape[1] + 3), float("nan"), dtype=t)[:, 1:-2:2]
            return values, buffer.copy_(values)

        (x, tx), (w, tw), (dy, tdy) = make(m, k), make(n, k), make(m, n)
        (a, ta), (b, tb) = make(r, k, share=min(1.0, 60 / k)), make(n, r, share=min(1.0, 60 / n))
        s, ds = x @ a.T, dy @ b
        want = {"y": x @ w.T + s @ b.T, "dx": dy @ w + ds @ a, "dA": ds.T @ x, "dB": dy.T @ s}
        if max(s.abs().max(), ds.abs().max()) > 256:
            return "not exact: choose fewer"
        leaves = [v.detach().requires_grad_() for v in (tx, ta, tb)]
        with plan.forced("fused", place), _stock(precision):
            for _ in range(2 if accumulate else 1):
                y = lora_linear(leaves[0], tw, leaves[1], leaves[2], backend="triton", accumulate_grad=accumulate)
                leaves[0].grad = None
                y.backward(tdy)
        if accumulate:
            want["dA"], want["dB"] = 2 * want["dA"], 2 * want["dB"]
            limit = {"bf16": 256, "fp16": 2048, "fp32": 1 << 24}[dtype]
            want = {name: v for name, v in want.items() if name in ("y", "dx") or v.abs().max() <= limit}
        got = {"y": y.detach(), "dx": leaves[0].grad, "dA": leaves[1].grad, "dB": leaves[2].grad}
        wrong = []
        for name, truth in want.items():
            bad = ~(got[name].double() == truth.to(t).double())
            if bad.any():
                at = tuple(int(i) for i in bad.nonzero()[0])
                wrong.append(
                    f"{name}{list(at)} is {got[name][at].item():g}, exactly {truth[at].item():g}; {int(bad.sum())} of {bad.numel()}"
                )
        return "; ".join(wrong)

    words = [precision] * (precision != "ieee") + ["accumulate"] * accumulate + ["strided"] * strided
    tile = "" if place is None else f" tile{place}"
    return f"exact {dtype} {m}x{k}x{n} r{r} {' '.join(words)}{tile}".rstrip(), run


def cases(arch: str, full: bool = False) -> Iterator[Case]:
    """All cases of an architecture. Widths that are multiples of 16 take other ways through Triton than those that are not."""
    hopper = arch != "sm_80"
    base = 70, 96, 80, 16
    for dtype, p in itertools.product(DTYPES, (0.0, 0.1)):
        yield layer(dtype, *base, p=p)
    for dtype in ("bf16", "fp32") if not full else DTYPES:
        for layout in verify.LAYOUTS[1:]:
            if layout == "fp32 adapters" and dtype == "fp32":
                continue
            for p in (0.1,) if not full else (0.0, 0.1):
                yield layer(dtype, 72, 96, 80, 16, layout, p)
    yield layer("bf16", 72, 96, 80, 32, "fp32 adapters", 0.0)
    yield layer("fp16", 72, 96, 80, 8, "fp32 adapters", 0.0)
    # odd sizes, small and large ranks
    for m, k, n, r in (
        (1, 1, 1, 1),
        (33, 41, 47, 3),
        (129, 255, 130, 3),
        (1, 264, 200, 16),
        (24, 72, 40, 64),
        (40, 144, 96, 128),
    ):
        for dtype in ("bf16", "fp32") if not full else DTYPES:
            yield layer(dtype, m, k, n, r, p=0.1)
    yield layer("bf16", 33, 72, 40, 256, p=0.5)
    for m in (1, 8, 16, 24, 32, 48):  # few rows: products of which some have too few for wgmma
        yield layer("bf16", m, 144, 208, 16)
        yield layer("bf16", m, 144, 208, 16, p=0.1)
    # sums that are split: over K for few rows, over rows for narrow operands
    yield layer("bf16", 16, 2048, 1536, 16, p=0.1)
    yield layer("bf16", 1100, 128, 96, 16, p=0.1)
    yield layer("fp16", 700, 256, 264, 64)
    yield layer("fp32", 200, 640, 64, 8, p=0.1)
    for form in ("beta1", "padded", "joint"):
        for p in (0.0, 0.1):
            yield layer("bf16", 100, 144, 272, 16, p=p, form=form)
    # every tile, over tiles that are not full; three multiprocessors, so that persistent programs go round
    for place in range(8 if hopper else 4):
        yield layer("bf16", 300, 208, 608, 16, p=0.0, place=place, layout="bias")
    for place in range(5 if hopper else 4):
        yield layer("bf16", 300, 608, 208, 16, p=0.1, place=place)
        if full or place in (0, 1):
            yield layer("bf16", 200, 528, 144, 64, p=0.1, place=place)
            yield layer("bf16", 208, 520, 136, 32, p=0.1, place=place)
    for place in range(4):
        yield layer("bf16", 150, 136, 200, 16, "all sliced", 0.1, place=place)
        if full:
            yield layer("fp16", 150, 144, 208, 16, "all sliced", 0.0, place=place)
    yield layer("bf16", 200, 144, 272, 16, "W transposed", 0.0, place=0)
    yield layer("fp16", 300, 200, 600, 16, p=0.1, place=0)
    yield layer("fp16", 304, 208, 608, 16, p=0.1, place=1)
    # exact sums
    for dtype in DTYPES:
        yield exact(dtype, 150, 208, 272, 16)
        yield exact(dtype, 150, 200, 264, 16, accumulate=True)
    for place in range(8 if hopper else 4) if full else ():
        yield exact("bf16", 280, 208, 528, 16, place=place)
    yield exact("bf16", 150, 201, 263, 5, strided=True)
    for place in range(2):
        yield exact("fp32", 150, 208, 272, 16, precision="tf32", place=place)
    yield exact("fp32", 20, 208, 272, 64, precision="tf32")
    yield exact("fp32", 150, 201, 263, 5, precision="tf32", strided=True)
    # blocks
    m, k, widths, hidden = 72, 96, (80, 48, 48), 80
    for dtype in ("bf16",) if not full else DTYPES:
        for mixed in ((0.1, 0.0, 0.3), (0.1, 0.0, 0.0), (0.0, 0.1, 0.0)):
            yield block(dtype, m, k, widths, (16, 3, 9), mixed, bias=True)
            yield block(dtype, m, k, widths, (16, 16, 16), mixed)
        yield block(dtype, m, k, widths, (16, 16, 16), (0.0, 0.0, 0.0))
        yield block(dtype, m, k, widths, (16, 16, 16), (0.1, 0.1, 0.1))
        yield block(dtype, m, k, widths, (16, 0, 3), (0.5, 0.0, 0.0), bias=True)
        yield block(dtype, 1, k, widths, (16, 3, 9), (0.1, 0.1, 0.1))
        yield block(dtype, 16, k, widths, (16, 16, 16), (0.1, 0.1, 0.1))
        if dtype != "fp32":
            yield block(dtype, m, k, widths, (16, 3, 9), (0.1, 0.0, 0.3), fp32_adapters=True)
        for name in ("silu", "gelu", "gelu_tanh", "relu2"):
            yield block(dtype, m, k, (hidden,), (16, 16, 16), (0.1, 0.1, 0.1), name)
        yield block(dtype, m, k, (hidden,), (16, 16, 16), (0.0, 0.0, 0.0), "silu", bias=True)
        yield block(dtype, m, k, (hidden,), (16, 16, 16), (0.1, 0.0, 0.1), "silu")
        yield block(dtype, m, k, (72,), (16, 3, 9), (0.3, 0.0, 0.1), "silu")
        yield block(dtype, m, k, (hidden,), (32, 64, 16), (0.0, 0.0, 0.0), "silu")
        yield block(dtype, 16, k, (hidden,), (16, 16, 16), (0.0, 0.0, 0.0), "silu")
        if dtype != "fp32":
            yield block(dtype, m, k, (hidden,), (16, 16, 16), (0.1, 0.1, 0.1), "silu", fp32_adapters=True)
    yield block("fp32", m, k, widths, (16, 3, 9), (0.1, 0.0, 0.3), bias=True)
    yield block("fp32", m, k, (hidden,), (16, 16, 16), (0.1, 0.0, 0.1), "silu")
    yield block("fp16", m, k, (hidden,), (16, 16, 16), (0.1, 0.0, 0.1), "gelu")
    for place in range(8 if hopper else 4) if full else (0, 1):
        yield block("bf16", 200, 208, (272, 144, 144), (16, 16, 16), (0.0, 0.0, 0.0), place=place)
        yield block("bf16", 200, 208, (272, 144, 144), (16, 16, 16), (0.1, 0.1, 0.1), place=place)
    yield block("bf16", 200, 144, (272,), (16, 16, 16), (0.1, 0.1, 0.1), "silu")
    yield block("bf16", 150, 144, (128, 64, 64), (64, 64, 64), (0.1, 0.1, 0.1))
    yield block("bf16", 600, 272, (128, 64, 64), (16, 16, 16), (0.1, 0.1, 0.1))
