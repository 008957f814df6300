"""`lora_mlp`: held to the rules, to the reference and to its own layers one after the other; what it launches and saves."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from mlp_samples import ADAPTERS, BACKENDS, assert_accurate, call, draw, leaves_of, run
from torch.overrides import TorchFunctionMode

from lora_kernels import Projection, dropout, lora_linear, lora_mlp, lora_projections, plan, reference
from lora_kernels.activations import ACTIVATIONS

DROPOUTS = (0.3, 0.5, 0.2)
ALL = ("dx", "dweight", *ADAPTERS)
SHAPES = {  # what else than one tile of each
    "ranks above 32 and 64": dict(ranks=(40, 3, 70), ps=DROPOUTS, biased=True),
    "many tiles": dict(ranks=(5, 17, 9), ps=(0.0, 0.0, 0.3), batch=(70,), sizes=(20, 70, 40)),
    "split rows": dict(batch=(150,), sizes=(9, 20, 5)),
    "split columns": dict(batch=(3,), sizes=(9, 150, 5), ps=(0.0, 0.0, 0.5)),
    "a row": dict(batch=(), ranks=(1, 2, 3)),
    "single numbers": dict(batch=(1, 1), sizes=(1, 1, 1), ranks=(1, 1, 1)),
}
FEW = ("ranks above 32 and 64", "many tiles", "a row")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_rules_1_and_2(activation, gated, backend, device):
    ps = DROPOUTS if activation == "silu" else (0.0, 0.0, 0.0)
    problem = draw(ps=ps, device=device, gated=gated, activation=activation, biased=True)
    found = assert_accurate(problem, backend, names=ALL)
    assert len(found) == 2 + 4 * (2 + gated)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "how",
    [
        dict(dtype=torch.bfloat16, adapters=torch.float32, ps=DROPOUTS),
        dict(dtype=torch.float16, adapters=torch.float32, batch=(10,)),
        dict(dtype=torch.float16, ps=DROPOUTS, biased=True),
        dict(dtype=torch.bfloat16, batch=(56,), sizes=(40, 52, 40)),
    ],
    ids=str,
)
def test_16_bits(how, backend, device):
    found = assert_accurate(draw(**how, device=device), backend)
    assert ("sizes" in how) == (found["y"].rule_2 is not None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "shape", [*FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in SHAPES if name not in FEW)]
)
def test_shapes(shape, backend, device):
    assert_accurate(draw(**SHAPES[shape], device=device), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("there", list(itertools.product((0, 1), repeat=3)), ids=str)
def test_missing_adapters(there, backend, device):
    ranks = [r * one for r, one in zip((4, 5, 6), there, strict=True)]
    assert_accurate(draw(ranks, (0.0, 0.5, 0.0), device=device, batch=(9,)), backend)


def transposed(t):
    return t.t().contiguous().t()


def padded(t):
    return t.new_full((t.shape[0] + 2, 2 * t.shape[1] + 1), float("nan"))[1:-1, 1::2].copy_(t)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", [transposed, padded])
def test_layouts(layout, backend, device):
    problem = draw(ps=DROPOUTS, device=device, batch=(13,))
    layers = {
        name: q._replace(**{field: layout(getattr(q, field)) for field in ("weight", "lora_A", "lora_B")})
        for name, q in problem.layers().items()
    }
    problem = replace(problem, x=layout(problem.x), dy=layout(problem.dy), **layers)
    assert_accurate(problem, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expanded_gradient(backend, device):
    problem = draw(device=device, batch=(9,))
    assert_accurate(replace(problem, dy=problem.dy[:1].expand_as(problem.dy)), backend)


@pytest.mark.small
@pytest.mark.parametrize("recompute", [False, True])
def test_small_calls_on_a_cpu_are_composed(recompute):
    problem = draw(ps=DROPOUTS, biased=True)
    assert_accurate(problem, "torch", recompute=recompute, names=ALL)
    leaves, _ = leaves_of(problem)
    assert "MLP" not in type(call(leaves, "auto").grad_fn).__name__


def of_integers(device, p=0.5):
    """relu² of small integers, halves kept: every sum is exact, so all ways to compute it agree to the bit."""
    problem = draw(ps=(p, p, p), device=device, activation="relu2", biased=True)
    generator = torch.Generator().manual_seed(0)
    layers = {name: q._replace(scaling=2.0) for name, q in problem.layers().items()}
    for t in (problem.x, problem.dy, *itertools.chain.from_iterable(q[:4] for q in layers.values())):
        t.copy_(torch.randint(-1, 2, t.shape, generator=generator))
    return replace(problem, **layers)


@pytest.mark.parametrize("backend", BACKENDS)
def test_exact_for_integers_and_the_same_as_its_layers(backend, device):
    def one_by_one(problem):
        def layer(x, q):
            pair, how = (q.lora_A, q.lora_B), dict(scaling=q.scaling, bias=q.bias, dropout_p=q.dropout_p)
            return lora_linear(x, q.weight, *pair, **how, backend=backend)

        gate, up = layer(problem.x, problem.gate), layer(problem.x, problem.up)
        return layer(F.relu(gate).square() * up, problem.down)

    # a GPU's generator gives others where it draws several at a time
    problem = of_integers(device, 0.5 if device == "cpu" else 0.0)
    together = run(problem, backend, names=ALL)
    given, leaves = leaves_of(problem, ALL)
    torch.manual_seed(3)
    y = one_by_one(given)
    alone = {"y": y} | dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), given.dy), strict=True))
    assert max(t.abs().max() for t in together.values()) < 2**24
    assert all(torch.equal(together[name], t) for name, t in alone.items())


@pytest.mark.parametrize("gated", [True, False])
def test_the_reference_draws_the_kernels_masks(gated, device):
    problem = of_integers(device)
    problem = problem if gated else replace(problem, gate=None)
    y = run(problem, "triton")["y"]
    torch.manual_seed(3)
    seeds = [*dropout.draw_seed(device, 1 + gated), *dropout.draw_seed(device)]
    layers = (q and Projection(*(t.double() for t in q[:4]), *q[4:]) for q in (problem.gate, problem.up, problem.down))
    seeds = seeds if gated else [None, *seeds]
    assert torch.equal(y.double(), reference.lora_mlp(problem.x.double(), *layers, activation="relu2", seeds=seeds))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_by_differences(activation, gated):
    problem = draw((2, 3, 1), DROPOUTS, torch.float64, gated=gated, activation=activation, biased=True, sizes=(4, 5, 3))
    problem, leaves = leaves_of(problem, ALL)

    def function(*_):
        torch.manual_seed(1)
        return call(problem, "torch", recompute=not gated)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)


WANTED = {
    "dx": ("dx",),
    "down's adapter": ("down.d_lora_A", "down.d_lora_B"),
    "A of down": ("down.d_lora_A",),
    "B of down": ("down.d_lora_B",),
    "bias of down": ("down.dbias",),
    "B of gate": ("gate.d_lora_B",),
    "A of up": ("up.d_lora_A",),
    "up and weights": ("up.d_lora_A", "up.d_lora_B", "up.dweight", "down.dweight"),
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_asked_for_is_the_same_alone(backend, device):
    problem = draw((2, 3, 4), device=device, biased=True, batch=(5,), sizes=(6, 12, 4))
    full = run(problem, backend, names=ALL)
    for i, names in enumerate(WANTED.values()):
        some = run(problem, backend, recompute=i % 2 == 1, names=names)
        for name, t in some.items():
            torch.testing.assert_close(t, full[name], rtol=1e-5, atol=1e-5)  # by other launches, in another order


@pytest.mark.parametrize("backend", BACKENDS)
def test_recomputed_gradients_are_the_same_bits(backend, device):
    problem = draw(ps=DROPOUTS, dtype=torch.bfloat16, device=device, biased=True)
    kept, made_again = (run(problem, backend, recompute, ALL) for recompute in (False, True))
    assert all(torch.equal(kept[name], t) for name, t in made_again.items())


@pytest.mark.parametrize(("backend", "recompute"), [("triton", False), ("torch", False), ("torch", True)])
def test_nothing_given_or_saved_is_written(backend, recompute, device):
    """And the graph may be walked again, but differentiated once only."""
    problem, leaves = leaves_of(draw(ps=(0.0, 0.0, 0.5), device=device, biased=True), ALL)
    given = [problem.dy, *leaves.values()]
    before = [t.detach().clone() for t in given]
    y = call(problem, backend, recompute)
    first, second = (torch.autograd.grad(y, list(leaves.values()), problem.dy, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, before, given))
    (dx,) = torch.autograd.grad(y, problem.x, problem.dy.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("recompute", [False, True])
def test_saved_for_backward(recompute, device):
    """g, u, each s and the masks; with `recompute` not g and u."""
    problem = draw((8, 8, 8), (0.1, 0.0, 0.1), torch.bfloat16, device, batch=(64,), sizes=(48, 80, 32))
    problem, _ = leaves_of(problem)
    layers = itertools.chain.from_iterable(q[:4] for q in problem.layers().values())
    known = {t.untyped_storage().data_ptr() for t in (problem.x, *layers) if t is not None}
    saved = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in known:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call(problem, "triton", recompute)
    thin = [64 * 16 * 2, 64 * 8 * 2, 64 * 2 * 4, 64 * 3 * 4]  # s of gate and up, of down, masks of x and of h
    wide = [] if recompute else [64 * 80 * 2] * 2
    assert sorted(saved.values()) == sorted([*thin, *wide])


def test_the_same_without_gradients(device):
    problem, _ = leaves_of(draw(ps=(0.0, 0.0, 0.5), device=device))
    torch.manual_seed(1)
    expected = call(problem, "triton")
    torch.manual_seed(1)
    with torch.no_grad():
        y = call(problem, "triton")
    assert torch.equal(y, expected)
    assert not y.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_is_a_cast_of_all_but_the_adapters(backend, device):
    problem, leaves = leaves_of(draw(device=device, biased=True), ("dx", "d_lora_A", "d_lora_B"))
    torch.manual_seed(3)
    with torch.autocast(device, torch.bfloat16):
        y = call(problem, backend)
    assert y.dtype == torch.bfloat16
    gradients = torch.autograd.grad(y, list(leaves.values()), problem.dy.bfloat16())
    cast = {
        name: q._replace(weight=q.weight.bfloat16(), bias=q.bias.bfloat16()) for name, q in problem.layers().items()
    }
    problem = replace(problem, x=problem.x.bfloat16(), dy=problem.dy.bfloat16(), **cast)
    expected = run(problem, backend, names=tuple(leaves))
    assert torch.equal(y, expected["y"])
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        assert gradient.dtype == leaf.dtype == torch.float32
        assert torch.equal(gradient, expected[name].float()), name


class Casts(TorchFunctionMode):
    """Counts casts of tensors of a shape."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.copies = shape, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        self.copies += function is torch.Tensor.to and args[0].shape == self.shape and result is not args[0]
        return result


