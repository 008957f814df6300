"""Time forward, backward and both, beside the alternatives to this package.

Baselines, timed in turn with this package in one run: the frozen linear layer alone (the floor), PEFT's layer with
adapters in the base's dtype and in fp32, both under torch.compile, a chain of in-place addmm, and on a GPU a graph
split as LoRAFusion splits it. Each is checked against float64 first; a baseline that fails is not timed. Shares of peak
are relative to a matmul measured in this run. Other levels time each launch alone (kernel), a whole decoder layer
(decoder), and training steps of a small model (model). --model times training steps of transformers' Llama with PEFT's
adapters, stock and patched. --block times the layers of a block together: q, k and v of one input (qkv), the gated MLP
(mlp), a decoder layer (layer), the stacks of a mixture's experts (experts, beside PEFT's dense form and the split one).
--quantise stores the frozen weights in 4 or 8 bits, beside PEFT over bitsandbytes, bitsandbytes' dequantisation and a
chain of addmm, and Unsloth's order of calls; the floor stays dense. On a CPU that other processes use, set
OMP_NUM_THREADS=1: times are then the CPU time of that one thread, which is steadier.

  lora-kernels bench                                              a preset that fits this machine
  lora-kernels bench --preset cpu-sweep --no-compile              a sweep for a CPU: 10 shapes, 2 ranks, dropout or none
  lora-kernels bench --block qkv --shape 512x512x512+128+128      your own: out_features of q, k and v
  lora-kernels bench --model tiny --quantise nf4                  QLoRA: training steps over weights in NF4
For a GPU; on a CPU these take long, and bench warns:
  lora-kernels bench --preset lorafusion --m 2048 8192            a published sweep, two of its row counts
  lora-kernels bench --shape 8192x4096x4096 --r 16 --p 0 0.1      your own: rows x in_features x out_features
  lora-kernels bench --level model --m 4096                       training steps, 4096 tokens each
  lora-kernels bench --model llama-1b --layers 4 --p 0.1          training steps of a PEFT model, stock and patched
  lora-kernels bench --block qkv mlp layer --preset llama-8b      blocks, without dropout and with 0.1
  lora-kernels bench --block experts --preset qwen3-30b-a3b       the experts of a published model
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from lora_kernels import plan
from lora_kernels.bench import estimate, levels
from lora_kernels.bench.cases.kernel import LAUNCHES
from lora_kernels.bench.cases.layer import Settings
from lora_kernels.bench.providers import hosted
from lora_kernels.bench.providers.quantised import FORMATS
from lora_kernels.bench.show import levels as level_tables
from lora_kernels.bench.show import plot, tables
from lora_kernels.console import on_stdout
from lora_kernels.constants import DTYPES
from lora_kernels.measure import timing
from lora_kernels.measure.machine import caption, check_file, machine, write_json
from lora_kernels.measure.presets import MODELS, PRESETS, PROJECTIONS, Dims, Shape, parse_shape

__all__ = ["add_arguments", "run"]

_CACHE_WORDS = {
    "flush": "written and read over before each call", "rotate": "operands in turn from up to 64 copies of them",
    "warm": "as the call before left it",
}  # fmt: skip
_INTERRUPTED = "interrupted"
_STEADIER = " Steadier: OMP_NUM_THREADS=1 lora-kernels bench, one thread by its own CPU time."

# level, shape or model, rank, drop probability
Case = tuple[str, Shape | Dims, int, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lora-kernels bench`."""
    what = parser.add_argument_group("what is timed")
    what.add_argument("--level", choices=levels.LEVELS, help="a layer by default, the model with --model")
    what.add_argument("--block", choices=levels.OF_BLOCK, nargs="+", help="blocks of a decoder layer, or all of it")
    which = what.add_mutually_exclusive_group()
    which.add_argument(
        "--preset",
        choices=PRESETS,
        help="named shapes; on a GPU llama-8b by default, of experts qwen3-30b-a3b; on a CPU cpu",
    )
    which.add_argument(
        "--model", choices=MODELS, help="transformers' Llama with PEFT's adapters, stock and patched, in training steps"
    )
    which.add_argument(
        "--shape", type=_shape, nargs="+", metavar="MxINxOUT", help="rows x in_features x out_features; of a block: "
        "MxINxQ+K+V, or MxINxHIDDEN",
    )  # fmt: skip
    what.add_argument("--m", type=int, nargs="+", metavar="ROWS", help="other numbers of rows, or of tokens")
    what.add_argument("--layers", type=int, metavar="N", help="another number of a model's decoder layers")
    what.add_argument("--batch", type=int, metavar="N", help="other sequences at once, of a model")
    what.add_argument("--seq", type=int, metavar="TOKENS", help="another length of a model's sequences")
    what.add_argument("--target-modules", nargs="+", metavar="NAME", help="of a model: q_proj v_proj; all by default")
    what.add_argument("--r", type=int, nargs="+", metavar="RANK", help="ranks; the preset's, or 16")
    what.add_argument("--p", type=float, nargs="+", metavar="P", help="dropout probabilities; the preset's, or 0")
    what.add_argument("--quantise", choices=FORMATS, help="format of the frozen weights; dense by default")
    what.add_argument("--dtype", choices=DTYPES, help="of x and W; bf16 on a GPU, fp32 on a CPU by default")
    what.add_argument("--backend", choices=plan.BACKENDS, default="auto", help="of this package's own rows")
    what.add_argument("--pass", dest="passes", choices=timing.PASSES, nargs="+")
    what.add_argument("--providers", choices=levels.PROVIDERS, nargs="+", default=(), help="only these")
    what.add_argument("--no-compile", action="store_true", help="leave torch.compile out, as --model does")
    what.add_argument("--memory-only", action="store_true", help="check and weigh, time nothing")
    how = parser.add_argument_group("how")
    how.add_argument("--device", choices=("cuda", "cpu"), help="the GPU if there is one")
    how.add_argument("--rounds", type=int, help="timed calls of each; 30 on a GPU, 10 on a CPU by default")
    how.add_argument("--cuda-graph", action="store_true", help="replay CUDA graphs: no launch overhead for anyone")
    how.add_argument(
        "--cache", choices=timing.CACHES,
        help="before a call: overwrite the caches (on a GPU by default), take turns over copies of the operands, or "
        "leave them as they are (on a CPU)",
    )  # fmt: skip
    how.add_argument("--minutes", type=float, help="begin no case after this many minutes")
    how.add_argument("--quick", action="store_true", help="one tiny shape, 3 rounds: only to see that it works")
    parser.add_argument("--full", action="store_true", help="a table for each case, however many")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the times over the floor's (needs matplotlib)")


