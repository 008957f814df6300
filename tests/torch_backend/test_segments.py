"""Groups of rows in the torch backend: one after the other, and all together by `grouped_mm` as on a GPU."""

import pytest
import torch
import torch.nn.functional as F
from grouped_samples import call, draw, formula, leaves

from lora_kernels import torch_backend, torch_segments
from lora_kernels.verify import grouped_problems
from lora_kernels.verify.grouped_matrix import GROUPED_LAYOUTS, GroupedCase, draw_grouped
from lora_kernels.verify.grouped_problems import GROUPED_MM_ROUNDINGS, check_grouped, run_grouped

needs_grouped_mm = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="PyTorch 2.10 has grouped_mm")


@pytest.fixture
def together(monkeypatch):
    """All groups by `grouped_mm`, which PyTorch has for CPUs as well; returns the operands of its calls."""
    seen, real = [], F.grouped_mm

    def spied(left, right, offs):
        seen.append((left, right))
        found = real(left, right, offs=offs)
        # what PyTorch does not promise: the rows of no group, and the gradients of groups without rows
        if right.dim() == 3:
            found[int(offs[-1]) :] = float("nan")
        else:
            found[offs.diff(prepend=offs.new_zeros(1)) == 0] = float("nan")
        return found

    def takes(operands):
        floats = [t for t in torch_segments._tensors(operands) if t.is_floating_point()]
        return all(t.numel() and t.dtype != torch.float64 for t in floats)

    monkeypatch.setattr(F, "grouped_mm", spied)
    monkeypatch.setattr(torch_segments, "_takes_grouped_mm", takes)
    return seen


@needs_grouped_mm
@pytest.mark.parametrize("layout", GROUPED_LAYOUTS)
@pytest.mark.parametrize("size", [(32, 48, 8), (33, 21, 3)], ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_groups_together_keep_the_rules(dtype, size, layout, together):
    q = draw_grouped(GroupedCase("torch", dtype, *size, (0, 17, 1, 0, 40), 3, layout), "cpu", 0)
    findings = check_grouped(run_grouped(q, "torch", weight=True), q, True, GROUPED_MM_ROUNDINGS)
    assert all(f.ok for f in findings), [f.message for f in findings if not f.ok]
    assert together


@needs_grouped_mm
def test_wide_operands_that_fit_are_not_copied(together):
    t = draw("cpu", torch.bfloat16, k=32, n=48, ranks=(8,))
    for each in leaves(t).values():
        each.requires_grad_()
    t["weight"] = t["weight"].detach()
    call(t).backward(t["dy"])
    own = {t[name].data_ptr() for name in ("x", "weight", "dy")}
    large = min(t[name].numel() for name in ("x", "dy"))
    assert {
        each.data_ptr() for pair in together for each in pair if each.numel() >= large and each.data_ptr() in own
    } == own
    # the others are the fp32 ones, s, ds, and those of A and B
    assert all(each.data_ptr() in own for pair in together for each in pair if each.numel() >= t["weight"].numel())


@pytest.mark.parametrize("way", ["one by one", "together"])
def test_values_that_offsets_may_have(way, request):
    """More rows than there are, as many, and offsets in either dtype; the reference agrees."""
    if way == "together":
        request.getfixturevalue("together")
    t = draw("cpu", k=16, n=8, ranks=(4,), sizes=(3, 0, 5), beyond=4)
    for offsets in ([0, 3, 3, 8], [0, 12, 12, 12], [0, 0, 0, 12], [0, 0, 0, 0]):
        for dtype in (torch.int32, torch.int64):
            t["offsets"] = torch.tensor(offsets, dtype=dtype)
            torch.testing.assert_close(call(t), formula(t))
            torch.testing.assert_close(call(t, "reference"), formula(t))


def test_a_contraction_of_one_group_is_as_before():
    x, a = torch.randn(5, 6), torch.randn(2, 6)
    (s,), _ = torch_backend.shrink_all(x, [(a, 2.0, 0.0)], slot=None)
    torch.testing.assert_close(s, 2 * x @ a.T)
    assert torch_backend.wgrad.__doc__.startswith("Compute g = left")


def test_a_cpu_computes_each_group_that_has_rows_once(monkeypatch):
    seen, real = [], torch_segments._OVER_GROUPS["matmul_expand_all"][0]
    segments = torch_backend.segments(torch.tensor([0, 2, 2, 5]), 7)

    def contraction(outputs):
        seen.append(outputs[0][0][0][0].shape[0])
        return [torch.ones(seen[-1], 3)]

    (y,) = real(contraction, segments, [([(torch.randn(7, 4), torch.randn(3, 3, 4))], None)])
    assert seen == [2, 3]
    assert y.sum(1).tolist() == [3.0] * 5 + [0.0] * 2


@needs_grouped_mm
@pytest.mark.parametrize("name", ["x", "weight"])
def test_an_operand_that_begins_between_two_boundaries_is_copied(name, together):
    t = draw("cpu", torch.bfloat16, k=32, n=48, ranks=(8,))
    expected = call(t)
    buffer = t[name].new_zeros(t[name].numel() + 1)
    t[name] = buffer[1:].view(t[name].shape).copy_(t[name])
    assert torch.equal(call(t), expected)
    assert all(each.data_ptr() % 16 == 0 for pair in together for each in pair)


def test_the_allowance_for_grouped_mm_is_not_given_to_others():
    q = grouped_problems.make_grouped((9,), 16, 8, (2,), torch.bfloat16, "cpu")
    limits = [grouped_problems._limits(q, 0, slice(0, 9), split, n) for split, n in ((False, 2), (True, 0), (True, 2))]
    kernels, loop, gpu = (one["y"].mean() for one in limits)
    assert kernels < loop < gpu
    assert torch.equal(limits[0]["d_lora_A"], limits[2]["d_lora_A"])
