"""The benchmark as its user sees it: the command, its tables, its plot, its JSON."""

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import math

import pytest
import torch
from bench_samples import arguments, broken, printed, sample_case, sample_launch, sample_model
from rich.console import Console

from lora_kernels.bench.providers.layer import PROVIDERS
from lora_kernels.bench.show import levels as level_tables
from lora_kernels.bench.show import plot, tables
from lora_kernels.cli import bench
from lora_kernels.measure.presets import PRESETS, Shape


@pytest.mark.usefixtures("no_peft")
def test_the_command_writes_what_it_shows(tmp_path, capsys):
    file = tmp_path / "b.json"
    assert bench.run(arguments("--shape", "32x48x40", "--r", 4, 8, "--p", 0, 0.1, "--json", file)) == 0
    shown, progress = capsys.readouterr()
    written = json.loads(file.read_text())
    assert written["command"] == "bench"
    assert written["complete"] is True
    assert written["machine"]["torch"] == torch.__version__
    assert written["peaks"]["matmul_flops_per_second"] > 0
    assert "measured in this run" in written["peaks"]["matmul"]
    assert [(case["r"], case["p"]) for case in written["cases"]] == [(4, 0), (4, 0.1), (8, 0), (8, 0.1)]
    for case in written["cases"]:
        assert case["flops"]["forward"] == 2 * 32 * 48 * 40 + 2 * 32 * case["r"] * 88
        assert case["providers"]["peft"]["model"]["launches"] == (14 if case["p"] else 12)
        ours = case["providers"]["ours"]
        assert ours["peak_bytes"] >= ours["saved_bytes"] + 32 * 40 * 4  # what backward needs, and y
    assert shown.count("32x48x40") == 4
    assert [line.rsplit(" in ", 1)[0] for line in progress.splitlines()] == [
        f"{i} of 4: layer 32x48x40 r={r} p={p}: done" for i, (r, p) in enumerate(itertools.product((4, 8), (0, 0.1)), 1)
    ]
    assert f"{written['speedups']['peft']['geometric_mean']:.3f}x" in shown
    assert f"torch {torch.__version__}" in shown
    assert "above 100 %" not in shown  # whatever the shares were: a row a case has none
    assert shown.count("\nsaved: held for backward beyond x and the parameters; peak: ") == 1


@pytest.mark.usefixtures("no_peft")
def test_the_bar_says_which_case_of_how_many(monkeypatch):
    told = []
    monkeypatch.setattr(bench, "_progress", lambda total: contextlib.nullcontext(lambda *say: told.append(say[1])))
    assert bench.run(arguments("--shape", "8x8x8", "--m", 8, 16, "--providers", "ours")) == 0
    assert "1 of 2: layer 8x8x8 r=16 p=0: checking ours" in told
    assert "2 of 2: layer 16x8x8 r=16 p=0: timing" in told


