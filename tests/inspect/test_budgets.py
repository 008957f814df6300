"""Every budget of `lora-kernels inspect` can be broken, the stored ones too, and its options say what is wrong."""

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from lora_kernels import cli
from lora_kernels.cli import inspect
from lora_kernels.inspect.binary import BinaryFacts, Loop, late_stores
from lora_kernels.inspect.budgets import broken_budgets
from lora_kernels.inspect.compiled import CASES, QUICK
from lora_kernels.inspect.compiled import STORED as STORAGES
from lora_kernels.inspect.kernel import Case, Kernel
from lora_kernels.inspect.stored import budget_file, regressions, renew

GPU = SimpleNamespace(num_sms=132, shared=232_448)


def kernel(name, constants, case=None, arch="sm_90", programs=132, **changes):
    """A kernel that keeps every budget; `changes` are of its facts, `loop_` those of its K loop."""
    if name == "matmul_expand":
        mma, loop = {"HGMMA.64x256x16": 4}, Loop(83, 4, 1, 1, 2, 0, {})
    else:
        mma, loop = {"HGMMA.64x16x16": 8}, Loop(137, 8, 1, 1, 0, 10, {128: 10})
    facts = BinaryFacts(160, 0, 100_000, 2, mma, 8, 0, {128: 20}, {128: 4}, loop, [], False, "waits")
    if name == "dequantize":
        # 32 weights a thread
        changes = dict(mma={}, loop=None, instructions=12 * 32, loads={128: 1, 32: 35, 8: 1}) | changes
    of_loop = {field.removeprefix("loop_"): changes.pop(field) for field in list(changes) if field.startswith("loop_")}
    facts = replace(facts, **{"loop": replace(loop, **of_loop), **changes})
    return Kernel(arch, name, case or Case(8192, 4096, 4096, 16), False, constants, 4, 4, programs, "hash", facts)


MATMUL = dict(
    NUM_SOURCES=2, NUM_MASKED=0, USE_TMA=True, PDL=True, PRECISION="ieee", BLOCK_M=128, BLOCK_N=256, BLOCK_K=64
)
SHRINK = dict(HAS_DROPOUT=False, PRECISION="ieee", BLOCK_M=64, BLOCK_K=128, BLOCK_R=16)
WGRAD = dict(HAS_KEEP=False, HAS_SHRINK=False, PRECISION="ieee", BLOCK_M=64, BLOCK_W=128, BLOCK_T=16)
DEQUANTIZE = dict(FORMAT="4 bits", NESTED=True, BLOCK=4096)
STORED = Case(8192, 4096, 4096, 0, storage="nf4 nested")
FP32 = Case(8192, 4096, 4096, 16, "fp32")
STRIDED = Case(8192, 4096, 4096, 16, strided=True)

GOOD = [
    kernel("matmul_expand", MATMUL),
    kernel("matmul_expand", MATMUL | dict(BLOCK_K=128), loop_instructions=109),
    kernel("matmul_expand", MATMUL | dict(USE_TMA=False, PDL=False), arch="sm_80", dependent="", loop_async_copies=6),
    kernel("matmul_expand", MATMUL | dict(USE_TMA=False), STRIDED, loop_instructions=600, loop_loads={16: 64}),
    kernel("matmul_expand", MATMUL | dict(USE_TMA=False), FP32, mma={}, loop=None),
    kernel("matmul_expand", MATMUL | dict(NUM_SOURCES=0), loop_tma_loads=0, loop_loads={128: 2}),
    kernel("shrink", SHRINK),
    kernel("shrink", SHRINK | dict(HAS_DROPOUT=True), loop_instructions=1413, loop_waits=2, loop_arrives=2),
    kernel("shrink", SHRINK | dict(BLOCK_M=16), mma={"HMMA.16816": 8}),
    kernel("shrink", SHRINK, STRIDED, loop_loads={16: 80}),
    kernel("wgrad", WGRAD, loop_loads={128: 9}),
    kernel("wgrad", WGRAD | dict(HAS_KEEP=True), loop_loads={128: 9, 32: 2}, loop_async_copies=11, loop_waits=4),
    kernel("wgrad", WGRAD | dict(HAS_SHRINK=True), loop_waits=2, loop_arrives=2),
    kernel("wgrad", WGRAD | dict(BLOCK_M=16), loop_loads={128: 2, 32: 1}),  # 32 bits a thread are all there is
    kernel("dequantize", DEQUANTIZE, STORED),
    kernel("dequantize", DEQUANTIZE, replace(STORED, k=4095), instructions=20 * 32, loads={8: 16}, stores={16: 32}),
    kernel("dequantize", DEQUANTIZE | dict(FORMAT="fp8"), replace(STORED, storage="fp8 row"), loads={128: 2, 32: 2}),
]

