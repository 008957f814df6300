"""Check that launches that overlap give the same bits as the same launches one after the other.

    python -m bench.races --rounds 3000 --json FILE             on a GPU
    python -m bench.races --rounds 2 --emulate sm_90            in the emulator of tests/emulator, small

A round issues the launches of a layer's training step: s, y, then ds and dB, dx and dA, which read results of earlier
launches. On sm_90 and later a launch begins before the launch in front of it has ended, dA even reads x by then
(`ready=True`), and split sums are handed from one program to another. A round contains no waits and poisons no memory,
because either would keep launches apart. Now and then another stream takes multiprocessors away. Rounds take turns over
layers with different numbers, whose results lie in the same memory, so that data read too early is wrong. The expected
results come from launches that each ended before the next was issued, dA with `ready=False`.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_kernels import plan
from lora_kernels.measure.machine import write_json

__all__ = ["LARGE", "SMALL", "Layer", "Machine", "gpu", "race"]

Shape = tuple[int, int, int, int]  # rows, in, out, r
# full tiles; a rank with two launches for ds and dB; few rows, so split sums; sizes that descriptors cannot read
LARGE: tuple[Shape, ...] = ((4096, 4096, 4096, 16), (2048, 4096, 1024, 64), (16, 4096, 4096, 16), (777, 1001, 333, 17))
SMALL: tuple[Shape, ...] = ((136, 96, 80, 16), (70, 144, 96, 40), (16, 512, 208, 16), (33, 41, 47, 3))
_LAYERS = 3
# rounds issued while the GPU is kept busy, so that their launches queue up
_AHEAD = 8
_SPIN_CYCLES = 6_000_000
_P, _ALPHA = 0.1, 0.7


@dataclass(frozen=True)
class Layer:
    """The operands of a layer, and the noise that determines its mask."""

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor
    dy: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Machine:
    """The machine that runs the rounds: a GPU or the emulator.

    Attributes:
        device: Device of the tensors.
        wait: Waits for all launches.
        before: Called before each round with the round's number.
    """

    device: torch.device
    wait: Callable[[], None] = lambda: None
    before: Callable[[int], None] = lambda i: None


def draw(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Layer:
    """Draw a layer of random numbers of unit variance."""
    (rows, k, n, r), generator = shape, torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    noise = torch.tensor([seed], dtype=torch.int64, device=device)
    return Layer(normal(rows, k), normal(n, k), normal(r, k), normal(n, r), normal(n), normal(rows, n), noise)


def step(q: Layer, ready: bool, wait: Callable[[], None]) -> dict[str, Tensor]:
    """Issue the launches of a training step, and call `wait` after each."""
    ops = plan.contractions("triton")
    s, keep = ops.shrink(q.x, q.lora_A, _ALPHA, _P, noise=q.noise)
    wait()
    y = ops.matmul_expand([(q.x, q.weight), (s, q.lora_B)], q.bias)
    wait()
    ds, dB = ops.shrink_wgrad(q.dy, s, q.lora_B, _ALPHA, q.dy.dtype)
    wait()
    dx = ops.matmul_expand([(q.dy, q.weight.t()), (ds, q.lora_A.t())], keep=keep)
    wait()
    dA = ops.wgrad(ds, q.x, q.x.dtype, keep, ready=ready)
    wait()
    return {"s": s, "mask": keep, "y": y, "ds": ds, "dB": dB, "dx": dx, "dA": dA}


def race(shape: Shape, rounds: int, machine: Machine, dtype: torch.dtype = torch.bfloat16) -> dict[str, int]:
    """Count the rounds in which each result differed from the expected one.

    Args:
        shape: Rows, in_features, out_features and rank.
        rounds: Number of rounds.
        machine: The machine that runs them.
        dtype: Dtype of all operands.
    """
    from lora_kernels.kernels._launch import run_pass

    layers = [draw(shape, dtype, machine.device, seed) for seed in range(1, _LAYERS + 1)]
    expected = [step(layer, False, machine.wait) for layer in layers]
    # one counter per result, on the device
    wrong = {name: torch.zeros((), dtype=torch.int64, device=machine.device) for name in expected[0]}
    for i in range(rounds):
        machine.before(i)
        found = run_pass(step, layers[i % _LAYERS], True, lambda: None)
        for name, t in found.items():
            wrong[name] += (_bits(t) != _bits(expected[i % _LAYERS][name])).any()
        del found
    machine.wait()
    return {name: int(count) for name, count in wrong.items()}


def _bits(t: Tensor) -> Tensor:
    return t.view({2: torch.int16, 4: torch.int32}[t.element_size()])


def gpu(device: str = "cuda") -> Machine:
    """Return a GPU as a `Machine`; the host runs ahead, and another stream takes multiprocessors now and then."""
    beside, other = torch.cuda.Stream(device), torch.randn(1024, 1024, device=device, dtype=torch.float16)
    torch.cuda.synchronize()

    def before(i: int) -> None:
        if i % _AHEAD == 0:
            torch.cuda._sleep(_SPIN_CYCLES)
        if i % 5 == 0:
            with torch.cuda.stream(beside):
                torch.mm(other, other)

    return Machine(torch.device(device), torch.cuda.synchronize, before)


@contextmanager
def emulated(arch: str) -> Iterator[tuple[Machine, Callable[[], list[str]]]]:
    """Run rounds in the emulator, each in another order; yield the `Machine` and a function listing its problems."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from emulator import emulator

    emu = emulator.Emulator(arch)
    torch.set_num_threads(1)

    def before(i: int) -> None:
        emu.set(mode=emulator.RANDOM, seed=i, resident=1 + i * 5 % 9)

    def problems() -> list[str]:
        return [line for line in emu.problems() if ": note: " not in line]

    with emu.running():
        yield Machine(torch.device("cpu"), emu.drain, before), problems


