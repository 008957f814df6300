"""The registered operators of several projections: PyTorch's own checks, the plain call's numbers, and what sees them."""

import functools
import io

import pytest
import torch
import torch.nn.functional as F
from operator_samples import Watch, assert_same, fresh_compiler, taken  # noqa: F401  a fixture
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels import autograd, lora_projections, plan

both = pytest.mark.parametrize("backend", ["torch", "triton"])
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),  # PyTorch's own
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]
K, SHAPES = 24, ((20, 5), (8, 0), (12, 3))  # out_features and rank of each; the second has no adapter
PS = (0.5, 0.3, 0.4)


class Attention(nn.Module):
    """Three projections of what came through a nonlinearity, one without an adapter, one without a bias."""

    def __init__(self, device, p=True, dtype=torch.float32, adapters=None, backend="auto"):
        super().__init__()
        torch.manual_seed(0)

        def make(*shape, dtype=dtype):
            return nn.Parameter(torch.randn(shape).mul(0.3).to(device, dtype))

        self.weights = [make(n, K).requires_grad_(False) for n, _ in SHAPES]
        self.lora_A = nn.ParameterList(make(r, K, dtype=adapters or dtype) for _, r in SHAPES if r)
        self.lora_B = nn.ParameterList(make(n, r, dtype=adapters or dtype) for n, r in SHAPES if r)
        self.bias = nn.ParameterList(make(n) for n, _ in SHAPES[:2])
        self.scaling, self.ps, self.backend = 2.0, PS if p else (0.0,) * 3, backend
        self.dys = [torch.randn(2, 5, n).to(device, dtype) for n, _ in SHAPES]

    @property
    def pairs(self):
        first, last = zip(self.lora_A, self.lora_B, strict=True)
        return [first, None, last]

    def arguments(self):
        """Those of the composite operator."""
        lora_As, lora_Bs = ([pair and pair[side] for pair in self.pairs] for side in (0, 1))
        return self.weights, lora_As, lora_Bs, [*self.bias, None], [self.scaling, 1.0, 1.0], list(self.ps), self.backend

    def forward(self, x):
        return lora_projections(
            torch.tanh(x), self.weights, self.pairs, biases=[*self.bias, None], scaling=[self.scaling, 1.0, 1.0],
            dropout_p=self.ps, backend=self.backend,
        )  # fmt: skip


def activations(device, dtype=torch.float32, batch=(2, 5)):
    torch.manual_seed(1)
    return torch.randn(*batch, K).to(device, dtype).requires_grad_()


def outcome(model, run, x, seed=7):
    """Each y and the gradients of all that is trained, after a seed."""
    torch.manual_seed(seed)
    ys = run(x)
    trained = [x, *(q for q in model.parameters() if q.requires_grad)]
    dys = [dy[:, :1].expand_as(y) for dy, y in zip(model.dys, ys, strict=True)]
    return [*ys, *torch.autograd.grad(ys, trained, dys)]


def backward_of(model, x, at=(0, 1, 2)):
    """The arguments of the backward of these outputs."""

    def run():
        ys = model(x)
        torch.autograd.backward([ys[i] for i in at], [model.dys[i] for i in at])

    return taken(autograd.projections.projections_backward, run)


@pytest.mark.parametrize("p", [False, True])
@both
def test_opcheck_of_projections_and_their_forward(backend, p, device):
    model, x = Attention(device, p, backend=backend), activations(device)
    checks = ["test_schema", "test_autograd_registration"]
    opcheck(autograd.projections.projections, (x, *model.arguments()), test_utils=checks)
    x, tensors, *rest = taken(autograd.projections.projections_forward, lambda: model(x))
    args = (x.requires_grad_(), [t.requires_grad_() for t in tensors], *rest)
    opcheck(
        autograd.projections.projections_forward, args,
        test_utils=[*checks, "test_faketensor"] + ["test_aot_dispatch_dynamic"] * (p and backend == "torch"),
    )  # fmt: skip


