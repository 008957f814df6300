"""Shapes of the layers that tests run on a GPU; `bench.warm_up` compiles their kernels beforehand."""

__all__ = ["SHAPES"]

# rows, in, out, r: tiles that fill the GPU, few tiles, odd sizes that pointers must take, decode
SHAPES = (
    (4096, 4096, 4096, 16),
    (2048, 4096, 1024, 64),
    (1000, 1032, 520, 24),
    (777, 1001, 333, 17),
    (300, 2048, 5120, 256),
    (3, 4096, 4096, 8),
)