def run(args: argparse.Namespace) -> int:
    """Run the benchmark and return the exit status.

    0 if this package's results are right, 1 if not, 2 if the options cannot run here, 130 on Ctrl-C.
    """
    try:
        # The cheap checks come first.
        cases = _cases(args)
        settings = _settings(args, {level for level, *_ in cases})
    except (ValueError, RuntimeError, TypeError) as error:
        print(f"lora-kernels bench: {error}", file=sys.stderr)
        return 2
    if long := estimate.warning(cases, settings, args.minutes):
        print(long, file=sys.stderr, flush=True)
    console = on_stdout()
    done, skipped = _run_all(args, settings, cases)
    made_on = machine()
    level_tables.show(console, done, args.full)
    console.print(f"{caption(made_on)}\n{_footnote(settings)}", style="dim")
    threads = settings.device.type == "cpu" and torch.get_num_threads() > 1
    if unsteady := tables.unsteady_words(done, _STEADIER if threads else ""):
        console.print(unsteady, style="bold yellow", markup=False)
    if host_bound := tables.host_bound_words(done):
        console.print(host_bound, style="bold yellow", markup=False)
    interrupted = any(case["why"] == _INTERRUPTED for case in skipped)
    if interrupted:
        console.print(f"Interrupted after {len(cases) - len(skipped)} of {len(cases)} cases.", style="bold yellow")
    elif skipped:
        why = ", ".join(dict.fromkeys(case["why"] for case in skipped))
        console.print(f"{len(skipped)} of {len(cases)} cases were not run: {why}", style="yellow")
    if args.plot and done:
        plot.plot(done, caption(made_on), args.plot)
    wrong = [case for case in done for name in ("ours", "ours_fp32") if case["providers"].get(name, {}).get("reason")]
    return 130 if interrupted else 1 if wrong else 0


