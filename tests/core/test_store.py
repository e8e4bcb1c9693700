"""Kept arrays come back to the bit or not at all; bytes and age are bounded; a bad disk is no error."""

import errno
import hashlib
import logging
import os
import stat
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.core import packed
from mmjax.core.errors import InputError
from mmjax.core.packed import pack, unpack
from mmjax.core.store import Store


def name(n: int) -> str:
    return hashlib.sha256(str(n).encode()).hexdigest()


def arrays(n: int, size: int = 100) -> dict[str, np.ndarray]:
    return {"tokens": np.full(size, n, np.float32)}


def files(folder) -> list:
    return sorted(folder.iterdir())


def equal(found, wanted) -> bool:
    return found.keys() == wanted.keys() and all(
        found[k].dtype == x.dtype and found[k].shape == x.shape and found[k].tobytes() == x.tobytes()
        for k, x in wanted.items()
    )


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "a" / "features"


def make(folder, **changes) -> Store:
    return Store(**({"folder": folder, "disk": 2**20, "memory": 0} | changes))


@pytest.mark.parametrize("dtype", packed.DTYPES)
def test_arrays_come_back_to_the_bit(folder, rng, dtype):
    dtype = jnp.dtype(dtype)
    values = rng.integers(0, 256, (3, 5, dtype.itemsize), np.uint8)
    values = values.astype(bool) if dtype.name == "bool" else values.view(dtype)  # NaN and denormals among them
    given = {"odd": np.ones(3, np.uint8), "a": values, "none": np.zeros((0, 4), dtype), "one": values[0, 0, 0]}
    for kept in (make(folder), Store(memory=2**20)):
        assert kept.get(name(1)) is None
        kept.put(name(1), given)
        found = kept.get(name(1))
        assert equal(found, {k: np.asarray(x) for k, x in given.items()})
        assert not found["a"].flags.writeable
        assert all(x.flags.aligned for x in found.values())
    assert equal(make(folder).get(name(1)), {k: np.asarray(x) for k, x in given.items()})


def test_what_was_put_does_not_change_with_the_caller():
    kept, mine = Store(memory=2**20), arrays(1)
    kept.put(name(1), mine)
    mine["tokens"][:] = 7
    assert equal(kept.get(name(1)), arrays(1))


def test_files_are_private_and_named_by_hash(folder):
    make(folder).put(name(1), arrays(1))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    [file] = files(folder)
    assert file.name == f"{name(1)}.arrays"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize("key", ["", "a" * 63, "../" + "a" * 61, "A" * 64, "a" * 64 + "\n"])
def test_a_key_is_a_hash(folder, key):
    kept = make(folder)
    for use in (kept.get, lambda k: kept.put(k, arrays(1))):
        with pytest.raises(InputError, match="is not 64 hexadecimal digits"):
            use(key)


def test_bounds_are_checked():
    for wrong in ({"memory": -1}, {"age": 0.0}, {"folder": Path("x")}):
        with pytest.raises(InputError, match="keeps nothing"):
            Store(**wrong)
    with pytest.raises(InputError, match="is of type object"):
        Store(memory=100).put(name(1), {"a": np.array([None])})


def test_memory_holds_what_was_used_last():
    kept = Store(memory=10 * 400)
    for n in range(10):
        kept.put(name(n), arrays(n))
    assert kept.get(name(0)) is not None  # now the one used last
    kept.put(name(10), arrays(10))
    assert [n for n in range(11) if kept.get(name(n)) is None] == [1]
    kept.put(name(10), arrays(10))  # again: it counts once
    assert sum(kept.get(name(n)) is not None for n in range(11)) == 10
    kept.put(name(11), arrays(11, 200))  # over an eighth of the bytes
    assert kept.get(name(11)) is None


def used(folder, n: int, ago: float) -> None:
    """As if it had been used last so many seconds ago, and written long before."""
    os.utime(folder / f"{name(n)}.arrays", (time.time() - ago, time.time() - 1000))


def test_disk_holds_what_was_used_last(folder, caplog):
    one = len(pack(name(0), arrays(0)))
    kept = make(folder, disk=16 * one)
    for n in range(12):
        kept.put(name(n), arrays(n))
        used(folder, n, 100 - n)
    assert len(files(folder)) == 12
    assert kept.get(name(0)) is not None
    kept.put(name(12), arrays(12))
    assert [n for n in range(13) if kept.get(name(n)) is None] == [1]
    for n in (13, 14):
        kept.put(name(n), arrays(n, 1000))  # over an eighth of the bytes
        assert kept.get(name(n)) is None
    assert [r.message.count("are not kept") for r in caplog.records] == [1]
    assert len(files(folder)) == 12


def test_age_is_since_it_was_written(folder):
    for kept in (Store(memory=2**20, age=100.0), make(folder, age=100.0), make(folder, memory=2**20, age=100.0)):
        kept.put(name(1), arrays(1))
        with pytest.MonkeyPatch.context() as patch:
            now = time.time()
            for later, there in ((90, True), (99, True), (-30, True), (-90, False)):
                patch.setattr(time, "time", lambda at=now + later: at)
                assert (kept.get(name(1)) is not None) == there, later
                if not there:
                    patch.setattr(time, "time", lambda at=now: at)
                    kept.put(name(1), arrays(1))
            patch.setattr(time, "time", lambda at=now + 102: at)
            assert kept.get(name(1)) is None
    assert not files(folder)


