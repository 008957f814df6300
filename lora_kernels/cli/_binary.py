"""What a compiled kernel is made of, read from its machine code with the tools in Triton's own wheel. No GPU.

NVIDIA's SASS comes from `cuobjdump` and `nvdisasm`, AMD's assembly from the compiler itself, and 32-bit arithmetic on
addresses from Triton's first intermediate form, where the types still stand.
"""

import importlib.util
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Facts", "Loop", "narrow_products", "read"]

_HOPPER_MMA = ("HGMMA", "QGMMA", "IGMMA")
_MMA = (*_HOPPER_MMA, "HMMA", "QMMA", "IMMA", "DMMA", "UTCHMMA", "UTCQMMA")


@dataclass(frozen=True)
class Loop:
    """The K loop: the loop densest in tensor-core instructions."""

    instructions: int
    mma: int
    waits: int
    tma_loads: int
    async_copies: int


@dataclass(frozen=True)
class Facts:
    """Properties of a compiled kernel.

    Attributes:
        registers: A thread.
        spills: Bytes of stack a thread, or instructions that spill where there is no stack.
        shared: Bytes of shared memory a program.
        per_sm: Programs that a multiprocessor holds at once; None where it is not computed.
        mma: Tensor-core instructions by name and shape.
        tma_loads: Instructions that load a tile by descriptor.
        async_copies: Instructions that copy global to shared memory without registers (cp.async).
        loads: Global loads through registers by width in bits, asynchronous copies among them.
        stores: Global stores by width in bits.
        loop: The K loop, where there are tensor-core instructions in one.
        narrow_products: Products in 32 bits, by a run-time value, that reach a pointer.
        tf32: Whether products are rounded to TF32.
        warnings: ptxas warnings that it serialised tensor-core instructions (C75xx).
    """

    registers: int
    spills: int
    shared: int
    per_sm: int | None
    mma: dict[str, int]
    tma_loads: int
    async_copies: int
    loads: dict[int, int]
    stores: dict[int, int]
    loop: Loop | None
    narrow_products: list[str]
    tf32: bool
    warnings: list[str] = field(default_factory=list)


def read(kernel: Any, shared_per_sm: int) -> Facts:
    """Read a compiled kernel, as Triton returns it from a launch.

    Args:
        kernel: Triton's `CompiledKernel`.
        shared_per_sm: Bytes of shared memory of a multiprocessor.
    """
    narrow, _ = narrow_products(kernel.asm["ttir"])
    if "cubin" in kernel.asm:
        return _nvidia(kernel, narrow, shared_per_sm)
    return _amd(kernel, narrow)


