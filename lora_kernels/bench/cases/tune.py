"""One case of `tune`, a shape, a rank and a drop probability: check and time every form of y and of dx, and choose one.

A form is timed within its whole pass, forward or backward, as autograd runs it, because the form decides what else the
pass has to compute (a joint dx computes ds as well) and which launches overlap. The other pass uses the fused kernel.
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
from lora_kernels.verify.provider import Provider, Rounding

__all__ = ["PASSES", "Time", "choose", "forms", "keys", "products", "tune_case"]

PASSES = ("forward", "backward")

Time = Callable[..., dict[str, dict[str, dict[str, Any]]]]  # `timing.time_all` with a clock


@dataclass(frozen=True)
class _Formed(Provider):
    """This package's provider, with a given form of the large product in some passes."""

    taken: dict[str, Form] = field(default_factory=dict)

    @classmethod
    def of(cls, provider: Provider, taken: dict[str, Form]) -> "_Formed":
        def forward() -> Tensor:
            with _force(taken.get("forward")):
                return provider.forward()

        given = {f.name: getattr(provider, f.name) for f in fields(Provider)}
        exact = all(form.strategy == "fused" for form in taken.values())
        rounding = Rounding.KERNELS if exact else Rounding.OPERATORS
        return cls(**given | {"forward": forward, "rounding": rounding}, taken=taken)

    def backward(self, ys: Tensor, dys: tuple[Tensor, ...] | None = None) -> tuple[Tensor, ...]:
        """Compute the gradients of the leaves as `Provider.backward` does, in the given form."""
        with _force(self.taken.get("backward")):
            return super().backward(ys, dys)


def _force(form: Form | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if form is None else plan.force_form(*form)


def products(shape: Shape, r: int, p: float, dtype: torch.dtype) -> dict[str, Product]:
    """Return the large product of each pass."""
    m, k, n = shape.m, shape.k, shape.n
    return {
        "forward": Product(m, k, n, r, dtype.itemsize),
        "backward": Product(m, n, k, r, dtype.itemsize, masked=p > 0, backward=True),
    }


def keys(shape: Shape, r: int, p: float, dtype: torch.dtype) -> dict[str, str]:
    """Return the key under which the choice for each pass is stored."""
    tf32 = plan.contractions("triton").uses_tf32(dtype)
    return {which: tuned.key(dtype, product, tf32) for which, product in products(shape, r, p, dtype).items()}


def forms(device: torch.device, dtype: torch.dtype, q: Product) -> dict[Form, str]:
    """List every form that a product may take, the rule's first, each with a readable name."""
    from lora_kernels.kernels._configs import matmul_configs

    ops, on_16_bytes = plan.contractions("triton"), (q.inner, q.cols) if q.backward else (q.inner,)
    tma = ops.describe_path(device, dtype)[0] == "tma" and all(size * q.element % 16 == 0 for size in on_16_bytes)
    tf32 = ops.uses_tf32(dtype)
    every = {Form(name): name for name in model.allowed_strategies(q)}
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
        time: `timing.time_all` with `measure` bound.
        passes: Which of `PASSES`.
        tick: Called with a description of each step.

    Returns:
        One row per pass, as plain data: its key, the rule's form, the fastest and the chosen form (None if nothing
        could be timed), and each form with the outcome of its check and its times.
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
    """Choose the form with the least median, but the rule's form if their quartiles overlap; None without times."""
    if not times:
        return None
    fastest = min(times, key=lambda form: times[form]["median"])
    if ruled in times and times[fastest]["q3"] >= times[ruled]["q1"]:
        return ruled
    return fastest


def _check(provider: _Formed, truth: judge.Truth) -> dict[str, Any]:
    """Check whether a form may be timed; `wrong` says that it ran but its results are wrong."""
    try:
        verdict = judge.judge(provider, truth)
    except torch.OutOfMemoryError:
        raise
    # a tile too large for this GPU must not stop the tuning
    except Exception as error:
        return {"ok": False, "wrong": False, "reason": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    return {"ok": verdict.ok, "wrong": not verdict.ok, "reason": verdict.reason}


def _nothing(y: Tensor) -> None:
    """Do nothing: the backward of forms that are timed in forward alone."""
