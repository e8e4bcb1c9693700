"""Runs with a frozen tower whose features are kept: the losses of runs without, and pictures are encoded once."""

import dataclasses
import functools
import json
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from fused import behind_an_encoder, even
from fused import make as tiny_rows
from tiny import randomised, tiny_model, tiny_run

from mmjax.connectors import merger
from mmjax.core.errors import InputError
from mmjax.core.meshes import MeshConfig
from mmjax.data import index
from mmjax.data.sets import Files, Mixed
from mmjax.generate import features as generated
from mmjax.models import vlm
from mmjax.sequence.batch import Bucket
from mmjax.tokenizers import text
from mmjax.train import features, loop, report, state
from mmjax.train.config import Features, Optimizer, Packing, Update
from mmjax.train.prepare import prepare_data
from mmjax.train.step import by_rows, train_step

VOCAB, DOCUMENTS, STEPS = 400, 12, 8
WHAT = ("red", "green", "blue", "bright", "dark", "grey")


@pytest.fixture(autouse=True)
def few_devices(monkeypatch):
    """The programs under test see as many devices as their mesh uses."""
    make = loop.make_mesh
    monkeypatch.setattr(loop, "make_mesh", lambda cfg: make(cfg, jax.devices()[: cfg.data * cfg.tensor]))
    monkeypatch.setattr(index, "WINDOW", 64)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures on disk and questions about them; one picture is asked about twice."""
    folder, rng, records = tmp_path_factory.mktemp("data"), np.random.default_rng(0), []
    for n in range(DOCUMENTS):
        pixels = rng.integers(0, 256, (16 + 8 * (n % 3), 24, 3), np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{n}.png")
        said = [("human", "<image>\nWhat is it?"), ("gpt", f"It is {WHAT[n % 6]}.")]
        turns = [{"from": who, "value": value} for who, value in said]
        records.append({"id": str(n), "image": f"{n % 11}.png" if n % 3 == 2 else f"{n}.png", "conversations": turns})
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    corpus = [turn["value"] for record in records for turn in record["conversations"]]
    (folder / "tokenizer.model").write_bytes(text.train([*corpus, *(f"{a} {b}" for a in WHAT for b in WHAT)] * 3, 300))
    return folder


@pytest.fixture
def make(data, tmp_path):
    def config(name, **changes):
        vocab = text.load(data / "tokenizer.model").vocab.size
        model = dataclasses.replace(tiny_model(vocab, 8), placeholder=None)
        mixed = Mixed((Files(data / "data.jsonl"),), data / "tokenizer.model", held_out=1)
        about = {"model": model, "data": mixed, "steps": STEPS, "save_every": 100}
        about |= {"packing": Packing(rows=4, tokens=96, buckets=1), "update": Update(frozen=("vision", "connector"))}
        return tiny_run(tmp_path / name, **(about | changes))

    return config


def run(cfg) -> tuple[list[float], dict]:
    assert loop.run(cfg) == 0
    return [loss for _, loss in report.losses(cfg.out)], json.loads((cfg.out / loop.RESULT).read_text())


@pytest.mark.slow
def test_pictures_are_encoded_once(make, tmp_path, monkeypatch):
    losses, result = run(make("plain"))
    assert "tower_steps" not in result
    kept = Features(tmp_path / "kept")
    first, result = run(make("first", features=kept))
    np.testing.assert_allclose(first, losses, rtol=2e-6)
    assert len(set(losses)) == STEPS
    assert 0 < result["tower_steps"] < STEPS
    assert result["compiles_in_loop"] == 0
    # Another run finds everything: no picture is decoded, and the tower does not run.
    monkeypatch.setattr("mmjax.tokenizers.image.Found.load", None)
    monkeypatch.setattr(features.Towers, "_run", None)
    monkeypatch.setattr(loop.Loop, "finish", lambda *_: None)  # which judges without what was kept
    assert loop.run(make("second", features=kept)) == 0
    assert [loss for _, loss in report.losses(tmp_path / "second")] == first


CHOICES = {
    "the tower alone, in parts": {"update": Update(frozen=("vision",), accumulate=2)},
    "four devices": {"mesh": MeshConfig(data=2, tensor=2, explicit=True)},
    "half precision": {"update": Update(frozen=("vision", "connector"), compute="bfloat16")},
}


@pytest.mark.slow
@pytest.mark.parametrize("choice", CHOICES)
def test_what_is_frozen_is_kept(make, choice, monkeypatch):
    changes = CHOICES[choice]
    losses, _ = run(make("plain", **changes))
    kept = []
    put = features.Store.put
    monkeypatch.setattr(features.Store, "put", lambda self, key, entry: kept.append(entry) or put(self, key, entry))
    found, result = run(make("kept", features=Features(memory=16), **changes))
    np.testing.assert_allclose(found, losses, rtol=2e-6 if "half" not in choice else 2e-3)
    assert 0 < result["tower_steps"] < STEPS
    assert {str(entry["tokens"].dtype) for entry in kept} == {"bfloat16" if "half" in choice else "float32"}


@pytest.mark.slow
def test_deepstack_before_its_mergers_and_after():
    """The step on what is kept is the step on the pictures, with parts or without."""
    cfg, sequence = behind_an_encoder(merger.Config(16, 16))
    cfg = dataclasses.replace(cfg, deepstack=(0, 1), deep=merger.Config(16, 16, norm_after=True))
    tx = state.optimizer(Optimizer(), 10)
    batch = tiny_rows([even()[:2], even()[2:]], Bucket(2, 96, 64, 6), cfg, sequence)
    params = randomised(vlm.spec(cfg))
    for frozen, kind in ((("vision", "connector", "deep"), "connector"), (("vision",), "tower")):
        update = Update(frozen=frozen)
        now = state.TrainState(
            jnp.zeros((), jnp.int32), params, tx.init(state.trained(params, frozen)), state.new_guard()
        )
        made = jax.jit(generated.made, static_argnums=(2, 3))(params, batch, cfg, kind)
        assert made.deep.shape[:2] == (2, 2)
        step = jax.jit(functools.partial(train_step, cfg=cfg, tx=tx, update=update, after=kind))
        plain, told = step(now, batch)
        empty = features.without_patches(batch)
        known, seen = step(now, empty, by_rows(made))
        np.testing.assert_allclose(seen["loss"], told["loss"], rtol=1e-6)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), known.optimizer, plain.optimizer)
        np.testing.assert_allclose(seen["grad_norm"], told["grad_norm"], rtol=1e-5)
        assert jax.tree.map(jnp.shape, by_rows(by_rows(made))) == jax.tree.map(jnp.shape, made)


def test_what_cannot_be_kept_is_refused(make, monkeypatch):
    for frozen in ((), ("connector",), ("vision/blocks",)):
        cfg = make("refused", update=Update(frozen=frozen), features=Features(memory=1))
        with pytest.raises(InputError, match=r"features.folder .* add 'vision' to it"):
            features.after(cfg)
        assert features.after(dataclasses.replace(cfg, features=Features())) is None
    cfg = make("kept", update=Update(frozen=("vision", "decoder")), features=Features(memory=1))
    assert features.after(cfg) == "tower"
    assert features.after(make("kept", features=Features(memory=1))) == "connector"
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(InputError, match="this run has 2"):
        features.after(cfg)
    for wrong in ({"disk": 0}, {"memory": -1}, {"age": 0.0}):
        with pytest.raises(InputError, match=r"features.disk is"):
            Features(**wrong)


def test_a_known_picture_is_not_decoded_and_a_hole_is_blank(make, data, tmp_path):
    """What the source gives: keys by the pictures' bytes, patches of what is not known, zeros for what is."""
    source = prepare_data(make("read")).training

    class Known:
        seen: ClassVar[dict] = {}

        def look(self, content, medium, piece):
            key = str(len(content))
            return key, {"tokens": np.zeros(1)} if content in self.seen else None

    source = dataclasses.replace(source, features=Known())
    plain, named = source.named(0)
    media = [m for row in named for m in row]
    assert len(media) == (plain.grid.prod(-1) > 0).sum()
    assert {m.key for m in media} <= {str(file.stat().st_size) for file in data.glob("*.png")}
    reference = dataclasses.replace(source, features=None)[0]
    jax.tree.map(np.testing.assert_array_equal, plain, reference)
    Known.seen = {file.read_bytes() for file in data.glob("*.png")}
    known, named = source.named(0)
    assert not known.patches.any()
    assert all(m.features is not None for row in named for m in row)
    jax.tree.map(np.testing.assert_array_equal, known.replace(patches=0), plain.replace(patches=0))