def _nvidia(kernel: Any, narrow: list[str], shared_per_sm: int) -> Facts:
    arch = kernel.metadata.target.arch
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "k.cubin"), Path(folder, "k.ptx")
        cubin.write_bytes(kernel.asm["cubin"])
        ptx.write_text(kernel.asm["ptx"])
        usage = _tool("cuobjdump", "-res-usage", cubin)
        sass = _tool("nvdisasm", "-c", cubin)
        warned = (
            _tool("ptxas", f"-arch=sm_{arch}a", ptx, "-o", Path(folder, "o")) if "wgmma" in kernel.asm["ptx"] else ""
        )
    lines, labels = _instructions(sass)
    names = [line.split()[0] for line in lines]
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    by_registers = 65_536 // (-(-registers * 32 // 256) * 256 * warps)
    per_sm = min(by_registers, shared_per_sm // (shared + 1024), 64 // warps, 32)
    starts = Counter(name.split(".")[0] for name in names)
    return Facts(
        registers=registers,
        spills=max(stack, starts["STL"] + starts["LDL"]),
        shared=shared,
        per_sm=per_sm,
        mma=dict(Counter(_shape(name) for name in names if name.startswith(_MMA))),
        tma_loads=starts["UTMALDG"],
        async_copies=starts["LDGSTS"],
        loads=_widths(names, ("LDG", "LDGSTS")),
        stores=_widths(names, ("STG",)),
        loop=_loop(lines, names, labels),
        narrow_products=narrow,
        tf32="tf32" in kernel.asm["ptx"],
        warnings=sorted(set(re.findall(r"\((C75\d\d)\)", warned))),
    )


def _amd(kernel: Any, narrow: list[str]) -> Facts:
    text = kernel.asm["amdgcn"]
    names = re.findall(r"^\s+([a-z]\w+)", text, re.MULTILINE)

    def noted(what: str) -> int:
        found = re.search(rf"\.{what}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    width = {
        "dwordx4": 128,
        "dwordx3": 96,
        "dwordx2": 64,
        "dword": 32,
        "ushort": 16,
        "short": 16,
        "ubyte": 8,
        "byte": 8,
    }

    def widths(verb: str) -> dict[int, int]:
        found = (re.match(rf"(?:global|buffer|flat)_{verb}_(?:\w*?)(dword(?:x\d)?|u?short|u?byte)", n) for n in names)
        return dict(Counter(width[match[1]] for match in found if match))

    return Facts(
        registers=noted("vgpr_count"),
        spills=noted("vgpr_spill_count") + noted("sgpr_spill_count"),
        shared=kernel.metadata.shared,
        per_sm=None,
        mma=dict(Counter(name for name in names if name.startswith("v_mfma"))),
        tma_loads=0,
        async_copies=0,
        loads=widths("load"),
        stores=widths("store"),
        loop=None,
        narrow_products=narrow,
        tf32=any(name.startswith("v_mfma") and name.endswith("xf32") for name in names),
    )


def _tool(name: str, *arguments: object) -> str:
    triton = importlib.util.find_spec("triton")
    path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def _instructions(sass: str) -> tuple[list[str], dict[str, int]]:
    """Instructions without their predicates, and where each label points."""
    lines, labels = [], {}
    for line in map(str.strip, sass.splitlines()):
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(lines)
        elif instruction := re.match(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            lines.append(re.sub(r"^@!?U?P[T\d]+\s+", "", instruction[1]))
    return lines, labels


def _loop(lines: list[str], names: list[str], labels: dict[str, int]) -> Loop | None:
    loops = []
    for end, line in enumerate(lines):
        target = re.search(r"`\((\.L\w+)\)", line)
        if names[end].startswith("BRA") and target and labels.get(target[1], len(lines)) <= end:
            inside = names[labels[target[1]] : end + 1]
            mma = sum(name.startswith(_MMA) for name in inside)
            loops.append((mma / len(inside), mma, inside))
    density, mma, inside = max(loops, default=(0, 0, []), key=lambda loop: loop[0])
    if not density:
        return None

    def count(*starts: str) -> int:
        return sum(name.startswith(starts) for name in inside)

    return Loop(len(inside), mma, count("WARPGROUP.DEPBAR"), count("UTMALDG"), count("LDGSTS"))


def _shape(name: str) -> str:
    """`HGMMA.64x256x16.F32.BF16` as `HGMMA.64x256x16`."""
    parts = name.split(".")
    return ".".join([parts[0], *(part for part in parts[1:] if re.fullmatch(r"\d+(x\d+)*", part))][:2])


def _widths(names: list[str], kinds: tuple[str, ...]) -> dict[int, int]:
    """Global accesses by width; without a width in its name an instruction moves 32 bits."""
    counted: Counter[int] = Counter()
    for name in names:
        first, *parts = name.split(".")
        if first in kinds:
            sizes = {"128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
            counted[next((sizes[part] for part in parts if part in sizes), 32)] += 1
    return dict(counted)


def narrow_products(ttir: str) -> tuple[list[str], int]:
    """Find 32-bit products by a run-time value that reach the offset of a pointer, and count the pointers looked at."""
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
    return sorted(found), len(offsets)
