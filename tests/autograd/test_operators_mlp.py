"""The registered operators of a gated MLP: PyTorch's own checks, the plain call's numbers, and what sees them."""

import functools
import io

import pytest
import torch
from operator_samples import Watch, assert_same, fresh_compiler, taken  # noqa: F401  a fixture
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels import Projection, autograd, lora_mlp, plan

both = pytest.mark.parametrize("backend", ["torch", "triton"])
again = pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recompute"])
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),  # PyTorch's own
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]
K, H, N, ROWS = 24, 20, 12, 10
NAMES = {"gate": (H, K, 5), "up": (H, K, 3), "down": (N, H, 2)}  # out, in and rank
STATIC = ["test_schema", "test_autograd_registration", "test_faketensor"]


class MLP(nn.Module):
    """A gated MLP of what came through a nonlinearity; up has no bias."""

    def __init__(self, device, p=True, dtype=torch.float32, adapters=None, backend="torch", recompute=False):
        super().__init__()
        torch.manual_seed(0)

        def make(*shape, dtype=dtype):
            return nn.Parameter(torch.randn(shape).mul(0.4).to(device, dtype))

        self.weights = {name: make(out, inner).requires_grad_(False) for name, (out, inner, _) in NAMES.items()}
        self.lora_A = nn.ParameterDict({n: make(r, i, dtype=adapters or dtype) for n, (_, i, r) in NAMES.items()})
        self.lora_B = nn.ParameterDict({n: make(o, r, dtype=adapters or dtype) for n, (o, _, r) in NAMES.items()})
        self.bias = nn.ParameterDict({name: make(NAMES[name][0]) for name in ("gate", "down")})
        self.scaling, self.ps = 2.0, dict(gate=0.5, up=0.3, down=0.4) if p else dict.fromkeys(NAMES, 0.0)
        self.how = dict(backend=backend, recompute=recompute)
        self.dy = torch.randn(2, 5, N).to(device, dtype)

    def layer(self, name):
        bias = self.bias.get(name)
        return Projection(
            self.weights[name], self.lora_A[name], self.lora_B[name], bias, self.scaling, self.ps[name]
        )  # fmt: skip

    def arguments(self):
        """Those of the composite operator after x."""
        lists = map(list, zip(*map(self.layer, NAMES), strict=True))
        return *lists, "silu", self.how["recompute"], self.how["backend"]

    def forward(self, x):
        return lora_mlp(torch.tanh(x), *map(self.layer, NAMES), **self.how)


def activations(device, dtype=torch.float32, batch=(2, 5)):
    torch.manual_seed(1)
    return torch.randn(*batch, K).to(device, dtype).requires_grad_()


def outcome(model, run, x, seed=7):
    """y and the gradients of all that is trained, after a seed."""
    torch.manual_seed(seed)
    y = run(x)
    trained = [x, *(q for q in model.parameters() if q.requires_grad)]
    return [y, *torch.autograd.grad(y, trained, model.dy[:, :1].expand_as(y))]


def watched(model):
    def run(x):
        with Watch() as mode:
            y = model(x)
        assert mode.seen.count(autograd.mlp.mlp_forward) == 1
        return y

    return run


def backward_of(model, x):
    return taken(autograd.mlp.mlp_backward, lambda: model(x).backward(model.dy))


@pytest.mark.parametrize(("backend", "p", "recompute"), [("torch", True, False), ("triton", True, True)])
def test_opcheck_of_the_mlp_and_its_forward(backend, p, recompute, device):
    model, x = MLP(device, p, backend=backend, recompute=recompute), activations(device)
    opcheck(autograd.mlp.mlp, (x, *model.arguments()), test_utils=STATIC[:2])
    x, tensors, *rest = taken(autograd.mlp.mlp_forward, lambda: model(x))
    args = (x.requires_grad_(), [t.requires_grad_() for t in tensors], *rest)
    opcheck(autograd.mlp.mlp_forward, args, test_utils=STATIC + ["test_aot_dispatch_dynamic"] * (backend == "torch"))


@pytest.mark.parametrize(
    ("backend", "needed", "recompute"),
    [("torch", needed, how) for needed in ("x", "lora_A.down", "lora_B.down", "lora_A.up", "all") for how in (0, 1)]
    + [("triton", "all", True), ("triton", "lora_A.down", False)],
)
def test_opcheck_of_its_backward(backend, needed, recompute, device):
    model = MLP(device, True, torch.bfloat16, torch.float32, backend, bool(recompute))
    for name, q in model.named_parameters():
        q.requires_grad_(needed in ("all", name))
    for weight in model.weights.values():
        weight.requires_grad_(needed == "all")
    x = activations(device, torch.bfloat16).requires_grad_(needed in ("all", "x"))
    opcheck(autograd.mlp.mlp_backward, backward_of(model, x), test_utils=STATIC)


