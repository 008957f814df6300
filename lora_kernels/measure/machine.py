"""The origin of a figure: the hardware and versions that go into every JSON file of a command."""

import functools
import json
import math
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lora_kernels._version import __version__

__all__ = ["caption", "check_file", "machine", "version_of", "write_json"]


def machine() -> dict[str, Any]:
    """Return hardware and versions; None for parts that this machine does not have."""
    return {
        "gpu": _gpu(),
        "cpu": {"model": _cpu_model(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version_of("triton"),
        "peft": version_of("peft"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "lora_kernels": __version__,
    }


def caption(made_on: dict[str, Any]) -> str:
    """Return one line on the origin of figures, to print under a table."""
    gpu, cpu = made_on["gpu"], made_on["cpu"]
    parts = [f"{gpu['name']}, driver {gpu['driver']}" if gpu else f"CPU: {cpu['model']}, threads: {cpu['threads']}"]
    parts += [f"{name} {made_on[name]}" for name in ("torch", "triton", "peft", "lora_kernels") if made_on[name]]
    return " · ".join(parts)


def version_of(package: str) -> str | None:
    """Return the installed version of a package, without importing the package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_file(option: str, path: str | os.PathLike[str]) -> None:
    """Refuse a file that cannot be written, before the measurement rather than after it.

    Raises:
        ValueError: The path is a folder, or its folder cannot be made or written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{option} {path}: {error.strerror}") from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"{option} {path}: cannot be written")


def write_json(path: str | os.PathLike[str], payload: dict[str, Any]) -> None:
    """Write `{"machine": machine(), **payload}`; a reader finds the old file or the whole new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    text = json.dumps(_plain({"machine": machine(), **payload}), indent=1, allow_nan=False)
    try:
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """Replace infinities and NaN by words, because JSON has neither."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _gpu() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    index = torch.cuda.current_device()
    facts = torch.cuda.get_device_properties(index)
    return {
        "name": facts.name,
        "capability": [facts.major, facts.minor],
        "sms": facts.multi_processor_count,
        "l2_bytes": getattr(facts, "L2_cache_size", None),
        "memory_bytes": facts.total_memory,
        "driver": _driver(),
    }


@functools.cache
def _driver() -> str | None:
    """Return the driver's version from nvidia-smi, because PyTorch does not know it."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.strip().splitlines()), None)


def _cpu_model() -> str | None:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or None
