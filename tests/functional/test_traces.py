"""What records or transforms PyTorch's own operators: jit.trace, torch.fx, torch.func, ONNX, and a second derivative."""

import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jvp, vmap

from lora_kernels import LoRALinear, LoRAMLP, LoRAQKV, Projection, lora_linear, lora_mlp, lora_qkv, torch_backend
from lora_kernels.functional import lora_add

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # PyTorch's own
WIDTH = 48
MODULES = {
    "LoRALinear": lambda **how: LoRALinear(WIDTH, 56, r=4, **how),
    "LoRAQKV": lambda **how: LoRAQKV(WIDTH, 32, 16, r=4, **how),
    "LoRAMLP": lambda **how: LoRAMLP(WIDTH, 56, r=4, **how),
}


class Functions(nn.Module):
    """Every public function on the parameters of a layer."""

    def __init__(self, **how):
        super().__init__()
        self.layer = LoRALinear(WIDTH, WIDTH, r=4, **how)
        self.backend = "auto"

    def forward(self, x):
        w, a, b = self.layer.weight, self.layer.lora_A, self.layer.lora_B
        q, k, v = lora_qkv(x, [w] * 3, [(a, b), None, (a, b)], backend=self.backend)
        x = lora_add(q, k + v, a, b, backend=self.backend) / 16
        x = lora_linear(x, w, a, b, backend=self.backend)
        return lora_mlp(x, *[Projection(w, a, b)] * 3, activation="gelu", backend=self.backend)


MODULES["functions"] = Functions


def made(name, **how):
    torch.manual_seed(0)
    module = MODULES[name](**how)
    for layer in module.modules():
        if isinstance(layer, LoRALinear):
            nn.init.normal_(layer.lora_B, std=0.3)
    return module


def joined(ys):
    return torch.cat(ys, -1) if isinstance(ys, tuple) else ys


def double(module):
    """The module in float64, computed by the reference."""
    twin = made(next(name for name in MODULES if type(module) is type(made(name))), dtype=torch.float64)
    twin.load_state_dict(module.state_dict())
    for layer in twin.modules():
        layer.backend = "reference"
    return twin


def close(found, exact, dtype):
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 6e-2}[dtype]
    error = (found.double() - exact).norm() / exact.norm()
    assert error <= tolerance


