"""One pass of each operation, with what it returns."""

import itertools

import torch

from lora_kernels import lora_linear, lora_mlp, lora_qkv
from lora_kernels.functional import lora_add
from lora_kernels.passes.layer import Projection

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
