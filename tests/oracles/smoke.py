"""A few seconds of the strongest checks, as a script: exits with 1 and a word on what broke. The mutants run it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import conftest  # noqa: F401  (interpreter, sanitizer)
import torch

from lora_kernels import dropout, lora_linear
from lora_kernels.kernels import matmul_expand, shrink, wgrad
from lora_kernels.kernels._configs import MatmulConfig, WgradConfig
from oracles import exact, philox

CASES = [  # M, K, N, r, p, dtype
    (33, 40, 35, 5, 0.5, torch.float32),
    (70, 33, 20, 18, 0.0, torch.bfloat16),
    (20, 72, 48, 3, 0.75, torch.float16),
]


def layer(rows, k, n, r, p, dtype):
    """Forward and backward, exactly, twice over one graph."""
    torch.manual_seed(7)
    keep = philox.keep_mask(int(dropout.draw_seed("cpu")), rows, k, p) if p else None
    case = exact.draw(rows, k, n, r, factor=round(2 / (1 - p)), keep=keep)
    x, w, a, b, bias, dy = (
        getattr(case, name).to(dtype) for name in ("x", "weight", "lora_A", "lora_B", "bias", "dy")
    )
    leaves = {"dx": x, "d_lora_A": a, "d_lora_B": b, "dbias": bias}
    for leaf in leaves.values():
        leaf.requires_grad_()
    torch.manual_seed(7)
    y = lora_linear(x, w, a, b, scaling=2.0, bias=bias, dropout_p=p, backend="triton")
    truth = case.truth()
    for _ in range(2):
        gradients = torch.autograd.grad(y, list(leaves.values()), dy, retain_graph=True)
        for name, value in {"y": y, **dict(zip(leaves, gradients, strict=True))}.items():
            assert torch.equal(value.detach().double(), truth[name].double()), f"{name} of {rows, k, n, r, p, dtype}"


def kernels():
    """Tiles and splits that the rules would not pick for small shapes, and sums that cancel."""
    case = exact.draw(50, 40, 72, 5)
    x, w, a, b, bias = (getattr(case, n).float() for n in ("x", "weight", "lora_A", "lora_B", "bias"))
    s, _ = shrink(x, a, 1.0)
    for tma in (False, True):
        y = matmul_expand([(x, w), (s, b)], bias, config=MatmulConfig(16, 64, 16, 2, 4, 4, 2), tma=tma)
        assert torch.equal(y.double(), case.truth()["y"].double()), f"matmul_expand, tma={tma}"
    g = wgrad(x, x, torch.float32, config=WgradConfig(16, 32, 16, 32, 4, 2))
    assert torch.equal(g, x.T @ x), "wgrad in splits"
    big = torch.tensor([64.0] * 64 + [1.0] + [-64.0] * 64, dtype=torch.float16).expand(4, -1)
    assert torch.equal(shrink(big, torch.full((2, 129), 64.0, dtype=torch.float16), 0.5)[0].double().unique(), _one(32.0))
    assert torch.equal(matmul_expand([(big, torch.full((2, 129), 64.0, dtype=torch.float16))]).double().unique(), _one(64.0))


def seeds():
    """All 64 bits of the seed count, and every call draws another one."""
    launcher, stock = sys.modules["lora_kernels.kernels.shrink"], dropout.draw_seed
    seed = 2**40 + 17
    launcher.draw_seed = lambda device: torch.tensor([seed])
    s, _ = shrink(torch.ones(9, 30), torch.ones(1, 30), 1.0, 0.25)
    launcher.draw_seed = stock
    assert torch.equal(s[:, 0], philox.keep_mask(seed, 9, 30, 0.25).sum(1).float()), "the mask of a 64-bit seed"
    first, second = (shrink(torch.ones(9, 30), torch.ones(1, 30), 1.0, 0.5)[1] for _ in range(2))
    assert not torch.equal(first, second), "two calls, one mask"


def _one(value):
    return torch.tensor([value], dtype=torch.float64)


if __name__ == "__main__":
    for arguments in CASES:
        layer(*arguments)
    kernels()
    seeds()
    print("smoke: all passed")
