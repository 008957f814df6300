"""Whether the emulator notices faults: a few planted in compiled kernels, of kinds that nothing else would notice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from emulator import build, faults, judged, planted, slices

COMMAND = Path(__file__).parents[1] / "emulator" / "faults.py"


@pytest.fixture
def plant(tmp_path):
    """Plants two faults of each kind in the kernels of one case; what became of them, by kind."""
    if problem := build.missing():
        pytest.skip(problem)

    def run(arch, case, *kinds):
        out = tmp_path / "faults.json"
        options = ["--arch", arch, "--case", case, "--kind", f"^({'|'.join(kinds)})", "--most", "2", "--json", str(out)]
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        done = subprocess.run([sys.executable, str(COMMAND), *options], env=env, capture_output=True, text=True)
        # 1: of one that was not noticed there is no proof that it changes nothing
        assert done.returncode in (0, 1), done.stdout + done.stderr
        assert "nothing was noticed of" not in done.stdout, done.stdout
        assert out.exists(), done.stderr
        found = {}
        for one in json.loads(out.read_text()):
            found.setdefault(one["kind"], []).append(one["noticed"])
        return found

    return run


@pytest.mark.slow
def test_faults_are_noticed(plant):
    """Among them one that only the order of launches would show, and not on every GPU."""
    kinds = "mbarrier: no wait", "mbarrier: expects half", "wgmma: no wait", "grid: no wait", "stmatrix: turned"
    found = plant("sm_90", "bf16 100x152x216", *kinds)
    assert len(found) == len(kinds)
    assert all(any(noticed) for noticed in found.values()), found
    assert any("which may not be over" in noticed for noticed in found["grid: no wait"])


def planted_faults(kind, arch, silent, noticed=0, proven=0):
    def one(found, why):
        return faults.Result(arch, "case", "kernel", kind, 1, "", found, why)

    return [one("", judged.ORDERS[kind])] * silent + [one("wrong", "")] * noticed + [one("", "a proof")] * proven


@pytest.mark.parametrize("kind", ["wgmma: no wait", "grid: no wait", "fence.proxy.async: none"])
@pytest.mark.parametrize(("silent", "noticed", "proven", "blind"), [
    (2, 0, 0, False), (3, 0, 0, True), (4, 0, 0, True), (8, 0, 0, True), (3, 1, 0, False), (3, 0, 1, False),
])  # fmt: skip
def test_a_kind_of_sm_90_that_is_never_noticed_fails(kind, silent, noticed, proven, blind):
    """Of which four are planted unless asked for more."""
    assert faults.unseen(planted_faults(kind, "sm_90", silent, noticed, proven)) == [kind] * blind


def test_a_kind_of_both_architectures_is_judged_by_six():
    kind = "cp.async: no commit"
    found = planted_faults(kind, "sm_80", 4) + planted_faults(kind, "sm_90", 1)
    assert faults.unseen(found) == []
    assert faults.unseen(found + planted_faults(kind, "sm_90", 1)) == [kind]
    assert faults.unseen(found + planted_faults(kind, "sm_90", 4, noticed=1)) == []


def test_kinds_that_need_sm_90_are_those_of_its_instructions():
    """None of them is a kind of an instruction that sm_80 has as well."""
    with_sm_90 = {kind for kind in planted.KINDS if kind.startswith(faults.ON_SM_90)}
    assert {kind.split(":")[0] for kind in with_sm_90} == {*faults.ON_SM_90} - {"fence.proxy"} | {"fence.proxy.async"}


def program(*lines):
    """A kernel's PTX; %r1 and %p1 are the only values that anything uses."""
    return "\n".join([*lines, "setp.lt.s32 %p1, %r1, 8;", "@%p1 st.global.b32 [%rd1], %r1;"])


def test_what_follows_from_a_change_is_computed_twice():
    lines = program("add.s32 %r2, %r0, 1;", "shl.b32 %r1, %r2, 2;", "mov.b32 %r3, %r0;").split("\n")
    text = slices.doubled(lines, 0, "add.s32 %r2, %r0, 2;").split("\n")
    assert text[:4] == ["add.s32 %r9000002, %r0, 2;", lines[0], "shl.b32 %r9000001, %r9000002, 2;", lines[1]]
    # the comparison and the store are where the two would differ
    assert sum("st.global.b32 [0]" in line for line in text) == 2
    assert text.count(lines[2]) == text.count(lines[4]) == 1
    assert not any("%r9000003" in line for line in text)


def test_a_load_without_its_mask_is_followed():
    lines = program("mov.b32 %r1, 0;", "@%p2 ld.global.b32 %r1, [%rd2];").split("\n")
    text = slices.doubled(lines, 1, "ld.global.b32 %r1, [%rd2];").split("\n")
    assert text[:4] == ["mov.b32 %r9000001, 0;", lines[0], "ld.global.b32 %r9000001, [%rd2];", lines[1]]
    assert slices.doubled(["st.global.b32 [%rd1], %r1;"], 0, "st.global.b32 [%rd1], %r2;") is None


def test_a_change_of_what_is_no_value_is_not_computed_twice():
    lines = program("bar.sync 0;").split("\n")
    assert slices.doubled(lines, 0, "") is None
    fault = planted.Fault("barrier: none", 1, "bar.sync 0;", "\n".join(["", *lines[1:]]))
    assert not list(judged.proofs("\n".join(lines), fault))


@pytest.mark.parametrize(
    ("line", "becomes"),
    [
        ("bar.sync 0;", {"barrier: none": ""}),
        ("cp.async.wait_group 1;", {"cp.async: no wait": "", "cp.async: waits for a group less": "cp.async.wait_group 2;"}),
        ("setp.lt.s32 %p1, %r1, %r2;", {"le for lt": "setp.le.s32 %p1, %r1, %r2;"}),
        ("st.global.v2.b32 [ %rd1 + 8 ], { %r1, %r2 };", {
            "global: beside": "st.global.v2.b32 [ %rd1 + 16 ], { %r1, %r2 };",
            "registers of a store swapped": "st.global.v2.b32 [ %rd1 + 8 ], { %r2, %r1 };",
        }),
        # no fault: nothing changes
        ("st.global.v2.b32 [ %rd1 + 8 ], { %r1, %r1 };", {
            "global: beside": "st.global.v2.b32 [ %rd1 + 16 ], { %r1, %r1 };",
        }),
    ],
)  # fmt: skip
def test_faults_are_single_changes_of_a_line(line, becomes):
    found = planted.faults(f"a\n{line}\nb", {2})
    assert {one.kind: one.text for one in found} == {kind: f"a\n{new}\nb" for kind, new in becomes.items()}
    assert not list(planted.faults(f"a\n{line}\nb", {1, 3}))
