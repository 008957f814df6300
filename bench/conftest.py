"""`pytest bench/`: every operation, pass and provider under pytest-benchmark, each checked before it is timed.

The providers, the checks and the costs are those of `lora-kernels bench`; options are listed by `pytest bench/ --help`.
"""

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.subjects import SUBJECTS, Admitted, Options, names
from lora_kernels import plan
from lora_kernels.bench.cases.layer import Settings
from lora_kernels.constants import DTYPES
from lora_kernels.measure.machine import caption, machine
from lora_kernels.measure.presets import Shape, parse_shape

_VARYING = ("hz_actual", "hz_actual_friendly")  # of the CPU's facts: the clock of the moment


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that say what is timed."""
    group = parser.getgroup("lora_kernels")
    group.addoption(
        "--shape", type=_shape, metavar="MxINxOUT", help="rows x in_features x out_features; MxINxQ+K+V says those of "
        "Q, K and V, which are one otherwise; of an MLP, of gate and up. By default that of a model's layers",
    )  # fmt: skip
    group.addoption("--r", type=_rank, default=16, metavar="RANK", help="rank; 16 by default")
    group.addoption("--p", type=_probability, default=0.0, metavar="P", help="dropout probability; 0 by default")
    group.addoption("--dtype", choices=DTYPES, help="of x and W; bf16 on a GPU, fp32 on a CPU by default")
    group.addoption("--backend", choices=plan.BACKENDS, default="auto", help="of this package's own rows")


def _shape(text: str) -> Shape:
    try:
        return parse_shape(text, several=True)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _rank(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a rank is a whole number and at least 1, not {text!r}")
    return int(text)


def _probability(text: str) -> float:
    try:
        p = float(text)
    except ValueError:
        p = math.nan
    if not 0 <= p < 1:
        raise argparse.ArgumentTypeError(f"a dropout probability is at least 0 and below 1, not {text!r}")
    return p


def _options(config: pytest.Config) -> Options:
    """Read the command line's choices; the device is the GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = config.getoption("dtype") or ("bf16" if device.type == "cuda" else "fp32")
    settings = Settings(device, DTYPES[dtype], config.getoption("backend"), cache="warm")
    return Options(config.getoption("shape"), config.getoption("r"), config.getoption("p"), settings)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a test every provider that its operation has."""
    if "admitted" in metafunc.fixturenames:
        found = names(metafunc.module.OPERATION, _options(metafunc.config))
        metafunc.parametrize("admitted", found, indirect=True, scope="module")


def pytest_report_header() -> str:
    """Say what the times are measured on."""
    return f"measured on: {caption(machine())}"


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Write hardware and versions into the JSON, and leave out what differs from one run to the next."""
    machine_info["measured_on"] = machine()
    for name in _VARYING:
        machine_info["cpu"].pop(name, None)


@pytest.fixture(scope="session")
def options(pytestconfig: pytest.Config) -> Options:
    """Return the command line's choices."""
    return _options(pytestconfig)


@pytest.fixture(scope="module")
def admit(request: pytest.FixtureRequest, options: Options) -> Callable[[str], Admitted]:
    """Judge a provider of the file's operation, by name; all of them compute the problem that is drawn here."""
    return SUBJECTS[request.module.OPERATION](options)


@pytest.fixture(scope="module")
def admitted(request: pytest.FixtureRequest, admit: Callable[[str], Admitted]) -> Admitted:
    """Return a judged provider, judged once for all passes."""
    return admit(request.param)


@pytest.fixture
def timed(benchmark: Any, options: Options, pytestconfig: pytest.Config) -> Callable[[Admitted, str], None]:
    """Time a pass of a provider; fails if the provider's result was wrong, skips what cannot run here."""

    def run(admitted: Admitted, which: str) -> None:
        if admitted.calls is None:
            # a baseline may lack a compiler, or memory; this package's own rows may lack nothing
            (pytest.skip if admitted.absent and not admitted.ours else pytest.fail)(admitted.row["reason"])
        what = admitted.operation if admitted.calls.backward is None else f"{admitted.operation}, {which}"
        benchmark.group = f"{what}: {admitted.shape} r={options.r} p={options.p:g}"
        benchmark.extra_info.update(admitted.facts(which, options), machine=caption(machine()))
        prepare, call = admitted.calls.split(which)
        synchronise = torch.cuda.synchronize if options.settings.device.type == "cuda" else (lambda: None)

        def setup() -> tuple[tuple[Any], dict[str, Any]]:
            state = prepare()
            synchronise()
            return (state,), {}

        def target(state: Any) -> Any:
            result = call(state)
            synchronise()
            return result

        if which != "backward":
            benchmark(target, None)
            return
        # each backward takes the graph of a forward of its own, which no clock sees
        began = time.perf_counter()
        target(*setup()[0])
        rounds = math.ceil(float(pytestconfig.getoption("benchmark_max_time")) / (time.perf_counter() - began))
        benchmark.pedantic(target, setup=setup, rounds=max(rounds, pytestconfig.getoption("benchmark_min_rounds")))

    return run
