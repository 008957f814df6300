"""`bench --level decoder` and `--level model`: time a whole decoder layer, and training steps of a small full model.

The decoder layer is timed forward and backward with the gradient of its input, as a layer in the middle of a model
needs it. The small model is trained: embedding, a few layers, head, cross-entropy, backward to the adapters and to the
embedded tokens, AdamW on the adapters. The floor is the same model without adapters: every dx, no low-rank term, no
optimizer.

This package's rows use the blocks `lora_qkv` and `lora_mlp`; another row computes each layer by `lora_linear` alone.

Every provider is checked without dropout before it is timed, against a wider dtype (float64 over fp32, fp32 over 16
bit): output, loss and the gradient of every adapter have an rms error of at most twice that of PyTorch's operators.
Dropout must move the output as far as PyTorch's dropout moves it. Masks differ by provider here; `--level layer` checks
them bit by bit.
"""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels import plan
from lora_kernels.bench.cases.layer import SCALING, Settings, examine, forget_compiled, held_bytes, run_all
from lora_kernels.bench.providers.hosted import HostedModel
from lora_kernels.bench.providers.layer import short
from lora_kernels.bench.providers.llama import (
    Adapters,
    LanguageModel,
    Stack,
    copy_with_adapters,
    draw_adapters,
    store,
    stored_tensors,
)
from lora_kernels.dropout import drop_probability
from lora_kernels.measure.presets import Dims, HostedDims
from lora_kernels.quantized import layers as quantized_layers
from lora_kernels.verify.judge import BY_RMS, Verdict, check_rms
from lora_kernels.verify.numerics import rms

__all__ = ["PROVIDERS", "Bench", "Trial", "check", "names_for", "run_case"]

PROVIDERS = (
    "frozen", "ours", "ours_fp32", "per_layer", "peft", "peft_fp32", "frozen_compiled", "peft_compiled",
    "peft_fp32_compiled",
)  # fmt: skip
# how far a provider's dropout moves the output, over how far PyTorch's dropout moves it
_DROPOUT_BAND = (0.8, 1.25)


@dataclass(frozen=True)
class Trial:
    """A provider's model, ready to run.

    Attributes:
        label: Its name in the tables.
        model: The model with its adapters.
        leaves: The tensors that need gradients: the input as "dx", and every adapter.
        forward: Computes the output of the timed pass: y, or the loss.
        backward: Computes the gradients from that output, and takes the optimizer's step if there is an optimizer.
        outputs: Computes outputs and gradients by name, for the check.
    """

    label: str
    model: nn.Module
    leaves: dict[str, Tensor]
    forward: Callable[[], Tensor]
    backward: Callable[[Tensor], Any]
    outputs: Callable[[], dict[str, Tensor]]


