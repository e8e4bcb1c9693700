"""One folder of kept features under several processes, kills and flipped bits: right arrays or none, and bounded."""

import os
import random
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mmjax.core import store as stores
from mmjax.core.store import Store

pytestmark = pytest.mark.slow

# Arrays that the key alone decides, so that every process knows what must come back.
WORKER = """
import hashlib, random, sys
from pathlib import Path
import numpy as np
from mmjax.core.store import Store

folder, disk, keys, size, times, seed = Path(sys.argv[1]), *map(int, sys.argv[2:])
store, rng = Store(folder=folder, disk=disk, memory=0), random.Random(seed)
print("ready", flush=True)
for _ in range(times):
    n = rng.randrange(keys)
    key = hashlib.sha256(str(n).encode()).hexdigest()
    wanted = np.random.default_rng(n).integers(0, 2**32, size + n, np.uint32)
    found = store.get(key)
    if found is None:
        store.put(key, {"tokens": wanted})
    elif found.keys() != {"tokens"} or not np.array_equal(found["tokens"], wanted):
        raise SystemExit(f"{n} came back wrong")
assert store.folder is not None, "the folder was given up"
c = store.counts
print(c.disk, c.missed, c.damaged, c.swept)
"""


def start(folder, *numbers) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", WORKER, str(folder), *map(str, numbers)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    return process


def total(folder) -> int:
    """Bytes of all files, whole or not."""
    size = 0
    for entry in os.scandir(folder):
        try:
            size += entry.stat().st_size
        except FileNotFoundError:
            continue
    return size


def test_processes_share_a_small_folder_that_is_damaged_meanwhile(tmp_path):
    """Three write, read and evict at once, and bits of their files are flipped: none ever reads a wrong array."""
    folder, disk = tmp_path / "kept", 40 * 4200
    workers = [start(folder, disk, 60, 1000, 2500, seed) for seed in range(3)]
    rng, most, flipped = random.Random(0), 0, 0
    while any(worker.poll() is None for worker in workers):
        most = max(most, total(folder))
        for file in list(folder.glob("*.arrays"))[:1]:
            try:
                with open(file, "r+b") as opened:
                    place = rng.randrange(os.fstat(opened.fileno()).st_size)
                    opened.seek(place)
                    byte = opened.read(1)[0] ^ (1 << rng.randrange(8))
                    opened.seek(place)
                    opened.write(bytes([byte]))
                flipped += 1
            except OSError:
                continue
        time.sleep(0.002)
    said = []
    for worker in workers:
        out, errors = worker.communicate()
        assert worker.returncode == 0, errors
        said.append([int(n) for n in out.split()])
    found, missed, damaged, swept = np.sum(said, axis=0)
    assert found > 500
    assert missed > 500
    assert swept > 500
    assert 0 < damaged <= flipped
    assert 0 < most <= disk
    assert not list(folder.glob(".*")), "nothing is left half written"


# Dies in the middle of writing its first entry, or when that is whole and not yet renamed.
DYING = """
import os, signal, sys
from pathlib import Path
import numpy as np
from mmjax.core import store as stores

class Half:
    def __init__(self, fd, mode):
        self.fd = fd
    def __enter__(self):
        return self
    def write(self, data):
        os.write(self.fd, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    def __exit__(self, *_):
        return False

if sys.argv[2] == "half":
    stores.open = Half
else:
    stores.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
stores.Store(folder=Path(sys.argv[1]), disk=2**26).put(sys.argv[3] * 64, {"tokens": np.zeros(10000)})
"""


def test_killed_in_a_write(tmp_path):
    """Whatever killed processes leave is whole or is not returned, and what they left half written is swept away."""
    folder, disk, size, rng = tmp_path / "kept", 2**26, 100_000, random.Random(0)
    for n in range(4):
        with start(folder, disk, 12, size, 10**6, n) as process:
            time.sleep(0.05 + rng.random() * 0.3)
            process.send_signal(signal.SIGKILL)
    for how, digit in (("half", "a"), ("whole", "b")):
        code = [sys.executable, "-c", DYING, str(folder), how, digit]
        assert subprocess.run(code, env=os.environ | {"JAX_PLATFORMS": "cpu"}).returncode == -signal.SIGKILL
        assert list(folder.glob(f".{digit * 64}.*.tmp"))
        assert Store(folder=folder, disk=disk).get(digit * 64) is None
    # The next process reads and writes as if nothing had happened.
    with start(folder, disk, 12, size, 40, 99) as process:
        out, errors = process.communicate()
        assert process.returncode == 0, errors
    found, _, damaged, _ = map(int, out.split())
    assert found
    assert not damaged, "a renamed file was not whole"
    old = time.time() - stores.STALE - 1
    for file in folder.glob(".*.tmp"):
        os.utime(file, (old, old))
    Store(folder=folder, disk=disk).put("0" * 64, {"a": np.zeros(1)})
    assert not list(folder.glob(".*.tmp"))


def test_a_file_that_may_not_grow(tmp_path, caplog):
    """What a full disk does, by the system itself: a write ends in the middle."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    store = Store(folder=tmp_path, disk=2**26)
    store.put("a" * 64, {"tokens": np.zeros(10)})
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        for digit in "bc":
            store.put(digit * 64, {"tokens": np.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [record.getMessage() for record in caplog.records] == [f"nothing more is kept in {tmp_path}: File too large"]
    assert [file.name for file in tmp_path.iterdir()] == ["a" * 64 + ".arrays"]
    assert store.get("a" * 64) is not None
