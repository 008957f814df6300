"""Compile every kernel for sm_90 without a GPU and print facts as JSON; run as a script, outside the interpreter."""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lora_kernels.kernels import _configs as configs
from lora_kernels.kernels import matmul_expand, shrink, wgrad  # noqa: F401  (loads the modules below)

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DIVISIBLE = [["tt.divisibility", 16]]
TORCH = {"bf16": torch.bfloat16, "fp32": torch.float32}


@triton.jit
def _planted_kernel(x_ptr, y_ptr, stride):
    row = tl.program_id(0)
    tl.store(y_ptr + row, tl.load(x_ptr + row * stride))


def build(fn, types, constants, **options):
    """Compile `fn`: types by argument name (a tuple for a tuple), an int or None for a constant."""
    signature, attributes, values = {}, {}, dict(constants)

    def walk(kind, path):
        if isinstance(kind, tuple):
            return tuple(walk(part, (*path, i)) for i, part in enumerate(kind))
        if kind is None or isinstance(kind, int):
            values[path if len(path) > 1 else fn.arg_names[path[0]]] = kind
            return "constexpr"
        if kind.startswith("*") or kind in ("i32", "i64"):
            attributes[path] = DIVISIBLE
        return kind

    for i, name in enumerate(fn.arg_names):
        signature[name] = "constexpr" if name in constants else walk(types[name], (i,))
    return triton.compile(
        ASTSource(fn, signature, values, attributes),
        target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": True, **options},
    )  # fmt: skip


def matmul(config, dtype, tma, masked=False, transposed=False, precision="ieee", bias=True, strided=False):
    kernel = sys.modules["lora_kernels.kernels.matmul_expand"]._matmul_expand_kernel
    count, m, n, k = 1 if masked else 2, config.block_m, config.block_n, config.block_k
    q_box = [k, n] if transposed else [n, k]
    operand = [f"tensordesc<{dtype}{box}>" if tma else "*" + dtype for box in ([m, k], q_box)]
    low_rank = "*" + dtype if masked else None
    row, one = ("i32",) * count, ("i32" if strided else 1,) * count
    unit = one[0]
    types = dict(
        **{f"{side}{i}": operand[j] if i < count else None for j, side in enumerate("pq") for i in range(4)},
        masked_p=low_rank, masked_q=low_rank,
        y=f"tensordesc<{dtype}{[m, n // config.subtiles]}>" if tma else "*" + dtype,
        bias_ptr="*" + dtype if bias else None, keep_ptr="*u8" if masked else None, M="i32", N="i32", Ks=row,
        masked_K="i32" if masked else None, strides_pm=row, strides_pk=one,
        strides_qn=one if transposed else row, strides_qk=row if transposed else one,
        stride_ym="i32", stride_mpm="i32", stride_mpk=unit, stride_mqn=unit, stride_mqk="i32", stride_bias=unit,
    )  # fmt: skip
    constants = dict(
        NUM_SOURCES=count, USE_TMA=tma, Q_ROWS_ARE_N=not transposed, STORE_TMA=tma, HAS_BIAS=bias, HAS_KEEP=masked,
        PDL=True, PRECISION=precision, SUBTILES=config.subtiles, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, BLOCK_R=32,
        GROUP_M=config.group_m,
    )  # fmt: skip
    return build(kernel, types, constants, num_warps=config.num_warps, num_stages=config.num_stages)


def shrinks(dtype, dropout, strided=False):
    kernel = sys.modules["lora_kernels.kernels.shrink"]._shrink_kernel
    c = configs.shrink_config(8192, 4096, 16, TORCH[dtype])
    types = dict(
        x_ptr="*" + dtype, a_ptr="*" + dtype, s_ptr="*" + dtype, parts_ptr="*fp32", arrivals_ptr="*i32",
        keep_ptr="*u8" if dropout else None, seed_ptr="*i64" if dropout else None, alpha="fp32", threshold="i32",
        M="i32", K="i32", R="i32", k_per_split="i32",
        stride_xm="i32", stride_xk="i32" if strided else 1, stride_ar="i32", stride_ak="i32" if strided else 1,
        stride_sm="i32",
    )  # fmt: skip
    constants = dict(
        HAS_DROPOUT=dropout, IS_SPLIT=True, PDL=True, PRECISION="ieee",
        BLOCK_M=c.block_m, BLOCK_K=c.block_k, BLOCK_R=c.block_r,
    )  # fmt: skip
    return build(kernel, types, constants, num_warps=c.num_warps, num_stages=c.num_stages)


def wgrads(dtype, masked, strided=False, shrinks=False):
    kernel = sys.modules["lora_kernels.kernels.wgrad"]._wgrad_kernel
    c = configs.wgrad_config(8192, 4096, 16, TORCH[dtype], shrinks)
    types = dict(
        wide_ptr="*" + dtype, thin_ptr="*" + dtype, keep_ptr="*u8" if masked else None, g_ptr="*" + dtype,
        b_ptr="*" + dtype if shrinks else None, g_parts_ptr="*fp32", ds_ptr="*" + dtype if shrinks else None,
        ds_parts_ptr="*fp32" if shrinks else None, arrivals_ptr="*i32", alpha="fp32", M="i32", W="i32", T="i32",
        rows_per_split="i32", stride_wm="i32", stride_ww="i32" if strided else 1, stride_tm="i32",
        stride_tt="i32" if strided else 1, stride_bw="i32", stride_bt="i32" if strided else 1,
        stride_gw="i32" if strided else 1, stride_gt="i32", stride_dsm="i32",
    )  # fmt: skip
    constants = dict(
        HAS_KEEP=masked, HAS_SHRINK=shrinks, IS_SPLIT=True, PDL=shrinks, PRECISION="ieee",
        BLOCK_M=c.block_m, BLOCK_W=c.block_c, BLOCK_T=c.block_r,
    )  # fmt: skip
    return build(kernel, types, constants, num_warps=c.num_warps, num_stages=c.num_stages)


