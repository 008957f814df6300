"""Measured choices: found where they apply, whoever else writes them."""

import hashlib
import logging
import os
import random
import stat
import subprocess
import sys
import threading
import time
import warnings

import pytest
import torch
from tuned_samples import CUDA, DX, DX_KEY, FORWARD, GPU, KEY, ask, folder_of_its_own, put, table, warned_once  # noqa: F401

from lora_kernels import plan
from lora_kernels.kernels import _configs
from lora_kernels.plan import cache, tuned
from lora_kernels.plan.model import Product

# what is stored is found


def test_what_was_saved_is_found(folder):
    assert ask() is None
    assert tuned.save(GPU, {KEY: ("fused", 2), DX_KEY: ("beta1", None)})
    assert ask() == ("fused", 2)
    assert ask(DX) == ("beta1", None)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(tuned.where(GPU).stat().st_mode) == 0o600
    assert sorted(os.listdir(folder)) == ["save.lock", tuned.where(GPU).name]


def test_saving_adds_to_what_is_there_and_replaces_what_is_the_same():
    assert tuned.save(GPU, {KEY: ("fused", 2)})
    assert tuned.save(GPU, {DX_KEY: ("beta1", None)})
    assert tuned.save(GPU, {KEY: ("padded", None)})
    assert (ask(), ask(DX)) == (("padded", None), ("beta1", None))


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (dict(rows=7000), True), (dict(rows=11585), True), (dict(rows=11586), False), (dict(rows=5000), False),
        (dict(rank=8), True), (dict(rank=17), False), (dict(inner=4097), False), (dict(cols=4096), False),
        (dict(masked=True), False), (dict(backward=True), False),
    ],
)  # fmt: skip
def test_near_rows_and_ranks_share_a_choice(change, same):
    tuned.save(GPU, {KEY: ("fused", 2)})
    assert ask(FORWARD._replace(**change)) == (("fused", 2) if same else None)


def test_dtypes_are_kept_apart():
    q = FORWARD._replace(element=4)
    asked = [(torch.bfloat16, False), (torch.float16, False), (torch.float32, False), (torch.float32, True)]
    assert len({tuned.key(dtype, q, tf32) for dtype, tf32 in asked}) == 4
    tuned.save(GPU, {tuned.key(dtype, q, tf32): ("fused", i) for i, (dtype, tf32) in enumerate(asked)})
    assert [ask(q, dtype, tf32) for dtype, tf32 in asked] == [("fused", i) for i in range(4)]


def test_every_key_there_can_be_is_readable():
    for rows in (0, 1, 3, 2**31, 2**40):
        for product in (FORWARD._replace(rows=rows, rank=512), DX._replace(rows=rows, rank=1)):
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                k = tuned.key(dtype, product, False)
                assert tuned._product(k).inner == product.inner


def test_the_plan_takes_it_and_else_the_rule(monkeypatch):
    kernels = plan.contractions("triton")
    monkeypatch.setattr(kernels, "capability", lambda device: (9, 0))
    ruled = plan.form(CUDA, torch.bfloat16, FORWARD)
    assert ruled == plan.rule(CUDA, torch.bfloat16, FORWARD)
    tuned.save(GPU, {KEY: ("fused", 3)})
    assert plan.form(CUDA, torch.bfloat16, FORWARD) == ruled  # it answers once a product
    plan.forget()
    assert plan.form(CUDA, torch.bfloat16, FORWARD) == plan.Form("fused", 3)
    assert plan.rule(CUDA, torch.bfloat16, FORWARD) == ruled
    assert plan.form(torch.device("cpu"), torch.bfloat16, FORWARD) == plan.Form("fused")


