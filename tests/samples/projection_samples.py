"""Several projections of one x, drawn, run, and held to the rules of accuracy."""

import itertools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from oracles import philox

from lora_kernels import dropout, lora_linear, lora_projections, torch_backend
from lora_kernels.verify import numerics
from lora_kernels.verify.problems import make_problem

BACKENDS = ["triton", "torch"]
GROUPED = ((48, 5, 0.0), (16, 5, 0.0), (24, 3, 0.0))  # out_features, rank, dropout of each
CASES = {
    "grouped-query": GROUPED,
    "dropout": ((48, 5, 0.3), (16, 5, 0.5), (16, 9, 0.2)),
    "some dropout": ((33, 17, 0.0), (20, 2, 0.4), (8, 8, 0.0)),
    "missing adapters": ((24, 0, 0.0), (40, 6, 0.3), (17, 0, 0.0), (8, 40, 0.0)),
    "two": ((40, 4, 0.25), (40, 4, 0.25)),
    "more than a launch holds": tuple((8 + 3 * i, 1 + i, 0.3 * (i % 2)) for i in range(5)),
}


@dataclass
class Block:
    """Projections of one x, and the gradients that flow back into them."""

    x: torch.Tensor
    weights: list
    adapters: list
    biases: list
    scalings: list
    ps: list
    dys: list

    def leaves(self):
        given = (self.x, *itertools.chain.from_iterable(filter(None, self.adapters)), *self.biases)
        return [t for t in given if t is not None]

    def together(self, backend, call=lora_projections):
        return call(
            self.x, self.weights, self.adapters, biases=self.biases, scaling=self.scalings, dropout_p=self.ps,
            backend=backend,
        )  # fmt: skip

    def alone(self, backend):
        return tuple(
            lora_linear(self.x, w, *pair, scaling=scaling, bias=bias, dropout_p=p, backend=backend) if pair
            else F.linear(self.x, w, bias)
            for w, pair, bias, scaling, p in zip(
                self.weights, self.adapters, self.biases, self.scalings, self.ps, strict=True
            )
        )  # fmt: skip


def draw(case, dtype, device, batch=(5, 7), k=40, adapter_dtype=None, biased=1):
    problems = [
        make_problem(batch, k, n, r, dtype, device, bias=i % 2 < biased, dropout_p=p, seed=i, scaling=1.5 + i,
                     adapter_dtype=adapter_dtype)
        for i, (n, r, p) in enumerate(case)
    ]  # fmt: skip
    problems = [replace(q, x=problems[0].x) for q in problems]
    block = Block(
        problems[0].x,
        [q.weight for q in problems],
        [(q.lora_A, q.lora_B) if q.lora_A.numel() else None for q in problems],
        [q.bias for q in problems],
        [q.scaling for q in problems],
        [q.dropout_p for q in problems],
        [q.dy for q in problems],
    )
    for leaf in block.leaves():
        leaf.requires_grad_()
    return block, problems


def run(block, call, seed=3):
    """Outputs and gradients: y, dx, and for each projection a dict of its own."""
    for leaf in block.leaves():
        leaf.grad = None
    torch.manual_seed(seed)
    ys = call()
    torch.autograd.backward(ys, block.dys)
    own = [{"y": y.detach()} for y in ys]
    for outputs, pair, bias in zip(own, block.adapters, block.biases, strict=True):
        outputs |= {} if pair is None else {"d_lora_A": pair[0].grad, "d_lora_B": pair[1].grad}
        outputs |= {} if bias is None else {"dbias": bias.grad}
    return own, block.x.grad


def with_masks(problems, backend, seed=3):
    """Fill in each projection's mask: of the seeds in order for the kernels, of draws in order for operators."""
    torch.manual_seed(seed)
    device, rows = problems[0].x.device, problems[0].x.reshape(-1, problems[0].x.shape[-1])
    dropped = [q for q in problems if q.dropout_p]
    seeds = iter(dropout.draw_seed(device, len(dropped)).tolist() if backend == "triton" and dropped else ())
    filled = []
    for q in problems:
        if q.dropout_p and backend == "triton":
            q = replace(q, keep=philox.keep_mask(next(seeds), *rows.shape, q.dropout_p).to(device).view(q.x.shape))
        elif q.dropout_p:
            q = replace(q, keep=torch_backend.draw_mask(rows.shape, q.dropout_p, device).bool().view(q.x.shape))
        filled.append(q)
    return filled


def assert_accurate(block, problems, backend, split=False):
    own, dx = run(block, lambda: block.together(backend))
    problems, split = with_masks(problems, backend), split or backend == "torch"
    findings = [
        finding
        for q, outputs in zip(problems, own, strict=True)
        for finding in numerics.check(outputs, q, numerics.eager(q), split)
    ]
    eagers = [numerics.eager(q)["dx"] for q in problems]
    several_launches = len(problems) > 4  # and autograd adds what each gives for dx
    findings.append(numerics.check_shared_dx(dx, problems, eagers, split or several_launches))
    assert all(f.ok for f in findings), [f.message for f in findings if not f.ok]
    return findings
