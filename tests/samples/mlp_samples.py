"""Gated MLPs with adapters: drawn, run, and held to the rules."""

from dataclasses import replace

import torch
from oracles import philox

from lora_kernels import Projection, dropout, lora_mlp, torch_backend
from lora_kernels.verify import numerics_mlp
from lora_kernels.verify.numerics_mlp import MLPProblem

BACKENDS = ["triton", "torch"]
FIELDS = {"weight": "dweight", "lora_A": "d_lora_A", "lora_B": "d_lora_B", "bias": "dbias"}
ADAPTERS = ("d_lora_A", "d_lora_B", "dbias")


def draw(
    ranks=(5, 5, 5), ps=(0.0, 0.0, 0.0), dtype=torch.float32, device="cpu", *, gated=True, activation="silu",
    biased=False, adapters=None, batch=(3, 5), sizes=(12, 20, 9), seed=0,
):  # fmt: skip
    """A problem in which every term matters; a rank of 0 is no adapter."""
    generator = torch.Generator().manual_seed(seed)
    k, hidden, n = sizes

    def normal(*shape, scale=1.0, dtype=dtype):
        return (torch.randn(shape, generator=generator) * scale).to(dtype).to(device)

    def layer(out, inner, r, p, scaling):
        own = adapters or dtype
        pair = (normal(r, inner, scale=inner**-0.5, dtype=own), normal(out, r, scale=r**-0.5, dtype=own)) if r else ()
        bias = normal(out) if biased else None
        return Projection(
            normal(out, inner, scale=inner**-0.5), *(pair or (None, None)), bias, scaling, p if r else 0.0
        )

    gate, up = (layer(hidden, k, r, p, 1.5 + i) for i, (r, p) in enumerate(zip(ranks[:2], ps, strict=False)))
    down = layer(n, hidden, ranks[2], ps[2], 0.6)
    return MLPProblem(normal(*batch, k), gate if gated else None, up, down, normal(*batch, n), activation)


def leaves_of(problem, names=ADAPTERS):
    """The problem with tensors of its own that want gradients, and these by the names of their gradients.

    `names`: gradients such as "d_lora_A" of every layer, or "up.dbias" of one; "dx".
    """
    leaves, layers = {}, {}

    def leaf(name, t):
        own = t.detach()
        if name in names or name.partition(".")[2] in names:
            leaves[name] = own.requires_grad_()
        return own

    x = leaf("dx", problem.x)
    for layer, q in problem.layers().items():
        given = {field: getattr(q, field) for field in FIELDS}
        mine = {field: leaf(f"{layer}.{FIELDS[field]}", t) for field, t in given.items() if t is not None}
        layers[layer] = q._replace(**mine)
    return replace(problem, x=x, **layers), leaves


def call(problem, backend, recompute=False):
    layers = problem.gate, problem.up, problem.down
    return lora_mlp(problem.x, *layers, activation=problem.activation, recompute=recompute, backend=backend)


def run(problem, backend, recompute=False, names=("dx", *ADAPTERS), seed=3):
    """y and gradients, by name."""
    problem, leaves = leaves_of(problem, names)
    torch.manual_seed(seed)
    y = call(problem, backend, recompute)
    gradients = torch.autograd.grad(y, list(leaves.values()), problem.dy)
    return {"y": y.detach()} | dict(zip(leaves, gradients, strict=True))


def with_masks(problem, backend, seed=3):
    """Fill in the masks: of the seeds in order for the kernels, of draws in order for operators; down's come last."""
    torch.manual_seed(seed)
    device, rows, keeps = problem.x.device, problem.x.shape[:-1].numel(), {}
    dropped = {name: q for name, q in problem.layers().items() if q.dropout_p}
    for names in ([name for name in dropped if name != "down"], [name for name in dropped if name == "down"]):
        seeds = dropout.draw_seed(device, len(names)).tolist() if names and backend == "triton" else []
        for i, name in enumerate(names):
            p, width = dropped[name].dropout_p, dropped[name].weight.shape[1]
            if backend == "triton":
                keep = philox.keep_mask(seeds[i], rows, width, p).to(device)
            else:
                keep = torch_backend.draw_mask(torch.Size((rows, width)), p, device).bool()
            keeps[name] = keep.view(*problem.x.shape[:-1], width)
    return replace(problem, keeps=keeps)


def findings(problem, backend, outputs, split=None):
    problem = with_masks(problem, backend)
    split = backend == "torch" if split is None else split
    return numerics_mlp.check(outputs, problem, numerics_mlp.eager(problem), split)


def assert_accurate(problem, backend, split=None, **how):
    outputs = run(problem, backend, **how)
    found = findings(problem, backend, outputs, split)
    assert all(f.ok for f in found), [f.message for f in found if not f.ok]
    return {f.name: f for f in found}
