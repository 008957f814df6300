"""Layers of groups in `lora-kernels verify`: the cases there are, and that a wrong layer fails."""

import json
import math
from dataclasses import replace

import pytest
import torch

from lora_kernels import cli, lora_grouped_linear, torch_backend
from lora_kernels.verify import block_matrix, grouped_problems, layer_matrix, numerics
from lora_kernels.verify.grouped_matrix import GROUPED_LAYOUTS, GroupedCase, draw_grouped, examine, matrix
from lora_kernels.verify.grouped_problems import check_grouped, grouped_leaves, grouped_outputs, make_grouped
from lora_kernels.verify.judge import Truth, judge
from lora_kernels.verify.provider import Provider, Rounding

CPU = torch.device("cpu")
CASE = GroupedCase("torch", "fp32", 24, 20, 4, (0, 7, 1, 9), 2, "two adapters")


def wrong(case=CASE):
    """What is wrong with a case, in words."""
    findings, messages = examine(case, CPU, 0)
    return [finding.message for finding in findings if not finding.ok] + messages


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_kind_of_group_is_in_the_matrix(dtype, backend, on_gpu):
    cases = matrix(backend, dtype, on_gpu, quick=False)
    assert {len(case.sizes) for case in cases} >= {1, 3, 8, 128}
    assert any(case.beyond for case in cases)
    assert any(not any(case.sizes) for case in cases)
    assert any(sum(map(bool, case.sizes)) == 1 < len(case.sizes) for case in cases)
    assert all(any(size == one for case in cases for size in case.sizes) for one in (0, 1))
    assert {case.strides for case in cases} == set(GROUPED_LAYOUTS) - ({"fp32 adapters"} if dtype == "fp32" else set())
    quick = matrix(backend, dtype, on_gpu, quick=True)
    assert (128 in {len(case.sizes) for case in quick}) == (on_gpu or backend == "torch")
    assert 5 <= len(quick) <= 7


