"""Measured choices: the fastest form of each large product on a GPU, from tables on disk.

`lora-kernels tune` measures and stores, `forms` looks up, and `model` decides where no measurement exists. Each GPU has
a table in the user's directory (`cache.directory`) and maybe one in the package (`tables/`); the user's table wins.

    {"format": 1, "gpu": "NVIDIA H200",
     "tables": {"torch 2.13.0, triton 3.9.0, tiles 2": {
         "bfloat16 forward 8192x4096x14336 r16": ["fused", 2],
         "bfloat16 dx 8192x14336x4096 r16 masked": ["beta1", null]}}}

A key is a `Product`, rows x inner x cols, with the rows rounded to a power of two and the rank rounded up to one. A
value names a strategy and, for "fused", the place of a shipped tile. So the worst that a table can do is to choose
badly. Choices made with other versions stay in the file and are not used. A file with an error is ignored, with one
warning per process.
"""

import contextlib
import functools
import hashlib
import json
import logging
import math
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from importlib import metadata, resources
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lora_kernels.plan import cache, model
from lora_kernels.plan.model import Product

__all__ = [
    "TILES", "Busy", "Table", "bucket", "clear", "forget", "in_use", "key", "lookup", "save", "stored_tables", "tuning",
    "versions", "where",
]  # fmt: skip

# Raise this number when a tile in kernels/_configs.py changes its place, because stored places refer to the old order.
TILES = 2
_FORMAT = 1
_MOST_PLACES = 64
_MOST_CHOICES = 8192
_DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4, "tf32": 4}
_SIZE = r"([1-9][0-9]{0,12})"
_KEY = re.compile(rf"({'|'.join(_DTYPES)}) (forward|dx) {_SIZE}x{_SIZE}x{_SIZE} r{_SIZE}( masked)?")
_VERSIONS = re.compile(r"[ -~]{1,200}")
_FILE = re.compile(r"tuned-[0-9a-z-]+\.json")

_log = logging.getLogger("lora_kernels")
_lock = threading.Lock()
_loaded: dict[str, "Choices"] = {}
_warned: dict[str, object] = {}

Busy = cache.Busy
Choice = tuple[str, int | None]
Choices = dict[str, Choice]


class Table(NamedTuple):
    """The contents of a file: the GPU's name, and for each combination of versions the choices by key."""

    gpu: str
    choices: dict[str, Choices]


def lookup(device: torch.device, dtype: torch.dtype, product: Product, tf32: bool) -> Choice | None:
    """Return the strategy measured for a product on a device, and for "fused" a tile's place; None if not measured.

    Args:
        device: A CUDA device.
        dtype: The dtype of the operands.
        product: The product.
        tf32: Whether fp32 products may use TF32.
    """
    found = in_use(torch.cuda.get_device_name(device)).get(key(dtype, product, tf32))
    return found if found is None or found[0] in model.allowed_strategies(product) else None


def key(dtype: torch.dtype, product: Product, tf32: bool) -> str:
    """Return the key of a product in a table. Products with similar rows and ranks share a key."""
    name = "tf32" if tf32 else str(dtype).removeprefix("torch.")
    # The kernels round the rank in the same way.
    rank = max(16, 1 << max(product.rank - 1, 0).bit_length())
    which, masked = "dx" if product.backward else "forward", " masked" if product.masked else ""
    return f"{name} {which} {bucket(product.rows)}x{product.inner}x{product.cols} r{rank}{masked}"


def bucket(rows: int) -> int:
    """Return the power of two nearest to a number of rows by ratio."""
    return 1 << round(math.log2(max(rows, 1)))


@functools.cache
def versions() -> str:
    """Return the versions that a choice depends on in addition to the GPU."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "unknown"
    return f"torch {torch.__version__}, triton {triton}, tiles {TILES}"


def in_use(gpu: str) -> Choices:
    """Return the choices for a GPU, by name and for the current versions; the user's override the shipped ones."""
    choices = _loaded.get(gpu)
    if choices is None:
        with _lock:
            choices = _loaded.get(gpu)
            if choices is None:
                choices = _loaded[gpu] = _shipped_choices(gpu) | _current(_own(gpu), "your table")
    return choices


