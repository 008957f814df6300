"""`lora-kernels tune` as its user sees it: real kernels in the interpreter where there is no GPU, made-up times."""

import argparse
import json
import warnings

import pytest
import torch
from rich.console import Console
from tuned_samples import GPU, folder_of_its_own  # noqa: F401

from lora_kernels import cli, kernels, plan
from lora_kernels.bench.cases import tune as tune_case
from lora_kernels.bench.cases.layer import Settings
from lora_kernels.cli import tune
from lora_kernels.kernels import hybrid
from lora_kernels.measure.presets import Shape
from lora_kernels.plan import Form, tuned
from lora_kernels.plan.model import Product
from lora_kernels.verify import judge

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = ("--shape", "40x48x64", "--r", 4, "--dtype", "fp16", "--rounds", 3)
KEY, DX_KEY, MASKED_KEY = (
    f"float16 {what} r16" for what in ("forward 32x48x64", "dx 32x64x48", "dx 32x64x48")
)  # fmt: skip
MASKED_KEY += " masked"


def arguments(*argv):
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    parser.add_argument("--json")
    return parser.parse_args([*map(str, argv)])


def taken(median, spread=0.0):
    return {"median": median, "q1": median - spread, "q3": median + spread, "min": median, "max": median, "n": 3,
            "host_median": None, "spin_median": None}  # fmt: skip


def timer(seconds=None, spread=0.0, seen=None):
    """Times by form, 1 ms where none is given."""

    def time(calls, passes, rounds):
        if seen is not None:
            seen.extend((passes, form, rounds) for form in calls)
        return {form: {which: taken((seconds or {}).get(form, 1e-3), spread) for which in passes} for form in calls}

    return time


@pytest.fixture
def unchecked(monkeypatch):
    """For tests of what comes after: every form passes, and nothing is computed."""
    monkeypatch.setattr(tune_case.judge, "judge", lambda provider, truth: judge.Verdict("", 0.0, "none"))


def tuning(*argv, time=None):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    status = tune.tune(arguments(*SMALL, *argv), console, DEVICE, GPU, time or timer())
    console.file.close()
    return status, console.export_text()


def ask(product, masked_tf32=False):
    return tuned.lookup(torch.device("cuda", 0), torch.float16, product, masked_tf32)


FORWARD = Product(40, 48, 64, 4, 2)
DX = Product(40, 64, 48, 4, 2, False, True)


@pytest.mark.usefixtures("unchecked")
def test_the_fastest_form_is_stored_and_taken_from_then_on(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "capability", lambda device: (9, 0))
    plan.form(torch.device("cuda", 0), torch.float16, FORWARD)  # an answer from before
    file = tmp_path / "t.json"
    seen = []
    seconds = {Form("beta1"): 5e-4, Form("fused", 2): 4e-4, Form("joint"): 3e-4}
    status, shown = tuning("--json", file, time=timer(seconds, seen=seen))
    assert status == 0
    assert ask(FORWARD) == ("fused", 2)
    assert ask(DX) == ("joint", None)
    assert ask(DX._replace(masked=True)) == ("joint", None)
    assert plan.form(torch.device("cuda", 0), torch.float16, FORWARD) == Form("fused", 2)
    assert str(tuned.where(GPU)) in shown
    for key in (KEY, DX_KEY, MASKED_KEY):
        assert key in shown
    assert "2.500x" in shown
    assert "3.333x" in shown
    written = json.loads(file.read_text())
    assert written["stored"] is True
    assert [row["key"] for row in written["products"]] == [KEY, DX_KEY, MASKED_KEY]
    first = written["products"][0]
    assert (first["rule"], first["fastest"], first["choice"]) == (["fused", None], ["fused", 2], ["fused", 2])
    assert len(first["forms"]) == len([1 for passes, _, _ in seen if passes == ("forward",)])
    assert {rounds for _, _, rounds in seen} == {3}


@pytest.mark.usefixtures("unchecked")
def test_every_form_is_tried():
    """Each allowed strategy, and each shipped tile of the path that the shape takes."""
    seen = []
    assert tuning("--p", 0, time=timer(seen=seen))[0] == 0
    tried = {which: [form for (w,), form, _ in seen if w == which] for which in tune_case.PASSES}
    tiles = [Form("fused", place) for place in range(4 if DEVICE.type == "cpu" else 8)]
    assert set(tried["forward"]) == {Form("fused"), *tiles, Form("beta1"), Form("padded")}
    assert set(tried["backward"]) == {*tried["forward"], Form("joint")}
    assert tried["forward"][0] == Form("fused")


