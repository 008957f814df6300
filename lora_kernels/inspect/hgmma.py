"""A check of Hopper's machine code for writes to registers that a running tensor-core instruction still reads as its A.

A warpgroup's product (HGMMA) reads an A in registers while it runs, up to the wait for its group. PTX forbids writes to
these registers before that wait. ptxas allocates the registers and must obey, but up to CUDA 12.9 it does not always:
triton-lang/triton#11781 has numbers that were wrong on an H100, and NVIDIA's cure in CUDA 13.3.
"""

import re
from typing import NamedTuple

__all__ = ["find_overwrites"]

# An A of 64 rows is four registers a thread, whatever the dtype.
_A = 4
_WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x([0-9a-f]+)")
# These instructions read the register that they name first.
_NO_RESULT = re.compile(r"(ST|STG|STS|STL|STSM|RED|REDG|REDS|LDGSTS|CCTL|UBLKCP|R2UR|R2P|BAR|BRX|JMX)\b")
# These instructions name a predicate before the register.
_PREDICATE_FIRST = re.compile(r"(SHFL|LOP3|ATOM|ATOMG|ATOMS)\b")


class _Instruction(NamedTuple):
    """An instruction.

    Attributes:
        text: The instruction without its guard.
        guarded: Whether the instruction has a guard that can be false.
        label: The target of a branch, or "".
    """

    text: str
    guarded: bool
    label: str


def find_overwrites(sass: str) -> list[str]:
    """Find the instructions that write a register of an A before the wait for its product.

    Args:
        sass: A kernel's machine code, as `nvdisasm -c` prints it.

    Returns:
        A line for each pair of writing instruction and product, with the registers.
    """
    code, labels = _parse(sass)
    found = []
    for start, instruction in enumerate(code):
        operands = _operands(instruction.text)
        if not instruction.text.startswith("HGMMA") or not re.fullmatch(r"R\d+", operands[1]):
            continue
        first = int(operands[1][1:])
        a = set(range(first, first + _A))
        for at in sorted(_in_flight(code, labels, start)):
            if hit := a & _result_registers(code[at].text):
                names = ", ".join(f"R{number}" for number in sorted(hit))
                found.append(f"{code[at].text} writes {names} of {instruction.text}")
    return found


def _parse(sass: str) -> tuple[list[_Instruction], dict[str, int]]:
    code, labels = [], {}
    for line in map(str.strip, sass.splitlines()):
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(code)
        elif match := re.match(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P[T\d]+\s+)?(.*?)\s*;", line):
            guard, text = match.groups()
            target = re.search(r"`\((\.L\w+)\)", text)
            code.append(_Instruction(text, bool(guard) and "@PT" not in guard, target[1] if target else ""))
    return code, labels


def _operands(text: str) -> list[str]:
    return [part.strip() for part in text.partition(" ")[2].split(",")]


def _in_flight(code: list[_Instruction], labels: dict[str, int], start: int) -> set[int]:
    """Return the instructions that can run after a product and before the end of the wait for its group."""
    # The number of groups closed since the product, its own group among them.
    closed = int("gsb0" in code[start].text)
    left, seen = [(after, closed) for after in _next(code, labels, start)], set()
    while left:
        at, closed = left.pop()
        if at >= len(code) or (at, closed) in seen:
            continue
        seen.add((at, closed))
        text = code[at].text
        if (wait := _WAIT.match(text)) and closed > int(wait[1], 16):
            continue
        if text.startswith("HGMMA") and "gsb0" in text:
            # More than eight groups are never in flight.
            closed = min(closed + 1, 8)
        left += [(after, closed) for after in _next(code, labels, at)]
    return {at for at, _ in seen}


def _next(code: list[_Instruction], labels: dict[str, int], at: int) -> list[int]:
    text, guarded, label = code[at]
    name = text.split()[0].split(".")[0]
    if name in ("EXIT", "RET", "KILL") and not guarded:
        return []
    if name in ("BRA", "JMP"):
        # A branch may have conditions of its own, which come before the label.
        always = not guarded and len(_operands(text)) == 1
        return [labels[label]] if always else [labels[label], at + 1]
    return [at + 1]


def _result_registers(text: str) -> set[int]:
    """Return the registers that an instruction writes."""
    if _NO_RESULT.match(text):
        return set()
    operands = _operands(text)
    if re.fullmatch(r"P[T\d]+", operands[0]) and _PREDICATE_FIRST.match(text):
        operands = operands[1:]
    register = re.fullmatch(r"R(\d+)", operands[0])
    if not register:
        return set()
    return set(range(int(register[1]), int(register[1]) + _width(text.split()[0])))


def _width(name: str) -> int:
    """Return the number of registers that an instruction of this name writes."""
    op, *parts = name.split(".")
    if op == "HGMMA":
        columns = int(parts[0].split("x")[1])
        return columns // 2 if "F32" in parts else columns // 4
    if op in ("HMMA", "IMMA", "QMMA"):
        return 4 if "F32" in parts or op == "IMMA" else 2
    if op == "LDSM":
        return int(parts[-1]) if parts[-1] in ("2", "4") else 1
    if "128" in parts:
        return 4
    wide = "64" in parts or "WIDE" in parts or re.fullmatch(r"D(ADD|MUL|FMA|MNMX)", op)
    return 2 if wide or name == "CS2R" else 1
