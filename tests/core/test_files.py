import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from mmjax.core import files
from mmjax.core.errors import InputError


def test_write_atomic_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    files.write_atomic(path, "é")
    assert path.read_bytes() == "é".encode()
    files.write_atomic(path, b"\x00two")
    assert path.read_bytes() == b"\x00two"
    assert os.listdir(tmp_path) == ["a.json"]


def test_write_atomic_honours_the_umask(tmp_path):
    old = os.umask(0o022)
    try:
        files.write_atomic(tmp_path / "a", b"")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_write_atomic_on_a_full_disk_keeps_the_old_content(tmp_path, monkeypatch, call):
    path = tmp_path / "a"
    files.write_atomic(path, b"old")

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(InputError, match=r"cannot write .*/a: no space is left on the disk"):
        files.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_write_atomic_passes_other_errors(tmp_path):
    with pytest.raises(FileNotFoundError):
        files.write_atomic(tmp_path / "none" / "a", b"")


def test_lock_has_one_holder_and_names_it(tmp_path):
    with files.lock_directory(tmp_path):
        sentence = rf"^{tmp_path} is in use by process {os.getpid()}; "
        with pytest.raises(InputError, match=sentence), files.lock_directory(tmp_path):
            pass
    with files.lock_directory(tmp_path):
        pass


def test_lock_that_cannot_be_read_still_holds(tmp_path):
    with files.lock_directory(tmp_path):
        (tmp_path / ".lock").write_bytes(b"\xff?")
        with pytest.raises(InputError, match="in use by another process"), files.lock_directory(tmp_path):
            pass


def test_lock_waits(tmp_path):
    with files.lock_directory(tmp_path):
        start = time.monotonic()
        with pytest.raises(InputError), files.lock_directory(tmp_path, wait=0.2):
            pass
        assert time.monotonic() - start >= 0.2


HOLD = """
import os, sys, time
sys.path.insert(0, sys.argv[2])
from mmjax.core.files import lock_directory
with lock_directory(sys.argv[1]):
    if os.fork() == 0:
        time.sleep(30)  # a worker that outlives its parent
        os._exit(0)
    print("held", flush=True)
    time.sleep(30)
"""


def test_lock_ends_with_its_process_though_a_forked_child_lives(tmp_path, pytestconfig):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), str(pytestconfig.rootpath)],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match=f"process {holder.pid};"), files.lock_directory(tmp_path):
            pass
        holder.kill()
        holder.wait()
        with files.lock_directory(tmp_path, wait=2.0):
            pass
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.wait()
        holder.stdout.close()


def test_require_space(tmp_path):
    files.require_space(tmp_path / "not" / "yet", 1, "unpack")
    with pytest.raises(InputError, match=r"cannot unpack in .*/yet: it takes 1,000,000,000,000.0 MB and the disk has"):
        files.require_space(tmp_path / "not" / "yet", 10**18, "unpack")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "x"), "no space is left"),
        (OSError(errno.EFBIG, "x"), "larger than the file system"),
        (OSError(errno.EDQUOT, "x"), "quota is used up"),
        (OSError(errno.EROFS, "x"), "read-only"),
        (PermissionError(errno.EACCES, "x"), "permission is denied"),
        (ValueError("RESOURCE_EXHAUSTED: Failed to write 9 bytes: No space left on device [28]"), "no space is left"),
        (RuntimeError("Disk quota exceeded"), "quota is used up"),
        (ExceptionGroup("two", [KeyError(1), OSError(errno.ENOSPC, "x")]), "no space is left"),
    ],
)
def test_disk_errors_are_one_sentence_with_and_without_wrapping(error, says):
    with pytest.raises(InputError, match=rf"^cannot save /here: .*{says}.*;"), files.disk_errors("save", "/here"):
        raise error
    with pytest.raises(InputError, match=says), files.disk_errors("save", "/here"):
        raise RuntimeError("outer") from error

    def handle():
        try:
            raise error
        except Exception:
            raise KeyError("while handling")  # noqa: B904

    with pytest.raises(InputError, match=says), files.disk_errors("save", "/here"):
        handle()


def test_disk_errors_pass_what_is_none():
    with pytest.raises(ValueError, match=r"^other$"), files.disk_errors("save", "/here"):
        raise ValueError("other")
    with pytest.raises(FileNotFoundError), files.disk_errors("save", "/here"):
        os.stat("/does/not/exist")
    with pytest.raises(InputError, match=r"^mine$"), files.disk_errors("save", "/here"):
        raise InputError("mine") from OSError(errno.ENOSPC, "x")
