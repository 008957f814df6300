"""Where there is no GPU the kernels run in Triton's interpreter, watched; memory they allocate starts as NaN."""

import os
import sys
from pathlib import Path

import pytest
import torch

from lora_kernels import plan, torch_backend

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
# oneDNN's bf16 product for AMX (PyTorch 2.13) reads what lies between the rows of a slice with an odd number of columns;
# here that is NaN, and what the kernels leave between the rows of s is such
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
sys.path.insert(0, str(Path(__file__).parent))

with torch.device("meta"):  # learns once which functions allocate: before `poison` puts others in their place
    torch.empty(0)

if not HAS_GPU:
    torch.set_num_threads(1)  # two workers on two cores
    from oracles import bf16, faster, sanitizer

    faster.install()
    bf16.install()
    sanitizer.install()


def pytest_addoption(parser):
    parser.addoption("--all-mutants", action="store_true", help="break the kernels in every way in the table")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--all-mutants"):
        spared = [item for item in items if "mutant" in item.keywords]
        config.hook.pytest_deselected(items=spared)
        items[:] = [item for item in items if item not in spared]
    for item in items:
        # a limit against hangs alone: a busy machine takes ten times as long
        if "slow" in item.keywords and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(2400))
        if "gpu" in item.keywords and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU; this machine has none"))


@pytest.fixture
def device() -> str:
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture
def path_dtype(tma, device) -> torch.dtype:
    """Of operands on one of the two paths: by descriptors, which a GPU has for 16 bits alone, bf16, else fp32.

    Sums of small integers are exact in both, up to 256 in bf16.
    """
    if tma and device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("descriptors need sm_90")
    return torch.bfloat16 if tma else torch.float32


@pytest.fixture(autouse=True)
def size_of_small(request, monkeypatch):
    """Test problems are small, real ones are not: only what is marked `small` takes the way of small calls."""
    if not request.node.get_closest_marker("small"):
        monkeypatch.setattr(torch_backend, "_SMALL", -1)


@pytest.fixture(autouse=True)
def plans():
    """No test takes the plans or settled launches of another, which may belong to what that test put in their place."""
    if "lora_kernels.kernels" in sys.modules:
        plan.forget()
        for contraction in ("shrink", "matmul_expand", "wgrad", "dequantize"):
            sys.modules[f"lora_kernels.kernels.{contraction}"]._settle.cache_clear()


@pytest.fixture
def fresh_plan():
    """No choice of a backend is taken from another test, nor left to one."""
    caches = (plan.backend._choose, plan.backend._environment_backend, plan.backend.triton_problem)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def computed(monkeypatch):
    """Names of the functions that computed patched PEFT layers, in order."""
    from lora_kernels.peft import layer

    return _spied(monkeypatch, layer, "lora_linear", "lora_add")


@pytest.fixture
def joined(monkeypatch):
    """Names of the functions that computed patched blocks, in order."""
    from lora_kernels.peft import blocks

    return _spied(monkeypatch, blocks, "lora_projections", "lora_mlp")


def _spied(monkeypatch, module, *names):
    made = []
    for name in names:
        function = getattr(module, name)

        def spy(*args, _name=name, _function=function, **kwargs):
            made.append(_name)
            return _function(*args, **kwargs)

        monkeypatch.setattr(module, name, spy)
    return made


@pytest.fixture
def log():
    """The launches of a test in the interpreter, each with the bytes that it moved."""
    from oracles import sanitizer

    sanitizer.state.log = launches = []
    yield launches
    sanitizer.state.log = None


@pytest.fixture
def no_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # `import peft` raises ImportError


@pytest.fixture(autouse=True)
def poisoned_memory(request):
    """What is allocated and never written must show; but tests that need a GPU ask for `poison` themselves.

    A fill behind every allocation would keep launches apart that are meant to overlap.
    """
    if not request.node.get_closest_marker("gpu"):
        request.getfixturevalue("poison")


@pytest.fixture
def poison(monkeypatch):
    """Memory that launchers allocate holds NaN in floats, a pattern in bytes."""
    for owner, name in ((torch, "empty"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        stock = getattr(owner, name)

        def poisoned(*args, _stock=stock, **kwargs):
            t = _stock(*args, **kwargs)
            if t.device.type == "meta" or not t.numel() or not _called_by_a_launcher():
                return t
            return t.fill_(float("nan") if t.is_floating_point() else 0x5A)

        monkeypatch.setattr(owner, name, poisoned)


def _called_by_a_launcher() -> bool:
    return sys._getframe(2).f_globals.get("__name__", "").startswith("lora_kernels.")
