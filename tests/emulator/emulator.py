"""Triton's own launcher over a CUDA driver that is an emulator: tensors are CPU tensors, launches are executed.

from emulator import emulator         # before Triton is imported; `tests` is on the path
emu = emulator.Emulator("sm_90")      # builds and loads the libraries; once a process
with emu.running():
    ...                               # lora_linear(..., backend="triton") and the like, on CPU tensors
emu.problems(), emu.launches()
"""

import contextlib
import ctypes
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, MutableSet

from emulator import build

# of its own: under the keys of machine code there is PTX here
os.environ["TRITON_CACHE_DIR"] = str(build.CACHE / f"cache-{importlib.metadata.version('triton')}")
os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
# the torch backend's bf16 products, as tests/conftest.py has them: AMX reads NaN between the rows of slices
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

import triton
from triton.backends.nvidia import compiler
from triton.backends.nvidia import driver as nvidia

__all__ = ["EARLY", "LATE", "MODES", "RANDOM", "Emulator"]

EARLY, LATE, RANDOM = range(3)
MODES = {"early": EARLY, "late": LATE, "random": RANDOM}


class Emulator:
    """The emulator of this process.

    Args:
        arch: "sm_80", "sm_90".
        sms: Multiprocessors that launchers are told of: few, so that persistent loops go round.
        path: A checkout whose `lora_kernels` is taken.
    """

    def __init__(self, arch: str = "sm_90", sms: int = 3, path: str = ".") -> None:
        core, arena = build.build()
        self.lib = ctypes.CDLL(str(core), ctypes.RTLD_GLOBAL)
        for name in ("emu_problems", "emu_launches", "emu_source", "emu_reached"):
            getattr(self.lib, name).restype = ctypes.c_char_p
        self.lib.emu_arena.argtypes = [*[ctypes.c_void_p] * 3, ctypes.c_uint64, ctypes.c_void_p]
        self.lib.emu_set.argtypes = [ctypes.c_char_p, ctypes.c_long]
        triton.knobs.nvidia.libcuda_path = str(core.parent)
        self._install(ctypes.CDLL(str(arena)))
        # plants faults
        self.edit = lambda name, ptx: ptx
        self.edits = 0
        # a module is its PTX
        compiler.CUDABackend.make_cubin = lambda _, src, *rest: src.encode() + b"\0"
        if path not in sys.path:
            sys.path.insert(0, path)
        from lora_kernels import plan
        from lora_kernels.kernels import _imagined

        # lets CPU tensors through to the launchers
        plan.backend.is_interpreting = lambda: True
        at = _imagined.GPUS[arch]
        self.gpu = type(at)(arch, sms, at.shared, at.shared_per_sm, 7 if arch == "sm_80" else 8)
        self.set(arch=int(arch[3:]), sms=sms)

    def _install(self, arena: ctypes.CDLL) -> None:
        """Have PyTorch allocate in the arena, and tell the emulator its bounds."""
        places = arena.arena_at, arena.arena_flags, arena.arena_since
        for place in places:
            place.restype = ctypes.c_void_p
        arena.arena_bytes.restype = ctypes.c_size_t
        ours = self.lib.emu_pending, self.lib.emu_drain, self.lib.emu_freed
        arena.arena_install(*(ctypes.cast(f, ctypes.c_void_p) for f in ours))
        keep_off = ctypes.cast(arena.arena_protect, ctypes.c_void_p)
        self.lib.emu_arena(*(f() for f in places), arena.arena_bytes(), keep_off)
        self.arena = arena

    def set(self, **options: int) -> None:
        """Set mode (EARLY, LATE, RANDOM), seed, resident, quantum, race, weak or registers: `Options` in machine.h."""
        self.lib.emu_drain()
        for name, value in options.items():
            self.lib.emu_set(name.encode(), int(value))

    @contextlib.contextmanager
    def running(self) -> Iterator[list]:
        """Launches of the project's kernels, and of any other Triton function, go to the emulator; yields them."""
        from lora_kernels.kernels._imagined import imagine

        with imagine(self.gpu, nvidia.CudaLauncher) as launched:
            utils = nvidia.CudaUtils()
            load = nvidia.CudaUtils.__dict__.get("stock_load") or utils.load_binary
            nvidia.CudaUtils.stock_load = load
            utils.load_binary = lambda name, binary, *rest: load(name, self._edited(name, binary), *rest)
            triton.runtime.driver.active.utils = utils
            yield launched
            self.lib.emu_drain()

    def _edited(self, name: str, binary: bytes) -> bytes:
        text = binary.decode().rstrip("\0")
        changed = self.edit(name, text)
        self.edits += changed != text
        return changed.encode() + b"\0"

    def drain(self) -> None:
        """Run all that was launched."""
        self.lib.emu_drain()

    def serialise(self, seen: MutableSet[int]) -> list[str]:
        """Ask ptxas which kernels' wgmma it waits for one by one, and run these so from here on; their names.

        It does where registers are used that a wgmma in flight has, which PTX forbids and it repairs.
        """
        found = []
        for i in set(range(self.lib.emu_modules())) - seen:
            seen.add(i)
            source = self.lib.emu_source(i).decode()
            if not re.search(r"wgmma\.wait_group\.sync\.aligned [1-9]", source):
                continue
            with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
                file.write(source)
                file.flush()
                command = [compiler.get_ptxas(90).path, "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
                said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            if "serialized" in said:
                self.lib.emu_serialise(i)
                found.append(re.search(r"\.entry (\w+)", source)[1])
        return found

    def problems(self) -> list[str]:
        """What was seen since the last call, but for wrong numbers."""
        return self.lib.emu_problems().decode().splitlines()

    def launches(self) -> list[dict]:
        """Counters of each launch since the last call."""
        return [json.loads(line) for line in self.lib.emu_launches().decode().splitlines()]
