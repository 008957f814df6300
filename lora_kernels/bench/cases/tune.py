"""One case of `tune`: a shape, a rank and a drop probability; every form of y and of dx checked, timed, and one chosen.

A form is timed within its pass, forward or backward, as autograd runs it: it decides what else the pass has to do (a
joint dx brings ds along) and what overlaps with what. The other pass is left to the fused kernel.
"""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from lora_kernels import plan
from lora_kernels.bench.cases.layer import Settings, draw
from lora_kernels.bench.providers import layer as providers
from lora_kernels.measure.presets import Shape
from lora_kernels.measure.timing import Calls
from lora_kernels.plan import Form, model, tuned
from lora_kernels.plan.model import Product
from lora_kernels.verify import judge
from lora_kernels.verify.provider import Provider

__all__ = ["PASSES", "Time", "choose", "forms", "keys", "products", "tune_case"]

PASSES = ("forward", "backward")

Time = Callable[..., dict[str, dict[str, dict[str, Any]]]]  # `timing.time_all`, its clock given


@dataclass(frozen=True)
class _Formed(Provider):
    """This package's provider with the large product of some passes in a given form."""

    taken: dict[str, Form] = field(default_factory=dict)

    @classmethod
    def of(cls, provider: Provider, taken: dict[str, Form]) -> "_Formed":
        def forward() -> Tensor:
            with _taking(taken.get("forward")):
                return provider.forward()

        given = {f.name: getattr(provider, f.name) for f in fields(Provider)}
        exact = all(form.strategy == "fused" for form in taken.values())
        return cls(**given | {"forward": forward, "rule": "kernel" if exact else "operators"}, taken=taken)

    def backward(self, y: Tensor, dy: Tensor | None = None) -> tuple[Tensor, ...]:
        """The gradients of the leaves, as `Provider.backward` computes them."""
        with _taking(self.taken.get("backward")):
            return super().backward(y, dy)


def _taking(form: Form | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if form is None else plan.forced(*form)


def products(shape: Shape, r: int, p: float, dtype: torch.dtype) -> dict[str, Product]:
    """The large product of each pass."""
    m, k, n = shape.m, shape.k, shape.n
    return {
        "forward": Product(m, k, n, r, dtype.itemsize),
        "backward": Product(m, n, k, r, dtype.itemsize, masked=p > 0, backward=True),
    }


def keys(shape: Shape, r: int, p: float, dtype: torch.dtype) -> dict[str, str]:
    """What the choice for each pass is stored under."""
    tf32 = plan.contractions("triton").uses_tf32(dtype)
    return {which: tuned.key(dtype, product, tf32) for which, product in products(shape, r, p, dtype).items()}


def forms(device: torch.device, dtype: torch.dtype, q: Product) -> dict[Form, str]:
    """Every form that a product may take, the rule's first, each with its name for people."""
    from lora_kernels.kernels._configs import matmul_configs

    ops, on_16_bytes = plan.contractions("triton"), (q.inner, q.cols) if q.backward else (q.inner,)
    tma = ops.describe_path(device, dtype)[0] == "tma" and all(size * q.element % 16 == 0 for size in on_16_bytes)
    tf32 = ops.uses_tf32(dtype)
    every = {Form(name): name for name in model.allowed(q)}
    for place, tile in enumerate(matmul_configs(dtype, tma, q.masked, tf32)):
        size = f"{tile.block_m}x{tile.block_n}x{tile.block_k}"
        every[Form("fused", place)] = f"fused {size}, {tile.num_warps} warps, {tile.num_stages} stages"
    ruled = plan.rule(device, dtype, q, tf32)
    return {ruled: every[ruled]} | every


def tune_case(
    shape: Shape, r: int, p: float, settings: Settings, time: Time, passes: Iterable[str] = PASSES,
    tick: Callable[[str], None] = lambda doing: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Check and time the forms of a case.

    Args:
        shape: Rows, in_features, out_features.
        r: Rank.
        p: Drop probability.
        settings: Device, dtype and rounds.
        time: `timing.time_all` with its `measure` given.
        passes: Which of `PASSES`.
        tick: Told what is being done.

    Returns:
        A row a pass, plain data: its key, the form the rule takes, the fastest and the chosen one (None where nothing
        could be timed), and each form with what it was held to and its times.
    """
    problem = draw(shape, r, p, settings)
    provider = providers.build("ours", problem, "triton")
    every, stored_as = products(shape, r, p, settings.dtype), keys(shape, r, p, settings.dtype)
    truth, rows = judge.Truth(), []
    for which in passes:
        of, found, calls = forms(settings.device, settings.dtype, every[which]), {}, {}
        for form, name in of.items():
            tick(f"{which}: checking {name}")
            formed = _Formed.of(provider, dict.fromkeys(PASSES, Form("fused")) | {which: form})
            found[form] = _check(formed, truth)
            if found[form]["ok"]:
                calls[form] = Calls(formed.forward, formed.backward if which == "backward" else _nothing)
        tick(f"{which}: timing {len(calls)} forms")
        times = {form: taken[which] for form, taken in time(calls, (which,), settings.rounds).items()}
        ruled = next(iter(of))
        rows.append({
            "key": stored_as[which], "pass": which, "shape": str(shape), "r": r, "p": p, "rule": ruled,
            "fastest": min(times, key=lambda form: times[form]["median"], default=None),
            "choice": choose(times, ruled),
            "forms": [
                {"form": form, "name": name, **found[form], "seconds": times.get(form)} for form, name in of.items()
            ],
        })  # fmt: skip
    return rows


def choose(times: dict[Form, dict[str, Any]], ruled: Form) -> Form | None:
    """The form with the least median; but the rule's unless their quartiles are apart. None if nothing was timed."""
    if not times:
        return None
    fastest = min(times, key=lambda form: times[form]["median"])
    if ruled in times and times[fastest]["q3"] >= times[ruled]["q1"]:
        return ruled
    return fastest


def _check(provider: _Formed, truth: judge.Truth) -> dict[str, Any]:
    """Whether a form may be timed; `wrong` says that it ran and computed something else."""
    try:
        verdict = judge.judge(provider, truth)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a tile that this GPU has no room for is no reason to stop
        return {"ok": False, "wrong": False, "reason": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    return {"ok": verdict.ok, "wrong": not verdict.ok, "reason": verdict.reason}


def _nothing(y: Tensor) -> None:
    """The backward of what is timed forward alone."""