def test_autocast_casts_x_once(device):
    problem = draw(device=device, batch=(7, 2))
    q = problem.gate
    with torch.autocast(device, torch.bfloat16):
        with Casts(problem.x.shape) as casts:
            call(problem, "torch")
        assert casts.copies == 1
        with Casts(problem.x.shape) as casts:
            lora_projections(problem.x, [q.weight] * 3, [(q.lora_A, q.lora_B)] * 3)
        assert casts.copies == 1


@pytest.mark.small
def test_transforms_of_a_recomputed_mlp():
    problem = draw(dtype=torch.float64)

    def of(x):
        return (call(replace(problem, x=x), "torch", recompute=True) * problem.dy).sum()

    expected = run(problem, "torch", names=("dx",))["dx"]
    torch.testing.assert_close(torch.func.grad(of)(problem.x), expected)


def test_all_dropped_rank_0_and_no_rows(device):
    problem = draw(device=device, batch=(5,))
    plain = draw((0, 5, 5), device=device, batch=(5,))
    dropped = run(replace(problem, gate=problem.gate._replace(dropout_p=1.0)), "triton")
    torch.testing.assert_close(dropped["y"], run(replace(problem, gate=plain.gate._replace(weight=problem.gate.weight)),
                                                 "triton")["y"])  # fmt: skip
    assert not dropped["gate.d_lora_A"].any()
    q = problem.gate
    rank_0 = run(replace(problem, gate=q._replace(lora_A=q.lora_A[:0], lora_B=q.lora_B[:, :0])), "triton")
    torch.testing.assert_close(rank_0["y"], dropped["y"])
    empty = run(replace(problem, x=problem.x[:0], dy=problem.dy[:0]), "triton")
    assert empty["y"].shape == (0, 9)
    assert empty["dx"].shape == (0, 12)
    assert not empty["up.d_lora_B"].any()


interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter, which a GPU bypasses")
SHRINK, EXPAND, WGRAD = "_shrink_kernel", "_matmul_expand_kernel", "_wgrad_kernel"
FORWARD = [SHRINK, EXPAND, SHRINK, EXPAND]
BACKWARD = {  # to what is asked of which problem
    "all": ((), ("dx", *ADAPTERS), [WGRAD, EXPAND, WGRAD, EXPAND, WGRAD]),
    "with dropout": (dict(ps=DROPOUTS), ("dx", *ADAPTERS), [WGRAD, EXPAND, WGRAD, EXPAND, WGRAD]),
    "ranks above 32": (
        dict(ranks=(40, 40, 40)), ("dx", *ADAPTERS), [SHRINK, WGRAD, EXPAND, WGRAD, SHRINK, SHRINK, EXPAND, WGRAD],
    ),
    "adapters alone": ((), ADAPTERS, [WGRAD, EXPAND, WGRAD, WGRAD]),
    "down's adapter": ((), WANTED["down's adapter"], [WGRAD, SHRINK, WGRAD]),  # h made again for dA
    "B of down": ((), WANTED["B of down"], [WGRAD]),
    "B of gate": ((), WANTED["B of gate"], [SHRINK, EXPAND, WGRAD]),
}  # fmt: skip


