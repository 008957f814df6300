"""Quantised weights of every format, and calls over them beside the same calls over the dense W."""

import torch

from lora_kernels import Projection, lora_linear, lora_mlp, lora_projections
from lora_kernels.quantized import Nested, QuantizedWeight

FORMATS = ("nf4", "nf4 nested", "fp4", "fp8 block", "fp8 row", "fp8 tensor", "int8")
# bitsandbytes' table of FP4
FP4 = (0, 0.005208333, 0.6666667, 1, 0.3333333, 0.5, 0.1666667, 0.25)


def weight(form, shape, device="cpu", dtype=torch.float32, seed=0):
    """A quantised weight of random storage with values of about 1 / sqrt(in)."""
    generator = torch.Generator().manual_seed(seed)
    (rows, inner), size = shape, 1 / shape[1] ** 0.5

    def whole(high, *of, kind=torch.uint8):
        return torch.randint(0, high, of, generator=generator, dtype=torch.int64).to(kind).to(device)

    def scales(*of):
        return (torch.rand(of, generator=generator).add(0.5) * size).to(device)

    if form.startswith(("nf4", "fp4")):
        packed, blocks = whole(256, -(-rows * inner // 2), 1), -(-rows * inner // 64)
        nested, absmax = None, scales(blocks)
        if "nested" in form:
            absmax = whole(256, blocks)
            code = torch.linspace(-1, 1, 256, device=device)
            nested = Nested(code, scales(-(-blocks // 256)), torch.tensor(size, device=device))
        code = torch.tensor([*FP4, *(-value for value in FP4)], device=device) if form == "fp4" else None
        if code is None:
            return QuantizedWeight.nf4(packed, absmax, shape=shape, nested=nested, dtype=dtype)
        return QuantizedWeight("fp4", packed, torch.Size(shape), dtype, absmax, 64, code)
    if form == "int8":
        return QuantizedWeight.from_int8(whole(255, *shape).int().sub(127).to(torch.int8), scales(rows), dtype=dtype)
    packed = torch.randn(shape, generator=generator).to(device).to(torch.float8_e4m3fn)
    scale = {"block": scales(-(-rows // 128), -(-inner // 128)), "row": scales(rows), "tensor": scales(1)}
    return QuantizedWeight.from_fp8(packed, scale[form.split()[1]], dtype=dtype)


class Call:
    """A call over quantised weights, and the same one over their dense values; `run` gives outputs and gradients."""

    def __init__(self, kind, form, dtype, device="cpu", backend="auto", adapters=None, p=0.0, **how):
        self.kind, self.dtype, self.backend, self.p, self.how = kind, dtype, backend, p, how
        torch.manual_seed(1)
        inner, hidden, outer = 48, 40, 56
        self.x = torch.randn(3, 7, inner, device=device).to(dtype).requires_grad_()
        self.weights = [
            weight(form, shape, device, seed=i) for i, shape in enumerate(((hidden, inner),) * 2 + ((outer, hidden),))
        ]
        self.pairs = [
            tuple(torch.randn(of, device=device).mul(0.2).to(adapters or dtype).requires_grad_() for of in shapes)
            for shapes in (((5, inner), (hidden, 5)),) * 2 + (((5, hidden), (outer, 5)),)
        ]

    def dense(self):
        return [w.dequantize(self.dtype, "torch") for w in self.weights]

    def call(self, weights):
        (gate, up, _), (one, two, _) = weights, self.pairs
        how = dict(backend=self.backend, **self.how)
        if self.kind == "linear":
            return (lora_linear(self.x, gate, *one, scaling=0.5, dropout_p=self.p, **how),)
        if self.kind == "projections":
            ps = [self.p, 0.0, self.p]
            return lora_projections(self.x, [gate, up, gate], [one, None, two], scaling=0.5, dropout_p=ps, **how)
        layers = [Projection(w, *pair, None, 0.5, self.p) for w, pair in zip(weights, self.pairs, strict=True)]
        return (lora_mlp(self.x, *layers, **how),)

    def run(self, weights):
        torch.manual_seed(2)
        ys = self.call(weights)
        leaves = [self.x, *(t for pair in self.pairs for t in pair)]
        return [*ys, *torch.autograd.grad([y.float().square().mean() for y in ys], leaves, allow_unused=True)]
