"""Bad input: the fault's own words, before anything is computed or launched."""

import contextlib
import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels import (
    LoRALinear,
    LoRAMLP,
    LoRAQKV,
    Projection,
    lora_linear,
    lora_mlp,
    lora_projections,
    lora_qkv,
    plan,
)  # fmt: skip
from lora_kernels.functional import checks, lora_add


def tensors(**changes):
    t = dict(
        x=torch.randn(3, 6), weight=torch.randn(5, 6), lora_A=torch.randn(2, 6), lora_B=torch.randn(5, 2), bias=None
    )
    return t | changes


def call(scaling=1.0, dropout_p=0.0, backend="auto", dropout_shard=(0, 1), **changes):
    t = tensors(**changes)
    return lora_linear(
        t["x"], t["weight"], t["lora_A"], t["lora_B"], bias=t["bias"], scaling=scaling, dropout_p=dropout_p,
        backend=backend, dropout_shard=dropout_shard,
    )  # fmt: skip


class Subclass(torch.Tensor):
    pass


def quantized():
    return torch.quantize_per_tensor(torch.randn(5, 6), 0.1, 0, torch.qint8)


FAULTS = {
    "1 x against weight": (
        dict(x=torch.randn(3, 7)), ValueError, r"x has 7 features in its last dim but weight is \(5, 6\) and expects 6\."
    ),
    "2 lora_A transposed": (
        dict(lora_A=torch.randn(6, 2)), ValueError,
        r"lora_A is \(6, 2\) but must be \(r, 6\) to match x\. Did you pass lora_A transposed\?",
    ),
    "2 swapped": (
        dict(lora_A=torch.randn(5, 2), lora_B=torch.randn(2, 6)), ValueError,
        r"lora_A is \(5, 2\) but must be \(r, 6\) to match x\. lora_A and lora_B seem to be swapped: exchanged, they would fit\.$",
    ),
    "3 swapped, of rank in_features": (
        dict(lora_A=torch.randn(5, 6), lora_B=torch.randn(6, 6)), ValueError,
        r"lora_B is \(6, 6\) but must be \(5, 5\): out_features x rank\. lora_A and lora_B seem to be swapped",
    ),
    "3 lora_B transposed": (
        dict(lora_B=torch.randn(2, 5)), ValueError, r"lora_B is \(2, 5\) but must be \(5, 2\): out_features x rank\.$"
    ),
    "3 lora_B of another rank": (dict(lora_B=torch.randn(5, 3)), ValueError, r"lora_B is \(5, 3\) but must be \(5, 2\)"),
    "4 bias": (dict(bias=torch.randn(4)), ValueError, r"bias has 4 elements, weight has 5 output features\."),
    "4 bias with two dims": (dict(bias=torch.randn(1, 5)), ValueError, r"bias is \(1, 5\) but must be \(5,\)"),
    "5 devices": (
        dict(lora_A=torch.empty(2, 6, device="meta")), ValueError,
        r"all tensors must be on one device; x is on cpu, lora_A on meta\.",
    ),
    "6 dtype": (
        dict(x=torch.ones(3, 6, dtype=torch.int32)), TypeError,
        r"x has dtype torch\.int32; supported: bfloat16, float16, float32 \(float64 on CPU\)\.",
    ),
    "7 mix of x and weight": (
        dict(weight=torch.randn(5, 6).half()), TypeError,
        r"x is float32 but weight is float16\. Use torch\.autocast, or cast x: x\.to\(weight\.dtype\)\.",
    ),
    "7 16-bit adapters over fp32": (dict(lora_A=torch.randn(2, 6).half()), TypeError, r"x is float32 but lora_A is float16\."),
    "7 bias": (dict(bias=torch.randn(5).double()), TypeError, r"x is float32 but bias is float64\..*cast bias: bias\.to\(x\."),
    "8 subclass": (dict(weight=torch.randn(5, 6).as_subclass(Subclass)), TypeError, r"weight is a Subclass, a tensor subclass"),
    "8 sparse": (dict(weight=torch.eye(5, 6).to_sparse()), TypeError, r"weight has layout torch\.sparse_coo\. Use weight\.to_dense"),
    "8 quantized": (dict(weight=quantized), TypeError, r"weight (is quantized|has dtype torch\.qint8)"),
    "8 not a tensor": (dict(x=[[1.0]]), TypeError, r"x must be a torch\.Tensor, got list\."),
    "9 p above 1": (dict(dropout_p=1.5), ValueError, r"dropout_p must be in \[0, 1\], got 1\.5\."),
    "9 p below 0": (dict(dropout_p=-0.1), ValueError, r"dropout_p must be in \[0, 1\], got -0\.1\."),
    "9 p nan": (dict(dropout_p=float("nan")), ValueError, r"dropout_p must be in \[0, 1\], got nan\."),
    "10 scaling nan": (dict(scaling=float("nan")), ValueError, r"scaling must be finite, got nan\."),
    "10 scaling inf": (dict(scaling=float("inf")), ValueError, r"scaling must be finite, got inf\."),
    "11 scalar": (
        dict(x=torch.tensor(1.0)), ValueError, r"x must have at least 1 dim \(…, in_features\), got a scalar\."
    ),
    "dropout_shard": (
        dict(dropout_shard=(2, 2)), ValueError, r"dropout_shard must be \(i, n\) with 0 <= i < n.*, got \(2, 2\)\."
    ),
    "weight with one dim": (dict(weight=torch.randn(6)), ValueError, r"weight must have 2 dims, got shape \(6,\)\."),
    "13 rank": (
        dict(lora_A=torch.randn(1024, 6), lora_B=torch.randn(5, 1024), backend="triton"), ValueError,
        r'rank 1024 exceeds 512, the largest tuned; use backend="torch"\.',
    ),
    "backend": (dict(backend="cuda"), ValueError, r"backend='cuda' is not one of: auto, triton, torch, reference\."),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning", "ignore:.*[Qq]uantiz:DeprecationWarning")
@pytest.mark.parametrize("fault", FAULTS)
def test_fault(fault, monkeypatch):
    changes, kind, text = FAULTS[fault]
    changes = {name: value() if value is quantized else value for name, value in changes.items()}

    def unreachable(backend):
        raise AssertionError("computed before the check")

    monkeypatch.setattr(plan, "contractions", unreachable)
    with pytest.raises(kind, match="lora_linear: " + text):
        call(**changes)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused():
    for layout in (torch.jagged, torch.strided):
        nested = torch.nested.nested_tensor([torch.randn(2, 6), torch.randn(3, 6)], layout=layout)
        with pytest.raises(TypeError, match="lora_linear: x is a nested tensor"):
            call(x=nested)


def test_8_dtensors_are_refused(monkeypatch):
    """By name, so that the words are tested without a process group."""
    fake = type("DTensor", (Subclass,), {})
    with pytest.raises(TypeError, match=r"weight is a DTensor\. Call the module inside its FSDP forward"):
        call(weight=torch.randn(5, 6).as_subclass(fake))


def test_15_functorch():
    with pytest.raises(
        RuntimeError,
        match=r'"triton" does not support torch\.func transforms, .*; use backend="auto" inside them',
    ):
        torch.func.grad(lambda a: call(lora_A=a, backend="triton").sum())(torch.randn(2, 6))


def test_19_meta_and_fake_tensors_give_shapes():
    layer = LoRALinear(6, 5, r=2, lora_dropout=0.5, device="meta")
    assert layer(torch.empty(2, 3, 6, device="meta")).shape == (2, 3, 5)
    with FakeTensorMode():
        y = LoRALinear(6, 5, r=2, lora_dropout=0.5)(torch.randn(2, 3, 6))
    assert y.shape == (2, 3, 5)


def _of_each_call(backend):
    """Each public call with an adapter, and calls that compute a layer alone."""
    x, w, a, b = torch.randn(3, 6), torch.randn(6, 6), torch.randn(2, 6), torch.randn(6, 2)
    layer = Projection(w, a, b)
    return {
        "lora_linear": lambda a=a: lora_linear(x, w, a, b, backend=backend),
        "lora_add": lambda a=a: lora_add(x, x, a, b, backend=backend),
        "lora_projections": lambda a=a: lora_projections(x, [w] * 2, [(a, b)] * 2, backend=backend),
        "lora_projections of one": lambda a=a: lora_projections(x, [w], [(a, b)], backend=backend),
        "lora_qkv": lambda a=a: lora_qkv(x, [w] * 3, [(a, b)] * 3, backend=backend),
        "lora_mlp": lambda a=a: lora_mlp(x, layer._replace(lora_A=a), layer, layer, backend=backend),
        "lora_mlp with a gate that drops all": lambda a=a: lora_mlp(
            x, layer._replace(lora_A=a, dropout_p=1.0), layer, layer, backend=backend
        ),
        "lora_mlp with an adapter of down alone": lambda a=a: lora_mlp(
            x, Projection(w), Projection(w), layer._replace(lora_A=a), backend=backend
        ),
    }


@pytest.mark.parametrize("mode", [contextlib.nullcontext, functools.partial(FlopCounterMode, display=False)])
@pytest.mark.parametrize("case", _of_each_call("triton"))
def test_a_backend_that_cannot_run_names_the_call_that_the_user_made(case, mode, fresh_plan, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=f'^{case.split()[0]}: backend="triton" needs CUDA tensors'), mode():
        _of_each_call("triton")[case]()


@pytest.mark.parametrize("case", _of_each_call("triton"))
def test_transforms_name_the_call_that_the_user_made(case):
    def total(a):
        y = _of_each_call("triton")[case](a)
        return (y[0] if isinstance(y, tuple) else y).sum()

    with pytest.raises(RuntimeError, match=rf"^{case.split()[0]}: .* does not support torch\.func transforms"):
        torch.func.grad(total)(torch.randn(2, 6))


@pytest.mark.parametrize(
    ("case", "reference"),
    [
        ("lora_linear", "lora_linear"), ("lora_add", "lora_add"), ("lora_projections", "lora_projections"),
        ("lora_projections of one", "lora_linear"), ("lora_mlp", "lora_mlp"),
    ],
)  # fmt: skip
def test_an_operator_differentiated_twice_names_the_reference(case, reference):
    a = torch.randn(2, 6, requires_grad=True)
    with FlopCounterMode(display=False):
        y = _of_each_call("torch")[case](a)
        y = (y[0] if isinstance(y, tuple) else y).square().sum()
        (grad,) = torch.autograd.grad(y, a, create_graph=True)
        with pytest.raises(RuntimeError, match=rf"^{reference}: .*backend=\"reference\" of the call"):
            grad.sum().backward()


def test_dropout_on_dtensors_names_the_call_that_the_user_made():
    with pytest.raises(ValueError, match=r"^lora_qkv: dropout_p must be 0 for DTensors"):
        checks.check_sharded(0.5, "lora_qkv")


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("swish", "activation='swish' is not one of: silu, gelu, gelu_tanh, relu2\\. Use \"silu\"\\.$"),
        ("SiLU", 'Use "silu"'),
        ("gelu_pytorch_tanh", 'Use "gelu_tanh"'),
        ("gelu_new", 'Use "gelu_tanh"'),
        ("gelu_accurate", 'Use "gelu_tanh"'),
        ("relu", "relu2\\.$"),  # which is not its square
        (torch.nn.SiLU(), 'activation must be a string, one of: silu, .*; got SiLU\\. Use "silu"\\.$'),
        (torch.nn.GELU(approximate="tanh"), 'got GELU. Use "gelu_tanh"'),
        (torch.nn.functional.silu, 'got function. Use "silu"'),
        (functools.partial(torch.nn.functional.gelu, approximate="tanh"), 'got partial. Use "gelu_tanh"'),
        (functools.partial(torch.nn.functional.gelu), 'got partial. Use "gelu"'),
        (None, "got NoneType\\.$"),
    ],
)
@pytest.mark.parametrize("call", [lora_mlp, LoRAMLP])
def test_activations_by_other_names(given, text, call):
    layer = Projection(torch.ones(3, 3))
    args = (3, 3) if call is LoRAMLP else (torch.ones(2, 3), layer, layer, layer)
    with pytest.raises(ValueError if isinstance(given, str) else TypeError, match=f"^{call.__name__}: .*{text}"):
        call(*args, activation=given)


