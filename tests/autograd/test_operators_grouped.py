"""The registered operators of layers of groups: PyTorch's own checks, the plain call's numbers, compilers and export."""

import functools
import io

import pytest
import torch
from grouped_samples import BACKENDS, RANKS, E, K, N, S, adapters_of, call, draw, expert_minor, leaves
from operator_samples import Watch, assert_same, fresh_compiler, taken  # noqa: F401  a fixture
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels import autograd, lora_grouped_linear, plan
from lora_kernels.autograd.grouped import grouped_linear, grouped_linear_backward, grouped_linear_forward

pytestmark = [  # PyTorch's own
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]
both = pytest.mark.parametrize("backend", BACKENDS)
SCALINGS = [1.5, -0.5]
# of x, weight, bias, each A and each B
NEEDED = {
    "all": ([True] * 3, [True] * 2, [True] * 2),
    "x": ([True, False, False], [False] * 2, [False] * 2),
    "weight": ([False, True, False], [False] * 2, [False] * 2),
    "bias": ([False, False, True], [False] * 2, [False] * 2),
    "A0 and B1": ([False] * 3, [True, False], [False, True]),
    "adapters": ([False] * 3, [True] * 2, [True] * 2),
}


@pytest.fixture
def of_backend(request, monkeypatch):
    """Let "auto" choose a backend on this machine."""
    monkeypatch.setattr(plan.backend, "_environment_backend", lambda: request.param)
    return request.param


chosen = pytest.mark.parametrize("of_backend", BACKENDS, indirect=True)


def arguments(t, backend):
    lists = adapters_of(t, "A"), adapters_of(t, "B")
    return t["x"], t["weight"], *lists, t["offsets"], t["bias"], SCALINGS[: len(lists[0])], backend


def halves(t, backend):
    x, weight, lora_As, lora_Bs, *rest = arguments(t, backend)
    return x, weight, [each for pair in zip(lora_As, lora_Bs, strict=True) for each in pair], *rest


def trained(device, *of, **how):
    t = draw(device, *of, **how)
    for each in leaves(t).values():
        each.requires_grad_()
    return t


def outcome(run, t):
    y = run(t)
    return [y, *torch.autograd.grad(y, list(leaves(t).values()), t["dy"])]


@pytest.mark.parametrize("ranks", [(), (3,), RANKS], ids=str)
@both
def test_opcheck_of_the_operator_and_its_forward(backend, ranks, device):
    # what the rows of s hold that belong to no group is not specified, so they cannot be compared
    t = trained(device, ranks=ranks, beyond=0)
    opcheck(grouped_linear, arguments(t, backend))
    opcheck(grouped_linear_forward, halves(t, backend))


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("needed", NEEDED)
@both
def test_opcheck_of_backward(backend, needed, adapters, device):
    t = draw(device, torch.bfloat16, adapters)
    flags, need_As, need_Bs = NEEDED[needed]
    for name, need in zip(("x", "weight", "bias", "A0", "A1", "B0", "B1"), [*flags, *need_As, *need_Bs], strict=True):
        t[name].requires_grad_(need)
    inputs = [each for each in leaves(t).values() if each.requires_grad]

    def run():
        torch.autograd.grad(grouped_linear(*arguments(t, backend)), inputs, t["dy"])

    given = taken(grouped_linear_backward, run)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    opcheck(grouped_linear_backward, given, test_utils=checks)
    x, weight, *_ = given[1:]
    assert (x is not None, weight is not None) == (flags[1] or any(need_As), flags[0])
    found = grouped_linear_backward(*given)
    with FakeTensorMode() as mode:
        fakes = [_fake(mode, value) for value in given]
        promised = grouped_linear_backward(*fakes)
    for real, fake in zip(found, promised, strict=True):
        assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


def _fake(mode, value):
    if isinstance(value, list):
        return [_fake(mode, each) for each in value]
    return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored", ["plain", "as PEFT"])
@both
def test_the_operators_give_what_the_plain_call_gives(backend, stored, adapters, device):
    t = trained(device, torch.bfloat16, adapters)
    if stored == "as PEFT":
        t |= {name: expert_minor(t[name].detach()).requires_grad_() for name in ("B0", "B1")}
    expected = outcome(functools.partial(call, backend=backend), t)
    assert "LoRAGroupedLinear" in expected[0].grad_fn.name()

    def watched(t):
        with Watch() as mode:
            y = call(t, backend)
        assert grouped_linear_forward in mode.seen
        return y

    for run in (lambda t: grouped_linear(*arguments(t, backend)), watched):
        found = outcome(run, t)
        assert all(map(torch.equal, found, expected))
        assert [got.dtype for got in found] == [value.dtype for value in expected]


@both
def test_only_what_is_needed_is_saved(backend, device):
    t = draw(device)
    t["B0"].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: saved.append(each) or each, lambda each: each):
        grouped_linear(*arguments(t, backend))
    own = {each.data_ptr() for each in t.values()}
    (s,) = (each for each in saved if each.data_ptr() not in own)
    assert s.shape[0] == S
    assert [tuple(each.shape) for each in saved if each.data_ptr() in own] == [(E + 1,)]


def test_a_plain_call_takes_no_operator(device, monkeypatch):
    def refuse(*args):
        raise AssertionError("an operator was called")

    monkeypatch.setattr(autograd.grouped, "grouped_linear", refuse)
    t = trained(device)
    call(t).sum().backward()
    with pytest.raises(AssertionError, match="an operator was called"), FlopCounterMode(display=False):
        call(t)


