"""Kernels with faults that only their machine code shows; run as a script, not interpreted.

Prints as JSON, for each fault, the budgets that `lora-kernels inspect` finds broken.
"""

import importlib
import json
import os

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
import triton.language as tl

from lora_kernels.inspect.compiled import _dequantize, describe
from lora_kernels.inspect.kernel import Case
from lora_kernels.kernels import matmul_expand, shrink
from lora_kernels.kernels._configs import MatmulConfig
from lora_kernels.kernels._imagined import GPUS, imagine


@triton.jit
def _narrow_kernel(x_ptr, y_ptr, stride):
    row = tl.program_id(0)
    tl.store(y_ptr + row, tl.load(x_ptr + row * stride))


@triton.jit
def _tf32_kernel(x_ptr, y_ptr, PRECISION: tl.constexpr):
    offsets = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    x = tl.load(x_ptr + offsets)
    tl.store(y_ptr + offsets, tl.dot(x, x, input_precision="tf32"))


@triton.jit
def _waits_kernel(x_ptr, y_ptr, READ_BEFORE: tl.constexpr, WRITE_BEFORE: tl.constexpr):
    x = 1.0
    if READ_BEFORE:
        x = tl.load(x_ptr)
    if WRITE_BEFORE:
        tl.store(y_ptr, x)
    tl.extra.cuda.gdc_wait()
    tl.store(y_ptr + 1, x)


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype)


def matmul(config):
    rows, width = 2304, 4096  # 162 tiles of 128 x 256
    matmul_expand([(empty(rows, width), empty(width, width)), (empty(rows, 16), empty(width, 16))], config=config)


def waits(read_before, write_before):
    x = empty(9, dtype=torch.float32)
    _waits_kernel[(1,)](x, x, READ_BEFORE=read_before, WRITE_BEFORE=write_before)


def strided_shrink():
    shrink(empty(512, 8192)[:, ::2], empty(16, 4096), 1.0)


def contracting():
    """Dequantise with products contracted, as all other kernels are launched."""
    module = importlib.import_module("lora_kernels.kernels.dequantize")
    stock = module.Launch
    module.Launch = lambda *rest: stock(*rest[:4], rest[4] | {"enable_fp_fusion": True}, rest[5])
    try:
        _dequantize(STORED)
    finally:
        module.Launch = stock


STORED = Case(0, 512, 512, 0, storage="nf4 nested")
FAULTS = {
    "a 32-bit product": ("sm_90", lambda: _narrow_kernel[(1,)](empty(9), empty(9), 3), Case(1, 16, 16, 1)),
    "TF32": ("sm_90", lambda: _tf32_kernel[(1,)](*(empty(64, 64, dtype=torch.float32),) * 2, PRECISION="ieee"),
             Case(1, 16, 16, 1, "fp32")),
    "a wait": ("sm_90", lambda: waits(False, False), Case(1, 16, 16, 1)),
    "a read before the wait": ("sm_90", lambda: waits(True, False), Case(1, 16, 16, 1)),
    "a write before the wait": ("sm_90", lambda: waits(False, True), Case(1, 16, 16, 1)),
    "few warps": ("sm_90", lambda: matmul(MatmulConfig(128, 256, 64, 8, 2, 4, 4)), Case(1, 16, 16, 1)),
    "too many programs": ("sm_90", lambda: matmul(MatmulConfig(128, 256, 64, 8, 2, 8, 4, 2)), Case(1, 16, 16, 1)),
    "narrow loads": ("sm_90", strided_shrink, Case(1, 16, 16, 1)),
    "no pipeline": ("sm_80", lambda: matmul(MatmulConfig(64, 64, 32, 8, 1, 4, 1)), Case(1, 16, 16, 1)),
    "a contracted scale": ("sm_90", contracting, STORED),
    "a contracted scale on AMD": ("gfx942", contracting, STORED),
    "none": ("sm_90", lambda: matmul(MatmulConfig(64, 128, 64, 8, 1, 4, 4)), Case(1, 16, 16, 1)),
}  # fmt: skip


def main():
    found = {}
    for fault, (arch, launch, case) in FAULTS.items():
        with imagine(GPUS[arch]) as launched:
            launch()
        kernel = describe(launched[0], case, arch)
        found[fault] = dict(broken=kernel.broken, dependent=kernel.facts.dependent, warnings=kernel.facts.warnings)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
