"""The race of Triton's pipeliner on sm_90, with no code of the project.

A tile that one product takes from shared memory (wgmma) and another from registers has a buffer too few, so that
cp.async fills the one that the wgmma still reads.

    python tests/emulator/upstream.py

prints a line of JSON for asynchronous work as early, and as late, as may be: buffers of the pipelines, waits of the
program, how many results are wrong, and what the emulator saw.
"""

import json
import os
import re
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from emulator import emulator  # isort: skip; it sets where Triton caches

import torch
import triton
import triton.language as tl


@triton.jit
def both(x_ptr, a_ptr, y_ptr, z_ptr, K, M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    rows, cols, ks = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK)
    y, z = tl.zeros((M, N), tl.float32), tl.zeros((M, N), tl.float32)
    for k in range(0, K, BLOCK):
        x = tl.load(x_ptr + rows[:, None] * K + (k + ks)[None, :])
        a = tl.load(a_ptr + (k + ks)[:, None] * N + cols[None, :])
        z = tl.dot(tl.where((ks % 3 > 0)[None, :], x, tl.zeros((M, BLOCK), x.dtype)), a, z)
        y = tl.dot(x, a, y)
    tl.store(y_ptr + rows[:, None] * N + cols[None, :], y)
    tl.store(z_ptr + rows[:, None] * N + cols[None, :], z)


def main() -> None:
    """Run it with asynchronous work as early and as late as may be."""
    emu = emulator.Emulator("sm_90")
    torch.manual_seed(0)
    x, a = torch.randn(64, 256).half(), torch.randn(256, 16).half()
    kept = torch.arange(256) % 32 % 3 > 0
    for name in ("early", "late"):
        y, z = torch.empty(64, 16), torch.empty(64, 16)
        emu.set(mode=emulator.MODES[name], seed=1)
        with emu.running() as launched:
            both[(1,)](x, a, y, z, 256, 64, 16, 32, num_stages=3)
        asm = launched[0].kernel.asm
        buffers = re.findall("local_alloc : .. -> !ttg.memdesc<([0-9x]+)x", asm["ttgir"])
        waits = re.findall(r"wait_group.sync.aligned (.)", asm["ptx"])
        wanted = x.float() @ a.float(), (x.float() * kept) @ a.float()
        wrong = sum(int((~torch.isclose(got, want, atol=1e-3)).sum()) for got, want in zip((y, z), wanted, strict=True))
        seen = [line for line in emu.problems() if ": note: " not in line]
        line = dict(triton=triton.__version__, mode=name, buffers=buffers, waits=waits, wrong=wrong, problems=seen)
        print(json.dumps(line))


if __name__ == "__main__":
    main()
