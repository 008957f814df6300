"""The benchmark: its arithmetic, its fairness, and that no time is shown for a wrong result."""

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from lora_kernels import dropout, eager
from lora_kernels.cli import _baselines, _bench_plot, _bench_view, _cost, _judge, _timing, bench
from lora_kernels.cli._baselines import PROVIDERS, Provider
from lora_kernels.cli._bench_case import Settings, draw, run_case, saved_bytes
from lora_kernels.cli._machine import write_json
from lora_kernels.cli._presets import PRESETS, Shape, parse_shape, with_rows

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench import battery, report

CPU = torch.device("cpu")
SHAPE = Shape(48, 64, 40)


def settings(dtype=torch.float32, **kwargs):
    return Settings(CPU, dtype, compiled=False, rounds=2, **kwargs)


def arguments(*argv):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    parser.add_argument("--json")
    common = ("--device", "cpu", "--no-compile", "--rounds", "2")
    return parser.parse_args([*common, *map(str, argv)])


@pytest.fixture
def no_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # `import peft` raises ImportError


# --- arithmetic


@pytest.mark.parametrize(
    ("formula", "dropout_", "adapter", "mib", "launches"),
    [
        ("frozen", False, 2, 320.0, 2),
        ("peft", False, 2, 1346.2, 12),
        ("peft", True, 2, 1666.2, 14),
        ("peft", False, 4, 3076.5, 17),
        ("peft", True, 4, 3652.5, 19),
        ("addmm", False, 2, 834.2, 8),
        ("triton", False, 2, 578.2, 6),
        ("triton", True, 2, 590.2, 6),
    ],
)
def test_bytes_at_8192_rows_of_4096_squared(formula, dropout_, adapter, mib, launches):
    cost = _cost.COSTS[formula](_cost.Size(8192, 4096, 4096, 16, 2, adapter), dropout_)
    assert round(cost.total / 2**20, 1) == mib
    assert cost.launches == launches


def test_bytes_of_the_split_minimum_and_of_unsloth():
    size = _cost.Size(8192, 4096, 4096, 16)
    assert round(_cost.split_minimum(size).total / 2**20, 1) == 514.2
    assert _cost.split_minimum(size).launches == 5
    assert _cost.unsloth(size).total == 963 * 2**20
    wide = _cost.Size(8192, 4096, 14336, 16)  # tells in_features from out_features
    assert round(_cost.COSTS["peft"](wide, True).total / 2**20) == 3747
    assert round(_cost.split_minimum(wide).total / 2**20) == 1155


def test_flops():
    base = sum(_cost.flops(8192, 4096, 4096, 0))
    assert base == 4 * 8192 * 4096**2
    assert sum(_cost.flops(8192, 4096, 4096, 16)) - base == 6 * 2 * 8192 * 4096 * 16
    assert _cost.flops(2, 3, 5, 7) == (2 * 2 * (15 + 7 * 8), 2 * 2 * (15 + 2 * 7 * 8))


def test_presets():
    assert {"llama-8b", "llama-70b", "qwen-32b", "lorafusion"} <= set(PRESETS)
    sweep = PRESETS["lorafusion"]
    assert (sweep.r, sweep.p, len(sweep.shapes)) == (16, 0.1, 75)
    assert {(s.k, s.n) for s in sweep.shapes} == {(d, d) for d in (4096, 5120, 8192)}
    assert sorted({s.m for s in sweep.shapes}) == list(range(2048, 8193, 256))
    assert (8192, 14336, 4096) in {(s.m, s.k, s.n) for s in PRESETS["llama-8b"].shapes}
    assert len(with_rows(sweep.shapes, [2048, 8192])) == 6


def test_a_shape_is_rows_in_out():
    assert parse_shape("8192x4096x1024") == Shape(8192, 4096, 1024)
    for wrong in ("8192x4096", "1x2x3x4", "0x2x3", "axbxc", "-1x2x3", ""):
        with pytest.raises(ValueError, match="ROWSxINxOUT"):
            parse_shape(wrong)


# --- timing


def test_rounds_are_interleaved_and_begun_by_each_in_turn():
    order = list(_timing.schedule("abc", 4))
    rounds = ["".join(name for i, name in order if i == which) for which in range(4)]
    assert rounds == ["abc", "bca", "cab", "abc"]


