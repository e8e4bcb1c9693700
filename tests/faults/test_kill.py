"""A run that is killed, stopped and resumed as a process: the joined loss curve is that of an undisturbed run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import quick

from mmjax.train import report

pytestmark = pytest.mark.slow

RUN = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from mmjax.core.errors import InputError
from mmjax.train import loop
from tiny import tiny_run
raise SystemExit(loop.run(tiny_run(Path(sys.argv[1]), steps=120, save_every=7, keep=2)))
"""


def start(out: Path) -> subprocess.Popen:
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick.flags()}
    code = RUN.format(tests=str(Path(__file__).parent.parent))
    return subprocess.Popen([sys.executable, "-c", code, str(out)], env=env, stderr=subprocess.PIPE, text=True)


def wait_for_step(process: subprocess.Popen, out: Path, step: int) -> None:
    """Until this process, not one before it, has a checkpoint of `step` or later: then it is surely in its loop."""
    deadline = time.monotonic() + 120
    manifests = out / "checkpoints" / "done"
    before = {p.name for p in manifests.glob("[0-9]*.json")}
    while time.monotonic() < deadline and process.poll() is None:
        if any(int(p.stem) >= step and p.name not in before for p in manifests.glob("[0-9]*.json")):
            return
        time.sleep(0.01)
    raise AssertionError(process.stderr.read() if process.poll() is not None else f"no step {step} in time")


def test_killed_stopped_and_resumed_is_bit_identical(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with start(whole) as undisturbed:
        assert undisturbed.wait() == 0, undisturbed.stderr.read()

    for step, how, times, statuses in (
        (7, signal.SIGKILL, 1, {-9}),
        (21, signal.SIGTERM, 1, {143}),
        (28, signal.SIGKILL, 1, {-9}),
        # The second stops at once; the first may have been faster.
        (35, signal.SIGTERM, 2, {-signal.SIGTERM, 143}),
        (42, signal.SIGINT, 1, {130}),
    ):
        with start(broken) as process:
            wait_for_step(process, broken, step)
            time.sleep(0.05)  # into the steps after the checkpoint
            for _ in range(times):
                process.send_signal(how)
                time.sleep(0.002)
            assert process.wait(60) in statuses, process.stderr.read()
    with start(broken) as process:
        assert process.wait() == 0, process.stderr.read()

    assert report.losses(broken) == report.losses(whole)
    a, b = (json.loads((out / "result.json").read_text()) for out in (whole, broken))
    assert a["answers"] == b["answers"]
    assert a["final_loss"] == b["final_loss"]
