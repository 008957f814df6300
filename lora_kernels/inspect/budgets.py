"""Budgets of compiled kernels, as rules: each rule names the faults of a kernel."""

from collections.abc import Iterator
from typing import Any

from lora_kernels.inspect.kernel import Kernel

__all__ = ["broken_budgets"]

# Most instructions for 64 of K, with a margin. sm_90 needs 80 to 92. sm_100 needs 135 on Triton 3.6, because its tensor
# cores have a memory of their own with explicit waits.
_LOOPS = {"sm_90": 100, "sm_100": 140}
# Extra instructions for each source beyond two, for its select.
_SOURCE = 7
# Most instructions to dequantise a weight. A multiprocessor of an H200 has 128 lanes, and its share of the memory moves
# 7.5 weights from 4 bits to 16 in a clock.
_PER_WEIGHT = 12
# A dot of fewer rows cannot use Hopper's asynchronous tensor-core instructions.
_FAST_ROWS = 64


def broken_budgets(kernel: Kernel, gpu: Any) -> Iterator[str]:
    """Name every budget that a kernel breaks.

    Args:
        kernel: The kernel.
        gpu: The `ImaginedGPU` that the kernel is compiled for.
    """
    facts = kernel.facts
    if facts.spills > _spills(kernel):
        yield f"spills {facts.spills}"
    if facts.shared > gpu.shared:
        yield f"takes {facts.shared} B of shared memory of {gpu.shared}"
    if facts.narrow_products:
        yield f"multiplies in 32 bits for a pointer: {facts.narrow_products[0]}"
    if facts.warnings:
        yield f"ptxas serialises the tensor cores ({', '.join(facts.warnings)})"
    for tile in facts.both_ways:
        yield f"takes a tile by tensor cores and by registers at once, for which Triton has a buffer too few: {tile}"
    if facts.overwritten:
        times = len(facts.overwritten)
        yield f"writes registers that tensor cores may still read, {times} times: {facts.overwritten[0]}"
    if facts.late_stores:
        yield f"counts programs in while stores of other waves are on their way, {facts.late_stores} times"
    yield from _dependent_launch(kernel)
    yield from _occupancy(kernel, gpu)
    if kernel.name == "dequantize":
        yield from _dequantize(kernel)
        return
    if kernel.name == "segments":
        return
    yield from _tensor_cores(kernel)
    if kernel.name == "matmul_expand":
        yield from _matmul(kernel)
    elif kernel.case.dtype != "fp32" and not kernel.case.by_element:
        yield from _streams(kernel)


def _dequantize(kernel: Kernel) -> Iterator[str]:
    """Check that a weight takes few instructions and wide accesses, so that memory is the limit, and its roundings."""
    facts, constants = kernel.facts, kernel.constants
    if facts.contracted:
        yield f"contracts a product and a sum, which are rounded apart, {facts.contracted} times"
    # On gfx942 a tile goes through other instructions. Ragged rows and blocks are read and written weight by weight.
    if kernel.case.by_element or kernel.arch == "gfx942":
        return
    a_thread = constants["BLOCK"] // (32 * kernel.num_warps)
    if facts.instructions > _PER_WEIGHT * a_thread:
        yield f"takes {facts.instructions} instructions for {a_thread} weights, more than {_PER_WEIGHT} a weight"
    packed = a_thread // 2 if constants["FORMAT"] == "4 bits" else a_thread
    if facts.loads.get(128, 0) * 16 < packed:
        yield f"loads the storage in fewer than 128 bits a thread: {facts.loads}"
    if set(facts.stores) != {128}:
        yield f"stores W in fewer than 128 bits a thread: {facts.stores}"


def _spills(kernel: Kernel) -> int:
    """Return the bytes that a kernel may spill: none, but for a few addresses on sm_80 and sm_100.

    ptxas keeps up to eight addresses of sm_80's kernels in memory, stored before the loop over K or rows and read once
    after it. Products of strided or unaligned rows, in which every element has an address of its own, and of four
    inputs read one or more in the loop; on sm_100, too.
    """
    return {"sm_80": 32, "sm_100": 8}.get(kernel.arch, 0)


def _dependent_launch(kernel: Kernel) -> Iterator[str]:
    """Check that a kernel waits in time if it may overlap the end of the launch before it."""
    found = kernel.facts.dependent
    if kernel.name == "matmul_expand" and kernel.constants["PDL"] and found != "waits":
        yield "does not wait for the launch before it, and then let the next come up, before it touches memory"
    if kernel.constants.get("READY") and found not in ("waits", "waits to write"):
        yield "does not wait for the launch before it before it writes"


