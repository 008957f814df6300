"""Faults that were missed, judged: what proves that a fault changes no result.

Three proofs. The twin: the changed instruction runs beside the one in its place, into registers of its own, and a store
to nowhere tells if ever a value differs. The dead value: in place of what the instruction gives or stores come numbers
that mean nothing, and no result changes. For what only orders (waits, fences, barriers, atomics) there is no value to
look at: the emulator itself watches each pair of accesses that it could order, so its silence in many more orders of
warps, CTAs and asynchronous work says that this one orders nothing that another does not.
"""

import re
from collections.abc import Iterator

from emulator.planted import Fault

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

_STATEMENT = re.compile(r"^\s*(?P<guard>@!?%p\d+\s+)?(?P<op>[\w.:]+)\s+(?P<rest>.*);\s*(?://.*)?$")
_REGISTER = re.compile(r"%(?P<prefix>[a-z]+)\d+")
# bits that are NaN in 16 and 32 bits; bits that are finite numbers
_RUBBISH = 0x7FC07FC0, 0x41424344


def proofs(source: str, fault: Fault) -> Iterator[tuple[str, list[str]]]:
    """What a fault's changing nothing is proven by, with the programs of which none may go wrong then.

    Args:
        source: The PTX without the fault.
        fault: What was planted and not noticed.
    """
    if fault.kind in ORDERS:
        yield ORDERS[fault.kind], [fault.text]
        return
    lines = source.split("\n")
    at = fault.line - 1
    new = fault.text.split("\n")[at : at + 1 + fault.text.count("\n") - source.count("\n")]

    def program(*statements: str) -> str:
        return "\n".join([*lines[:at], "\n".join(statements), *lines[at + 1 :]])

    if check := _condition(lines[at], fault.kind):
        yield "what it changes is the same each time it runs", [program(*check, lines[at])]
    if len(new) == 1 and (twin := _twin(lines[at], new[0])):
        yield "it gives the same values each time it runs", [program(*twin)]
    dead = [_dead(lines[at], bits) for bits in _RUBBISH]
    if all(dead):
        yield "what it gives reaches no result", [program(*statements) for statements in dead]


def _tell(value: str, other: str, number: int) -> list[str]:
    """Statements that store to nowhere in lanes where two registers, or a register and a number, differ."""
    prefix = _REGISTER.match(value)["prefix"]
    at = 980_000 + 10 * number
    if prefix == "p":
        numbers = f"%r{at}", f"%r{at + 1}"
        head = [f"selp.b32 {n}, 1, 0, {p};" for n, p in zip(numbers, (value, other), strict=True)]
        return [*head, *_tell(*numbers, number)]
    bits = {"rs": 16, "h": 16, "rd": 64}.get(prefix, 32)
    return [f"setp.ne.b{bits} %p{at}, {value}, {other};", f"@%p{at} st.global.b32 [0], %r{at};"]


def _twin(old: str, new: str) -> list[str] | None:
    """Both instructions, and a store to nowhere where what they give differs; None where they give nothing."""
    was, becomes = _STATEMENT.match(old), _STATEMENT.match(new)
    if not was or not becomes or re.match(r"st\.|stmatrix|cp\.|bra|atom|red|mbarrier|wgmma|bar\.", was["op"]):
        return None
    given = _given(was["rest"])
    if not given or given != _given(becomes["rest"]):
        return None
    fresh = {one: f"%{_REGISTER.match(one)['prefix']}{970_000 + k}" for k, one in enumerate(given)}
    head, tail = becomes["rest"].split("}" if becomes["rest"].startswith("{") else ",", 1)
    close = "}" if becomes["rest"].startswith("{") else ","
    renamed = _REGISTER.sub(lambda m: fresh.get(m[0], m[0]), head) + close + tail
    return [
        *(f"mov.{_bits(one)} {copy}, {one};" for one, copy in fresh.items()),
        f"{becomes['guard'] or ''}{becomes['op']} {renamed};",
        old,
        *(line for k, (one, copy) in enumerate(fresh.items()) for line in _tell(one, copy, k)),
    ]


