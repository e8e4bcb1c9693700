"""Two processes over loopback train as one does: the same losses, one set of files, one answer to a signal."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import quick

from mmjax.train import report

pytestmark = pytest.mark.slow

RUN = """
import json, sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from mmjax.core.errors import InputError
from mmjax.core.meshes import MeshConfig
from mmjax.train import loop
from mmjax.train.cluster import Cluster
from mmjax.train.config import Update
from tiny import tiny_run
out, given = Path(sys.argv[1]), json.loads(sys.argv[2])
if given["pause"] < 0:  # the second process fails, where the others wait for it
    def fail(*of):
        raise InputError("a picture is broken")
    if given["cluster"]["process"] == 1:
        loop.Loop._read = fail
elif given["pause"]:
    read = loop.Loop._read
    loop.Loop._read = lambda *of: (time.sleep(given["pause"]), read(*of))[1]
cfg = dict(steps=given["steps"], save_every=given["save_every"], mesh=MeshConfig(**given["mesh"]))
cfg |= dict(update=Update(accumulate=given["accumulate"]), cluster=Cluster(**given["cluster"]))
raise SystemExit(loop.run(tiny_run(out, **cfg)))
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(out: Path, processes: int, devices: int, steps=20, save_every=100, accumulate=1, pause=0.0, **mesh) -> list:
    """The processes of one run; `devices` each."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick.flags(devices), "NPROC": "16"}
    given = {"steps": steps, "save_every": save_every, "accumulate": accumulate, "pause": pause, "mesh": mesh}
    code, port = RUN.format(tests=str(Path(__file__).parents[1])), free_port()
    made = []
    for process in range(processes):
        where = {"coordinator": f"127.0.0.1:{port}", "processes": processes, "process": process}
        text = json.dumps(given | {"cluster": where if processes > 1 else {}})
        command = [sys.executable, "-c", code, str(out), text]
        made.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    return made


def finish(processes: list, status: int = 0) -> list[str]:
    said = [p.communicate(timeout=400) for p in processes]
    assert [p.returncode for p in processes] == [status] * len(processes), "\n".join(err for _, err in said)
    return [out + err for out, err in said]


def losses(out: Path) -> np.ndarray:
    return np.array([loss for _, loss in report.losses(out)])


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """One process with one device."""
    out = tmp_path_factory.mktemp("one")
    finish(start(out, 1, 1))
    return out


@pytest.mark.parametrize(
    ("devices", "settings"),
    [
        (1, {"data": 2}),
        (2, {"data": 1, "tensor": 2, "fsdp": 2, "accumulate": 2, "explicit": True}),
        (2, {"data": 1, "sequence": 2, "tensor": 2}),  # each process holds all rows
    ],
    ids=["two devices", "four devices, two parts, explicit", "parts of the same rows"],
)
def test_two_processes_train_as_one(one, tmp_path, devices, settings):
    said = finish(start(tmp_path, 2, devices, **settings))
    worst = float(np.max(np.abs(losses(tmp_path) / losses(one) - 1)))
    print(f"largest relative difference of a loss: {worst:.1e}")
    assert worst < 1e-5
    assert len(losses(tmp_path)) == 20
    a, b = (json.loads((out / "result.json").read_text()) for out in (one, tmp_path))
    assert b["processes"] == 2
    assert a["answers"] == b["answers"]
    assert a["tokens_per_second"] > 0
    assert "named" in said[0]
    assert "named" not in said[1]  # the first alone talks


def test_a_signal_to_one_stops_both_with_a_checkpoint(one, tmp_path):
    """The second process alone is asked; both save the same step, and one process goes on from it."""
    processes = start(tmp_path, 2, 1, save_every=1000, pause=0.3, data=2)
    begun, until = tmp_path / "checkpoints" / "done" / "0.json", time.monotonic() + 300
    while not begun.exists():
        assert [p.poll() for p in processes] == [None, None], finish(processes)
        assert time.monotonic() < until
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    finish(processes, 128 + signal.SIGTERM)
    (stopped,) = [int(p.stem) for p in (tmp_path / "checkpoints" / "done").glob("*.json") if p.stem != "0"]
    assert 0 < stopped < 20
    finish(start(tmp_path, 1, 1, save_every=1000))
    np.testing.assert_allclose(losses(tmp_path), losses(one), rtol=1e-5)


@pytest.mark.parametrize("how", ["fails", "is killed"])
def test_where_one_process_ends_the_other_does_not_wait_for_ever(tmp_path, how):
    processes = start(tmp_path, 2, 1, steps=500, save_every=1000, pause=-1.0 if how == "fails" else 0.3, data=2)
    if how == "is killed":
        begun = tmp_path / "checkpoints" / "done" / "0.json"
        while not begun.exists():
            assert [p.poll() for p in processes] == [None, None], finish(processes)
            time.sleep(0.01)
        processes[1].kill()
    said = [p.communicate(timeout=200) for p in processes]
    assert processes[0].returncode not in (0, None)
    if how == "fails":
        assert processes[1].returncode == 2
        assert said[1][1].rstrip().endswith("mmjax: a picture is broken")


def test_processes_that_are_not_found_are_told(tmp_path):
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "mmjax.train", "quickstart", "--out", str(tmp_path), "--cluster.join", "always"],
        env=env,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 2
    assert "the other processes were not found" in done.stderr
    assert "--cluster.coordinator" in done.stderr