MLP = [Projection(torch.ones(6, 6))] * 3
QKV = [torch.ones(6, 6)] * 3, [None] * 3


@pytest.mark.parametrize(
    ("function", "given", "text"),
    [
        (lora_linear, "yes", "accumulate_grad must be True or False, got str"),
        (lora_linear, torch.tensor(True), "accumulate_grad must be True or False, got Tensor"),
        (lora_linear, [True], "accumulate_grad must be True or False, got list"),
        (lora_mlp, "yes", "accumulate_grad must be True or False, or a list of one for each layer, got str"),
        (lora_mlp, [True, False, 1], r"accumulate_grad\[2\] must be True or False, got int"),
        (lora_qkv, torch.ones(3), "accumulate_grad must be True or False, or a list of one for each projection, got Tensor"),
        (lora_qkv, (True, None, False), r"accumulate_grad\[1\] must be True or False, got NoneType"),
    ],
)  # fmt: skip
def test_flags_are_true_or_false(function, given, text):
    args = {lora_linear: (tensors()["weight"], tensors()["lora_A"], tensors()["lora_B"]), lora_mlp: MLP, lora_qkv: QKV}
    with pytest.raises(TypeError, match=rf"^{function.__name__}: {text}\.$"):
        function(torch.randn(3, 6), *args[function], accumulate_grad=given)