def save(gpu: str, choices: Mapping[str, Choice]) -> bool:
    """Add choices by `key` to the user's table of a GPU, for the current versions; return whether that was possible.

    Raises:
        ValueError: A choice is invalid and could not be read back.
    """
    text = json.dumps({k: list(choice) for k, choice in choices.items()})
    _check_choices(json.loads(text))
    try:
        folder, name = cache.directory(), _file_of(gpu)
        with cache.hold_lock(folder, "save.lock", wait=True):
            tables = _own(gpu).choices
            merged = tables.pop(versions(), {})
            for k, choice in choices.items():
                # The newest choices are at the end.
                merged.pop(k, None)
                merged[k] = choice
            cache.replace(folder, name, _render(Table(gpu, tables | {versions(): merged})))
    except (OSError, RuntimeError, ValueError) as error:
        where = f"{_place()}: {_words(error)}"
        _warn(
            f"lora_kernels: cannot store tuned choices in {where}. Set LORA_KERNELS_CACHE to a directory of your own."
        )
        return False
    forget()
    return True


def stored_tables() -> Iterator[tuple[Path, Table]]:
    """Yield the user's tables, for every GPU and all versions, each with its file."""
    try:
        folder = cache.directory()
        files = [name for name in cache.names(folder) if _FILE.fullmatch(name)]
    except (OSError, RuntimeError, ValueError) as error:
        _warn(f"lora_kernels: ignoring {_place()}: {_words(error)}.")
        return
    for name in files:
        table = _load(folder, name)
        if table is not None:
            yield folder / name, table


def where(gpu: str) -> Path:
    """Return the path of the user's table of a GPU, which may not exist; RuntimeError without a home directory."""
    return cache.directory() / _file_of(gpu)


def clear() -> list[Path]:
    """Remove the user's tables, readable or not; return their paths.

    Raises:
        OSError: A table cannot be removed.
        RuntimeError: There is no home directory.
        ValueError: The directory is not the user's.
    """
    folder = cache.directory()
    gone = [name for name in cache.names(folder) if _FILE.fullmatch(name)]
    for name in gone:
        cache.remove(folder, name)
    forget()
    return [folder / name for name in gone]


def forget() -> None:
    """Forget the tables, so that the next lookup reads them again. `plan.form` has a cache of its own."""
    with _lock:
        _loaded.clear()


def tuning() -> contextlib.AbstractContextManager[None]:
    """Return a context in which no other thread or process of this machine tunes. Raises as `cache.hold_lock` does."""
    return cache.hold_lock(cache.directory(), "tune.lock", wait=False)


def _shipped_choices(gpu: str) -> Choices:
    file = resources.files("lora_kernels").joinpath("tables").joinpath(_file_of(gpu).removeprefix("tuned-"))
    if not file.is_file():
        return {}
    try:
        return _current(_parse(file.read_bytes(), gpu), "the shipped table")
    except (OSError, ValueError) as error:
        _warn(f"lora_kernels: ignoring {file}: {_words(error)}. Please report it.")
        return {}


def _own(gpu: str) -> Table:
    """Load the user's table; return an empty one if no usable table exists."""
    try:
        folder = cache.directory()
    except RuntimeError:
        # There is no home directory.
        return Table(gpu, {})
    return _load(folder, _file_of(gpu), gpu) or Table(gpu, {})


def _load(folder: Path, name: str, gpu: str | None = None) -> Table | None:
    try:
        return _parse(cache.read(folder, name), gpu)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        _warn(
            f"lora_kernels: ignoring the tuned choices in {folder / name}: {_words(error)}. "
            "`lora-kernels tune --clear` removes them; the built-in rules choose until you tune again."
        )
        return None


def _current(table: Table, whose: str) -> Choices:
    choices = table.choices.get(versions())
    if choices is None and table.choices:
        _log.info(
            "lora_kernels: %s for %s was tuned with %s and is not used with %s; `lora-kernels tune` makes a new one.",
            whose, table.gpu, "; ".join(table.choices), versions(),
        )  # fmt: skip
    return choices or {}


