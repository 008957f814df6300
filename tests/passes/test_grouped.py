"""The passes of layers of groups: which contractions run for which gradients, and how often B is copied."""

import pytest
import torch
from grouped_samples import call, draw, expert_minor
from operator_samples import Watch

from lora_kernels import passes, torch_backend
from lora_kernels.passes.grouped import _adjacent
from lora_kernels.passes.layer import as_dtype, readable

CONTRACTIONS = ("segments", "shrink_all", "matmul_expand_all", "shrink_wgrad", "wgrad", "wgrad_all")
RUN = {
    "x": ["segments", "shrink_all", "shrink_all", "matmul_expand_all"],
    "A0": ["segments", "shrink_all", "wgrad_all"],
    "B0": ["segments", "wgrad"],
    "A0 B0": ["segments", "shrink_wgrad", "wgrad_all"],
    "A0 A1": ["segments", "shrink_all", "shrink_all", "wgrad_all"],
    "x A0 B0 A1 B1": ["segments", "shrink_wgrad", "shrink_wgrad", "matmul_expand_all", "wgrad_all"],
    "weight": ["segments", "wgrad"],
    "bias": ["segments", "wgrad"],
}


@pytest.fixture
def made(monkeypatch):
    """Names of the contractions of passes, in order."""
    names = []
    for name in CONTRACTIONS:
        real = getattr(torch_backend, name)

        def spy(*args, _name=name, _real=real, **kwargs):
            if _name == "segments" or kwargs.get("segments") is not None:
                names.append(_name)
            return _real(*args, **kwargs)

        monkeypatch.setattr(torch_backend, name, spy)
    return names


@pytest.mark.parametrize("needed", RUN)
def test_backward_computes_what_is_needed_and_nothing_else(needed, made):
    t = draw("cpu")
    for name in needed.split():
        t[name].requires_grad_()
    y = call(t)
    assert made == ["segments", "shrink_all", "matmul_expand_all"]
    made.clear()
    y.backward(t["dy"])
    assert made == RUN[needed]


def test_without_adapters_nothing_is_shrunk(made):
    t = draw("cpu", ranks=())
    t["x"].requires_grad_()
    call(t).backward(t["dy"])
    assert made == ["segments", "matmul_expand_all"] * 2


@pytest.mark.parametrize("adapters", [torch.bfloat16, torch.float32], ids=str)
def test_a_pass_copies_the_b_of_peft_once(adapters):
    t = draw("cpu", torch.bfloat16, adapters, sizes=(3, 4, 5), ranks=(4,))
    t["B0"] = expert_minor(t["B0"])
    with Watch() as mode:
        y, (s,) = passes.grouped.forward(
            t["x"], t["weight"], [(t["A0"], t["B0"])], t["offsets"], t["bias"], [2.0], "torch"
        )
    copies = [args for op, args in mode.calls if op is torch.ops.aten.copy_.default and args[0].shape == t["B0"].shape]
    assert len(copies) == 1
    assert copies[0][0].is_contiguous()
    assert (y.shape, s.shape) == ((14, 10), (14, 4))


@pytest.mark.parametrize("groups", [1, 4])
def test_what_is_adjacent_is_not_copied(groups):
    b = torch.randn(groups, 6, 3)
    assert _adjacent(readable, b, torch.bfloat16) is b
    assert _adjacent(as_dtype, b, torch.float32) is b
    assert _adjacent(as_dtype, b.mT, torch.float32).data_ptr() == b.data_ptr()
    stored = expert_minor(b)
    copy = _adjacent(readable, stored, torch.bfloat16)
    assert (copy is stored) == (groups == 1)
    if groups > 1:
        assert (copy.dtype, copy.is_contiguous()) == (torch.bfloat16, True)
        assert torch.equal(copy, b.bfloat16())
