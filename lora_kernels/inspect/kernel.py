"""The cases that launch kernels, and the properties of a compiled kernel."""

from dataclasses import dataclass
from typing import Any

from lora_kernels.inspect.binary import BinaryFacts

__all__ = ["Case", "Kernel"]


@dataclass(frozen=True)
class Case:
    """A layer, or several layers of one x, to launch forward and backward.

    Attributes:
        m: Rows.
        k: in_features.
        n: out_features.
        r: Rank.
        dtype: "bf16", "fp16" or "fp32".
        p: Dropout probability.
        bias: Whether the layer has a bias.
        strided: Whether no two elements of an operand are adjacent and no operand is aligned to 16 bytes.
        tf32: Whether fp32 products may use TF32.
        accumulate: Whether gradients are added to existing ones.
        strategy: Form of the large products.
        place: Place of the large products' tile among the shipped ones; the rule's tile for None or a place past the
            last.
        others: out_features of further projections of the same x, of the same rank.
        activation: Activation of a gated MLP with n out_features in gate and up and k in down; "" for no MLP.
        fp32_adapters: Whether A and B are in fp32, whatever the dtype of x.
        mixed: Whether only the first of several projections has dropout.
        storage: A stored weight `[n, k]` to dequantise in place of a layer: "nf4", "nf4 nested", "fp8 block", "fp8 row"
            or "int8"; "" for a layer.
        groups: Number of groups of rows, each with a layer of its own, as experts have; 0 for one layer.
        transposed: Whether W of groups is stored as `[G, k, n]`.
    """

    m: int
    k: int
    n: int
    r: int
    dtype: str = "bf16"
    p: float = 0.0
    bias: bool = False
    strided: bool = False
    tf32: bool = False
    accumulate: bool = False
    strategy: str = "fused"
    place: int | None = None
    others: tuple[int, ...] = ()
    activation: str = ""
    fp32_adapters: bool = False
    mixed: bool = False
    storage: str = ""
    groups: int = 0
    transposed: bool = False

    @property
    def unaligned(self) -> bool:
        """Return whether rows of an operand start off a multiple of 16 elements."""
        return any(size % 16 for size in (self.k, self.n, *self.others))

    @property
    def by_element(self) -> bool:
        """Return whether Triton loads an operand element by element."""
        return self.strided or self.unaligned

    def __str__(self) -> str:
        if self.storage:
            return f"{self.n}x{self.k} {self.dtype} from {self.storage}"
        words = _flag_words(self, "bias", "strided", "tf32", "accumulate", "fp32_adapters", "mixed", "transposed")
        words += [f"{self.groups} groups"] if self.groups else []
        tile = [] if self.place is None else [f"tile {self.place}"]
        widths = "+".join(map(str, (self.n, *self.others)))
        mlp = [f"mlp {self.activation}"] if self.activation else []
        return " ".join([f"{self.m}x{self.k}x{widths} r={self.r} {self.dtype} p={self.p:g}", *mlp, *words, *tile])


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel: the case that launches it, its properties, and the budgets it breaks.

    Attributes:
        arch: "sm_90" or "gfx942".
        name: "shrink", "matmul_expand", "wgrad", "dequantize" or "segments".
        case: The first case that launches it.
        backward: Whether the first launch is in the backward pass.
        constants: Compile-time constants by name.
        num_warps: Warps a program.
        num_stages: Stages of the software pipelines.
        programs: Programs of the launch.
        hash: Triton's name for the binary.
        facts: Properties read from the binary.
        broken: The budgets that the kernel breaks, in words.
    """

    arch: str
    name: str
    case: Case
    backward: bool
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    programs: int
    hash: str
    facts: BinaryFacts
    broken: tuple[str, ...] = ()

    @property
    def sides(self) -> tuple[int, ...]:
        """Return the sides of the tile."""
        return tuple(self.constants[side] for side in _SIDES.get(self.name, ()))

    @property
    def tile(self) -> str:
        """Return the tile in words, for example 128x256x64."""
        return "x".join(map(str, self.sides))

    @property
    def flags(self) -> str:
        """Return the words that distinguish the kernel from others of the same tile."""
        words = [word for flag, word in _FLAGS.items() if _is_set(self.constants.get(flag))]
        words += [activation] if (activation := self.constants.get("ACTIVATION")) else []
        counts = ((self.constants.get(flag, 0), word, usual) for flag, (word, usual) in _COUNTS.items())
        words += [f"{n} {word}" for n, word, usual in counts if n > usual]
        tf32 = self.constants.get("PRECISION") == "tf32"
        words += ["tf32"] if tf32 else []
        words += [self.case.storage] if self.case.storage else []
        return " ".join([*words, *_flag_words(self.case, "strided", "unaligned", "fp32_adapters", "mixed")])

    def __str__(self) -> str:
        made = f"{self.num_warps} warps {self.num_stages} stages"
        return f"{self.arch} {self.name} {self.case.dtype} {self.tile} {made} {self.flags}".rstrip()


def _flag_words(case: Case, *flags: str) -> list[str]:
    """Return those of the flags that are set in a case, in words."""
    return [flag.replace("_", " ") for flag in flags if getattr(case, flag)]


def _is_set(flag: Any) -> bool:
    """Return whether a flag is set; of a flag with a value per row, whether any value is set."""
    return any(flag) if isinstance(flag, tuple) else bool(flag)


_SIDES = {
    "shrink": ("BLOCK_M", "BLOCK_K", "BLOCK_R"),
    "matmul_expand": ("BLOCK_M", "BLOCK_N", "BLOCK_K"),
    "wgrad": ("BLOCK_M", "BLOCK_W", "BLOCK_T"),
    "dequantize": ("BLOCK",),
    "segments": ("BLOCK_G",),
}
_FLAGS = {"USE_TMA": "tma", "HAS_BIAS": "bias", "HAS_KEEP": "masked", "NUM_MASKED": "masked", "HAS_DROPOUT": "dropout",
          "HAS_SHRINK": "shrinks", "ACCUMULATE": "adds", "GROUPED": "groups"}  # fmt: skip
# Counts to name where they exceed those of one layer: adapters of a thin product, products and results of a large one.
_COUNTS = {"ROWS": ("rows", 1), "NUM_SOURCES": ("in", 2), "NUM_MASKED": ("masks", 1), "NUM_OUTPUTS": ("out", 1)}
