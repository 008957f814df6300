"""Cases of `distributed_samples`: tensor parallelism, sharding rules, checkpoints of sharded models."""

import copy
import os
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_data import ddp, fsdp_by_leaf, sharded
from distributed_samples import (
    ROWS,
    Block,
    alike,
    case,
    difference,
    draw,
    full,
    gradients,
    make_model,
    mesh,
    mine,
    parameters,
    train,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

from lora_kernels import LoRALinear, lora_linear, patch_peft, torch_backend
from lora_kernels.parallel import LoRAColwise, LoRARowwise
from lora_kernels.peft import explain

R, S0, S1, S2 = Replicate(), Shard(0), Shard(1), Shard(2)


def parallel(model):
    return parallelize_module(model, mesh(), {"*.up": LoRAColwise(), "*.down": LoRARowwise()})


def called(model, x, dy):
    """y and every gradient of one call, in full."""
    x = x.detach().requires_grad_()
    y = model(x)
    y.backward(dy)
    return {"y": y, "dx": x.grad} | gradients(model)


@case
def tensor_parallel(folder):
    """Everything trains, biases and weights too."""
    x, dy, single = draw(ROWS, 3, 12), draw(ROWS, 3, 12, seed=2), make_model()
    single.requires_grad_()
    expected = called(copy.deepcopy(single), x, dy)
    model = parallel(single)
    placed = {name: p.placements[0] for name, p in model[0].named_parameters()}
    assert placed == {
        "up.weight": S0, "up.bias": S0, "up.lora_A": R, "up.lora_B": S0,
        "down.weight": S1, "down.bias": R, "down.lora_A": S1, "down.lora_B": R,
    }  # fmt: skip
    actual = called(model, x, dy)
    for name, p in model.named_parameters():
        assert p.grad.placements == p.placements, name  # added up, not left as partial sums
    return {"call": difference(actual, expected)}


@case
def tensor_parallel_training(folder):
    x, single = draw(ROWS, 12), make_model()
    expected = train(copy.deepcopy(single), x)
    model = parallel(single)
    trained = train(model, x)
    found = {"training": difference(trained, expected)}
    y = model(x).detach()
    for block in model.eval():
        block.up.merge()
        block.down.merge()
    return found | {"merged": difference({"y": model(x)}, {"y": y})}


@case
def tensor_parallel_in_layouts(folder):
    """Inputs and outputs in every layout: gathered, scattered, sharded along the sequence, as DTensors."""
    x, dy, found = draw(2, 4, 12), draw(2, 4, 16, seed=2), {}
    torch.manual_seed(0)
    layer = LoRALinear(12, 16, r=4)
    nn.init.normal_(layer.lora_B)
    expected = called(copy.deepcopy(layer), x, dy)
    device_mesh = mesh()
    for style in (LoRAColwise, LoRARowwise):
        for given in (R, S0, S1, S2):
            for wanted in (R, S1, S2):
                model = parallelize_module(
                    copy.deepcopy(layer),
                    device_mesh,
                    style(input_layouts=given, output_layouts=wanted, use_local_output=wanted is S1),
                )
                local = distribute_tensor(x, device_mesh, [given])
                at = local.to_local().detach().requires_grad_()
                y = model(at)
                assert isinstance(y, DTensor) == (wanted is not S1)
                if wanted is S1:
                    y = DTensor.from_local(y, device_mesh, [S1])
                assert y.placements == (wanted,)
                y.backward(distribute_tensor(dy, device_mesh, [wanted]))
                dx = DTensor.from_local(at.grad, device_mesh, [given])
                key = f"{style.__name__} {given} {wanted}"
                found[key] = difference({"y": y, "dx": dx} | gradients(model), expected)
    # a DTensor in another layout than the style was told is redistributed all the same
    model = parallelize_module(copy.deepcopy(layer), device_mesh, LoRARowwise())
    found["DTensor"] = difference({"y": model(distribute_tensor(x, device_mesh, [S0]))}, {"y": expected["y"]})
    return found


@case
def tensor_parallel_beside_linear(folder):
    """After PyTorch's own styles, whose outputs may still be on their way: a layer in a style, one without, PEFT's."""
    x, dy, found = draw(2, 4, 12), draw(2, 4, 12, seed=2), {}
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 12))
    first = {"0": ColwiseParallel(), "1": RowwiseParallel()}
    for name, last, plan in (
        ("in styles", make_model()[0], {"2.up": LoRAColwise(), "2.down": LoRARowwise()}),
        ("sequence", make_model()[0], {
            "1": RowwiseParallel(output_layouts=S1), "2.up": LoRAColwise(input_layouts=S1), "2.down": LoRARowwise()
        }),
        ("without", make_model()[0].up, {}),
    ):  # fmt: skip
        single = nn.Sequential(*copy.deepcopy(plain), last)
        if name == "sequence":  # what is added to it would be a part of the sequence
            single[2] = nn.Sequential(OrderedDict(up=last.up, down=last.down))
        gradient = dy if name != "without" else draw(2, 4, 16, seed=2)
        expected = called(copy.deepcopy(single), x, gradient)
        found[name] = difference(called(parallelize_module(single, mesh(), first | plan), x, gradient), expected)
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["0", "1"], init_lora_weights=False)
    single = get_peft_model(copy.deepcopy(plain), config)
    expected = called(single, x, dy)
    patch_peft(single)
    single.zero_grad()
    model = parallelize_module(single, mesh(), {"base_model.model.1.base_layer": RowwiseParallel(input_layouts=R)})
    found["PEFT"] = difference(called(model, x, dy), expected)
    assert [layer.form for layer in explain(model, x).layers] == ["fused", "low-rank"]
    return found


