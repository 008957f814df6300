"""Quantised weights in `lora-kernels verify` and in the judge of `bench`: nearest values, exact masks, faults that show."""

import dataclasses
import importlib.util

import pytest
import torch

from lora_kernels import reference, torch_backend
from lora_kernels.bench.providers import block as block_providers
from lora_kernels.bench.providers import layer as layer_providers
from lora_kernels.passes.layer import Projection
from lora_kernels.verify import judge, matrix
from lora_kernels.verify.block_matrix import BlockCase
from lora_kernels.verify.block_problems import BlockProblem, quantised
from lora_kernels.verify.layer_matrix import STORED, LayerCase
from lora_kernels.verify.problems import make_problem
from lora_kernels.verify.stored import FORMATS, changeable, quantise, write

CPU = torch.device("cpu")
HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
SMALL = dict(m=17, k=24, ranks=(8, 0, 3), ps=(0.3, 0.0, 0.1), stored="nf4")
QKV = BlockCase("torch", "fp32", widths=(40, 16, 16), **SMALL)
MLP = BlockCase("torch", "fp32", widths=(40,), activation="silu", **SMALL)
LAYER = LayerCase("torch", "bf16", 33, 24, 40, 8, "nf4", 0.1)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- quantise


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_each_weight_has_the_nearest_code(kind):
    w = drawn(7, 45)
    weight = quantise(w, kind, nested=False, block=32)
    scale = weight.scale.repeat_interleave(32)[: w.numel()]
    near = (w.view(-1, 1) / scale.view(-1, 1) - weight.code).abs().amin(1)
    error = (reference.dequantize(weight, torch.float64).view(-1) - w.view(-1)).abs() / scale
    assert torch.allclose(error, near.double(), atol=1e-6)
    assert weight.scale[0] == w.view(-1)[:32].abs().max()


@pytest.mark.parametrize(("kind", "most"), [("nf4", 0.12), ("fp4", 0.14), ("fp8", 0.03), ("int8", 0.012)])
@pytest.mark.parametrize("shape", [(64, 96), (5, 7), (130, 300)])
def test_the_error_is_that_of_the_format(kind, most, shape):
    w = drawn(*shape)
    error = reference.dequantize(quantise(w, kind), torch.float32) - w
    assert 0 < error.square().mean().sqrt() / w.square().mean().sqrt() < most


@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="needs bitsandbytes")
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_codes_and_scales_are_those_of_bitsandbytes(kind):
    functional = pytest.importorskip("bitsandbytes.functional")
    w = drawn(64, 128)
    packed, state = functional.quantize_4bit(w, blocksize=64, compress_statistics=False, quant_type=kind)
    weight = quantise(w, kind, nested=False)
    assert torch.equal(weight.code, state.code)
    assert torch.equal(weight.scale, state.absmax)
    # a weight half way between two codes may go either way
    assert (weight.packed == packed).float().mean() > 0.99


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("nested", [False, True])
def test_a_block_of_zeros_stays_zero(kind, nested):
    assert not reference.dequantize(quantise(torch.zeros(3, 64), kind, nested=nested), torch.float32).any()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("nested", [False, True])
def test_zeros_and_ones_are_written_exactly(kind, nested):
    weight, ones = quantise(drawn(7, 13), kind, nested=nested), torch.zeros(7, 13)
    ones[2, 3] = ones[6, 12] = 1
    kept = [t.clone() for t in weight.tensors()]
    before = [t.clone() for t in changeable(weight)]
    write(weight, ones)
    assert torch.equal(reference.dequantize(weight, torch.float32), ones)
    for t, b in zip(changeable(weight), before, strict=True):
        t.copy_(b)
    assert all(torch.equal(t.float(), k.float()) for t, k in zip(weight.tensors(), kept, strict=True))


# --- verify


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_format_is_in_the_matrix(dtype):
    cases = matrix.matrix("torch", dtype, on_gpu=False, quick=False)
    layers = {case.layout for case in cases if isinstance(case, LayerCase)}
    assert {*STORED} - {"nf4 fp32"} <= layers
    assert ("nf4 fp32" in layers) == (dtype == "bf16")
    blocks = [case for case in cases if isinstance(case, BlockCase)]
    for stored in FORMATS:
        for gated in (False, True):
            of_kind = [case for case in blocks if case.stored == stored and bool(case.activation) == gated]
            assert {bool(case.p) for case in of_kind} == {False, True}
    quick = matrix.matrix("torch", dtype, on_gpu=False, quick=True)
    assert {case.layout for case in quick} >= {"nf4", "fp8", "qkv nf4", "mlp nf4"}


