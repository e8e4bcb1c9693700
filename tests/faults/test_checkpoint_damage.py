"""Damage of every kind: it is found and named, nothing is lost, and the step before is used."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from mmjax import checkpoint
from mmjax.checkpoint import Checkpoints
from mmjax.core.errors import InputError
from mmjax.core.files import lock_directory
from mmjax.core.tree import flatten

ROOT = Path(__file__).parents[2]
FLIPS = int(os.environ.get("MMJAX_FLIPS", "24"))  # 200 for a report
COMMITS = ("rename", "marker")

# After a save or load that failed, tensorstore reports to an event loop that Orbax has closed already.
CLOSED = r"ignore:Exception ignored in. None[\s\S]*Event loop is closed:pytest.PytestUnraisableExceptionWarning"
pytestmark = pytest.mark.filterwarnings(CLOSED)


def state(step: int) -> dict:
    rng = np.random.default_rng(step)
    return {
        "params": {"w": jnp.asarray(rng.normal(size=(48, 8)), jnp.float32), "b": jnp.ones(8, jnp.bfloat16) * step},
        "step": jnp.int32(step),
        "key": jax.random.key(step),
    }


def abstract() -> dict:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state(0))


def assert_is(tree: dict, step: int) -> None:
    wanted = flatten(state(step))
    for name, leaf in flatten(tree).items():
        both = (leaf, wanted[name])
        if name == "key":
            both = tuple(map(jax.random.key_data, both))
        assert np.asarray(both[0]).tobytes() == np.asarray(both[1]).tobytes(), name


def saved(directory: Path, commit: str, steps=(1, 2)) -> Path:
    with Checkpoints(directory, commit=commit, keep=9) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step), metadata={"step": step, "rate": 1e-5})
    return directory


def files(directory: Path, step: int) -> list[Path]:
    """The files of a step that hold something, its manifest last."""
    data = sorted(path for path in (directory / str(step)).rglob("*") if path.is_file() and path.stat().st_size)
    return [*data, directory / "done" / f"{step}.json"]


def assert_falls_back(directory: Path, damaged: Path) -> None:
    """Step 2 is refused with the file's name, then set aside for step 1; its number is free again."""
    before = sorted(os.listdir(directory / "2")) if (directory / "2").exists() else []
    checkpoints = Checkpoints(directory)
    with pytest.raises(InputError, match=str(damaged)):
        checkpoints.restore(abstract(), fallback=False)
    with pytest.raises(InputError, match=str(damaged)):
        checkpoints.restore(abstract(), 2)
    with pytest.warns(UserWarning, match=rf"{damaged}.*: step 1 is used instead, and step 2 was moved to .*damaged/2"):
        restored = checkpoints.restore(abstract())
    assert (restored.step, restored.metadata["step"]) == (1, 1)
    assert_is(restored.tree, 1)
    assert checkpoints.steps() == [1]
    assert (sorted(os.listdir(directory / "damaged" / "2")) if before else []) == before
    assert (directory / "damaged" / "2.json").exists()


