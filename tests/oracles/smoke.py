"""A few seconds of the strongest checks, as a script: exits with 1 and a word on what broke. The mutants run it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import conftest  # noqa: F401  (interpreter, sanitizer)
import torch

from lora_kernels import Projection, dropout, lora_linear, lora_mlp, lora_projections, reference
from lora_kernels.kernels import hybrid, matmul_expand, shrink, shrink_all, shrink_wgrad, wgrad, wgrad_all
from lora_kernels.kernels._configs import MatmulConfig, ShrinkConfig
from lora_kernels.kernels._wgrad_config import WgradConfig
from oracles import exact, philox
from oracles.memory import virtual

CASES = [  # M, K, N, r, p, dtype
    (33, 40, 35, 5, 0.5, torch.float32),
    (70, 33, 20, 18, 0.0, torch.bfloat16),
    (20, 72, 48, 3, 0.75, torch.float16),
]


def layer(rows, k, n, r, p, dtype, seed=7):
    """Forward and backward, exactly, twice over one graph."""
    torch.manual_seed(seed)
    keep = philox.keep_mask(int(dropout.draw_seed("cpu")), rows, k, p) if p else None
    case = exact.draw(rows, k, n, r, factor=round(2 / (1 - p)), keep=keep)
    x, w, a, b, bias, dy = (getattr(case, name).to(dtype) for name in ("x", "weight", "lora_A", "lora_B", "bias", "dy"))
    leaves = {"dx": x, "d_lora_A": a, "d_lora_B": b, "dbias": bias}
    for leaf in leaves.values():
        leaf.requires_grad_()
    torch.manual_seed(seed)
    y = lora_linear(x, w, a, b, scaling=2.0, bias=bias, dropout_p=p, backend="triton")
    truth = case.truth()
    for _ in range(2):
        gradients = torch.autograd.grad(y, list(leaves.values()), dy, retain_graph=True)
        for name, value in {"y": y, **dict(zip(leaves, gradients, strict=True))}.items():
            assert torch.equal(value.detach().double(), truth[name].double()), f"{name} of {rows, k, n, r, p, dtype}"


def planned():
    """By one plan, and then others that differ in one thing."""
    kind = 18, 24, 20, 3, 0.5, torch.float32
    for seed in range(3):
        layer(*kind, seed)
    layer(17, *kind[1:])
    layer(*kind[:4], 0.75, torch.float32)
    layer(*kind[:5], torch.float16)


def block():
    """Several projections of one x, exactly: masks, scalings and biases of their own, splits of K and of rows."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randint(-1, 2, shape, generator=generator).float()

    rows, k, widths, ranks, ps = 20, 24, (40, 40, 20), (4, 4, 4), (0.5, 0.75, 0.0)
    scalings, biases = (2.0, 2.0, 1.0), [draw(40), None, draw(20)]
    x, weights, dys = draw(rows, k), [draw(n, k) for n in widths], [draw(rows, n) for n in widths]
    adapters = [(draw(r, k), draw(n, r)) for n, r in zip(widths, ranks, strict=True)]
    leaves = [x, *(t for pair in adapters for t in pair)]
    for leaf in leaves:
        leaf.requires_grad_()
    torch.manual_seed(7)
    seeds = [*dropout.draw_seed("cpu", 2).tolist(), None]
    torch.manual_seed(7)
    ys = lora_projections(x, weights, adapters, biases=biases, scaling=scalings, dropout_p=ps, backend="triton")
    ours = torch.autograd.grad(ys, leaves, dys)
    masks = [None if seed is None else philox.keep_mask(seed, rows, k, p) for seed, p in zip(seeds, ps, strict=True)]
    exact_ys = [
        reference.forward(x.double(), w.double(), a.double(), b.double(), bias, scaling, keep, p)
        for w, (a, b), bias, scaling, keep, p in zip(weights, adapters, biases, scalings, masks, ps, strict=True)
    ]
    expected = torch.autograd.grad(exact_ys, leaves, [dy.double() for dy in dys])
    for name, value, truth in zip(("q", "k", "v", "dx"), (*ys, *ours), (*exact_ys, *expected), strict=False):
        assert torch.equal(value.double(), truth.double()), f"{name} of a block"
    for i, (value, truth) in enumerate(zip(ours[1:], expected[1:], strict=True)):
        assert torch.equal(value, truth), f"gradient {i} of a block"
    plain = [t.detach() for t in (x, *(a for a, _ in adapters))]
    s, _ = shrink_all(plain[0], [(a, 2.0, 0.0) for a in plain[1:]], ShrinkConfig(16, 16, 16, 16, 4, 2))
    gs = wgrad_all([(t, torch.float32, None) for t in s], plain[0], config=WgradConfig(16, 32, 16, 16, 4, 2))
    for a, t, g in zip(plain[1:], s, gs, strict=True):
        assert torch.equal(t, 2 * plain[0] @ a.T), "several shrinks in splits"
        assert torch.equal(g, t.T @ plain[0]), "several wgrads in splits"


