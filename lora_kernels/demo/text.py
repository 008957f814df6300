"""The demo's text: English prose and Python source that come with every Python installation."""

import importlib.util
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Corpus", "code", "prose"]

_TRAIN = (
    "argparse", "ast", "asyncio.base_events", "asyncio.tasks", "bdb", "calendar", "codecs", "collections",
    "configparser", "csv", "dataclasses", "difflib", "doctest", "email.message", "enum", "fractions", "ftplib",
    "functools", "http.client", "http.server", "imaplib", "inspect", "ipaddress", "locale", "logging", "mailbox",
    "optparse", "os", "pathlib", "pdb", "pickle", "pickletools", "platform", "plistlib", "pydoc", "random", "shutil",
    "smtplib", "socket", "ssl", "subprocess", "tarfile", "tempfile", "threading", "tokenize", "traceback", "types",
    "typing", "unittest.case", "unittest.mock", "urllib.parse", "urllib.request", "uuid", "warnings", "weakref",
)  # fmt: skip
_HELD_OUT = ("zipfile", "statistics", "cmd", "heapq", "shelve", "textwrap", "xmlrpc.client", "gettext", "selectors")


class Corpus(NamedTuple):
    """Bytes for training and held-out bytes for measuring, as uint8 tensors."""

    name: str
    train: Tensor
    held_out: Tensor

    def batch(self, size: int, length: int, generator: torch.Generator) -> Tensor:
        """Draw `size` windows of `length` bytes from the training part, int64 `[size, length]`."""
        starts = torch.randint(len(self.train) - length, (size, 1), generator=generator)
        return self.train[starts + torch.arange(length)].long()

    def measure(self, size: int, length: int) -> Tensor:
        """Return `size` windows of `length` bytes, spread evenly over the held-out part; the same at every call."""
        starts = torch.linspace(0, len(self.held_out) - length, size).long()[:, None]
        return self.held_out[starts + torch.arange(length)].long()


def prose() -> Corpus:
    """Load the language reference as Python's `help()` shows it; the last tenth is held out."""
    from pydoc_data.topics import topics

    # keep each paragraph once: topics quote one another, so held-out text would otherwise be trained on as well
    paragraphs = list(dict.fromkeys(text for name in sorted(topics) for text in topics[name].split("\n\n")))
    cut = len(paragraphs) * 9 // 10
    return Corpus("prose", *(_bytes("\n\n".join(part)) for part in (paragraphs[:cut], paragraphs[cut:])))


def code() -> Corpus:
    """Load source of the standard library; whole modules are held out."""
    return Corpus("code", *(_bytes("\n".join(_sources(names))) for names in (_TRAIN, _HELD_OUT)))


def _sources(modules: tuple[str, ...]) -> list[str]:
    """Read the source files of the modules that this Python has, without importing the modules themselves."""
    texts = []
    for name in modules:
        try:
            spec = importlib.util.find_spec(name)
        # a parent package is missing in this Python
        except ImportError:
            continue
        if spec is not None and spec.origin and spec.origin.endswith(".py") and Path(spec.origin).is_file():
            texts.append(Path(spec.origin).read_text(encoding="utf-8"))
    if not texts:
        raise RuntimeError("The demo needs the standard library's source files (.py), and this Python has none.")
    return texts


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