def test_backward_is_timed_without_its_forward():
    log, timed = [], []
    calls = {
        name: _timing.Calls(lambda n=name: log.append(f"{n}.f") or n, lambda y: log.append(f"{y}.b")) for name in "ab"
    }

    def measure(prepare, call):
        state = prepare()
        before = len(log)
        call(state)
        timed.append(log[before:])
        return float(len(timed)), None

    taken = _timing.time_all(calls, _timing.PASSES, 2, measure)
    one = [["{}.f"], ["{}.b"], ["{}.f", "{}.b"]]
    assert timed == [[step.format(name) for step in steps] for name in "abba" for steps in one]
    assert log[:6] == ["a.f", "a.b"] * 3  # warm-up, before anything is timed
    assert taken["b"]["forward"]["n"] == 2
    assert taken["b"]["forward"]["median"] == (4 + 7) / 2


def test_summary_is_median_and_quartiles():
    taken = _timing.summary([(s, None) for s in (5.0, 1.0, 2.0, 4.0, 100.0)])
    assert (taken["q1"], taken["median"], taken["q3"], taken["min"], taken["max"]) == (2, 4, 5, 1, 100)
    assert _timing.summary([(3.0, 0.5)])["median"] == 3
    assert _timing.summary([(3.0, 0.5)])["host_median"] == 0.5


def test_cpu_clock_times_the_call_alone():
    seconds, host = _timing.clock(CPU)(lambda: time.sleep(0.2), lambda _: time.sleep(0.01))
    assert 0.01 <= seconds < 0.15
    assert host is None


# --- nothing wrong is timed


@pytest.mark.usefixtures("no_peft")
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_provider_is_right_and_timed(dtype, p):
    case = run_case(SHAPE, 4, p, settings(dtype))
    rows = case["providers"]
    half = dtype == torch.bfloat16
    assert set(rows) == {"frozen", "ours", "peft", "addmm"} | ({"ours_fp32", "peft_fp32"} if half else set())
    for row in rows.values():
        assert row["reason"] == ""
        assert row["check"]["ok"]
        assert 0 < row["check"]["worst"] <= 1
        assert set(row["seconds"]) == set(_timing.PASSES)
        assert all(taken["median"] > 0 and taken["n"] == 2 for taken in row["seconds"].values())
    assert rows["frozen"]["seconds"]["both"]["to_floor"] == 1
    assert rows["peft"]["label"].startswith("PEFT arithmetic")


def broken(forward=None, gradients=lambda g: g):
    """This package's provider with something wrong in it; counts its calls."""

    @dataclasses.dataclass(frozen=True)
    class Broken(Provider):
        def backward(self, y, dy=None):
            return gradients(super().backward(y, dy))

    calls = []

    def build(problem, backend):
        good = PROVIDERS["peft"](problem, backend)
        fields = {f.name: getattr(good, f.name) for f in dataclasses.fields(Provider)}

        def count():
            calls.append(1)
            return (forward or (lambda y, problem: y))(good.forward(), problem)

        return Broken(**fields | {"label": "broken", "forward": count})

    return build, calls


BREAKS = {
    "y is off": dict(forward=lambda y, problem: y * 1.001),
    "y has a NaN": dict(forward=lambda y, problem: y + torch.where(torch.arange(40) == 3, math.nan, 0.0)),
    "no adapter": dict(forward=lambda y, problem: y * 0 + problem.x @ problem.weight.T),
    "dx is off": dict(gradients=lambda g: (g[0] * 1.001, *g[1:])),
    "dA is off": dict(gradients=lambda g: (g[0], g[1] * 1.001, g[2])),
    "dB is missing": dict(gradients=lambda g: (*g[:2], torch.zeros_like(g[2]))),
}


@pytest.mark.usefixtures("no_peft")
@pytest.mark.parametrize("rule", ["peer", "operators"])
@pytest.mark.parametrize("what", BREAKS)
def test_no_time_for_a_wrong_result(what, rule):
    build, calls = broken(**BREAKS[what])

    def one(name, problem, backend):
        if name != "peft":
            return _baselines.build(name, problem, backend)
        return dataclasses.replace(build(problem, backend), rule=rule)

    case = run_case(SHAPE, 4, 0.0, settings(build=one, only=("frozen", "ours", "peft")))
    row = case["providers"]["peft"]
    assert row["seconds"] == {}
    assert "wrong result, not timed" in row["reason"]
    assert not row["check"]["ok"]
    assert len(calls) == 1  # the check, and never again
    assert case["providers"]["ours"]["seconds"]
    text = printed(_bench_view.case_table(case))
    shown = next(line for line in text.splitlines() if line.strip().startswith("broken "))
    assert not any(character.isdigit() for character in shown)
    assert "broken: wrong result, not timed" in text
    assert _bench_view.speedups([case]).keys() == {"frozen"}