@pytest.mark.parametrize(
    "needed",
    [
        pytest.param("x", marks=pytest.mark.slow),
        pytest.param("lora_A", marks=pytest.mark.slow),
        pytest.param("lora_B", marks=pytest.mark.slow),
        "all",
        "all of two",
    ],
)
@both
def test_opcheck_of_their_backward(backend, needed, device):
    model = Attention(device, True, torch.bfloat16, torch.float32, backend)
    for name, q in model.named_parameters():
        q.requires_grad_(needed.startswith("all") or name.startswith(needed))
    x = activations(device, torch.bfloat16).requires_grad_(needed != "lora_A" and needed != "lora_B")
    at = (1, 2) if needed == "all of two" else (0, 1, 2)
    args = backward_of(model, x, at)
    opcheck(
        autograd.projections.projections_backward, args,
        test_utils=["test_schema", "test_autograd_registration", "test_faketensor"],
    )  # fmt: skip


@pytest.mark.parametrize("form", ["beta1", "joint", "padded"])
def test_the_fake_shapes_hold_where_the_library_does_the_large_products(form, device):
    model, x = Attention(device, False, backend="triton"), activations(device)
    with plan.force_form(form):
        forward = taken(autograd.projections.projections_forward, lambda: model(x))
        opcheck(autograd.projections.projections_forward, forward, test_utils=["test_schema", "test_faketensor"])
        args = backward_of(model, x)
        opcheck(autograd.projections.projections_backward, args, test_utils=["test_schema", "test_faketensor"])
        with Watch():
            apart = outcome(model, model, x)
    assert_same(apart, outcome(model, model, x))


@pytest.mark.parametrize(
    "form", ["fused", *(pytest.param(form, marks=pytest.mark.slow) for form in ("beta1", "torch"))]
)
def test_gradients_are_contiguous_as_the_fake_kernel_promises(form, device):
    model = Attention(device, False, backend="torch" if form == "torch" else "triton")
    with plan.force_form("fused" if form == "torch" else form):
        x, tensors, *rest = backward_of(model, activations(device))
        # each dy is the only one of its tensors with three dims
        args = x, [F.pad(t, (2, 2))[..., 2:-2] if t.dim() == 3 else t for t in tensors], *rest
        assert sum(not t.is_contiguous() for t in args[1] if t.dim() == 3) == 3
        real = autograd.projections.projections_backward(*args)
    with FakeTensorMode(allow_non_fake_inputs=True):
        promised = autograd.projections.projections_backward(*args)
    found, fake = ([(g.shape, g.stride(), g.dtype) for g in each] for each in (real, promised))
    assert found == fake
    assert len(found) == 5
    assert all(g.is_contiguous() for g in promised)


@pytest.mark.parametrize(("p", "adapters"), [(False, torch.bfloat16), (True, torch.float32)], ids=str)
@both
def test_the_operators_give_what_the_plain_call_gives(backend, p, adapters, device):
    model, x = Attention(device, p, torch.bfloat16, adapters, backend), activations(device, torch.bfloat16)

    def watched(x):
        with Watch() as mode:
            ys = model(x)
        assert mode.seen.count(autograd.projections.projections_forward) == 1
        return ys

    expected, got = (outcome(model, run, x) for run in (model, watched))
    assert all(map(torch.equal, got, expected))
    assert [t.dtype for t in got] == [t.dtype for t in expected]


def test_adapters_of_several_dtypes_under_autocast(device):
    model, x = Attention(device, False), activations(device)
    model.lora_A[0].data, model.lora_B[1].data = model.lora_A[0].data.half(), model.lora_B[1].data.bfloat16()

    def run(x, f=model):
        with torch.autocast(device, dtype=torch.bfloat16):
            return f(x)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    expected, got = (outcome(model, f, x) for f in (run, compiled))
    assert [t.dtype for t in got] == [t.dtype for t in expected]
    assert {t.dtype for t in got} == {torch.float32, torch.float16, torch.bfloat16}
    for value, exact in zip(got, expected, strict=True):
        torch.testing.assert_close(value, exact, rtol=0.02, atol=0.02 * exact.abs().max().item())


