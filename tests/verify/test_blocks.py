"""Blocks in `lora-kernels verify`: the cases there are, and that a wrong block fails."""

import json

import pytest
import torch

from lora_kernels import cli, torch_backend
from lora_kernels.verify import block_matrix, grouped_matrix, layer_matrix
from lora_kernels.verify.block_matrix import BlockCase, examine, matrix
from lora_kernels.verify.block_problems import check_projections
from lora_kernels.verify.numerics_mlp import ACTIVATIONS

CPU = torch.device("cpu")
SMALL = dict(m=17, k=24, ranks=(8, 8, 8))
QKV = BlockCase("torch", "fp32", widths=(40, 16, 16), ps=(0.1, 0.0, 0.3), **SMALL)
MLP = BlockCase("torch", "fp32", widths=(40,), ps=(0.3, 0.1, 0.2), activation="silu", **SMALL)


def wrong(case):
    """What is wrong with a case, in words."""
    findings, messages = examine(case, torch.float32, CPU, 0)
    return [finding.message for finding in findings if not finding.ok] + messages


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_kind_of_block_is_in_the_matrix(backend, dtype):
    cases = matrix(backend, dtype, on_gpu=True, quick=False)
    blocks = [case for case in cases if not case.activation]
    assert {case.activation for case in cases if case.activation} == set(ACTIVATIONS)
    assert all(case.widths[0] > case.widths[1] == case.widths[2] for case in blocks)  # grouped queries
    assert any(len(set(case.ranks)) == 3 for case in blocks)
    assert any(0 in case.ranks for case in blocks)
    assert any(len(set(case.ps)) == 3 for case in blocks)
    assert any(case.fp32_adapters for case in cases) == (dtype == "bf16")
    assert len(matrix(backend, dtype, on_gpu=True, quick=True)) == 4


@pytest.mark.parametrize("case", [QKV, MLP], ids=str)
def test_blocks_by_operators_pass(case):
    assert wrong(case) == []


BREAKS = {
    "another activation": (
        MLP, "lora_mlp", lambda real, *args, activation, **more: real(*args, activation="gelu", **more)
    ),
    "gate for up": (
        MLP, "lora_mlp", lambda real, x, gate, up, down, **more: real(x, up, gate, down, **more)
    ),
    "down without dropout": (
        MLP, "lora_mlp", lambda real, x, gate, up, down, **more: real(x, gate, up, down._replace(dropout_p=0.0), **more)
    ),
    "one scaling for all": (
        QKV, "lora_qkv", lambda real, *args, scaling, **more: real(*args, scaling=[2.0, 2.0, 2.002], **more)
    ),
    "keys for values": (
        QKV, "lora_qkv", lambda real, *args, **more: (lambda q, k, v: (q, v, k))(*real(*args, **more))
    ),
    "one dropout for all": (
        QKV, "lora_qkv", lambda real, *args, dropout_p, **more: real(*args, dropout_p=0.1, **more)
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BREAKS)
def test_a_wrong_block_fails(what, monkeypatch):
    case, name, change = BREAKS[what]
    real = getattr(block_matrix, name)
    monkeypatch.setattr(block_matrix, name, lambda *args, **more: change(real, *args, **more))
    assert any("allowed" in message for message in wrong(case))


def test_a_block_that_writes_to_its_input_fails(monkeypatch):
    real = block_matrix.lora_mlp

    def scribble(x, *args, **more):
        y = real(x, *args, **more)
        args[2].weight.data[:1, :1].mul_(1 + 2**-20)  # as a kernel would, unseen by autograd
        return y

    monkeypatch.setattr(block_matrix, "lora_mlp", scribble)
    assert "down's weight was written to" in wrong(MLP)


def test_dx_is_held_to_the_sum_of_the_projections(monkeypatch):
    """Off by little in dx alone, which no projection has of its own."""
    problem = block_matrix._draw(QKV, torch.float32, "cpu", 0)
    actual, keeps = block_matrix._run(problem, "torch", 0), block_matrix._masks(problem, "torch", 0)
    assert all(finding.ok for finding in check_projections(actual, problem, keeps, split=True))
    actual["dx"] = actual["dx"] * (1 + 1e-4)
    wrong = [finding.name for finding in check_projections(actual, problem, keeps, split=True) if not finding.ok]
    assert wrong == ["dx"]


def test_the_command_shows_blocks(tmp_path, capsys, monkeypatch):
    for others in (layer_matrix, grouped_matrix):
        monkeypatch.setattr(others, "matrix", lambda *args: [])
    file = tmp_path / "v.json"
    argv = ["verify", "--quick", "--device", "cpu", "--backend", "torch", "--dtype", "fp32", "--json", str(file)]
    assert cli.main(argv) == 0
    qkv, mlp, *stored = (line for line in capsys.readouterr().out.splitlines() if line.startswith("torch"))
    assert [line.split()[4:-4] for line in stored] == [["qkv", "nf4"], ["mlp", "nf4"]]
    assert qkv.split()[2:6] == ["96x160x160+32+32", "r8/3/5", "qkv", "bias"]
    assert mlp.split()[2:7] == ["96x160x224", "r8", "mlp", "silu", "0.1"]
    records = json.loads(file.read_text())["cases"]
    assert all(0 < record["rule_1"] <= 1 for record in records)
    assert float(mlp.split()[7]) == pytest.approx(records[1]["rule_1"], abs=0.005)
    assert [record["activation"] for record in records] == ["", "silu"] * 2
    assert records[0]["ranks"] == [8, 3, 5]
    monkeypatch.setattr(torch_backend, "matmul_expand_all", lambda *args, **more: 1 / 0)
    assert cli.main(argv) == 1
    assert "ZeroDivisionError" in capsys.readouterr().out