@both
def test_double_backward_of_the_operators_raises(backend, device):
    t = draw(device)
    t["x"].requires_grad_()
    y = grouped_linear(*arguments(t, backend))
    (dx,) = torch.autograd.grad(y, t["x"], t["dy"].requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match=r"lora_grouped_linear: .*twice.*backend=\"reference\""):
        dx.sum().backward()


@both
def test_a_changed_input_is_noticed_by_the_operators(backend, device):
    t = trained(device)
    y = grouped_linear(*arguments(t, backend))
    with torch.no_grad():
        t["offsets"].add_(1)
    with pytest.raises(RuntimeError, match=r"^lora_grouped_linear, .*: its tensor of offsets has been modified"):
        y.sum().backward()


@both
def test_flops_are_counted(backend, device):
    t, rank = trained(device), sum(RANKS)
    thin, base = 2 * S * rank * (K + N), 2 * S * K * N
    with FlopCounterMode(display=False) as counter:
        y = call(t, backend)
        assert counter.get_total_flops() == base + thin
    with FlopCounterMode(display=False) as counter:
        y.backward(t["dy"])
    # dx and dW, dbias; ds and dB, ds A and dA
    assert counter.get_total_flops() == 2 * base + 2 * S * N + 2 * thin
    for name, flops in {"x": base + thin, "A0": 2 * S * 3 * (K + N), "B1": 2 * S * 2 * N, "weight": base}.items():
        alone = draw(device)
        alone[name].requires_grad_()
        y = grouped_linear(*arguments(alone, backend))
        with FlopCounterMode(display=False) as counter:
            y.backward(t["dy"])
        assert counter.get_total_flops() == flops, name


def test_fake_tensors_give_shapes_and_strides(device):
    with FakeTensorMode() as mode:
        t = {name: mode.from_tensor(each) for name, each in draw(device).items()}
        y = call(t, "auto")
    assert (y.shape, y.stride(), y.dtype) == ((S, N), (N, 1), torch.float32)


@chosen
def test_a_compiled_call_has_the_same_numbers_and_one_operator(of_backend, device):
    t, graphs = trained(device), []

    def run(t):
        views = {name: expert_minor(t[name]) for name in ("B0", "B1")}
        return call(t | views, "auto").relu() * 2

    expected = outcome(run, t)
    assert_same(outcome(torch.compile(run, backend="aot_eager", fullgraph=True), t), expected)
    keep = torch.compile(run, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True)
    keep(t)
    (node,) = graphs[0].graph.find_nodes(op="call_function", target=grouped_linear)
    assert of_backend in node.args


@pytest.mark.slow
@chosen
def test_inductor_gives_the_same_numbers(of_backend, device):
    t = trained(device)
    assert_same(
        outcome(torch.compile(lambda t: call(t, "auto").relu(), fullgraph=True), t),
        outcome(lambda t: call(t, "auto").relu(), t),
    )


@chosen
def test_one_graph_holds_for_any_rows_sizes_and_scaling(of_backend, device):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lora_grouped_linear, backend=counter, fullgraph=True, dynamic=True)
    for sizes, beyond, scaling in (((3, 0, 6), 2, 0.5), ((0, 9, 1), 4, 0.75), ((4, 4, 4), 3, 2.5)):
        t = draw(device, sizes=sizes, beyond=beyond, ranks=(2,))
        given = t["x"], t["weight"], t["A0"], t["B0"], t["offsets"]
        torch.testing.assert_close(compiled(*given, scaling=scaling), lora_grouped_linear(*given, scaling=scaling))
    assert counter.frame_count == 1


@chosen
def test_autocast_is_compiled(of_backend, device):
    t = trained(device)

    def run(t):
        with torch.autocast(device, dtype=torch.bfloat16):
            return call(t, "auto")

    y, expected = torch.compile(run, backend="aot_eager", fullgraph=True)(t), run(t)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)


class Layer(torch.nn.Module):
    """A layer of groups with a parameter for each tensor."""

    def __init__(self, t):
        super().__init__()
        for name, each in leaves(t).items():
            if name != "x":
                self.register_parameter(name, torch.nn.Parameter(each.detach().clone()))

    def forward(self, x, offsets):
        return call({**self._parameters, "x": x, "offsets": offsets}, "auto")


@pytest.mark.parametrize("strict", [pytest.param(False, marks=pytest.mark.slow), True])
@chosen
def test_export(of_backend, strict, device):
    t = draw(device)
    layer, shapes = Layer(t), ({0: torch.export.Dim("rows", min=2, max=64)}, None)
    program = torch.export.export(layer, (t["x"], t["offsets"]), dynamic_shapes=shapes, strict=strict)
    assert [node.target for node in program.graph.nodes if node.op == "call_function"] == [grouped_linear]
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    other = draw(device, sizes=(5, 0, 1, 8), beyond=1)
    for exported in (program, torch.export.load(buffer), program.run_decompositions()):
        found = exported.module()(other["x"], other["offsets"])
        torch.testing.assert_close(found, layer(other["x"], other["offsets"]))


@both
def test_checkpointing_gives_the_same_gradients(backend, device):
    t = trained(device)
    expected = outcome(lambda t: call(t, backend), t)
    for reentrant in (False, True):
        found = outcome_of_leaves(
            lambda t, how=reentrant: checkpoint(lambda x: call(t | {"x": x}, backend), t["x"], use_reentrant=how), t
        )
        assert all(map(torch.equal, found, expected[1:]))


def outcome_of_leaves(run, t):
    """The gradients by `backward`, as checkpointing that enters again needs."""
    for each in leaves(t).values():
        each.grad = None
    run(t).backward(t["dy"])
    return [each.grad for each in leaves(t).values()]