def linears():
    return [torch.nn.Linear(4, 4) for _ in range(3)]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (dict(r="8"), r"r must be an int, got str '8'\.$"),
        (dict(r=8.0), r"r must be an int, got float 8\.0\.$"),
        (dict(lora_alpha="16"), r"lora_alpha must be a number, got str '16'\. Use float\(lora_alpha\)\.$"),
        (dict(lora_dropout=None), r"lora_dropout must be a number, got NoneType None\.$"),
    ],
)
@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("LoRALinear", lambda **given: LoRALinear(4, 4, **given)),
        ("LoRALinear", lambda **given: LoRALinear.from_linear(torch.nn.Linear(4, 4), **given)),
        ("LoRAMLP", lambda **given: LoRAMLP(4, 4, **given)),
        ("LoRAMLP", lambda **given: LoRAMLP.from_linears(*linears(), **given)),
        ("LoRAQKV", lambda **given: LoRAQKV(4, 4, **given)),
        ("LoRAQKV", lambda **given: LoRAQKV.from_linears(*linears(), **given)),
    ],
)
def test_what_is_no_number_is_named(name, build, given, text):
    with pytest.raises(TypeError, match=f"^{name}: {text}"):
        build(**given)


@pytest.mark.parametrize(
    ("build", "kind", "text"),
    [
        (lambda: LoRALinear(4, 4, r=0), ValueError, "r must be at least 1, got 0"),
        (lambda: LoRALinear(4, 4, lora_dropout=1.5), ValueError, r"lora_dropout must be in \[0, 1\], got 1\.5"),
        (
            lambda: LoRALinear.from_linear(torch.nn.Bilinear(2, 2, 2)),
            TypeError,
            "linear is a Bilinear, not exactly an nn.Linear",
        ),
    ],
)
def test_module_faults(build, kind, text):
    with pytest.raises(kind, match=text):
        build()
