"""The commands doctor and verify, each in a process of its own where the environment matters."""

import importlib
import json
import os
import subprocess
import sys
from itertools import product

import pytest
import torch

import lora_kernels
from lora_kernels import cli, torch_backend
from lora_kernels.cli import doctor, verify
from lora_kernels.constants import DTYPES
from lora_kernels.plan import tuned
from lora_kernels.verify import layer_matrix
from lora_kernels.verify.matrix import matrix
from lora_kernels.verify.problems import make_problem, run_problem, with_mask

ON_GPU = torch.cuda.is_available()


def command(*args: str, **environment: str) -> subprocess.CompletedProcess:
    """Run `lora-kernels` in a clean interpreter, with only those of its variables that are given."""
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "LORA_KERNELS_BACKEND")}
    return subprocess.run(
        [sys.executable, "-m", "lora_kernels", *args],
        env=clean | {"COLUMNS": "120"} | environment, capture_output=True, text=True, timeout=1000, check=False,
    )  # fmt: skip


# doctor


@pytest.mark.slow
def test_doctor_says_what_each_dtype_takes(tmp_path):
    done = command("doctor", "--json", str(tmp_path / "doctor.json"))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "doctor.json").read_text())
    assert set(report["dtypes"]) == {"bf16", "fp16", "fp32", "fp64"}
    assert report["dtypes"]["fp64"]["backend"] == "torch"  # the kernels have no float64 anywhere
    assert report["machine"]["torch"] == torch.__version__
    assert report["verdict"] in done.stdout
    assert f"Next: {report['next']}" in done.stdout
    if not ON_GPU:
        assert {route["backend"] for route in report["dtypes"].values()} == {"torch"}
        assert "Triton does not compile for cpu" in done.stdout


@pytest.mark.slow
def test_doctor_says_what_the_environment_does(tmp_path):
    done = command(
        "doctor", "--json", str(tmp_path / "d.json"), LORA_KERNELS_BACKEND="torch", TRITON_CACHE_DIR="kept/here"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "d.json").read_text())
    effects = {variable["name"]: variable["effect"] for variable in report["environment"]}
    assert (
        effects["LORA_KERNELS_BACKEND"] == 'calls with backend="auto" take torch; read at the first call of a process'
    )
    assert effects["TRITON_CACHE_DIR"] == "compiled kernels are kept in kept/here"
    assert effects["TRITON_INTERPRET"] == "kernels are compiled, not interpreted"


def test_doctor_says_whether_measured_choices_are_in_use(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path / "kept"))
    cuda, fused = torch.device("cuda"), {"bf16": {"backend": "triton"}}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    tuned.forget()
    assert "without the fused kernels" in doctor._tuned_choices(cuda, {"bf16": {"backend": "torch"}})
    assert "no choices measured for A GPU with these versions" in doctor._tuned_choices(cuda, fused)
    tuned.save("A GPU", {"bfloat16 forward 1x2x3 r16": ("fused", 0)})
    assert doctor._tuned_choices(cuda, fused) == f"1 measured choice in use, kept in {tmp_path / 'kept'}"
    assert cli.main(["doctor", "--json", str(tmp_path / "d.json")]) == 0
    effects = {v["name"]: v["effect"] for v in json.loads((tmp_path / "d.json").read_text())["environment"]}
    assert effects["LORA_KERNELS_CACHE"] == f"what `lora-kernels tune` measures is kept in {tmp_path / 'kept'}"
    tuned.forget()


@pytest.mark.slow
def test_doctor_fails_on_a_setting_that_makes_every_call_fail():
    done = command("doctor", LORA_KERNELS_BACKEND="tritn")
    assert done.returncode == 1
    assert "No call works with these settings." in done.stdout
    assert "Traceback" not in done.stderr


def test_doctor_works_without_triton():
    script = "import sys; sys.modules['triton'] = None; from lora_kernels.cli import main; sys.exit(main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=1000, check=False)
    assert done.returncode == 0, done.stderr
    assert "Triton not importable" in done.stdout


# verify


