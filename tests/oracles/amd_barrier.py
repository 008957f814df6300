"""Compile the end of a split sum for AMD's GPUs, and print for each how many barriers leave stores of a wave behind."""

import json

import triton
import triton.language as tl

from lora_kernels.inspect.binary import late_stores
from lora_kernels.kernels._device import last_to_arrive
from lora_kernels.kernels._imagined import ImaginedGPU, imagine

# CDNA 3 and 4, RDNA 3 and 4, and what follows both.
ARCHES = "gfx942", "gfx950", "gfx1100", "gfx1201", "gfx1250"


@triton.jit
def store_and_count(part_ptr, arrivals_ptr, sum_ptr):
    """Store a part, and read another program's parts if this program is the last."""
    offs = tl.arange(0, 1024)
    tl.store(part_ptr + offs, offs.to(tl.float32))
    if last_to_arrive(arrivals_ptr, 4):
        tl.store(sum_ptr + offs, tl.load(part_ptr + 1023 - offs, cache_modifier=".cg"))


def main():
    """Print the counts by architecture, with our wait taken out of the machine code and with it."""
    source = triton.compiler.ASTSource(
        store_and_count, {"part_ptr": "*fp32", "arrivals_ptr": "*i32", "sum_ptr": "*fp32"}, {}
    )
    found = {}
    for index, arch in enumerate(ARCHES):
        gpu = ImaginedGPU(arch, 8, 65_536, 65_536, 16 + index)
        with imagine(gpu):
            kernel = triton.compile(source, target=gpu.target, options={"num_warps": 4})
        text = kernel.asm["amdgcn"]
        # the assembler's comments stand around inline assembly
        before, _, rest = text.partition(";;#ASMSTART")
        without = before + rest.partition(";;#ASMEND")[2] if rest else text
        found[arch] = {"without": late_stores(without), "with": late_stores(text)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
