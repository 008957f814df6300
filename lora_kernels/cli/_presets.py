"""Named sets of shapes for `bench`: the projections of well-known models, and published sweeps."""

from dataclasses import dataclass, replace

__all__ = ["PRESETS", "Preset", "Shape", "parse_shape", "with_rows"]


@dataclass(frozen=True)
class Shape:
    """x `[m, k]` times a weight `[n, k]`.

    Attributes:
        m: Rows: batch times sequence.
        k: in_features.
        n: out_features.
        label: Which layers have it.
    """

    m: int
    k: int
    n: int
    label: str = ""

    def __str__(self) -> str:
        return f"{self.m}x{self.k}x{self.n}"


@dataclass(frozen=True)
class Preset:
    """Shapes, and the ranks and drop probabilities they are usually run with."""

    shapes: tuple[Shape, ...]
    r: tuple[int, ...] = (16,)
    p: tuple[float, ...] = (0.0,)
    note: str = ""


def _decoder(hidden: int, key_value: int, intermediate: int, note: str) -> Preset:
    """The four kinds of projection that a decoder layer has."""
    return Preset(
        (
            Shape(8192, hidden, hidden, "q, o"),
            Shape(8192, hidden, key_value, "k, v"),
            Shape(8192, hidden, intermediate, "gate, up"),
            Shape(8192, intermediate, hidden, "down"),
        ),
        note=note,
    )


PRESETS: dict[str, Preset] = {
    "llama-8b": _decoder(4096, 1024, 14336, "Llama-3.1-8B"),
    "llama-70b": _decoder(8192, 1024, 28672, "Llama-3.1-70B"),
    "qwen-32b": _decoder(5120, 1024, 27648, "Qwen2.5-32B"),
    "lorafusion": Preset(
        tuple(Shape(m, d, d) for d in (4096, 5120, 8192) for m in range(2048, 8193, 256)), p=(0.1,),
        note="the sweep of LoRAFusion's own kernel benchmark",
    ),
    "cpu": Preset((Shape(512, 1024, 1024),), note="fits two CPU cores"),
    "cpu-sweep": Preset(
        tuple(
            Shape(m, k, n)
            for m, layers in (
                (32, ((256, 256), (2048, 2048))),
                (512, ((256, 256), (512, 2048), (2048, 512), (1024, 1024))),
                (4096, ((256, 1024), (1024, 256), (512, 512), (2048, 2048))),
            )
            for k, n in layers
        ),
        r=(8, 64), p=(0.0, 0.1),
        note="small to middling layers, a few minutes on two CPU cores in fp32",
    ),
    "quick": Preset((Shape(64, 256, 192),), note="only to see that everything works"),
}  # fmt: skip


def parse_shape(text: str) -> Shape:
    """Read "8192x4096x4096": rows x in_features x out_features.

    Raises:
        ValueError: It is not three positive whole numbers.
    """
    numbers = text.lower().split("x")
    if len(numbers) != 3 or not all(part.isdecimal() and int(part) > 0 for part in numbers):
        raise ValueError(f"a shape is ROWSxINxOUT, three positive whole numbers like 8192x4096x4096, not {text!r}")
    return Shape(*map(int, numbers))


def with_rows(shapes: tuple[Shape, ...], rows: list[int]) -> tuple[Shape, ...]:
    """The same layers at other numbers of rows."""
    layers = dict.fromkeys(replace(shape, m=0) for shape in shapes)
    return tuple(replace(layer, m=m) for layer in layers for m in rows)
