"""Whatever is wrong with a tuned table on disk: one warning, and work goes on."""

import errno
import json
import os
import random
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
from tuned_samples import CUDA, DX, DX_KEY, FORWARD, GPU, KEY, ask, folder_of_its_own, put, table, warned_once  # noqa: F401

from lora_kernels.plan import cache, tuned

HOSTILE = {
    "empty": (b"", "not valid JSON"),
    "corrupt": (b'{"format": 1,\n "gpu": oops', "not valid JSON (line 2)"),
    "cut off": (table().encode()[:-20], "not valid JSON"),
    "not text": (b"\xff\xfe\x00", "codec can't decode"),
    "a pickle": (b"\x80\x04\x95\x10cos\nsystem\n.", "codec can't decode"),
    "nested": (b"[" * 100_000, "nested too deeply"),
    "nested objects": (b'{"a":' * 100_000, "nested too deeply"),
    "huge": (b" " * (cache.MOST_BYTES + 1), "larger than 1048576 bytes"),
    "a list": (b"[1, 2]", 'must have "format"'),
    "null": (b"null", 'must have "format"'),
    "NaN": (table({KEY: ["fused", float("nan")]}), "NaN is not a value"),
    "Infinity": (table().replace("2]", "-Infinity]"), "-Infinity is not a value"),
    "infinite": (table().replace("2]", "1e400]"), "is not the place of a tile"),
    "many digits": (table().replace("2]", "9" * 5000 + "]"), "4300 digits"),
    "twice": (table().replace('"gpu"', '"gpu": "x", "gpu"'), "stands there twice"),
    "unknown field": (table(code="import os"), "and nothing else"),
    "missing field": (json.dumps({"format": 1, "gpu": GPU}), "and nothing else"),
    "format 2": (table(format=2), "its format is 2"),
    "format true": (table(format=True), "its format is True"),
    "format text": (table(format="1"), "its format is '1'"),
    "no name": (table(gpu=[1]), '"gpu" must be the name'),
    "escapes in a name": (table(gpu="\x1b[31m"), '"gpu" must be the name'),
    "other GPU": (table(gpu="NVIDIA A100"), "it is for 'NVIDIA A100'"),
    "tables a list": (table(tables=[]), '"tables" must map'),
    "choices a list": (table(tables={"torch 1": []}), "choices must map"),
    "versions with escapes": (table(tables={"\x1b[2J": {}}), "not a list of versions"),
    "key of nothing": (table({"": ["fused", 2]}), "is not a product"),
    "key with more": (table({KEY + "\n": ["fused", 2]}), "is not a product"),
    "key in other digits": (table({KEY.replace("16", "١٦"): ["fused", 2]}), "is not a product"),
    "value a text": (table({KEY: "fused"}), "is not a strategy"),
    "value too long": (table({KEY: ["fused", 2, 3]}), "is not a strategy"),
    "value empty": (table({KEY: []}), "is not a strategy"),
    "unknown strategy": (table({KEY: ["__import__('os')", None]}), "is not a strategy"),
    "strategy a list": (table({KEY: [["fused"], None]}), "is not a strategy"),
    "negative place": (table({KEY: ["fused", -1]}), "is not the place"),
    "large place": (table({KEY: ["fused", 2**40]}), "is not the place"),
    "place 64": (table({KEY: ["fused", 64]}), "is not the place"),
    "place true": (table({KEY: ["fused", True]}), "is not the place"),
    "place 1.0": (table({KEY: ["fused", 1.0]}), "is not the place"),
    "place for beta1": (table({KEY: ["beta1", 0]}), "is not the place"),
    "joint forward": (table({KEY: ["joint", None]}), "joint cannot compute it"),
    "padded masked": (table({DX_KEY: ["padded", None]}), "padded cannot compute it"),
    "bad among others": (
        table(tables={"torch 1": {KEY: ["fused", -1]}, tuned.versions(): {KEY: ["fused", 1]}}),
        "place",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_is_wrong_is_ignored_with_one_warning(folder, name):
    contents, about = HOSTILE[name]
    put(folder, contents)
    warned_once(about)


def test_saving_over_a_file_that_is_wrong_makes_a_good_one(folder):
    put(folder, b"oops")
    with pytest.warns(RuntimeWarning, match="not valid JSON"):
        assert tuned.save(GPU, {KEY: ("fused", 2)})
    assert ask() == ("fused", 2)


def test_no_contents_whatever_raise_or_choose_what_cannot_be(folder):
    """Two thousand files: a good one with a few bytes changed, cut, doubled."""
    draw, good = random.Random(0), table({KEY: ["fused", 2], DX_KEY: ["beta1", None]}).encode()
    allowed = {("fused", place) for place in range(64)} | {("fused", None), ("beta1", None), ("padded", None), None}
    survived = 0
    for _ in range(2000):
        data = bytearray(good)
        for _ in range(draw.randrange(1, 4)):
            at = draw.randrange(len(data))
            data[at : at + draw.choice((0, 1, 1, 5))] = draw.choice(
                (
                    bytes([draw.randrange(256)]),
                    b"",
                    b"-",
                    b"9" * 30,
                    b'"',
                    b"[",
                    b"}",
                    b"null",
                    b"1e9",
                    bytes(data[at:]),
                )
            )
        try:
            choices = tuned._parse(bytes(data), GPU).choices.get(tuned.versions(), {})
        except ValueError:
            continue
        survived += 1
        assert choices.get(KEY) in allowed
    assert survived < 1500


@pytest.mark.parametrize("mode", [0o622, 0o620, 0o602])
def test_a_file_that_others_can_write_is_not_read(folder, mode):
    put(folder, table(), mode)
    warned_once("can be written by others; chmod go-w it")


def test_a_directory_that_others_can_write_is_not_used(folder):
    put(folder, table())
    folder.chmod(0o777)
    warned_once("can be written by others")
    with pytest.warns(RuntimeWarning, match="cannot store tuned choices"):
        assert not tuned.save(GPU, {KEY: ("fused", 1)})


def test_a_file_of_somebody_else_is_not_read(folder, monkeypatch):
    put(folder, table())
    me = os.geteuid()
    os.chown(tuned.where(GPU), 12345, -1) if me == 0 else monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    warned_once("belongs to another user")


def test_links_are_not_followed(folder, tmp_path):
    path = put(folder, table())
    path.rename(tmp_path / "elsewhere.json")
    path.symlink_to(tmp_path / "elsewhere.json")
    warned_once("it is a symbolic link")
    before = (tmp_path / "elsewhere.json").read_text()
    with warnings.catch_warnings(action="ignore") if sys.version_info >= (3, 11) else warnings.catch_warnings():
        assert tuned.save(GPU, {KEY: ("fused", 7)})
    assert (tmp_path / "elsewhere.json").read_text() == before  # the link was replaced, not what it led to
    assert ask() == ("fused", 7)


def test_a_linked_directory_is_not_used(folder, tmp_path):
    put(folder, table())
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    warned_once("is a symbolic link")


def test_a_file_in_the_place_of_the_directory(folder):
    folder.write_text("")
    warned_once("Not a directory")


def test_what_is_not_a_file_is_not_read(folder):
    folder.mkdir(mode=0o700)
    os.mkfifo(tuned.where(GPU))  # reading it would wait for ever
    warned_once("not a plain file")
    tuned.where(GPU).unlink()
    tuned.where(GPU).mkdir()
    tuned._warned.clear()
    warned_once("Is a directory")


def test_what_cannot_be_read_is_ignored(folder, monkeypatch):
    put(folder, table())
    fail_opening(monkeypatch, tuned.where(GPU).name, PermissionError(errno.EACCES, "Permission denied"))
    warned_once("Permission denied")


def test_nothing_there_is_nothing_to_warn_of(folder, monkeypatch):
    assert ask() is None
    folder.mkdir(mode=0o700)
    tuned.forget()
    assert ask() is None
    monkeypatch.delenv("LORA_KERNELS_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(cache.Path, "home", no_home)
    tuned.forget()
    assert ask() is None
    with pytest.warns(RuntimeWarning, match="a home directory"):
        assert not tuned.save(GPU, {KEY: ("fused", 1)})


def no_home():
    raise RuntimeError("Could not determine home directory.")


def fail_opening(monkeypatch, name, error):
    stock = os.open

    def opening(path, flags, *args, **kwargs):
        if name in str(path):
            raise error
        return stock(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", opening)


@pytest.mark.parametrize("step", ["open", "fsync", "replace", "mkdir", "flock"])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EROFS, "Read-only file system")]
)
def test_a_full_or_read_only_disk_is_one_warning_and_the_old_table_stays(folder, monkeypatch, step, error):
    tuned.save(GPU, {KEY: ("fused", 2)})
    before = tuned.where(GPU).read_bytes()

    def fail(*args, **kwargs):
        raise error

    if step == "open":
        fail_opening(monkeypatch, f".{tuned.where(GPU).name}", error)
    elif step == "mkdir":
        monkeypatch.setattr(cache.Path, "mkdir", fail)
    elif step == "flock":
        monkeypatch.setattr("fcntl.flock", fail)
    else:
        monkeypatch.setattr(os, step, fail)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert [tuned.save(GPU, {KEY: ("fused", 3)}) for _ in range(3)] == [False] * 3
    assert len(seen) == 1
    assert str(folder) in str(seen[0].message)
    assert error.strerror in str(seen[0].message)
    assert tuned.where(GPU).read_bytes() == before
    assert not [name for name in os.listdir(folder) if name.startswith(".")]
    assert ask() == ("fused", 2)


@pytest.fixture
def somebody():
    """Root can write anywhere: be nobody for the while, where this is root."""
    if os.geteuid():
        yield os.geteuid()
        return
    os.seteuid(65534)
    try:
        yield 65534
    finally:
        os.seteuid(0)


def test_a_directory_that_cannot_be_written(monkeypatch, somebody):
    with tempfile.TemporaryDirectory() as place:  # theirs; pytest's own is closed to others
        folder = Path(place, "kept")
        folder.mkdir(mode=0o500)
        assert folder.stat().st_uid == somebody
        monkeypatch.setenv("LORA_KERNELS_CACHE", str(folder))
        with pytest.warns(RuntimeWarning, match="Permission denied"):
            assert not tuned.save(GPU, {KEY: ("fused", 2)})
        assert not any(folder.iterdir())


@pytest.mark.parametrize("choice", [("fused", -1), ("fused", 64), ("joint", None), ("nonsense", None), ("beta1", 3)])
def test_what_could_not_be_read_back_is_not_saved(folder, choice):
    with pytest.raises(ValueError, match=r"place|strategy|cannot"):
        tuned.save(GPU, {KEY: choice})
    assert not folder.exists()