def test_where_it_is_kept(monkeypatch, tmp_path):
    assert cache.directory() == tmp_path / "kept"
    monkeypatch.delenv("LORA_KERNELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(cache.directory()) == "/somewhere/lora_kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", "/home/me")
    assert str(cache.directory()) == "/home/me/.cache/lora_kernels"


@pytest.mark.parametrize("gpu", ["../../etc/passwd", "a\0b", "x" * 300, "", "NVIDIA H200 (MIG 1g)", "显卡", "/"])
def test_a_gpu_of_any_name_has_a_file_inside(folder, gpu):
    assert tuned.where(gpu).parent == folder
    assert tuned._FILE.fullmatch(tuned.where(gpu).name)
    assert len(tuned.where(gpu).name) < 100
    assert tuned.where(gpu) != tuned.where(gpu + "2")


# shipped tables


def ship(monkeypatch, tmp_path, contents):
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / tuned.where(GPU).name.removeprefix("tuned-")).write_text(contents)
    monkeypatch.setattr(tuned.resources, "files", lambda package: tmp_path)


def test_a_shipped_table_is_used_and_the_users_goes_before_it(monkeypatch, tmp_path):
    ship(monkeypatch, tmp_path, table({KEY: ["fused", 1], DX_KEY: ["beta1", None]}))
    assert (ask(), ask(DX)) == (("fused", 1), ("beta1", None))
    tuned.save(GPU, {KEY: ("fused", 5)})
    assert (ask(), ask(DX)) == (("fused", 5), ("beta1", None))


def test_a_bad_shipped_table_is_a_warning(monkeypatch, tmp_path):
    ship(monkeypatch, tmp_path, table(gpu="Another"))
    with pytest.warns(RuntimeWarning, match="it is for 'Another', not for 'NVIDIA H200'.*report"):
        assert ask() is None


