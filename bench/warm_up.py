"""Compile the kernels that the battery is about to launch, in many processes and without launching anything.

    python -m bench.warm_up [--jobs N] [--arch sm_90] [--quick]

Compiling one kernel after the other would take longer than all the rest of a run on a GPU. This script runs the layers
and blocks of `verify`, of the race and of `bench --preset llama-8b` forward and backward on an imagined GPU
(`kernels/_imagined.py`) like this machine's, so that Triton's cache has their kernels; `--arch` imagines another GPU.
"""

import argparse
import math
import multiprocessing
import runpy
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from bench import races
from lora_kernels import plan
from lora_kernels.constants import DTYPES
from lora_kernels.inspect import compiled
from lora_kernels.inspect.kernel import Case
from lora_kernels.measure import presets
from lora_kernels.verify import block_matrix, grouped_matrix, layer_matrix
from lora_kernels.verify.grouped_problems import run_grouped
from lora_kernels.verify.problems import run_problem

__all__ = ["main", "work"]

ROOT = Path(__file__).resolve().parent.parent
# a case of `verify`, of its blocks or of `inspect`, and the form of its large products
Work = tuple[Any, str]


def work(on_gpu: bool, quick: bool) -> list[Work]:
    """List the cases to compile, the largest kernels first."""
    # fp16 last, because errors found in bf16 are in fp16 as well
    dtypes = ("bf16",) if quick else ("bf16", "fp32", "fp16")
    checked = [
        (case, case.form)
        for dtype in dtypes
        for matrix in (layer_matrix.matrix, block_matrix.matrix, grouped_matrix.matrix)
        for case in matrix("triton", dtype, on_gpu, quick)
    ]
    raced = [Case(*shape, p=0.1, bias=True) for shape in (races.SMALL if quick else races.LARGE)]
    more = [] if quick else [*_timed(), *_tested()]
    return [*more, *((case, "fused") for case in raced), *checked]


def _timed() -> list[Work]:
    """List the layers and blocks of `bench --preset llama-8b`, in both forms that the rules may choose."""
    preset, found = presets.PRESETS["llama-8b"], []
    mlp, qkv = (presets.block_shape(preset.model, block) for block in ("mlp", "qkv"))
    for p in (0.0, 0.1):
        found += [Case(mlp.m, mlp.k, mlp.n, 16, p=p, activation="silu")]
        found += [Case(qkv.m, qkv.k, qkv.n, 16, p=p, others=qkv.others)]
        found += [Case(shape.m, shape.k, shape.n, 16, p=p, fp32_adapters=wide)
                  for shape in preset.shapes for wide in (False, True)]  # fmt: skip
    return [(case, form) for case in found for form in ("fused", "beta1")]


def _tested() -> list[Work]:
    """List the layers that tests run on a GPU, in both forms that the rules may choose."""
    shapes = runpy.run_path(str(ROOT / "tests" / "samples" / "gpu_shapes.py"))["SHAPES"]
    found = [
        Case(*shape, dtype, p=p, bias=True)
        for dtype in ("bf16", "fp16", "fp32")
        for shape in shapes
        for p in (0.0, 0.1)
    ]
    return [(case, form) for case in found for form in ("fused", "beta1")]


def _gpu(arch: str | None) -> Any:
    """Return the GPU to imagine: by name, or like this machine's."""
    from lora_kernels.kernels import _launch
    from lora_kernels.kernels._imagined import GPUS, ImaginedGPU

    if arch:
        return GPUS[arch]
    here = torch.device("cuda", 0)
    capability, shared = _launch.capability(here), _launch.shared_per_sm(here)
    amd = "" if capability else torch.cuda.get_device_properties(here).gcnArchName.split(":")[0]
    return ImaginedGPU(amd or "sm_{}{}".format(*capability), _launch.num_sms(here), shared, shared, 0)


def _launcher() -> Callable | None:
    """Return a function that compiles Triton's own launcher of a signature and launches nothing.

    Return None on HIP, and where one launcher serves all signatures; Triton 3.6 has one for each signature.
    """
    from triton.backends.nvidia import driver

    if torch.version.hip or not hasattr(driver, "make_launcher"):  # one launcher for all
        return None

    def compiled_late(source: Any, metadata: Any) -> Callable:
        driver.CudaLauncher(source, metadata)
        return lambda *args: None

    return compiled_late


