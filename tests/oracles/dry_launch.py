"""Every launch of the layer, as far as a machine without a GPU can take it; run as a script, not interpreted.

`python dry_launch.py PART` runs one of `PARTS`. The launchers run on CPU tensors for an imagined sm_90 GPU, and Triton's own launcher lays out the arguments, encodes
the descriptors and asks a driver to launch, which only looks at what it is asked for: `stub_driver.c`.
"""

import math
import sys

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

from bench.stub_driver import StubDriver, launching
from lora_kernels import plan
from lora_kernels.autograd.linear import LoRALinearFunction
from lora_kernels.autograd.projections import LoRAProjectionsFunction
from lora_kernels.inspect.compiled import describe
from lora_kernels.inspect.kernel import Case
from lora_kernels.kernels import matmul_expand, wgrad
from lora_kernels.kernels._launch import Launch

driver = StubDriver()


def layer(m, k, n, r, dtype, p=0.0, bias=False, strided=False, adapters=None):
    def make(*shape, dtype=dtype):
        t = torch.zeros(*shape, dtype=dtype)
        return (torch.zeros(*shape[:-1], shape[-1] + 3, dtype=dtype)[..., 1:-2] if strided else t).requires_grad_()

    adapters = adapters or dtype
    tensors = make(m, k), make(n, k).detach(), make(r, k, dtype=adapters), make(n, r, dtype=adapters)
    y = LoRALinearFunction.apply(*tensors, make(n).detach() if bias else None, (2.0, p, "triton", False, None))
    y.backward(torch.zeros_like(y))


def block(m, k, widths, ranks, dtype, p=0.0, bias=False, adapters=None):
    """Several projections of one x; rank 0 is no adapter. `adapters`: one dtype, or one for each."""
    owns = adapters if isinstance(adapters, tuple) else (adapters or dtype,) * len(widths)

    def make(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype).requires_grad_()

    tensors = [
        (make(n, k).detach(), make(r, k, dtype=own) if r else None, make(n, r, dtype=own) if r else None,
         make(n).detach() if bias and i else None)
        for i, (n, r, own) in enumerate(zip(widths, ranks, owns, strict=True))
    ]  # fmt: skip
    numbers = tuple((2.0, each, False) for each in (p if isinstance(p, tuple) else (p,) * len(widths)))
    ys = LoRAProjectionsFunction.apply(make(m, k), "triton", numbers, *(t for four in tensors for t in four))
    torch.autograd.backward(ys, [torch.empty_like(y) for y in ys])


def main(part):
    plan.backend.is_interpreting = lambda: True  # lets CPU tensors through to the launchers
    PARTS[part]()
    names = sorted({each.kernel for each in driver.launched})
    print("dry launch:", len(driver.launched), "launches of", *names, "with", driver.encoded, "descriptors")


def overlap():
    """The driver is told which launches may come up before the one in front of them has ended."""
    before = driver.count
    with launching():
        layer(2048, 1024, 1024, 16, torch.bfloat16, p=0.1)
    asked = [(each.kernel.strip("_").removesuffix("_kernel"), each.dependent) for each in driver.launched[before:]]
    backward = [("wgrad", False), ("matmul_expand", True), ("wgrad", True)]  # ds and dB, dx, dA
    assert asked == [("shrink", False), ("matmul_expand", True), *backward], asked


def nothing_between():
    """Where x must be copied to be flattened, the copy does not come between dx and the dA that overlaps it."""
    before = driver.count
    copies = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op is torch.ops.aten.clone.default:
                copies.append(driver.count - before)
            return op(*args, **kwargs or {})

    x = torch.zeros(64, 8, 256, dtype=torch.bfloat16).transpose(0, 1).requires_grad_()
    w, a, b = (torch.zeros(*s, dtype=torch.bfloat16) for s in ((384, 256), (16, 256), (384, 16)))
    with launching(), Copies():
        settings = 2.0, 0.0, "triton", False, None
        y = LoRALinearFunction.apply(x, w, a.requires_grad_(), b.requires_grad_(), None, settings)
        y.backward(torch.zeros_like(y))
    names = [each.kernel for each in driver.launched[before:]]
    assert names[3:] == ["_matmul_expand_kernel", "_wgrad_kernel"], names
    assert len(copies) >= 2, copies
    assert 4 not in copies, copies


def replays():
    """A second call with other tensors of the same kind goes to the binaries, past Triton's look at every argument."""
    with launching():
        layer(512, 256, 384, 16, torch.bfloat16, p=0.1)
    before = driver.count
    with launching() as compiled:
        for _ in range(3):
            layer(512, 256, 384, 16, torch.bfloat16, p=0.1)
    assert driver.count - before == 15, driver.count - before
    assert len(compiled) == 0, "the launches of the first are settled"


