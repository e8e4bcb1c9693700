"""Heads that are the token table, and tensors that a model does not compute with, in directories and out again."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mmjax.convert import huggingface, rules
from mmjax.convert.huggingface import load, save

TEXT = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT |= {"intermediate_size": 12, "vocab_size": 20, "tie_word_embeddings": True}
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SEES = {"model_type": "clip_vision_model", "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
SEES |= {"intermediate_size": 12, "image_size": 8, "patch_size": 4}


def random(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}


def tensors(config: dict) -> dict[str, np.ndarray]:
    found = huggingface.Origin.of(config).found
    return random(rules.plan(found.of.spec(found.cfg), found.rules).tensors)


def write(path: Path, config: dict, given: dict[str, np.ndarray]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file(given, path / "model.safetensors", metadata={"format": "pt"})
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def doubled(model: huggingface.Model) -> huggingface.Model:
    return dataclasses.replace(model, params=model.params | {"embed": model.params["embed"] * 2})


@pytest.mark.parametrize("there", [(TABLE,), (HEAD,), (TABLE, HEAD)], ids=lambda x: "+".join(x))
def test_equal_or_alone_they_are_one_parameter(there, tmp_path):
    given = tensors(TEXT)
    table = given.pop(TABLE)
    path = write(tmp_path / "in", TEXT, given | dict.fromkeys(there, table))
    model = load(path)
    assert model.cfg.tied
    np.testing.assert_array_equal(model.params["embed"], table)
    save(tmp_path / "same", model)
    assert contents(tmp_path / "same") == contents(path)
    save(tmp_path / "new", doubled(model))
    found = load_file(tmp_path / "new" / "model.safetensors")
    assert {key for key in (TABLE, HEAD) if key in found} == set(there)
    for key in there:
        np.testing.assert_array_equal(found[key], 2 * table)


def test_unequal_they_are_two(tmp_path):
    given = tensors(TEXT)
    path = write(tmp_path / "in", TEXT, given | {HEAD: given[TABLE] + 1})
    model = load(path)
    assert not model.cfg.tied
    np.testing.assert_array_equal(model.params["head"], given[TABLE] + 1)
    save(tmp_path / "same", model)
    assert contents(tmp_path / "same") == contents(path)


def test_what_is_behind_the_features_is_kept_however_large(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "MAX_KEPT", 8)
    config = {"model_type": "llava", "vision_config": SEES, "text_config": TEXT, "image_token_index": 19}
    given = tensors(config)
    at = "vision_tower.vision_model."
    last = {
        k.replace("layers.1.", "layers.2."): v + 1 for k, v in given.items() if k.startswith(f"{at}encoder.layers.1.")
    }
    rest = last | random({f"{at}post_layernorm.weight": (8,), f"{at}post_layernorm.bias": (8,)})
    path = write(tmp_path / "in", config, given | rest | {f"{at}embeddings.position_ids": np.arange(5)[None]})
    model = load(path)
    assert model.cfg.vision.blocks.layers == 2
    assert (set(model.origin.kept), model.origin.lost) == (set(rest), (f"{at}embeddings.position_ids",))
    save(tmp_path / "out", model)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == (given | rest).keys()
    for key, x in (given | rest).items():
        np.testing.assert_array_equal(found[key], x)


def test_a_whole_model_around_a_tied_one(tmp_path):
    config = {"model_type": "llava", "vision_config": SEES, "text_config": TEXT, "image_token_index": 19}
    text = TEXT | {"tie_word_embeddings": False}
    assert huggingface.Origin.of(config).found.cfg.decoder.tied
    assert not huggingface.Origin.of(config | {"text_config": text}).found.cfg.decoder.tied
    assert huggingface.Origin.of(config | {"text_config": text, "tie_word_embeddings": True}).found.cfg.decoder.tied
    # transformers asks LLaVA-NeXT's own config alone, but a file without a head has no other than the table.
    following = config | {"model_type": "llava_next"}
    given = tensors(following)
    assert "language_model.lm_head.weight" not in given
    assert load(write(tmp_path / "tied", following, given)).cfg.decoder.tied
    head = {"language_model.lm_head.weight": given["language_model.model.embed_tokens.weight"] + 1}
    assert not load(write(tmp_path / "untied", following, given | head)).cfg.decoder.tied
