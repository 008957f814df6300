"""Cases of `distributed_samples`: data parallelism (DDP, FSDP2), of `LoRALinear` and of patched PEFT models."""

import contextlib
import copy

import torch
import torch.distributed as dist
from accelerate import Accelerator
from distributed_samples import (
    ROWS,
    alike,
    case,
    difference,
    draw,
    gradients,
    loss,
    make_model,
    mine,
    parameters,
    train,
)
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from lora_kernels import LoRALinear, patch_peft
from lora_kernels.peft import explain


def sharded(model, unit, **options):
    """`fully_shard` over every module of a class, and over what is left."""
    for module in model.modules():
        if isinstance(module, unit):
            fully_shard(module, **options)
    return fully_shard(model, **options)


@case
def ddp(folder):
    x, single = draw(ROWS, 12), make_model()
    expected = train(copy.deepcopy(single), x)
    return {"training": difference(train(DistributedDataParallel(single), mine(x)), expected)}


def accumulating(parallelize, last):
    """Backward adds to .grad itself, and the ranks' sum is taken at the last of three parts."""
    x, single = draw(3, ROWS, 12), make_model()
    for part in x:
        loss(single(part)).backward()
    model = make_model()
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            layer.accumulate_grad = True
    model = parallelize(model)
    for i, part in enumerate(x):
        with last(model, i == 2):
            loss(model(mine(part))).backward()
    return {"gradients": difference(gradients(model), gradients(single))}


@case
def ddp_that_accumulates(folder):
    return accumulating(
        DistributedDataParallel, lambda model, last: contextlib.nullcontext() if last else model.no_sync()
    )


@case
def fsdp_that_accumulates(folder):
    def last(model, is_last):
        model.set_requires_gradient_sync(is_last)
        return contextlib.nullcontext()

    return accumulating(lambda model: sharded(model, LoRALinear), last)


@case
def fsdp_by_layer(folder):
    x, single = draw(ROWS, 12), make_model()
    expected = train(copy.deepcopy(single), x)
    return {"training": difference(train(sharded(single, type(single[0])), mine(x)), expected)}


@case
def fsdp_by_leaf(folder):
    x, single = draw(ROWS, 12), make_model()
    expected = train(copy.deepcopy(single), x)
    return {"training": difference(train(sharded(single, LoRALinear), mine(x)), expected)}


@case
def fsdp_of_a_16_bit_base(folder):
    """PEFT's default: adapters in fp32 over a bfloat16 base, in one unit."""
    x = draw(ROWS, 12, dtype=torch.bfloat16)
    single = make_model(dtype=torch.bfloat16, adapters=torch.float32)
    loss(single(x)).backward()
    expected = gradients(single)
    model = sharded(make_model(dtype=torch.bfloat16, adapters=torch.float32), type(single[0]))
    loss(model(mine(x))).backward()
    return {"gradients": difference(gradients(model), expected)}


@case
def fsdp_with_a_mixed_precision_policy(folder):
    """Parameters and activations in bfloat16, gradients added up in fp32."""
    x, halves = draw(ROWS, 12), []
    for half in x.chunk(2):
        single = make_model().bfloat16()
        loss(single(half.bfloat16())).backward()
        halves.append(gradients(single))
    expected = {name: (grad.float() + halves[1][name].float()) / 2 for name, grad in halves[0].items()}
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(make_model(), LoRALinear, mp_policy=policy)
    y = model(mine(x))
    assert y.dtype == torch.bfloat16
    loss(y).backward()
    return {"gradients": difference(gradients(model), expected)}


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(12, 16), nn.Linear(16, 12)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(x)))


def make_peft_model():
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["up", "down"], init_lora_weights=False)
    return get_peft_model(nn.Sequential(Plain(), Plain()), config)


def peft_case(parallelize, form):
    """A patched PEFT model beside the stock one: the same training, each of its four layers computed in `form`."""
    x, stock = draw(ROWS, 12), make_peft_model()
    expected = train(stock, x)
    model = make_peft_model()
    patch_peft(model)
    model = parallelize(model)
    found = difference(train(model, mine(x)), expected)
    # not before: a forward without gradients leaves FSDP's root gathered, and an optimizer would be given those copies
    assert [layer.form for layer in explain(model, mine(x)).layers] == [form] * 4
    return {"training": found}


@case
def peft_ddp(folder):
    return peft_case(DistributedDataParallel, "fused")


@case
def peft_fsdp_by_layer(folder):
    return peft_case(lambda model: sharded(model, Plain), "fused")


@case
def peft_fsdp_by_leaf(folder):
    """Every nn.Linear is a unit of its own, adapters too: PEFT has to call them for their weights to be there."""
    return peft_case(lambda model: sharded(model, nn.Linear), "stock")


@case
def peft_fsdp_by_base(folder):
    """Only the base layers are units of their own: they are called, and the adapters are added."""

    def bases(model):
        for module in list(model.modules()):
            if type(module) is nn.Linear and module.in_features + module.out_features == 28:
                fully_shard(module)
        return fully_shard(model)

    return peft_case(bases, "low-rank")


@case
def accelerate(folder):
    """Accelerator.prepare, over its launcher: two epochs of a patched PEFT model, and of LoRALinear layers."""
    x = draw(2 * ROWS, 12)
    differences = {}
    for name, make in (("LoRALinear", make_model), ("PEFT", make_peft_model)):
        single = make()
        optimizer = torch.optim.SGD(single.parameters(), lr=0.01)
        for batch in (*x.split(ROWS), *x.split(ROWS)):
            optimizer.zero_grad()
            loss(single(batch)).backward()
            optimizer.step()
        model = make()
        if name == "PEFT":
            patch_peft(model)
        accelerator = Accelerator(cpu=True)
        assert (accelerator.num_processes, accelerator.state.backend) == (2, "gloo")
        trained = [p for p in model.parameters() if p.requires_grad]
        model, optimizer, batches = accelerator.prepare(
            model, torch.optim.SGD(trained, lr=0.01), DataLoader(TensorDataset(x), ROWS // 2)
        )
        for _ in range(2):
            for (batch,) in batches:
                optimizer.zero_grad()
                accelerator.backward(loss(model(batch)))
                optimizer.step()
        assert all(alike(p.detach()) for p in model.parameters())
        differences[name] = difference(parameters(model), parameters(single))
    assert dist.get_world_size() == 2
    return differences