SEVERAL = {  # kernels of several projections, and what tells them from a layer's
    "3 rows": kernel("shrink", SHRINK | dict(ROWS=3), loop_waits=3, loop_arrives=3),
    "masked 2 rows": kernel(
        "wgrad", WGRAD | dict(HAS_KEEP=True, ROWS=2), loop_loads={128: 9, 32: 2}, loop_async_copies=11, loop_waits=4
    ),
    "tma 6 in 3 out": kernel("matmul_expand", MATMUL | dict(NUM_SOURCES=6, NUM_OUTPUTS=3), loop_instructions=119),
    "tma masked 3 in 3 masks": kernel("matmul_expand", MATMUL | dict(NUM_SOURCES=3, NUM_MASKED=3)),
    "shrinks silu 3 rows": kernel(
        "wgrad",
        WGRAD | dict(HAS_SHRINK=True, ROWS=3, ACTIVATION="silu", ACCUMULATE=(False,) * 3),
        loop_loads={128: 9},
        loop_waits=6,
        loop_arrives=6,
    ),
    "adds 2 rows": kernel("wgrad", WGRAD | dict(ROWS=2, ACCUMULATE=(False, True)), loop_loads={128: 9}),
    "tma masked": kernel("matmul_expand", MATMUL | dict(NUM_SOURCES=1, NUM_MASKED=1, NUM_OUTPUTS=1)),
}

