"""Measure how long the host takes to issue a call, without a GPU: `python -m bench.host`.

Our bf16 layer runs for an imagined H200: all host code runs, ours and Triton's, down to a driver that launches nothing
(`stub_driver.c`). The other rows are PyTorch's operators on 4 x 8 fp32 tensors of the CPU, which leave next to nothing
to compute. Not measured: the driver's time to launch, PyTorch's path to cuBLAS, its queries of the current device and
stream, its allocator for GPUs, and the handover to autograd's thread. On a GPU every row therefore takes longer, by
some microseconds a launch: our layer has 2 launches forward and 3 backward, PEFT's 5 and more, a linear layer 1 and 1.
`Q/K/V` is three layers of one x, which PEFT runs one after the other and our block together. All rows are timed in
turn, by the CPU time of one thread.

`bound` is the least time of a Python `autograd.Function` that allocates and saves as much as LoRA's and launches
nothing.
"""

import argparse
import importlib.util
import os
import sys
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from bench.report import host_table
from bench.stub_driver import StubDriver, launching
from lora_kernels import LoRALinear, LoRAQKV, plan
from lora_kernels.console import on_stdout
from lora_kernels.measure.machine import caption, machine, write_json
from lora_kernels.measure.timing import Calls, Sample, cpu_timer, time_all

# sizes of the other rows, with next to nothing to compute
ROWS, IN, OUT, R = 4, 8, 8, 4
# read by descriptors, as most layers are; small, because a CPU maps memory anew for large tensors
OURS = (64, 128, 128, 16)
BATCH = 50  # calls between two clock readings
PASSES = ("forward", "both")


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


def _calls(layer: Any, rows: int, inner: int, dtype: torch.dtype, parameters: list[Tensor]) -> Calls:
    x = torch.randn(rows, inner, dtype=dtype, requires_grad=True)
    ys, inputs = layer(x), [x, *parameters]
    dys = tuple(map(torch.ones_like, ys)) if isinstance(ys, tuple) else torch.ones_like(ys)
    return Calls(lambda: layer(x), lambda ys: torch.autograd.grad(ys, inputs, dys))


def _linear() -> Calls:
    layer = nn.Linear(IN, OUT, bias=False).requires_grad_(False)
    return _calls(layer, ROWS, IN, torch.float32, [])


def _bound() -> Calls:
    weight, lora_A, lora_B = torch.randn(OUT, IN), nn.Parameter(torch.randn(R, IN)), nn.Parameter(torch.randn(OUT, R))
    return _calls(lambda x: _Bound.apply(x, weight, lora_A, lora_B), ROWS, IN, torch.float32, [lora_A, lora_B])


def _peft(count: int = 1) -> Calls:
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
    return _calls(call, ROWS, IN, torch.float32, adapters)


def _ours(count: int = 1) -> Calls:
    rows, inner, outer, r = OURS
    bases = [nn.Linear(inner, outer, bias=False, dtype=torch.bfloat16) for _ in range(count)]
    layer = (LoRALinear.from_linear if count == 1 else LoRAQKV.from_linears)(*bases, r=r, lora_alpha=r)
    return _calls(layer, rows, inner, torch.bfloat16, [p for p in layer.parameters() if p.requires_grad])


def measure(rounds: int) -> dict[str, dict[str, Any]]:
    """Time a call of each row in seconds: name to pass to median and spread."""
    calls = {"nn.Linear": _linear(), "bound": _bound()}
    for name, count in (("", 1), (", Q/K/V", 3)):
        if importlib.util.find_spec("peft"):
            calls[f"PEFT{name}"] = _peft(count)
        calls[f"lora_kernels{name}"] = _ours(count)
    now = cpu_timer()

    def one(prepare: Any, call: Any) -> Sample:
        state, began = prepare(), now()
        for _ in range(BATCH):
            call(state)
        return Sample((now() - began) / BATCH)

    return time_all(calls, PASSES, rounds, one)


def main(argv: list[str] | None = None) -> int:
    """Print the table of host times and, with --json, write it."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.host", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=101, metavar="N", help="rounds (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write what was measured, with the machine, as JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    os.environ["LORA_KERNELS_BACKEND"] = "triton"
    # let CPU tensors through to the launchers
    plan.backend.interpreting = lambda: True
    driver = StubDriver()
    with launching():
        taken = measure(args.rounds)
    made_on = machine()
    heading, lines = host_table(taken)
    table = Table(title=f"Host time of a call ({driver.count} launches that did not happen)")
    for word in heading:
        table.add_column(word, justify="right" if word else "left")
    for line in lines:
        table.add_row(*line)
    console = on_stdout()
    console.print(table)
    console.print(caption(made_on))
    if args.json:
        write_json(args.json, {"command": "host", "rounds": args.rounds, "rows": taken})
    return 0


if __name__ == "__main__":
    sys.exit(main())
