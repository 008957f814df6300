"""The faults that can be planted in a kernel's PTX: single changes, such as a compiler or an author could make.

Each kind is a pattern of a line and what a line that matches becomes. What is made parses mostly; where the emulator
refuses to load it, it is no fault that could come to a GPU.
"""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

__all__ = ["KINDS", "Fault", "faults"]

_R = r"%[a-z]+\d+"
# a register that no kernel has
_NEW = "%r987654"


class Fault(NamedTuple):
    """A change of one line.

    Attributes:
        kind: One of `KINDS`.
        line: Of the PTX, from 1.
        was: The line's statement.
        text: The whole PTX with the fault.
    """

    kind: str
    line: int
    was: str
    text: str


def _swap(group: int, other: int) -> Callable[[re.Match], str | None]:
    """Two operands change places, unless they are the same."""

    def change(m: re.Match) -> str | None:
        a, b = m[group], m[other]
        if a == b:
            return None
        start, text = m.start(), m[0]
        first, second = m.span(group), m.span(other)
        return text[: first[0] - start] + b + text[first[1] - start : second[0] - start] + a + text[second[1] - start :]

    return change


def _more(group: int, step: int) -> Callable[[re.Match], str]:
    """An integer grows by so much."""
    return lambda m: (
        m[0][: m.start(group) - m.start()] + str(int(m[group], 0) + step) + m[0][m.end(group) - m.start() :]
    )


