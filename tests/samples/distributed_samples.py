"""Two gloo ranks on a CPU, beside a single process that has all of the batch and all of the features.

`python distributed_samples.py FOLDER [CASE ...]`, started twice by Accelerate's launcher, runs the cases, all of `CASES`
if none are named, on both ranks, and leaves what it found in FOLDER, where `tests/autograd/test_distributed.py` reads it. A case returns
differences, by name, which have to be rounding, or raises.
"""

import json
import os
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lora_kernels import LoRALinear, torch_backend

CASES = {}
ROWS = 8


def case(function):
    CASES[function.__name__] = function
    return function


class Block(nn.Module):
    def __init__(self, lora_dropout=0.0, dtype=None, adapters=None):
        super().__init__()
        self.up = LoRALinear.from_linear(nn.Linear(12, 16, dtype=dtype), 3, 4, lora_dropout, dtype=adapters)
        self.down = LoRALinear.from_linear(nn.Linear(16, 12, dtype=dtype), 2, 4, lora_dropout, dtype=adapters)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(x)))


def make_model(seed=0, **options):
    """Two blocks, nothing in them zero."""
    torch.manual_seed(seed)
    model = nn.Sequential(Block(**options), Block(**options))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    return model


def draw(*shape, seed=1, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mine(t, dim=0):
    """This rank's half of a tensor."""
    return t.chunk(2, dim)[dist.get_rank()]


def mesh(*sizes, names=("tp",)):
    return init_device_mesh("cpu", sizes or (2,), mesh_dim_names=names)


def full(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def difference(actual, expected):
    """The largest difference between tensors of the same names, over each one's largest element."""
    assert actual.keys() == expected.keys(), (actual.keys(), expected.keys())
    assert actual
    worst = 0.0
    for name, t in expected.items():
        got = full(actual[name]).detach()
        assert (got.shape, got.dtype) == (t.shape, t.dtype), (name, got.shape, got.dtype, t.shape, t.dtype)
        assert got.isfinite().all(), name
        assert t.any(), f"{name} is zero and shows nothing"
        worst = max(worst, ((got.double() - t.double()).abs().max() / t.double().abs().max()).item())
    return worst


def gradients(model):
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}


def parameters(model):
    return {name.removeprefix("module."): p for name, p in model.named_parameters()}


def loss(y):
    return y.float().square().mean()


def train(model, x, steps=3, micro=1):
    """Steps of gradient descent, each on `micro` parts of the batch, whose gradients add up."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        for part in x.chunk(micro):
            loss(model(part)).backward()
        optimizer.step()
    return parameters(model) | {f"{name}.grad": grad for name, grad in gradients(model).items()}


def alike(t):
    """Whether both ranks hold the same."""
    both = [torch.empty_like(t) for _ in range(2)]
    dist.all_gather(both, t)
    return torch.equal(*both)


def main(folder, *names):
    torch.set_num_threads(1)
    Accelerator(cpu=True)  # starts the process group that the launcher's variables describe
    import distributed_data  # noqa: F401
    import distributed_tensor  # noqa: F401

    folder, found, torch_backend._SMALL = Path(folder), {}, -1  # the way of calls that are not small; see `small_calls`
    for name in names or CASES:
        begin = time.perf_counter()
        try:
            found[name] = {"differences": CASES[name](folder), "seconds": time.perf_counter() - begin}
        except BaseException:
            found[name] = {"error": traceback.format_exc()}
        (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
        if "error" in found[name]:  # the other rank may wait for this one: nothing can be said of what is left
            os._exit(1)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.modules["distributed_samples"] = sys.modules["__main__"]
    main(*sys.argv[1:])
