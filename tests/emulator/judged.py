"""Faults that were missed, judged: what proves that a fault changes no result.

Three proofs. The second value: all that follows from the changed instruction is computed as without the change as well,
and a store to nowhere tells if ever the two differ where they are used (`slices.py`). The dead value: in place of what
the instruction gives or stores come numbers that mean nothing, and no result changes; or these come where the two values
differ, on their way through shared memory. For what only orders (waits, fences, barriers, atomics) there is no value to
look at: the emulator itself watches each pair of accesses that it could order, so its silence in many more orders of
warps, CTAs and asynchronous work says that this one orders nothing that another does not.
"""

import re
from collections.abc import Iterator

from emulator.planted import Fault
from emulator.slices import REGISTER, Statement, bits_of, doubled, given, number, statement, tell, tell_among

__all__ = ["ORDERS", "proofs"]

# what only orders, and what its being of no effect means
ORDERS = {
    "barrier: none": "between the barriers beside it no two warps touch the same bytes, one of them writing",
    "cp.async: no wait": "nothing reads what is copied before another wait for it",
    "cp.async: waits for a group less": "nothing reads what that group copies before another wait for it",
    "cp.async: no commit": "the copies are waited for with those of another group before anything reads them",
    "fence.proxy.async: none": "another fence lies between what is written and who reads it",
    "wgmma: no fence": "no register of it was written since another fence",
    "wgmma: no wait": "nothing uses what is summed or read before another wait for it",
    "wgmma: waits for a group less": "nothing uses what that group sums or reads before another wait for it",
    "wgmma: no commit": "the products are waited for with those of another group",
    "TMA: a store not waited for": "nothing writes what it reads before another wait for it",
    "TMA: a store not committed": "the copies are waited for with those of another group",
    "grid: no wait": "nothing that a launch before may still touch is touched until another wait",
    "grid: lets dependents in before it waits": "dependents touch nothing of the launches before",
    "atomic: relaxed": "no CTA touches what another one stored",
    "atomic: only acquires": "no CTA touches what another one stored",
    "atomic: only releases": "no CTA touches what another one stored",
    "atomic: among its CTA alone": "no CTA touches what another one stored",
}  # fmt: skip

# bits that are NaN in 16 and 32 bits; bits that are finite numbers
_RUBBISH = 0x7FC07FC0, 0x41424344
_NUMBERS = 0x41424344, 0xC2C3C4C5


def proofs(source: str, fault: Fault) -> Iterator[tuple[str, list[str]]]:
    """What a fault's changing nothing is proven by, with the programs of which none may go wrong then.

    What only orders has none beside "it never runs": `ORDERS` says what it means that no order shows it.

    Args:
        source: The PTX without the fault.
        fault: What was planted and not noticed.
    """
    lines = source.split("\n")
    at = fault.line - 1
    new = fault.text.split("\n")[at : at + 1 + fault.text.count("\n") - source.count("\n")]

    def program(*statements: str) -> str:
        return "\n".join([*lines[:at], "\n".join(statements), *lines[at + 1 :]])

    was = statement(lines[at])
    if was and was.guard:
        yield "it never runs", [program(was._replace(op="st.global.b32").text("[0], %r980000"), lines[at])]
    if fault.kind in ORDERS:
        return
    if was and was.op.startswith("cp.async.c"):
        yield "nobody reads what it copies", [program("")]
        if "mask" in fault.kind:
            for step in (64, -64):
                yield "any number where it differs is multiplied by 0", [program(*_elsewhere(was, step))]
    if was and was.op.startswith("wgmma.mma_async"):
        yield "its product adds nothing", [program("")]
    if check := _condition(lines[at], fault.kind):
        yield "what it changes is the same each time it runs", [program(*check, lines[at])]
    if len(new) == 1 and (twice := doubled(lines, at, new[0])):
        yield "what is computed from it is used nowhere that it differs", [twice]
        yield "where it differs it reaches no result", [doubled(lines, at, new[0], bits) for bits in _RUBBISH]
        yield "any number where it differs is multiplied by 0", [doubled(lines, at, new[0], bits) for bits in _NUMBERS]
    dead = [_dead(lines[at], bits) for bits in _RUBBISH]
    if all(dead):
        yield "what it gives reaches no result", [program(*statements) for statements in dead]


