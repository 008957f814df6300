"""Bad input of lora_grouped_linear: the fault's own words, before anything is computed or launched."""

import pytest
import torch
from quantized_samples import weight

from lora_kernels import lora_grouped_linear, plan


def call(**changes):
    """Four groups of layers from 6 to 5 features with an adapter of rank 2, and some arguments that differ."""
    t = dict(
        x=torch.randn(7, 6), weight=torch.randn(4, 5, 6), lora_A=torch.randn(4, 2, 6), lora_B=torch.randn(4, 5, 2),
        offsets=torch.tensor([0, 2, 2, 5, 7]),
    )  # fmt: skip
    return lora_grouped_linear(**t | changes)


class Subclass(torch.Tensor):
    pass


def several(count, **changes):
    return dict(lora_A=[torch.randn(4, 2, 6)] * count, lora_B=[torch.randn(4, 5, 2)] * count) | changes


FAULTS = {
    "x with 3 dims": (
        dict(x=torch.randn(2, 7, 6)), ValueError,
        r"x must have 2 dims, \(rows sorted by group, in_features\), got shape \(2, 7, 6\)\. Use x\.flatten\(0, -2\)\.",
    ),
    "x with 1 dim": (dict(x=torch.randn(6)), ValueError, r"x must have 2 dims, .*, got shape \(6,\)\.$"),
    "weight with 2 dims": (
        dict(weight=torch.randn(5, 6)), ValueError,
        r"weight must have 3 dims, \(E, out_features, in_features\), got shape \(5, 6\)\. Use lora_linear for a single",
    ),
    "weight with 4 dims": (dict(weight=torch.randn(1, 4, 5, 6)), ValueError, r"weight must have 3 dims.*\(1, 4, 5, 6\)\.$"),
    "x against weight": (
        dict(x=torch.randn(7, 9)), ValueError, r"x has 9 features but weight is \(4, 5, 6\) and expects 6\.$"
    ),
    "weight transposed": (
        dict(weight=torch.randn(4, 6, 5)), ValueError,
        r"x has 6 features but weight is \(4, 6, 5\) and expects 5\. Pass weight\.mT for a stack \(E, in_features, out_f",
    ),
    "offs of grouped_mm": (
        dict(offsets=torch.tensor([2, 2, 5, 7])), ValueError,
        r"offsets has 4 entries for 4 groups but must have 5, beginning with 0\. "
        r"From the offs of torch\.nn\.functional\.grouped_mm: torch\.nn\.functional\.pad\(offs, \(1, 0\)\)\.",
    ),
    "offsets of other groups": (
        dict(offsets=torch.arange(7)), ValueError,
        r"offsets is \(7,\) but must be \(5,\) for the 4 groups of weight: the first row of each group, and the row behind",
    ),
    "offsets with 2 dims": (dict(offsets=torch.zeros(1, 5).long()), ValueError, r"offsets is \(1, 5\) but must be \(5,\)"),
    "offsets in floats": (
        dict(offsets=torch.arange(5.0)), TypeError, r"offsets has dtype torch\.float32; supported: int32, int64\."
    ),
    "offsets elsewhere": (
        dict(offsets=torch.empty(5, dtype=torch.int64, device="meta")), ValueError,
        r"all tensors must be on one device; x is on cpu, offsets on meta\.",
    ),
    "offsets as a list": (dict(offsets=[0, 2, 2, 5, 7]), TypeError, r"offsets must be a torch\.Tensor, got list\."),
    "lora_A as PEFT stores it": (
        dict(lora_A=torch.randn(8, 6), lora_B=torch.randn(5, 8)), ValueError,
        r"lora_A is \(8, 6\) but must be \(4, r, 6\) to match weight\. They seem to be PEFT's: pass "
        r"lora_A\.view\(4, 2, 6\) and lora_B\.view\(5, 2, 4\)\.permute\(2, 0, 1\)\.",
    ),
    "lora_A without dims": (dict(lora_A=torch.tensor(1.0)), ValueError, r"lora_A is \(\) but must be \(4, r, 6\)"),
    "lora_A of other groups": (dict(lora_A=torch.randn(3, 2, 6)), ValueError, r"lora_A is \(3, 2, 6\) but must be \(4, r, 6\)"),
    "lora_A transposed": (
        dict(lora_A=torch.randn(4, 6, 2)), ValueError,
        r"lora_A is \(4, 6, 2\) but must be \(4, r, 6\) to match weight\. Did you pass lora_A transposed\? Use lora_A\.mT\.",
    ),
    "swapped": (
        dict(lora_A=torch.randn(4, 5, 2), lora_B=torch.randn(4, 2, 6)), ValueError,
        r"lora_A is \(4, 5, 2\) but .* lora_A and lora_B seem to be swapped: exchanged, they would fit\.",
    ),
    "lora_B transposed": (
        dict(lora_B=torch.randn(4, 2, 5)), ValueError,
        r"lora_B is \(4, 2, 5\) but must be \(4, 5, 2\): E x out_features x rank\. Did you pass lora_B transposed\? "
        r"Use lora_B\.mT\.",
    ),
    "lora_B of another rank": (dict(lora_B=torch.randn(4, 5, 3)), ValueError, r"lora_B is \(4, 5, 3\) but must be \(4, 5, 2\)"),
    "lora_B alone as PEFT stores it": (
        dict(lora_B=torch.randn(5, 8)), ValueError,
        r"lora_B is \(5, 8\) but must be \(4, 5, 2\): E x out_features x rank\. It seems to be PEFT's: pass "
        r"lora_B\.view\(5, 2, 4\)\.permute\(2, 0, 1\)\.",
    ),
    "bias": (dict(bias=torch.randn(5)), ValueError, r"bias is \(5,\) but must be \(4, 5\): E x out_features\."),
    "devices": (
        dict(lora_A=torch.empty(4, 2, 6, device="meta")), ValueError,
        r"all tensors must be on one device; x is on cpu, lora_A on meta\.",
    ),
    "dtype": (dict(x=torch.ones(7, 6, dtype=torch.int32)), TypeError, r"x has dtype torch\.int32; supported: bfloat16"),
    "mix of x and weight": (
        dict(weight=torch.randn(4, 5, 6).half()), TypeError,
        r"x is float32 but weight is float16\. Use torch\.autocast, or cast x: x\.to\(weight\.dtype\)\.",
    ),
    "16-bit adapters over fp32": (
        dict(lora_A=torch.randn(4, 2, 6).half()), TypeError,
        r"x is float32 but lora_A is float16\. Adapters must have x's dtype, or be float32 over a float16 or bfloat16 x\.",
    ),
    "dtype of bias": (
        dict(bias=torch.randn(4, 5).double()), TypeError, r"x is float32 but bias is float64\..*cast bias: bias\.to\(x\."
    ),
    "subclass": (dict(weight=torch.randn(4, 5, 6).as_subclass(Subclass)), TypeError, r"weight is a Subclass, a tensor subclass"),
    "sparse": (dict(weight=torch.ones(4, 5, 6).to_sparse()), TypeError, r"weight has layout torch\.sparse_coo\. Use weight\.to_d"),
    "not a tensor": (dict(x=[[1.0]]), TypeError, r"x must be a torch\.Tensor, got list\."),
    "quantised": (
        dict(weight=weight("int8", (5, 6))), TypeError,
        r"weight is a QuantizedWeight; pass a dense tensor \(E, out_features, in_features\)\.",
    ),
    "a list and a tensor": (
        dict(lora_A=[torch.randn(4, 2, 6)]), TypeError,
        r"lora_A is a list and lora_B a Tensor; pass a tensor as each, or for several adapters a list of tensors as each\.",
    ),
    "lists of other lengths": (
        several(2, lora_B=[torch.randn(4, 5, 2)]), ValueError, r"lora_A is of 2 adapters but lora_B of 1\."
    ),
    "too many adapters": (
        several(5), ValueError, r"lora_A is of 5 adapters; at most 4 are added by one call\. Concatenate some of them along r"
    ),
    "scalings of other adapters": (
        several(2, scaling=[1.0]), ValueError,
        r"scaling has 1 numbers for 2 adapters; pass one number for all, or one for each\.",
    ),
    "one of several": (
        several(2, lora_B=[torch.randn(4, 5, 2), torch.randn(4, 5, 3)]), ValueError,
        r"lora_B\[1\] is \(4, 5, 3\) but must be \(4, 5, 2\)",
    ),
    "dtype of one of several": (
        several(2, lora_A=[torch.randn(4, 2, 6), torch.randn(4, 2, 6).double()]), TypeError,
        r"x is float32 but lora_A\[1\] is float64\.",
    ),
    "scaling of one of several": (several(2, scaling=[1.0, float("inf")]), ValueError, r"scaling\[1\] must be finite, got inf\."),
    "scaling nan": (dict(scaling=float("nan")), ValueError, r"scaling must be finite, got nan\."),
    "scaling as a string": (dict(scaling="2"), TypeError, r"scaling must be a number, got str '2'\."),
    "rank": (
        dict(lora_A=torch.randn(4, 1024, 6), lora_B=torch.randn(4, 5, 1024), backend="triton"), ValueError,
        r'rank 1024 exceeds 512, the largest tuned; use backend="torch"\.',
    ),
    "backend": (dict(backend="cuda"), ValueError, r"backend='cuda' is not one of: auto, triton, torch, reference\."),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_fault(fault, monkeypatch):
    changes, kind, text = FAULTS[fault]

    def unreachable(backend):
        raise AssertionError("computed before the check")

    monkeypatch.setattr(plan, "contractions", unreachable)
    with pytest.raises(kind, match="^lora_grouped_linear: " + text):
        call(**changes)


@pytest.mark.parametrize("mode", ["no mode", "autocast"])
def test_the_right_call_is_right(mode):
    """So each fault above is the fault."""
    assert call().shape == call(**several(2, scaling=[1.0, 2.0])).shape == (7, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        assert call(bias=torch.randn(4, 5)).dtype == (torch.bfloat16 if mode == "autocast" else torch.float32)
        if mode == "autocast":
            assert call(weight=torch.randn(4, 5, 6).half()).dtype == torch.bfloat16


def test_under_autocast_shapes_are_checked_as_well():
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(ValueError, match=r"^lora_grouped_linear: bias is \(5,\) but must be"),
    ):
        call(bias=torch.randn(5))


def test_a_wrong_backend_is_refused_by_an_empty_call_too():
    with pytest.raises(ValueError, match="backend='cuda' is not one of"):
        call(x=torch.randn(0, 6), backend="cuda")