def _dead(old: str, rubbish: int) -> list[str] | None:
    """The instruction with rubbish in place of what it gives or stores; None where it does neither."""
    was = _STATEMENT.match(old)
    if not was or re.match(r"cp\.|bra|atom|red|mbarrier|wgmma|bar\.|griddep", was["op"]):
        return None
    guard = was["guard"] or ""
    if re.match(r"st\.|stmatrix", was["op"]):
        address, data = was["rest"].split("]", 1)
        used = dict.fromkeys(_REGISTER.findall(data))
        head = [f"mov.{_bits(f'%{prefix}0')} %{prefix}960000, {_number(prefix, rubbish)};" for prefix in used]
        data = _REGISTER.sub(lambda m: f"%{m['prefix']}960000", data)
        return [*head, f"{guard}{was['op']} {address}]{data};"]
    given = _given(was["rest"])
    return [
        old, *(f"{guard}mov.{_bits(one)} {one}, {_number(_REGISTER.match(one)['prefix'], rubbish)};" for one in given),
    ] if given else None  # fmt: skip


def _condition(old: str, kind: str) -> list[str] | None:
    """Statements that store to nowhere unless the old instruction does what the changed one does."""
    guard = re.match(r"\s*@(!?)(%p\d+)", old)
    nowhere = "st.global.b32 [0], %r980000;"
    if kind.endswith("without its mask"):
        return [f"@{'' if guard[1] else '!'}{guard[2]} {nowhere}"]
    if kind == "cp.async: reads what its mask forbids":
        size, read = re.search(r", (0x\w+|\d+), (%r\d+);", old).groups()
        tell = _tell(read, str(int(size, 0)), 0)
        return tell if not guard else [tell[0], *_among(guard, tell[1])]
    if kind == "mbarrier: always one parity":
        parity = re.search(r", (%r\d+);", old)[1]
        return [f"and.b32 %r980005, {parity}, 1;", *_tell("%r980005", "1", 0)]
    if kind == "TMA: coordinates swapped":
        one, other = re.search(r"\{(%r\d+), (%r\d+)\}", old).groups()
        tell = _tell(one, other, 0)
        return tell if not guard else [tell[0], *_among(guard, tell[1])]
    if kind in ("wgmma: begins at 0", "wgmma: goes on from what is there"):
        scale = re.search(r"%rd\d+, (%p\d+|[01]), 1", old)[1]
        begins = kind == "wgmma: begins at 0"
        if scale[0] == "%":
            first = [f"selp.b32 %r980001, {'1, 0' if begins else '0, 1'}, {scale};"]
        else:
            first = ["mov.b32 %r980001, 1;"]
        sums = re.search(r"\{(.*?)\}", old)[1].split(",")
        checks = []
        for one in sums:
            # 0 and -0 are the same sum
            checks += [f"and.b32 %r980002, {one.strip()}, 2147483647;", "setp.ne.b32 %p980003, %r980002, 0;"]
            checks += ["selp.b32 %r980004, %r980001, 0, %p980003;", *_tell("%r980004", "0", 1)]
        return first + checks
    return None


def _among(guard: re.Match, statement: str) -> list[str]:
    """A guarded statement that runs only where another guard lets it."""
    predicate = re.match(r"@(%p\d+) (.*)", statement)
    way = "0, 1" if guard[1] else "1, 0"
    return [
        f"selp.b32 %r980006, {way}, {guard[2]};", f"selp.b32 %r980007, %r980006, 0, {predicate[1]};",
        *_tell("%r980007", "0", 2),
    ]  # fmt: skip


def _given(rest: str) -> list[str]:
    """The registers that an instruction writes: its first operand."""
    first = rest[: rest.index("}")] if rest.startswith("{") else rest.split(",")[0]
    return [m[0] for m in _REGISTER.finditer(first)]


def _bits(register: str) -> str:
    return {"p": "pred", "rs": "b16", "h": "b16", "rd": "b64"}.get(_REGISTER.match(register)["prefix"], "b32")


def _number(prefix: str, rubbish: int) -> int:
    return {"p": rubbish & 64 and 1, "rs": rubbish & 0xFFFF, "rd": rubbish << 32 | rubbish}.get(prefix, rubbish)