@pytest.mark.usefixtures("no_peft")
def test_a_preset_brings_its_ranks_and_probabilities(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(PRESETS, "cpu-sweep", dataclasses.replace(PRESETS["cpu-sweep"], shapes=(Shape(16, 24, 8),)))
    file = tmp_path / "b.json"
    assert bench.run(arguments("--preset", "cpu-sweep", "--pass", "both", "--json", file)) == 0
    written = json.loads(file.read_text())
    assert [(case["r"], case["p"]) for case in written["cases"]] == [(8, 0), (8, 0.1), (64, 0), (64, 0.1)]
    over_peft = written["speedups"]["peft"]
    assert over_peft["worst"] <= over_peft["geometric_mean"] <= over_peft["best"]
    assert f"{over_peft['geometric_mean']:.3f}x (worst {over_peft['worst']:.3f}x" in capsys.readouterr().out


@pytest.mark.usefixtures("no_peft")
def test_a_wrong_result_of_ours_is_the_exit_status(monkeypatch, capsys):
    build, _ = broken(forward=lambda y, problem: y + 1)
    monkeypatch.setitem(PROVIDERS, "ours", build)
    assert bench.run(arguments("--shape", "32x48x40")) == 1
    assert "wrong result, not timed" in capsys.readouterr().out


def test_out_of_time_is_said(tmp_path, capsys):
    file = tmp_path / "b.json"
    assert bench.run(arguments("--preset", "lorafusion", "--minutes", 0, "--json", file)) == 0
    written = json.loads(file.read_text())
    assert written["complete"] is False
    assert (len(written["cases"]), len(written["skipped"])) == (0, 75)
    assert "75 of 75 cases were not run" in capsys.readouterr().out


@pytest.mark.parametrize("finished", [0, 2])
def test_ctrl_c_keeps_what_was_measured(finished, monkeypatch, tmp_path, capsys):
    ran = []

    def interrupted(*given):
        if len(ran) == finished:
            raise KeyboardInterrupt
        ran.append(given)
        return [sample_case()]

    monkeypatch.setattr(bench.levels, "run", interrupted)
    file = tmp_path / "b.json"
    assert bench.run(arguments("--shape", "8x8x8", "--r", 1, 2, 3, "--json", file)) == 130
    shown = capsys.readouterr().out
    assert f"\nInterrupted after {finished} of 3 cases.\n" in shown
    assert shown.count("1 x 2 x 3 (q, o)") == finished
    written = json.loads(file.read_text())
    assert written["complete"] is False
    assert len(written["cases"]) == finished
    assert [(case["r"], case["why"]) for case in written["skipped"]] == [
        (r, "interrupted") for r in range(finished + 1, 4)
    ]


def test_what_cannot_be_asked_for_is_refused(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    in_a_file = tmp_path / "file" / "x"
    monkeypatch.setattr(bench, "_run_all", lambda *_: pytest.fail("it was measured first"))
    for argv, message in (
        (("--cuda-graph",), "needs a GPU"),
        (("--p", 0.1, 1.0), "--p 1: a dropout probability is at least 0 and below 1"),
        (("--p", math.nan), "--p nan"),
        (("--r", 4, 0), "--r 0: at least 1"),
        (("--m", -1), "--m -1: at least 1"),
        (("--rounds", 0), "--rounds 0: at least 1"),
        (("--plot", in_a_file), f"--plot {in_a_file}: "),
    ):
        assert bench.run(arguments(*argv)) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert bench.run(arguments("--quick", "--plot", "a.png")) == 2
    assert "pictures need matplotlib: pip install 'matplotlib>=3.8'" in capsys.readouterr().err


def test_labels_are_those_that_were_built():
    unbuilt = sample_case()
    unbuilt["providers"]["peft"]["label"] = "peft"
    assert tables.labels_of([unbuilt, sample_case()])["peft"] == "PEFT"
    assert list(tables.labels_of([unbuilt])) == ["frozen", "ours", "peft", "addmm"]


@pytest.mark.slow
@pytest.mark.usefixtures("no_peft")
@pytest.mark.parametrize(
    ("level", "said"),
    [("kernel", "operators / ours"), ("decoder", "One decoder layer"), ("model", "training step ms")],
)
def test_every_level_by_the_command(level, said, tmp_path, capsys):
    file = tmp_path / "b.json"
    assert bench.run(arguments("--quick", "--level", level, "--cache", "flush", "--json", file)) == 0
    written = json.loads(file.read_text())
    assert (written["level"], written["preset"], written["complete"]) == (level, "quick", True)
    assert {case["level"] for case in written["cases"]} == {level}
    assert written["method"]["cache"] == "written and read over before each call"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--level", "kernel", "--pass", "forward"), "--level kernel: a launch has neither passes"),
        (("--level", "kernel", "--memory-only"), "--level kernel: a launch has neither passes"),
        (("--level", "kernel", "--providers", "addmm"), "--providers addmm: --level kernel has base, ours, operators"),
        (("--level", "model", "--shape", "8x8x8"), "--level model takes a --preset that is a model: llama-8b,"),
        (("--level", "decoder", "--preset", "lorafusion"), "--level decoder takes a --preset that is a model"),
        (("--level", "decoder", "--backend", "torch"), "--level decoder: a model takes --backend auto"),
        (("--level", "model", "--cache", "rotate"), "caches flushed or warm"),
        (("--level", "model", "--m", "200"), "--m 200: at this level, tokens in whole sequences of 128"),
    ],
)
def test_what_a_level_does_not_have_is_refused(argv, message, capsys):
    assert bench.run(arguments(*argv)) == 2
    assert message in capsys.readouterr().err


def test_geometric_mean():
    over_peft = tables.speedups([sample_case(peft=2.0), sample_case(peft=8.0)])["peft"]
    assert over_peft == {"geometric_mean": pytest.approx(4.0), "worst": 2.0, "best": 8.0, "cases": 2}