def _run_all(args: argparse.Namespace, settings: Settings, cases: list[Case]) -> tuple[list, list]:
    """Run case after case, and write each result at once, so that an early end keeps the finished cases."""
    began, done, skipped = time.monotonic(), [], []
    turns = 1 + settings.rounds * bool(settings.passes)
    steps = [
        len(levels.names(level, settings, r, subject)) * turns * (len(LAUNCHES) if level == "kernel" else 1)
        for level, subject, r, _ in cases
    ]
    with _progress(sum(steps)) as advance_to:
        for i, (level, shape, r, p) in enumerate(cases):
            if args.minutes is not None and time.monotonic() - began > args.minutes * 60:
                skipped.append({"shape": str(shape), "r": r, "p": p, "why": "out of time"})
                continue
            at, start = [sum(steps[:i])], time.monotonic()
            which = f"{i + 1} of {len(cases)}: {level} {shape} r={r} p={p:g}"

            def tick(doing: str, at: list[int] = at, which: str = which) -> None:
                at[0] += 1
                advance_to(at[0], f"{which}: {doing}")

            outcome = "done"
            try:
                done += levels.run(level, shape, r, p, settings, tick)
            except torch.OutOfMemoryError:
                outcome = "out of memory"
                skipped.append({"shape": str(shape), "r": r, "p": p, "why": outcome})
            except KeyboardInterrupt:
                left = [{"shape": str(shape), "r": r, "p": p} for _, shape, r, p in cases[i:]]
                skipped += [case | {"why": _INTERRUPTED} for case in left]
                break
            took = f"{time.monotonic() - start:.1f} s"
            advance_to(sum(steps[: i + 1]), "", f"{which}: {outcome} in {took}")
            _write(args, settings, done, skipped, complete=False)
    _write(args, settings, done, skipped, complete=not skipped)
    return done, skipped


def _write(args: argparse.Namespace, settings: Settings, done: list, skipped: list, complete: bool) -> None:
    if args.json:
        write_json(args.json, {
            "command": "bench", "level": args.level, "preset": _preset_name(args), "model": args.model,
            "quantise": args.quantise,
            "complete": complete, "skipped": skipped, "method": _method(settings), "peaks": settings.peaks,
            "speedups": tables.speedups(done), "unsteady": tables.unsteady(done),
            "host_bound": tables.host_bound(done), "cases": done,
        })  # fmt: skip


def _preset_name(args: argparse.Namespace) -> str | None:
    if args.shape or args.model:
        return None
    large = "qwen3-30b-a3b" if args.block and set(args.block) == {"experts"} else "llama-8b"
    return args.preset or ("quick" if args.quick else large if _device(args).type == "cuda" else "cpu")


def _device(args: argparse.Namespace) -> torch.device:
    return torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _cases(args: argparse.Namespace) -> list[Case]:
    if args.block and (args.level or args.model):
        raise ValueError("--block: in place of --level and of --model")
    chosen = [levels.OF_BLOCK[block] for block in dict.fromkeys(args.block or ())]
    chosen = chosen or [args.level or ("model" if args.model else "layer")]
    args.level = chosen[0] if len(chosen) == 1 else "blocks"
    name = _preset_name(args)
    preset = PRESETS[name] if name else None
    if preset and not preset.shapes and set(chosen) != {"experts"}:
        raise ValueError(f"--preset {name} has experts alone, so it goes with --block experts and nothing else")
    ranks = args.r or (preset.r if preset else (16,))
    probabilities = args.p or ((0.0, 0.1) if args.block else preset.p if preset else (0.0,))
    if "experts" in chosen and args.p and 0 not in args.p:
        raise ValueError(
            f"--p {' '.join(f'{p:g}' for p in args.p)}: experts have no dropout, in PEFT neither, so --p 0"
        )
    of_model = {"--layers": args.layers, "--batch": args.batch, "--seq": args.seq}
    if args.model and args.level != "model":
        raise ValueError(f"--model {args.model}: a whole model, so not --level {args.level}")
    for option, given in ({**of_model, "--target-modules": args.target_modules}).items():
        if given is not None and not {"decoder", "model"} & {*chosen}:
            raise ValueError(f"{option}: of a model, so with --model or --level decoder or model")
    if args.m and args.batch:
        raise ValueError("--m and --batch: both say how many sequences there are")
    numbers = {"--r": args.r, "--m": args.m, "--rounds": [args.rounds], **{o: [n] for o, n in of_model.items()}}
    for option, given in numbers.items():
        for value in given or ():
            if value is not None and value < 1:
                raise ValueError(f"{option} {value}: at least 1 is needed")
    for p in probabilities:
        if not 0 <= p < 1:
            raise ValueError(f"--p {p:g}: a dropout probability is at least 0 and below 1")
    sizes = name, args.shape, args.m, args.model, args.layers, args.batch, args.seq
    subjects = [(level, subject) for level in chosen for subject in levels.subjects(level, *sizes)]
    # experts have no dropout
    return [
        (level, subject, r, p)
        for level, subject in subjects for r in ranks for p in probabilities if p == 0 or level != "experts"
    ]  # fmt: skip


