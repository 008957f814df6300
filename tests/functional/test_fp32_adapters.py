"""fp32 adapters over a 16-bit x, PEFT's default: read as they are, and rounded as a copy of them would have been."""

import contextlib
import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels import Projection, lora_linear, lora_mlp, lora_qkv, plan
from lora_kernels.functional import lora_add
from lora_kernels.kernels import hybrid

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


WIDE, NARROW = torch.float32, torch.bfloat16
THIN = {  # what a contraction reads of adapters
    "shrink": lambda x, a, *_, **__: [a],
    "shrink_all": lambda x, rows, **_: [a for a, *_ in rows],
    "activate_shrink": lambda gate, up, activation, rows, **_: [a for a, *_ in rows],
    "shrink_wgrad": lambda dy, s, b, *_, **__: [b],
    "activation_wgrad": lambda gate, up, dh, activation, after, *before, **_: [one.lora_B for one in before],
    "matmul_expand": lambda sources, *_, **__: [q for p, q in sources if R in q.shape],
    "matmul_expand_all": lambda outputs, masked=(), *_, **__: (
        [q for sources, _ in outputs for p, q in sources if R in q.shape] + [q for _, q, _ in masked]
    ),
}
M, K, N, R = 20, 33, 17, 4


@pytest.fixture
def seen(monkeypatch):
    """The dtypes that adapters have in each contraction, in order; contractions of one kind in a row count as one."""
    ops, found = plan.contractions("triton"), []
    for name, thin in THIN.items():
        call = getattr(ops, name)

        def spy(*args, name=name, thin=thin, call=call, **how):
            one = (name, {t.dtype for t in thin(*args, **how)})
            if found[-1:] != [one]:
                found.append(one)
            return call(*args, **how)

        monkeypatch.setattr(ops, name, spy)
    monkeypatch.setitem(hybrid._STRATEGIES, "fused", ops.matmul_expand_all)
    with plan.force_form("fused"):
        yield found


def layer(x, pair, weight, p):
    return lora_linear(x, weight(N, K), *pair(N, K), dropout_p=p, backend="triton")


def several(x, pair, weight, p):
    widths = N, 9, 9
    ys = lora_qkv(x, [weight(n, K) for n in widths], [pair(n, K) for n in widths], dropout_p=p, backend="triton")
    return torch.cat(ys, 1)


def mlp(x, pair, weight, p):
    layers = [Projection(weight(*shape), *pair(*shape), dropout_p=p) for shape in ((N, K), (N, K), (9, N))]
    return lora_mlp(x, *layers, backend="triton")


def add(x, pair, weight, p):
    return lora_add(x @ weight(N, K).t(), x, *pair(N, K), dropout_p=p, backend="triton")


def contractions_of(call, into_dx):
    """What a call should show: B is copied for y, and A for dx (`into_dx`) where no mask is in the way."""
    wide, narrow = {WIDE}, {NARROW}
    down = [("shrink_wgrad", wide), ("matmul_expand_all", into_dx)]
    if call is layer:
        return [("shrink", wide), ("matmul_expand_all", narrow), *down]
    if call is add:  # y, and dx without a mask, are PyTorch's products
        return [("shrink", wide), ("shrink_wgrad", wide), *([("matmul_expand", wide)] if into_dx == wide else [])]
    inward = [("shrink_all", wide), ("matmul_expand_all", narrow)]
    dx = ("matmul_expand_all", into_dx)
    if call is several:
        return [*inward, ("shrink_wgrad", wide), dx]
    return [*inward, ("activate_shrink", wide), ("matmul_expand_all", narrow), *down, ("activation_wgrad", wide), dx]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("call", [layer, several, mlp, add])
def test_a_call_copies_only_what_descriptors_read(call, p, seen, device):
    """A in forward, B in backward, and A there as well with dropout, come to the kernels as they were given."""
    adapters = []

    def pair(n, k):
        adapters.extend(drawn(*shape, device=device).requires_grad_() for shape in ((R, k), (n, R)))
        return adapters[-2:]

    x = drawn(M, K, dtype=NARROW, device=device).requires_grad_()
    call(x, pair, lambda n, k: drawn(n, k, dtype=NARROW, device=device), p).sum().backward()
    assert seen == contractions_of(call, {WIDE if p else NARROW})
    assert all(t.grad.dtype == WIDE for t in adapters)


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


ROWS, SIDE = 257, 8  # sums over the rows are multiples of 257 by powers of two, which bf16 does not have
EXACT = {
    "lora_linear": lambda x, w, a, b, backend: lora_linear(x, w, a, b, backend=backend),
    "lora_add": lambda x, w, a, b, backend: lora_add(x @ w.t(), x, a, b, backend=backend),
    "lora_qkv": lambda x, w, a, b, backend: sum(lora_qkv(x, [w] * 3, [(a, b)] * 3, backend=backend)),
    "lora_mlp": lambda x, w, a, b, backend: lora_mlp(
        x, None, Projection(w, a, b), Projection(w, a, b), activation="relu2", backend=backend
    ),
}


WAYS = ["a plain call", "an operator", "autocast"]


@pytest.mark.parametrize("call", EXACT)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("trained", ["A and B", "A", "B"])
def test_gradients_are_fp32_sums_that_were_never_rounded(backend, call, way, trained, device):
    """Each term is exact in bf16 and their sum is not, so that a sum rounded on its way shows in every element."""
    x, w, a, b = (torch.ones(*s, device=device) for s in ((ROWS, SIDE), (SIDE, SIDE), (1, SIDE), (SIDE, 1)))
    x, w = (t if way == "autocast" else t.bfloat16() for t in (x, 0 * w))
    found, exact = ([t.detach().to(kind) for t in (a, b)] for kind in (WIDE, torch.float64))
    pairs = [pair for name, *pair in zip("AB", found, exact, strict=True) if name in trained.split(" and ")]
    for t in itertools.chain(*pairs):
        t.requires_grad_()
    modes = {"an operator": FlopCounterMode(display=False), "autocast": torch.autocast(device, torch.bfloat16)}
    with modes.get(way, contextlib.nullcontext()):
        y = EXACT[call](x, w, *found, backend)
    y.backward(torch.ones_like(y))
    y = (3 if call == "lora_qkv" else 1) * x.double() @ exact[0].T @ exact[1].T
    if call == "lora_mlp":
        y = y.relu().square() @ exact[0].T @ exact[1].T
    y.sum().backward()
    for t, right in pairs:
        assert t.grad.dtype == WIDE
        assert not torch.equal(right.grad, right.grad.bfloat16().double()), "the case shows nothing"
        assert torch.equal(t.grad.double(), right.grad)