BAD = [
    (kernel("shrink", SHRINK, spills=72), "spills 72"),
    (kernel("shrink", SHRINK, spills=8), "spills 8"),
    (kernel("shrink", SHRINK, arch="sm_80", spills=40), "spills 40"),
    (kernel("shrink", SHRINK, shared=232_449), "takes 232449 B of shared memory of 232448"),
    (kernel("shrink", SHRINK, narrow_products=["%5 = arith.muli"]), "multiplies in 32 bits for a pointer: %5"),
    (kernel("shrink", SHRINK, warnings=["C7515"]), "ptxas serialises the tensor cores (C7515)"),
    (kernel("wgrad", WGRAD, both_ways=["2x16x256xbf16"]), "a buffer too few: 2x16x256xbf16"),
    (
        kernel("shrink", SHRINK, overwritten=["MOV R4"] * 3),
        "registers that tensor cores may still read, 3 times: MOV R4",
    ),
    (kernel("shrink", SHRINK, arch="gfx942", late_stores=1), "while stores of other waves are on their way, 1 times"),
    (kernel("shrink", SHRINK, FP32, tf32=True), "rounds fp32 to TF32 unasked"),
    (kernel("shrink", SHRINK, mma={}, loop=None), "does not use tensor cores"),
    (kernel("wgrad", WGRAD, loop=None), "does not use tensor cores in a loop"),
    (kernel("wgrad", WGRAD | dict(PRECISION="tf32"), FP32, mma={}, loop=None), "does not use tensor cores"),
    (kernel("matmul_expand", MATMUL, arch="gfx942", mma={}, loop=None), "does not use tensor cores"),
    (kernel("shrink", SHRINK, mma={"HMMA.16816": 8}), "falls back to mma.sync"),
    (kernel("wgrad", WGRAD, mma={"HGMMA.64x16x16": 4, "HMMA.16816": 8}), "falls back to mma.sync"),
    (kernel("matmul_expand", MATMUL, loop_waits=4), "waits 4 times, for 1 dots"),
    (kernel("matmul_expand", MATMUL | dict(NUM_MASKED=1), loop_waits=2), "waits 2 times, for 1 dots"),
    (kernel("matmul_expand", MATMUL, loop_arrives=4), "begins its tensor cores 4 times"),
    (kernel("wgrad", WGRAD | dict(HAS_SHRINK=True), loop_waits=3), "waits 3 times, for 2 dots"),
    (kernel("shrink", SHRINK, per_sm=0), "does not fit a multiprocessor"),
    (kernel("shrink", SHRINK, per_sm=1), "leaves a multiprocessor one program"),
    (kernel("matmul_expand", MATMUL, programs=265), "launches 265 programs at once and 264 fit"),
    (kernel("matmul_expand", MATMUL, dependent="waits late"), "before it touches memory"),
    (kernel("matmul_expand", MATMUL, dependent="waits to write"), "before it touches memory"),
    (kernel("matmul_expand", MATMUL, dependent=""), "before it touches memory"),
    (kernel("wgrad", WGRAD | dict(READY=True), dependent="waits late"), "before it writes"),
    (kernel("matmul_expand", MATMUL, loop_tma_loads=1), "loads 1 tiles by descriptor"),
    (kernel("matmul_expand", MATMUL, loop_loads={128: 4}), "loads by pointer in the K loop: 4"),
    (kernel("matmul_expand", MATMUL, loop_instructions=101), "has 101 instructions in the K loop, more than 100"),
    (kernel("matmul_expand", MATMUL, arch="sm_100", loop_instructions=141), "K loop, more than 140"),
    (kernel("matmul_expand", MATMUL | dict(USE_TMA=False, PDL=False), arch="sm_80"), "is not pipelined"),
    (kernel("shrink", SHRINK, loop_loads={128: 8, 64: 4}), "loads {64: 4} (bits: count) in the K loop"),
    (kernel("shrink", SHRINK, loop_loads={128: 7}), "loads the wide tile in fewer than 128 bits"),
    (
        kernel("dequantize", DEQUANTIZE, STORED, instructions=12 * 32 + 1),
        "takes 385 instructions for 32 weights, more than 12 a",
    ),
    (kernel("dequantize", DEQUANTIZE, STORED, contracted=1), "contracts a product and a sum"),
    (kernel("dequantize", DEQUANTIZE, STORED, arch="gfx942", contracted=2), "contracts a product and a sum"),
    (kernel("dequantize", DEQUANTIZE, STORED, loads={32: 35, 8: 17}), "loads the storage in fewer than 128 bits"),
    (kernel("dequantize", DEQUANTIZE | dict(FORMAT="int8"), STORED, loads={128: 1}), "loads the storage in fewer"),
    (kernel("dequantize", DEQUANTIZE, STORED, stores={128: 2, 64: 4}), "stores W in fewer than 128 bits"),
    (kernel("dequantize", DEQUANTIZE, STORED, spills=8), "spills 8"),
    (kernel("wgrad", WGRAD, loop_loads={128: 8, 32: 4}), "narrower than 128 bits"),
    (kernel("wgrad", WGRAD | dict(HAS_KEEP=True), loop_loads={128: 9, 8: 8}, loop_async_copies=17), "narrower than"),
    (kernel("wgrad", WGRAD | dict(HAS_KEEP=True), loop_loads={128: 9, 32: 2}, loop_async_copies=9), "of these 9 ahead"),
]


@pytest.mark.parametrize("good", GOOD, ids=str)
def test_a_good_kernel_breaks_nothing(good):
    assert not list(broken_budgets(good, GPU))


@pytest.mark.parametrize(("bad", "finding"), BAD, ids=[finding for _, finding in BAD])
def test_every_budget_can_be_broken(bad, finding):
    assert any(finding in words for words in broken_budgets(bad, GPU)), list(broken_budgets(bad, GPU))


def test_a_few_addresses_may_spill_on_sm_80():
    assert "spills" not in " ".join(broken_budgets(kernel("shrink", SHRINK, arch="sm_80", spills=32), GPU))


STORE, WAIT, BARRIER, COUNT = (
    "\tbuffer_store_dwordx4 v[2:5], v6, s[8:11], 0 offen\n",
    "\ts_waitcnt vmcnt(0)\n",
    "\ts_barrier\n",
    "\tglobal_atomic_add v3, v3, v4, s[4:5] sc0\n",
)


