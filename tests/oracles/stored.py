"""Weights in storage of 4 and 8 bits, of random bytes: every byte that a format has is there, NaN and subnormals too."""

import torch

from lora_kernels.quantized import Nested, QuantizedWeight

__all__ = ["FORMATS", "draw", "same"]

FORMATS = ("nf4", "fp4", "fp8", "int8")


def draw(format, shape, block, nested=False, storage=torch.uint8, scales=torch.float32, seed=0) -> QuantizedWeight:
    """Draw a weight.

    Args:
        format: "nf4", "fp4", "fp8" or "int8".
        shape: (out, in).
        block: 4 bits: weights for a scale; otherwise (rows, columns).
        nested: Whether the scales are bytes.
        storage: Dtype of 4-bit storage; as many bytes as the weight takes.
        scales: Dtype of the scales of fp8.
        seed: Of the generator.
    """
    generator = torch.Generator().manual_seed(seed)

    def random_bytes(*size: int) -> torch.Tensor:
        return torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)

    def floats(*size: int) -> torch.Tensor:
        return torch.rand(size, generator=generator) * 3 + 0.01

    out, inner = shape
    if format in ("fp8", "int8"):
        grid = -(-out // block[0]), -(-inner // block[1])
        # E8M0 reaches 2^127, and W must be a number in fp16
        scale = random_bytes(*grid).clamp(100, 133) if scales.itemsize == 1 else floats(*grid)
        scale = scale.view(scales) if scales.itemsize == 1 else scale.to(scales)
        stored = random_bytes(out, inner).view(torch.float8_e4m3fn if format == "fp8" else torch.int8)
        return QuantizedWeight(format, stored, torch.Size(shape), torch.bfloat16, scale, tuple(block))
    blocks = -(-out * inner // block)
    packed = random_bytes(-(-out * inner // 2)).view(storage).view(-1, 1)
    code = torch.randn(16, generator=generator) / 3
    parts = Nested(floats(256) - 1.5, floats(-(-blocks // 256)), floats(1).view(())) if nested else None
    absmax = random_bytes(blocks) if nested else floats(blocks)
    return QuantizedWeight(format, packed, torch.Size(shape), torch.float32, absmax, block, code, parts)


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Return whether two tensors are equal, NaN to NaN."""
    return left.dtype == right.dtype and torch.equal(left.isnan(), right.isnan()) and torch.equal(
        left.nan_to_num(), right.nan_to_num()
    )  # fmt: skip
