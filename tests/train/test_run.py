"""A whole run at tiny size, in this process: what it leaves, how it resumes, what it refuses."""

import dataclasses
import json
import shutil
import signal

import jax
import numpy as np
import pytest
from tiny import tiny_run

from mmjax.core.errors import InputError
from mmjax.core.files import lock_directory
from mmjax.core.meshes import MeshConfig
from mmjax.data import source
from mmjax.sequence import batch as batches
from mmjax.sequence import media
from mmjax.train import evaluate, loop, report


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """The programs under test see the one device that the tiny mesh uses."""
    devices = jax.devices()[:1]
    make = loop.make_mesh
    monkeypatch.setattr(loop, "make_mesh", lambda cfg: make(cfg, devices))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was never disturbed."""
    out = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        make = loop.make_mesh
        patch.setattr(loop, "make_mesh", lambda cfg: make(cfg, jax.devices()[:1]))
        assert loop.run(tiny_run(out)) == 0
    return out


def test_what_a_run_leaves(finished):
    result = json.loads((finished / loop.RESULT).read_text())
    assert result["steps"] == 6
    assert result["questions"] == 5
    assert 0 <= result["exact_match"] <= 1
    assert result["compiles"] == len(result["buckets"]) == 2
    assert result["compiles_in_loop"] == 0
    assert result["compile_seconds"] > 0
    assert 0.5 < result["fill"] < 1
    for name in (loop.CURVE, evaluate.SHEET):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")
    assert any((finished / "tensorboard").iterdir())
    assert [s for s, _ in report.losses(finished)] == [1, 2, 3, 4, 5, 6]


def test_the_loss_falls(tmp_path):
    loop.run(tiny_run(tmp_path, steps=40, save_every=100))
    losses = [loss for _, loss in report.losses(tmp_path)]
    assert np.mean(losses[-5:]) < 0.75 * np.mean(losses[:5])


def test_stopped_and_resumed_is_bit_identical(finished, tmp_path, monkeypatch):
    """Signals after steps 1 and 4; the joined curve and the last answers are those of the undisturbed run."""
    real = report.Progress.update
    for stop_after in (1, 4):

        def update(self, step, *rest, at=stop_after):
            real(self, step, *rest)
            if step == at:
                signal.raise_signal(signal.SIGTERM)

        monkeypatch.setattr(report.Progress, "update", update)
        assert loop.run(tiny_run(tmp_path)) == 143
        assert report.losses(tmp_path)[-1][0] == stop_after + 1  # which ran while the step before it was read
    monkeypatch.setattr(report.Progress, "update", real)
    assert loop.run(tiny_run(tmp_path)) == 0
    assert report.losses(tmp_path) == report.losses(finished)
    a, b = (json.loads((o / loop.RESULT).read_text()) for o in (finished, tmp_path))
    assert a["answers"] == b["answers"]


def test_metrics_written_after_the_checkpoint_are_cut_off(tmp_path):
    for step in range(1, 5):
        with report.Metrics(tmp_path, start=step - 1) as metrics:
            metrics.write(step, loss=float(step))
    with (tmp_path / report.METRICS).open("a") as file:
        file.write('{"step": 5, "lo')  # a kill in the middle of a line
    with report.Metrics(tmp_path, start=2):
        pass
    assert report.losses(tmp_path) == [(1, 1.0), (2, 2.0)]


def test_other_settings_are_refused_by_name(finished):
    cfg = tiny_run(finished)
    other = dataclasses.replace(cfg, optimizer=dataclasses.replace(cfg.optimizer, learning_rate=0.5))
    with pytest.raises(InputError, match=r"run with other settings: optimizer.learning_rate \(0.003 → 0.5\)"):
        loop.run(other)


def test_a_finished_run_only_reports(finished):
    before = report.losses(finished)
    assert loop.run(tiny_run(finished)) == 0
    assert report.losses(finished) == before


def flip(path):
    """One bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_a_damaged_last_step_is_resumed_from_the_one_before(finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    largest = max((tmp_path / "checkpoints" / "6").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    flip(largest)
    with pytest.raises(InputError, match=largest.name):
        loop.run(tiny_run(tmp_path, fallback=False))
    with pytest.warns(UserWarning, match=r"step 4 is used instead, and step 6 was moved to"):
        assert loop.run(tiny_run(tmp_path)) == 0
    assert report.losses(tmp_path) == report.losses(finished)
    a, b = (json.loads((out / loop.RESULT).read_text()) for out in (finished, tmp_path))
    assert a["answers"] == b["answers"]


def test_a_run_whose_manifests_are_all_damaged_does_not_begin_anew(finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "checkpoints" / "done").glob("*.json"):
        flip(path)
    with pytest.raises(InputError, match=r"6\.json is damaged"):
        loop.run(tiny_run(tmp_path))
    assert report.losses(tmp_path) == report.losses(finished)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mesh": MeshConfig(data=3)}, "does not fit 1 device"),
        ({"packing": {"tokens": 32}}, "more than a row of 32; raise the row's tokens"),
        ({"resolution": {"patch": 16}}, "resolution.patch is 16 but model.vision.embed.patch is 8"),
        ({"data": {"concepts": 1}}, "data.concepts is 1; give 2 to 512"),
        ({"data": {"held_out": "crayon"}}, "data.held_out is 'crayon'; give one of the styles"),
    ],
)
def test_refused_before_anything_is_written(tmp_path, change, message):
    cfg = tiny_run(tmp_path / "run")
    change = {k: dataclasses.replace(getattr(cfg, k), **v) if isinstance(v, dict) else v for k, v in change.items()}
    with pytest.raises(InputError, match=message):
        loop.run(dataclasses.replace(cfg, **change))
    assert not (tmp_path / "run").exists()


def test_a_directory_that_another_run_uses_is_refused(tmp_path):
    with lock_directory(tmp_path), pytest.raises(InputError, match=str(tmp_path)):
        loop.run(tiny_run(tmp_path))
    assert not (tmp_path / loop.CONFIG).exists()


def test_a_disk_that_is_too_small_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(InputError, match="checkpoints"):
        loop.run(tiny_run(tmp_path))
    assert not (tmp_path / loop.CONFIG).exists()


def test_an_unreadable_picture_is_refused_by_name(tmp_path, monkeypatch):
    real = media.render

    def broken(picture, views):
        if broken.left == 0:
            from mmjax.tokenizers import image

            return image.decode(b"<html>not a picture</html>")
        broken.left -= 1
        return real(picture, views)

    broken.left = 30
    monkeypatch.setattr(media, "render", broken)
    with pytest.raises(InputError, match=r"Document 'drawings/0/\d+', span \d"):
        loop.run(tiny_run(tmp_path))
    assert not (tmp_path / loop.RESULT).exists()


def test_a_broken_batch_stops_the_run_with_its_documents(tmp_path, monkeypatch):
    real = batches.build

    def broken(*given):
        batch = real(*given)
        batch.tokens[2, 3] = 5000
        return batch

    monkeypatch.setattr(batches, "build", broken)
    with pytest.raises(InputError, match=r"^Row 2 .the documents drawings/0/.*1 ids or targets outside"):
        loop.run(tiny_run(tmp_path))
    monkeypatch.setattr(source.invariants, "check", lambda *_: None)  # the step itself sees it too
    with pytest.raises(InputError, match=r"^Step 1: Row 2 .the documents drawings/0/.*1 ids or targets outside"):
        loop.run(tiny_run(tmp_path))