@case
def tensor_parallel_over_fsdp(folder):
    x, single = draw(ROWS, 12), make_model()
    expected = train(copy.deepcopy(single), x)
    both = mesh(1, 2, names=("dp", "tp"))
    model = parallelize_module(single, both["tp"], {"*.up": LoRAColwise(), "*.down": LoRARowwise()})
    for block in model:
        fully_shard(block, mesh=both["dp"])
    return {"training": difference(train(fully_shard(model, mesh=both["dp"]), x), expected)}


@case
def tensor_parallel_compiled(folder):
    x, dy, single = draw(ROWS, 12), draw(ROWS, 12, seed=2), make_model()[:1]
    expected = called(copy.deepcopy(single), x, dy)
    model = parallel(single)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x.requires_grad_()
    y = compiled(x)
    y.backward(dy)
    return {"call": difference({"y": y, "dx": x.grad} | gradients(model), expected)}


@case
def column_wise_dropout(folder):
    """The ranks draw the mask of a single process that was seeded like them."""
    x, dy = draw(ROWS, 12), draw(ROWS, 16, seed=2)
    torch.manual_seed(0)
    single = LoRALinear(12, 16, r=3, lora_dropout=0.4)
    nn.init.normal_(single.lora_B)
    torch.manual_seed(7)
    expected = called(copy.deepcopy(single), x, dy)
    after = torch.rand(3)
    model = parallelize_module(single, mesh(), LoRAColwise(output_layouts=R))
    torch.manual_seed(7)
    found = {"call": difference(called(model, x, dy), expected)}
    assert torch.equal(torch.rand(3), after)
    return found


@case
def row_wise_dropout(folder):
    """With identities for A and B, y shows the mask: two halves that have nothing in common, of which dy sees the same."""
    x, dy, layer = torch.ones(ROWS, 32), draw(ROWS, 32, seed=2), LoRALinear(32, 32, r=32, lora_alpha=32, bias=False)
    layer.lora_dropout = 0.5
    with torch.no_grad():
        layer.weight.zero_()
        nn.init.eye_(layer.lora_A)
        nn.init.eye_(layer.lora_B)
    model = parallelize_module(layer, mesh(), LoRARowwise(input_layouts=R))
    found = {}
    for name in ("plain", "recomputed"):
        torch.manual_seed(7)
        at = x.clone().requires_grad_()
        model.zero_grad()
        y = model(at) if name == "plain" else checkpoint(model, at, use_reentrant=False)
        y.backward(dy)
        after = torch.rand(3)
        assert alike(y.detach())
        assert alike(after)
        left, right = y.detach().chunk(2, 1)
        assert set(y.detach().unique().tolist()) == {0.0, 2.0}
        assert 0.35 < (left == right).float().mean() < 0.65
        expected = {"dx": dy * y.detach(), "lora_A": dy.t() @ y.detach(), "lora_B": dy.t() @ y.detach()}
        found[name] = difference({"dx": at.grad} | gradients(model), expected)
    second = model(x).detach()
    assert not torch.equal(second, y.detach())
    return found