@interpreted
@pytest.mark.parametrize("asked", BACKWARD)
def test_four_launches_forward_and_five_backward(asked, log):
    changes, names, expected = BACKWARD[asked]
    problem, leaves = leaves_of(draw(**dict(changes)), names)
    y = call(problem, "triton")
    assert [launch.kernel for launch in log] == FORWARD
    log.clear()
    torch.autograd.grad(y, list(leaves.values()), problem.dy)
    assert [launch.kernel for launch in log] == expected


@interpreted
def test_recomputing_is_a_launch_more(log):
    problem, leaves = leaves_of(draw(), ("dx", *ADAPTERS))
    y = call(problem, "triton", recompute=True)
    log.clear()
    torch.autograd.grad(y, list(leaves.values()), problem.dy)
    assert [launch.kernel for launch in log] == [EXPAND, *BACKWARD["all"][2]]


@interpreted
@pytest.mark.parametrize("ps", [DROPOUTS, (0.0, 0.0, 0.0)], ids=["dropout", "none"])  # "padded" takes no mask
@pytest.mark.parametrize("form", ["beta1", "padded", "joint"])
def test_hybrids(form, ps):
    with plan.force_form(form):
        assert_accurate(draw(ps=ps, batch=(9,)), "triton", split=True)


T = torch.ones
GATE = Projection(T(8, 4), T(2, 4), T(8, 2))
DOWN = Projection(T(4, 8), T(2, 8), T(4, 2))
WRONG = {
    "activation": (dict(activation="tanh"), ValueError, "activation='tanh' is not one of: silu, gelu"),
    "no projection": (dict(gate=T(8, 4)), TypeError, r"gate must be a lora_kernels.Projection\(weight.*got Tensor"),
    "no up": (dict(up=None), TypeError, r"up must be a lora_kernels.Projection\(weight.*got NoneType"),
    "weight": (dict(up=GATE._replace(weight=T(8))), TypeError, r"up.weight must be a tensor with 2 dims, got shape \(8,"),
    "no weight": (dict(down=DOWN._replace(weight=None)), TypeError, "down.weight must be a tensor.*got NoneType"),
    "no B": (dict(gate=GATE._replace(lora_B=None)), ValueError, "gate has lora_A and no lora_B; give both, or neither"),
    "no A": (dict(down=DOWN._replace(lora_A=None)), ValueError, "down has lora_B and no lora_A; give both, or neither"),
    "gate's width": (
        dict(gate=Projection(T(7, 4))), ValueError, r"up.weight is \(8, 4\) and gate.weight \(7, 4\): gate and up must",
    ),
    "down's width": (
        dict(down=Projection(T(4, 9))), ValueError, r"up.weight is \(8, 4\) and down.weight \(4, 9\): gate and up must",
    ),
    "gate's input": (dict(gate=Projection(T(8, 5))), ValueError, "lora_mlp: gate: x has 4 features"),
    "up's A": (dict(up=GATE._replace(lora_A=T(4, 2))), ValueError, "lora_mlp: up: lora_A is"),
    "down's B": (dict(down=DOWN._replace(lora_B=T(4, 3))), ValueError, "lora_mlp: down: lora_B is"),
    "down's bias": (dict(down=DOWN._replace(bias=T(3))), ValueError, "lora_mlp: down: bias has 3 elements"),
    "up's dropout": (dict(up=GATE._replace(dropout_p=2.0)), ValueError, r"lora_mlp: up: dropout_p must be in \[0, 1\]"),
    "down's dtype": (
        dict(down=DOWN._replace(weight=T(4, 8).half())), TypeError,
        r"^lora_mlp: down: x is float32 but down\.weight is float16\..*cast down\.weight: down\.weight\.to\(x\.dtype\)\.$",
    ),
    "x's dtype": (
        dict(x=T(5, 4).half()), TypeError,
        r"^lora_mlp: gate: x is float16 but gate\.weight is float32\..*cast x: x\.to\(gate\.weight\.dtype\)\.$",
    ),
    "x": (dict(x=3), TypeError, "lora_mlp: gate: x must be a torch.Tensor"),
    "backend": (dict(backend="cuda"), ValueError, "lora_mlp: backend='cuda' is not one of"),
    "rank": (
        dict(gate=GATE._replace(lora_A=T(513, 4), lora_B=T(8, 513)), backend="triton"), ValueError,
        "lora_mlp: rank 513 exceeds 512",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_errors_name_the_layer(wrong):
    changes, error, message = WRONG[wrong]
    given = dict(x=T(5, 4), gate=GATE, up=GATE, down=DOWN) | changes
    with pytest.raises(error, match=message):
        lora_mlp(given.pop("x"), given.pop("gate"), given.pop("up"), given.pop("down"), **given)
