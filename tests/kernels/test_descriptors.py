"""What describes operands for TMA: by address where descriptors are kept, of a copy where TMA cannot read a tensor."""

import pytest
import torch

from lora_kernels.kernels import _descriptors
from lora_kernels.kernels._descriptors import Describe
from lora_kernels.kernels._launch import facts


def test_a_kept_descriptor_is_of_the_address_and_holds_no_memory():
    """One descriptor an address, which a second tensor there shares; another address has its own."""
    buffer = torch.zeros(2, 16, 64, dtype=torch.bfloat16)
    first, second = buffer
    describe = Describe(facts(first), (16, 32), turned=False, keeps=True)
    made = describe(first)
    assert describe(first.view_as(first)) is made
    assert made.base.data_ptr() == first.data_ptr()
    assert made.base is not first
    assert (made.shape, made.strides, made.block_shape) == ([16, 64], [64, 1], [16, 32])
    other = describe(second)
    assert other is not made
    assert other.base.data_ptr() == second.data_ptr()


def test_kept_descriptors_are_bounded(monkeypatch):
    """However many addresses operands take, only so many descriptors are kept, of all operands together."""
    monkeypatch.setattr(_descriptors, "_MOST", 4)
    monkeypatch.setattr(_descriptors, "_kept", 4)
    rows = torch.zeros(11, 16, 64, dtype=torch.bfloat16)
    operands = [Describe(facts(rows[0]), (16, 32), turned=False, keeps=True) for _ in range(2)]
    most = 0
    for t in rows:
        for describe in operands:
            assert describe(t).base.data_ptr() == t.data_ptr()
            most = max(most, sum(len(one.known) for one in operands))
    assert most == 4


def test_a_transpose_is_described_by_the_tensor_it_is_of():
    """A stored transpose needs no view: its address and the transposed layout say all."""
    stored = torch.zeros(64, 16, dtype=torch.bfloat16)
    q = stored.t()
    made = Describe(facts(q).t(), (32, 16), turned=True, keeps=True)(q)
    assert (made.shape, made.strides) == ([64, 16], [16, 1])
    assert made.base.data_ptr() == stored.data_ptr()


def test_a_copy_lives_as_long_as_its_descriptor():
    """Nobody else holds it: were it freed before the launch, the allocator would give its memory to the next one."""
    odd = torch.ones(7, 5, dtype=torch.bfloat16)
    describe = Describe(facts(odd), (16, 16), turned=False, keeps=True)
    made = [describe(odd), describe(2 * odd)]
    assert [one.base[0, 0].item() for one in made] == [1, 2]
    assert not describe.known


@pytest.mark.parametrize("turned", [False, True])
def test_what_tma_cannot_read_is_copied(turned):
    """Rows that are not on 16 bytes: a copy with rows that are, of the values of now and not of the first call."""
    odd = torch.arange(7 * 5, dtype=torch.float32).view(7, 5).bfloat16()
    given = odd.t() if turned else odd
    operand = facts(given).t() if turned else facts(given)
    describe = Describe(operand, (16, 16), turned, keeps=False)
    for shift in (0, 100):
        changed = given + shift
        made = describe(changed)
        assert made.strides == [8, 1]
        assert made.base.data_ptr() % 16 == 0
        torch.testing.assert_close(made.base, changed.t() if turned else changed, rtol=0, atol=0)


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("pitch", [0, 8, 24, 32])
def test_rows_that_overlap_are_copied(pitch, turned, keeps):
    """A window that slides over a signal, or one row expanded to many; of rows that just touch nothing is copied."""
    signal = torch.arange(16 * 32, dtype=torch.bfloat16)
    rows = signal.as_strided((16, 32), (pitch, 1))
    given = rows.t() if turned else rows
    describe = Describe(facts(given).t() if turned else facts(given), (16, 32), turned, keeps)
    made = describe(given)
    assert (made.base.data_ptr() == signal.data_ptr()) == (pitch == 32)
    assert (made.shape, made.strides) == ([16, 32], [32, 1])
    assert bool(describe.known) == (keeps and pitch == 32), "a descriptor of a copy is not kept"
    if pitch < 32:
        assert torch.equal(made.base, rows)
