"""lora_grouped_linear: its numbers against the folded formula, and what PyTorch code may rely on."""

import itertools

import pytest
import torch
from grouped_samples import BACKENDS, BEYOND, E, K, N, S, adapters_of, call, draw, expert_minor, formula, leaves

from lora_kernels import lora_grouped_linear, lora_linear, reference
from lora_kernels.autograd.grouped import LoRAGroupedLinearFunction
from lora_kernels.verify.grouped_problems import check_grouped, make_grouped, run_grouped

both = pytest.mark.parametrize("backend", BACKENDS)
NAMES = ("x", "weight", "bias", "A0", "B0", "A1", "B1")
SUBSETS = [s for n in range(len(NAMES) + 1) for s in itertools.combinations(NAMES, n)]
SPREADS = {
    "1 group": ((9,), 0),
    "3 groups": ((4, 0, 5), 1),
    "8 groups": ((0, 1, 2, 15, 0, 16, 17, 1), 3),
    "128 groups": (tuple(e % 4 for e in range(128)), 5),
    "all on one": ((0, 0, 20, 0), 0),
    "one row each": ((1,) * 6, 0),
    "no rows in groups": ((0, 0, 0), 4),
    "no rows": ((0, 0, 0), 0),
}


def gradients(run, t, names):
    """y, and the gradients of the named tensors."""
    t = t | {name: t[name].detach().requires_grad_() for name in names}
    y = run(t)
    return [y.detach(), *torch.autograd.grad(y, [t[name] for name in names], t["dy"])]


@pytest.mark.parametrize("way", ["torch", "reference"])
@pytest.mark.parametrize("stored", ["plain", "as PEFT"])
@pytest.mark.parametrize("spread", SPREADS)
def test_float64_agrees_with_the_folded_formula(spread, stored, way):
    sizes, beyond = SPREADS[spread]
    t = draw("cpu", torch.float64, sizes=sizes, beyond=beyond)
    if stored == "as PEFT":
        t |= {"weight": t["weight"].mT.contiguous().mT} | {name: expert_minor(t[name]) for name in ("B0", "B1")}
    found, exact = (gradients(run, t, NAMES) for run in (lambda t: call(t, way), formula))
    for name, got, right in zip(("y", *NAMES), found, exact, strict=True):
        assert got.shape == right.shape, name
        assert _distance(got, right) <= 1e-12, name
    rows = sum(sizes)
    assert not found[0][rows:].any()
    assert not found[1][rows:].any()
    for got in found[2:]:
        assert not any(got[e].any() for e, size in enumerate(sizes) if not size)


def _distance(a, b):
    return (a - b).abs().max().item() if a.numel() else 0.0


@pytest.mark.parametrize(
    ("subset", "backend"),
    # all of them where it is cheap; each and all where the interpreter runs
    [(s, backend) for backend in BACKENDS for s in SUBSETS if backend == "torch" or len(s) in (1, 6)],
    ids=lambda v: v if isinstance(v, str) else "+".join(v),
)
def test_gradients_exactly_where_they_are_asked_for(subset, backend, device):
    t = draw(device)
    wide = {
        name: None if each is None else each.double() if each.is_floating_point() else each for name, each in t.items()
    }
    for name in subset:
        t[name].requires_grad_()
        wide[name].requires_grad_()
    y = call(t, backend)
    assert y.requires_grad == bool(subset)
    if subset:
        y.backward(t["dy"])
        formula(wide).backward(wide["dy"])
    for name in NAMES:
        if name in subset:
            torch.testing.assert_close(t[name].grad.double(), wide[name].grad, rtol=1e-4, atol=1e-4)
        else:
            assert t[name].grad is None