def test_each_form_is_the_one_that_runs(monkeypatch):
    """The times say nothing if another form was taken."""
    ran, settings = [], Settings(DEVICE, torch.float16, "triton", rounds=1)
    for name in ("beta1", "padded", "joint"):
        stock = hybrid._STRATEGIES[name]
        monkeypatch.setitem(
            hybrid._STRATEGIES, name, lambda *args, s=stock, n=name, **kwargs: (ran.append(n), s(*args, **kwargs))[1]
        )
    expand = hybrid.matmul_expand_all

    def fused(*args, config=None, **kwargs):
        ran.append(("fused", config))
        return expand(*args, config=config, **kwargs)

    monkeypatch.setattr(hybrid, "matmul_expand_all", fused)
    monkeypatch.setitem(hybrid._STRATEGIES, "fused", fused)

    def time(calls, passes, rounds):
        for form, call in calls.items():
            ran.clear()
            y = call.forward()
            if passes == ("backward",):
                ran.clear()
            call.backward(y)
            if form.strategy != "fused":
                assert form.strategy in ran, (form, ran)
            elif form.place is not None:
                assert ran == [("fused", form.place)], (form, ran)
        return {form: {which: taken(1e-3) for which in passes} for form in calls}

    rows = tune_case.tune_case(Shape(32, 48, 64), 4, 0.0, settings, time)
    assert [row["choice"] for row in rows] == [Form("fused")] * 2


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ({Form("fused"): taken(1.0), Form("beta1"): taken(0.9)}, Form("beta1")),
        ({Form("fused"): taken(1.0, 0.06), Form("beta1"): taken(0.9, 0.06)}, Form("fused")),
        ({Form("fused"): taken(1.0, 0.04), Form("beta1"): taken(0.9, 0.04)}, Form("beta1")),
        ({Form("fused"): taken(1.0), Form("beta1"): taken(1.0)}, Form("fused")),
        ({Form("beta1"): taken(1.0, 0.5), Form("padded"): taken(0.9, 0.5)}, Form("padded")),  # the rule's did not run
        ({}, None),
    ],
)  # fmt: skip
def test_the_rule_is_kept_unless_another_is_clearly_faster(times, chosen):
    assert tune_case.choose(times, Form("fused")) == chosen


@pytest.mark.usefixtures("unchecked")
def test_within_the_noise_the_rules_form_is_what_is_stored():
    status, shown = tuning("--p", 0, time=timer({Form("beta1"): 0.99e-3}, spread=1e-4))
    assert status == 0
    assert ask(FORWARD) == ("fused", None)
    assert shown.count("the rule's") == 2


@pytest.mark.slow
def test_a_wrong_form_is_never_timed_nor_stored(monkeypatch):
    """The kernels and hybrids themselves are checked here, forward and with dropout."""
    beta1 = hybrid.beta1
    monkeypatch.setitem(hybrid._STRATEGIES, "beta1", lambda *args, **kwargs: [y * 1.01 for y in beta1(*args, **kwargs)])
    seen = []
    status, shown = tuning("--p", 0.1, "--dtype", "fp32", time=timer({Form("beta1"): 1e-6}, seen=seen))
    assert status == 1
    forms = {which: {form for (w,), form, _ in seen if w == which} for which in tune_case.PASSES}
    assert forms == {
        "forward": {Form("fused"), Form("fused", 0), Form("padded")},
        "backward": {Form("fused"), Form("fused", 0), Form("joint")},
    }
    for product in (FORWARD._replace(element=4), DX._replace(element=4, masked=True)):
        assert tuned.lookup(torch.device("cuda", 0), torch.float32, product, False) == ("fused", None)
    assert "float32 forward 32x48x64 r16, beta1: y" in shown
    assert "float32 dx 32x64x48 r16 masked, beta1: dx" in shown
    assert "allowed" in shown


def test_a_form_that_cannot_run_here_is_said_and_is_no_failure(monkeypatch):
    def judged(provider, truth):
        if Form("padded") in provider.taken.values():
            raise RuntimeError("out of resource: shared memory")
        return judge.Verdict("", 0.0, "none")

    monkeypatch.setattr(tune_case.judge, "judge", judged)
    status, shown = tuning("--p", 0)
    assert status == 0
    assert f"{KEY}, padded: RuntimeError: out of resource" in shown