def _settings(args: argparse.Namespace, chosen: set[str]) -> Settings:
    device = _device(args)
    on_gpu = device.type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise RuntimeError("there is no CUDA GPU here")
    if args.cuda_graph and not on_gpu:
        raise ValueError("--cuda-graph needs a GPU")
    if "kernel" in chosen and (args.passes or args.memory_only):
        raise ValueError("--level kernel: a launch has neither passes nor memory of its own")
    if (models := chosen & {"decoder", "model"}) and (args.backend != "auto" or args.cache == "rotate"):
        level = min(models)
        raise ValueError(
            f"--level {level}: a model takes --backend auto (or LORA_KERNELS_BACKEND), and caches flushed or warm"
        )
    targets = tuple(args.target_modules or PROJECTIONS)
    if unknown := [name for name in targets if name.removesuffix("_proj") not in PROJECTIONS]:
        raise ValueError(f"--target-modules {' '.join(unknown)}: a model has {', '.join(PROJECTIONS)}")
    if args.quantise and "kernel" in chosen:
        raise ValueError("--quantise: of layers, blocks and models, not of --level kernel")
    if args.quantise and "experts" in chosen:
        raise ValueError("--quantise: of layers, the other blocks and models, not of --block experts")
    if args.quantise == "fp8" and models:
        raise ValueError(
            "--quantise fp8: of layers, --block qkv and mlp, because PEFT's layers over transformers' FP8Linear "
            "quantise x as well and so compute something else"
        )
    if args.quantise and models and (missing := hosted.missing_bitsandbytes()):
        raise RuntimeError(f"--quantise {args.quantise} {missing}")
    if args.model and hosted.missing_requirement():
        raise RuntimeError(f"--model {args.model} {hosted.missing_requirement()}")
    if args.plot and plot.missing_requirement():
        raise RuntimeError(plot.missing_requirement())
    if args.plot:
        check_file("--plot", args.plot)
    rounds = args.rounds or (3 if args.quick else 30 if on_gpu else 10)
    dtype = DTYPES[args.dtype or ("bf16" if on_gpu else "fp32")]
    for r in args.r or [16]:
        # raise now if the backend cannot run
        plan.choose(device, dtype, r, False, args.backend)
    passes = ("forward",) if "kernel" in chosen else tuple(args.passes or timing.PASSES)
    settings = Settings(
        device, dtype, args.backend, () if args.memory_only else passes, rounds,
        not (args.no_compile or args.model), args.cuda_graph, only=tuple(args.providers),
        cache=args.cache or ("flush" if on_gpu else "warm"), targets=targets, quantise=args.quantise or "",
    )  # fmt: skip
    for level in chosen:
        # raise now if a provider does not exist at this level
        levels.names(level, settings, 1)
    if args.memory_only:
        return settings
    return replace(settings, peaks=timing.measure_peaks(device, dtype, timing.clock(device)))


def _method(settings: Settings) -> dict[str, Any]:
    on_gpu = settings.device.type == "cuda"
    return {
        "device": str(settings.device), "rounds": settings.rounds, "interleaved": True,
        "statistic": "median, quartiles",
        "timer": "CUDA events" if on_gpu else timing.cpu_timer().__name__,
        "cache": _CACHE_WORDS[settings.cache],
        "launch": "CUDA graph replays" if settings.cuda_graph else "calls",
        "saved_bytes": "held for backward beyond x and parameters, each storage once",
        "peak_bytes": "tensors of forward + backward over what was allocated before",
    }  # fmt: skip


def _footnote(settings: Settings) -> str:
    how, peaks = _method(settings), settings.peaks
    if not peaks:
        return "memory alone, nothing timed"
    return (
        f"median ± half the interquartile range of {settings.rounds} interleaved rounds; "
        f"{how['timer']}, {how['launch']}; cache: {how['cache']}; a dtype after a name is the adapters'\n"
        f"peak: {tables.plain(peaks['matmul_flops_per_second'] / 1e12, 3)} TFLOP/s ({peaks['matmul']}); "
        f"copy: {tables.plain(peaks['copy_bytes_per_second'] / 1e9, 3)} GB/s ({peaks['copy']})"
    )


@contextmanager
def _progress(total: int) -> Iterator[Callable[..., None]]:
    """Show a progress bar on stderr while the context lasts.

    The yielded function takes the number of steps done, a description of the current step, and a message of what has
    ended. If stderr is not a terminal, each such message is printed in place of the bar.
    """
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)

        def advance_to(done: int, doing: str, ended: str = "") -> None:
            bar.update(task, completed=done, description=doing)
            if ended and not console.is_terminal:
                print(ended, file=sys.stderr, flush=True)

        yield advance_to


def _shape(text: str) -> Shape:
    try:
        return parse_shape(text, several=True)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