@pytest.mark.parametrize("layout", GROUPED_LAYOUTS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_groups_by_operators_pass(layout, dtype):
    assert wrong(replace(CASE, dtype=dtype, strides=layout)) == []


def test_the_truth_is_that_of_the_folded_formula_in_float64():
    q = draw_grouped(CASE, "cpu", 0)
    leaves = {name: t.detach().double().requires_grad_() for name, t in grouped_leaves(q, weight=True).items()}
    y, ends = torch.zeros(q.x.shape[0], 20, dtype=torch.float64), q.offsets.tolist()
    for e in range(len(q.sizes)):
        folded = leaves["dweight"][e]
        for i, scaling in enumerate(q.scalings):
            folded = folded + scaling * leaves[f"d_lora_B[{i}]"][e] @ leaves[f"d_lora_A[{i}]"][e]
        part = leaves["dx"][ends[e] : ends[e + 1]] @ folded.T
        y = torch.cat((y[: ends[e]], part, y[ends[e + 1] :]))
    rows = slice(0, ends[-1])
    exact, grads = grouped_outputs(q), torch.autograd.grad(y[rows], list(leaves.values()), q.dy[rows].double())
    for name, value in {"y": y, **dict(zip(leaves, grads, strict=True))}.items():
        torch.testing.assert_close(exact[name], value, rtol=1e-12, atol=1e-12)


def test_rows_of_no_group_hold_nan_in_the_problem():
    q = make_grouped((2, 3), 8, 4, (2,), torch.float32, "cpu", beyond=2)
    assert all(t[5:].isnan().all() and t[:5].isfinite().all() for t in (q.x, q.dy))
    assert all(math.frexp(scaling)[0] == 0.5 for scaling in q.scalings)


def one_more(t, place):
    t = t.clone()
    t[place] += 1e-3
    return t


BREAKS = {
    "one scaling for all": lambda real, *args, scaling, **more: real(*args, scaling=[2.0, 0.501], **more),
    "one adapter": lambda real, *args, scaling, **more: real(*args, scaling=[2.0, 0.0], **more),
    "scalings exchanged": lambda real, *args, scaling, **more: real(*args, scaling=[0.5, 2.0], **more),
    "a row of another group": lambda real, x, w, A, B, offsets, **more: real(x, w, A, B, one_row_on(offsets), **more),
    "experts exchanged": lambda real, x, w, *args, **more: real(x, w.flip(0), *args, **more),
}  # fmt: skip


def one_row_on(offsets):
    """The offsets with one row of the group before given to the group of one row."""
    return offsets - torch.tensor([0, 0, 1, 0, 0], dtype=offsets.dtype)


@pytest.mark.parametrize("what", BREAKS)
def test_a_wrong_layer_fails(what, monkeypatch):
    real = grouped_problems.lora_grouped_linear
    monkeypatch.setattr(grouped_problems, "lora_grouped_linear", lambda *a, **more: BREAKS[what](real, *a, **more))
    assert wrong()


OUTPUTS = ("y", "dx", "d_lora_A[0]", "d_lora_B[0]", "d_lora_A[1]", "d_lora_B[1]", "dweight")


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_that_is_off_fails_and_is_named(name):
    q = draw_grouped(CASE, "cpu", 0)
    exact = {key: t.float() for key, t in grouped_outputs(q).items() if key in OUTPUTS}
    assert all(f.ok for f in check_grouped(exact, q, split=True))
    findings = check_grouped(exact | {name: one_more(exact[name], (1, 0))}, q, split=True)
    assert [f.name for f in findings if not f.ok] == [name]


@pytest.mark.parametrize("name", OUTPUTS)
def test_what_must_be_zero_is_held_to_zero(name):
    """Rows of no group, and the gradients of a group without rows: 1e-30 is too much."""
    q = draw_grouped(CASE, "cpu", 0)
    exact = {key: t.float() for key, t in grouped_outputs(q).items() if key in OUTPUTS}
    place = -1 if name in ("y", "dx") else 0
    assert not exact[name][place].any()
    for value in (1e-30, float("nan")):
        tainted = exact[name].clone()
        tainted[place].view(-1)[0] = value
        findings = check_grouped(exact | {name: tainted}, q, split=True)
        assert [f.name for f in findings if not f.ok] == [name]


def test_a_layer_that_writes_to_its_input_or_jitters_fails(monkeypatch):
    real, calls = grouped_problems.lora_grouped_linear, []

    def scribble(x, weight, *args, **more):
        y = real(x, weight, *args, **more)
        weight.data[0, :1, :1].mul_(1 + 2**-20)  # as a kernel would, unseen by autograd
        calls.append(y)
        return y * (1 + 2**-23) if len(calls) == 2 else y

    monkeypatch.setattr(grouped_problems, "lora_grouped_linear", scribble)
    found = wrong()
    assert "weight was written to" in found
    assert "y differs from run to run" in found


@pytest.mark.parametrize("rounding", [Rounding.OPERATORS, Rounding.OWN])
def test_a_provider_of_groups_is_judged(rounding):
    q = make_grouped((3, 0, 40, 1), 32, 24, (4, 2), torch.bfloat16, "cpu", beyond=2)
    leaves = grouped_leaves(q)

    def forward(scaling=q.scalings):
        lists = ([leaves[f"d_lora_{name}[{i}]"] for i in range(2)] for name in "AB")
        return lora_grouped_linear(leaves["dx"], q.weight, *lists, q.offsets, scaling=scaling, backend="torch")

    assert judge(Provider("ours", q, forward, leaves, rounding), Truth()).ok
    verdict = judge(Provider("ours", q, lambda: forward((2.0, 1.0)), leaves, rounding), Truth())
    assert "y" in verdict.reason


def test_the_command_shows_groups(tmp_path, capsys, monkeypatch):
    for others in (layer_matrix, block_matrix):
        monkeypatch.setattr(others, "matrix", lambda *args: [])
    file = tmp_path / "v.json"
    argv = ["verify", "--quick", "--device", "cpu", "--backend", "torch", "--dtype", "fp32", "--json", str(file)]
    assert cli.main(argv) == 0
    first, *_ = (line for line in capsys.readouterr().out.splitlines() if line.startswith("torch"))
    assert first.split()[2:6] == ["325+5x96x136", "r8", "E8", "experts"]
    records = json.loads(file.read_text())["cases"]
    assert all(0 < record["rule_1"] <= 1 for record in records)
    assert records[0]["sizes"] == [0, 63, 1, 65, 0, 64, 129, 3]
    monkeypatch.setattr(torch_backend, "segments", lambda *args, **more: 1 / 0)
    assert cli.main(argv) == 1
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_the_limits_of_one_group_are_those_of_a_layer():
    q = replace(make_grouped((9,), 16, 8, (2,), torch.float32, "cpu", bias=True), scalings=(1.0,))
    one = numerics.Problem(q.x, q.weight[0], q.lora_As[0][0], q.lora_Bs[0][0], q.dy, q.bias[0])
    limits, own = grouped_problems._limits(q, 0, slice(0, 9), True, 0), numerics.bounds(one, True)
    assert all(torch.equal(limits[name], value) for name, value in own.items())