def test_a_sweep_takes_what_is_too_old_and_what_was_left_behind(folder):
    kept = make(folder, age=1000.0)
    kept.put(name(1), arrays(1))
    kept.put(name(2), arrays(2))
    old = time.time() - 2000
    os.utime(folder / f"{name(1)}.arrays", (time.time(), old))
    left = [folder / f".{name(3)}.{'0' * 15}{n}.tmp" for n in range(2)]
    for file in (*left, folder / "notes.txt"):
        file.write_bytes(b"half")
    os.utime(left[0], (old, old))
    os.utime(folder / "notes.txt", (old, old))  # another's
    make(folder, age=1000.0).put(name(4), arrays(4))
    names = {f"{name(2)}.arrays", f"{name(4)}.arrays", left[1].name, "notes.txt"}
    assert {file.name for file in files(folder)} == names


def test_every_flipped_bit_and_every_cut_is_seen(folder):
    kept = make(folder)
    kept.put(name(1), arrays(1, 8))
    file = folder / f"{name(1)}.arrays"
    whole = file.read_bytes()
    damaged = [bytes(b ^ (1 << n % 8) if i == n else b for i, b in enumerate(whole)) for n in range(len(whole))]
    damaged += [whole[:n] for n in range(len(whole))] + [whole + b"\0", whole * 2, b"\0" * len(whole)]
    for data in damaged:
        file.write_bytes(data)
        assert kept.get(name(1)) is None
        assert not file.exists()
    assert kept.counts.damaged == len(damaged)
    kept.put(name(1), arrays(1, 8))
    assert equal(kept.get(name(1)), arrays(1, 8))


def test_a_file_under_another_name_is_not_returned(folder):
    kept = make(folder)
    kept.put(name(1), arrays(1))
    (folder / f"{name(1)}.arrays").rename(folder / f"{name(2)}.arrays")
    assert kept.get(name(2)) is None
    (folder / f"{name(3)}.arrays").symlink_to("/dev/zero")
    assert kept.get(name(3)) is None
    kept.put(name(5), arrays(5))
    (folder / f"{name(5)}.arrays").rename(folder.parent / "elsewhere")
    (folder / f"{name(5)}.arrays").symlink_to(folder.parent / "elsewhere")
    assert kept.get(name(5)) is None
    os.mkfifo(folder / f"{name(4)}.arrays")
    assert kept.get(name(4)) is None  # and does not wait for ever


def test_headers_of_other_formats_are_refused():
    def signed(body: bytes) -> bytes:
        return body + hashlib.sha256(body).digest()

    start = packed.MAGIC + b'{"key": "%s", "arrays": ' % name(1).encode()
    for about in (b'{"a": ["float32", [2]]}', b'{"a": ["object", [1]]}', b'{"a": 1}', b"[]", b'{"a": ["int8", [-4]]}'):
        with pytest.raises(InputError, match="make it again"):
            unpack(name(1), signed(start + about + b"}\n1234"))
    assert unpack(name(1), signed(start + b'{"a": ["int8", [4]]}}\n1234'))["a"].tolist() == [49, 50, 51, 52]
    for body in (b"", b"mmjax arrays 2\n{}\n", packed.MAGIC, packed.MAGIC + b"x" * 5000 + b"\n"):
        with pytest.raises(InputError):
            unpack(name(1), signed(body))


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_full_disk_ends_the_writing_and_is_said_once(folder, caplog, monkeypatch):
    kept = make(folder)
    kept.put(name(1), arrays(1))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    kept.put(name(2), arrays(2))
    kept.put(name(3), arrays(3))
    assert warnings(caplog) == [f"nothing more is kept in {folder}: No space left on device"]
    assert [file.name for file in files(folder)] == [f"{name(1)}.arrays"]  # the half written one is gone
    assert equal(kept.get(name(1)), arrays(1))
    assert kept.get(name(2)) is None


def test_a_folder_that_cannot_be_used_is_said_once(tmp_path, caplog, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    for folder, why in (
        (tmp_path / "file", "not a folder"),
        (tmp_path / "file" / "below", "Not a directory"),
        (tmp_path / "open", "others may write there"),
    ):
        caplog.clear()
        kept = Store(folder=folder, disk=2**20, memory=2**20)
        for n in range(2):
            kept.put(name(n), arrays(n))
            assert equal(kept.get(name(n)), arrays(n))  # from memory
        assert len(warnings(caplog)) == 1
        assert why in warnings(caplog)[0]
    assert not files(tmp_path / "open")
    caplog.clear()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    (tmp_path / "theirs").mkdir()
    assert Store(folder=tmp_path / "theirs", disk=100).folder is None


def test_a_folder_that_goes_away_is_said_once(folder, caplog):
    kept = make(folder)
    kept.put(name(1), arrays(1))
    for file in files(folder):
        file.unlink()
    folder.rmdir()
    for n in range(3):
        kept.put(name(n), arrays(n))
        assert kept.get(name(n)) is None
    assert warnings(caplog) == [f"nothing more is kept in {folder}: it is gone"]


def test_a_file_that_cannot_be_read_just_now_is_not_removed(folder, monkeypatch):
    kept = make(folder)
    kept.put(name(1), arrays(1))
    real = os.open

    def busy(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "open", busy)
    assert kept.get(name(1)) is None
    monkeypatch.setattr(os, "open", real)
    assert equal(kept.get(name(1)), arrays(1))
