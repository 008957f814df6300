"""What the tests of tuned tables share: a directory of their own, a GPU that is only a name, a table on disk."""

import json
import warnings

import pytest
import torch

from lora_kernels import plan
from lora_kernels.plan import tuned
from lora_kernels.plan.model import Product

GPU = "NVIDIA H200"
CUDA = torch.device("cuda", 0)
FORWARD = Product(8192, 4096, 14336, 16, 2)
DX = Product(8192, 14336, 4096, 16, 2, masked=True, backward=True)
KEY, DX_KEY = "bfloat16 forward 8192x4096x14336 r16", "bfloat16 dx 8192x14336x4096 r16 masked"


@pytest.fixture(name="folder", autouse=True)
def folder_of_its_own(monkeypatch, tmp_path):
    """A directory of the test's own, and a GPU that is only a name."""
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path / "kept"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: GPU)
    monkeypatch.setattr(tuned, "_warned", {})
    tuned.forget()
    plan.forget()
    yield tmp_path / "kept"
    tuned.forget()
    plan.forget()


def ask(product=FORWARD, dtype=torch.bfloat16, tf32=False):
    return tuned.lookup(CUDA, dtype, product, tf32)


def put(folder, contents, mode=0o600):
    """Write a table's file as anybody might."""
    folder.mkdir(mode=0o700, exist_ok=True)
    path = tuned.where(GPU)
    path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    path.chmod(mode)
    tuned.forget()
    return path


def table(choices=None, **more):
    whole = {"format": 1, "gpu": GPU, "tables": {tuned.versions(): {KEY: ["fused", 2]} if choices is None else choices}}
    return json.dumps(whole | more)


def warned_once(about):
    """Ask three times; one warning, that names the file and says `about`."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert [ask(), ask(), ask(DX)] == [None] * 3
        tuned.forget()
        assert ask() is None
    assert len(seen) == 1, [str(w.message) for w in seen]
    assert seen[0].category is RuntimeWarning
    said = str(seen[0].message)
    assert about in said, said
    assert str(tuned.where(GPU)) in said
    assert "lora-kernels tune" in said
