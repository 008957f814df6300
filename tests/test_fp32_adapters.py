"""fp32 adapters over a 16-bit x, PEFT's default: read as they are, and rounded as a copy of them would have been."""

import pytest
import torch

from lora_kernels import lora_linear, plan

BACKENDS = ["triton", "torch"]
HALF = [torch.bfloat16, torch.float16]


def drawn(*shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def same(one, other):
    for a, b in zip(one, other, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("rank", [5, 40])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_thin_products_round_what_they_read(backend, dtype, rank, device):
    """To the last bit what the rounded copy gives: rank 40 takes the two launches in place of the one for ds and dB."""
    ops, x = plan.contractions(backend), drawn(37, 50, dtype=dtype, device=device)
    a, b, s = (drawn(*shape, device=device, seed=i) for i, shape in enumerate(((rank, 50), (50, rank), (37, rank))))
    same(ops.shrink(x, a, 1.5)[:1], ops.shrink(x, a.to(dtype), 1.5)[:1])
    s = s.to(dtype)
    same(
        ops.shrink_wgrad(x, s, b, 1.5, torch.float32), ops.shrink_wgrad(x, s, b.to(dtype), 1.5, torch.float32)
    )  # fmt: skip


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_products_round_what_they_read(backend, dtype, mixed, device):
    """Two of them, both in fp32 or one of each kind."""
    ops, rows, cols = plan.contractions(backend), 37, 50
    dy, weight = drawn(rows, 20, dtype=dtype, device=device), drawn(20, cols, dtype=dtype, device=device, seed=1)
    masked = []
    for i in range(2):
        _, keep = ops.shrink(drawn(rows, cols, dtype=dtype, device=device), weight, 1.0, 0.4)
        wide = drawn(5, cols, device=device, seed=3 + i)
        masked.append((drawn(rows, 5, dtype=dtype, device=device, seed=7 + i), wide.t(), keep))
    given = [(p, q.to(dtype) if mixed and i else q, keep) for i, (p, q, keep) in enumerate(masked)]
    rounded = [(p, q.to(dtype), keep) for p, q, keep in masked]
    sums = [([(dy, weight.t())], None)]
    same(ops.matmul_expand_all(sums, given), ops.matmul_expand_all(sums, rounded))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_call_copies_only_what_descriptors_read(p, device, monkeypatch):
    """A in forward, B in backward, and A there as well with dropout, come to the kernels as they were given."""
    ops, seen = plan.contractions("triton"), []
    for name in ("shrink", "shrink_wgrad"):
        call = getattr(ops, name)
        place = 1 if name == "shrink" else 2

        def spy(*args, call=call, place=place, **how):
            seen.append(args[place].dtype)
            return call(*args, **how)

        monkeypatch.setattr(ops, name, spy)
    x = drawn(20, 33, dtype=torch.bfloat16, device=device).requires_grad_()
    weight = drawn(17, 33, dtype=torch.bfloat16, device=device)
    a, b = drawn(4, 33, device=device).requires_grad_(), drawn(17, 4, device=device).requires_grad_()
    with plan.forced("fused"):
        lora_linear(x, weight, a, b, dropout_p=p, backend="triton").sum().backward()
    assert seen == [torch.float32, torch.float32]
    assert a.grad.dtype == b.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_adapters_of_yet_another_dtype_are_cast_under_autocast(backend, device):
    """fp16 adapters under bf16 autocast: what `F.linear` would do of them."""
    x = drawn(20, 33, device=device)
    weight, a, b = drawn(17, 33, device=device), drawn(4, 33, device=device), drawn(17, 4, device=device)
    with torch.autocast(device, torch.bfloat16):
        y = lora_linear(x, weight, a.half(), b.half(), backend=backend)
    expected = lora_linear(
        *(t.bfloat16() for t in (x, weight)), *(t.half().bfloat16() for t in (a, b)), backend=backend
    )  # fmt: skip
    same([y], [expected])