def _tensor_cores(kernel: Kernel) -> Iterator[str]:
    facts, loop = kernel.facts, kernel.facts.loop
    tf32 = kernel.constants.get("PRECISION") == "tf32"
    if facts.tf32 and not tf32:
        yield "rounds fp32 to TF32 unasked"
    if kernel.case.dtype == "fp32" and not tf32:
        return
    if not facts.mma or loop is None:
        yield "does not use tensor cores in a loop"
    elif kernel.arch == "sm_90" and _rows_of_dots(kernel) >= _FAST_ROWS:
        if any(name.startswith("HMMA") for name in facts.mma):
            yield "falls back to mma.sync"
        dots = kernel.constants.get("ROWS", 1) + bool(kernel.constants.get("HAS_SHRINK"))
        # A kernel waits more often for an operand masked or made in registers, before it writes these registers again.
        in_registers = kernel.name != "matmul_expand" and (_masks(kernel) or kernel.constants.get("ACTIVATION"))
        if not in_registers and max(loop.waits, loop.arrives) > dots:
            yield f"begins its tensor cores {loop.arrives} times a K step and waits {loop.waits} times, for {dots} dots"


def _rows_of_dots(kernel: Kernel) -> int:
    """Return the rows of the dot that has the fewest."""
    constants = kernel.constants
    if kernel.name == "wgrad":
        return min(constants["BLOCK_W"], constants["BLOCK_M"] if constants["HAS_SHRINK"] else constants["BLOCK_W"])
    return constants.get("BLOCK_M", 0)


def _masks(kernel: Kernel) -> bool:
    return bool(kernel.constants.get("HAS_KEEP") or kernel.constants.get("HAS_DROPOUT"))


def _occupancy(kernel: Kernel, gpu: Any) -> Iterator[str]:
    facts, constants = kernel.facts, kernel.constants
    if facts.per_sm < 1:
        yield "does not fit a multiprocessor"
    # All programs of `matmul_expand` must run at once, because one too many waits for a whole program to end.
    if kernel.name == "matmul_expand" and kernel.programs > facts.per_sm * gpu.num_sms:
        yield f"launches {kernel.programs} programs at once and {facts.per_sm * gpu.num_sms} fit"
    if kernel.name == "shrink" and constants["BLOCK_R"] <= 32 and facts.per_sm < 2:
        yield "leaves a multiprocessor one program, which cannot hide the latency of its loads"


def _matmul(kernel: Kernel) -> Iterator[str]:
    loop, constants = kernel.facts.loop, kernel.constants
    # Pointers always load the operands of a masked product, so a launch without other sources has no rule here.
    if loop is None or not constants["NUM_SOURCES"]:
        return
    if constants["USE_TMA"]:
        if loop.tma_loads != 2:
            yield f"loads {loop.tma_loads} tiles by descriptor in the K loop, not 2"
        if loop.loads:
            yield f"loads by pointer in the K loop: {sum(loop.loads.values())}"
        most = (_LOOPS[kernel.arch] + _SOURCE * max(constants["NUM_SOURCES"] - 2, 0)) * constants["BLOCK_K"] // 64
        if loop.instructions > most:
            yield f"has {loop.instructions} instructions in the K loop, more than {most}"
    elif kernel.arch == "sm_80" and not kernel.case.by_element and not loop.async_copies:
        yield "is not pipelined: no asynchronous copy in the K loop"


def _streams(kernel: Kernel) -> Iterator[str]:
    """Check that a shrink or wgrad of contiguous, aligned 16-bit operands has loads as wide as its tiles allow."""
    loop = kernel.facts.loop
    # On gfx942 a tile goes through other instructions.
    if loop is None or kernel.arch == "gfx942":
        return
    threads, (rows, wide, thin) = 32 * kernel.num_warps, kernel.sides
    large = rows * wide
    small = (rows if kernel.name == "wgrad" else wide) * thin
    narrowest = min(128, 16 * small // threads, 16 * large // threads)
    # A mask comes in words of 32 bits.
    words = 32 if kernel.name == "wgrad" and _masks(kernel) else 0
    found = {width: count for width, count in loop.loads.items() if width < narrowest and width != words}
    if found:
        yield f"loads {found} (bits: count) in the K loop, narrower than {narrowest} bits"
    # Without asynchronous copies, each step waits for its masks in turn.
    if words and loop.async_copies < sum(loop.loads.values()):
        yield f"loads {sum(loop.loads.values())} times in the K loop, of these {loop.async_copies} ahead"
    if loop.loads.get(128, 0) < 2 * large // 16 // threads:
        yield f"loads the wide tile in fewer than 128 bits a thread: {loop.loads}"
