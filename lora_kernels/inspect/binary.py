"""Properties of a compiled kernel, read from its machine code with the tools in Triton's own wheel. No GPU is needed.

NVIDIA's SASS comes from `cuobjdump` and `nvdisasm`, and AMD's assembly from the compiler itself. 32-bit arithmetic on
addresses is read from Triton's first intermediate form (TTIR), which still has the types.
"""

import importlib
import importlib.util
import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_kernels.inspect.hgmma import find_overwrites
from lora_kernels.inspect.pipeline import taken_both_ways

__all__ = ["BinaryFacts", "Loop", "late_stores", "narrow_products", "read"]

# Products and sums of fp32 with one rounding, on NVIDIA and on AMD.
_CONTRACTED = ("FFMA", "v_fma_f32", "v_fmac_f32", "v_pk_fma_f32", "v_mad_f32", "v_mac_f32")
_FILLING = ("NOP", "BRA")
_MMA = ("HGMMA", "QGMMA", "IGMMA", "HMMA", "QMMA", "IMMA", "DMMA", "UTCHMMA", "UTCQMMA", "v_mfma")


@dataclass(frozen=True)
class Loop:
    """The K loop: the innermost loop that does most of the tensor cores' work.

    Attributes:
        instructions: Number of all instructions.
        mma: Tensor-core instructions.
        arrives: Number of times that the loop begins asynchronous tensor-core instructions of Hopper.
        waits: Number of times that the loop waits for those instructions.
        tma_loads: Tiles loaded by descriptor.
        async_copies: Copies from global to shared memory that pass no register (cp.async).
        loads: Global loads by width in bits, asynchronous copies among them.
    """

    instructions: int
    mma: int
    arrives: int
    waits: int
    tma_loads: int
    async_copies: int
    loads: dict[int, int]


@dataclass(frozen=True)
class BinaryFacts:
    """Properties of a compiled kernel.

    Attributes:
        registers: Registers per thread.
        spills: Bytes of spill memory per thread.
        shared: Bytes of shared memory per program.
        per_sm: Programs that a multiprocessor holds at once.
        mma: Tensor-core instructions by name and shape.
        tma_loads: Instructions that load a tile by descriptor.
        async_copies: Instructions that copy global to shared memory and pass no register (cp.async).
        loads: Global loads by width in bits, asynchronous copies among them.
        stores: Global stores by width in bits.
        loop: The K loop, or None if no loop has tensor-core instructions.
        narrow_products: Products in 32 bits, by a run-time value, that reach a pointer.
        tf32: Whether products are rounded to TF32.
        dependent: Use of programmatic dependent launch: the kernel "waits" before it touches memory, "waits to write"
            but not to read, "waits late", only "releases" the launch after it, or "".
        warnings: ptxas warnings that it serialised tensor-core instructions (C75xx).
        both_ways: Buffered tiles that tensor cores read from shared memory and that are loaded into registers as well.
        overwritten: Instructions that write a register of an operand that Hopper's tensor cores may still read.
        late_stores: Barriers before an atomic that do not wait for each wave's own stores, on AMD.
        instructions: All instructions of a thread that takes no branch, without those that fill the end.
        contracted: Instructions that multiply and add fp32 with one rounding.
    """

    registers: int
    spills: int
    shared: int
    per_sm: int
    mma: dict[str, int]
    tma_loads: int
    async_copies: int
    loads: dict[int, int]
    stores: dict[int, int]
    loop: Loop | None
    narrow_products: list[str]
    tf32: bool
    dependent: str = ""
    warnings: list[str] = field(default_factory=list)
    both_ways: list[str] = field(default_factory=list)
    overwritten: list[str] = field(default_factory=list)
    late_stores: int = 0
    instructions: int = 0
    contracted: int = 0


def read(kernel: Any, shared_per_sm: int) -> BinaryFacts:
    """Read a compiled kernel, as Triton returns it from a launch.

    Args:
        kernel: Triton's `CompiledKernel`.
        shared_per_sm: Bytes of shared memory of a multiprocessor.
    """
    narrow = narrow_products(kernel.asm["ttir"])
    if "cubin" in kernel.asm:
        return _nvidia(kernel, narrow, shared_per_sm)
    return _amd(kernel, narrow, shared_per_sm)


