"""One folder of kept features under several processes, kills and flipped bits: right arrays or none, and bounded."""

import os
import random
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


def test_killed_in_a_write(tmp_path):
    """Whatever a killed process leaves is whole or is not returned, and half written files are swept away."""
    folder, disk, size = tmp_path / "kept", 2**26, 300_000
    rng, left = random.Random(0), 0
    for n in range(12):
        with start(folder, disk, 12, size, 10**6, n) as process:
            until = time.monotonic() + 20
            while not left and time.monotonic() < until:  # until it is caught while it writes; once is enough
                time.sleep(rng.random() * 0.02)
                if list(folder.glob(".*.tmp")):
                    break
            time.sleep(rng.random() * 0.02)
            process.send_signal(signal.SIGKILL)
            process.wait()
        left += len(list(folder.glob(".*.tmp")))
        if left and n >= 4:
            break
    assert left, "no kill came in the middle of a write"
    # The next process reads and writes as if nothing had happened.
    with start(folder, disk, 12, size, 40, 99) as process:
        out, errors = process.communicate()
        assert process.returncode == 0, errors
    assert int(out.split()[2]) == 0, "a renamed file was not whole"
    temporary = list(folder.glob(".*.tmp"))
    assert temporary
    old = time.time() - stores.STALE - 1
    for file in temporary:
        os.utime(file, (old, old))
    Store(folder=folder, disk=disk).put("0" * 64, {"a": np.zeros(1)})
    assert not list(folder.glob(".*.tmp"))
