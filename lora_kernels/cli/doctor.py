"""Show this machine's hardware and versions, the backend and path each dtype takes on it, and why.

backend   triton: the fused kernels; torch: the same contractions in PyTorch's own operators
path      how the large kernel reads its tiles: by TMA descriptors (sm_90 and later, 16-bit) or by pointers

Nothing is compiled or run. The exit status is 1 if a setting makes every call fail.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from rich.text import Text

from lora_kernels import plan
from lora_kernels.console import on_stdout
from lora_kernels.constants import DTYPES
from lora_kernels.measure import machine
from lora_kernels.plan import cache, tuned

__all__ = ["add_arguments", "run"]

_DTYPES = {**DTYPES, "fp64": torch.float64}
# any rank up to plan.MAX_RANK takes the same backend
_RANK = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no options: `lora-kernels doctor` has none of its own."""


def run(args: argparse.Namespace) -> int:
    """Print the report; return 1 if a setting makes every call fail, else 0."""
    console = on_stdout()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made_on = machine.machine()
    routes = {name: _route(device, dtype) for name, dtype in _DTYPES.items()}
    variables, measured = _variables(), _tuned_choices(device, routes)
    verdict, next_command, ok = _verdict(device, routes, made_on)

    console.print(_table("This machine", ("", ""), [*_hardware(made_on), ("tuned", measured)]))
    rows = [(name, *route.values()) for name, route in routes.items()]
    console.print(_table(f"What each dtype takes on {device.type}", ("dtype", "backend", "path", "why"), rows))
    rows = [(v["name"], "unset" if v["value"] is None else v["value"], v["effect"]) for v in variables]
    console.print(_table("Environment", ("variable", "value", "what it does now"), rows))
    console.print(Text(verdict, "bold green" if ok else "bold red"))
    console.print(Text(f"Next: {next_command}"))
    if args.json:
        machine.write_json(
            args.json,
            dict(command="doctor", device=str(device), dtypes=routes, environment=variables, tuned=measured,
                 verdict=verdict, ok=ok, next=next_command),
        )  # fmt: skip
    return 0 if ok else 1


def _table(title: str, headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False,
        show_header=any(headings),
    )  # fmt: skip
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _hardware(made_on: dict[str, Any]) -> list[tuple[str, str]]:
    gpu, cpu = made_on["gpu"], made_on["cpu"]
    absent = "none that PyTorch can use"
    if not gpu and torch.version.cuda is None and torch.version.hip is None:
        absent = "none that PyTorch can use: this PyTorch is built for CPUs"
    rows = [("GPU", absent)]
    if gpu:
        capability = ".".join(map(str, gpu["capability"]))
        memory = f"{gpu['memory_bytes'] / 2**30:.0f} GiB"
        rows = [
            ("GPU", f"{gpu['name']}, compute capability {capability}, {gpu['sms']} SMs, {memory}"),
            ("driver", gpu["driver"] or "unknown (nvidia-smi does not say)"),
        ]
    peft = made_on["peft"] or "not installed; optional: pip install 'peft>=0.19'"
    return [
        *rows,
        ("CPU", f"{cpu['model'] or 'unknown'}, {cpu['threads']} threads"),
        ("PyTorch", made_on["torch"] + (f", CUDA {made_on['cuda']}" if made_on["cuda"] else "")),
        ("Triton", _triton(made_on["triton"])),
        ("PEFT", peft),
        ("Python", made_on["python"]),
        ("lora_kernels", made_on["lora_kernels"]),
    ]


def _triton(version: str | None) -> str:
    problem = plan.backend.triton_problem()
    if problem:
        return "not installed" if version is None else f"{version}, but {problem}"
    return version or "importable, version unknown"


