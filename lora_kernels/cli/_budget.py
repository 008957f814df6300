"""What a compiled kernel must keep to, as rules: each says what is wrong with a kernel, or nothing."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_kernels.cli.inspect import Kernel

__all__ = ["broken"]

_LOOP = 100  # instructions of a K step of one dot, with room beside the 80 to 92 that are needed


def broken(kernel: "Kernel", shared: int) -> Iterator[str]:
    """Name every budget that a kernel breaks.

    Args:
        kernel: The kernel.
        shared: Most bytes of shared memory of a program.
    """
    facts, constants = kernel.facts, kernel.constants
    if facts.spills:
        yield f"spills {facts.spills}"
    if facts.shared > shared:
        yield f"takes {facts.shared} B of shared memory of {shared}"
    if facts.narrow_products:
        yield f"multiplies in 32 bits for a pointer: {facts.narrow_products[0]}"
    if facts.tf32 and constants["PRECISION"] == "ieee":
        yield "rounds fp32 to TF32 unasked"
    if facts.warnings:
        yield f"ptxas serialises the tensor cores ({', '.join(facts.warnings)})"
    if kernel.dtype != "fp32" and not facts.mma:
        yield "does not use tensor cores"
    if kernel.name == "matmul_expand" and kernel.dtype != "fp32":
        yield from _matmul(kernel)


def _matmul(kernel: "Kernel") -> Iterator[str]:
    facts, loop = kernel.facts, kernel.facts.loop
    if kernel.arch == "gfx942":
        return
    if loop is None:
        yield "has no loop with tensor cores"
        return
    if kernel.constants["USE_TMA"]:
        if loop.tma_loads < 2:
            yield f"loads {loop.tma_loads} tiles by descriptor in the K loop, not 2"
        if loop.async_copies:
            yield f"copies {loop.async_copies} times by pointer in the K loop"
        if loop.instructions > _LOOP:
            yield f"has {loop.instructions} instructions in the K loop, more than {_LOOP}"
    if kernel.arch == "sm_90":
        if "HMMA" in {name.split(".")[0] for name in facts.mma}:
            yield "falls back to mma.sync"
        if loop.waits > 1:
            yield f"waits {loop.waits} times a K step for the tensor cores"
    if kernel.arch == "sm_80" and not kernel.strided and not loop.async_copies:
        yield "is not pipelined: no asynchronous copy in the K loop"