def _times(group: int, numerator: int, denominator: int) -> Callable[[re.Match], str | None]:
    def change(m: re.Match) -> str | None:
        number = int(m[group], 0)
        if not number:
            return None
        new = str(number * numerator // denominator)
        return m[0][: m.start(group) - m.start()] + new + m[0][m.end(group) - m.start() :]

    return change


def _beside(m: re.Match) -> str:
    """An address moves by as many bytes as an element has."""
    vector, bits = int(m["vector"] or 1), int(m["bits"])
    return f"{m['head']}[ {m['base']} + {int(m['offset'] or 0) + vector * bits // 8} ]"


def _access(space: str) -> str:
    return (
        rf"(?P<head>(?:ld|st)\.{space}(?:::cta)?(?:\.cg)?(?:\.v(?P<vector>\d))?\.[bfsu](?P<bits>\d+)\s(?:.*?))"
        rf"\[\s*(?P<base>{_R})(?:\s*\+\s*(?P<offset>\d+))?\s*\]"
    )


_QUAD = r"\{ *" + r", *".join([f"({_R})"] * 4) + r" *\}"
_PAIR = r"\{ *" + r", *".join([f"({_R})"] * 2) + r" *\}"
_MMA = rf"mma\.sync\S* {_QUAD}, {_QUAD}, {_PAIR}, {_QUAD}"
# up to the scale of what is there already
_WGMMA = r"(wgmma\.mma_async.*%rd\d+, )(%p\d+|0|1)(, 1)"

# a kind, the pattern of a line, and what the match becomes; None where the fault would be none
KINDS: dict[str, tuple[str, str | Callable[[re.Match], str | None]]] = {
    "cp.async: no wait": (r"cp\.async\.wait_group\b.*", ""),
    "cp.async: waits for a group less": (r"cp\.async\.wait_group\s+(\d+)", _more(1, 1)),
    "cp.async: no commit": (r"cp\.async\.commit_group\b.*", ""),
    "cp.async: reads what its mask forbids": (rf"(cp\.async\.c[ag]\..*), {_R};", r"\1;"),
    "cp.async: half its bytes": (r"cp\.async\.cg(\.shared\.global .*), 0x10", r"cp.async.ca\1, 0x8"),
    "barrier: none": (r"bar\.sync\b.*", ""),
    "mbarrier: no wait": (r"@!complete bra\.uni waitLoop;", ""),
    "mbarrier: always one parity": (rf"(mbarrier\.try_wait.*), {_R};", r"\1, 1;"),
    "mbarrier: waits for the next stage's": (rf"(mbarrier\.try_wait.*\[{_R})\]", r"\1+8]"),
    "mbarrier: expects half the bytes": (r"(mbarrier\.arrive\.expect_tx.*), (\d+);", _times(2, 1, 2)),
    "mbarrier: expects no bytes": (r".*mbarrier\.arrive\.expect_tx.*", ""),
    "mbarrier: expects at the next stage's": (rf"(mbarrier\.arrive\.expect_tx.*\[{_R})\]", r"\1+8]"),
    "mbarrier: made for two arrivals": (r"(mbarrier\.init.*), 1;", r"\1, 2;"),
    "mbarrier: not made": (r".*mbarrier\.init.*", ""),
    "TMA: coordinates swapped": (rf"(cp\.async\.bulk\.tensor.*\{{)({_R}), ({_R})\}}", _swap(2, 3)),
    "TMA: a coordinate one more": (
        rf"^(.*cp\.async\.bulk\.tensor.*\{{)({_R}), ({_R})(\}}.*)$", rf"add.s32 {_NEW}, \3, 1;\n\1\2, {_NEW}\4",
    ),
    "TMA: writes what was just read, with no fence": (
        r"^\s*(@%p\d+ )?(cp\.async\.bulk\.tensor\S*\.shared::cta\.global\S* \[(%r\d+)\].*)$",
        rf"\1ld.shared.b32 {_NEW}, [\3];\n\1\2",
    ),
    "TMA: a store not waited for": (r"cp\.async\.bulk\.wait_group\b.*", ""),
    "TMA: a store not committed": (r"cp\.async\.bulk\.commit_group\b.*", ""),
    "fence.proxy.async: none": (r"fence\.proxy\.async.*", ""),
    "wgmma: no wait": (r"wgmma\.wait_group\b.*", ""),
    "wgmma: waits for a group less": (r"wgmma\.wait_group\S*\s+(\d+)", _more(1, 1)),
    "wgmma: no fence": (r"wgmma\.fence\b.*", ""),
    "wgmma: no commit": (r"wgmma\.commit_group\b.*", ""),
    "wgmma: begins at 0": (_WGMMA, r"\g<1>0\3"),
    "wgmma: goes on from what is there": (_WGMMA, r"\g<1>1\3"),
    "wgmma: an operand turned": (r"(wgmma\.mma_async.*)0;", r"\g<1>1;"),
    "wgmma: another swizzle": (r"4611686293305294848", str(4611686293305294848 + (1 << 62))),
    "mma: registers of A swapped": (_MMA, _swap(5, 6)),
    "mma: registers of B swapped": (_MMA, _swap(9, 10)),
    "mma: begins at 0": (rf"({_MMA[: -len(_QUAD)]}){_QUAD}", lambda m: m[1] + "{ 0, 0, 0, 0 }"),
    "mma: accumulators swapped": (_MMA, _swap(11, 12)),
    "ldmatrix: turned": (r"(ldmatrix\S*\.x[124])\.shared", r"\1.trans.shared"),
    "ldmatrix: not turned": (r"(ldmatrix\S*)\.trans", r"\1"),
    "stmatrix: turned": (r"(stmatrix\S*\.x[124])\.shared", r"\1.trans.shared"),
    "stmatrix: not turned": (r"(stmatrix\S*)\.trans", r"\1"),
    "grid: no wait": (r"griddepcontrol\.wait\b.*", ""),
    "grid: lets dependents in before it waits": (
        r"griddepcontrol\.wait\b.*", "griddepcontrol.launch_dependents;\ngriddepcontrol.wait;",
    ),
    "atomic: relaxed": (r"\.acq_rel", ".relaxed"),
    "atomic: only acquires": (r"\.acq_rel", ".acquire"),
    "atomic: only releases": (r"\.acq_rel", ".release"),
    "atomic: among its CTA alone": (r"(atom\.global)\.gpu", r"\1.cta"),
    "global: a load without its mask": (r"@!?%p\d+ (ld\.global)", r"\1"),
    "global: a store without its mask": (r"@!?%p\d+ (st\.global)", r"\1"),
    "global: beside": (_access("global"), _beside),
    "shared: beside": (_access("shared"), _beside),
    "registers of a store swapped": (rf"(st\.(?:global|shared)\S*\.v[24].*\{{ *)({_R}), ({_R})", _swap(2, 3)),
    "registers of stmatrix swapped": (rf"(stmatrix.*\{{ *)({_R}), ({_R})", _swap(2, 3)),
    "halves packed the wrong way round": (rf"(cvt\.rn\.(?:bf16x2|f16x2)\.f32\s+{_R}), ({_R}), ({_R})", _swap(2, 3)),
    "le for lt": (r"setp\.lt\.(s|u)", r"setp.le.\1"),
    "gt for ge": (r"setp\.ge\.(s|u)", r"setp.gt.\1"),
    "ge for gt": (r"setp\.gt\.(s|u)", r"setp.ge.\1"),
    "ne for eq": (r"setp\.eq\.", "setp.ne."),
    "sides of a select swapped": (rf"(selp\.\w+\s+{_R}), ({_R}), ({_R}),", _swap(2, 3)),
    "branch: the other way": (r"@%p(\d+) bra", r"@!%p\1 bra"),
    "fma: factor and term swapped": (rf"(fma\.rn\.f32\s+{_R}, {_R}), ({_R}), ({_R})", _swap(2, 3)),
    "add: a term twice": (rf"(add\.f32\s+{_R}), ({_R}), ({_R})", r"\1, \2, \2"),
    "xor: another bit": (rf"(xor\.b32\s+{_R}, {_R}), (\d+)", _times(2, 2, 1)),
    "shift: by one more": (rf"(sh[lr]\.[bsu](?:32|64)\s+{_R}, {_R}), (\d+)", _more(2, 1)),
    "a constant one more": (rf"((?:add|mul\.lo|mad\.lo|mul\.wide)\.[su](?:32|64)\s+{_R}, {_R}), (-?\d+)", _more(2, 1)),
    "shuffle: from the next lane": (rf"(shfl\.sync\.idx\.b32\s+{_R}, {_R}), (\d+)", _more(2, 1)),
}  # fmt: skip


def faults(ptx: str, reached: set[int]) -> Iterator[Fault]:
    """Every fault that the lines hold to which warps have come."""
    lines = ptx.split("\n")
    for number in sorted(reached):
        line = lines[number - 1]
        for kind, (pattern, becomes) in KINDS.items():
            found = re.search(pattern, line)
            if not found:
                continue
            new = found.expand(becomes) if isinstance(becomes, str) else becomes(found)
            if new is None or new == found[0]:
                continue
            changed = line[: found.start()] + new + line[found.end() :]
            yield Fault(kind, number, line.strip(), "\n".join([*lines[: number - 1], changed, *lines[number:]]))
