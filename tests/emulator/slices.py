"""Whether a change of one value comes to nothing: the values that follow from it, computed a second time beside the first.

From a changed instruction on, everything that is computed from what it gives is computed twice: from the old value and
from the new, loads from either address among it. Where the values come to be used (an address or data of a store or an
asynchronous copy, a branch, a guard, a comparison), a store to nowhere tells if the two differ in a lane that uses them.
If that store never runs, nothing depends on the change, however different the values on the way were. A wgmma is one of
those values: its second product is of the same group, so the same wait is for both.

Through shared memory nothing is followed. But a number can be stored there wherever the two values differ: if no result
changes, whatever that number is, then nothing that comes of these places is used.
"""

import re
from typing import NamedTuple

__all__ = ["REGISTER", "Statement", "bits_of", "doubled", "given", "number", "statement", "tell", "tell_among"]

REGISTER = re.compile(r"%(?P<prefix>[a-z]+)\d+")
_STATEMENT = re.compile(r"^\s*(?:@(?P<not>!?)(?P<guard>%p\d+)\s+)?(?P<op>[a-z][\w.:]*)\s+(?P<rest>[^;]*);\s*(?://.*)?$")
# what uses values and gives none that can be computed twice
_USES = re.compile(
    r"(st|atom|red|cp|bra|ret|bar|fence|mbarrier|wgmma\.(?!mma)|griddepcontrol|stmatrix|elect|trap|prefetch)\b"
)


class Statement(NamedTuple):
    """A statement of PTX in pieces.

    Attributes:
        guard: Its predicate, or "".
        negated: Whether it runs where the predicate is false.
        op: Such as "add.s32".
        rest: The operands.
    """

    guard: str
    negated: bool
    op: str
    rest: str

    def text(self, rest: str) -> str:
        """The statement with other operands."""
        return f"{'@' + '!' * self.negated + self.guard + ' ' if self.guard else ''}{self.op} {rest};"


def statement(line: str) -> Statement | None:
    """A line's statement; None where it has none, or several."""
    match = _STATEMENT.match(line)
    return match and Statement(match["guard"] or "", bool(match["not"]), match["op"], match["rest"])


def given(one: Statement) -> list[str]:
    """The registers that a statement writes: its first operand."""
    if re.match(r"(st|stmatrix|cp|bra|red|bar|mbarrier|fence|wgmma\.(?!mma)|griddepcontrol|ret)\b", one.op):
        return []
    first = one.rest[: one.rest.index("}")] if one.rest.startswith("{") else one.rest.split(",")[0]
    return [match[0] for match in REGISTER.finditer(first)]


def number(register: str, bits: int) -> int:
    """What a register of a kind holds of 32 bits."""
    return {"p": bits & 64 and 1, "rs": bits & 0xFFFF, "rd": bits << 32 | bits}.get(
        REGISTER.match(register)["prefix"], bits
    )


def bits_of(register: str) -> str:
    """The type of a register in a declaration or a move, by its name."""
    return {"p": "pred", "rs": "b16", "h": "b16", "rd": "b64"}.get(REGISTER.match(register)["prefix"], "b32")


def tell(value: str, other: str, number: int = 0) -> list[str]:
    """Statements that store to nowhere in lanes where two registers, or a register and a number, differ."""
    at = 980_000 + 10 * number
    if REGISTER.match(value)["prefix"] == "p":
        numbers = f"%r{at}", f"%r{at + 1}"
        return [*(f"selp.b32 {n}, 1, 0, {p};" for n, p in zip(numbers, (value, other), strict=True)), *tell(*numbers)]
    return [f"setp.ne.{bits_of(value)} %p{at}, {value}, {other};", f"@%p{at} st.global.b32 [0], %r{at};"]


def tell_among(guard: str, negated: bool, value: str, other: str) -> list[str]:
    """Likewise, only in lanes that a guard lets through; of "" that is all."""
    checks = tell(value, other)
    if not guard:
        return checks
    differs = re.match(r"@(%p\d+)", checks[-1])[1]
    return [
        *checks[:-1], f"selp.b32 %r980006, {'0, 1' if negated else '1, 0'}, {guard};",
        f"selp.b32 %r980007, %r980006, 0, {differs};", *tell("%r980007", "0", 2),
    ]  # fmt: skip


