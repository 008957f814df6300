"""A check of software pipelines for tiles with too few buffers, in Triton's last form before machine code (TTGIR).

A tile in a pipeline lies in one of several buffers of shared memory, and a copy of a later step refills the buffer. The
tensor cores of Hopper and Blackwell read a buffer asynchronously, until the kernel waits for them. A load to registers
has read the buffer when it returns. Where one tile goes both ways, Triton 3.6 to 3.9 count buffers as for the load: one
too few. A later copy then overwrites a buffer that the tensor cores still read; see `docs/traps.md`.
"""

import re

__all__ = ["taken_both_ways"]

_NAME = r"%[\w]+(?:#\d+)?"
_VIEW = re.compile(rf"({_NAME})(?::\d+)? = ttg\.memdesc_(?:index|subview|subslice|trans|reshape|reinterpret) ({_NAME})")
_BUFFERS = re.compile(rf"({_NAME}) = ttg\.local_alloc\s*(?:\{{.*\}})?\s*: \(\) -> !ttg\.memdesc<([\dx]+x\w+),")
_PRODUCT = re.compile(rf"ttng\.(?:warp_group_dot|tc_gen5_mma) ({_NAME}), ({_NAME})")
_LOAD = re.compile(rf"ttg\.local_load ({_NAME})")


def taken_both_ways(ttgir: str) -> list[str]:
    """Name the buffered tiles that tensor cores read from shared memory and that a load puts into registers as well.

    Args:
        ttgir: Triton's intermediate form of a kernel for an NVIDIA GPU, after its pipeliner.

    Returns:
        The buffers of each tile, as number x shape x dtype: `2x16x256xbf16` means two of 16 by 256.
    """
    # Maps a buffer, or a view of a buffer, to the allocation.
    buffers: dict[str, str] = {}
    shapes: dict[str, str] = {}
    ways: dict[str, set[str]] = {}
    for line in ttgir.splitlines():
        if made := _BUFFERS.search(line):
            buffers[made[1]], shapes[made[1]] = made[1], made[2]
        elif view := _VIEW.search(line):
            if view[2] in buffers:
                buffers[view[1]] = buffers[view[2]]
        elif product := _PRODUCT.search(line):
            for operand in product.groups():
                if operand in buffers:
                    ways.setdefault(buffers[operand], set()).add("tensor cores")
        elif (load := _LOAD.search(line)) and load[1] in buffers:
            ways.setdefault(buffers[load[1]], set()).add("registers")
    return [shapes[name] for name, taken in ways.items() if len(taken) == 2]
