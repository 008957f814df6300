"""Which kernels a call launches, with which tile and flags, seen at the launchers' last step."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from lora_kernels.kernels._configs import matmul_configs
from lora_kernels.kernels._launch import Launch

__all__ = ["Seen", "missing_tiles", "recorded"]

_SHIPPED = "BLOCK_M", "BLOCK_N", "BLOCK_K", "SUBTILES"
# what a kernel is compiled for beside its tile; of a tuple, one for each row, whether any is set
_FLAGS = (
    "ACTIVATION", "HAS_BIAS", "HAS_DROPOUT", "HAS_KEEP", "HAS_SHRINK", "IS_SPLIT", "ACCUMULATE", "READY", "PRECISION",
    "NUM_OUTPUTS", "NUM_SOURCES", "NUM_MASKED", "ROWS", "USE_TMA", "STORE_TMA", "Q_ROWS_ARE_N", "FORMAT", "NESTED",
    "E8M0", "GROUPED",
)  # fmt: skip
# by these a kernel's rule picks another tile, so each tile is executed with each
_OF_TILES = {
    "matmul_expand": ("PRECISION", "USE_TMA", "GROUPED"), "shrink": ("HAS_DROPOUT", "ROWS", "GROUPED"),
    "wgrad": ("HAS_KEEP", "HAS_SHRINK", "PRECISION", "ROWS", "GROUPED"), "dequantize": ("FORMAT",), "segments": (),
}  # fmt: skip


class Seen(NamedTuple):
    """A kernel as it was launched.

    Attributes:
        kernel: "matmul_expand", "shrink", "wgrad", "dequantize" or "segments".
        itemsize: Bytes an element of its operands.
        sides: Its tile's sides and slices, by name.
        warps: Warps a program.
        stages: Stages of its software pipelines.
        flags: Its other compile-time constants, by name.
    """

    kernel: str
    itemsize: int
    sides: tuple[tuple[str, int], ...]
    warps: int
    stages: int
    flags: tuple[tuple[str, Any], ...]

    def tile(self) -> tuple[str, str]:
        """Kernel and bits of an element; the tile in words, such as 128x256x64/8w4s."""
        sides = "x".join(str(value) for name, value in self.sides if name.startswith("BLOCK"))
        return f"{self.kernel} {8 * self.itemsize} bit", f"{sides}/{self.warps}w{self.stages}s"

    def features(self) -> set[tuple]:
        """What executing it covers: its tile, and each of its flags."""
        flags = dict(self.flags)
        of_tile = tuple((name, flags[name]) for name in _OF_TILES[self.kernel])
        masked = bool(flags.get("NUM_MASKED")), bool(flags.get("ACTIVATION"))
        tile = (self.kernel, self.itemsize, self.sides, self.warps, self.stages, of_tile, masked)
        return {tile, *((self.kernel, self.itemsize, name, value) for name, value in self.flags)}


@contextlib.contextmanager
def recorded(dry: bool = False) -> Iterator[list[Seen]]:
    """Note every launch; with `dry` there are none: nothing is compiled, and results mean nothing."""
    seen: list[Seen] = []
    stock = Launch.__call__

    def call(launch: Launch, *arguments: Any) -> None:
        seen.append(_seen(launch, arguments))
        if not dry:
            stock(launch, *arguments)

    Launch.__call__ = call
    try:
        yield seen
    finally:
        Launch.__call__ = stock


def _seen(launch: Launch, arguments: tuple) -> Seen:
    flags, options = launch.flags, launch.options
    sides = tuple((name, value) for name, value in flags.items() if name.startswith("BLOCK") or name == "SUBTILES")
    return Seen(
        launch.kernel.__name__.strip("_").removesuffix("_kernel"), _itemsize(arguments), sides,
        options["num_warps"], options["num_stages"], tuple((name, _any(flags[name])) for name in _FLAGS if name in flags),
    )  # fmt: skip


def _any(flag: Any) -> Any:
    return any(flag) if isinstance(flag, tuple) else flag


def _itemsize(arguments: tuple) -> int:
    """Bytes an element of the first operand that is a tensor of floats, or describes one; of the last of none."""
    for argument in arguments:
        operands = argument if isinstance(argument, tuple) else (argument,)
        for operand in operands:
            dtype = getattr(getattr(operand, "base", operand), "dtype", None)
            if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
                return dtype.itemsize
    return arguments[-1].dtype.itemsize


def missing_tiles(seen: set[Seen], tma: bool) -> list[str]:
    """The shipped tiles of `matmul_expand` that no launch took, on an architecture with or without TMA.

    Tiles of fewer rows or columns, which the pointer path cuts to size, are not counted as the shipped ones.
    """
    taken = set()
    for one in seen:
        flags, sides = dict(one.flags), dict(one.sides)
        if one.kernel == "matmul_expand":
            tile = tuple(sides[name] for name in _SHIPPED), one.warps, one.stages
            taken.add((one.itemsize, flags["USE_TMA"], flags["NUM_MASKED"] > 0, flags["PRECISION"], *tile))
    missing = []
    for dtype, by_tma, masked, precision in _paths(tma):
        for config in matmul_configs(dtype, by_tma, masked, precision == "tf32"):
            sides = config.block_m, config.block_n, config.block_k, config.subtiles
            if (dtype.itemsize, by_tma, masked, precision, sides, config.num_warps, config.num_stages) not in taken:
                path = ("tma" if by_tma else "pointers") + " masked" * masked
                missing.append(f"{dtype} {precision} {path} {config}")
    return missing


def _paths(tma: bool) -> Iterator[tuple[torch.dtype, bool, bool, str]]:
    for masked in (False, True):
        for by_tma in (False, True)[: 1 + tma]:
            yield torch.bfloat16, by_tma, masked, "ieee"
        for precision in ("ieee", "tf32"):
            yield torch.float32, False, masked, precision