class Bench:
    """The model of a case, with the weights, adapters and inputs that its providers share.

    Args:
        dims: The model.
        r: Rank.
        p: Drop probability.
        settings: The run's settings.
        whole: Whether the case is the full model, not a layer of it.
    """

    def __init__(self, dims: Dims, r: int, p: float, settings: Settings, whole: bool) -> None:
        torch.manual_seed(0)
        self.dims, self.p, self.settings, self.whole = dims, drop_probability(p), settings, whole
        with settings.device:
            if isinstance(dims, HostedDims):
                base: nn.Module = HostedModel(dims, settings.dtype)
            else:
                base = (LanguageModel(dims) if whole else Stack(dims)).to(settings.dtype)
            self.base = base.requires_grad_(False)
            # what the adapters stand over; `base` then has the same weights, dense
            self.adapted = store(self.base, settings.quantise) if settings.quantise else self.base
            self.x = torch.randn(dims.batch, dims.seq, dims.hidden).to(settings.dtype)
            self.dy = torch.randn(dims.batch, dims.seq, dims.hidden).to(settings.dtype)
            self.tokens, self.targets = torch.randint(dims.vocab, (2, dims.batch, dims.seq))
        self.adapters: Adapters = draw_adapters(self.base, r, settings.targets)
        self._references: dict[tuple[bool, bool, bool], dict[str, Tensor]] = {}

    def trial(self, name: str) -> Trial:
        """Build a provider of `PROVIDERS`; raises if this machine cannot run it."""
        form, stored = name.removesuffix("_compiled").removesuffix("_fp32"), bool(self.settings.quantise)
        dtype = torch.float32 if "fp32" in name else self.settings.dtype
        words = short(dtype)
        r = next(iter(self.adapters.values()))[0].shape[0]
        if form == "frozen":
            label = "frozen dense model" if stored else "frozen model"
        elif form in ("ours", "per_layer"):
            chosen = plan.choose(self.settings.device, self.settings.dtype, r, False, "auto")
            what = "lora_kernels" if form == "ours" else "lora_linear alone"
            label = f"{what} [{chosen}]" + (f" {words}" if dtype != self.settings.dtype else "")
            if form == "per_layer":
                form = "layers"
            elif isinstance(self.dims, HostedDims):
                form, label = "patched", f"patched PEFT {words} [{chosen}]"
        else:
            label = f"PEFT {'over bitsandbytes ' * stored}{words}"
        base = self.base if form == "frozen" else self.adapted
        try:
            model, held = copy_with_adapters(base, form, self.adapters, dtype, SCALING, self.p)
        except ImportError:
            if stored:
                raise
            model, held = copy_with_adapters(self.base, "arithmetic", self.adapters, dtype, SCALING, self.p)
            label = f"PEFT arithmetic {words}"
        if name.endswith("_compiled"):
            return self._trial(f"{label}, compiled", model, held, torch.compile(model, dynamic=False))
        return self._trial(label, model, held, model)

    def forget(self) -> None:
        """Free the reference outputs, which only the checks need."""
        self._references.clear()

    def reference(self, wide: bool, adapters: bool, training: bool = False) -> dict[str, Tensor]:
        """Return the outputs by PyTorch's operators, in a wider dtype or the model's own; computed once.

        Args:
            wide: Whether to compute the truth, in float64 over fp32 or in fp32 over 16 bit.
            adapters: Whether the model has adapters.
            training: Whether dropout is on.
        """
        key = (wide, adapters, training)
        if key not in self._references:
            narrow = self.settings.dtype
            dtype = narrow if not wide else torch.float32 if narrow.itemsize == 2 else torch.float64
            base = copy.deepcopy(self.base).to(dtype) if wide else self.base
            form = "arithmetic" if adapters else "frozen"
            model, held = copy_with_adapters(base, form, self.adapters, dtype, SCALING, self.p)
            self._references[key] = self._trial("", model.train(training), held, model, dtype).outputs()
        return self._references[key]

    def _trial(
        self, label: str, model: nn.Module, held: dict[str, nn.Parameter], call: Callable[[Tensor], Tensor],
        dtype: torch.dtype | None = None,
    ) -> Trial:  # fmt: skip
        leaves: dict[str, Tensor] = {"dx": self._input(model, dtype or self.settings.dtype).requires_grad_(), **held}
        wrt, dy = tuple(leaves.values()), self.dy.to(dtype or self.settings.dtype)

        def loss(logits: Tensor) -> Tensor:
            return F.cross_entropy(logits.flatten(0, 1).to(_at_least_fp32(logits.dtype)), self.targets.flatten())

        def gradients(end: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(end, wrt, None if self.whole else dy)

        def forward() -> Tensor:
            return loss(call(leaves["dx"])) if self.whole else call(leaves["dx"])

        def outputs() -> dict[str, Tensor]:
            y = call(leaves["dx"])
            end = loss(y) if self.whole else y
            named = {"y": y.detach(), **({"loss": end.detach()} if self.whole else {})}
            return named | dict(zip(leaves, gradients(end), strict=True))

        if not (self.whole and held):
            return Trial(label, model, leaves, forward, gradients, outputs)
        on_gpu = self.settings.device.type == "cuda"
        optimizer = torch.optim.AdamW(held.values(), lr=1e-4, fused=True, capturable=on_gpu)

        def backward(end: Tensor) -> tuple[Tensor, ...]:
            found = gradients(end)
            for parameter, gradient in zip(wrt[1:], found[1:], strict=True):
                parameter.grad = gradient
            optimizer.step()
            return found

        return Trial(label, model, leaves, forward, backward, outputs)

    def _input(self, model: nn.Module, dtype: torch.dtype) -> Tensor:
        """Return embedded tokens, whose gradient all providers compute; or activations, for a layer."""
        return model.embedding(self.tokens).detach() if self.whole else self.x.to(dtype, copy=True)


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def names_for(dtype: torch.dtype, compiled: bool, hosted: bool = False) -> list[str]:
    """List the providers that apply: no fp32-adapter rows where x is fp32, and no per_layer row of a hosted model."""
    names = [name for name in PROVIDERS if compiled or "compiled" not in name]
    names = [name for name in names if not hosted or name != "per_layer"]
    return names if dtype.itemsize == 2 else [name for name in names if "fp32" not in name]


def run_case(
    dims: Dims, r: int, p: float, settings: Settings, tick: Callable[[str], None] = lambda doing: None,
    whole: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Check every provider on a decoder layer or on the `whole` small model, measure its memory and time it."""
    forget_compiled(settings)
    bench = Bench(dims, r, p, settings, whole)
    rows = run_all(
        settings.only or names_for(settings.dtype, settings.compiled, isinstance(dims, HostedDims)),
        lambda name: _admit(name, bench), lambda name: [], bench.forget, settings, tick,
    )  # fmt: skip
    floor = rows.get("frozen", {}).get("seconds", {})
    for row in rows.values():
        for which, taken in row["seconds"].items():
            taken["to_floor"] = taken["median"] / floor[which]["median"] if floor else None
            taken["tokens_per_second"] = dims.tokens / taken["median"]
    return {
        "level": "model" if whole else "decoder", "model": asdict(dims), "tokens": dims.tokens, "r": r, "p": p,
        "targets": list(settings.targets), "dtype": str(settings.dtype).removeprefix("torch."),
        "quantise": settings.quantise, "providers": rows,
    }  # fmt: skip


def _admit(name: str, bench: Bench) -> tuple[dict[str, Any], Trial | None]:
    """Return a provider's row, and its trial if it may be timed."""

    def held(trial: Trial) -> int:
        given = (*bench.base.parameters(), *bench.base.buffers(), *stored_tensors(bench.adapted))
        return held_bytes(trial.forward, (*given, *trial.leaves.values()))

    return examine(name, lambda: bench.trial(name), lambda trial: check(trial, bench), held, bench.settings)


def _train(model: nn.Module, mode: bool) -> None:
    """Switch a model's dropout on or off; quantised layers stay in training mode.

    In eval mode bitsandbytes packs a weight anew for a CPU with AVX512, for all models that share the weight.
    """
    model.train(mode)
    for module in model.modules():
        if quantized_layers.kind_of(module):
            module.train()


def check(trial: Trial, bench: Bench) -> Verdict:
    """Judge a provider's outputs, and how far its dropout moves the output."""
    adapters = len(trial.leaves) > 1
    _train(trial.model, not bench.p)
    actual = trial.outputs()
    _train(trial.model, True)
    exact, eager = bench.reference(True, adapters), bench.reference(False, adapters)
    # summed=0: the allowance of one rounding
    verdict = Verdict.of(check_rms(actual, exact, eager, bench.settings.dtype, summed=0), BY_RMS, most=3)
    if adapters and bench.p and verdict.ok:
        moved = rms(trial.outputs()["y"].double() - actual["y"].double())
        usual = rms(bench.reference(False, True, training=True)["y"].double() - eager["y"].double())
        if not _DROPOUT_BAND[0] <= moved / usual <= _DROPOUT_BAND[1]:
            return replace(verdict, reason=f"dropout moves the output by {moved:.3g}, PyTorch's by {usual:.3g}")
    return verdict
