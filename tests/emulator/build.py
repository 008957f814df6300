"""The emulator's libraries, built by the C++ compiler of this machine and kept in a folder of temporary files."""

import fcntl
import hashlib
import importlib.util
import os
import pathlib
import shutil
import subprocess
import tempfile

import torch

__all__ = ["CACHE", "build", "missing"]

CACHE = pathlib.Path(os.environ.get("PTX_CACHE", os.path.join(tempfile.gettempdir(), "ptx")))
_SOURCES = pathlib.Path(__file__).with_name("machine")
_COMPILER = os.environ.get("CXX", "g++")
# a product and a sum are rounded apart where PTX has them apart; sums of integers wrap
_FLAGS = ["-std=c++20", "-O2", "-ftree-vectorize", "-march=native", "-ffp-contract=off", "-fwrapv", "-fPIC"]


def missing() -> str:
    """Why the emulator cannot be built here, or ""."""
    if shutil.which(_COMPILER) is None:
        return f"the emulator is built by a C++ compiler, and there is no {_COMPILER} (CXX names another)"
    return ""


def build() -> tuple[pathlib.Path, pathlib.Path]:
    """The driver (`libcuda.so.1`) and the allocator, built anew where a source has changed.

    Raises:
        RuntimeError: There is no compiler, or it refuses the sources.
    """
    if problem := missing():
        raise RuntimeError(problem)
    folder = CACHE / "build"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        # one process builds, others wait for what it builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _driver(folder), _arena(folder)


def _driver(folder: pathlib.Path) -> pathlib.Path:
    headers = b"".join(path.read_bytes() for path in sorted(_SOURCES.glob("*.h")))
    # Triton brings the headers of CUDA; it is not imported here, for whoever builds may set it up later
    include = pathlib.Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "include"
    jobs, objects = [], []
    for source in sorted(_SOURCES.glob("*.cpp")):
        if source.stem == "arena":
            continue
        out = folder / f"{source.stem}-{_key(headers, source.read_bytes())}.o"
        objects.append(str(out))
        if not out.exists():
            part = out.with_suffix(".part")
            command = [_COMPILER, *_FLAGS, "-I", str(include), "-c", str(source), "-o", str(part)]
            jobs.append((subprocess.Popen(command), part, out))
    for job, part, out in jobs:
        if job.wait():
            raise RuntimeError(f"{_COMPILER} does not build the emulator: {out.stem}")
        part.replace(out)
    library = folder / _key("".join(objects).encode()) / "libcuda.so.1"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        _compile(library, "-shared", "-Wl,-soname,libcuda.so.1", *objects)
    return library


def _arena(folder: pathlib.Path) -> pathlib.Path:
    source, site = _SOURCES / "arena.cpp", pathlib.Path(torch.__file__).parent
    library = folder / f"libarena-{_key(source.read_bytes(), torch.__version__.encode())}.so"
    if not library.exists():
        paths = ["-I", str(site / "include"), str(source), "-L", str(site / "lib"), "-lc10"]
        _compile(library, *_FLAGS, "-shared", *paths)
    return library


def _compile(out: pathlib.Path, *arguments: str) -> None:
    # moved to its place when it is whole
    part = out.with_suffix(".part")
    if subprocess.run([_COMPILER, *arguments, "-o", str(part)]).returncode:
        raise RuntimeError(f"{_COMPILER} does not build the emulator: {out.name}")
    part.replace(out)


def _key(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts) + " ".join([_COMPILER, *_FLAGS]).encode()).hexdigest()[:16]