def profiled():
    """Who listens to Triton's launches, as its profiler does, hears of every one, settled or not."""
    heard = []
    hook, listen = triton.knobs.runtime.launch_enter_hook, lambda metadata: heard.append(metadata.get()["name"])
    with launching():
        for _ in range(2):
            hook.add(listen)
            layer(512, 256, 384, 16, torch.bfloat16)
            hook.remove(listen)
            layer(512, 256, 384, 16, torch.bfloat16)
    assert len(heard) == 10, heard
    assert set(heard) == {"_shrink_kernel", "_matmul_expand_kernel", "_wgrad_kernel"}, heard


def binaries():
    """A settled launch goes to the binary that Triton would take: what binaries are made for is all settled."""
    stock, looked = Launch.__call__, []

    def now(self, *arguments):
        settled = self._settled
        stock(self, *arguments)
        if settled:
            binary = self.kernel[self.grid](*arguments, *self.integers, **self.flags, **self.options)
            assert binary.run is settled[1], f"{self.kernel.__name__}: {binary.name}"
            looked.append(binary)

    def some(offset, *shape, dtype=torch.bfloat16):
        return torch.zeros(offset + math.prod(shape), dtype=dtype)[offset:].view(shape).requires_grad_()

    Launch.__call__ = now
    shapes = (64, 128), (96, 128), (16, 128), (96, 16), (96,)
    with launching():
        for apart in range(-1, 5):  # which one is not on 16 bytes
            for _ in range(3):
                tensors = [some(int(i == apart), *shape) for i, shape in enumerate(shapes)]
                y = LoRALinearFunction.apply(*tensors, (2.0, 0.1, "triton", False, None))
                y.backward(some(0, *y.shape).detach())
        x, w, keep = some(0, 64, 64).detach(), some(0, 96, 64).detach(), torch.zeros(64 * 3 + 1, dtype=torch.int32)
        for mask in (keep[1:].view(64, 3), keep[:-1].view(64, 3)) * 2:
            matmul_expand([(x, w), (x, w)], some(0, 96, dtype=torch.float32).detach(), mask)
            wgrad(x, w[:64], torch.float32, mask[:, :2].clone())
            wgrad(x, w[:64], torch.float32, keep[1:129].view(64, 2))
    Launch.__call__ = stock
    assert len(looked) > 60, len(looked)


def dtypes():
    with launching():
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            layer(512, 256, 384, 16, dtype, bias=True)
            layer(512, 256, 384, 16, dtype, p=0.1)


def tiles():
    """Wide tiles, and a rank too large to read dy once."""
    with launching():
        layer(2048, 4096, 4096, 8, torch.bfloat16, p=0.1, adapters=torch.float32)
        layer(2048, 4096, 4096, 64, torch.bfloat16)


def edges():
    bf16, fp16 = torch.bfloat16, torch.float16
    with launching():
        layer(33, 40, 48, 3, bf16, p=0.1)
        layer(33, 41, 47, 3, bf16, bias=True)  # no descriptors
        layer(33, 40, 48, 3, fp16, p=0.1, strided=True)
        layer(1, 1, 1, 1, bf16, p=0.5)


def projections():
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    with launching():
        block(33, 40, (48, 41), (3, 0), fp16, p=0.1)
        for ps in ((0.1, 0.0), (0.0, 0.1)):  # not the same kernels
            block(33, 40, (48, 48), (8, 8), fp16, ps)
        block(33, 40, (48, 48), (8, 8), bf16, 0.1, adapters=(fp32, bf16))  # no pointer to choose is of two types


def forms():
    """The thin products alone."""
    with launching(), plan.force_form("beta1"):
        layer(512, 256, 384, 16, torch.bfloat16, bias=True)
        layer(512, 256, 384, 16, torch.bfloat16, p=0.1)


def blocks():
    """Queries, keys and values of Llama-8B, with biases as Qwen's have them, and with dropout."""
    sizes = 8192, 4096, (4096, 1024, 1024), (16, 16, 16), torch.bfloat16
    with launching() as compiled:
        block(*sizes, bias=True)
        block(*sizes, p=0.1, adapters=torch.float32)
    kernels = [describe(launch, Case(8192, 4096, 4096, 16), "sm_90") for launch in compiled]
    assert {kernel.constants.get("ROWS") for kernel in kernels} == {1, 3, None}
    for kernel in kernels:  # held to the rules of `lora-kernels inspect`
        assert not kernel.broken, (str(kernel), kernel.broken)


PARTS = {
    one.__name__: one
    for one in (
        dtypes, tiles, edges, projections, forms, blocks, overlap, replays, profiled, nothing_between, binaries,
    )
}  # fmt: skip

if __name__ == "__main__":
    main(sys.argv[1])