@pytest.mark.parametrize("form", ["beta1", "joint", "padded"])
def test_the_fake_shapes_hold_where_the_library_does_the_large_products(form, device):
    model, x = MLP(device, False, backend="triton"), activations(device)
    with plan.force_form(form):
        with Watch() as mode:
            model(x).backward(model.dy)
        for op in (autograd.mlp.mlp_forward, autograd.mlp.mlp_backward):
            opcheck(op, *(args for func, args in mode.calls if func is op), test_utils=["test_faketensor"])


@pytest.mark.parametrize(("p", "adapters"), [(False, torch.bfloat16), (True, torch.float32)], ids=str)
@pytest.mark.parametrize(("backend", "recompute"), [("torch", False), ("torch", True), ("triton", False)])
def test_the_operators_give_what_the_plain_call_gives(backend, recompute, p, adapters, device):
    model = MLP(device, p, torch.bfloat16, adapters, backend, recompute)
    for weight in model.weights.values():
        model.register_parameter(f"weight{len(list(model.parameters()))}", weight.requires_grad_())
    x = activations(device, torch.bfloat16)
    expected, got = (outcome(model, run, x) for run in (model, watched(model)))
    assert all(map(torch.equal, got, expected))
    assert [t.dtype for t in got] == [t.dtype for t in expected]


@again
def test_without_a_gate_and_without_some_adapters(recompute, device):
    model, x = MLP(device, recompute=recompute), activations(device)
    up, down = model.layer("up")._replace(lora_A=None, lora_B=None), model.layer("down")

    def run(x, layers):
        torch.manual_seed(2)
        y = lora_mlp(x, None, *layers, activation="relu2", recompute=recompute, backend="torch")
        return [y, *torch.autograd.grad(y, [x, model.bias["down"]], model.dy)]

    for layers in ((up, down), (model.layer("up"), down._replace(lora_A=None, lora_B=None))):
        with Watch() as mode:
            got = run(x, layers)
        assert mode.seen.count(autograd.mlp.mlp_forward) == mode.seen.count(autograd.mlp.mlp_backward) == 1
        assert all(map(torch.equal, got, run(x, layers)))