@pytest.mark.usefixtures("unchecked")
def test_a_dry_run_stores_nothing(folder):
    status, shown = tuning("--dry-run", "--p", 0, time=timer({Form("beta1"): 1e-6}))
    assert status == 0
    assert "Nothing was stored." in shown
    assert not tuned.where(GPU).exists()


@pytest.mark.usefixtures("unchecked")
def test_no_room_to_store_is_a_warning_and_the_exit_status(monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tuned.cache, "replace", full)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        status, shown = tuning("--p", 0)
    assert status == 1
    assert KEY in shown
    assert "Nothing was stored." in shown


def test_rows_that_share_a_choice_are_run_once_and_forward_does_not_ask_for_p():
    args = arguments("--shape", "8192x64x64", "7000x64x64", "4096x64x64", "--r", 16, 12, "--p", 0, 0.1, 0.5)
    cases = tune._cases(args, Settings(DEVICE, torch.float16, "triton"))
    assert [(str(shape), r, p, passes) for shape, r, p, passes in cases] == [
        ("8192x64x64", 16, 0.0, ("forward", "backward")), ("8192x64x64", 16, 0.1, ("backward",)),
        ("4096x64x64", 16, 0.0, ("forward", "backward")), ("4096x64x64", 16, 0.1, ("backward",)),
    ]  # fmt: skip


def test_out_of_time_and_out_of_memory_are_said(monkeypatch, tmp_path):
    file = tmp_path / "t.json"
    status, shown = tuning("--minutes", 0, "--json", file)
    assert status == 0
    assert "2 of 2 cases were not run: out of time" in shown
    assert len(json.loads(file.read_text())["skipped"]) == 2

    def full(*args):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(tune_case, "draw", full)
    assert "2 of 2 cases were not run: out of memory" in tuning()[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert cli.main(["tune"]) == 2
    assert "there is no GPU here, so there is nothing to tune" in capsys.readouterr().err


def test_what_cannot_be_asked_for_is_refused(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    for argv, message in (
        (("--shape", "8x8"), "three positive whole numbers"),
        (("--r", 0), "--r 0: at least 1"),
        (("--m", -1), "--m -1"),
        (("--rounds", 0), "--rounds 0"),
        (("--p", 1), "--p 1"),
        (("--r", 513), "rank 513 exceeds 512"),
        (("--json", tmp_path / "file" / "x"), "ile"),
    ):
        assert tuning(*argv)[0] == 2
        assert message in capsys.readouterr().err


@pytest.mark.usefixtures("unchecked")
def test_a_second_tuner_is_refused(capsys):
    with tuned.tuning():
        assert tuning("--p", 0)[0] == 2
    assert "somebody tunes on this machine already" in capsys.readouterr().err
    assert tuning("--p", 0)[0] == 0


@pytest.mark.usefixtures("unchecked")
def test_a_directory_that_cannot_hold_a_lock_does_not_stop_a_dry_run(folder):
    folder.write_text("")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert tuning("--p", 0, "--dry-run")[0] == 0


def test_show_and_clear(capsys, tmp_path, monkeypatch):
    assert cli.main(["tune", "--show"]) == 0
    assert "Nothing is stored" in capsys.readouterr().out
    tuned.save(GPU, {KEY: ("fused", 0), DX_KEY: ("beta1", None)})
    assert cli.main(["tune", "--show", "--json", str(tmp_path / "s.json")]) == 0
    shown = capsys.readouterr().out
    for words in (GPU, tuned.versions(), "in use", KEY, DX_KEY, "fused", "beta1", tuned.where(GPU).name):
        assert words in shown
    (table,) = json.loads((tmp_path / "s.json").read_text())["tables"]
    assert table["choices"] == {tuned.versions(): {KEY: ["fused", 0], DX_KEY: ["beta1", None]}}
    with monkeypatch.context() as m:
        m.setattr(tuned, "versions", lambda: "torch 99")
        assert cli.main(["tune", "--show"]) == 0
    assert "not in use: here is torch 99" in capsys.readouterr().out
    assert cli.main(["tune", "--clear"]) == 0
    assert f"removed {tuned.where(GPU)}" in capsys.readouterr().out
    assert not tuned.where(GPU).exists()
    assert cli.main(["tune", "--clear"]) == 0
    assert "nothing to remove" in capsys.readouterr().out