def _route(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Return backend, path and reason of a call with backend="auto", as `lora_linear` itself decides."""
    automatic = plan.backend.automatic(device, dtype, _RANK)
    try:
        backend = plan.choose(device, dtype, _RANK, empty=False, requested="auto")
    except (RuntimeError, TypeError, ValueError) as error:
        return dict(backend="none", path="-", reason=f"every call fails: {error}")
    if backend != automatic.backend:
        reason = f"LORA_KERNELS_BACKEND={backend} says so; by itself it would be {automatic.backend}"
    else:
        reason = automatic.reason
    if backend != "triton":
        return dict(backend=backend, path="-", reason=reason)
    path, path_reason = plan.contractions("triton").describe_path(device, dtype)
    return dict(backend=backend, path=path, reason=f"{reason}; {path_reason}")


def _tuned_choices(device: torch.device, routes: dict[str, dict[str, str]]) -> str:
    """Say how many measured choices are in use on this GPU, and where they come from."""
    if device.type != "cuda" or all(route["backend"] != "triton" for route in routes.values()):
        return "nothing to tune: without the fused kernels every product has one form"
    gpu = torch.cuda.get_device_name(device)
    choices, file = tuned.in_use(gpu), _store_folder()
    own = any(table.gpu == gpu and tuned.versions() in table.choices for _, table in tuned.stored_tables())
    if not choices:
        return f"no choices measured for {gpu} with these versions; the rules choose. Next: lora-kernels tune"
    return f"{len(choices)} measured {'choice' if len(choices) == 1 else 'choices'} in use, " + (
        f"kept in {file}" if own else "shipped with this package"
    )


def _store_folder() -> str:
    try:
        return str(cache.directory())
    except RuntimeError:
        return "nothing: there is no home directory"


def _variables() -> list[dict[str, str | None]]:
    """List the environment variables that matter, with their values and present effects."""
    backend = os.environ.get("LORA_KERNELS_BACKEND")
    if backend is None or backend == "auto":
        effect = "the backend is chosen by device and dtype, as above"
    elif backend in plan.BACKENDS:
        effect = f'calls with backend="auto" take {backend}'
    else:
        effect = f'calls with backend="auto" raise ValueError: not one of {", ".join(plan.BACKENDS)}'
    effect += "; read at the first call of a process"
    compiled = os.environ.get("TRITON_CACHE_DIR")
    home = Path(os.environ.get("TRITON_HOME", "~"))
    interpreted = 'kernels run in the slow NumPy interpreter, and only where backend="triton" is asked for'
    return [
        dict(name="LORA_KERNELS_BACKEND", value=backend, effect=effect),
        dict(
            name="TRITON_INTERPRET",
            value=os.environ.get("TRITON_INTERPRET"),
            effect=interpreted if plan.is_interpreting() else "kernels are compiled, not interpreted",
        ),
        dict(
            name="TRITON_CACHE_DIR",
            value=compiled,
            effect=f"compiled kernels are kept in {compiled or home / '.triton' / 'cache'}",
        ),
        dict(
            name="LORA_KERNELS_CACHE",
            value=os.environ.get("LORA_KERNELS_CACHE"),
            effect=f"what `lora-kernels tune` measures is kept in {_store_folder()}",
        ),
    ]


def _verdict(device: torch.device, routes: dict[str, dict[str, str]], made_on: dict[str, Any]) -> tuple[str, str, bool]:
    """Return a one-line verdict, a command to try next, and whether calls work at all."""
    failing = [name for name, route in routes.items() if route["backend"] == "none"]
    fused = [name for name, route in routes.items() if route["backend"] == "triton"]
    if len(failing) == len(routes):
        return "No call works with these settings.", "unset LORA_KERNELS_BACKEND", False
    if fused:
        where = f"on {made_on['gpu']['name']}" if made_on["gpu"] else "in Triton's interpreter, slowly"
        return f"Ready: {', '.join(fused)} take the fused kernels, {where}.", "lora-kernels verify", True
    if device.type == "cuda":
        reason = routes["bf16"]["reason"]
        return f"It works, but without the fused kernels: {reason}.", "lora-kernels verify --backend torch", True
    return "It works, in PyTorch's own operators; the fused kernels need a GPU.", "lora-kernels demo", True
