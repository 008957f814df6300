"""docs/peft.md: its Python runs from top to bottom, and its lists are the code's."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from lora_kernels.peft import accelerate, known, unpatch_peft

PAGE = (Path(__file__).parents[2] / "docs" / "peft.md").read_text(encoding="utf-8")


def make_base_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16), nn.Linear(16, 8), nn.Linear(8, 6))


def test_python_blocks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = dict(base_model=make_base_model(), make_base_model=make_base_model, x=torch.randn(3, 12))
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    assert len(blocks) >= 5
    try:
        for block in blocks:
            exec(block, names)  # the project's own page
    finally:
        accelerate(False)
    promised = re.search(r"# (\d+ LoRA layers: .*)", PAGE)[1]
    assert promised in capsys.readouterr().out
    x = names["x"]
    torch.testing.assert_close(names["theirs"](x), names["net"](x))
    torch.testing.assert_close(names["again"](x), names["net"](x))
    assert unpatch_peft(names["model"]) == 4


def test_every_quantised_class_is_listed():
    for _, name in known._CLASSES[1:]:
        word = re.match(r"[A-Z][a-z]*|[A-Z]+", name.replace("8bitLt", "").replace("4bit", ""))[0].lower()
        listed = {"linear": "bitsandbytes", "gptq": "gptq"}.get(word, re.sub(r"(lora)?linear$", "", name.lower()))
        assert listed in PAGE.lower(), name


def test_every_variant_of_this_peft_is_listed():
    from peft.tuners.lora import variants

    found = {re.match(r"(\w+?)LinearVariant", name)[1] for name in dir(variants) if name.endswith("LinearVariant")}
    assert len(found) >= 4
    said = PAGE.lower().replace("-", "")
    assert not {name for name in found if name.lower() not in said}
