"""Every launch of the layer, as far as a machine without a GPU can take it; run as a script, not interpreted.

The launchers run on CPU tensors for an imagined sm_90 GPU, and Triton lays out the arguments as its own CUDA launcher
does. What the launcher is then handed is held against what the compiled kernel takes, argument by argument. Only the
launch itself is left out.
"""

import re

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.nvidia import driver as nvidia

from lora_kernels import plan
from lora_kernels.autograd import LoRALinearFunction
from lora_kernels.cli._compiled import Case, describe
from lora_kernels.kernels._imagined import GPUS, Descriptor, imagine
from lora_kernels.projections import LoRAProjectionsFunction

launched = []


class Launcher:
    """Checks the arguments of a launch against the kernel's signature, through Triton's own argument layout."""

    def __init__(self, source, metadata):
        self.name, signature = source.fn.__name__, dict(enumerate(source.signature.values()))
        descriptors = getattr(metadata, "tensordesc_meta", None)
        if hasattr(nvidia, "make_launcher"):  # Triton 3.6 to 3.8 write the launcher as C, which says what it parses
            position = source.fn.arg_names.index
            constants = {(position(k),) if isinstance(k, str) else k: v for k, v in source.constants.items()}
            code = nvidia.make_launcher(constants, signature, descriptors)
            form = re.search(r'PyArg_ParseTuple\(args, "([^"]*)"', code)[1]
            self.expected = _tree(iter(form[nvidia._BASE_ARGS_FORMAT_LEN :]))
            self.base = nvidia._BASE_ARGS_FORMAT_LEN
        else:
            self.expected = nvidia.expand_signature(signature.values(), descriptors, "nvTmaDesc")
            self.base = None
        self.wrapped = nvidia.wrap_handle_tensordesc(self._check, signature, descriptors)

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter, leave, *args):
        assert min(x, y, z) > 0, (self.name, x, y, z)
        if self.base:
            self.wrapped(*(None,) * self.base, *args)
        else:
            self.wrapped(None, args)
        launched.append(self.name)

    def _check(self, *args):
        _match(args[self.base :] if self.base else args[-1], self.expected, self.name)


def _tree(characters):
    """The nesting of a format of PyArg_ParseTuple."""
    nodes = []
    for c in characters:
        if c == ")":
            break
        nodes.append(tuple(_tree(characters)) if c == "(" else c)
    return nodes


def _match(args, expected, name):
    assert len(args) == len(expected), f"{name}: {len(args)} arguments for {len(expected)}: {args} for {expected}"
    for arg, kind in zip(args, expected, strict=True):
        if isinstance(kind, tuple):
            assert isinstance(arg, tuple), (name, arg, kind)
            _match(arg, kind, name)
        elif kind == "nvTmaDesc":
            assert isinstance(arg, Descriptor), (name, arg, kind)
        elif kind.startswith("*"):
            assert arg is None or hasattr(arg, "data_ptr"), (name, arg, kind)
        elif kind in ("i1", "i32", "i64", *"bhilLBHIK"):
            assert isinstance(arg, int), (name, arg, kind)
        elif kind in ("fp32", "f32", *"fd"):
            assert isinstance(arg, float), (name, arg, kind)
        else:
            assert kind in ("constexpr", "O"), f"{name}: {kind} of {arg}"
            assert not type(arg).__name__.startswith("TensorDescriptor"), f"{name}: a descriptor was not laid out"


def layer(m, k, n, r, dtype, p=0.0, bias=False, strided=False, adapters=None):
    def make(*shape, dtype=dtype):
        t = torch.zeros(*shape, dtype=dtype)
        return (torch.zeros(*shape[:-1], shape[-1] + 3, dtype=dtype)[..., 1:-2] if strided else t).requires_grad_()

    adapters = adapters or dtype
    tensors = make(m, k), make(n, k).detach(), make(r, k, dtype=adapters), make(n, r, dtype=adapters)
    y = LoRALinearFunction.apply(*tensors, make(n).detach() if bias else None, 2.0, p, "triton")
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


def main():
    plan.interpreting = lambda: True  # lets CPU tensors through to the launchers
    with imagine(GPUS["sm_90"], Launcher) as compiled:
        layers()
        before = len(compiled)
        blocks()
        kernels = [describe(launch, Case(8192, 4096, 4096, 16), "sm_90") for launch in compiled[before:]]
        replays()
    assert {kernel.constants.get("ROWS") for kernel in kernels} == {1, 3, None}
    for kernel in kernels:  # held to the rules of `lora-kernels inspect`
        assert not kernel.broken, (str(kernel), kernel.broken)
    nothing_between()
    print("dry launch:", len(launched), "launches of", *sorted(set(launched)))


def nothing_between():
    """Where x must be copied to be flattened, the copy does not come between dx and the dA that overlaps it."""
    before = len(launched)

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op is torch.ops.aten.clone.default:
                launched.append("copy")
            return op(*args, **kwargs or {})

    x = torch.zeros(64, 8, 256, dtype=torch.bfloat16).transpose(0, 1).requires_grad_()
    w, a, b = (torch.zeros(*s, dtype=torch.bfloat16) for s in ((384, 256), (16, 256), (384, 16)))
    with imagine(GPUS["sm_90"], Launcher), Copies():
        y = LoRALinearFunction.apply(x, w, a.requires_grad_(), b.requires_grad_(), None, 2.0, 0.0, "triton")
        y.backward(torch.zeros_like(y))
    order = launched[before:]
    del launched[before:]
    assert order.count("copy") >= 2, order
    assert order[-2:] == ["_matmul_expand_kernel", "_wgrad_kernel"], order


def replays():
    """A second call with other tensors of the same kind goes to the binaries, past Triton's look at every argument."""
    before = len(launched)
    with imagine(GPUS["sm_90"], Launcher) as compiled:
        for _ in range(3):
            layer(512, 256, 384, 16, torch.bfloat16, p=0.1)
    assert len(launched) - before == 15, len(launched) - before
    assert len(compiled) == 0, "the launches of `layers` are settled"
    del launched[before:]


def layers():
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for dtype in (bf16, fp16, fp32):
        layer(512, 256, 384, 16, dtype, bias=True)
        layer(512, 256, 384, 16, dtype, p=0.1)
    layer(2048, 4096, 4096, 8, bf16, p=0.1, adapters=fp32)  # wide tiles
    layer(2048, 4096, 4096, 64, bf16)
    layer(33, 40, 48, 3, bf16, p=0.1)
    layer(33, 41, 47, 3, bf16, bias=True)  # no descriptors
    layer(33, 40, 48, 3, fp16, p=0.1, strided=True)
    layer(1, 1, 1, 1, bf16, p=0.5)
    block(33, 40, (48, 41), (3, 0), fp16, p=0.1)
    for ps in ((0.1, 0.0), (0.0, 0.1)):  # not the same kernels
        block(33, 40, (48, 48), (8, 8), fp16, ps)
    block(33, 40, (48, 48), (8, 8), bf16, 0.1, adapters=(fp32, bf16))  # no pointer to choose is of two types
    with plan.forced("beta1"):  # the thin products alone
        layer(512, 256, 384, 16, bf16, bias=True)
        layer(512, 256, 384, 16, bf16, p=0.1)


def blocks():
    """Queries, keys and values of Llama-8B, with biases as Qwen's have them, and with dropout."""
    sizes = 8192, 4096, (4096, 1024, 1024), (16, 16, 16), torch.bfloat16
    block(*sizes, bias=True)
    block(*sizes, p=0.1, adapters=torch.float32)


if __name__ == "__main__":
    main()