def printed(renderable):
    console = Console(width=150, file=open("/dev/null", "w"), record=True)  # noqa: SIM115
    console.print(renderable)
    console.file.close()
    return console.export_text()


@pytest.mark.parametrize(("times", "ok"), [(1.0, True), (1.9, True), (3.5, False)])
def test_peers_may_be_twice_as_far_off_as_pytorch(times, ok):
    problem = draw(SHAPE, 4, 0.0, settings())
    exact, by_pytorch = _judge.Truth().of(problem)
    actual = {name: exact[name] + times * (by_pytorch[name].double() - exact[name]) for name in exact}
    verdict = _judge._peer(actual, problem, _judge.Truth())
    assert verdict.ok == ok
    assert (verdict.worst <= 1) == ok


@pytest.mark.usefixtures("no_peft")
def test_a_provider_that_drops_nothing_fails():
    def one(name, problem, backend):
        return dataclasses.replace(
            _baselines.build(name, dataclasses.replace(problem, dropout_p=0.0), backend), problem=problem
        )

    row = run_case(SHAPE, 4, 0.1, settings(build=one, only=("peft",)))["providers"]["peft"]
    assert row["seconds"] == {}
    assert "keeps a share of 1.0000, 0.9000 expected" in row["reason"]


def test_a_provider_that_cannot_run_says_why():
    def one(name, problem, backend):
        if name == "addmm":
            raise RuntimeError("no compiler\nand more")
        return _baselines.build(name, problem, backend)

    rows = run_case(SHAPE, 4, 0.0, settings(build=one, only=("frozen", "addmm")))["providers"]
    assert rows["addmm"]["reason"] == "RuntimeError: no compiler"
    assert rows["addmm"]["seconds"] == {}
    assert rows["frozen"]["seconds"]


def test_the_mask_is_read_off_the_provider():
    problem = draw(SHAPE, 4, 0.3, settings())
    weight = problem.weight.clone()
    keep, reason = _judge.find_mask(_baselines.build("ours", problem), seed=5)
    torch.manual_seed(5)
    assert torch.equal(keep, eager.draw_mask(problem.x.shape, problem.dropout_p, CPU))
    assert reason == ""
    assert torch.equal(problem.weight, weight)
    assert problem.dropout_p == dropout.threshold(0.3) / 65536


def test_peft_itself():
    if importlib.util.find_spec("peft") is None:
        pytest.skip("PEFT is not installed")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that PEFT imports
        problem = draw(SHAPE, 4, 0.1, settings(torch.bfloat16))
        provider = _baselines.build("peft_fp32", problem)
        verdict = _judge.judge(provider, _judge.Truth())
    assert provider.label == "PEFT fp32"
    assert verdict.ok, verdict.reason
    assert provider.leaves["d_lora_A"].dtype == torch.float32
    # kept beyond x and parameters: x in fp32, its mask or scaled mask, the dropped x, s
    assert saved_bytes(provider) > 48 * 64 * 4


# --- memory


@pytest.mark.usefixtures("no_peft")
def test_saved_bytes():
    plain, dropping = (draw(SHAPE, 4, p, settings()) for p in (0.0, 0.1))
    s, x, mask = 48 * 4 * 4, 48 * 64 * 4, 48 * 64
    assert saved_bytes(_baselines.build("frozen", plain)) == 0
    assert saved_bytes(_baselines.build("ours", plain)) == s
    assert saved_bytes(_baselines.build("addmm", plain)) == s
    assert saved_bytes(_baselines.build("addmm", dropping)) == s + x + mask
    assert saved_bytes(_baselines.build("ours", dropping)) == s + mask


def test_a_storage_is_saved_once_however_often_it_is_kept():
    problem = draw(SHAPE, 4, 0.0, settings())
    x = problem.x.detach().requires_grad_()

    def forward():
        h = x.exp()  # keeps its result, as does each factor of the product
        return h * h.view(-1).view_as(h)

    assert saved_bytes(Provider("twice", problem, forward, {"dx": x})) == 48 * 64 * 4


# --- the command