@both
@pytest.mark.parametrize("adapters", [None, torch.float32], ids=["same", "fp32 adapters"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_rules_of_accuracy_hold(dtype, adapters, backend, device):
    q = make_grouped((0, 17, 1, 40), 33, 21, (5, 3), dtype, device, beyond=3, adapter_dtype=adapters, bias=True)
    actual = run_grouped(q, backend, weight=True)
    findings = check_grouped(actual, q, split=backend == "torch")
    assert all(f.ok for f in findings), [f.message for f in findings]
    assert {name: t.dtype for name, t in actual.items() if "lora" in name} == {
        f"d_lora_{name}[{i}]": adapters or dtype for i in range(2) for name in "AB"
    }


@both
def test_one_group_is_lora_linear(backend, device):
    t = draw(device, sizes=(9,), beyond=0, ranks=(3,))
    found = call(t, backend, scaling=2.0)
    w, a, b, bias = (t[name][0] for name in ("weight", "A0", "B0", "bias"))
    torch.testing.assert_close(found, lora_linear(t["x"], w, a, b, scaling=2.0, bias=bias, backend=backend))


@both
def test_a_tensor_and_a_list_of_one_are_the_same(backend, device):
    t = draw(device, ranks=(3,))
    how = dict(bias=t["bias"], backend=backend)
    alone = lora_grouped_linear(t["x"], t["weight"], t["A0"], t["B0"], t["offsets"], scaling=2.0, **how)
    assert torch.equal(alone, call(t, backend, scaling=[2.0]))
    assert torch.equal(alone, call(t | {"offsets": t["offsets"].long()}, backend, scaling=2.0))
    assert alone.is_contiguous()


@both
def test_without_adapters_the_base_layers_are_left(backend, device):
    t = draw(device, ranks=())
    y, dx, dbias = gradients(lambda t: call(t, backend), t, ("x", "bias"))
    right, dx_right, dbias_right = gradients(formula, t, ("x", "bias"))
    torch.testing.assert_close(y, right)
    torch.testing.assert_close(dx, dx_right)
    torch.testing.assert_close(dbias, dbias_right)


@both
@pytest.mark.parametrize("zero", ["S", "K", "N", "r"])
def test_zero_sizes(zero, backend, device):
    size = dict(S=(1, 3), K=6, N=5, r=2)
    size |= {"S": dict(S=(0, 0))}.get(zero, {zero: 0})
    t = draw(device, sizes=size["S"], beyond=0 if zero == "S" else 2, k=size["K"], n=size["N"], ranks=(size["r"], 3))
    names = [name for name in NAMES if t[name] is not None]
    found, right = (gradients(run, t, names) for run in (lambda t: call(t, backend), formula))
    for got, value in zip(found, right, strict=True):
        torch.testing.assert_close(got, value)


@both
def test_no_groups(backend, device):
    t = draw(device, sizes=(), beyond=3)
    found = gradients(lambda t: call(t, backend), t, NAMES)
    assert not any(got.any() for got in found)
    assert [got.shape for got in found[1:]] == [t[name].shape for name in NAMES]


@both
def test_a_retained_graph_gives_the_same_gradients_and_no_input_is_written(backend, device):
    t = draw(device)
    before = {name: each.clone() for name, each in t.items()}
    inputs = [each.requires_grad_() for each in leaves(t).values()]
    y = call(t, backend)
    first = torch.autograd.grad(y, inputs, t["dy"], retain_graph=True)
    second = torch.autograd.grad(y, inputs, t["dy"])
    assert all(map(torch.equal, first, second))
    assert all(torch.equal(t[name].detach(), each) for name, each in before.items())


@both
def test_nan_stays_in_its_row_and_group(backend, device):
    t = draw(device)
    clean = gradients(lambda t: call(t, backend), t, NAMES)
    # row 3 is of group 2, the last rows are of none
    t["x"][3, 2], t["x"][-1], t["dy"][-1] = float("nan"), float("nan"), float("nan")
    y, dx, *others = gradients(lambda t: call(t, backend), t, NAMES)
    rest = [i for i in range(S) if i != 3]
    assert y[3].isnan().all()
    assert torch.equal(y[rest], clean[0][rest])
    assert torch.equal(dx[-BEYOND:], torch.zeros(BEYOND, K, device=device))
    for name, got, was in zip(NAMES[1:], others, clean[2:], strict=True):
        apart = [e for e in range(E) if e != 2]
        assert torch.equal(got[apart], was[apart]), name
        assert got[2].isnan().any() == (name in ("weight", "A0", "A1", "B0", "B1")), name


@both
@pytest.mark.parametrize("name", ["x", "weight", "dy", "A0", "B0", "bias"])
def test_any_strides(name, backend, device):
    t = draw(device)
    plain = gradients(lambda t: call(t, backend), t, NAMES)
    for lay_out in (_apart, lambda each: each.mT.contiguous().mT):
        other = t | {name: lay_out(t[name])}
        for got, right in zip(gradients(lambda t: call(t, backend), other, NAMES), plain, strict=True):
            torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


def _apart(t):
    buffer = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 1), float("nan"))
    return buffer[..., 1::2].copy_(t)


