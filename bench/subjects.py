"""Draw the problems of `pytest bench/`, and build and judge providers by the parts of `lora-kernels bench`."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from lora_kernels import plan
from lora_kernels.bench.cases import block, grouped, kernel, layer
from lora_kernels.bench.cases.layer import Settings
from lora_kernels.bench.cost import add as add_cost
from lora_kernels.bench.cost import block as block_cost
from lora_kernels.bench.cost import grouped as grouped_cost
from lora_kernels.bench.cost import layer as layer_cost
from lora_kernels.bench.providers import add as add_providers
from lora_kernels.bench.providers import block as block_providers
from lora_kernels.bench.providers import grouped as grouped_providers
from lora_kernels.measure.presets import PRESETS, ExpertShape, Shape, block_shape
from lora_kernels.measure.timing import Calls
from lora_kernels.verify import judge

__all__ = ["SUBJECTS", "Admitted", "Options", "names"]


@dataclass(frozen=True)
class Options:
    """The choices of a run.

    Attributes:
        shape: Of the operation; None for that of a layer of Llama-3.1-8B on a GPU, of a tiny model on a CPU.
        r: Rank.
        p: Drop probability.
        settings: Device, dtype and backend.
    """

    shape: Shape | None
    r: int
    p: float
    settings: Settings

    def shape_of(self, operation: str) -> Shape:
        """Return the shape of one of `SUBJECTS`, with as many widths as the operation has."""
        if self.shape is None:
            dims = PRESETS["llama-8b" if self.settings.device.type == "cuda" else "tiny"].model
            found = block_shape(dims, "mlp" if operation == "mlp" else "qkv")
        else:
            found = self.shape
        if operation == "qkv":
            return found if len(found.widths) == 3 else replace(found, others=(found.n,) * 2)
        return replace(found, others=())

    def stack(self) -> ExpertShape:
        """Return the shape of a stack of experts: gate and up of a model's, or the options' shape by 8 experts."""
        if self.shape is None:
            return PRESETS["qwen3-30b-a3b" if self.settings.device.type == "cuda" else "tiny"].experts[0]
        return ExpertShape(self.shape.m, self.shape.k, self.shape.n, experts=8)

    def chosen_backend(self) -> str:
        """Return the backend of this package's own rows."""
        return plan.choose(self.settings.device, self.settings.dtype, self.r, False, self.settings.backend)


@dataclass(frozen=True)
class Admitted:
    """A provider that was judged.

    Attributes:
        operation: What it computes.
        shape: Of it.
        name: Of the provider, in `lora-kernels bench`.
        row: What `lora-kernels bench` says of it: label, check, reason, weights.
        calls: What is timed; None if it may not be.
        flops: Pass to the FLOPs that it needs.
        bytes: Pass to the bytes that its launches read and write by `bench.cost`; empty for a compiler's choice.
    """

    operation: str
    shape: Shape
    name: str
    row: dict[str, Any]
    calls: Calls | None
    flops: dict[str, int]
    bytes: dict[str, int]

    @property
    def ours(self) -> bool:
        """Return whether the provider is this package's own."""
        return self.name.startswith(("ours", "per_layer"))

    @property
    def absent(self) -> bool:
        """Return whether the provider could not run at all, so that its result is unknown."""
        return self.row["check"] is None

    def facts(self, which: str, options: Options) -> dict[str, Any]:
        """Return the facts beside a time of the pass `which` in pytest-benchmark's JSON."""
        check = self.row["check"]
        return {
            "operation": self.operation, "pass": which, "provider": self.row["label"], "shape": str(self.shape),
            "r": options.r, "p": options.p, "dtype": str(options.settings.dtype).removeprefix("torch."),
            "flops": self.flops[which], "bytes": self.bytes.get(which), "rule": check["rule"],
            "share_of_allowed_error": check["worst"], "saved_bytes": self.row.get("saved_bytes"),
            "peak_bytes": self.row.get("peak_bytes"), "cache": options.settings.cache,
        }  # fmt: skip


def names(operation: str, options: Options) -> list[str]:
    """List the providers of an operation; of contractions, "launch: provider" each."""
    settings, backend = options.settings, options.chosen_backend()
    if operation == "contractions":
        # every problem has the same launches and providers, so a problem of one element tells them
        least = layer.draw(Shape(1, 1, 1), 1, 0.0, Settings(torch.device("cpu"), torch.float32))
        each = kernel.launches(least, "torch").items()
        return [f"{which}: {name}" for which, launch in each for name in kernel.PROVIDERS if name in launch.calls]
    if operation == "linear":
        return settings.names(options.r)
    if operation == "add":
        return add_providers.names_for(settings.dtype, backend, settings.compiled)
    if operation == "grouped":
        return grouped_providers.names_for(settings.dtype)
    return block_providers.names_for(settings.dtype, settings.compiled)