def test_a_wave_waits_for_its_stores_before_the_barrier():
    assert late_stores(STORE + WAIT + BARRIER + COUNT) == 0
    assert late_stores(STORE + BARRIER + WAIT + COUNT) == 1  # what gfx942 gets by itself: the atomic's own wave waits
    assert late_stores(STORE + WAIT + STORE + BARRIER + COUNT) == 1
    assert late_stores(COUNT + (STORE + "\ts_waitcnt lgkmcnt(0)\n" + BARRIER + COUNT) * 2) == 2


# stored budgets


def test_stored_budgets_notice_what_grew(tmp_path):
    path = budget_file(tmp_path, "3.9.0")
    assert path.name == "3.9.json"
    kept = kernel("matmul_expand", MATMUL)
    renew([kept, kernel("shrink", SHRINK)], path)
    assert not list(regressions([kept], path))
    allowed = kernel("matmul_expand", MATMUL, registers=168, loop_instructions=91, shared=99_999)
    assert not list(regressions([allowed], path))
    for growth, words in (
        (dict(registers=169), "registers 169, stored 160"),
        (dict(shared=100_001), "shared 100001, stored 100000"),
        (dict(loop_instructions=92), "loop 92, stored 83"),
    ):
        (found,) = regressions([kernel("matmul_expand", MATMUL, **growth)], path)
        assert found == f"sm_90 matmul_expand bf16 128x256x64 4 warps 4 stages tma: {words}"


def test_stored_budgets_want_every_kernel_of_their_architectures(tmp_path):
    path = tmp_path / "3.9.json"
    renew([kernel("shrink", SHRINK)], path)
    assert list(regressions([kernel("wgrad", WGRAD)], path)) == [
        "sm_90 wgrad bf16 64x128x16 4 warps 4 stages: no budget is stored"
    ]
    assert not list(regressions([kernel("wgrad", WGRAD, arch="sm_80")], path))  # nothing at all is stored of it


def test_renewal_replaces_an_architecture_and_keeps_the_others(tmp_path):
    path = tmp_path / "3.9.json"
    renew([kernel("shrink", SHRINK), kernel("shrink", SHRINK, arch="sm_80")], path)
    forward, backward = kernel("wgrad", WGRAD, registers=90), kernel("wgrad", WGRAD, loop_instructions=300)
    renew([forward, backward], path)
    assert json.loads(path.read_text()) == {
        "sm_80 shrink bf16 64x128x16 4 warps 4 stages": [160, 100_000, 137],
        "sm_90 wgrad bf16 64x128x16 4 warps 4 stages": [160, 100_000, 300],  # the larger of the two, figure by figure
    }
    assert len(path.read_text().splitlines()) == 4  # a line for each, to be read in a diff


@pytest.mark.parametrize("flags", SEVERAL)
def test_kernels_of_several_projections_go_by_names_of_their_own(flags):
    assert SEVERAL[flags].flags == flags
    assert list(broken_budgets(SEVERAL[flags], GPU)) == []


def test_stored_weights_are_among_the_cases_and_have_names_of_their_own():
    assert {case.storage for case in QUICK} >= set(STORAGES)
    assert {(case.storage, case.dtype) for case in CASES} >= set(itertools.product(STORAGES, ("bf16", "fp16", "fp32")))
    assert str(STORED) == "4096x4096 bf16 from nf4 nested"
    named = kernel("dequantize", DEQUANTIZE, STORED)
    assert str(named) == "sm_90 dequantize bf16 4096 4 warps 4 stages nf4 nested"


def test_several_projections_are_among_the_cases():
    blocks = [case for case in CASES if case.others]
    assert {len(case.others) for case in blocks} == {1, 2, 3}
    assert {case.p > 0 for case in blocks} == {True, False}
    assert {case.dtype for case in blocks} >= {"bf16", "fp32"}
    assert any(case.others for case in QUICK)
    assert any(case.activation for case in QUICK)
    assert str(blocks[0]) == "8192x4096x4096+1024+1024 r=16 bf16 p=0.1"
    mlps = [case for case in CASES if case.activation]
    assert {case.activation for case in mlps} == {"silu", "gelu", "gelu_tanh", "relu2"}
    assert {case.p > 0 for case in mlps} == {True, False}
    assert str(mlps[0]) == "8192x4096x14336 r=16 bf16 p=0.1 mlp silu"


