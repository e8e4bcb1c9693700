"""Idefics: tables in two tensors from a directory and back, how it is asked, and what is refused in one sentence."""

import dataclasses

import numpy as np
import pytest
from convert.test_processor import directory, symbols, tokenizer, write
from safetensors.numpy import load_file, save_file

pytest.importorskip("tokenizers", reason="needs the `data` extra")

from mmjax.convert import huggingface, processor, rules
from mmjax.convert.huggingface import Origin
from mmjax.core.errors import InputError
from mmjax.sequence.document import Document, Image, Text

VISION = {"embed_dim": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12, "image_size": 8}
RESAMPLER = {"resampler_n_latents": 3, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 4}
CONFIG = {"model_type": "idefics", "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIG |= {"intermediate_size": 14, "vocab_size": 20, "additional_vocab_size": 2, "use_resampler": True}
CONFIG |= {"vision_config": VISION | {"patch_size": 4}, "perceiver_config": RESAMPLER, "alpha_type": "vector"}
TABLE = ("model.embed_tokens.weight", "model.embed_tokens.additional_embedding.weight")
HEAD = ("lm_head.weight", "lm_head.additional_fc.weight")
FAKE, END = "<fake_token_around_image>", "<end_of_utterance>"


def saved(path, config, changes=None):
    """A directory of random tensors."""
    found = Origin.of(config).found
    shapes = rules.plan(found.of.spec(found.cfg), found.rules).tensors
    rng = np.random.default_rng(0)
    given = {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}
    given |= {f"model.vision_model.post_layernorm.{name}": np.ones(8, np.float32) for name in ("weight", "bias")}
    given |= {} if changes is None else changes(given)
    path.mkdir()
    write(path, "config.json", config)
    save_file(given, path / "model.safetensors", metadata={"format": "pt"})
    return path, given


@pytest.mark.parametrize("tied", [False, True, "and both there", "and another head"])
def test_two_tensors_are_one_table(tied, tmp_path):
    def copies(given):
        heads = {h: given[t].copy() for h, t in zip(HEAD, TABLE, strict=True)}
        if tied == "and another head":
            heads[HEAD[1]] += 1
        return heads if isinstance(tied, str) else {}

    path, given = saved(tmp_path / "in", CONFIG | {"tie_word_embeddings": bool(tied)}, copies)
    model = huggingface.load(path)
    assert model.cfg.decoder.tied == (tied in (True, "and both there"))
    language = model.params["decoder"]
    np.testing.assert_array_equal(language["embed"], np.concatenate([given[key] for key in TABLE]))
    if not model.cfg.decoder.tied:
        np.testing.assert_array_equal(language["head"], np.concatenate([given[key] for key in HEAD]))
    huggingface.save(tmp_path / "same", model)
    assert (tmp_path / "same/model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()
    changed = model.params | {"decoder": language | {"embed": language["embed"] * 2}}
    huggingface.save(tmp_path / "new", dataclasses.replace(model, params=changed))
    found = load_file(tmp_path / "new/model.safetensors")
    assert found.keys() == given.keys()
    doubled = {*TABLE, *(HEAD if tied == "and both there" else ())}
    for key, value in given.items():
        np.testing.assert_array_equal(found[key], value * 2 if key in doubled else value)


def test_nothing_may_have_been_added():
    found = Origin.of({k: v for k, v in CONFIG.items() if k != "additional_vocab_size"}).found
    assert found.cfg.decoder.vocab == 20
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= {rule.theirs for rule in found.rules}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"use_resampler": False}, "no resampler"),
        ({"alpha_type": "matrix"}, "'alpha_type' is 'matrix'"),
        ({"additional_vocab_size": -1}, "'additional_vocab_size' is -1"),
        ({"additional_vocab_size": True}, "'additional_vocab_size' is True"),
        ({"cross_layer_interval": 3}, "does not divide 2"),
        ({"hidden_act": "mish"}, "'hidden_act' is 'mish'"),
        ({"qk_layer_norms": 1}, "'qk_layer_norms' is 1"),
        ({"vision_config": [8]}, "'vision_config' is"),
        ({"vision_config": VISION | {"embed_dim": 9}}, "2 heads"),
        ({"perceiver_config": RESAMPLER | {"resampler_depth": 0}}, "'resampler_depth' is 0"),
    ],
)
def test_what_is_not_computed_is_refused(changes, says):
    with pytest.raises(InputError, match=says):
        Origin.of(CONFIG | changes)


def made(path, added, images=None, **config):
    """A directory of a processor, whose tokenizer has these symbols besides."""
    given = {"model_type": "idefics", "vision_config": VISION | {"patch_size": 4}, "perceiver_config": RESAMPLER}
    images = {"image_processor_type": "IdeficsImageProcessor", "image_size": 8} | (images or {})
    out = directory(path, given | config, images)
    told = tokenizer()
    first = max(token["id"] for token in told["added_tokens"]) + 1
    flags = {k: v for k, v in told["added_tokens"][0].items() if k not in ("id", "content")}
    told["added_tokens"] += [{"id": first + n, "content": s, **flags} for n, s in enumerate(added)]
    write(out, "tokenizer.json", told)
    write(out, "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})
    return out


def test_a_dialogue_where_there_is_what_ends_an_utterance(tmp_path):
    shown = Image(9, 7, np.zeros((9, 7, 3), np.uint8))
    asked = Document("q", (shown, shown, Text("Who?")))
    for number, (added, marks) in enumerate((([FAKE, END], [END]), ([FAKE], []))):
        (folder := tmp_path / str(number)).mkdir()
        ours = processor.load(made(folder, added, additional_vocab_size=2))
        example, _ = ours.example(asked)
        assert symbols(ours, example.tokens.tolist()) == ["<s>", FAKE, "<image>", FAKE, "<image>", FAKE, *marks]
        said = ours.chat.decode(example.tokens.tolist())
        assert ("User:" in said, said.endswith("Assistant:")) == (bool(marks),) * 2
        assert ours.stops == tuple(ours.chat.controls[s] for s in ("</s>", *marks))
        assert ours.vocab.size == 1002
        # The last picture so far, from its own mark on.
        at = np.flatnonzero(example.tokens == ours.chat.controls["<image>"])
        assert (example.media_lo <= example.media_hi).tolist() == [n >= at[0] for n in range(len(example.tokens))]
        assert example.media_lo[at[1] :].tolist() == [3] * (len(example.tokens) - at[1])
        assert example.media == 6


@pytest.mark.parametrize(
    ("images", "says"),
    [
        ({"image_size": 12}, "12 pixels, where config.json has an encoder for 8"),
        ({"do_center_crop": True}, "crops pictures"),
        ({"image_num_channels": 1}, "other channels"),
        ({"image_processor_type": "CLIPImageProcessor"}, "names the image processor"),
    ],
)
def test_settings_of_pictures_are_refused(images, says, tmp_path):
    with pytest.raises(InputError, match=says):
        processor.load(made(tmp_path, [FAKE], images))


def test_a_tokenizer_without_its_tokens_is_refused(tmp_path):
    with pytest.raises(InputError, match="has no token '<fake_token_around_image>'"):
        processor.load(made(tmp_path, []))
