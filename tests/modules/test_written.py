"""Tensors that are written in place between a call and its backward: one behaviour at every size, and a name."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lora_kernels import LoRALinear, LoRAMLP, LoRAQKV, Projection, lora_linear, lora_mlp, reference, swap_linear
from lora_kernels.functional import lora_add

pytestmark = pytest.mark.small
WIDTH = 16
# Calls of the first are composed of operators, those of the second run a Function.
ROWS = (4, 5000)
BF16 = dict(dtype=torch.bfloat16)


class Outer(nn.Module):
    """A model whose layer has a name."""

    def __init__(self, dtype=None, p=0.0, r=4):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, WIDTH, dtype=dtype))])
        swap_linear(self, "all-linear", r=r, lora_dropout=p)
        nn.init.normal_(self.layers[0][0].lora_B)

    def forward(self, x):
        return self.layers[0](x)


SAID_X = r"^lora_linear, layer layers\.0\.0: its input x has been modified by an inplace operation since .*x\.clone\(\)"
SAID_W = r"^lora_linear, layer layers\.0\.0: a weight or an adapter of it has been modified.*before optimizer\.step\(\)"


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("need_x", [False, True])
def test_a_written_input_is_refused_at_every_size(rows, p, dtype, dims, need_x):
    model, x = Outer(dtype, p), torch.randn(rows, WIDTH, dtype=dtype).view(*(1,) * (dims - 2), rows, WIDTH)
    h = x.requires_grad_(need_x) * 1
    y = model(h)
    h += 1
    with pytest.raises(RuntimeError, match=SAID_X):
        y.sum().backward()
    assert all(p.grad is None for p in model.parameters())
    h = x * 1
    y = model(h.clone())
    h += 1
    y.sum().backward()
    # The output may be written.
    model(x * 1).relu_().sum().backward()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_written_view_or_base_is_seen(rows, p):
    model, base = Outer(p=p), torch.randn(1, rows, WIDTH)
    y = model(base[0])
    base.zero_()
    with pytest.raises(RuntimeError, match=SAID_X):
        y.sum().backward()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_what_backward_does_not_need_may_be_written(rows, p):
    model, x = Outer(p=p), torch.randn(rows, WIDTH)
    layer = model.layers[0][0]
    layer.lora_A.requires_grad_(False)
    y = model(x)
    x += 1
    with torch.no_grad():
        layer.weight += 1
    y.sum().backward()
    assert layer.lora_B.grad is not None
    with torch.no_grad():
        y = model(x)
    x += 1


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("part", ["weight", "lora_A", "lora_B"])
def test_a_step_before_backward_is_refused(rows, p, part):
    model, x = Outer(p=p), torch.randn(rows, WIDTH, requires_grad=True)
    y = model(x)
    with torch.no_grad():
        getattr(model.layers[0][0], part).add_(1)
    with pytest.raises(RuntimeError, match=SAID_W):
        y.sum().backward()


@pytest.mark.parametrize("rows", ROWS)
def test_merging_before_backward_is_refused(rows):
    model, x = Outer(), torch.randn(rows, WIDTH, requires_grad=True)
    y = model(x)
    model.layers[0][0].merge()
    with pytest.raises(RuntimeError, match=SAID_W):
        y.sum().backward()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_kept_graph_is_looked_at_again(rows, p):
    model, x = Outer(p=p), torch.randn(rows, WIDTH)
    y = model(x).sum()
    y.backward(retain_graph=True)
    first = model.layers[0][0].lora_A.grad.clone()
    y.backward(retain_graph=True)
    torch.testing.assert_close(model.layers[0][0].lora_A.grad, 2 * first)
    x += 1
    with pytest.raises(RuntimeError, match=SAID_X):
        y.backward()


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_nothing_is_held_after_backward(p):
    model, x = Outer(p=p), torch.randn(4, WIDTH)
    alive, y = weakref.ref(x), model(x).sum()
    y.backward()
    del x
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("rows", ROWS)
def test_saved_tensor_hooks_that_copy_allow_it(rows):
    model, x = Outer(p=0.3), torch.randn(rows, WIDTH)
    with torch.autograd.graph.save_on_cpu():
        y = model(x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        z = model(x)
    x += 1
    z.sum().backward()
    assert y.requires_grad


@pytest.mark.parametrize("rows", ROWS)
def test_tensors_without_a_module_have_their_shapes(rows):
    x, weight = torch.randn(rows, WIDTH), torch.randn(12, WIDTH)
    lora_A, lora_B = nn.Parameter(torch.randn(3, WIDTH)), nn.Parameter(torch.randn(12, 3))
    for call, y in (
        ("lora_linear", lora_linear(x, weight, lora_A, lora_B)),
        ("lora_add", lora_add(x @ weight.T, x, lora_A, lora_B)),
    ):
        x += 1
        with pytest.raises(
            RuntimeError, match=rf"^{call}, the layer with the tensors .*\(3, 16\), \(12, 3\), which no"
        ):
            y.sum().backward()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_blocks(rows, recompute, p):
    x = torch.randn(rows, WIDTH)
    holder = nn.ModuleDict(
        {
            "qkv": LoRAQKV(WIDTH, WIDTH, r=4, lora_dropout=p),
            "mlp": LoRAMLP(WIDTH, 24, r=4, lora_dropout=p, recompute=recompute),
        }
    )
    for name, call in (("qkv", "lora_(qkv|projections)"), ("mlp", "lora_mlp")):
        y = holder[name](x)
        y = sum(y) if name == "qkv" else y
        x += 1
        with pytest.raises(RuntimeError, match=rf"^{call}, layer {name}\.\w+_proj.*: its input x"):
            y.sum().backward()


@pytest.mark.parametrize("rows", ROWS)
def test_what_a_single_gradient_needs(rows):
    """B for dA alone; x for dW alone."""
    model, x = Outer(), torch.randn(rows, WIDTH)
    layer = model.layers[0][0]
    y = model(x)
    with torch.no_grad():
        layer.lora_B.mul_(2)
    with pytest.raises(RuntimeError, match=SAID_W):
        y.sum().backward()
    layer.weight.requires_grad_(True)
    layer.lora_A.requires_grad_(False)
    y = model(x)
    x += 1
    with pytest.raises(RuntimeError, match=SAID_X):
        y.sum().backward()


def test_recompute_of_a_small_mlp_never_takes_another_x():
    x = torch.randn(4, WIDTH)
    up, down = (
        Projection(torch.randn(*shape), *(nn.Parameter(torch.randn(*s)) for s in ((2, shape[1]), (shape[0], 2))))
        for shape in ((8, WIDTH), (WIDTH, 8))
    )
    y = lora_mlp(x, None, up, down, activation="relu2", recompute=True)
    x += 1
    with pytest.raises(RuntimeError, match=r"lora_mlp, .*its input x has been modified"):
        y.sum().backward()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_under_a_dispatch_mode(rows, p):
    from torch.utils.flop_counter import FlopCounterMode

    model, x = Outer(p=p), torch.randn(rows, WIDTH)
    with FlopCounterMode(display=False):
        y = model(x)
    x += 1
    with pytest.raises(RuntimeError, match=SAID_X):
        y.sum().backward()


def test_autocast_saves_its_own_copy():
    for rows in ROWS:
        model, x = Outer(p=0.3), torch.randn(rows, WIDTH)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        x += 1
        y.sum().backward()


def test_patched_peft_layers_are_named():
    peft = pytest.importorskip("peft")
    from lora_kernels import patch_peft

    for rows in ROWS:
        base = nn.Sequential(nn.Linear(WIDTH, WIDTH))
        model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["0"], lora_dropout=0.2))
        patch_peft(model)
        x = torch.randn(rows, WIDTH)
        y = model(x)
        x += 1
        with pytest.raises(RuntimeError, match=r"lora_linear, layer base_model\.model\.0: its input x"):
            y.sum().backward()


def test_a_parametrized_or_pruned_layer_computes_by_its_tensors():
    layer, x = LoRALinear(WIDTH, 8, r=2, bias=False), torch.randn(3, WIDTH)
    nn.init.normal_(layer.lora_B)
    torch.nn.utils.parametrize.register_parametrization(layer, "lora_A", torch.nn.Softplus())
    right = reference.lora_linear(x, layer.weight, layer.lora_A, layer.lora_B, scaling=layer.scaling)
    torch.testing.assert_close(layer(x), right)
    other = LoRALinear(WIDTH, 8, r=2)
    nn.init.normal_(other.lora_B)
    prune.l1_unstructured(other, "bias", 4)
    right = reference.lora_linear(x, other.weight, other.lora_A, other.lora_B, scaling=4.0, bias=other.bias)
    torch.testing.assert_close(other(x), right)
