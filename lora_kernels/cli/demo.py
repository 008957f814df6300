"""Train a small language model on English prose, adapt it to Python code with LoRA, and check that the pieces agree.

The text comes with every Python: the prose of its help(), then the source of its standard library. The base is
trained, frozen, and given a LoRALinear in each projection of attention and MLP; the adapter is trained, saved,
reloaded and merged. The fused model, the plain PyTorch reference and the merged model must give the same logits.

The demo runs in under two minutes on two CPU cores; on a GPU it uses the Triton kernels. The exit status is 1 if a
loss does not fall or the models disagree.
"""

import argparse
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from lora_kernels import plan
from lora_kernels.constants import DTYPES
from lora_kernels.demo import adapter as demo_adapter
from lora_kernels.demo import chart as demo_chart
from lora_kernels.demo import text as demo_text
from lora_kernels.demo.chart import Curves
from lora_kernels.demo.model import CONTEXT, Transformer, add_lora, lora_layers
from lora_kernels.demo.text import Corpus
from lora_kernels.measure import machine

__all__ = ["add_arguments", "run"]

# In full, and with --quick.
_STEPS, _LORA_STEPS = (360, 50), (240, 40)
_BATCH = 16
# held-out windows per held-out loss; a quarter of them with --quick
_MEASURED = 64
_DROPOUT = 0.05
_PRETRAIN_RATE, _ADAPT_RATE = 1e-2, 1e-2
# lifts gradients out of fp16's subnormals; Adam is invariant to a constant factor
_FP16_LOSS_SCALE = 1024.0
_PROMPT = b"def read(self, "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lora-kernels demo`."""
    defaults = "(default: {}, quick: {})"
    parser.add_argument("--steps", type=_positive, help="of training on prose " + defaults.format(*_STEPS))
    parser.add_argument("--lora-steps", type=_positive, help="of adapting to code " + defaults.format(*_LORA_STEPS))
    parser.add_argument("--r", type=_positive, default=8, help="rank of the adapters (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    parser.add_argument("--device", help="cuda or cpu (default: cuda if there is one)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the frozen base (default: bf16 on a GPU, fp32 on a CPU)")
    parser.add_argument("--out", default="lora_kernels_demo", help="folder for the files (default: lora_kernels_demo)")
    parser.add_argument("--quick", action="store_true", help="few steps, some seconds in all; it learns less")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Run the demo; return 0 if every check holds, 1 if one fails, 2 if the device cannot be used."""
    console = Console(highlight=False)
    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        console.print(f"--device {args.device}: {str(error).splitlines()[0]}", style="red")
        return 2
    threads = torch.get_num_threads()
    # the model is small: more threads hardly help, and on a busy machine they cost a lot
    torch.set_num_threads(1)
    try:
        return _Demo(args, console, device).run()
    except FloatingPointError as error:
        console.print(f"FAIL: {error}", style="bold red")
        return 1
    finally:
        torch.set_num_threads(threads)


class _Demo:
    """The demo's state: options, model, curves, and the checks made so far."""

    def __init__(self, args: argparse.Namespace, console: Console, device: torch.device) -> None:
        self.args, self.console, self.device = args, console, device
        self.dtype = DTYPES[args.dtype or ("bf16" if device.type == "cuda" else "fp32")]
        self.steps = args.steps or _STEPS[args.quick]
        self.lora_steps = args.lora_steps or _LORA_STEPS[args.quick]
        self.out = Path(args.out)
        self.draws = torch.Generator().manual_seed(args.seed)
        self.curves: Curves = {
            "prose, training": [], "code, adapting": [], "prose, held out": [], "code, held out": []
        }  # fmt: skip
        self.checks: dict[str, bool] = {}
        self.facts: dict[str, Any] = {}

    def run(self) -> int:
        start = time.perf_counter()
        self.out.mkdir(parents=True, exist_ok=True)
        self.prose, self.code = demo_text.prose(), demo_text.code()
        torch.manual_seed(self.args.seed)
        self.model = Transformer().to(self.device)
        self._tell_text()
        self._pretrain()
        sample_before = self._sample()
        self._adapt()
        sample_after = self._sample()
        self._draw()
        self._save_and_reload()
        self._agree()
        self._heading("What it writes")
        for title, sample in (("before adapting", sample_before), ("after adapting", sample_after)):
            self.console.print(Panel(Text(sample), title=title, title_align="left", border_style="dim"))
        return self._finish(time.perf_counter() - start)

    # The steps of the demo

    def _tell_text(self) -> None:
        self._heading("Text")
        for corpus, what in ((self.prose, "Python's help()"), (self.code, "the standard library")):
            sizes = f"{len(corpus.train) / 1e3:5,.0f} kB to train on, {len(corpus.held_out) / 1e3:3,.0f} kB held out"
            self._say(f"{corpus.name:5} {sizes}, from {what}.")

    def _pretrain(self) -> None:
        self._heading("Train the base on prose")
        total = sum(p.numel() for p in self.model.parameters())
        self._say(f"A transformer of {total:,} parameters that reads bytes. Losses are in nats a byte.")
        before = self._measure(self.prose)
        self._train(self.prose, "prose, training", self.steps, _PRETRAIN_RATE, first_step=0)
        self.model.to(self.dtype)
        after = self._measure(self.prose)
        self._check("prose loss falls", after < before, f"held-out prose {before:.3f} → {after:.3f}")
        self.facts["parameters"] = total
        self.facts["prose_loss"] = [before, after]

    def _adapt(self) -> None:
        self._heading("Freeze it, adapt it to code")
        add_lora(self.model, self.args.r, 2 * self.args.r, _DROPOUT)
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        layers = len(lora_layers(self.model))
        share = trained / self.facts["parameters"]
        backend = plan.choose(self.device, self.dtype, self.args.r, empty=False, requested="auto")
        self._say(
            f"{layers} projections are LoRALinear now: {trained:,} parameters train, {share:.0%} of the base's, "
            f"rank {self.args.r}, dropout {_DROPOUT}. Backend {backend}, base in {_name(self.dtype)}."
        )
        code_before, prose_before = self._measure(self.code), self._measure(self.prose)
        self._train(self.code, "code, adapting", self.lora_steps, _ADAPT_RATE, first_step=self.steps)
        code_after, prose_after = self._measure(self.code), self._measure(self.prose)
        self._check("code loss falls", code_after < code_before, f"held-out code  {code_before:.3f} → {code_after:.3f}")
        self._say(f"      held-out prose {prose_before:.3f} → {prose_after:.3f}: take the adapter off and it is back.")
        self.facts |= dict(
            lora_layers=layers, trained_parameters=trained, backend=backend, code_loss=[code_before, code_after],
            prose_loss_adapted=prose_after,
        )  # fmt: skip

    def _draw(self) -> None:
        self.console.print(demo_chart.draw_text(self.curves, min(self.console.width, 100)))
        caption = machine.caption(machine.machine())
        if demo_chart.draw_png(self.curves, self.out / "losses.png", self.steps, caption):
            self._say(f"The same as a picture: {self.out / 'losses.png'}")
        else:
            self._say("For a picture as well, install matplotlib: pip install 'matplotlib>=3.8'")

    def _save_and_reload(self) -> None:
        self._heading("Save the adapter, reload it")
        paths = demo_adapter.save(self.model, self.out, _DROPOUT)
        adapter_bytes, base_bytes = (paths[name].stat().st_size for name in ("adapter", "base"))
        self._say(f"{paths['adapter']}: {adapter_bytes / 1e3:,.0f} kB; the base is {base_bytes / 1e3:,.0f} kB.")
        reloaded = demo_adapter.load(self.out, self.device, self.dtype)
        same = torch.equal(self._logits(reloaded), self._logits(self.model))
        self._check("reloaded model is the same", same, "a new model with the files loaded: the same bits")
        self.facts |= dict(adapter_bytes=adapter_bytes, base_bytes=base_bytes)

    def _agree(self) -> None:
        self._heading("Three ways, one answer")
        fused, layers = self._logits(self.model), len(lora_layers(self.model))
        base_alone = demo_adapter.reference_copy(self.model)
        for name, parameter in base_alone.named_parameters():
            if name.endswith("lora_B"):
                parameter.data.zero_()
        others = {
            "fused and reference": self._logits(demo_adapter.reference_copy(self.model)),
            "fused and merged": self._logits(demo_adapter.merged_copy(self.model)),
        }
        for name, logits in others.items():
            found = demo_adapter.compare(logits, fused, self.dtype, layers)
            apart = f"{found.rms:.1e} apart, {found.limit:.1e} allowed; largest {found.largest:.1e}"
            self._check(name, found.ok, f"{name}: {apart if found.largest else 'the same bits'}")
            self.facts[name] = asdict(found)
        moved = demo_adapter.compare(self._logits(base_alone), fused, self.dtype, layers)
        self._check(
            "the check can see the adapter", moved.rms > 2 * moved.limit,
            f"without the adapter: {moved.rms:.1e} apart, so a lost update would show",
        )  # fmt: skip
        self._say(
            f"      Differences are rms, relative to the logits. Allowed: {layers} layers that each round on their own "
            f"in {_name(self.dtype)}."
        )

    def _finish(self, seconds: float) -> int:
        failed = [name for name, ok in self.checks.items() if not ok]
        self.console.print()
        if failed:
            self.console.print(f"FAIL: {', '.join(failed)}. {seconds:.0f} s.", style="bold red")
        else:
            self.console.print(f"All {len(self.checks)} checks pass. {seconds:.0f} s.", style="bold green")
        self.console.print(machine.caption(machine.machine()), style="dim")
        if self.args.json:
            options = dict(
                steps=self.steps, lora_steps=self.lora_steps, r=self.args.r, seed=self.args.seed,
                device=str(self.device), dtype=_name(self.dtype),
            )  # fmt: skip
            payload = dict(command="demo", options=options, checks=self.checks, **self.facts, curves=self.curves)
            machine.write_json(self.args.json, payload | dict(seconds=seconds))
        return 1 if failed else 0

    # Training and measurement

    def _train(self, corpus: Corpus, curve: str, steps: int, rate: float, first_step: int) -> None:
        """Train the parameters that require grad, and measure the held-out losses eight times on the way."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=rate, betas=(0.9, 0.99))
        warm_up = max(1, steps // 10)
        scale = _FP16_LOSS_SCALE if any(p.dtype == torch.float16 for p in self.model.parameters()) else 1.0
        columns = (
            BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"), TimeRemainingColumn(compact=True)
        )  # fmt: skip
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(corpus.name, total=steps, loss="")
            for step in range(steps):
                if step % -(-steps // 8) == 0:
                    self._record_held_out(first_step + step)
                rise = (step + 1) / warm_up
                # The learning rate falls to a tenth.
                decay = 0.55 + 0.45 * math.cos(math.pi * step / steps)
                optimizer.param_groups[0]["lr"] = rate * min(rise, decay)
                loss = self.model.loss(corpus.batch(_BATCH, CONTEXT + 1, self.draws).to(self.device))
                (loss * scale).backward()
                optimizer.step()
                optimizer.zero_grad()
                value = loss.item()
                if not math.isfinite(value):
                    raise FloatingPointError(f"{curve}: the loss is {value} at step {step + 1}")
                self.curves[curve].append((first_step + step, value))
                progress.update(task, advance=1, loss=f"{value:.3f}")
        self._record_held_out(first_step + steps)

    def _record_held_out(self, step: int) -> None:
        for corpus in (self.prose, self.code):
            self.curves[f"{corpus.name}, held out"].append((step, self._measure(corpus)))

    @torch.no_grad()
    def _measure(self, corpus: Corpus) -> float:
        """Return the held-out loss in evaluation mode."""
        self.model.eval()
        windows = corpus.measure(_MEASURED // 4 if self.args.quick else _MEASURED, CONTEXT + 1)
        loss = self.model.loss(windows.to(self.device)).item()
        self.model.train()
        return loss

    @torch.no_grad()
    def _logits(self, model: Transformer) -> torch.Tensor:
        return model.eval()(self.code.measure(_BATCH, CONTEXT).to(self.device))

    def _sample(self) -> str:
        self.model.eval()
        sample = self.model.generate(_PROMPT, 40 if self.args.quick else 200, self.args.seed).decode(errors="replace")
        self.model.train()
        return "".join(c if c.isprintable() or c == "\n" else "�" for c in sample)

    # Output

    def _heading(self, text: str) -> None:
        self.console.print(f"\n{text}", style="bold")

    def _say(self, text: str) -> None:
        self.console.print(Text(text))

    def _check(self, name: str, ok: bool, text: str) -> None:
        self.checks[name] = ok
        self.console.print(Text.assemble(("PASS  ", "green") if ok else ("FAIL  ", "bold red"), text))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
