"""The host's time of a call: two trees in the same rounds, the parts of a call, and what the page says of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench import host, report
from bench.host_tables import ALLOCATION, AROUND, ENCODING, PASSES, PLANS
from bench.processes import ROOT


def row(forward, both):
    taken = {"forward": forward * 1e-6, "both": both * 1e-6}
    return {which: dict.fromkeys(("median", "q1", "q3"), seconds) for which, seconds in taken.items()}


def page_of(folder, **content):
    made_on = {"gpu": None, "cpu": {"model": "a CPU", "threads": 1}, "torch": "2", "triton": None, "peft": None}
    (folder / "c").mkdir()
    content |= {"machine": made_on | {"lora_kernels": "0"}, "command": "host", "rounds": 3}
    (folder / "c" / "host.json").write_text(json.dumps(content))
    return report.render(folder)


ROWS = {"nn.Linear": row(10, 70), "lora_kernels": row(100, 400)}


def test_page_of_one_tree(tmp_path):
    page = page_of(tmp_path, rows=ROWS)
    assert "`python -m bench.host`, 3 rounds in turn" in page
    assert "| lora_kernels | 100 (100 to 100) | 10.0 | 400 (400 to 400) | 5.7 |" in page
    assert "What is left" not in page


def test_page_of_two_trees_and_of_the_parts(tmp_path):
    before = {"nn.Linear": row(10, 70), "lora_kernels": row(125, 800)}
    parts = {
        AROUND: row(40, 100),
        PLANS: row(50, 120),
        PASSES: row(80, 320),
        ALLOCATION: row(5, 9),
        ENCODING: row(2, 3),
    }
    against = {"commit": "abcdef0", "rows": before}
    page = page_of(tmp_path, rows=ROWS, parts=parts, commit="fedcba9", against=against)
    assert "`git worktree add ../before abcdef0 && python -m bench.host --against ../before --parts`, 3 rounds" in page
    assert "| forward, µs | abcdef0, µs | ratio | to nn.Linear |" in page
    assert "| lora_kernels | 100 (100 to 100) | 125 (125 to 125) | 0.80 | 10.0 | 400 (400 to 400) |" in page
    assert "**What is left.**" in page
    # the parts, without the two that are within others, sum to the whole
    assert f"| {AROUND} | 40 | 40% | 100 | 25% |" in page
    assert f"| {PLANS} | 10 | 10% | 20 | 5% |" in page
    assert f"| {PASSES} | 30 | 30% | 200 | 50% |" in page
    assert f"| {ALLOCATION} | 5 | 5% | 9 | 2% |" in page
    assert "| Triton's launcher | 20 | 20% | 80 | 20% |" in page
    assert "| the whole call | 100 | 100% | 400 | 100% |" in page


class Tree:
    def __init__(self, name, asked, parts=()):
        self.name, self.asked, self.rows, self.parts = name, asked, ["a", "b"], list(parts)

    def seconds(self, name, which):
        self.asked.append((self.name, name, which))
        return float(len(self.asked))


def test_trees_take_turns_row_by_row():
    asked = []
    taken = host.measure([Tree("this", asked, parts=["part"]), Tree("that", asked)], rounds=2)
    assert [set(of) for of in taken] == [{"a", "b", "part"}, {"a", "b"}]
    assert all(of[name][which]["n"] == 2 for of in taken for name in of for which in ("forward", "both"))
    # a row of both, then the next; the other tree begins the next round
    assert [(tree, name) for tree, name, which in asked if which == "both"] == [
        ("this", "a"), ("that", "a"), ("this", "b"), ("that", "b"), ("this", "part"),
        ("that", "b"), ("this", "b"), ("this", "part"), ("that", "a"), ("this", "a"),
    ]  # fmt: skip


def test_a_folder_without_the_package_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        host.main(["--against", str(tmp_path)])
    assert "there is no lora_kernels" in capsys.readouterr().err


@pytest.mark.slow
def test_a_tree_is_timed_beside_another(tmp_path):
    """Beside itself: the same launches, the parts in order, and the commit by name."""
    file = tmp_path / "cpu" / "host.json"
    command = ["-m", "bench.host", "--against", str(ROOT), "--parts", "--rounds", "1", "--json", str(file)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "--against ../before --parts --rounds 1" in done.stdout
    content = json.loads(file.read_text())
    assert content["against"]["commit"] == content["commit"] == host.commit_of(ROOT)
    assert content["rows"].keys() == content["against"]["rows"].keys()
    assert {"nn.Linear", "bound", "lora_kernels", "lora_kernels, Q/K/V"} <= content["rows"].keys()
    for which in ("forward", "both"):
        taken = {name: part[which]["median"] for name, part in content["parts"].items()}
        assert 0 < taken[AROUND] < taken[PASSES]
        assert min(taken.values()) > 0
    assert "What is left" in report.render(tmp_path)
