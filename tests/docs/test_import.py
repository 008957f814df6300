"""What an import must not do, and what the package's source must not contain."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lora_kernels.peft

PACKAGE = Path(lora_kernels.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
QUIET_IMPORT = """
import os, sys, torch, torch.nn, torch.amp
events = []
def audit(event, args):
    if event.startswith("socket.") or event == "subprocess.Popen":
        events.append(event)
    elif event == "open" and len(args) > 2 and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR):
        if "__pycache__" not in str(args[0]):
            events.append((event, str(args[0])))
sys.addaudithook(audit)
import lora_kernels, lora_kernels.peft, lora_kernels.quantized
if {probe}:
    open({path!r}, "w").close()
assert not events, events
loaded = [name for name in ("triton", "rich", "matplotlib", "peft", "safetensors", "bitsandbytes") if name in sys.modules]
assert not loaded, loaded
assert not torch.cuda.is_initialized()
"""


@pytest.mark.parametrize(
    "probe", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["quiet", "the probe is seen"]
)
def test_import_is_quiet(probe, tmp_path):
    script = QUIET_IMPORT.format(probe=probe, path=str(tmp_path / "probe"))
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (run.returncode != 0) == probe, run.stderr[-2000:]


def test_names_that_are_loaded_late_are_those_of_the_peft_package():
    assert {"patch_peft", "explain"} <= set(lora_kernels._FROM_PEFT) <= set(lora_kernels.peft.__all__)
    assert all(getattr(lora_kernels, name) is getattr(lora_kernels.peft, name) for name in lora_kernels._FROM_PEFT)


def modules_named(node):
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]


def names_called(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_source(path):
    text = path.read_text()
    tree = ast.parse(text)
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in modules_named(node)
    }
    assert not imported & {"pickle", "marshal", "shelve", "yaml"}
    assert not {"eval", "exec", "torch.load", "pickle.loads"} & set(names_called(tree))
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)], "raise an error with words"
    assert len(text.splitlines()) <= 400
    assert ast.get_docstring(tree)
    if path.parent.name == "kernels":
        for banned in ("make_block_ptr", "allow_tf32", "autotune(", "empty_like"):
            assert banned not in text, banned
        # a count of arrivals is the only atomic there may be: sums in the order of chance differ from run to run
        assert re.findall(r"atomic_\w+\(\w+", text) == (["atomic_add(arrivals_ptr"] if path.stem == "_device" else [])
    else:
        assert "triton" not in imported, "Triton is imported under kernels/ alone"
    top_level = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    roots = {name.split(".")[0] for node in top_level for name in modules_named(node)}
    assert not roots & {"matplotlib", "peft", "transformers"}