def narrow_products(ttir):
    """32-bit multiplications by a run-time value whose result reaches the offset of a `tt.addptr`."""
    definitions = {}
    for line in ttir.splitlines():
        if match := re.match(r"\s*(%[\w#:]+) = \"?([\w.]+)\"?(.*)", line):
            definitions[match[1].split(":")[0]] = (match[2], re.findall(r"%[\w]+(?:#\d+)?", match[3]), line.strip())

    def constant(name):
        op, operands, _ = definitions.get(name, ("", [], ""))
        return op == "arith.constant" or (op in ("tt.splat", "arith.extsi") and constant(operands[0]))

    found, pointers = set(), 0

    def walk(name, seen):
        if name in seen or name not in definitions:
            return
        seen.add(name)
        op, operands, line = definitions[name]
        if op == "arith.muli" and re.search(r": (tensor<[\dx]*i32>|i32)", line) and not any(map(constant, operands)):
            found.add(line)
        if op in ("arith.muli", "arith.addi", "arith.subi", "arith.extsi", "arith.select", "tt.splat", "tt.broadcast",
                  "tt.expand_dims"):  # fmt: skip
            for operand in operands:
                walk(operand, seen)

    for op, operands, _ in list(definitions.values()):
        if op == "tt.addptr":
            pointers += 1
            walk(operands[1], set())
    return sorted(found), pointers


def spills(cubin):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", path], capture_output=True, text=True)
        return int(re.search(r"STACK:(\d+)", usage.stdout + usage.stderr)[1])


def facts(kernel, dtype, tma=False):
    narrow, pointers = narrow_products(kernel.asm["ttir"])
    ptx = kernel.asm["ptx"]
    return dict(
        dtype=dtype, tma=tma, narrow_products=narrow, pointers=pointers, tf32="tf32" in ptx,
        spills=spills(kernel.asm["cubin"]), shared=kernel.metadata.shared,
        wgmma="wgmma.mma_async" in ptx, tma_loads=ptx.count("cp.async.bulk.tensor"),
    )  # fmt: skip


def main():
    bf16 = torch.bfloat16
    big, mid = (configs.matmul_config(rows, rows, bf16, True, False, 132) for rows in (8192, 1024))
    masked_big, masked_mid = (configs.matmul_config(rows, rows, bf16, True, True, 132) for rows in (8192, 1024))
    pointers = configs.matmul_config(8192, 4096, bf16, False, False, 132)
    masked = configs.matmul_config(8192, 4096, bf16, False, True, 132)
    single = configs.matmul_config(8192, 4096, torch.float32, False, False, 132)
    masked_single = configs.matmul_config(8192, 4096, torch.float32, False, True, 132)
    tf32 = configs.matmul_config(8192, 4096, torch.float32, False, False, 132, True)
    masked_tf32 = configs.matmul_config(8192, 4096, torch.float32, False, True, 132, True)
    table = {
        "planted": (build(_planted_kernel, dict(x_ptr="*fp32", y_ptr="*fp32", stride="i32"), {}), "fp32"),
        "matmul forward": (matmul(big, "bf16", True), "bf16", True),
        "matmul dx": (matmul(big, "bf16", True, transposed=True, bias=False), "bf16", True),
        "matmul forward, few tiles": (matmul(mid, "bf16", True), "bf16", True),
        "matmul masked dx": (matmul(masked_big, "bf16", True, True, True, bias=False), "bf16", True),
        "matmul masked dx, few tiles": (matmul(masked_mid, "bf16", True, True, True, bias=False), "bf16", True),
        "matmul pointers": (matmul(pointers, "bf16", False), "bf16"),
        "matmul masked pointers": (matmul(masked, "bf16", False, True, True), "bf16"),
        "matmul fp32": (matmul(single, "fp32", False), "fp32"),
        "matmul masked fp32": (matmul(masked_single, "fp32", False, True, True, bias=False), "fp32"),
        "matmul fp32 tf32": (matmul(tf32, "fp32", False, precision="tf32"), "fp32"),
        "matmul masked fp32 tf32": (matmul(masked_tf32, "fp32", False, True, True, "tf32", bias=False), "fp32"),
        "matmul strided pointers": (matmul(pointers, "bf16", False, strided=True), "bf16"),
        "matmul masked strided pointers": (matmul(masked, "bf16", False, True, strided=True), "bf16"),
        "shrink": (shrinks("bf16", False), "bf16"),
        "shrink dropout": (shrinks("bf16", True), "bf16"),
        "shrink dropout strided": (shrinks("fp32", True, True), "fp32"),
        "wgrad": (wgrads("bf16", False), "bf16"),
        "wgrad masked": (wgrads("bf16", True), "bf16"),
        "wgrad masked strided": (wgrads("fp32", True, True), "fp32"),
        "wgrad that shrinks": (wgrads("bf16", False, shrinks=True), "bf16"),
        "wgrad that shrinks, strided": (wgrads("fp32", False, True, True), "fp32"),
    }
    print(json.dumps({name: facts(*arguments) for name, arguments in table.items()}))


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