# the command


@pytest.fixture
def inspected(monkeypatch, capsys):
    """Run the command on kernels that are there already; its status and what it printed."""
    monkeypatch.setattr(inspect, "problem", lambda: "")

    def run(kernels, *options):
        monkeypatch.setattr(inspect, "_compile", lambda args: kernels)
        status = cli.main(["inspect", *options])
        return status, capsys.readouterr().out

    return run


def test_a_broken_budget_is_the_exit_status(inspected, tmp_path):
    good, bad = kernel("shrink", SHRINK), replace(kernel("wgrad", WGRAD, spills=8), broken=("spills 8",))
    assert inspected([good])[0] == 0
    status, shown = inspected([good, bad], "--json", str(tmp_path / "i.json"))
    assert status == 1
    assert "sm_90 wgrad bf16 64x128x16 4 warps 4 stages: spills 8" in shown
    assert "2 kernels compiled by Triton" in shown
    assert "1 broken budgets." in shown
    report = json.loads((tmp_path / "i.json").read_text())
    assert report["broken"] == ["sm_90 wgrad bf16 64x128x16 4 warps 4 stages: spills 8"]
    assert report["kernels"][1]["facts"]["loop"]["instructions"] == 137
    assert inspected([good, bad], "--kernel", "shrink")[0] == 0


def test_a_pipe_cuts_nothing(inspected):
    constants = WGRAD | dict(HAS_KEEP=True, HAS_SHRINK=True, ACCUMULATE=(True,) * 3, ROWS=3, ACTIVATION="gelu_tanh")
    shown = inspected([kernel("wgrad", constants, STRIDED, mma={"HGMMA.64x16x16.F32.BF16": 8, "HMMA.16816": 1})])[1]
    (row,) = [line for line in shown.splitlines() if "shrinks adds gelu_tanh 3 rows strided" in line]
    assert "HGMMA.64x16x16.F32.BF16+" in row
    assert row.split()[-1] == "ok"


def test_the_command_renews_and_holds_stored_budgets(inspected, tmp_path):
    options = ("--budgets", str(tmp_path))
    assert "only the rules were held" in inspected([kernel("shrink", SHRINK)], *options)[1]
    assert inspected([kernel("shrink", SHRINK)], *options, "--renew")[0] == 0
    assert inspected([kernel("shrink", SHRINK)], *options)[0] == 0
    status, shown = inspected([kernel("shrink", SHRINK, registers=200)], *options)
    assert status == 1
    assert "registers 200, stored 160" in shown
    assert f"--budgets {tmp_path} --renew" in shown.replace("\n", "")


@pytest.mark.parametrize(("width", "tables"), [(80, 5), (120, 2), (160, 1)])
def test_the_table_fits(width, tables):
    console = inspect.Console(width=width, highlight=False)
    table = inspect._table("sm_90", [*GOOD, *(bad for bad, _ in BAD)])
    with console.capture() as captured:
        console.print(table)
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in captured.get()
    # a line a kernel: two of the title, and for each table its header, three gaps between kernels, and one to the next
    assert len(lines) == 2 + tables * (2 + len(GOOD) + len(BAD) + 3 + 1) - 1
    words = captured.get().split()
    assert words.count("ok") == len(GOOD) + len(BAD)  # those of BAD are not held to their budgets here
    assert set(words) >= {"regs", "spills", "smem", "TMA", "loads", "stores"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--jobs", "0"], "--jobs 0 is not at least 1."),
        (["--renew"], "--renew needs --budgets FOLDER."),
        (["--renew", "--budgets", "b", "--quick"], "--renew stores every kernel"),
    ],
)
def test_options_say_what_is_wrong(inspected, options, words):
    status, shown = inspected([], *options)
    assert status == 2
    assert words in shown


def test_it_does_not_run_beside_the_interpreter(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(__import__("sys").modules, "triton", SimpleNamespace())
    assert cli.main(["inspect"]) == 2
    assert "run this in a process of its own" in capsys.readouterr().out