def test_tables_are_shipped_with_the_package():
    text = (cache.Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '"tables/*.json"' in text


def test_the_places_that_are_stored_mean_these_tiles():
    """If this fails the tiles were changed: raise `tuned.TILES`, so that old places are not used, and the digest."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    kinds = [(d, tma, masked, tf32) for d in dtypes for tma in (False, True) for masked in (False, True)
             for tf32 in (False, True) if (d.itemsize == 2 and not tf32) or (d.itemsize == 4 and not tma)]  # fmt: skip
    tiles = repr([_configs.matmul_configs(*kind) for kind in kinds])
    assert (tuned.TILES, hashlib.sha256(tiles.encode()).hexdigest()[:12]) == (2, "d4a6669fec4b")


# versions


def test_choices_made_with_other_versions_are_kept_and_not_used(folder, monkeypatch, caplog):
    monkeypatch.setattr(tuned, "versions", lambda: "torch 0.1, triton 0.1, tiles 1")
    tuned.save(GPU, {KEY: ("fused", 2)})
    monkeypatch.undo()
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(folder))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: GPU)
    with caplog.at_level(logging.INFO, "lora_kernels"):
        assert [ask(), ask(), ask(DX)] == [None] * 3
    assert len(caplog.records) == 1
    assert "torch 0.1, triton 0.1, tiles 1" in caplog.text
    assert f"torch {torch.__version__}" in caplog.text
    tuned.save(GPU, {KEY: ("fused", 3)})
    assert ask() == ("fused", 3)
    ((_, kept),) = tuned.stored_tables()
    assert kept.choices["torch 0.1, triton 0.1, tiles 1"] == {KEY: ("fused", 2)}


def test_a_table_does_not_grow_without_end(folder):
    old = {f"bfloat16 forward 1x{i}x{10**12} r16": ["fused", 0] for i in range(1, 5001)}
    put(folder, table(tables={"torch 0.1": old, "torch 0.2": old}))
    new = {f"bfloat16 forward {2**39}x{10**12 + i}x{10**12} r512": ("padded", None) for i in range(8000)}
    assert tuned.save(GPU, new)
    assert tuned.where(GPU).stat().st_size < cache.MOST_BYTES
    ((_, kept),) = tuned.stored_tables()
    assert {made_with: len(choices) for made_with, choices in kept.choices.items()} == {
        "torch 0.2": tuned._MOST_CHOICES - 8000, tuned.versions(): 8000,
    }  # fmt: skip
    newest = {KEY: ("fused", 1)}
    assert tuned.save(GPU, newest)
    assert ask() == ("fused", 1)


def test_clear_removes_tables_and_nothing_else(folder):
    tuned.save(GPU, {KEY: ("fused", 2)})
    tuned.save("Another", {KEY: ("fused", 2)})
    put(folder, b"broken")
    (folder / "mine.json").write_text("{}")
    assert len(tuned.clear()) == 2
    assert sorted(os.listdir(folder)) == ["mine.json", "save.lock"]
    assert ask() is None
    assert tuned.clear() == []


# threads and processes


def in_threads(count, work):
    failures = []

    def guarded(i):
        try:
            work(i)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_threads_that_save_lose_nothing():
    in_threads(8, lambda i: tuned.save(GPU, {f"bfloat16 forward 1x{i + 1}x1 r16": ("fused", i)}))
    for i in range(8):
        assert ask(Product(1, i + 1, 1, 16, 2)) == ("fused", i)


def test_threads_that_look_up_load_once_and_warn_once(folder, monkeypatch):
    put(folder, b"broken")
    loads, stock = [], cache.read
    monkeypatch.setattr(cache, "read", lambda *args: (loads.append(1), time.sleep(0.01), stock(*args))[2])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        in_threads(8, lambda i: ask())
    assert (len(loads), len(seen)) == (1, 1)


SAVES = """
import sys
from lora_kernels.plan import tuned
who, rounds = int(sys.argv[1]), int(sys.argv[2])
for i in range(rounds):
    assert tuned.save("NVIDIA H200", {f"bfloat16 forward 1x{who}x{i + 1} r16": ("fused", who)})
    assert next(tuned.stored_tables())[1].choices
    print("saved" if i == 0 else "", end="\\n" if i == 0 else "", flush=True)
"""


def start(script, *args):
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", script, *map(str, args)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_processes_that_save_lose_nothing(folder):
    running = [start(SAVES, who, 50) for who in (1, 2)]
    for process in running:
        _, said = process.communicate(timeout=1000)
        assert process.returncode == 0, said
    for who in (1, 2):
        assert all(ask(Product(1, who, i + 1, 16, 2)) == ("fused", who) for i in range(50))


@pytest.mark.slow
def test_a_process_killed_while_it_saves_leaves_a_good_table(folder):
    draw = random.Random(0)
    for _ in range(2):
        process = start(SAVES, 1, 10**6)
        assert process.stdout.readline() == "saved\n"
        time.sleep(draw.random() * 0.05)
        process.kill()
        process.communicate()
        tuned.forget()
        assert ask(Product(1, 1, 1, 16, 2)) == ("fused", 1)
    assert tuned.save(GPU, {KEY: ("fused", 2)})  # its lock died with it


HOLDS = """
from lora_kernels.plan import tuned
with tuned.tuning():
    print("held", flush=True)
    input()
"""


@pytest.mark.slow
def test_one_tuner_at_a_time_across_processes(folder):
    process = start(HOLDS)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(tuned.Busy, match=rf"process {process.pid} "), tuned.tuning():
        pytest.fail("two hold it")
    assert tuned.save(GPU, {KEY: ("fused", 2)})  # what is not tuning may still save
    process.communicate("\n", timeout=1000)
    with tuned.tuning():
        pass


def test_one_tuner_at_a_time_across_threads():
    with tuned.tuning(), pytest.raises(tuned.Busy, match=rf"this process \({os.getpid()}\)"), tuned.tuning():
        pytest.fail("two hold it")
    with tuned.tuning():
        pass


def test_a_lock_file_with_nonsense_in_it_is_no_problem(folder):
    folder.mkdir(mode=0o700)
    (folder / "tune.lock").write_bytes(b"\xff\x1b[31m" * 100)
    with tuned.tuning():
        assert (folder / "tune.lock").read_text() == str(os.getpid())


@pytest.mark.slow
def test_importing_reads_nothing():
    script = (
        "import sys\n"
        "opened = []\n"
        "sys.addaudithook(lambda event, args: event in ('open', 'os.listdir') and opened.append(str(args[0])))\n"
        "import lora_kernels, lora_kernels.plan.tuned, lora_kernels.plan\n"
        "assert not [path for path in opened if 'kept' in path or 'tables' in path.split('/')], opened\n"
        "import torch\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stderr
