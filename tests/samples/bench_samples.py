"""What the tests of the benchmark share: a small setting, made-up results, a printed page."""

import argparse
import dataclasses

import torch
from rich.console import Console

from lora_kernels.bench.cases.layer import Settings
from lora_kernels.bench.providers.layer import PROVIDERS
from lora_kernels.cli import bench
from lora_kernels.measure.presets import PRESETS, Shape
from lora_kernels.verify.provider import Provider

CPU = torch.device("cpu")
SHAPE = Shape(48, 64, 40)


def settings(dtype=torch.float32, **kwargs):
    return Settings(CPU, dtype, compiled=False, rounds=2, **kwargs)


def arguments(*argv):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    parser.add_argument("--json")
    common = ("--device", "cpu", "--no-compile", "--rounds", "2")
    return parser.parse_args([*common, *map(str, argv)])


def sample_case(ours=1.0, floor=0.8, peft=2.0, label="q, o"):
    def row(name, seconds, **more):
        taken = {} if seconds is None else {"both": {"median": seconds, "q1": seconds, "q3": seconds, "to_floor": 1.25,
                 "flops_per_second": 1e12, "of_peak": 0.5}}  # fmt: skip
        return {"label": name, "reason": "", "seconds": taken, "saved_bytes": 2**20, "peak_bytes": 2**21} | more

    return {
        "level": "layer", "shape": {"m": 1, "k": 2, "n": 3, "label": label}, "r": 16, "p": 0.1, "dtype": "bfloat16",
        "split_minimum_bytes": 2**20, "flops": {"forward": 1, "backward": 2},
        "providers": {
            "frozen": row("floor", floor), "ours": row("lora_kernels [triton]", ours), "peft": row("PEFT", peft),
            "addmm": row("chain", None, reason="RuntimeError: no such thing"),
        },
    }  # fmt: skip


def sample_launch(ours=2e-3, operators=3e-3):
    def row(label, seconds):
        taken = {"median": seconds, "q1": seconds, "q3": seconds, "flops_per_second": 5e11, "bytes_per_second": 4e12,
                 "of_peak": None, "of_copy": 0.8}  # fmt: skip
        return {"label": label, "reason": "", "seconds": {"forward": taken}}

    return {
        "level": "kernel", "launch": "s", "kernel": "shrink", "shape": {"m": 1, "k": 2, "n": 3, "label": ""}, "r": 16,
        "p": 0.1, "dtype": "bfloat16", "flops": 1, "bytes": 1,
        "providers": {"ours": row("lora_kernels [triton]", ours), "operators": row("PyTorch's operators", operators)},
    }  # fmt: skip


def sample_model(level="decoder"):
    def row(label, seconds):
        taken = {"median": seconds, "q1": seconds, "q3": seconds, "to_floor": 1.25, "tokens_per_second": 64 / seconds}
        return {"label": label, "reason": "", "seconds": {"both": taken}, "saved_bytes": 2**20, "peak_bytes": 2**21}

    return {
        "level": level, "model": dataclasses.asdict(PRESETS["quick"].model), "tokens": 64, "r": 16, "p": 0.1,
        "dtype": "bfloat16", "providers": {"frozen": row("frozen model", 1e-3), "ours": row("lora_kernels [triton]", 2e-3)},
    }  # fmt: skip


def printed(renderable, width=150):
    console = Console(width=width, file=open("/dev/null", "w"), record=True)  # noqa: SIM115
    console.print(renderable)
    console.file.close()
    return console.export_text()


def broken(forward=None, gradients=lambda g: g):
    """This package's provider with something wrong in it; counts its calls."""

    @dataclasses.dataclass(frozen=True)
    class Broken(Provider):
        def backward(self, ys, dys=None):
            return gradients(super().backward(ys, dys))

    calls = []

    def build(problem, backend):
        good = PROVIDERS["peft"](problem, backend)
        fields = {f.name: getattr(good, f.name) for f in dataclasses.fields(Provider)}

        def count():
            calls.append(1)
            return (forward or (lambda y, problem: y))(good.forward(), problem)

        return Broken(**fields | {"label": "broken", "forward": count})

    return build, calls