def saved_by(call):
    """Shapes of what a call saves for backward, parameters and all."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call()
    return saved


@pytest.mark.parametrize("way", ["plain", "operator"])
@again
@both
def test_exactly_this_is_saved(backend, recompute, way, device):
    model, x = MLP(device, backend=backend, recompute=recompute), activations(device)
    layers = [model.layer(name) for name in NAMES]
    trained = [t for q in layers for t in q[:3]] + ([layers[0].bias] if recompute else [])
    run = functools.partial(lora_mlp, x, *layers, **model.how)

    def by_operator():
        with Watch():
            run()

    saved = saved_by(run if way == "plain" else by_operator)
    given = [t for t in saved if any(t is one for one in (x, *trained))]
    made = sorted(tuple(t.shape) for t in saved if not any(t is one for one in (x, *trained)))
    assert len(given) == 1 + len(trained)
    wide = [inner if backend == "torch" else -(-inner // 32) for _, inner, _ in NAMES.values()]
    masks, thin = [(ROWS, w) for w in wide], [(ROWS, r) for *_, r in NAMES.values()]
    assert made == sorted([*masks, *thin, *([] if recompute else [(ROWS, H)] * 2)])


def test_only_what_is_needed_is_saved(device):
    model, x = MLP(device), activations(device).detach()
    for name, q in model.named_parameters():
        q.requires_grad_(name == "lora_B.down")
    assert [tuple(t.shape) for t in saved_by(lambda: autograd.mlp.mlp(x, *model.arguments()))] == [(ROWS, 2)]


def test_double_backward_raises(device):
    model, x = MLP(device, False), activations(device)
    y = autograd.mlp.mlp(x, *model.arguments())
    (dx,) = torch.autograd.grad(y, x, model.dy.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match=r"twice.*once_differentiable"):
        dx.sum().backward()


@again
def test_flops_are_counted(recompute, device):
    model, x = MLP(device, False, recompute=recompute), activations(device)
    dense, low_in, low_out = (
        2 * ROWS * sum(f(*sizes) for sizes in NAMES.values())
        for f in (lambda n, k, r: n * k, lambda n, k, r: r * k, lambda n, k, r: r * n)
    )
    with FlopCounterMode(display=False) as counter:
        y = model(x)
        assert counter.get_total_flops() == dense + low_in + low_out
        y.backward(model.dy)
    repeated = 2 * ROWS * sum((k + r) * n for n, k, r in (NAMES["gate"], NAMES["up"])) if recompute else 0
    assert counter.get_total_flops() == 2 * dense + 3 * low_in + 3 * low_out + repeated


@pytest.mark.parametrize("recompute", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["kept", "recompute"])
def test_one_graph_for_every_seed_scaling_and_batch(recompute, device):
    model = MLP(device, recompute=recompute)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    graphs = None
    for seed, (rows, scaling) in enumerate([(4, 2.0), (7, 0.7), (5, -3.0)]):
        model.scaling = scaling
        x = activations(device, batch=(2, rows))
        assert_same(outcome(model, compiled, x, seed), outcome(model, model, x, seed))
        graphs = graphs or counter.frame_count
        assert counter.frame_count == graphs
    (node,) = counter.graphs[-1].graph.find_nodes(op="call_function", target=autograd.mlp.mlp)
    assert node.args[-2:] == (recompute, "torch")


@pytest.mark.slow
def test_inductor(device):
    model, x = MLP(device), activations(device)
    assert_same(outcome(model, torch.compile(model, fullgraph=True), x), outcome(model, model, x))


def test_two_calls_in_a_graph_have_masks_of_their_own(device):
    model, x = MLP(device), activations(device).detach()
    ys = torch.compile(lambda: [model(x), model(x)], backend="aot_eager_decomp_partition", fullgraph=True)
    first, second = ys()
    assert (first - second).abs().max() > 0.01


def gradients(model, run, x):
    model.zero_grad()
    leaf = x.detach().requires_grad_()
    torch.manual_seed(7)
    run(leaf).backward(model.dy)
    return [leaf.grad, *(q.grad.clone() for q in model.parameters() if q.requires_grad)]


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize(
    ("backend", "recompute"), [("torch", False), pytest.param("torch", True, marks=pytest.mark.slow), ("triton", False)]
)
def test_a_checkpointed_block(backend, recompute, use_reentrant, device):
    model, x = MLP(device, backend=backend, recompute=recompute), activations(device)

    def checkpointed(x, **more):
        return checkpoint(model, x, use_reentrant=use_reentrant, **more)

    expected = gradients(model, model, x)
    assert_same(gradients(model, checkpointed, x), expected)
    if backend == "torch":
        other = gradients(model, functools.partial(checkpointed, preserve_rng_state=False), x)
        assert (other[0] - expected[0]).abs().max() > 0.01  # and it is the masks that were held equal
        if not use_reentrant:
            compiled = torch.compile(checkpointed, backend="aot_eager", fullgraph=True)
            assert_same(gradients(model, compiled, x), expected)


@pytest.mark.parametrize("saved", ["the operator", "PyTorch's products"])
def test_selective_checkpointing(saved, device, monkeypatch):
    model, x, calls = MLP(device), activations(device), []
    contractions = plan.contractions("torch")
    activate_shrink = contractions.activate_shrink
    expected = outcome(model, model, x)

    def counted(*args, **more):
        calls.append(args)
        return activate_shrink(*args, **more)

    policy = autograd.mlp.mlp_forward if saved == "the operator" else torch.ops.aten.mm.default
    contexts = functools.partial(create_selective_checkpoint_contexts, [policy])
    monkeypatch.setattr(contractions, "activate_shrink", counted)
    assert_same(
        outcome(model, lambda x: checkpoint(model, x, use_reentrant=False, context_fn=contexts), x), expected
    )  # fmt: skip
    assert len(calls) == (1 if saved == "the operator" else 2)


def test_export(device, monkeypatch):
    model, example = MLP(device, False, backend="auto"), activations(device).detach()
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(model, (example,), dynamic_shapes=({1: rows},))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count(autograd.mlp.mlp) == 1
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    x = activations(device, batch=(2, 7)).detach()
    for exported in (program, torch.export.load(buffer), program.run_decompositions()):
        torch.testing.assert_close(exported.module()(x), model(x))


def test_what_no_shared_pass_takes_is_composed(device):
    """No row, a rank of 0, all dropped, no adapter at all: under a compiler as without one."""
    model, x = MLP(device), activations(device).detach()
    gate, up, down = map(model.layer, NAMES)
    nothing = up._replace(lora_A=up.lora_A.detach()[:0], lora_B=up.lora_B.detach()[:, :0])
    bare = [q._replace(lora_A=None, lora_B=None) for q in (gate, up, down)]
    for layers, t in (
        ([gate, up, down], x[:, :0]), ([gate, nothing, down], x), ([gate._replace(dropout_p=1.0), up, down], x),
        (bare, x),
    ):  # fmt: skip
        counter, ys = CompileCounterWithBackend("eager"), []
        run = functools.partial(lora_mlp, t, *layers, backend="torch")
        for f in (run, torch.compile(run, backend=counter, fullgraph=True)):
            torch.manual_seed(2)
            ys.append(f())
        assert all(map(torch.equal, *ys)), layers
        assert not counter.graphs[0].graph.find_nodes(op="call_function", target=autograd.mlp.mlp)
    assert autograd.mlp.mlp(x[:, :0], *model.arguments()).shape == (2, 0, N)  # where a graph was exported for any size
