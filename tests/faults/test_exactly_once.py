"""Every example exactly once an epoch, however often the run is killed and on however many hosts it goes on.

All that goes from one run to the next is an integer: the step that every host has completed. What a host did beyond it
is done again, as if it had never been: of each run, only the steps before the next one's start count.
"""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from faults import consumer

HOSTS = (1, 4, 2)


def read_log(text):
    """The whole lines, as (step, id)."""
    return [(int(step), id) for step, id in (line.split() for line in text.rpartition("\n")[0].splitlines())]


def completed(log, start):
    """The step after the last that a host has completed."""
    return max([start, *(step + 1 for step, id in log if id == consumer.END)])


def check(runs, steps):
    """`runs`: of each, its first step and its hosts' logs; the last is complete."""
    starts = [start for start, _ in runs] + [steps]
    assert starts == sorted(starts)
    used, of_step = Counter(), {}
    for (start, logs), following in zip(runs, starts[1:], strict=True):
        for log in logs:
            used.update(id for step, id in log if step < following and id != consumer.END)
        for step in range(start, following):
            ids = [id for log in logs for s, id in log if s == step and id != consumer.END]
            assert ids == of_step.setdefault(step, ids)
        # What was done beyond the step and lost: the beginning of what will be done again.
        assert all(start <= step for log in logs for step, _ in log)
    expected = [
        f"{name}{again}:{n}"
        for name, size in consumer.SIZES.items()
        for n in range(size)
        for again in ("", *(f"~{epoch + 1}" for epoch in range(1, consumer.EPOCHS)))
    ]
    assert used == Counter(expected)
    # Both epochs of a source come one after the other, but for what waited for a fitting neighbour.
    first = [np.mean([s for s, ids in of_step.items() for id in ids if ("~2" in id) == late]) for late in (False, True)]
    assert first[1] > 1.5 * first[0]


def stopped(seed, resume):
    """Runs whose hosts stop after any line, each after another; the next run has another number of hosts."""
    rng = np.random.default_rng(seed)
    steps, start, runs = len(consumer.source()), 0, []
    hosts = itertools.cycle(HOSTS)
    while start < steps:
        n = next(hosts)
        most = [int(rng.integers(0, 200 // n)) if len(runs) < 8 else None for _ in range(n)]
        logs = [read_log("".join(itertools.islice(consumer.lines(h, n, start), most[h]))) for h in range(n)]
        runs.append((start, logs))
        start = resume(completed(log, start) for log in logs)
    assert len(runs) > 3
    return runs, steps


@pytest.mark.parametrize("seed", range(2))
def test_hosts_that_stop_anywhere(seed):
    check(*stopped(seed, min))


def test_going_on_from_a_later_step_would_be_noticed():
    with pytest.raises(AssertionError, match="Counter"):
        check(*stopped(0, max))


def start_host(host, hosts, step, file):
    tests = Path(consumer.__file__).parent.parent
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(tests.parent)}
    command = [sys.executable, consumer.__file__, str(host), str(hosts), str(step), str(file)]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def run_and_kill(hosts, start, folder, rng):
    """Starts the hosts and kills each at a moment of its own; returns their logs and how they ended."""
    folder.mkdir()
    files = [folder / str(h) for h in range(hosts)]
    processes = [start_host(h, hosts, start, file) for h, file in enumerate(files)]
    try:
        deadline = time.monotonic() + 120
        while not all(file.exists() and file.stat().st_size for file in files):
            if time.monotonic() > deadline or any(p.poll() not in (None, 0) for p in processes):
                raise AssertionError([p.stderr.read() if p.poll() else "slow" for p in processes])
            time.sleep(0.01)
        for process, wait in zip(processes, rng.uniform(0.1, 0.8, hosts), strict=True):
            time.sleep(wait / hosts)
            process.send_signal(signal.SIGKILL)
        ended = [process.wait(60) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return [read_log(file.read_text()) for file in files], ended


@pytest.mark.slow
def test_hosts_that_are_killed(tmp_path):
    rng = np.random.default_rng(0)
    steps, start, runs, killed = len(consumer.source()), 0, [], 0
    for number, n in enumerate([*HOSTS, *HOSTS]):
        logs, ended = run_and_kill(n, start, tmp_path / str(number), rng)
        assert set(ended) <= {0, -signal.SIGKILL}
        killed += ended.count(-signal.SIGKILL)
        runs.append((start, logs))
        start = min(completed(log, start) for log in logs)
    assert killed > 6
    last = [start_host(h, 2, start, tmp_path / f"last{h}") for h in range(2)]
    for process in last:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    runs.append((start, [read_log((tmp_path / f"last{h}").read_text()) if start < steps else [] for h in range(2)]))
    check(runs, steps)
    # Hosts were killed inside a step and ahead of each other: some examples were taken twice, and count once.
    taken = sum(id != consumer.END for _, logs in runs for log in logs for _, id in log)
    assert taken > sum(consumer.SIZES.values()) * consumer.EPOCHS