@pytest.mark.usefixtures("no_peft")
def test_the_command_writes_what_it_shows(tmp_path, capsys):
    file = tmp_path / "b.json"
    assert bench.run(arguments("--shape", "32x48x40", "--r", 4, 8, "--p", 0, 0.1, "--json", file)) == 0
    shown = capsys.readouterr().out
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
        assert case["providers"]["ours"]["peak_bytes"] is None  # a CPU's is not measured, so not given
    assert shown.count("32x48x40") == 4
    assert f"{written['speedups']['peft']['geometric_mean']:.3f}x" in shown
    assert f"torch {torch.__version__}" in shown
    busy = any(t["of_peak"] > 1 for c in written["cases"] for r in c["providers"].values() for t in r["seconds"].values())
    assert ("above 100 %" in shown) == busy


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
        (("--json", in_a_file), f"--json {in_a_file}: "),
        (("--plot", in_a_file), f"--plot {in_a_file}: "),
        (("--json", tmp_path), f"--json {tmp_path}: cannot be written"),
    ):
        assert bench.run(arguments(*argv)) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert bench.run(arguments("--quick", "--plot", "a.png")) == 2
    assert "lora-kernels[bench]" in capsys.readouterr().err


def sample_case(ours=1.0, floor=0.8, peft=2.0, label="q, o"):
    def row(name, seconds, **more):
        taken = {} if seconds is None else {"both": {"median": seconds, "q1": seconds, "q3": seconds, "to_floor": 1.25,
                 "flops_per_second": 1e12, "of_peak": 0.5}}  # fmt: skip
        return {"label": name, "reason": "", "seconds": taken, "saved_bytes": 2**20, "peak_bytes": 2**21} | more

    return {
        "shape": {"m": 1, "k": 2, "n": 3, "label": label}, "r": 16, "p": 0.1, "dtype": "bfloat16",
        "split_minimum_bytes": 2**20, "flops": {"forward": 1, "backward": 2},
        "providers": {
            "frozen": row("floor", floor), "ours": row("lora_kernels [triton]", ours), "peft": row("PEFT", peft),
            "addmm": row("chain", None, reason="RuntimeError: no such thing"),
        },
    }  # fmt: skip


def test_labels_are_those_that_were_built():
    unbuilt = sample_case()
    unbuilt["providers"]["peft"]["label"] = "peft"
    assert _bench_view.labels_of([unbuilt, sample_case()])["peft"] == "PEFT"
    assert list(_bench_view.labels_of([unbuilt])) == ["frozen", "ours", "peft", "addmm"]


def test_geometric_mean():
    over_peft = _bench_view.speedups([sample_case(peft=2.0), sample_case(peft=8.0)])["peft"]
    assert over_peft == {"geometric_mean": pytest.approx(4.0), "worst": 2.0, "best": 8.0, "cases": 2}


def test_one_pass_alone(capsys):
    assert bench.run(arguments("--quick", "--m", 8, 9, 10, 11, "--pass", "forward", "--providers", "frozen", "ours")) == 0
    shown = capsys.readouterr().out
    assert "forward, ms" in shown
    assert "above 1 is faster), forward\n" in shown
    assert "over frozen linear" in shown


@pytest.mark.parametrize(
    ("size", "shown"),
    [(None, "-"), (0, "0.0"), (32 << 10, "0.031"), (1 << 18, "0.25"), (4 << 20, "4"), (1346 << 20, "1346.0")],
)
def test_little_memory_is_not_nothing(size, shown):
    assert _bench_view.mib(size) == shown


def test_host_time_is_shown_where_it_was_taken():
    case = sample_case()
    assert "host us" not in printed(_bench_view.case_table(case))
    case["providers"]["ours"]["seconds"]["both"]["host_median"] = 0.000123
    assert " 123 " in printed(_bench_view.case_table(case))


def test_a_narrow_screen_gets_two_tables():
    wide, narrow = (printed(_bench_view.case_table(sample_case(), width)) for width in (150, 80))
    assert wide.count("lora_kernels [triton]") == 1
    assert narrow.count("lora_kernels [triton]") == 2


def test_a_sweep_is_a_row_a_case():
    text = printed(_bench_view.sweep_table([sample_case(peft=2.0), sample_case(peft=8.0)]))
    assert text.count("1x2x3") == 2
    assert "8.000" in text
    assert "chain: RuntimeError: no such thing" in text


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    _bench_plot.plot([sample_case(), sample_case(peft=3.0)], "made on paper", str(tmp_path / "p.png"))
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_json_is_json_and_never_half(tmp_path):
    file = tmp_path / "deep" / "x.json"
    write_json(file, {"a": [math.inf, 1.5], "b": {"c": math.nan}})
    read = json.loads(file.read_text(), parse_constant=lambda word: pytest.fail(word))
    assert read["a"] == ["inf", 1.5]
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == read
    assert [path.name for path in file.parent.iterdir()] == ["x.json"]