@pytest.mark.parametrize("grads", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_a_trace_is_of_plain_operators_and_of_any_size(name, dtype, grads):
    """Traced above and below a block of the torch backend, run on the other, with the gradients of the adapters."""
    module = made(name, dtype=dtype)
    exact = double(module)
    torch_backend._slow.cache_clear()  # as in a fresh process, where a trace recorded the question to the machine
    for rows, others in ((3000, 7), (7, 3001)):
        x, other = torch.randn(rows, WIDTH, dtype=dtype), torch.randn(others, WIDTH, dtype=dtype)
        with torch.set_grad_enabled(grads):
            # No warning either, of comparisons of sizes, or of what a plain call gives; in bf16 that is rounded less often.
            traced = torch.jit.trace(module, x, check_trace=dtype == torch.float32)
            y = joined(traced(other))
        text = str(traced.inlined_graph)
        assert "PythonOp" not in text
        assert "lora_kernels::" not in text
        expected = joined(exact(other.double()))
        close(y, expected, dtype)
        if grads:
            module.zero_grad()
            exact.zero_grad()
            y.sum().backward()
            expected.sum().backward()
            for ours, right in zip(module.parameters(), exact.parameters(), strict=True):
                assert (ours.grad is None) == (right.grad is None)
                if right.grad is not None:
                    close(ours.grad, right.grad, dtype)


def test_a_trace_draws_a_new_mask_at_each_call_and_of_any_size():
    traced = torch.jit.trace(made("LoRALinear", lora_dropout=0.5), torch.randn(8, WIDTH), check_trace=False)
    x = torch.randn(600, WIDTH)
    assert not torch.equal(traced(x), traced(x))
    assert traced(torch.randn(2, 3, WIDTH)[0]).shape == (3, 56)


def test_a_trace_refuses_kernels_and_unknown_backends():
    x, w, a, b = torch.randn(3, 6), torch.randn(6, 6), torch.randn(2, 6), torch.randn(6, 2)
    for backend, error, text in (
        ("triton", RuntimeError, r'lora_linear: backend="triton" does not support .* torch\.jit\.trace'),
        ("cuda", ValueError, "backend='cuda' is not one of: auto, triton, torch, reference"),
    ):
        with pytest.raises(error, match=text):
            torch.jit.trace(lambda x, backend=backend: lora_linear(x, w, a, b, backend=backend), x)
    with pytest.raises(ValueError, match="x has 5 features"):
        torch.jit.trace(lambda x: lora_linear(x, w, a, b), x[:, :5])
    assert torch._C._get_tracing_state() is None


@pytest.mark.slow
def test_bf16_is_traced_in_a_fresh_process():
    """Nothing is asked of the machine for the first time while a trace records."""
    code = (
        "import torch; from lora_kernels import LoRALinear; "
        "x = torch.randn(4, 64).bfloat16(); print(torch.jit.trace(LoRALinear(64, 96, dtype=x.dtype), x)(x).shape)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "[4, 96]" in run.stdout, run.stderr


@pytest.mark.parametrize("name", MODULES)
def test_fx_records_each_call(name):
    module = made(name)
    graph = torch.fx.symbolic_trace(nn.Sequential(module))
    assert any("lora_kernels" in getattr(node.target, "__module__", "") for node in graph.graph.nodes)
    for rows in (4, 9):
        x = torch.randn(rows, WIDTH)
        assert torch.equal(joined(graph(x)), joined(module(x)))
    joined(graph(x)).sum().backward()
    assert all(p.grad is not None for n, p in module.named_parameters() if "lora_" in n)


def by_onnx(exported, x, path, **how):
    """Export to ONNX, and run the file by its own runtime."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(exported, (x,), path, input_names=["x"], verbose=False, **how)
    model = pytest.importorskip("onnx").load(path)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    session = pytest.importorskip("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.cat([torch.from_numpy(y) for y in session.run(None, {"x": x.numpy()})], -1)


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_onnx_gets_operators_that_it_knows(name, dynamo, tmp_path):
    """A model without a domain of ours, of any number of rows, that ONNX's runtime computes as we do."""
    pytest.importorskip("onnxscript")
    module, rows = made(name).eval(), {0: torch.export.Dim("rows", min=2, max=64)}
    how = dict(dynamic_shapes=(rows,)) if dynamo else dict(dynamic_axes={"x": {0: "rows"}})
    run = by_onnx(module, torch.randn(5, WIDTH), tmp_path / "m.onnx", dynamo=dynamo, **how)
    for x in (torch.randn(5, WIDTH), torch.randn(9, WIDTH)):
        torch.testing.assert_close(run(x), joined(module(x)), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch.export's own
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_onnx_takes_a_program_that_was_exported_before(name, strict, tmp_path):
    """The program itself keeps our operators, and chooses its backend where it runs."""
    pytest.importorskip("onnxscript")
    module, x = made(name).eval(), torch.randn(5, WIDTH)
    program = torch.export.export(module, (x,), strict=strict)
    assert any("lora_kernels" in str(node.target) for node in program.graph.nodes)
    run = by_onnx(program, x, tmp_path / "m.onnx", dynamo=True)
    torch.testing.assert_close(run(x), joined(module(x)), rtol=1e-4, atol=1e-4)
    assert any("lora_kernels" in str(node.target) for node in program.run_decompositions().graph.nodes)


@pytest.mark.parametrize("name", MODULES)
def test_transforms_of_a_module_take_the_reference_by_themselves(name):
    module, x = made(name, dtype=torch.float64), torch.randn(5, WIDTH, dtype=torch.float64)
    adapters = {n: p.detach() for n, p in module.named_parameters() if "lora_" in n}
    exact = double(module)

    def loss(parameters, x):
        return joined(functional_call(module, parameters, (x,))).square().mean()

    found = vmap(grad(loss), (None, 0))(adapters, x)
    for i, row in enumerate(x):
        exact.zero_grad()
        joined(exact(row)).square().mean().backward()
        for n, p in exact.named_parameters():
            if n in found:
                torch.testing.assert_close(found[n][i], p.grad)
    tangent = torch.randn_like(x[0])
    _, moved = jvp(lambda x: loss(adapters, x), (x[0],), (tangent,))
    slope = grad(loss, argnums=1)(adapters, x[0])
    torch.testing.assert_close(moved, slope @ tangent)
    second = hessian(loss, argnums=1)(adapters, x[0])
    step = 1e-6 * tangent
    near = (grad(loss, argnums=1)(adapters, x[0] + step) - grad(loss, argnums=1)(adapters, x[0] - step)) / 2
    torch.testing.assert_close(second @ step, near, rtol=1e-4, atol=1e-9)


def penalty(module, x, **how):
    """A loss of gradients, whose outputs' own gradient is constant: the penalty's gradient goes through the layer alone."""
    x = x.detach().requires_grad_()
    (dx,) = torch.autograd.grad(joined(module(x)).sum(), x, create_graph=True)
    return torch.autograd.grad(dx.square().sum(), [p for n, p in module.named_parameters() if "lora_" in n], **how)


@pytest.mark.parametrize("name", MODULES)
def test_a_second_derivative_raises_and_names_what_gives_it(name):
    """Never a gradient that lacks it: without a word, a penalty on dx would change nothing."""
    module, x = made(name, dtype=torch.float64), torch.randn(5, WIDTH, dtype=torch.float64)
    for how in ({}, dict(allow_unused=True)):
        with pytest.raises(RuntimeError, match=r'twice.*layer\.backend = "reference" of each LoRALinear'):
            penalty(module, x, **how)
    exact = penalty(double(module), x)
    for layer in module.modules():
        layer.backend = "reference"
    for found, right in zip(penalty(module, x), exact, strict=True):
        torch.testing.assert_close(found, right)
    base = x.detach().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: joined(module(x)).square(), base[:1])


def test_one_child_of_a_block_may_have_a_backend_of_its_own():
    block, x = made("LoRAQKV", dtype=torch.float64), torch.randn(5, WIDTH, dtype=torch.float64)
    expected = block(x)
    block.k_proj.backend = "reference"
    for y, right in zip(block(x), expected, strict=True):
        torch.testing.assert_close(y, right)
    block.k_proj.backend = "cuda"
    with pytest.raises(ValueError, match="backend='cuda' is not one of: auto, triton, torch, reference"):
        block(x)
