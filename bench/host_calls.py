"""The calls that `bench.host` times, in a process that serves one tree's `lora_kernels`.

The process times what it is asked for: it reads the name of a row and of a pass from a line of stdin, and writes the
seconds of a call as JSON to a line of stdout. This file comes from the tree of `bench.host`, and `lora_kernels` may
come from an older one. So it uses only what all trees have: the layers, the imagined GPU of the stub driver, and the
answer whether kernels are interpreted.
"""

import contextlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora_kernels
from bench.stub_driver import StubDriver, launching
from lora_kernels import LoRALinear, LoRAQKV, plan

__all__ = ["OUR_LAYER", "PARTS", "PASSES", "Row", "serve"]

# sizes of the other rows, with next to nothing to compute
ROWS, IN, OUT, R = 4, 8, 8, 4
# read by descriptors, as most layers are; small, because a CPU maps memory anew for large tensors
OURS = (64, 128, 128, 16)
BATCH = 50  # calls between two clock readings
WARM_UP = 3
PASSES = ("forward", "both")
OUR_LAYER = "lora_kernels"
# the option that asks for the rows of `host_parts`
PARTS = "--parts"
# the function to time of each pass
Row = dict[str, Callable[[], Any]]


class _Bound(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        s = x.new_empty(x.shape[0], lora_A.shape[0])
        ctx.save_for_backward(x, weight, lora_A, lora_B, s)
        return x.new_empty(x.shape[0], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, _, lora_A, lora_B, s = ctx.saved_tensors
        torch.empty_like(s)  # in place of ds
        return torch.empty_like(x), None, torch.empty_like(lora_A), torch.empty_like(lora_B)


def _row(layer: Any, rows: int, inner: int, dtype: torch.dtype, parameters: list[Tensor]) -> Row:
    x = torch.randn(rows, inner, dtype=dtype, requires_grad=True)
    ys, inputs = layer(x), [x, *parameters]
    dys = tuple(map(torch.ones_like, ys)) if isinstance(ys, tuple) else torch.ones_like(ys)
    return {"forward": lambda: layer(x), "both": lambda: torch.autograd.grad(layer(x), inputs, dys)}


def _linear() -> Row:
    layer = nn.Linear(IN, OUT, bias=False).requires_grad_(False)
    return _row(layer, ROWS, IN, torch.float32, [])


def _bound() -> Row:
    weight, lora_A, lora_B = torch.randn(OUT, IN), nn.Parameter(torch.randn(R, IN)), nn.Parameter(torch.randn(OUT, R))
    return _row(lambda x: _Bound.apply(x, weight, lora_A, lora_B), ROWS, IN, torch.float32, [lora_A, lora_B])


def _peft(count: int = 1) -> Row:
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    layers = [
        Linear(nn.Linear(IN, OUT, bias=False), "default", LoraConfig(), r=R, lora_alpha=R, init_lora_weights=True)
        for _ in range(count)
    ]
    for layer in layers:
        layer.base_layer.requires_grad_(False)
    adapters = [own["default"].weight for layer in layers for own in (layer.lora_A, layer.lora_B)]
    call = layers[0] if count == 1 else lambda x: tuple([layer(x) for layer in layers])
    return _row(call, ROWS, IN, torch.float32, adapters)


def _ours(count: int = 1) -> Row:
    rows, inner, outer, r = OURS
    bases = [nn.Linear(inner, outer, bias=False, dtype=torch.bfloat16) for _ in range(count)]
    layer = (LoRALinear.from_linear if count == 1 else LoRAQKV.from_linears)(*bases, r=r, lora_alpha=r)
    return _row(layer, rows, inner, torch.bfloat16, [p for p in layer.parameters() if p.requires_grad])


def _table() -> dict[str, Row]:
    """Make the rows of the table, in its order."""
    rows = {"nn.Linear": _linear(), "bound": _bound()}
    for name, count in (("", 1), (", Q/K/V", 3)):
        if importlib.util.find_spec("peft"):
            rows[f"PEFT{name}"] = _peft(count)
        rows[f"{OUR_LAYER}{name}"] = _ours(count)
    return rows


def _seconds(call: Callable[[], Any], during: Callable[[], contextlib.AbstractContextManager]) -> float:
    with during():
        began = time.thread_time()
        for _ in range(BATCH):
            call()
        return (time.thread_time() - began) / BATCH


def serve(tree: str, *options: str) -> None:
    """Time calls of the tree's layers as stdin asks for them.

    The first line of stdout names the rows, and those of `host_parts`. An empty line on stdin ends the process, and
    the last line of stdout then says how many launches did not happen.

    Args:
        tree: The checkout that `lora_kernels` must come from.
        *options: `PARTS` or nothing.
    """
    # what a compiler or a warning prints must not stand between the answers
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    found = Path(lora_kernels.__file__).resolve().parents[1]
    if found != Path(tree).resolve():
        raise RuntimeError(f"bench.host: lora_kernels of {found} was loaded in place of {tree}'s.")
    torch.set_num_threads(1)
    # Let CPU tensors through to the launchers. `plan` was one module once, and the function had another name.
    backend = getattr(plan, "backend", plan)
    backend.is_interpreting = backend.interpreting = lambda: True
    driver = StubDriver()
    with launching():
        rows, parts = _table(), dict[str, Any]()
        for row in rows.values():
            for _ in range(WARM_UP):
                row["both"]()
        if PARTS in options:
            from bench.host_parts import parts_of

            parts = parts_of(rows[OUR_LAYER])
        print(json.dumps({"rows": list(rows), "parts": list(parts)}), file=answers)
        for line in map(str.strip, sys.stdin):
            if not line:
                break
            name, which = line.split("\t")
            timed = parts[name][which] if name in parts else (rows[name][which], contextlib.nullcontext)
            print(json.dumps(_seconds(*timed)), file=answers)
    print(json.dumps(driver.count), file=answers)