@both
@pytest.mark.parametrize(
    ("trained", "ranks"), [("x A0 B0 A1 B1", 8 + 16), ("A0 B1", 16), ("x A0 A1", 0), ("x", 0)], ids=str
)
def test_saved_for_backward_is_s_of_each_adapter(trained, ranks, backend, device):
    t = draw(device, sizes=(20, 0, 44), beyond=0, k=48, n=40, ranks=(8, 16))
    t |= {name: expert_minor(t[name]) for name in ("B0", "B1")}
    for name in trained.split():
        t[name].requires_grad_()
    known = {each.untyped_storage().data_ptr() for each in t.values()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(t, backend)
    assert sum(saved.values()) == 64 * (8 + 16 if backend == "triton" and ranks else ranks) * 4


@both
def test_without_grad_the_function_is_skipped(backend, device, monkeypatch):
    t = draw(device)
    t["A0"].requires_grad_()
    expected = call(t, backend).detach()
    monkeypatch.setattr(LoRAGroupedLinearFunction, "apply", None)
    with torch.no_grad():
        assert torch.equal(call(t, backend), expected)
    with pytest.raises(TypeError):
        call(t, backend)


@both
def test_double_backward_raises(backend, device):
    t = draw(device)
    t["x"].requires_grad_()
    (dx,) = torch.autograd.grad(call(t, backend), t["x"], t["dy"].requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match=r"twice.*once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("way", ["torch", "reference"])
def test_gradcheck_in_float64(way):
    t = draw("cpu", torch.float64, sizes=(2, 0, 3), beyond=1, k=4, n=3, ranks=(2, 1))
    names = list(leaves(t))
    inputs = tuple(each.requires_grad_() for each in leaves(t).values())

    def run(*given):
        return call(t | dict(zip(names, given, strict=True)), way)

    assert torch.autograd.gradcheck(run, inputs)
    if way == "reference":
        assert torch.autograd.gradgradcheck(run, inputs)


@both
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(parameters, backend, device):
    """Computed in autocast's dtype; gradients come back in each tensor's own."""
    t = draw(device, parameters, torch.float32)
    inputs = {name: each.requires_grad_() for name, each in leaves(t).items()}
    with torch.autocast(device, dtype=torch.float16):
        y = call(t, backend)
    assert y.dtype == torch.float16
    y.backward(t["dy"].half())
    assert all(each.grad.dtype == each.dtype for each in inputs.values())
    half = {name: each.detach().half() if each.is_floating_point() else each for name, each in t.items()}
    right = gradients(lambda t: call(t, backend), half, list(inputs))
    torch.testing.assert_close(y, right[0])
    for name, value in zip(inputs, right[1:], strict=True):
        torch.testing.assert_close(inputs[name].grad.float(), value.float(), rtol=1e-2, atol=1e-2)


def test_autocast_leaves_float64_alone():
    t = draw("cpu", torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call(t).dtype == torch.float64


@both
@pytest.mark.parametrize("changed", ["x", "weight", "A0", "B1", "offsets"])
def test_a_changed_input_is_noticed(changed, backend, device):
    t = draw(device)
    for each in leaves(t).values():
        each.requires_grad_()
    y = call(t, backend)
    with torch.no_grad():
        t[changed].add_(1)
    what = {"x": "its input x has", "offsets": "its tensor of offsets has"}.get(
        changed, "a weight or an adapter of it has"
    )
    with pytest.raises(RuntimeError, match=f"^lora_grouped_linear, .*: {what} been modified by an inplace operation"):
        y.backward(t["dy"])


def test_a_layer_whose_adapters_are_views_is_named():
    t = draw("cpu", ranks=(3,))
    experts = torch.nn.Module()
    experts.lora_A = torch.nn.Parameter(t["A0"].reshape(-1, K))
    experts.lora_B = torch.nn.Parameter(t["B0"].permute(1, 2, 0).reshape(N, -1))
    model = torch.nn.ModuleDict({"experts": experts})
    views = {"A0": experts.lora_A.view(E, 3, K), "B0": experts.lora_B.view(N, 3, E).permute(2, 0, 1)}
    h = t["x"].requires_grad_() * 1
    y = call(t | views | {"x": h})
    h += 1
    with pytest.raises(RuntimeError, match=r"^lora_grouped_linear, layer experts: its input x"):
        y.sum().backward()
    assert len(model) == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # PyTorch's own
def test_transforms_take_the_reference():
    t = draw("cpu", torch.float64)

    def loss(a):
        return call(t | {"A0": a}, "auto").square().sum()

    a = t["A0"].clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(a), a)
    torch.testing.assert_close(torch.func.grad(loss)(t["A0"]), expected)
    batch = torch.stack((t["x"], 2 * t["x"]))
    each = torch.func.vmap(lambda x: call(t | {"x": x}, "auto"))(batch)
    torch.testing.assert_close(each[1], call(t | {"x": batch[1]}))
    tangent = torch.randn_like(t["x"])
    _, moved = torch.func.jvp(lambda x: call(t | {"x": x}, "auto"), (t["x"],), (tangent,))
    torch.testing.assert_close(moved, call(t | {"x": tangent, "bias": None}))
    with pytest.raises(RuntimeError, match=r"lora_grouped_linear: .*does not support torch\.func transforms"):
        torch.func.grad(lambda a: call(t | {"A0": a}, "triton").sum())(t["A0"])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*[Tt]race:DeprecationWarning")
def test_a_trace_holds_for_other_offsets():
    t = draw("cpu")
    traced = torch.jit.trace(lambda x, offsets: call(t | {"x": x, "offsets": offsets}, "auto"), (t["x"], t["offsets"]))
    other = t | {"offsets": torch.tensor([0, 4, 4, 5, S], dtype=torch.int32)}
    torch.testing.assert_close(traced(other["x"], other["offsets"]), call(other))


def test_symbolic_trace_records_one_call():
    t = draw("cpu")

    class Layer(torch.nn.Module):
        def forward(self, x):
            return lora_grouped_linear(x, t["weight"], t["A0"], t["B0"], t["offsets"])

    traced = torch.fx.symbolic_trace(Layer())
    assert lora_grouped_linear in [node.target for node in traced.graph.nodes]
    assert torch.equal(traced(t["x"]), Layer()(t["x"]))


def test_the_reference_is_the_call_by_name():
    t = draw("cpu")
    lists = adapters_of(t, "A"), adapters_of(t, "B")
    plain = reference.lora_grouped_linear(
        t["x"], t["weight"], *lists, t["offsets"], scaling=[1.5, -0.5], bias=t["bias"]
    )
    assert torch.equal(call(t, "reference"), plain)