def test_one_pass_alone(capsys):
    assert (
        bench.run(arguments("--quick", "--m", 8, 9, 10, 11, "--pass", "forward", "--providers", "frozen", "ours")) == 0
    )
    shown = capsys.readouterr().out
    assert "forward, ms" in shown
    assert "above 1 is faster), forward\n" in shown
    assert "over frozen linear" in shown


@pytest.mark.parametrize(
    ("size", "shown"),
    [(None, "-"), (0, "0.0"), (32 << 10, "0.031"), (1 << 18, "0.25"), (4 << 20, "4"), (1346 << 20, "1346.0")],
)
def test_little_memory_is_not_nothing(size, shown):
    assert tables.mib(size) == shown


def test_host_time_is_shown_where_it_was_taken():
    case = sample_case()
    assert "host us" not in printed(tables.case_table(case))
    case["providers"]["ours"]["seconds"]["both"]["host_median"] = 0.000123
    assert " 123 " in printed(tables.case_table(case))


@pytest.mark.parametrize(("width", "parts"), [(60, 2), (80, 2), (150, 1)])
def test_no_width_costs_a_number(width, parts):
    for table in (
        tables.case_table(sample_case()), level_tables.kernel_table([sample_launch()]),
        level_tables.model_table(sample_model("model")),
    ):  # fmt: skip
        wide, narrow = ({word.strip("─") for word in printed(table, w).split()} for w in (150, width))
        assert wide == narrow
    assert printed(tables.case_table(sample_case()), width).count("lora_kernels [triton]") == parts


def test_a_sweep_is_a_row_a_case():
    lean = sample_case(peft=8.0)
    lean["providers"]["ours"]["saved_bytes"] = 2**18
    text = printed(tables.sweep_table([sample_case(peft=2.0), lean]))
    assert text.count("1x2x3") == 2
    assert "8.000 0.250" in " ".join(text.split())  # PEFT / ours, and what is saved beside PEFT
    assert "chain: RuntimeError: no such thing" in text


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    for cases in ([sample_case(), sample_case(peft=3.0)], [sample_launch()], [sample_model("model")]):
        plot.plot(cases, "made on paper", str(tmp_path / "p.png"))
        assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "p.png").unlink()


@pytest.mark.parametrize(
    ("case", "of_peak", "said"),
    [
        (sample_case(), 1.2, True), (sample_case(), 0.9, False), (sample_launch(), 1.2, True),
        (sample_model("model"), 1.2, False),
    ],
)  # fmt: skip
def test_a_share_of_peak_above_all_is_explained_where_it_is_shown(case, of_peak, said, capsys):
    for taken in case["providers"]["ours"]["seconds"].values():
        taken["of_peak"] = of_peak
    level_tables.show(Console(width=150), [case], full=False)
    shown = capsys.readouterr().out
    assert ("A share of peak is above 100 %" in shown) == said == ("120%" in shown)
    assert ("peak: the most of forward + backward" in shown) == (case["level"] != "kernel")


def test_a_share_of_peak_in_a_row_a_case_is_not_shown_nor_explained(capsys):
    case = sample_case()
    case["providers"]["ours"]["seconds"]["both"]["of_peak"] = 1.2
    level_tables.show(Console(width=150), [case] * 4, full=False)
    assert "above 100 %" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("number", "shown"), [(11843.7, "11844"), (1234.5, "1234"), (123.45, "123.5"), (0.0, "0"), (0.00123456, "0.001235")]
)
def test_numbers_are_plain(number, shown):
    assert tables.plain(number, 4) == shown


@pytest.mark.parametrize(("threads", "remedy"), [(1, False), (4, True)])
def test_unsteady_times_on_many_threads_come_with_the_remedy(threads, remedy, monkeypatch, capsys):
    shaky = sample_case()
    shaky["providers"]["ours"]["seconds"]["both"] |= {"median": 1.0, "q1": 0.8, "q3": 1.4}
    monkeypatch.setattr(bench.levels, "run", lambda *given: [shaky])
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert bench.run(arguments("--quick")) == 0
    shown = capsys.readouterr().out
    assert "Unsteady: in 1 of 3 times" in shown
    assert ("OMP_NUM_THREADS=1" in shown) == remedy