class _Compiler:
    """State of a worker process: the imagined GPU, and the compiler of launchers."""

    imagined: tuple[Any, Callable | None] = None, None


def _begin(gpu: Any, launchers: bool) -> None:
    problem = compiled.problem()
    if problem:
        raise RuntimeError(problem)
    torch.set_num_threads(1)
    # let CPU tensors through to the launchers
    plan.backend.is_interpreting = lambda: True
    # skip the library's products: their results are not used, and on a CPU they would take longer than compiling
    torch.mm = lambda p, q: p.new_empty(p.shape[0], q.shape[1])
    torch.addmm = lambda base, p, q: p.new_empty(p.shape[0], q.shape[1])
    torch.Tensor.addmm_ = lambda base, p, q: base
    _Compiler.imagined = gpu, _launcher() if launchers else None


def _compile(one: Work) -> tuple[str, set[str], str]:
    """Compile a case; return its name, hashes of the kernels it launches, and what went wrong or ""."""
    from lora_kernels.kernels._imagined import imagine

    case, form = one
    launched: list[Any] = []
    try:
        with imagine(*_Compiler.imagined) as launched, plan.force_form(form):
            _run(case)
    # a case that cannot be compiled here will fail again, with its message, in the step that runs it
    except Exception as error:
        return _name(case, form), set(), f"{type(error).__name__}: {error}".splitlines()[0]
    return _name(case, form), {launch.kernel.hash for launch in launched}, ""


def _name(case: Any, form: str) -> str:
    if isinstance(case, Case):
        return f"{case} {form}"
    return f"verify {case.dtype} {case.shape()} {case.layout} p={case.p:g} {form}"


def _run(case: Any) -> None:
    """Launch a case's kernels, on drawn numbers if the case is one of `verify`."""
    if isinstance(case, Case):
        ys = compiled._forward(case)
        torch.autograd.backward(ys, [torch.empty_like(y) for y in ys])
    elif isinstance(case, block_matrix.BlockCase):
        problem = block_matrix._draw(case, DTYPES[case.dtype], "cpu", 0)
        block_matrix._run(problem, "triton", 0)
    elif isinstance(case, grouped_matrix.GroupedCase):
        run_grouped(grouped_matrix.draw_grouped(case, "cpu", 0), "triton", weight=True)
    else:
        run_problem(layer_matrix.draw(case, torch.device("cpu"), 0), "triton", 0)


def main(argv: list[str] | None = None) -> int:
    """Compile all cases; return 0, 1 if one could not be compiled, or 2 without a GPU to compile for."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.warm_up", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no case after this long")
    parser.add_argument("--arch", metavar="ARCH", help="sm_80, sm_90, sm_100: for this GPU, and without one here")
    parser.add_argument("--quick", action="store_true", help="a few small layers in bf16")
    args = parser.parse_args(argv)
    if not args.arch and not torch.cuda.is_available():
        print("bench.warm_up: there is no CUDA GPU here; --arch sm_90 compiles for one", file=sys.stderr)
        return 2
    if problem := compiled.problem():
        print(f"bench.warm_up: {problem}", file=sys.stderr)
        return 2
    begun, hashes, failed = time.monotonic(), set(), 0
    todo, given = work(not args.quick, args.quick), (_gpu(args.arch), not args.arch)
    # spawn, because a process that has used CUDA cannot be forked
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, context, _begin, given) as pool:
        futures, done = [pool.submit(_compile, one) for one in todo], 0
        for future in as_completed(futures):
            if future.cancelled():
                continue
            name, found, problem = future.result()
            hashes |= found
            failed, done = failed + bool(problem), done + 1
            print(f"{done}/{len(todo)} {name}: {problem or f'{len(found)} more kernels'}", flush=True)
            if time.monotonic() > begun + args.minutes * 60:
                for one in futures:
                    one.cancel()
    took = time.monotonic() - begun
    print(f"{len(hashes)} kernels of {done} of {len(todo)} cases in {took:.0f} s, {failed} cases failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    sys.exit(main())
