"""A run of 60 steps that is killed again and again, in steps, saves and deletions, ends as if nothing had happened.

MMJAX_KILLS=20 python -m pytest -q -m slow tests/faults/test_random_kills.py     # CI kills it fewer times
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import quick

from mmjax.train import report

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("MMJAX_KILLS", "4"))
STEPS = 60

# The program kills itself, so that the moments can be chosen: the n-th step; within 50 ms of the beginning of the n-th
# save; between the data and the manifest of the n-th save; in the n-th deletion, half of its files gone.
RUN = """
import os, signal, sys, threading
sys.path.insert(0, {tests!r})
from pathlib import Path
from mmjax import checkpoint
from mmjax.core import storage
from mmjax.train import loop, report
from tiny import tiny_run

def die():
    print("killed", where, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

def at(module, name, dying):
    real, calls = getattr(module, name), iter(range(1, 10**6))
    def patched(*args, **kwargs):
        return dying(real, *args, **kwargs) if next(calls) == n else real(*args, **kwargs)
    setattr(module, name, patched)

def in_a_step(real, *args):
    real(*args)
    die()

def in_a_save(real, *args):
    threading.Timer(delay, die).start()
    return real(*args)

def before_the_manifest(real, *args):
    die()

def in_a_deletion(real, directory, step):
    (directory / "done" / f"{{step}}.json").unlink(missing_ok=True)
    files = sorted(p for p in (directory / str(step)).rglob("*") if p.is_file())
    for path in files[: len(files) // 2 + 1]:
        path.unlink()
    die()

where, n, delay = sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
if where == "step":
    at(report.Progress, "update", in_a_step)
elif where == "save":
    at(storage, "save", in_a_save)
elif where == "manifest":
    at(checkpoint, "write_manifest", before_the_manifest)
elif where == "deletion":
    # Of a step that is there: each save first removes what an interrupted one may have left of its own step.
    real = checkpoint.remove_step
    calls = iter(range(1, 10**6))
    def patched(directory, step):
        there = (directory / str(step)).exists()
        return in_a_deletion(real, directory, step) if there and next(calls) == n else real(directory, step)
    checkpoint.remove_step = patched
raise SystemExit(loop.run(tiny_run(Path(sys.argv[1]), steps={steps}, save_every=3, keep=2)))
"""
WHERE = ("step", "save", "manifest", "deletion")


def start(out: Path, where: str = "never", n: int = 0, delay: float = 0.0) -> subprocess.Popen:
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick.flags()}
    code = RUN.format(tests=str(Path(__file__).parents[1]), steps=STEPS)
    command = [sys.executable, "-c", code, str(out), where, str(n), str(delay)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_at_random_moments_is_bit_identical(tmp_path):
    rng = np.random.default_rng(20)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with start(whole) as undisturbed:
        assert undisturbed.wait() == 0, undisturbed.stderr.read()
    killed = dict.fromkeys(WHERE, 0)
    for kill in range(KILLS):
        where = WHERE[kill % len(WHERE)]
        # Early enough that the run is not over before the last kill.
        n = int(rng.integers(1, 7)) if where == "step" else int(rng.integers(1, 3))
        with start(broken, where, n, rng.uniform(0, 0.05)) as process:
            said, error = process.communicate(timeout=300)
        if process.returncode == 0:
            break  # the run is over
        assert process.returncode == -signal.SIGKILL, error
        assert f"killed {where}" in said
        killed[where] += 1
    print(f"killed: {killed}")
    assert sum(killed.values()) >= min(KILLS, 10)
    assert all(killed.values()) or len(WHERE) > KILLS
    with start(broken) as process:
        said, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
    assert report.losses(broken) == report.losses(whole)
    assert len(report.losses(broken)) == STEPS
    a, b = (json.loads((out / "result.json").read_text()) for out in (whole, broken))
    assert (a["answers"], a["final_loss"]) == (b["answers"], b["final_loss"])


def descendants(pid: int) -> set[int]:
    found = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found |= {int(child)} | descendants(int(child))
    return found


def runs(pid: int) -> bool:
    """Whether a process runs; one that has ended may be left for an init process to bury."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for child processes in Linux's /proc")
def test_a_killed_run_leaves_no_process_behind(tmp_path):
    with start(tmp_path) as process:
        until = time.monotonic() + 200
        while not list((tmp_path / "checkpoints" / "done").glob("[1-9]*.json")):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < until
            time.sleep(0.01)
        children = descendants(process.pid)
        process.kill()
        process.communicate()
    until = time.monotonic() + 10
    while time.monotonic() < until and any(map(runs, children)):
        time.sleep(0.05)
    assert not any(map(runs, children))