def _parse(contents: bytes, gpu: str | None) -> Table:
    """Parse the contents of a file, and check everything in it.

    Raises:
        ValueError: The contents are invalid; the message says why.
    """
    try:
        whole = json.loads(contents.decode(), object_pairs_hook=_once_each, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON (line {error.lineno})") from None
    if not isinstance(whole, dict) or whole.keys() != {"format", "gpu", "tables"}:
        raise ValueError('it must have "format", "gpu" and "tables", and nothing else')
    if type(whole["format"]) is not int or whole["format"] != _FORMAT:
        raise ValueError(f"its format is {whole['format']!r:.40}, and this version reads {_FORMAT}")
    if not isinstance(whole["gpu"], str) or not whole["gpu"].isprintable():
        raise ValueError('"gpu" must be the name of one')
    if gpu not in (None, whole["gpu"]):
        raise ValueError(f"it is for {whole['gpu']!r:.80}, not for {gpu!r:.80}")
    if not isinstance(whole["tables"], dict):
        raise ValueError('"tables" must map versions to choices')
    for made_with, choices in whole["tables"].items():
        if not _VERSIONS.fullmatch(made_with):
            raise ValueError(f"{made_with!r:.80} is not a list of versions")
        _check_choices(choices)
    return Table(whole["gpu"], {v: {k: tuple(choice) for k, choice in of.items()} for v, of in whole["tables"].items()})


def _check_choices(choices: Any) -> None:
    if not isinstance(choices, dict):
        raise ValueError("choices must map products to pairs")
    for k, choice in choices.items():
        product = _product(k)
        if not isinstance(choice, list) or len(choice) != 2 or choice[0] not in model.NAMES:
            raise ValueError(f"{k}: {choice!r:.80} is not a strategy ({', '.join(model.NAMES)}) and a place")
        name, place = choice
        if name not in model.allowed_strategies(product):
            raise ValueError(f"{k}: {name} cannot compute it")
        if place is not None and (name != "fused" or type(place) is not int or not 0 <= place < _MOST_PLACES):
            raise ValueError(f"{k}: {place!r:.40} is not the place of a tile, nor null")


def _product(k: str) -> Product:
    match = _KEY.fullmatch(k)
    if not match:
        raise ValueError(f"{k!r:.80} is not a product")
    dtype, which, *sizes, masked = match.groups()
    rows, inner, cols, rank = map(int, sizes)
    return Product(rows, inner, cols, rank, _DTYPES[dtype], bool(masked), which == "dx")


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands there twice")
    return found


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is not a value")


def _render(table: Table) -> bytes:
    """Render a file with one choice per line; if there are too many, leave out the oldest tables and choices first."""
    tables, room = {}, _MOST_CHOICES
    for made_with, choices in reversed(table.choices.items()):
        kept = list(choices.items())[-room:] if room else []
        room -= len(kept)
        if kept:
            tables[made_with] = dict(kept)
    blocks = []
    for made_with, choices in reversed(tables.items()):
        lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(choice)}" for k, choice in choices.items())
        blocks.append(f" {json.dumps(made_with)}: {{\n{lines}}}")
    body = ",\n".join(blocks)
    return f'{{"format": {_FORMAT}, "gpu": {json.dumps(table.gpu)}, "tables": {{\n{body}}}}}\n'.encode()


def _file_of(gpu: str) -> str:
    """Return a file name unique to a GPU, of harmless characters for any name that a driver gives."""
    slug = re.sub(r"[^0-9a-z]+", "-", gpu.lower()).strip("-")[:60]
    return f"tuned-{slug}-{hashlib.sha256(gpu.encode()).hexdigest()[:8]}.json"


def _place() -> str:
    try:
        return str(cache.directory())
    except RuntimeError:
        return "a home directory"


def _words(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def _warn(message: str) -> None:
    """Issue each warning once per process; Python's own filter may forget, and belongs to the user."""
    mine = object()
    # `setdefault` is atomic, so that only one thread warns.
    if _warned.setdefault(message, mine) is mine:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