# --- the page


def put(folder, name, gpu, **content):
    folder.mkdir(parents=True, exist_ok=True)
    made_on = {"gpu": gpu, "cpu": {"model": "a CPU", "threads": 2}, "torch": "2", "triton": None, "peft": None}
    (folder / name).write_text(json.dumps({"machine": made_on | {"lora_kernels": "0"}, **content}))


def bench_file(*cases):
    return dict(
        command="bench", cases=cases, skipped=[], method={"rounds": 3, "timer": "t", "launch": "l", "cache": "c"},
        peaks={"matmul": "8x8x8 bf16, best", "matmul_flops_per_second": 5e14, "copy_bytes_per_second": 1e12},
    )  # fmt: skip


GPU = {"name": "GPU-1", "driver": "1"}


def test_page_without_results(tmp_path):
    page = report.render(tmp_path / "results")
    assert "No GPU has been measured yet" in page
    assert "|" not in page


def test_page_of_a_gpu_run(tmp_path):
    put(tmp_path / "g", "llama-8b.json", GPU, **bench_file(sample_case(ours=0.001234)))
    put(tmp_path / "g", "verify.json", GPU, command="verify", passed=7, failed=1)
    page = report.render(tmp_path)
    assert "Generated by" in page
    assert "No GPU has been measured" not in page
    assert "## GPU-1" in page
    assert "7 cases passed, 1 failed" in page
    assert "| 1.234 |" in page
    assert "| 1 x 2 x 3 (q, o) | 16 | 0.1 |" in page
    assert "RuntimeError: no such thing" in page


def test_page_keeps_no_failure_back(tmp_path):
    put(tmp_path / "g", "llama-8b.json", GPU, **bench_file(sample_case()))
    states = {"gpu_tests": "failed", "verify": "out of time", "llama-8b": "ok", "memory": "skipped"}
    steps = [{"name": name, "state": state} for name, state in states.items()]
    put(tmp_path / "g", "summary.json", GPU, command="battery", rehearsal=False, steps=steps)
    said = "gpu_tests failed, verify stopped, out of time, llama-8b ok, memory skipped for want of time."
    assert f"Steps of the battery: {said}" in report.render(tmp_path)


def test_page_says_what_a_cpu_measured(tmp_path):
    put(tmp_path / "laptop", "cpu.json", None, **bench_file(sample_case()))
    page = report.render(tmp_path)
    assert "No GPU has been measured yet" in page
    assert "## laptop (a CPU, no GPU figures)" in page


def test_page_knows_no_rehearsal(tmp_path):
    put(tmp_path / "r", "llama-8b.json", None, **bench_file(sample_case()))
    put(tmp_path / "r", "summary.json", None, command="battery", rehearsal=True, steps=[])
    assert report.render(tmp_path) == report.render(tmp_path / "nothing")


def test_stale_page(tmp_path, capsys):
    where = ["--results", str(tmp_path / "results"), "--page", str(tmp_path / "page.md")]
    assert report.main([*where, "--check"]) == 1
    assert report.main(where) == 0
    assert report.main([*where, "--check"]) == 0
    put(tmp_path / "results" / "g", "llama-8b.json", GPU, **bench_file(sample_case()))
    assert report.main([*where, "--check"]) == 1
    assert "run python -m bench.report" in capsys.readouterr().err


