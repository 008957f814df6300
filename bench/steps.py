"""The steps of the battery, the most valuable first; the steps of a stage run at once."""

import importlib.util
import os
import shutil

from bench.processes import ROOT, Step

__all__ = ["Stage", "everything", "first", "jobs"]

Stage = tuple[Step, ...]
BLOCKS = ("qkv", "mlp", "layer")
_HANGS_S = 60  # slower tests dump a traceback
_LLAMA = ("--preset", "llama-8b", "--dtype", "bf16", "--p", "0", "0.1")
_LEAN = ("--no-compile", "--rounds", "15")
_TINY = ("--quick", "--no-compile", "--device", "cpu", "--rounds", "2", "--dtype", "bf16")


def jobs() -> int:
    """Return the number of processes that compile or test at once; two cores stay free for the rest."""
    return max(1, len(os.sched_getaffinity(0)) - 2)


def everything(rehearse: bool) -> list[Stage]:
    """List the whole battery: correctness, then times and memory of every level."""
    return [
        (_warm_up(rehearse, 110),), _correctness(rehearse, 145, ""),
        (_layers(rehearse, 80),), (_blocks(rehearse, 60),), (_kernels(rehearse, 50),), (_model(rehearse, 50),),
        (_experts(rehearse, 60),),
        (_bench("lorafusion", rehearse, 90, ("--preset", "lorafusion", "--m", "2048", "4096", "6144", "8192",
                "--dtype", "bf16", "--p", "0", "0.1", *_LEAN), ("--m", "16", "32", "--p", "0.1")),),
        (_bench("large", rehearse, 90, ("--preset", "large", "--dtype", "bf16", "--p", "0", "0.1", *_LEAN),
                ("--memory-only",)),),
    ]  # fmt: skip


def first(rehearse: bool) -> list[Stage]:
    """List a first run on a GPU: correctness, races and graphs, kernels beside the library, variants, then the rest."""
    return [
        (_warm_up(rehearse, 110),), _correctness(rehearse, 150, "not races and not compiled"),
        # a race needs launches that overlap, and another process would have the GPU between them
        (_races(rehearse, 60),), (_graphs(rehearse, 45),),
        (_kernels(rehearse, 50),), (_variants(rehearse, 80),), (_layers(rehearse, 80),), (_blocks(rehearse, 60),),
        (_experts(rehearse, 60),),
    ]  # fmt: skip


def _warm_up(rehearse: bool, cap: float) -> Step:
    more = ("--arch", "sm_90", "--quick") if rehearse else ()
    command = ("-m", "bench.warm_up", "--jobs", str(jobs()), "--minutes", "{minutes}", *more)
    return Step("warm_up", command, cap if not rehearse else 300)


def _correctness(rehearse: bool, cap: float, which: str) -> Stage:
    """Run the GPU tests and `verify` at once, because both wait for compilers more than for the GPU."""
    if rehearse:
        # compiled kernels in the emulator, which a compiler builds; without one, Triton's interpreter
        emulated = ("--emulate", "sm_90") if shutil.which(os.environ.get("CXX", "g++")) else ()
        return _tests("gpu_tests", rehearse, 60, which), Step("verify", _verify("--quick", *emulated), 300)
    return _tests("gpu_tests", rehearse, cap, which), Step("verify", _verify(), cap)


def _verify(*options: str) -> tuple[str, ...]:
    return ("-m", "bench.verifying", "--json", "{file}", "--minutes", "{minutes}", *options)


def _races(rehearse: bool, cap: float) -> Step:
    how = ("--rounds", "2", "--emulate", "sm_90") if rehearse else ()
    return Step("races", ("-m", "bench.races", "--json", "{file}", *how), cap if not rehearse else 300)


def _graphs(rehearse: bool, cap: float) -> Step:
    return _tests("graphs", rehearse, cap, "compiled")


def _tests(name: str, rehearse: bool, cap: float, which: str = "") -> Step:
    """Run the tests that need a GPU, spread over processes if pytest-xdist is installed.

    addopts is replaced because the project's own sets the number of processes. Config warnings are ignored and
    collection errors skipped, because a missing plugin or package must not keep the other tests from running. Each
    test is named as it ends and each failure printed at once, because a run that is cut prints no summary.
    """
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "gpu").glob("test_gpu*.py"))
    spread = ("-n", str(jobs())) if importlib.util.find_spec("xdist") and not rehearse else ()
    command = (
        "-m", "pytest", *files, "-m", "gpu", *(("-k", which) if which else ()), *spread,
        "-q" if rehearse else "-v", "-rf", "-p", "bench.failing",
        "-o", "addopts=--strict-markers --import-mode=importlib -p no:benchmark",
        "-o", f"faulthandler_timeout={_HANGS_S}", "--tb=short",
        # a warning of another PyTorch must not fail a kernel that is right
        "-o", "filterwarnings=default",
        "--continue-on-collection-errors",
    )  # fmt: skip
    if rehearse:  # exit status 5: no tests collected
        return Step(name, (*command, "--collect-only"), cap, fine=(0, 5))
    return Step(name, (*command, "--junitxml={xml}"), cap)


def _kernels(rehearse: bool, cap: float) -> Step:
    """Time every launch beside the library; ours / base of y and dx measures the slowdown that `plan.model` assumes."""
    return _bench("kernels", rehearse, cap, ("--level", "kernel", *_LLAMA, *_LEAN), ("--level", "kernel", "--p", "0"))


def _variants(rehearse: bool, cap: float) -> Step:
    more = ("--rehearse",) if rehearse else ()
    return Step("variants", ("-m", "bench.variants", "--json", "{file}", *more), cap if not rehearse else 240)


def _layers(rehearse: bool, cap: float) -> Step:
    return _bench("llama-8b", rehearse, cap, (*_LLAMA, *_LEAN), ("--p", "0", "0.1"))


def _blocks(rehearse: bool, cap: float) -> Step:
    blocks = ("--block", *BLOCKS)
    return _bench("blocks", rehearse, cap, (*blocks, *_LLAMA, *_LEAN), (*blocks, "--p", "0.1"))


def _experts(rehearse: bool, cap: float) -> Step:
    block = ("--block", "experts")
    return _bench("experts", rehearse, cap, (*block, "--preset", "qwen3-30b-a3b", "--dtype", "bf16", *_LEAN), block)


def _model(rehearse: bool, cap: float) -> Step:
    lean = ("--no-compile", "--rounds", "10")
    return _bench("model", rehearse, cap, ("--level", "model", *_LLAMA, *lean), ("--level", "model", "--p", "0.1"))


def _bench(name: str, rehearse: bool, cap: float, options: tuple[str, ...], tiny: tuple[str, ...]) -> Step:
    """Run `lora-kernels bench`; in a rehearsal with tiny shapes on a CPU."""
    chosen = (*tiny, *_TINY) if rehearse else options
    command = ("-m", "lora_kernels", "bench", "--json", "{file}", "--minutes", "{minutes}", *chosen)
    return Step(name, command, cap if not rehearse else 120)