def _nvidia(kernel: Any, narrow: list[str], shared_per_sm: int) -> BinaryFacts:
    arch, ptx = kernel.metadata.target.arch, kernel.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        cubin, source = Path(folder, "k.cubin"), Path(folder, "k.ptx")
        cubin.write_bytes(kernel.asm["cubin"])
        source.write_text(ptx)
        usage = _tool("cuobjdump", "-res-usage", cubin)
        sass = _tool("nvdisasm", "-c", cubin)
        said = _ptxas_messages(source, arch) if "wgmma" in ptx else ""
    lines, labels = _instructions(sass)
    names = [line.split()[0] for line in lines]
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    by_registers = 65_536 // (-(-registers * 32 // 256) * 256 * warps)
    starts = Counter(name.split(".")[0] for name in names)
    targets = [(i, re.search(r"`\((\.L\w+)\)", line)) for i, line in enumerate(lines) if line.startswith("BRA")]
    return BinaryFacts(
        registers=registers,
        spills=max(stack, starts["STL"] + starts["LDL"]),
        shared=shared,
        per_sm=min(by_registers, shared_per_sm // (shared + 1024), 64 // warps, 32),
        mma=dict(Counter(_shape(name) for name in names if name.startswith(_MMA))),
        tma_loads=starts["UTMALDG"],
        async_copies=starts["LDGSTS"],
        loads=_widths(names, ("LDG", "LDGSTS")),
        stores=_widths(names, ("STG",)),
        loop=_loop(names, [(labels[to[1]], end) for end, to in targets if to and labels.get(to[1], end + 1) <= end]),
        narrow_products=narrow,
        tf32="tf32" in ptx,
        dependent=_dependent(ptx),
        warnings=sorted(set(re.findall(r"\((C75\d\d)\)", said))),
        both_ways=taken_both_ways(kernel.asm["ttgir"]),
        overwritten=find_overwrites(sass),
        instructions=sum(not name.startswith(_FILLING) for name in names),
        contracted=sum(name.startswith(_CONTRACTED) for name in names),
    )


def _dependent(ptx: str) -> str:
    """Classify the wait for the launch before, because memory that is read before the wait may not be written yet."""
    wait = ptx.find("griddepcontrol.wait")
    release = ptx.find("griddepcontrol.launch_dependents")
    if wait < 0:
        return "releases" if release >= 0 else ""
    before = ptx[:wait]
    if 0 <= release < wait or re.search(
        r"\b(st\.global|atom\.|red\.|cp\.async\.bulk\.tensor\S*\.global\.shared)", before
    ):
        return "waits late"
    return "waits to write" if re.search(r"\b(cp\.async|ld\.global)", before) else "waits"


def _amd(kernel: Any, narrow: list[str], shared_per_sm: int) -> BinaryFacts:
    names, labels, targets = [], {}, []
    for line in kernel.asm["amdgcn"].splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(names)
        elif instruction := re.match(r"\s+([a-z]\w+)(?:\s+(\.LBB\w+))?", line):
            if instruction[2] in labels and instruction[1].startswith(("s_branch", "s_cbranch")):
                targets.append((labels[instruction[2]], len(names)))
            names.append(instruction[1])

    def figure(what: str) -> int:
        return int(re.search(rf"\.{what}:\s+(\d+)", kernel.asm["amdgcn"])[1])

    registers, shared = figure("vgpr_count"), kernel.metadata.shared
    # Waves of four SIMDs with 512 registers a lane each.
    waves = 4 * min(8, 512 // max(8, -(-registers // 8) * 8))
    return BinaryFacts(
        registers=registers,
        # Count memory alone. Scalars spilled to lanes of a vector register take no memory.
        spills=figure("private_segment_fixed_size"),
        shared=shared,
        per_sm=min(waves // kernel.metadata.num_warps, shared_per_sm // max(shared, 1)),
        mma=dict(Counter(name for name in names if name.startswith(_MMA))),
        tma_loads=0,
        async_copies=0,
        loads=_widths(names, ("load",)),
        stores=_widths(names, ("store",)),
        loop=_loop(names, targets),
        narrow_products=narrow,
        tf32=any(name.startswith("v_mfma") and name.endswith("xf32") for name in names),
        late_stores=late_stores(kernel.asm["amdgcn"]),
        instructions=len(names),
        contracted=sum(name.startswith(_CONTRACTED) for name in names),
    )


def late_stores(amdgcn: str) -> int:
    """Count the barriers before an atomic at which stores of a wave may still be in flight.

    The atomic waits for stores of its own wave alone. A reader that sees the atomic also sees the stores of the other
    waves only if each wave has waited before the barrier in front of the atomic: by `s_waitcnt vmcnt(0)` on CDNA, by
    `s_waitcnt_vscnt null, 0x0` on RDNA 3 and by `s_wait_storecnt 0x0` on RDNA 4.
    """
    late, waited, at_barrier = 0, True, True
    for line in map(str.strip, amdgcn.splitlines()):
        if re.match(r"(global|buffer|flat)_store", line):
            waited = False
        elif re.match(r"s_waitcnt\b.*vmcnt\(0\)|s_waitcnt_vscnt null, 0x0|s_wait_storecnt 0x0", line):
            waited = True
        elif line.startswith("s_barrier"):
            at_barrier = waited
        elif re.match(r"(global|buffer|flat)_atomic", line):
            late += not at_barrier
    return late


def _ptxas_messages(source: Path, arch: int) -> str:
    """Assemble a kernel again and return the messages of ptxas, because Triton does not keep them."""
    # Triton has several ptxas; take the one for the architecture.
    ptxas = importlib.import_module("triton.backends.nvidia.compiler").get_ptxas(arch).path
    command = [ptxas, "-v", f"-arch=sm_{arch}a", source, "-o", source.with_suffix(".o")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def _tool(name: str, *arguments: object) -> str:
    triton = importlib.util.find_spec("triton")
    path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def _instructions(sass: str) -> tuple[list[str], dict[str, int]]:
    """Return the instructions without their predicates, and the instruction number of each label."""
    lines, labels = [], {}
    for line in map(str.strip, sass.splitlines()):
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(lines)
        elif instruction := re.match(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            lines.append(re.sub(r"^@!?U?P[T\d]+\s+", "", instruction[1]))
    return lines, labels


def _loop(names: list[str], spans: list[tuple[int, int]]) -> Loop | None:
    """Find the K loop among loops, given as first and last instruction."""
    innermost: list[tuple[int, int]] = []
    # Visit inner loops first, because a loop is longer than the loops inside it.
    for a, b in sorted(set(spans), key=lambda span: span[1] - span[0]):
        apart = all(b < c or d < a for c, d in innermost)
        if apart and any(name.startswith(_MMA) for name in names[a : b + 1]):
            innermost.append((a, b))
    if not innermost:
        return None
    inside = max((names[a : b + 1] for a, b in innermost), key=lambda loop: sum(map(_multiply_adds, loop)))

    def count(*starts: str) -> int:
        return sum(name.startswith(starts) for name in inside)

    return Loop(
        instructions=len(inside), mma=count(*_MMA), arrives=count("WARPGROUP.ARRIVE"), waits=count("WARPGROUP.DEPBAR"),
        tma_loads=count("UTMALDG"), async_copies=count("LDGSTS"), loads=_widths(inside, ("LDG", "LDGSTS", "load")),
    )  # fmt: skip


def _multiply_adds(name: str) -> int:
    """Return the multiply-adds of a tensor-core instruction by its name, 1 for a name without a shape, 0 for others."""
    sides = re.search(r"(\d+)x(\d+)x(\d+)", name)
    return name.startswith(_MMA) * (math.prod(map(int, sides.groups())) if sides else 1)


def _shape(name: str) -> str:
    """Shorten `HGMMA.64x256x16.F32.BF16` to `HGMMA.64x256x16`."""
    parts = name.split(".")
    return ".".join([parts[0], *(part for part in parts[1:] if re.fullmatch(r"\d+(x\d+)*", part))][:2])


_NVIDIA_BITS = {"128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
_AMD_BITS = {
    "dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "short": 16, "ubyte": 8, "byte": 8,
}  # fmt: skip


def _widths(names: list[str], kinds: tuple[str, ...]) -> dict[int, int]:
    """Count global accesses by width in bits: LDG, LDGSTS and STG on NVIDIA, loads and stores on AMD."""
    counted: Counter[int] = Counter()
    for name in names:
        first, *parts = name.split(".")
        if first in kinds:
            # An instruction without a width in its name moves 32 bits.
            counted[next((_NVIDIA_BITS[part] for part in parts if part in _NVIDIA_BITS), 32)] += 1
        elif amd := re.match(r"(?:global|buffer|flat)_(load|store)_(.+)", name):
            widths = [part for part in amd[2].split("_") if part in _AMD_BITS]
            if amd[1] in kinds and widths:
                counted[_AMD_BITS[widths[0]]] += 1
    return dict(sorted(counted.items(), reverse=True))


def narrow_products(ttir: str) -> list[str]:
    """Find 32-bit products by a run-time value that reach the offset of a pointer."""
    definitions = {}
    for line in ttir.splitlines():
        if match := re.match(r"\s*(%[\w#:]+) = \"?([\w.]+)\"?(.*)", line):
            definitions[match[1].split(":")[0]] = (match[2], re.findall(r"%[\w]+(?:#\d+)?", match[3]), line.strip())

    def constant(name: str) -> bool:
        op, operands, _ = definitions.get(name, ("", [], ""))
        return op == "arith.constant" or (op in ("tt.splat", "arith.extsi") and constant(operands[0]))

    passes_on = ("arith.muli", "arith.addi", "arith.subi", "arith.extsi", "arith.select", "tt.splat", "tt.broadcast")
    found: set[str] = set()

    def walk(name: str, seen: set[str], visit: Callable[[str], None]) -> None:
        if name in seen or name not in definitions:
            return
        seen.add(name)
        op, operands, line = definitions[name]
        if op == "arith.muli" and re.search(r": (tensor<[\dx]*i32>|i32)", line) and not any(map(constant, operands)):
            visit(line)
        if op in (*passes_on, "tt.expand_dims"):
            for operand in operands:
                walk(operand, seen, visit)

    offsets = [operands[1] for op, operands, _ in definitions.values() if op == "tt.addptr"]
    for offset in offsets:
        walk(offset, set(), found.add)
    return sorted(found)