@case
def small_calls(folder):
    """The same where small calls on a CPU take the way that is theirs."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_backend, "_SMALL", 1 << 15)
        for run in (ddp, fsdp_by_leaf, tensor_parallel, column_wise_dropout, row_wise_dropout):
            found |= {f"{run.__name__} {name}": value for name, value in run(folder).items()}
    return found


@case
def rules(folder):
    """The operators on DTensors: what the layouts allow needs no communication, anything else is redistributed."""
    x, dy, device_mesh, found = draw(2, 4, 12), draw(2, 4, 16, seed=2), mesh(), {}
    torch.manual_seed(0)
    plain = dict(x=x, weight=draw(16, 12), lora_A=draw(4, 12), lora_B=draw(16, 4), bias=draw(16))
    layouts = {
        "replicated": ((R, R, R, R, R), R), "rows": ((S0, R, R, R, R), S0), "column-wise": ((R, S0, R, S0, S0), S2),
        "row-wise": ((S2, S1, S1, R, R), None), "ill-matched": ((S1, S0, S1, S1, R), None),
    }  # fmt: skip
    trained = ("x", "weight", "lora_A", "lora_B", "bias")
    for name, (placements, expected_layout) in layouts.items():
        for needed in (trained, ("lora_A", "lora_B"), ("lora_A",), ("lora_B",), ("x",)):
            single = {k: t.clone().requires_grad_(k in needed) for k, t in plain.items()}
            spread = {
                k: distribute_tensor(t, device_mesh, [at]).requires_grad_(k in needed)
                for (k, t), at in zip(plain.items(), placements, strict=True)
            }
            y = lora_linear(**single, scaling=1.5)
            y.backward(dy)
            with CommDebugMode() as forward:
                z = lora_linear(**spread, scaling=1.5)
            to = expected_layout or R
            dz = distribute_tensor(dy, device_mesh, [to])
            with CommDebugMode() as backward:
                z.backward(dz)
            if name != "ill-matched":
                assert forward.get_total_counts() == backward.get_total_counts() == 0, (name, needed)
                assert z.placements[0].is_partial() if name == "row-wise" else z.placements == (to,)
            found[f"{name} {needed}"] = difference(
                {"y": z} | {k: spread[k].grad for k in needed}, {"y": y} | {k: single[k].grad for k in needed}
            )
    with torch.no_grad():
        single = {k: t for k, t in plain.items() if k != "bias"}
        spread = {k: distribute_tensor(t, device_mesh, [S0 if k == "x" else R]) for k, t in single.items()}
        spread["x"] = distribute_tensor(x[0, 0], device_mesh, [S0])
        found["a single row"] = difference({"y": lora_linear(**spread)}, {"y": lora_linear(**single | {"x": x[0, 0]})})
        spread["x"] = distribute_tensor(x, device_mesh, [S0])
        found["without grad or bias"] = difference({"y": lora_linear(**spread)}, {"y": lora_linear(**single)})
    return found


@case
def refused(folder):
    device_mesh, found = mesh(), {}
    faults = {
        "uneven": (LoRALinear(12, 7), ValueError, r"LoRAColwise: dim 0 of weight is 7, which 2 ranks cannot share"),
        "linear": (nn.Linear(4, 4), TypeError, r"LoRAColwise: expected a LoRALinear, got Linear"),
    }
    for layer, kind, text in faults.values():
        with pytest.raises(kind, match=text):
            parallelize_module(layer, device_mesh, LoRAColwise())
    with pytest.raises(ValueError, match=r"LoRARowwise: dim 1 of weight is 7"):
        parallelize_module(LoRALinear(7, 12), device_mesh, LoRARowwise())
    with pytest.raises(TypeError, match=r"LoRARowwise: input_layouts must be a Placement, as Shard\(1\), got int"):
        LoRARowwise(input_layouts=1)
    merged = LoRALinear(4, 4)
    merged.merge()
    with pytest.raises(RuntimeError, match=r"LoRAColwise: LoRALinear is merged; call unmerge\(\)"):
        parallelize_module(merged, device_mesh, LoRAColwise())
    spread = [distribute_tensor(t, device_mesh, [R]) for t in (draw(3, 6), draw(4, 6), draw(2, 6), draw(4, 2))]
    with pytest.raises(ValueError, match=r"dropout_p must be 0 for DTensors, got 0\.5"):
        lora_linear(*spread, dropout_p=0.5)
    with pytest.raises(TypeError, match=r"lora_A is a DTensor\. Call the module inside its FSDP forward"):
        lora_linear(*(t.to_local() for t in spread[:2]), *spread[2:])
    return found


@case
def checkpoints(folder):
    """Sharded in two ways and saved; `tests/autograd/test_distributed.py` loads them without any process group."""
    x, found = draw(ROWS, 12), {}
    for name, make in (("fsdp", lambda m: sharded(m, Block)), ("tensor_parallel", parallel)):
        model = make(make_model())
        train(model, mine(x) if name == "fsdp" else x)
        state = get_model_state_dict(model)
        assert all(isinstance(t, DTensor) for t in state.values())
        dcp.save(state, checkpoint_id=folder / name)
        whole = {key: full(t).contiguous() for key, t in state.items()}
        if dist.get_rank() == 0:
            save_file(whole, folder / f"{name}.safetensors")
        # and on two ranks that are sharded in another way
        other = parallel(make_model(seed=5)) if name == "fsdp" else sharded(make_model(seed=5), Block)
        state = get_model_state_dict(other)
        dcp.load(state, checkpoint_id=folder / name)
        set_model_state_dict(other, state)
        found[name] = difference(parameters(other), whole)
    return found


@case
def page(folder):
    """The Python of docs/distributed.md, from top to bottom."""
    text = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert len(blocks) >= 4
    before, names = Path.cwd(), {}
    os.chdir(folder)  # for the files that it writes
    try:
        for block in blocks:
            exec(block, names)  # the project's own page
    finally:
        os.chdir(before)
    return {}