def doubled(lines: list[str], at: int, new: str, rubbish: int | None = None) -> str | None:
    """The PTX with all that follows from a line computed as from another as well; None where that cannot be done.

    Args:
        lines: Of the PTX.
        at: Which of them is changed, from 0.
        new: What it becomes.
        rubbish: 32 bits, stored to shared memory in place of a value that differs; if None a difference is told there
            as well.
    """
    parsed, changed = [statement(line) for line in lines], statement(new)
    old = parsed[at]
    if not old or not changed or _USES.match(old.op) or not given(old) or given(old) != given(changed):
        return None
    second = set(given(old))
    while (
        grown := {
            register
            for one in parsed
            if one and not _USES.match(one.op) and not one.op.startswith("setp") and second & _read(one)
            for register in given(one)
        }
        - second
    ):
        second |= grown

    def renamed(text: str) -> str:
        return REGISTER.sub(
            lambda m: f"%{m['prefix']}9{m[0][1 + len(m['prefix']) :]:0>6}" if m[0] in second else m[0], text
        )

    out = []
    for number, (line, one) in enumerate(zip(lines, parsed, strict=True)):
        if number == at:
            out += [renamed(changed.text(changed.rest)), line]
        elif not one:
            if second & set(m[0] for m in REGISTER.finditer(line)) and not line.strip().startswith((".", "//")):
                return None
            out.append(line)
        else:
            out += _both(line, one, second, renamed, rubbish)
    return "\n".join(out)


def _read(one: Statement) -> set[str]:
    """The registers that a statement reads."""
    names = [match[0] for match in REGISTER.finditer(one.rest)]
    # wgmma adds to what it gives
    return set(names if one.op.startswith("wgmma") else names[len(given(one)) :]) | {one.guard}


def _both(line: str, one: Statement, second: set[str], renamed, rubbish: int | None) -> list[str]:
    """A line, and what it takes beside it for the second values."""
    reads, gives = second & _read(one), second & set(given(one))
    guarded = one.guard in second
    checks = tell(one.guard, renamed(one.guard)) if guarded and (_USES.match(one.op) or not given(one)) else []
    reads.discard(one.guard)
    if rubbish is not None and re.match(r"st\.shared|stmatrix", one.op):
        address, data = one.rest.split("]", 1)
        checks += [
            check
            for m in REGISTER.finditer(address) if m[0] in reads
            for check in tell_among(one.guard, one.negated, m[0], renamed(m[0]))
        ]  # fmt: skip
        stored = {m[0]: f"%{m['prefix']}95{m[0][1 + len(m['prefix']) :]:0>5}" for m in REGISTER.finditer(data)}
        for register in sorted(reads & stored.keys()):
            bits, differs = bits_of(register), f"%p95{register[3 if register[2].isalpha() else 2 :]:0>5}"
            checks.append(f"setp.ne.{bits} {differs}, {register}, {renamed(register)};")
            checks.append(f"selp.{bits} {stored[register]}, {number(register, rubbish)}, {register}, {differs};")
        data = REGISTER.sub(lambda m: stored[m[0]] if m[0] in reads else m[0], data)
        return [*checks, one.text(f"{address}]{data}")]
    if _USES.match(one.op):
        for register in sorted(reads):
            checks += tell_among(one.guard, one.negated, register, renamed(register))
        return [
            *checks,
            line,
            *(f"mov.{bits_of(register)} {renamed(register)}, {register};" for register in sorted(gives)),
        ]
    if one.op.startswith("setp") and reads and not gives:
        result = given(one)[0]
        compared = f"%p97{result[2:]:0>5}"
        other = one.text(compared + renamed(one.rest)[len(result) :])
        return [*checks, other, line, *tell_among(one.guard, one.negated, result, compared)]
    return [*checks, renamed(one.text(one.rest)), line] if reads or gives or guarded else [*checks, line]
