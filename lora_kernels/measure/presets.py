"""Presets of `bench` by name: projections of well-known models, their layers, published sweeps, models."""

from dataclasses import dataclass, replace

__all__ = [
    "MLP", "MODELS", "PRESETS", "PROJECTIONS", "QKV", "Dims", "ExpertShape", "HostedDims", "Preset", "Shape",
    "block_shape", "parse_shape", "resize", "with_rows", "with_tokens",
]  # fmt: skip

# The linear layers of each block, and of a decoder layer.
QKV, MLP = ("q", "k", "v"), ("gate", "up", "down")
PROJECTIONS = (*QKV, "o", *MLP)


@dataclass(frozen=True)
class Shape:
    """The shape of x `[m, k]` times a weight `[n, k]`, or times several weights.

    Attributes:
        m: Rows: batch times sequence.
        k: in_features.
        n: out_features; of a gated MLP, of gate and of up.
        label: Names of the layers that have the shape.
        others: out_features of further projections of the same x.
    """

    m: int
    k: int
    n: int
    label: str = ""
    others: tuple[int, ...] = ()

    @property
    def widths(self) -> tuple[int, ...]:
        """Return the out_features of every projection."""
        return (self.n, *self.others)

    def __str__(self) -> str:
        return f"{self.m}x{self.k}x{'+'.join(map(str, self.widths))}"


@dataclass(frozen=True)
class ExpertShape(Shape):
    """The shape of a stack of experts: x `[m, k]`, sorted by expert, times a weight `[n, k]` of each expert.

    Attributes:
        m: Rows of all experts together: tokens times `top_k`.
        experts: Number of experts.
        top_k: How many experts each token goes to.
    """

    experts: int = 1
    top_k: int = 1

    def __str__(self) -> str:
        return f"{super().__str__()} of {self.experts} experts"


@dataclass(frozen=True)
class Dims:
    """The dimensions of a Llama-shaped model, and of a batch of tokens.

    Attributes:
        hidden: Width of the stream.
        heads: Query heads.
        kv_heads: Key and value heads, a divisor of `heads`.
        intermediate: Width of the MLP.
        vocab: Entries of the embedding and of the head.
        layers: Decoder layers of the small full model.
        batch: Sequences at once.
        seq: Tokens per sequence.
    """

    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int = 32000
    layers: int = 4
    batch: int = 4
    seq: int = 2048

    @property
    def head_dim(self) -> int:
        """Return the width of a head."""
        return self.hidden // self.heads

    @property
    def tokens(self) -> int:
        """Return the rows of every projection."""
        return self.batch * self.seq

    def __str__(self) -> str:
        layers = f"{self.layers} layer{'s' * (self.layers != 1)}"
        return f"{self.batch}x{self.seq} tokens x {self.hidden}/{self.intermediate}, {layers}"


@dataclass(frozen=True)
class HostedDims(Dims):
    """The dimensions of a model of transformers with PEFT's adapters, stock and patched.

    Attributes:
        name: The key in `MODELS`.
        tied: Whether embedding and head share their weight.
    """

    name: str = ""
    tied: bool = False


@dataclass(frozen=True)
class Preset:
    """Shapes with their usual ranks and drop probabilities, and the model of the shapes, if they come from one.

    The shapes of experts are apart, because only `bench --block experts` times them.
    """

    shapes: tuple[Shape, ...]
    r: tuple[int, ...] = (16,)
    p: tuple[float, ...] = (0.0,)
    note: str = ""
    model: Dims | None = None
    experts: tuple[ExpertShape, ...] = ()


def _decoder(dims: Dims, note: str) -> Preset:
    """Return the preset of the four kinds of projection in a decoder layer."""
    hidden, key_value, intermediate, m = dims.hidden, dims.kv_heads * dims.head_dim, dims.intermediate, dims.tokens
    return Preset(
        (
            Shape(m, hidden, hidden, "q, o"),
            Shape(m, hidden, key_value, "k, v"),
            Shape(m, hidden, intermediate, "gate, up"),
            Shape(m, intermediate, hidden, "down"),
        ),
        note=note, model=dims,
    )  # fmt: skip


def _experts(tokens: int, top_k: int, experts: int, hidden: int, inner: int) -> tuple[ExpertShape, ...]:
    """Return the two stacks of a layer of experts: gate and up side by side, and down."""
    m = tokens * top_k
    return (
        ExpertShape(m, hidden, 2 * inner, "gate and up", experts=experts, top_k=top_k),
        ExpertShape(m, inner, hidden, "down", experts=experts, top_k=top_k),
    )


_QWEN_32B = _decoder(Dims(5120, 40, 8, 27648), "Qwen2.5-32B")
_LLAMA_70B = _decoder(Dims(8192, 64, 8, 28672), "Llama-3.1-70B")