def wrong(case):
    result = matrix.examine(case, CPU, 0)
    return result.message


@pytest.mark.parametrize("case", [LAYER, QKV, MLP], ids=str)
def test_a_right_case_passes(case):
    assert wrong(case) == ""


@pytest.mark.parametrize("case", [LAYER, QKV, MLP], ids=str)
def test_one_wrong_bit_of_w_fails(case, monkeypatch):
    real = torch_backend.dequantize

    def off_by_one(weight, dtype, slot=None):
        w = real(weight, dtype, slot)
        w.view(torch.int16 if w.itemsize == 2 else torch.int32).view(-1)[5:6] ^= 1
        return w

    monkeypatch.setattr(torch_backend, "dequantize", off_by_one)
    assert "dequantised differs from the reference in 1 of " in wrong(case)


@pytest.mark.parametrize("case", [LAYER, QKV, MLP], ids=str)
def test_the_calls_read_the_stored_weights(case, monkeypatch):
    """Were the dense W given to the call, a wrong dequantisation would not show in its results."""
    real, calls = torch_backend.dequantize, []
    monkeypatch.setattr(
        torch_backend, "dequantize", lambda *args, **named: calls.append(1) or real(*args, **named) * 1.1
    )
    message = wrong(case)
    assert "dx" in message
    assert "allowed" in message
    # once for the bits, twice for each pass of each of two runs
    assert len(calls) == (5 if case is LAYER else 15)


def test_a_stored_weight_that_is_written_to_is_told(monkeypatch):
    real = torch_backend.dequantize

    def scribble(weight, *args, **named):
        weight.scale.view(torch.uint8)[:1] += 1
        return real(weight, *args, **named)

    monkeypatch.setattr(torch_backend, "dequantize", scribble)
    assert "weight's tensor 1 was written to" in wrong(LAYER)
    assert "q's tensor 1 was written to" in wrong(QKV)


# --- masks are read off providers with stored weights


def layer_problem(kind):
    return quantised(make_problem((64,), 32, 48, 8, torch.float32, "cpu", dropout_p=0.25), kind)


def block_problem(kind, activation):
    sides = [(24, 40), (24, 40), (40, 24)] if activation else [(24, 40), (24, 16), (24, 16)]
    drawn = [make_problem((64,), k, n, 8, torch.float32, "cpu", seed=i) for i, (k, n) in enumerate(sides)]
    names = ("gate", "up", "down") if activation else ("q", "k", "v")
    layers = {n: Projection(q.weight, q.lora_A, q.lora_B, None, 2.0, 0.25) for n, q in zip(names, drawn, strict=True)}
    dys = (drawn[-1].dy,) if activation else tuple(q.dy for q in drawn)
    return quantised(BlockProblem(drawn[0].x, layers, dys, activation), kind)


@pytest.mark.parametrize("kind", ["nf4", "fp8", "int8"])
@pytest.mark.parametrize("what", ["layer", "qkv", "mlp"])
def test_masks_are_those_of_dense_weights(what, kind):
    if what == "layer":
        problem, providers = layer_problem(kind), layer_providers
    else:
        problem, providers = block_problem(kind, "silu" if what == "mlp" else ""), block_providers
    found = []
    for one in (problem, dataclasses.replace(problem, stored={})):
        provider = providers.build("ours", one, "torch")
        found.append(judge.find_masks(one, provider.leaves, lambda dys, p=provider: judge.run_once(p, dys, 1)["dx"]))
    stored, dense = found
    assert [*stored] == [*dense] == [*problem.layers]
    for name in dense:
        assert torch.equal(stored[name], dense[name])
    # and every weight is what it was
    for name, weight in problem.stored.items():
        assert torch.equal(reference.dequantize(weight, torch.float32), problem.layers[name].weight)


def test_a_layer_that_reads_other_weights_is_not_taken_for_right():
    problem = layer_problem("nf4")
    other = dataclasses.replace(problem, stored={"": quantise(drawn(48, 32, seed=5) / 6, "nf4")}, dropout_p=0.0)
    assert not judge.judge(layer_providers.build("ours", other, "torch"), judge.Truth()).ok
    right = dataclasses.replace(problem, dropout_p=0.0)
    assert judge.judge(layer_providers.build("ours", right, "torch"), judge.Truth()).ok
