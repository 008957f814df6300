"""A whole patched Llama under torch.compile: one graph, the uncompiled model's numbers, nothing compiled for a size."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

pytest.importorskip("peft")
pytest.importorskip("transformers")

from llama_samples import LINEARS, adapted, tokens

from lora_kernels import autograd, patch_peft

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:.*config.*:UserWarning"
)
STEPS = ((4, 24, 2.0), (3, 17, 1.5), (2, 20, 0.5), (2, 13, 1.25), (4, 9, 3.0))  # rows, columns, scaling


def losses(model, call):
    """Train on batches of many sizes, with another scaling for each: losses, and what each step left in the adapters."""
    torch.manual_seed(2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for step, (rows, columns, scaling) in enumerate(STEPS):
        for module in model.modules():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling["default"] = scaling
        ids = tokens()[step][:rows, :columns].clone()  # a view would be watched with its base
        loss = call(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_a_whole_model_trains_in_one_graph_to_the_same_numbers(dynamic, joined, monkeypatch):
    model = adapted(layers=1, target_modules=["q_proj", "up_proj"] if dynamic else LINEARS, lora_dropout=0.2)
    for name in ("k_proj", "up_proj", "down_proj"):  # with and without dropout
        for layer in (module for path, module in model.named_modules() if path.endswith(name)):
            if hasattr(layer, "lora_dropout"):
                layer.lora_dropout["default"] = nn.Identity()
    assert patch_peft(model).count("stock") == 0
    twin = copy.deepcopy(model)
    expected = list(losses(model, model))
    assert len(joined) == 2 * len(STEPS)
    monkeypatch.undo()  # a list that grows is one more thing that a graph would depend on
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    actual, graphs = [], []
    for loss in losses(twin, torch.compile(twin, backend=counter, fullgraph=True, dynamic=dynamic)):
        actual.append(loss)
        graphs.append(counter.frame_count)
    torch._dynamo.reset()
    # in a graph the MLP is joined, and each layer of attention that has an adapter is on its own
    found = [node.target for node in counter.graphs[-1].graph.nodes]
    assert [found.count(op) for op in (autograd.mlp.mlp, autograd.projections.projections)] == [1, 0]
    assert found.count(autograd.linear.linear) == (1 if dynamic else 4)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    # dynamic, one, and once more where the first guess of a symbol was wrong; else one, and one more for a new size
    assert graphs[0] <= (2 if dynamic else 1)
    assert graphs[1:] == [graphs[0] + (not dynamic)] * (len(STEPS) - 1), "compiled anew for a size or a scaling"
