"""torch.compile and torch.export: whole graphs, the eager numbers, dropout's too, and nothing compiled twice."""

import functools
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from lora_kernels import LoRALinear, autograd, lora_linear, plan

BACKENDS = ["torch", "triton"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),  # PyTorch's own
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """What "auto" takes in every layer."""
    monkeypatch.setattr(plan.backend, "_environment_backend", lambda: request.param)
    return request.param


def make_layer(device, p, **kwargs):
    torch.manual_seed(0)
    layer = LoRALinear(12, 10, r=3, lora_dropout=p, device=device, **kwargs)
    nn.init.normal_(layer.lora_B)
    return layer


def outcome(model, layer, x, seed):
    """y and the gradients after a seed."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    torch.manual_seed(seed)
    y = model(x)
    y.square().sum().backward()
    return y.detach(), x.grad, layer.lora_A.grad, layer.lora_B.grad


def assert_same(got, expected):
    for value, exact in zip(got, expected, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())


@pytest.mark.parametrize(("compiler", "p"), [("aot_eager", 0.0), pytest.param("inductor", 0.3, marks=pytest.mark.slow)])
def test_one_graph_for_every_seed_scaling_and_batch(compiler, p, backend, device):
    layer = make_layer(device, p)
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    graphs = None
    for seed, (batch, scaling) in enumerate([((4,), 2.0), ((7,), 2.0), ((5,), 0.7), ((5,), -3.0), ((9,), 1.1)]):
        layer.scaling = scaling
        x = torch.randn(*batch, 12, device=device)
        assert_same(outcome(compiled, layer, x, seed), outcome(layer, layer, x, seed))
        graphs = graphs or counter.frame_count
        assert counter.frame_count == graphs


@pytest.mark.slow
def test_static_shapes_give_way_to_dynamic_ones_once(backend, device):
    layer = make_layer(device, 0.3)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    graphs = []
    for rows, scaling in [(4, 2.0), (4, 2.0), (6, 2.0), (7, 2.0), (7, 0.5), (8, 0.25), (9, 3.0)]:
        layer.scaling = scaling
        x = torch.randn(rows, 12, device=device)
        assert_same(outcome(compiled, layer, x, rows), outcome(layer, layer, x, rows))
        graphs.append(counter.frame_count)
    assert graphs == [1, 1, 2, 2, 3, 3, 3]


def test_a_trained_bias_and_weight_leave_the_batch_a_symbol(device):
    layer = make_layer(device, 0.0).requires_grad_()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    graphs = None
    for rows in (4, 7, 5):
        x = torch.randn(2, rows, 12, device=device)
        assert_same(outcome(compiled, layer, x, 0), outcome(layer, layer, x, 0))
        graphs = graphs or counter.frame_count
    assert counter.frame_count == graphs


class Decoder(nn.Module):
    """Attention and a gated MLP, every projection a LoRALinear."""

    def __init__(self, p):
        super().__init__()
        torch.manual_seed(0)
        make = functools.partial(LoRALinear, r=3, lora_alpha=6, lora_dropout=p, bias=False)
        self.embedding, self.head = nn.Embedding(17, 16), nn.Linear(16, 17)
        self.norms = nn.ModuleList(nn.RMSNorm(16) for _ in range(2))
        self.qkv = nn.ModuleList(make(16, 16) for _ in range(3))
        self.out, self.gate, self.up, self.down = make(16, 16), make(16, 24), make(16, 24), make(24, 16)
        for layer in (*self.qkv, self.out, self.gate, self.up, self.down):
            nn.init.normal_(layer.lora_B, std=0.1)

    def block(self, x):
        h = self.norms[0](x)
        q, k, v = (f(h).unflatten(-1, (2, 8)).transpose(1, 2) for f in self.qkv)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        h = self.norms[1](x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.head(checkpoint(self.block, x, use_reentrant=False))


def losses(run, model, device):
    """Of a few steps of training from one seed, on batches that grow."""
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW([q for q in model.parameters() if q.requires_grad], lr=1e-2)
    series = []
    for step in range(5):
        tokens = torch.randint(17, (2 + step // 2, 7 + step), device=device)
        loss = F.cross_entropy(run(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        series.append(loss.item())
    return series


@pytest.mark.slow
def test_a_decoder_trains_to_the_same_losses(device, monkeypatch):
    """With dropout, each block checkpointed."""
    monkeypatch.setattr(plan.backend, "_environment_backend", lambda: "torch")  # the interpreter would take a minute
    plain, model = (Decoder(0.3).to(device) for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    torch.testing.assert_close(losses(compiled, model, device), losses(plain, plain, device), rtol=1e-4, atol=0)
    assert counter.frame_count <= 2  # one, and perhaps another where the first guess of a symbol was wrong


def test_a_shard_of_dropout_draws_what_it_draws_without_a_compiler(device, backend):
    layer = make_layer(device, 0.0)
    x = torch.randn(4, 12, device=device)

    def call(x):
        return lora_linear(
            x, layer.weight, layer.lora_A, layer.lora_B, bias=layer.bias, dropout_p=0.5, dropout_shard=(1, 2)
        )

    found = []
    for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(3)
        found.append([function(x), torch.rand(3, device=device)])
    assert_same(*found)


def test_layers_that_read_the_same_input_draw_their_own_masks(device):
    """Compilers merge equal calls."""
    layer = make_layer(device, 0.5)
    compiled = torch.compile(lambda x: (layer(x), layer(x)), backend="aot_eager_decomp_partition", fullgraph=True)
    first, second = compiled(torch.randn(20, 12, device=device))
    assert not torch.equal(first, second)


def graph_of(f, *args):
    graphs = []
    torch.compile(f, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True)(*args)
    return graphs[0].graph


def test_the_graph_holds_one_operator_and_the_backend(backend, device):
    """The environment is not part of the key of PyTorch's cache on disk, so its answer has to be in the graph."""
    (node,) = graph_of(make_layer(device, 0.3), torch.randn(4, 12, device=device)).find_nodes(
        op="call_function", target=autograd.linear.linear
    )
    assert backend in node.args


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(adapters, device):
    layer = make_layer(device, 0.0)
    layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.to(adapters), layer.lora_B.data.to(adapters)

    def run(x, f):
        with torch.autocast(device, dtype=torch.bfloat16):
            return f(x)

    compiled = torch.compile(functools.partial(run, f=layer), backend="aot_eager", fullgraph=True)
    x = torch.randn(6, 12, device=device)
    got, expected = (outcome(f, layer, x, 0) for f in (compiled, functools.partial(run, f=layer)))
    assert [t.dtype for t in got] == [torch.bfloat16, torch.float32, adapters, adapters]
    assert_same(got, expected)