PRESETS: dict[str, Preset] = {
    "llama-8b": _decoder(Dims(4096, 32, 8, 14336), "Llama-3.1-8B"),
    "llama-1b": _decoder(Dims(2048, 32, 8, 8192), "Llama-3.2-1B"),
    "llama-70b": _LLAMA_70B,
    "qwen-7b": _decoder(Dims(3584, 28, 4, 18944), "Qwen2.5-7B"),
    "qwen-32b": _QWEN_32B,
    "large": Preset(_QWEN_32B.shapes + _LLAMA_70B.shapes, note="both of them"),
    "lorafusion": Preset(
        tuple(Shape(m, d, d) for d in (4096, 5120, 8192) for m in range(2048, 8193, 256)), p=(0.1,),
        note="the sweep of LoRAFusion's own kernel benchmark",
    ),
    "cpu": Preset(
        (Shape(512, 1024, 1024),), note="fits two CPU cores",
        model=Dims(512, 8, 2, 1408, vocab=1024, layers=2, batch=2, seq=128),
        experts=_experts(512, 2, 16, 512, 384),
    ),
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
    "tiny": replace(
        _decoder(Dims(256, 4, 2, 688, vocab=1024, layers=2, batch=2, seq=128), "a second or two on a CPU"),
        experts=_experts(256, 2, 8, 256, 192),
    ),
    "quick": Preset(
        (Shape(64, 256, 192),), note="only to see that everything works",
        model=Dims(64, 4, 2, 96, vocab=128, layers=2, batch=2, seq=32), experts=_experts(32, 2, 4, 64, 48),
    ),
    "mixtral-8x7b": Preset((), note="its experts alone", experts=_experts(8192, 2, 8, 4096, 14336)),
    "qwen3-30b-a3b": Preset((), note="its experts alone", experts=_experts(8192, 8, 128, 2048, 768)),
    "gpt-oss-20b": Preset((), note="its experts alone", experts=_experts(8192, 4, 32, 2880, 2880)),
}  # fmt: skip

MODELS: dict[str, HostedDims] = {
    dims.name: dims
    for dims in (
        HostedDims(256, 4, 2, 688, vocab=1024, layers=2, batch=2, seq=128, name="tiny"),
        HostedDims(1024, 16, 8, 2816, vocab=4096, layers=2, batch=2, seq=128, name="small"),
        HostedDims(2048, 32, 8, 8192, vocab=128256, layers=16, batch=1, seq=2048, name="llama-1b", tied=True),
        HostedDims(4096, 32, 8, 14336, vocab=128256, layers=32, batch=1, seq=1024, name="llama-8b"),
    )
}


def block_shape(dims: Dims, block: str) -> Shape:
    """Return the shape of the "qkv" or the "mlp" of a model's decoder layer."""
    if block == "mlp":
        return Shape(dims.tokens, dims.hidden, dims.intermediate, "gate, up, down")
    key_value = dims.kv_heads * dims.head_dim
    return Shape(dims.tokens, dims.hidden, dims.heads * dims.head_dim, "q, k, v", (key_value, key_value))


def parse_shape(text: str, several: bool = False) -> Shape:
    """Read "8192x4096x4096": rows x in_features x out_features; of `several` projections "8192x4096x4096+1024+1024".

    Raises:
        ValueError: The text is not positive whole numbers in that form.
    """
    *sides, last = text.lower().split("x")
    widths = last.split("+") if several else [last]
    if len(sides) != 2 or not all(part.isdecimal() and int(part) > 0 for part in (*sides, *widths)):
        more = " (queries, keys and values: 8192x4096x4096+1024+1024)" if several else ""
        raise ValueError(
            f"a shape is ROWSxINxOUT, three positive whole numbers like 8192x4096x4096{more}, not {text!r}"
        )
    n, *others = map(int, widths)
    rows, inner = map(int, sides)
    return Shape(rows, inner, n, others=tuple(others))


def with_rows(shapes: tuple[Shape, ...], rows: list[int]) -> tuple[Shape, ...]:
    """Return the same layers at other numbers of rows."""
    layers = dict.fromkeys(replace(shape, m=0) for shape in shapes)
    return tuple(replace(layer, m=m) for layer in layers for m in rows)


def with_tokens(dims: Dims, tokens: int) -> Dims:
    """Return the same model at another number of tokens, in sequences of the same length or in one shorter sequence.

    Raises:
        ValueError: The tokens are not a whole number of sequences.
    """
    if tokens <= dims.seq:
        return replace(dims, batch=1, seq=tokens)
    if tokens % dims.seq:
        raise ValueError(f"--m {tokens}: at this level, tokens in whole sequences of {dims.seq}, or fewer than one")
    return replace(dims, batch=tokens // dims.seq)


def resize(dims: Dims, layers: int | None, batch: int | None, seq: int | None) -> Dims:
    """Return the same model with another number of decoder layers, of sequences, or of tokens per sequence."""
    given = {"layers": layers, "batch": batch, "seq": seq}
    return replace(dims, **{name: value for name, value in given.items() if value is not None})