@pytest.mark.slow
def test_verify_quick_passes(tmp_path):
    done = command("verify", "--quick", "--json", str(tmp_path / "verify.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "verify.json").read_text())
    cases = report["cases"]
    assert report["failed"] == 0
    assert done.stdout.count("the share of the limit that the worst output used; up to 1 passes") == 1
    assert report["passed"] == len(cases) == done.stdout.count(" pass\n")
    assert {case["backend"] for case in cases} == {"triton", "torch"}
    layers = [case for case in cases if "layout" in case]
    assert all(0 < case["rule_1"] <= 1 for case in layers)
    assert all({f["name"] for f in case["findings"]} >= {"y", "dx", "d_lora_A", "d_lora_B"} for case in layers)
    groups = [case for case in cases if "sizes" in case]
    assert {case["backend"] for case in groups} == {"triton", "torch"}
    blocks = [case for case in cases if case not in layers and case not in groups]
    for case in blocks:  # each y, dx, and dA and dB of each adapter
        assert len(case["findings"]) == (2 if case["activation"] else 4) + 2 * sum(map(bool, case["ranks"]))
    assert {(bool(case["activation"]), bool(case["stored"])) for case in blocks} == set(
        product((True, False), repeat=2)
    )
    assert any(f["name"] == "dbias" for case in cases for f in case["findings"])
    ran = {case["dtype"] for case in cases if case["backend"] == "triton"}
    assert ran == ({"bf16", "fp16", "fp32"} if ON_GPU else {"fp16", "fp32"})
    assert ("bf16 kernels need a GPU" in done.stdout) == (not ON_GPU)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_no_two_lines_of_verify_are_labelled_alike(backend, on_gpu, quick):
    cases = [case for dtype in DTYPES for case in matrix(backend, dtype, on_gpu, quick)]
    labels = [verify._label(case) for case in cases]
    assert len(set(labels)) == len(labels) > 10
    lines = [verify._row(*label, "0.12", "0.34") + "pass" for label in labels]
    assert max(map(len, lines)) < 80
    assert all(line.split()[-3:] == ["0.12", "0.34", "pass"] for line in lines)


def _quick_torch(*more: str) -> int:
    return cli.main(["verify", "--quick", "--device", "cpu", "--backend", "torch", "--dtype", "fp32", *more])


def test_verify_fails_on_a_wrong_scale(monkeypatch, tmp_path, capsys):
    shrink_all = torch_backend.shrink_all
    monkeypatch.setattr(
        torch_backend,
        "shrink_all",
        lambda x, rows, **more: shrink_all(x, [(a, alpha * 1.001, p) for a, alpha, p in rows], **more),
    )
    assert _quick_torch("--json", str(tmp_path / "v.json")) == 1
    assert "FAIL" in capsys.readouterr().out
    report = json.loads((tmp_path / "v.json").read_text())
    assert report["failed"] == len(report["cases"]) > 0
    assert "allowed" in report["cases"][0]["message"]


def test_verify_fails_on_nan_and_still_writes_json(monkeypatch, tmp_path):
    expand = torch_backend.matmul_expand_all
    monkeypatch.setattr(
        torch_backend, "matmul_expand_all", lambda *args, **more: [y * torch.nan for y in expand(*args)]
    )
    assert _quick_torch("--json", str(tmp_path / "v.json")) == 1
    assert "NaN or inf" in json.loads((tmp_path / "v.json").read_text())["cases"][0]["message"]


def test_verify_fails_on_an_input_that_is_written(monkeypatch, capsys):
    shrink = torch_backend.shrink

    def scribble(x, *rest, **more):
        result = shrink(x, *rest, **more)
        first = x.detach()[:1, :1]
        first.mul_(1 + 2**-20)  # within the error bounds, after it was read
        return result

    monkeypatch.setattr(torch_backend, "shrink", scribble)
    assert _quick_torch() == 1
    assert "was written to" in capsys.readouterr().out


def test_verify_fails_on_results_that_differ_from_run_to_run(monkeypatch, capsys):
    calls = iter(range(10**6))
    wgrad = torch_backend.wgrad

    def jitter(*args, **kwargs):
        g = wgrad(*args, **kwargs)
        g.view(-1)[0] *= 1 + 2**-22 * (next(calls) % 4)
        return g

    monkeypatch.setattr(torch_backend, "wgrad", jitter)
    assert _quick_torch() == 1
    assert "differs from run to run" in capsys.readouterr().out


def test_verify_fails_a_case_that_raises_and_goes_on(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no such tile")

    monkeypatch.setattr(torch_backend, "wgrad", broken)
    assert _quick_torch() == 1
    assert capsys.readouterr().out.count("RuntimeError: no such tile") > 1


def test_verify_says_what_is_wrong_with_an_option(capsys):
    assert _quick_torch("--device", "nonsense") == 2
    assert "--device nonsense" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        _quick_torch("--dtype", "int8")


@pytest.mark.slow
@pytest.mark.skipif(ON_GPU, reason="there bf16 kernels run")
def test_verify_does_not_pass_off_bf16_kernels_as_verified_in_the_interpreter():
    done = command("verify", "--quick", "--backend", "triton", "--dtype", "bf16")
    assert done.returncode == 2
    assert "passed" not in done.stdout
    assert "bf16 kernels need a GPU" in done.stdout


@pytest.mark.skipif(ON_GPU, reason="there kernels are compiled, not interpreted")
@pytest.mark.parametrize(("triton", "runs"), [("3.6.0", False), ("3.7.1", True)])
def test_verify_says_that_an_old_interpreter_needs_an_old_numpy(monkeypatch, triton, runs):
    monkeypatch.setattr(verify.metadata, "version", {"triton": triton, "numpy": "2.4.6"}.__getitem__)
    said = verify._kernels_problem(torch.device("cpu"), "fp32")
    assert (said == "") if runs else ("needs numpy < 2.4 (numpy is 2.4.6)" in said)


def test_an_interrupted_verify_writes_its_results_so_far(monkeypatch, tmp_path, capsys):
    stock, seen = verify.examine, []

    def examine(*args):
        seen.append(args)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return stock(*args)

    monkeypatch.setattr(verify, "examine", examine)
    file = tmp_path / "verify.json"
    assert cli.main(["verify", "--quick", "--device", "cpu", "--backend", "torch", "--json", str(file)]) == 130
    written = json.loads(file.read_text())
    assert (written["passed"], written["failed"], len(written["cases"])) == (2, 0, 2)
    assert written["not_run"] > 0


@pytest.mark.parametrize("layout", layer_matrix.LAYOUTS)
def test_layouts_keep_the_values_and_change_the_strides(layout):
    bias = layout == "bias"
    problem = make_problem((8,), 6, 4, 3, torch.float32, "cpu", bias=bias, dropout_p=0.5)
    laid_out = with_mask(layer_matrix.lay_out(problem, layout), "torch", 0)
    operand = {"x transposed": "x", "x sliced": "x", "all sliced": "x", "W transposed": "weight", "dy expanded": "dy"}
    name = operand.get(layout)
    if name is not None:
        assert getattr(laid_out, name).stride() != getattr(problem, name).stride()
    if layout != "dy expanded":
        torch.testing.assert_close(laid_out.x, problem.x, rtol=0, atol=0)
        torch.testing.assert_close(laid_out.dy, problem.dy, rtol=0, atol=0)
    assert run_problem(laid_out, "torch", 0)["y"].isfinite().all()


@pytest.mark.parametrize("argv", [["--help"], pytest.param([], marks=pytest.mark.slow)])
def test_command_line_lists_its_commands(argv):
    done = command(*argv)
    assert done.returncode == (0 if argv else 2)
    for name in ("doctor", "verify", "bench", "tune", "inspect", "demo"):
        assert f"\n    {name} " in (done.stdout if argv else done.stderr)


def test_command_line_says_its_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"lora-kernels {lora_kernels.__version__}\n"


@pytest.mark.parametrize("name", cli._COMMANDS)
def test_ctrl_c_is_a_line_and_an_exit_status(name, monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module(f"lora_kernels.cli.{name}"), "run", interrupted)
    assert cli.main([name]) == 130
    assert capsys.readouterr().err == f"lora-kernels {name}: interrupted\n"


@pytest.mark.parametrize("name", cli._COMMANDS)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(name, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    module = importlib.import_module(f"lora_kernels.cli.{name}")
    monkeypatch.setattr(module, "run", lambda args: pytest.fail("it was run first"))
    for path, message in (
        (tmp_path / "file" / "x", ""), (tmp_path, "cannot be written"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stopped:
            cli.main([name, "--json", str(path)])
        assert stopped.value.code == 2
        assert f"--json {path}: {message}" in capsys.readouterr().err