@pytest.mark.parametrize("commit", COMMITS)
def test_one_flipped_bit_in_each_file_in_turn(tmp_path, commit):
    whole, copy = saved(tmp_path / "whole", commit), tmp_path / "copy"
    rng = np.random.default_rng(0)
    for turn in range(FLIPS // 2):
        shutil.copytree(whole, copy)
        path = files(copy, 2)[turn % len(files(copy, 2))]
        data = bytearray(path.read_bytes())
        bit = int(rng.integers(8 * len(data)))
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        assert_falls_back(copy, path)
        shutil.rmtree(copy)


@pytest.mark.parametrize("commit", COMMITS)
def test_each_file_truncated_or_missing(tmp_path, commit):
    whole, copy = saved(tmp_path / "whole", commit), tmp_path / "copy"
    for turn in range(len(files(whole, 2)) - 1):
        shutil.copytree(whole, copy)
        path = files(copy, 2)[turn]
        if turn % 2:
            path.unlink()
        else:
            os.truncate(path, path.stat().st_size // 2)
        assert_falls_back(copy, path)
        shutil.rmtree(copy)


def test_missing_data_and_cut_manifest(tmp_path):
    shutil.rmtree(saved(tmp_path / "data", "rename") / "2")
    assert_falls_back(tmp_path / "data", tmp_path / "data" / "2")
    manifest = saved(tmp_path / "cut", "rename") / "done" / "2.json"
    os.truncate(manifest, manifest.stat().st_size - 1)  # only the line's end
    assert_falls_back(tmp_path / "cut", manifest)


def test_changed_numbers_in_unchanged_files(tmp_path):
    # As if memory had failed while saving.
    manifest = checkpoint.read_manifest(saved(tmp_path, "rename"), 2)
    manifest["leaves"]["params/w"] = manifest["leaves"]["params/w"][:-1] + "x"
    checkpoint.write_manifest(tmp_path, manifest)
    with pytest.warns(UserWarning, match=r"^'params/w' of step 2 in .* is damaged: .*: step 1 is used instead"):
        assert Checkpoints(tmp_path).restore(abstract()).step == 1


def test_a_number_set_aside_can_be_saved_again_and_again(tmp_path):
    saved(tmp_path, "rename")
    for name in ("2", "2-1", "2-2"):
        os.truncate(files(tmp_path, 2)[0], 1)
        with Checkpoints(tmp_path) as checkpoints:
            with pytest.warns(UserWarning, match=rf"moved to .*/damaged/{name}$"):
                assert checkpoints.restore(abstract()).step == 1
            checkpoints.save(2, state(2))
    assert_is(checkpoints.restore(abstract()).tree, 2)
    aside = sorted(os.listdir(tmp_path / "damaged"))
    assert aside == ["2", "2-1", "2-1.json", "2-2", "2-2.json", "2.json"]


def test_none_is_whole(tmp_path):
    saved(tmp_path, "rename")
    damaged = [files(tmp_path, 1)[0], files(tmp_path, 2)[-1]]
    for path in damaged:
        os.truncate(path, 1)
    says = rf"no step in .* is whole \(step 2: {damaged[1]} .*; step 1: {damaged[0]} "
    before = sorted(tmp_path.rglob("*"))
    for _ in range(2):  # whoever starts the program once more must not find an empty directory
        with pytest.raises(InputError, match=says):
            Checkpoints(tmp_path).restore(abstract())
    assert sorted(tmp_path.rglob("*")) == before


def test_another_structure_is_no_damage(tmp_path):
    saved(tmp_path, "rename")
    for change in ({"more": jnp.ones(1)}, {"step": jnp.float32(0)}):
        with pytest.raises(InputError, match="step 2 in"):
            Checkpoints(tmp_path).restore(abstract() | change)
    assert Checkpoints(tmp_path).steps() == [1, 2]


def test_a_reader_moves_nothing_while_another_process_saves(tmp_path):
    os.truncate(files(saved(tmp_path, "rename"), 2)[0], 1)
    with (
        lock_directory(tmp_path / "done"),
        pytest.warns(UserWarning, match=r"step 1 is used instead, and step 2 stays where it is \(.* is in use by"),
    ):
        assert Checkpoints(tmp_path).restore(abstract()).step == 1
    assert (tmp_path / "2").exists()


def test_a_step_that_retention_deletes_meanwhile_is_no_damage(tmp_path, monkeypatch):
    saved(tmp_path, "rename", (1, 2))
    original = checkpoint.read_manifest

    def deleted(directory, step):
        if step == 2:
            checkpoint.remove_step(directory, step)
        return original(directory, step)

    monkeypatch.setattr(checkpoint, "read_manifest", deleted)
    assert Checkpoints(tmp_path).restore(abstract()).step == 1  # without a warning, which would be an error here


@pytest.mark.parametrize(("first", "second"), [COMMITS, COMMITS[::-1]])
def test_either_mode_goes_on_with_the_other(tmp_path, first, second):
    saved(tmp_path, first, (1,))
    with Checkpoints(tmp_path, commit=second) as checkpoints:
        assert_is(checkpoints.restore(abstract()).tree, 1)
        checkpoints.save(2, state(2))
    assert_is(Checkpoints(tmp_path, commit=first).restore(abstract(), 2).tree, 2)
    assert checkpoint.verify(tmp_path, 1) == checkpoint.verify(tmp_path, 2) == []


@pytest.mark.parametrize("commit", COMMITS)
def test_copies_taken_in_the_middle_of_a_save(tmp_path, monkeypatch, commit):
    run, copies = tmp_path / "run", []
    copied, list_files = {str(step): threading.Event() for step in (1, 2, 3)}, checkpoint.list_files
    # The manifest, at least, waits for some of the copies.
    monkeypatch.setattr(checkpoint, "list_files", lambda path: copied[path.name].wait(60) and list_files(path))
    big = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(32, 2**16)), jnp.float32)}
    with Checkpoints(run, commit=commit) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, big | {"step": jnp.int32(step)})
            for number in range(4):
                # Files come and go under its hands: it copies what it gets.
                subprocess.run(["cp", "-a", run, tmp_path / f"copy{len(copies)}"], capture_output=True)
                if number == 2:
                    copied[str(step)].set()
                copies.append(step - 1)
    for number, before in enumerate(copies):
        copy = Checkpoints(tmp_path / f"copy{number}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the manifest may have come into the copy and the data not
            if before == 0 and not copy.steps():
                continue
            try:
                restored = copy.restore(big | {"step": jnp.int32(0)})
            except InputError:
                assert before == 0
                continue
        assert int(restored.tree["step"]) == restored.step >= before
        assert np.array_equal(restored.tree["w"], big["w"])


DELETED = """
import os, shutil, signal, sys
sys.path[:0] = ["tests/faults", "tests"]
import jax
from pathlib import Path
from mmjax.checkpoint import Checkpoints
from test_checkpoint_damage import files, state
checkpoints = Checkpoints(sys.argv[1], keep=2, commit=sys.argv[2])
for step in (1, 2):
    checkpoints.save(step, state(step), wait=True)
def half(path, **_):
    if path.name == "1":
        for file in files(path.parent, 1)[:-1:2]:
            file.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
shutil.rmtree = half
checkpoints.save(3, state(3), wait=True)
"""


@pytest.mark.parametrize("commit", COMMITS)
def test_killed_while_retention_deletes(tmp_path, commit):
    killed = subprocess.run([sys.executable, "-c", DELETED, str(tmp_path), commit], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "1").exists()
    with Checkpoints(tmp_path, commit=commit) as checkpoints:
        assert checkpoints.steps() == [2, 3]
        assert not (tmp_path / "1").exists()
        for step in (2, 3):
            assert_is(checkpoints.restore(abstract(), step).tree, step)


def test_the_error_of_the_last_save_is_raised_at_the_end(tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    def program(fails: bool) -> None:
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(2, state(2))
            if fails:
                raise ZeroDivisionError

    saved(tmp_path, "rename", (1,))
    monkeypatch.setattr(checkpoint, "list_files", full)
    with pytest.raises(InputError, match=r"cannot save step 2 in .*: no space is left"):
        program(fails=False)
    with pytest.raises(ZeroDivisionError):  # which is not hidden by the other
        program(fails=True)
    assert Checkpoints(tmp_path).steps() == [1]


TRAINS = """
import sys
sys.path.insert(0, "tests")
from pathlib import Path
from mmjax import checkpoint
from mmjax.core import config
from mmjax.train import loop
from tiny import tiny_run
def full(path, write=checkpoint.list_files):
    if path.name == "3":
        raise OSError(28, "No space left on device")
    return write(path)
checkpoint.list_files = full
config.main(lambda arguments: loop.run(tiny_run(Path(sys.argv[1]), steps=3, save_every=3)))
"""


@pytest.mark.slow
def test_a_program_whose_last_save_fails_does_not_exit_with_zero(tmp_path):
    env = os.environ | {"XLA_FLAGS": quick.flags()}
    out = subprocess.run(
        [sys.executable, "-c", TRAINS, str(tmp_path)], env=env, cwd=ROOT, capture_output=True, text=True
    )
    assert out.returncode == 2, out.stderr
    assert "cannot save step 3 in" in out.stderr
    assert not (tmp_path / "result.json").exists()
    assert json.loads((tmp_path / "config.json").read_text())
    assert Checkpoints(tmp_path / "checkpoints").steps() == [0]
