"""README and docs tell the truth: their Python blocks run, their files exist, their commands are the ones there are."""

import re
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_kernels import Projection, cli, lora_linear, lora_mlp, reference

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_THEIR_OWN_TESTS = ("peft.md", "distributed.md")  # whose blocks go on from one to the next
ONE_AFTER_THE_OTHER = ("layer.md",)  # likewise, and nothing more


def python_of(page):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S)
    return ["\n".join(blocks)] if page.name in ONE_AFTER_THE_OTHER else blocks


BLOCKS = {
    f"{page.name} {i}": block
    for page in PAGES
    if page.name not in WITH_THEIR_OWN_TESTS
    for i, block in enumerate(python_of(page), 1)
}


def test_there_is_python_to_run():
    assert len([name for name in BLOCKS if name.startswith("README")]) >= 3
    assert len([name for name in BLOCKS if name.startswith("compile")]) >= 5
    assert len(BLOCKS["layer.md 1"].splitlines()) > 20


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*LeafSpec:FutureWarning")  # PyTorch's own
@pytest.mark.parametrize("name", BLOCKS)
def test_python_blocks_run(name, capsys, tmp_path, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(5, 12, requires_grad=True)
    given = dict(
        F=F, x=x, weight=torch.randn(7, 12), bias=torch.randn(7), dy=torch.randn(5, 7), scaling=2.0, dropout_p=0.0,
        lora_A=torch.randn(3, 12, requires_grad=True), lora_B=torch.randn(7, 3, requires_grad=True),
    )  # fmt: skip
    if "peft" in BLOCKS[name]:
        pytest.importorskip("peft")
    names = dict(given, base_model=nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 7)))
    if name.startswith("README") and "# a fragment" not in BLOCKS[name]:
        names = {}  # it is pasted as it stands
    monkeypatch.chdir(tmp_path)  # for the files that some of them write
    exec(BLOCKS[name], names)  # the project's own pages
    if "low_rank" in names:  # the "Equivalent to" block: it must be what the library computes
        ours = lora_linear(
            x, given["weight"], given["lora_A"], given["lora_B"], scaling=2.0, bias=given["bias"], backend="torch"
        )
        torch.testing.assert_close(names["y"], ours)
        assert x.grad is not None
    if "exact" in names:
        assert float(capsys.readouterr().out) < 1e-3
    if "LoraConfig" in names:
        assert capsys.readouterr().out.startswith("2 LoRA layers: 2 fused")
    if "optimizer" in names:
        trained = [p for group in names["optimizer"].param_groups for p in group["params"]]
        assert any(p.grad is not None and p.grad.any() for p in trained)


def test_the_example_of_an_mlp_without_a_gate_runs():
    (code,) = re.findall(r"^        up, down = .*?(?=\n\n)", lora_mlp.__doc__, flags=re.M | re.S)
    shapes = dict(x=(5, 12), w_up=(9, 12), a_up=(2, 12), b_up=(9, 2), w_down=(12, 9), a_down=(2, 9), b_down=(12, 2))
    names = {name: torch.randn(shape) for name, shape in shapes.items()}
    exec(textwrap.dedent(code), {"Projection": Projection, "lora_mlp": lora_mlp} | names, done := {})
    up, down = (names[f"w_{name}"] + names[f"b_{name}"] @ names[f"a_{name}"] for name in ("up", "down"))
    torch.testing.assert_close(done["y"], F.gelu(names["x"] @ up.T, approximate="tanh") @ down.T, rtol=1e-4, atol=1e-4)


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name} links to {target}"


def test_it_is_read_at_one_sitting():
    lines = README.splitlines()
    assert len(lines) <= 120
    assert any("No GPU has run this code yet" in line or "Measured on" in line for line in lines[:12])


def test_commands_exist():
    named = set(re.findall(r"`?lora-kernels (\w+)", README))
    assert named
    assert named <= set(cli._COMMANDS)


def test_what_is_to_be_installed_is_what_the_project_asks_for():
    """And this package from a checkout, for no index has it."""
    project = (ROOT / "pyproject.toml").read_text()
    words = "".join(path.read_text() for path in (*PAGES, *(ROOT / "lora_kernels").rglob("*.py")))
    named = set(re.findall(r"pip install (?:-e )?'([^']+)'", words))
    assert {"peft>=0.19", ".[peft]"} <= named
    for requirement in named:
        extras = re.fullmatch(r"\.\[(.+)\]", requirement)
        wanted = [f"\n{extra} = [" for extra in extras[1].split(",")] if extras else [f'"{requirement}"']
        assert all(one in project for one in wanted), f"pip install '{requirement}'"


def test_the_versions_that_readme_names_are_those_that_are_asked_for():
    project = (ROOT / "pyproject.toml").read_text()
    for title, name in (("PyTorch", "torch"), ("Triton", "triton")):
        (oldest, beyond), (first, last) = (
            re.search(pattern, text).groups()
            for pattern, text in (
                (rf'"{name}>=([\d.]+),<([\d.]+)', project),
                (rf"{title} ([\d.]+) to ([\d.]+)", README),
            )
        )
        major, minor = map(int, last.split("."))
        assert (first, f"{major}.{minor + 1}") == (oldest, beyond)


def test_the_accuracy_rules_in_the_docs_are_the_rules_in_the_code():
    assert "65536" in (ROOT / "docs" / "math.md").read_text()
    assert reference.keep_mask(3, 2, 9, 0.5).shape == (2, 9)