def _write(file: str | None, **content: Any) -> None:
    if file:
        write_json(file, {"command": "races", **content})


def main(argv: list[str] | None = None) -> int:
    """Race every shape and print a line for each; return 0, 1 if a result differed, or 2 without a GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.races", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3000, metavar="N", help="of each shape (default: %(default)s)")
    parser.add_argument("--emulate", metavar="ARCH", help="sm_80 or sm_90: in the emulator, small shapes")
    parser.add_argument("--json", metavar="FILE", help="what was found, written anew after each shape")
    args = parser.parse_args(argv)
    if args.emulate:
        with emulated(args.emulate) as (machine, problems):
            return _race_all(args, SMALL, machine, problems)
    if not torch.cuda.is_available():
        print("bench.races: there is no CUDA GPU here; --emulate sm_90 takes the emulator", file=sys.stderr)
        return 2
    return _race_all(args, LARGE, gpu(), list)


def _race_all(
    args: argparse.Namespace, shapes: tuple[Shape, ...], machine: Machine, problems: Callable[[], list[str]]
) -> int:  # fmt: skip
    done: list[dict[str, Any]] = []
    for shape in shapes:
        wrong, seen = race(shape, args.rounds, machine), problems()
        done.append({"shape": shape, "rounds": args.rounds, "wrong": wrong, "problems": seen})
        differed = ", ".join(f"{name} in {count}" for name, count in wrong.items() if count)
        words = "x".join(map(str, shape[:3])) + f" r{shape[3]}, {args.rounds} rounds"
        print(f"{words}: {f'WRONG: {differed}' if differed else 'all the same'}", *seen, sep="\n  ", flush=True)
        _write(args.json, complete=len(done) == len(shapes), emulated=args.emulate, shapes=done)
    return int(any(any(one["wrong"].values()) or one["problems"] for one in done))


if __name__ == "__main__":
    sys.exit(main())