def _dead(old: str, rubbish: int) -> list[str] | None:
    """The instruction with rubbish in place of what it gives or stores; None where it does neither."""
    was = statement(old)
    if not was or re.match(r"cp\.|bra|atom|red|mbarrier|wgmma|bar\.|griddep", was.op):
        return None
    if re.match(r"st\.|stmatrix", was.op):
        address, data = was.rest.split("]", 1)
        used = dict.fromkeys(match["prefix"] for match in REGISTER.finditer(data))
        head = [f"mov.{bits_of(f'%{prefix}0')} %{prefix}960000, {number(f'%{prefix}0', rubbish)};" for prefix in used]
        return [*head, was.text(f"{address}]" + REGISTER.sub(lambda m: f"%{m['prefix']}960000", data))]
    moves = [was._replace(op=f"mov.{bits_of(one)}").text(f"{one}, {number(one, rubbish)}") for one in given(was)]
    return [old, *moves] if moves else None


def _elsewhere(was: Statement, step: int) -> list[str]:
    """A cp.async that copies from some bytes further on where its mask forbids to read."""
    to, at, size, read = re.fullmatch(r"(.*\]), \[ *(%rd\d+) \+ 0 *\], (0x\w+|\d+), (%r\d+)", was.rest).groups()
    return [
        f"add.s64 %rd980001, {at}, {step};", f"setp.eq.b32 %p980001, {read}, 0;",
        f"selp.b64 %rd980002, %rd980001, {at}, %p980001;", was.text(f"{to}, [ %rd980002 + 0 ], {size}"),
    ]  # fmt: skip


def _condition(old: str, kind: str) -> list[str] | None:
    """Statements that store to nowhere unless the old instruction does what the changed one does."""
    was = statement(old)
    if kind.endswith("without its mask"):
        return [f"@{'' if was.negated else '!'}{was.guard} st.global.b32 [0], %r980000;"]
    if kind == "cp.async: reads what its mask forbids":
        size, read = re.search(r", (0x\w+|\d+), (%r\d+);", old).groups()
        return tell_among(was.guard, was.negated, read, str(int(size, 0)))
    if kind == "mbarrier: always one parity":
        return [f"and.b32 %r980005, {re.search(r', (%r[0-9]+);', old)[1]}, 1;", *tell("%r980005", "1")]
    if kind == "TMA: coordinates swapped":
        return tell_among(was.guard, was.negated, *re.search(r"\{(%r\d+), (%r\d+)\}", old).groups())
    if kind in ("wgmma: begins at 0", "wgmma: goes on from what is there"):
        return _sums(old, begins=kind == "wgmma: begins at 0")
    return None


def _sums(old: str, begins: bool) -> list[str]:
    """Likewise of a product's scale of what is there: where the two do not agree, what is there has to be 0."""
    scale = re.search(r"%rd\d+, (%p\d+|[01]), 1", old)[1]
    if scale.startswith("%"):
        checks = [f"selp.b32 %r980001, {'1, 0' if begins else '0, 1'}, {scale};"]
    else:
        checks = ["mov.b32 %r980001, 1;"]
    for one in re.search(r"\{(.*?)\}", old)[1].split(","):
        # 0 and -0 are the same sum
        checks += [f"and.b32 %r980002, {one.strip()}, 2147483647;", "setp.ne.b32 %p980003, %r980002, 0;"]
        checks += ["selp.b32 %r980004, %r980001, 0, %p980003;", *tell("%r980004", "0", 1)]
    return checks