def _admitted(
    operation: str, shape: Shape, name: str, row: dict[str, Any], provider: Any, flops: tuple[int, int]
) -> Admitted:
    model = row.get("model")
    moved = (model["forward_bytes"], model["backward_bytes"]) if model else None
    calls = None if provider is None else Calls(provider.forward, provider.backward)
    return Admitted(operation, shape, name, row, calls, _by_pass(flops), _by_pass(moved) if moved else {})


def _by_pass(pair: tuple[int, int]) -> dict[str, int]:
    return {"forward": pair[0], "backward": pair[1], "both": sum(pair)}


def _fresh(name: str) -> None:
    """Forget compiled code: the compiler's cache is by code, and after eight shapes of one it runs eager."""
    if "compiled" in name:
        torch._dynamo.reset()


def _linear(options: Options) -> Callable[[str], Admitted]:
    shape, r, settings = options.shape_of("linear"), options.r, options.settings
    problem, truth = layer.draw(shape, r, options.p, settings), judge.Truth()

    def admit(name: str) -> Admitted:
        _fresh(name)
        flops = layer_cost.flops(shape.m, shape.k, shape.n, 0 if name == "frozen" else r)
        return _admitted("lora_linear", shape, name, *layer.admit(name, problem, truth, settings), flops)

    return admit


def _add(options: Options) -> Callable[[str], Admitted]:
    shape, r = options.shape_of("add"), options.r
    settings = replace(options.settings, build=add_providers.build)
    problem, truth = add_providers.without_base(layer.draw(shape, r, options.p, settings)), judge.Truth()
    flops = add_cost.flops(shape.m, shape.k, shape.n, r)

    def admit(name: str) -> Admitted:
        _fresh(name)
        return _admitted(
            "lora_add", shape, name, *layer.admit(name, problem, truth, settings, add_cost.COSTS), flops
        )  # fmt: skip

    return admit


def _block(kind: str, options: Options) -> Callable[[str], Admitted]:
    shape, r, settings = options.shape_of(kind), options.r, options.settings
    problem, truth = block.draw(kind, shape, r, options.p, settings), judge.Truth()
    size = block.cost_of(problem, r)

    def admit(name: str) -> Admitted:
        _fresh(name)
        row, provider = block.admit(
            name, lambda: block_providers.build(name, problem, settings.backend), truth, r, settings
        )  # fmt: skip
        flops = block_cost.flops(size, 0 if name == "frozen" else r)
        return _admitted(f"lora_{kind}", shape, name, row, provider, flops)

    return admit


def _grouped(options: Options) -> Callable[[str], Admitted]:
    shape, settings = options.stack(), options.settings
    problem, truth = grouped.draw(shape, options.r, settings), judge.Truth()
    size = grouped.size_of(problem)

    def admit(name: str) -> Admitted:
        row, provider = grouped.admit(
            name, lambda: grouped_providers.build(name, problem, settings.backend), truth, settings
        )  # fmt: skip
        flops = grouped_cost.flops("frozen" if name == "frozen" else "ours", size)
        return _admitted("lora_grouped_linear", shape, name, row, provider, flops)

    return admit


def _contractions(options: Options) -> Callable[[str], Admitted]:
    shape, backend = options.shape_of("contractions"), options.chosen_backend()
    problem = layer.draw(shape, options.r, options.p, options.settings)
    launches = kernel.launches(problem, backend)

    def admit(name: str) -> Admitted:
        which, provider = name.split(": ")
        launch = launches[which]
        row, right = kernel.admit(provider, launch, backend, problem.dropout_p)
        flops = launch.base_flops if provider == "base" else launch.flops
        calls = Calls(launch.calls[provider]) if right else None
        return Admitted(
            f"{launch.kernel} of {which}", shape, provider, row, calls, {"forward": flops}, {"forward": launch.bytes}
        )

    return admit


SUBJECTS: dict[str, Callable[[Options], Callable[[str], Admitted]]] = {
    "linear": _linear, "add": _add, "qkv": partial(_block, "qkv"), "mlp": partial(_block, "mlp"),
    "grouped": _grouped, "contractions": _contractions,
}  # fmt: skip