@both
def test_only_what_is_needed_is_saved(backend, device):
    model, x = Attention(device, backend=backend), activations(device).detach()
    for q in (*model.lora_A, *model.bias):
        q.requires_grad_(False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        autograd.projections.projections(x, *model.arguments())
    assert saved == [(10, 8 if backend == "torch" else 12)]  # s alone, side by side; kernels pad each to 16 bytes


def test_an_output_that_nothing_came_of_is_left_out(device):
    model, x = Attention(device, False, backend="torch"), activations(device)
    _, tensors, _, alphas, *_ = backward_of(model, x, at=(2,))
    assert len(alphas) == 1
    assert torch.equal(tensors[0], model.dys[2])
    ys = autograd.projections.projections(x, *model.arguments())
    found = torch.autograd.grad(ys[2], [x, *model.lora_A], model.dys[2], allow_unused=True)
    assert [g is None for g in found] == [False, True, False]
    torch.testing.assert_close(found[0], model.dys[2] @ (model.weights[2] + model.lora_B[1] @ model.lora_A[1]))


def test_double_backward_raises(device):
    model, x = Attention(device, False, backend="torch"), activations(device)
    ys = autograd.projections.projections(x, *model.arguments())
    (dx,) = torch.autograd.grad(ys[0], x, model.dys[0].requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match=r"twice.*once_differentiable"):
        dx.sum().backward()


@both
def test_flops_are_counted(backend, device):
    model, x = Attention(device, False, backend=backend), activations(device)
    dense = 2 * 10 * K * sum(n for n, _ in SHAPES)
    thin_in, thin_out = 2 * 10 * K * sum(r for _, r in SHAPES), 2 * 10 * sum(n * r for n, r in SHAPES)
    with FlopCounterMode(display=False) as counter:
        ys = model(x)
        assert counter.get_total_flops() == dense + thin_in + thin_out
        torch.autograd.backward(ys, model.dys)
    assert counter.get_total_flops() == 2 * dense + 3 * thin_in + 3 * thin_out


@pytest.mark.parametrize("backend", [pytest.param("torch", marks=pytest.mark.slow), "triton"])
def test_one_graph_for_every_seed_scaling_and_batch(backend, device):
    model = Attention(device, backend=backend)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    graphs = None
    steps = [(4, 2.0), (7, 0.7), (5, -3.0)]
    for seed, (rows, scaling) in enumerate(steps[: 3 if backend == "torch" else 2]):
        model.scaling = scaling
        x = activations(device, batch=(2, rows))
        assert_same(outcome(model, compiled, x, seed), outcome(model, model, x, seed))
        graphs = graphs or counter.frame_count
        assert counter.frame_count == graphs
    (node,) = counter.graphs[0].graph.find_nodes(op="call_function", target=autograd.projections.projections)
    assert node.args[-1] == backend


@both
def test_masks_are_independent_and_new_at_each_call(backend, device):
    """Of a projection and of its like, of two calls in a graph, and of two runs of a graph."""
    x, weight = torch.ones(40, K, device=device), torch.zeros(8, K, device=device)
    pair = torch.ones(8, K, device=device), torch.eye(8, device=device)

    def run():
        return torch.stack(lora_projections(x, [weight] * 2, [pair] * 2, dropout_p=0.5, backend=backend))

    ys = torch.compile(lambda: torch.cat([run(), run()]), backend="aot_eager_decomp_partition", fullgraph=True)
    sums = [y[:, 0] for y in (*ys(), *ys())]  # of what each row kept
    assert all(not torch.equal(sums[i], sums[j]) for i in range(8) for j in range(i))
    assert all(abs(t.mean().item() - K) < 6 for t in sums)


@pytest.mark.parametrize(
    "use_reentrant", [pytest.param(True, marks=pytest.mark.slow), False], ids=["reentrant", "non-reentrant"]
)
@both
def test_a_checkpointed_block(use_reentrant, backend, device):
    model, x = Attention(device, backend=backend), activations(device)

    def gradients(run):
        model.zero_grad()
        leaf = x.detach().requires_grad_()
        torch.manual_seed(7)
        torch.autograd.backward(run(leaf), model.dys)
        return [leaf.grad, *(q.grad.clone() for q in model.parameters() if q.requires_grad)]

    def checkpointed(x, **more):
        return checkpoint(model, x, use_reentrant=use_reentrant, **more)

    expected = gradients(model)
    assert_same(gradients(checkpointed), expected)
    other = gradients(functools.partial(checkpointed, preserve_rng_state=False))
    assert (other[0] - expected[0]).abs().max() > 0.01  # and it is the masks that were held equal
    if not use_reentrant and backend == "torch":
        assert_same(gradients(torch.compile(checkpointed, backend="aot_eager", fullgraph=True)), expected)


@pytest.mark.parametrize("saved", ["the operator", "PyTorch's products"])
@both
def test_selective_checkpointing(saved, backend, device, monkeypatch):
    calls = []
    contractions = plan.contractions(backend)
    shrink_all = contractions.shrink_all

    def counted(x, rows, **more):
        calls.extend([rows] if any(p for *_, p in rows) else [])  # forward alone has a probability
        return shrink_all(x, rows, **more)

    model, x = Attention(device, backend=backend), activations(device)
    policy = autograd.projections.projections_forward if saved == "the operator" else torch.ops.aten.mm.default
    contexts = functools.partial(create_selective_checkpoint_contexts, [policy])
    expected = outcome(model, model, x)
    monkeypatch.setattr(contractions, "shrink_all", counted)
    got = outcome(model, lambda x: checkpoint(model, x, use_reentrant=False, context_fn=contexts), x)
    assert_same(got, expected)
    assert len(calls) == (1 if saved == "the operator" else 2)


@both
def test_export(backend, device, monkeypatch):
    monkeypatch.setattr(plan.backend, "_environment_backend", lambda: backend)
    model, example = Attention(device, False), activations(device).detach()
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(model, (example,), dynamic_shapes=({1: rows},))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count(autograd.projections.projections) == 1
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    x = activations(device, batch=(2, 7)).detach()
    for exported in (program, torch.export.load(buffer), program.run_decompositions()):
        for y, other in zip(exported.module()(x), model(x), strict=True):
            torch.testing.assert_close(y, other)


def test_sizes_of_zero_more_than_a_launch_holds_and_none_that_joins(device):
    model = Attention(device, backend="torch")
    x = activations(device).detach()
    weights, pairs = [*model.weights] * 2, [*model.pairs] * 2

    def run(x, p):
        ps = [p, 0.0, p] * 2
        return lora_projections(x, weights, pairs, dropout_p=ps, backend="torch")

    compiled = torch.compile(run, backend="eager", fullgraph=True)
    for p, t in ((0.5, x), (1.0, x), (0.5, x[:, :0])):
        ys = []
        for f in (run, compiled):
            torch.manual_seed(2)
            ys.append(f(t, p))
        assert all(map(torch.equal, *ys))
    ys = torch.compile(lambda x: lora_projections(x, weights[:3], [None] * 3), backend="eager", fullgraph=True)(x)
    assert all(torch.equal(y, nn.functional.linear(x, w)) for y, w in zip(ys, weights, strict=False))


def test_the_padding_of_s_is_zero(device):
    """A compiler's or a checker's copy of s would hold what stood in the memory before; here that is NaN."""
    kind, ranks = dict(dtype=torch.bfloat16, device=device), (5, 3)
    x, w = torch.ones(6, K, **kind), torch.ones(8, K, **kind)
    tensors = [t for r in ranks for t in (w, torch.ones(r, K, **kind), torch.ones(8, r, **kind))]
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        given = [0, 1, 2, 4, 5, 6], None, [1.0, 1.0], [0.0, 0.0], "triton"
        _, s, _ = autograd.projections.projections_forward(x, tensors, *given)
    finally:
        torch.use_deterministic_algorithms(before)
    assert s.shape[1] > sum(ranks)
    assert s.unique().tolist() == [0, K]
