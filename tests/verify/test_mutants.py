"""The checks can fail: break the library in one place at a time, and the smoke oracle must go red.

The first of each kind runs always; `pytest --all-mutants tests/verify/test_mutants.py` runs the whole table.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lora_kernels

PACKAGE = Path(lora_kernels.__file__).parent
SMOKE = Path(__file__).parents[1] / "oracles" / "smoke.py"
SHRINK, MATMUL, SOURCES, WGRAD, DEVICE, DEVICE_ACTIVATION, ACTIVATION_WGRAD = (
    f"kernels/{n}.py"
    for n in ("shrink", "matmul_expand", "_sources", "wgrad", "_device", "_activation", "activation_wgrad")
)

# name: (file, text, replacement); the ones in ALWAYS run in every test run
MUTANTS = {
    "scaling missing": ("passes/linear.py", "alpha = scaling * keep_scale(dropout_p)", "alpha = keep_scale(dropout_p)"),
    "scaling missing in backward": ("autograd/linear.py", "        alpha = scaling * keep_scale(dropout_p)\n        save(", "        alpha = keep_scale(dropout_p)\n        save("),
    "alpha ignored by the kernel": (SHRINK, "acc * tl.cast(alphas[i], tl.float32)", "acc * 2.0"),
    "keep_scale missing": ("dropout.py", "return _STEPS / kept if kept else 0.0", "return 1.0"),
    "mask missing in dx": ("passes/linear.py", "summed, masked = ([thin], ()) if keep is None else", "summed, masked = ([thin], ()) if True else"),
    "mask missing in dA": ("passes/linear.py", "ds, x, adapter_dtypes[0], keep, into", "ds, x, adapter_dtypes[0], None, into"),
    "mask missing in s": (SHRINK, "kept = tl.where(unpack_bits(bits), x, tl.zeros((BLOCK_M, BLOCK_K), x.dtype))", "kept = x"),
    "mask flipped in dx": (MATMUL, "tl.where(kept(keep, SLICE), product, 0.0)", "tl.where(kept(keep, SLICE), 0.0, product)"),
    "mask on the base product": (MATMUL, "part += tl.where(kept(keep, SLICE), product, 0.0)", "part = tl.where(kept(keep, SLICE), product + part, 0.0)"),
    "mask with the wrong pitch": (DEVICE, "row_words = tl.cdiv(cols, 32)", "row_words = tl.cdiv(cols, 32) - 1"),
    "mask bits reversed": (DEVICE, "1 << tl.arange(0, 8)", "1 << (7 - tl.arange(0, 8))"),
    "bytes of a mask reversed": (DEVICE, "8 * tl.arange(0, BYTES)", "8 * (BYTES - 1 - tl.arange(0, BYTES))"),
    "mask of another slice in dx": (SOURCES, "load_kept(keep, offs_m, M, n0, N, SLICE)", "load_kept(keep, offs_m, M, n0 // (4 * SLICE) * (4 * SLICE), N, SLICE)"),
    "tiles of the step before in dx": (MATMUL, "tl.where(ends, 0, step + 1), after,", "tl.where(ends, 0, step), after,"),
    "tiles of the slice before in dx": (MATMUL, "n0 + tl.where(ends, i + 1, i) * SLICE", "n0 + i * SLICE"),
    "threshold off by much": ("dropout.py", "min(round(p * _STEPS)", "min(round((p + 0.01) * _STEPS)"),
    "strides of W swapped": (MATMUL, "for pair in sources) for side in (0, 1) for dim in (0, 1)]", "for pair in sources) for side in (0, 1) for dim in (side, 1 - side)]"),
    "strides of A swapped": (SHRINK, "offs_k[:, None] * strides_ak[i] + offs_r[None, :] * strides_ar[i]", "offs_k[:, None] * strides_ar[i] + offs_r[None, :] * strides_ak[i]"),
    "output strides swapped in wgrad": (WGRAD, "g.t() if flip else g))", "g if flip else g.t()))"),
    "accumulate missing in matmul": (MATMUL, "acc = tl.dot(p_tile, q_tile, acc, ", "acc = tl.dot(p_tile, q_tile, "),
    "accumulate missing in shrink": (SHRINK, "tl.dot(kept, a, accs[i], ", "tl.dot(kept, a, "),
    "accumulate missing in the parts of s and g": (DEVICE, "total += tl.load", "total = tl.load"),
    "accumulate missing in the parts of ds": (WGRAD, "ds += tl.sum(parts, 0)", "ds = tl.sum(parts, 0)"),
    "gradient that is there overwritten": (WGRAD, "acc += tl.load(g_block", "acc = 0 * acc + 2 * tl.load(g_block"),
    "thin product missing in beta1": ("kernels/hybrid.py", "y = ys[i] if i in ys else", "y = ys[i].zero_() if i in ys else"),
    "launch settled for other strides": ("kernels/_launch.py", "(t.shape, t.stride(), t.dtype, not", "(t.shape, t.stride() if t.is_contiguous() else (t.shape[1], 1), t.dtype, not"),
    "first to arrive adds up": (DEVICE, 'sem="acq_rel") == expected - 1', 'sem="acq_rel") == 0'),
    "counters not reset": (DEVICE, "tl.store(arrivals_ptr, 0)", "tl.store(arrivals_ptr, expected)"),
    "counters shared by g and ds": (WGRAD, "ds_arrivals_ptr = arrivals_ptr + tiles\n", "ds_arrivals_ptr = arrivals_ptr\n"),
    "alpha missing in ds": (WGRAD, "ds * tl.cast(alphas[i], tl.float32)", "ds"),
    "seed fixed": (SHRINK, "return draw_seed(x.device, count)", "return draw_seed(x.device, count).fill_(1)"),
    "seed cut to 32 bits": (SHRINK, "tl.load(seed_ptr + drawn)", "tl.load(seed_ptr + drawn) & 0xFFFFFFFF"),
    "same mask in every row": (SHRINK, "keep_bits(seeds[i], counter, thresholds[i])", "keep_bits(seeds[i], counter * 0 + offs_byte[None, :], thresholds[i])"),
    "K tail mask missing": (SHRINK, "mask=mask_m[:, None] & mask_k[None, :], other=0.0,", "mask=mask_m[:, None], other=0.0,"),
    "N tail mask missing at the store": (MATMUL, "mask=(offs_m < y_rows)[:, None] & (offs_n < N)[None, :])", "mask=(offs_m < y_rows)[:, None])"),
    "M tail mask missing": (WGRAD, "mask=mask_m[:, None] & mask_w[None, :], other=0.0,", "mask=mask_w[None, :], other=0.0,"),
    "last K tile skipped": (SHRINK, "splits = triton.cdiv(inner, config.k_per_split)", "splits = max(inner // config.k_per_split, 1)"),
    "last row split skipped": (WGRAD, "None, triton.cdiv(rows, config.rows_per_split)", "None, max(rows // config.rows_per_split, 1)"),
    "low-rank source skipped": (MATMUL, "firsts = firsts + (steps,)\n        steps +=", "firsts = firsts + (steps,)\n        steps += 0 if i else"),
    "bias twice": (MATMUL, "part += biases[i].to(tl.float32)[None, :]", "part += 2 * biases[i].to(tl.float32)[None, :]"),
    "16-bit accumulator": (MATMUL, "acc = tl.dot(p_tile, q_tile, acc, input_precision=PRECISION)", "acc = tl.dot(p_tile, q_tile, acc, input_precision=PRECISION).to(tl.float16).to(tl.float32)"),
    "tiles overlap": (MATMUL, "m0, n0 = pid_m * BLOCK_M, block_n * BLOCK_N", "m0, n0 = pid_m * (BLOCK_M // 2), block_n * BLOCK_N"),
    "grid one short": (SHRINK, "(None, None), triton.cdiv(rows, config.block_m)", "(None, None), max(rows // config.block_m, 1)"),
    "sources of the first output for all": (MATMUL, "begin = tl.where(pid_n >= before, firsts[ENDS[o - 1]], begin)", "begin = 0"),
    "columns of the first output for all": (MATMUL, "block_n = tl.where(pid_n >= before, pid_n - before, block_n)", "block_n = pid_n"),
    "bias of the first output for all": (MATMUL, "bias_ptr = bias_ptrs[o]", "bias_ptr = bias_ptrs[0]"),
    "mask of the first product for all": (SOURCES, "keep = keep_ptrs[j]", "keep = keep_ptrs[0]"),
    "mask of the first adapter for all": (SHRINK, "seed_ptr + drawn", "seed_ptr"),
    "alpha of the first adapter for all": (SHRINK, "tl.cast(alphas[i]", "tl.cast(alphas[0]"),
    "parts of s in one place": (SHRINK, "            before += Rs[i]\n        s = ", "        s = "),
    "parts of g in one place": (WGRAD, "            before += Ts[i]\n            #", "            #"),
    "parts of ds in one place": (WGRAD, "ds_parts_ptr + tl.cast(before, tl.int64) * M * (tiles // num_t)", "ds_parts_ptr"),
    "stale h": (DEVICE_ACTIVATION, "return (value * up).to(gate.dtype), (dh", "return value.to(gate.dtype), (dh"),
    "du and dg swapped": (ACTIVATION_WGRAD, "zip(before, (DGATE, DUP), strict=False)", "zip(before, (DUP, DGATE), strict=False)"),
    "slope missing in dg": (DEVICE_ACTIVATION, "(dh * up * slope)", "(dh * up)"),
    "mask missing in dA of down": (ACTIVATION_WGRAD, "Product(after.ds, after.out_dtype, True, after.keep,", "Product(after.ds, after.out_dtype, True, None,"),
    "h stored by nobody for a split": (SHRINK, "tl.store(h_ptr + offs_m[:, None] * K + offs_k[None, :], x, mask=inside)", "tl.store(h_ptr + offs_m[:, None] * K + offs_k[None, :], x, mask=inside & (offs_k * 0 + split < 1)[None, :])"),
    "gate and up swapped": ("passes/mlp.py", "activate_shrink(gate, up, activation, rows_of_down", "activate_shrink(up, gate, activation, rows_of_down"),
    "made again without s": ("passes/mlp.py", "[q.s for q in layers[:-1]])", "[None] * len(layers[:-1]))"),
    "masked twice in dA": (WGRAD, "right = tl.where(kept(words, BLOCK_W), right, tl.zeros((BLOCK_M, BLOCK_W), right.dtype))", "right = tl.where(kept(words, BLOCK_W), right, tl.zeros((BLOCK_M, BLOCK_W), right.dtype))\n                wides = (right,)"),
    "gradients of A in the wrong order": ("passes/projections.py", "in zip(which, d_lora_As,", "in zip(which[::-1], d_lora_As,"),
    "shapes no part of a kind": ("plan/steps.py", "(t.shape, t.stride(), ", "(t.stride(), "),
    "numbers no part of a kind": ("plan/steps.py", "_steps(pass_, settings, kinds,", "_steps(pass_, (), kinds,"),
    "one slot for every part": ("passes/projections.py", "ops, slot = steps.ops, steps[i]", "ops, slot = steps.ops, steps[0]"),
    "saved s overwritten": ("passes/linear.py", "    return dx, d_lora_A, d_lora_B\n", "    if need_B:\n        s.data.zero_()\n    return dx, d_lora_A, d_lora_B\n"),
}  # fmt: skip
ALWAYS = (
    "scaling missing in backward", "mask missing in dx", "strides of A swapped", "accumulate missing in matmul",
    "seed fixed", "K tail mask missing", "N tail mask missing at the store", "16-bit accumulator",
)  # fmt: skip


def smoke(tmp_path, mutate=None):
    """Run the smoke oracle on a copy of the package, with one text replaced."""
    copy = tmp_path / "lora_kernels"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    if mutate:
        name, text, replacement = mutate
        source = (copy / name).read_text()
        (copy / name).write_text(source.replace(text, replacement))
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])}
    return subprocess.run([sys.executable, str(SMOKE)], capture_output=True, text=True, env=env, timeout=2000)


@pytest.mark.skipif(torch.cuda.is_available(), reason="mutants run in the interpreter, where memory faults are caught")
class TestMutants:
    @pytest.mark.parametrize("name", MUTANTS)
    def test_stands_in_the_source(self, name):
        file, text, _ = MUTANTS[name]
        assert (PACKAGE / file).read_text().count(text) == 1, f"{text!r} is not once in {file}: renew the table"

    @pytest.mark.slow
    def test_the_whole_package_passes(self, tmp_path):
        run = smoke(tmp_path)
        assert "all passed" in run.stdout, run.stderr[-2000:]

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "name", [pytest.param(n, marks=() if n in ALWAYS else pytest.mark.mutant) for n in MUTANTS]
    )
    def test_is_killed(self, name, tmp_path):
        run = smoke(tmp_path, MUTANTS[name])
        assert run.returncode != 0, "the mutant lives: no check saw it"
        assert "Traceback" in run.stderr or run.returncode < 0
        assert "SyntaxError" not in run.stderr, run.stderr[-500:]
        assert "ImportError" not in run.stderr, run.stderr[-500:]