def test_the_function_with_every_size_a_symbol(device):
    """lora_A and lora_B as plain arguments: their sizes vary as well, and a new rank is a new graph."""
    compiled = torch.compile(lora_linear, backend="aot_eager", fullgraph=True, dynamic=True)
    for m, k, n, r in [(3, 5, 6, 2), (4, 7, 9, 3)]:
        x, w, a, b = (torch.randn(s, device=device) for s in ((m, k), (n, k), (r, k), (n, r)))
        torch.testing.assert_close(compiled(x, w, a, b, scaling=0.5), lora_linear(x, w, a, b, scaling=0.5))


def test_sizes_of_zero_and_p_of_one(device):
    layer = make_layer(device, 1.0)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 12, device=device)
    torch.testing.assert_close(compiled(x), F.linear(x, layer.weight, layer.bias))
    assert compiled(x[:0]).shape == (0, 10)


@pytest.mark.parametrize("strict", [pytest.param(False, marks=pytest.mark.slow), True])
def test_export_of_a_layer_in_evaluation(strict, device, backend):
    layer = make_layer(device, 0.3).eval()
    rows = torch.export.Dim("rows", min=2, max=64)
    example = torch.randn(4, 12, device=device)
    program = torch.export.export(layer, (example,), dynamic_shapes=({0: rows},), strict=strict)
    assert [node.target for node in program.graph.nodes if node.op == "call_function"] == [autograd.linear.linear]
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    x = torch.randn(7, 12, device=device)
    for exported in (program, torch.export.load(buffer), program.run_decompositions()):
        torch.testing.assert_close(exported.module()(x), layer(x))


def test_export_for_training_draws_new_masks_and_has_the_gradients(device, backend):
    layer = make_layer(device, 0.3)
    x = torch.randn(5, 12, device=device)
    exported = torch.export.export(layer, (x,)).module()
    assert_same(outcome(exported, exported, x, 3), outcome(layer, layer, x, 3))
    assert not torch.equal(exported(x), exported(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_width_is_guarded_by_the_words_of_a_mask(backend, device):
    """in_features of any size, in one graph: how a mask is laid out does not show in what a compiler asks."""
    counter = CompileCounterWithBackend("eager")
    call = torch.compile(lora_linear, backend=counter, fullgraph=True, dynamic=True)
    for k in (64, 40, 72, 96):
        tensors = (torch.randn(size, device=device) for size in ((6, k), (24, k), (4, k), (24, 4)))
        assert call(*tensors, scaling=2.0, dropout_p=0.5, backend=backend).shape == (6, 24)
    assert counter.frame_count == 1