def gated():
    """A gated MLP of whole numbers, exactly: a mask for each layer, splits, g and u kept and made again."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randint(-1, 2, shape, generator=generator).float()

    rows, k, hidden, n, r, ps = 40, 12, 150, 20, 3, (0.5, 0.0, 0.5)
    shapes = (hidden, k), (hidden, k), (n, hidden)
    layers = [
        Projection(draw(out, inner), draw(r, inner), draw(out, r), None, 2.0, p)
        for (out, inner), p in zip(shapes, ps, strict=True)
    ]
    x, dy = draw(rows, k), draw(rows, n)
    leaves = [x, *(t for q in layers for t in (q.lora_A, q.lora_B))]
    for leaf in leaves:
        leaf.requires_grad_()
    torch.manual_seed(7)
    of_gate, of_down = (int(dropout.draw_seed("cpu")) for _ in range(2))
    masks = philox.keep_mask(of_gate, rows, k, 0.5), None, philox.keep_mask(of_down, rows, hidden, 0.5)

    def layer(x, i):
        weight, lora_A, lora_B, bias, scaling, p = layers[i]
        return reference.forward(x, weight.double(), lora_A.double(), lora_B.double(), bias, scaling, masks[i], p)

    g, u = layer(x.double(), 0), layer(x.double(), 1)
    truth = layer(g.relu().square() * u, 2)
    expected = torch.autograd.grad(truth, leaves, dy.double())
    for recompute in (False, True):
        torch.manual_seed(7)
        y = lora_mlp(x, *layers, activation="relu2", recompute=recompute, backend="triton")
        assert torch.equal(y.double(), truth), "y of a gated MLP"
        for i, (value, exact_one) in enumerate(zip(torch.autograd.grad(y, leaves, dy), expected, strict=True)):
            assert torch.equal(value, exact_one), f"gradient {i} of a gated MLP"


def kernels():
    """Tiles and splits that the rules would not pick for small shapes, and sums that cancel."""
    case = exact.draw(50, 40, 72, 5)
    x, w, a, b, bias = (getattr(case, n).float() for n in ("x", "weight", "lora_A", "lora_B", "bias"))
    s, _ = shrink(x, a, 1.0)
    for tma in (False, True):
        y = matmul_expand([(x, w), (s, b)], bias, config=MatmulConfig(16, 64, 16, 2, 4, 4, 2), tma=tma)
        assert torch.equal(y.double(), case.truth()["y"].double()), f"matmul_expand, tma={tma}"
    keep = torch.rand(50, 72, generator=torch.Generator().manual_seed(0)) < 0.5
    tile = MatmulConfig(16, 64, 16, 2, 4, 4, 2)
    y = matmul_expand([(x, w), (s, b)], None, philox.packed(keep), config=tile)
    assert torch.equal(y, x @ w.T + keep * (s @ b.T)), "a masked product in slices"
    (y,) = hybrid.beta1([([(x, w), (s, b)], bias)])
    assert torch.equal(y.double(), case.truth()["y"].double()), "beta1"
    for k_per_split in (16, 32, 64):
        s, _ = shrink(x, a, 3.0, config=ShrinkConfig(16, 16, 16, k_per_split, 4, 2))
        assert torch.equal(s, 3 * x @ a.T), "shrink in splits"
    for rows_per_split in (32, 64):
        config = WgradConfig(16, 32, 16, rows_per_split, 4, 2)
        g = wgrad(x, x, torch.float32, config=config)
        assert torch.equal(g, x.T @ x), "wgrad in splits"
        there = torch.ones_like(g)
        wgrad(x, x, torch.float32, into=there, config=config)
        assert torch.equal(there, g + 1), "wgrad into a gradient that is there"
        ds = torch.full_like(s, torch.nan)
        _, g = shrink_wgrad(x, s, a.T, 3.0, torch.float32, ds=ds, config=config)
        assert torch.equal(g, x.T @ s), "wgrad that shrinks"
        assert torch.equal(ds, 3 * x @ a.T), "the shrink of wgrad"
    wide, thin, b = torch.ones(20, 150), torch.ones(20, 5), torch.ones(150, 5)
    ds = torch.full_like(thin, torch.nan)  # of ten parts, more than are on their way at a time
    shrink_wgrad(wide, thin, b, 1.0, torch.float32, ds=ds, config=WgradConfig(16, 16, 16, 16, 4, 2))
    assert torch.equal(ds, wide @ b), "the shrink of wgrad, in many parts"
    big = torch.tensor([64.0] * 64 + [1.0] + [-64.0] * 64, dtype=torch.float16).expand(4, -1)
    assert torch.equal(
        shrink(big, torch.full((2, 129), 64.0, dtype=torch.float16), 0.5)[0].double().unique(), _one(32.0)
    )
    assert torch.equal(
        matmul_expand([(big, torch.full((2, 129), 64.0, dtype=torch.float16))]).double().unique(), _one(64.0)
    )


def layouts():
    """Nothing is contiguous, everything but the values is NaN; then offsets of more than 31 bits; then three sources."""
    case = exact.draw(20, 24, 35, 3)
    x, w, a, b, dy = (_sliced(getattr(case, n).float()) for n in ("x", "weight", "lora_A", "lora_B", "dy"))
    for leaf in (x, a, b):
        leaf.requires_grad_()
    y = lora_linear(x, w, a, b, backend="triton") + case.bias
    y.backward(dy)
    for name, value in {"y": y, "dx": x.grad, "d_lora_A": a.grad, "d_lora_B": b.grad}.items():
        assert torch.equal(value.detach().double(), case.truth()[name].double()), f"{name} of slices"
    for strides in ((715_827_900, 1), (1, 226_050_911)):
        near = torch.randint(-2, 3, (4, 10), generator=torch.Generator().manual_seed(0)).float()
        far = virtual(4, strides[0], 10, strides[1]).copy_(near)
        keep = torch.full((4, 1), 0b0110, dtype=torch.int32)
        assert torch.equal(shrink(far, far, 1.0)[0], near @ near.T), "shrink far away"
        assert torch.equal(wgrad(far, far, torch.float32), near.T @ near), "wgrad far away"
        y = matmul_expand([(far, far), (near, near), (far, far)], keep=keep)
        assert torch.equal(y, near @ near.T * torch.tensor([2, 3, 3, 2])), "matmul_expand far away"


def roundings():
    """s is rounded once, after its scaling: 3 · (1 + 2^-9) in bf16 and fp16 is not 3 · round(1 + 2^-9)."""
    for dtype, small in ((torch.bfloat16, 2.0**-9), (torch.float16, 2.0**-12)):
        x = torch.tensor([[1.0, small]], dtype=dtype)
        s, _ = shrink(x, torch.ones(1, 2, dtype=dtype), 3.0)
        assert s.item() == torch.tensor(3.0 * (1 + small), dtype=torch.float64).to(dtype).item(), "s rounded twice"
        y = matmul_expand([(x[:, :1], x[:, :1]), (x[:, 1:], torch.ones(1, 1, dtype=dtype))], torch.tensor([2 * small]))
        assert y.item() == torch.tensor(1 + 3 * small, dtype=torch.float64).to(dtype).item(), "y rounded twice"


def seeds():
    """All 64 bits of the seed count, and every call draws another one."""
    launcher, stock = sys.modules["lora_kernels.kernels.shrink"], dropout.draw_seed
    seed = 2**40 + 17
    launcher.draw_seed = lambda device, count: torch.tensor([seed])
    s, _ = shrink(torch.ones(9, 30), torch.ones(1, 30), 1.0, 0.25)
    launcher.draw_seed = stock
    assert torch.equal(s[:, 0], philox.keep_mask(seed, 9, 30, 0.25).sum(1).float()), "the mask of a 64-bit seed"
    first, second = (shrink(torch.ones(9, 30), torch.ones(1, 30), 1.0, 0.5)[1] for _ in range(2))
    assert not torch.equal(first, second), "two calls, one mask"


def _sliced(t):
    """The tensor inside a larger one full of NaN, every other column."""
    return torch.full((t.shape[0] + 1, 2 * t.shape[1] + 1), float("nan"))[1:, 1::2].copy_(t)


def _one(value):
    return torch.tensor([value], dtype=torch.float64)


if __name__ == "__main__":
    for arguments in CASES:
        layer(*arguments)
    planned()
    block()
    gated()
    kernels()
    layouts()
    roundings()
    seeds()
    print("smoke: all passed")