# --- the battery


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_battery_refuses_without_a_gpu(tmp_path, capsys):
    assert battery.main(["--out", str(tmp_path / "b")]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_battery_keeps_its_time_and_says_what_happened(tmp_path, monkeypatch):
    monkeypatch.setattr(battery, "_LEAST_S", 1.0)
    monkeypatch.setattr(battery, "_RESERVE_S", 0.0)
    write = "import sys; open(sys.argv[1], 'w').write('{}')"
    steps = [
        battery.Step("good", ("-c", write, "{file}"), 60),
        battery.Step("bad", ("-c", "print('why'); raise SystemExit(3)"), 60),
        battery.Step("none", ("-c", "raise SystemExit(5)"), 60, fine=(0, 5)),
        battery.Step("hangs", ("-c", "import time; time.sleep(60)"), 1.5),
        battery.Step("late", ("-c", write, "{file}"), 60),
    ]
    real, jumps = time.monotonic, [0.0]
    monkeypatch.setattr(battery.time, "monotonic", lambda: real() + jumps[0])
    run = battery._run

    def then_the_clock_jumps(step, out, limit):
        record = run(step, out, limit)
        jumps[0] += 1000 if step.name == "hangs" else 0
        return record

    monkeypatch.setattr(battery, "_run", then_the_clock_jumps)
    battery.run_steps(steps, tmp_path, minutes=2)
    summary = json.loads((tmp_path / "summary.json").read_text())
    states = {step["name"]: step["state"] for step in summary["steps"]}
    assert states == {"good": "ok", "bad": "failed", "none": "ok", "hangs": "out of time", "late": "skipped"}
    assert summary["steps"][1]["output"] == ["why"]
    assert summary["steps"][3]["seconds"] < 30  # killed, not waited for
    assert summary["complete"] is True
    assert {path.name for path in tmp_path.iterdir()} == {"good.json", "summary.json"}


def test_battery_runs_the_tests_that_it_can(tmp_path, monkeypatch):
    """A machine without pytest-timeout, and without a package that some test file imports."""
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nfilterwarnings = error\nof_a_missing_plugin = 1\naddopts = --of-xdist 2\nmarkers = gpu\n"
    )
    (tmp_path / "test_a.py").write_text("import of_a_missing_package")
    (tmp_path / "test_b.py").write_text("import pytest\n@pytest.mark.gpu\ndef test(): pass\ndef test_not(): pass")
    monkeypatch.setattr(battery, "ROOT", tmp_path)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    record = battery._run(battery.plan_steps(rehearse=False)[0], tmp_path, 60)
    assert "1 passed, 1 deselected, 1 error" in record["output"][-1]
    assert record["state"] == "failed"


def test_a_battery_that_is_ended_leaves_nothing_running(tmp_path):
    """`timeout` and schedulers end it by SIGTERM; a step is in a session of its own and would hold the GPU."""
    pid_file = tmp_path / "pid"
    step = f"import os, time, pathlib; pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid())); time.sleep(60)"
    script = (
        "import sys; from bench import battery\n"
        f"battery.plan_steps = lambda rehearse: [battery.Step('long', ('-c', {step!r}), 60)]\n"
        f"sys.exit(battery.main(['--rehearse', '--out', {str(tmp_path)!r}]))"
    )
    ended = subprocess.Popen([sys.executable, "-c", script], cwd=battery.ROOT, stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: pid_file.exists() and pid_file.read_text())
        pid = int(pid_file.read_text())
        ended.terminate()
        assert ended.wait(20) == 128 + signal.SIGTERM
        wait_for(lambda: not alive(pid))
    finally:
        ended.kill()
        ended.wait()
        if pid_file.exists() and alive(int(pid_file.read_text())):
            os.kill(int(pid_file.read_text()), signal.SIGKILL)


def wait_for(condition, seconds=40.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def alive(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()  # a zombie runs no more
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_battery_fits_its_files_and_its_order():
    steps = battery.plan_steps(rehearse=False)
    assert [step.name for step in steps][:3] == ["gpu_tests", "verify", "llama-8b"]
    assert sum(step.file is not None for step in steps) + 1 <= 8
    for step in steps:  # every bench command line is one that bench takes
        if "bench" in step.command:
            argv = [{"{file}": "f", "{minutes}": "1"}.get(part, part) for part in step.command[3:]]
            assert bench._cases(arguments(*argv))


def test_battery_rehearsal(tmp_path, monkeypatch):
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "peft.py").write_text("raise ImportError")  # the real one takes seconds to load
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "without"))
    out = tmp_path / "out"
    assert battery.main(["--rehearse", "--out", str(out), "--only", "memory"]) == 0
    written = json.loads((out / "memory.json").read_text())
    assert written["complete"] is True
    assert written["cases"][0]["providers"]["ours"]["saved_bytes"] > 0
    assert written["cases"][0]["providers"]["ours"]["seconds"] == {}
    assert json.loads((out / "summary.json").read_text())["rehearsal"] is True
    assert battery.main(["--rehearse", "--out", str(out), "--only", "memory", "--minutes", "0"]) == 0
    assert json.loads((out / "summary.json").read_text())["steps"][0]["state"] == "skipped"
