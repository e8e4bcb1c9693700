"""Idefics2, Idefics3 and SmolVLM: what is honoured of their directories, and what is refused in one sentence."""

import numpy as np
import pytest
from convert.test_processor import SYMBOLS, directory, symbols, tokenizer, write

pytest.importorskip("tokenizers", reason="needs the `data` extra")

from mmjax.convert import processor
from mmjax.convert.huggingface import Origin
from mmjax.core.errors import InputError
from mmjax.encoders import vit
from mmjax.sequence.document import Document, Image, Text, Video
from mmjax.tokenizers.slices import Bounded
from mmjax.tokenizers.tiles import Splits
from mmjax.tokenizers.video import Trimmed

FAKE = "<fake_token_around_image>"
TAGS = ["<global-img>", *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}:{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<image>{% else %}{{ item['text'] }}{% endif %}{% endfor %}</s>{% endfor %}"
)
VISION = {"patch_size": 4, "image_size": 8}
SECOND = {"model_type": "idefics2", "vision_config": VISION, "perceiver_config": {"resampler_n_latents": 3}}
THIRD = {"model_type": "smolvlm", "vision_config": VISION}
QUARTERS = {"image_processor_type": "Idefics2ImageProcessor", "size": {"shortest_edge": 4, "longest_edge": 12}}
TILES = {"image_processor_type": "SmolVLMImageProcessorFast", "size": {"longest_edge": 16}, "max_image_size": 8}
TILES["max_image_size"] = {"longest_edge": 8}


def made(path, config, images, length, tags=TAGS, names=None):
    """A directory of a processor whose pictures are counted as `length` tokens."""
    out = directory(path, config, images, TEMPLATE, processor_config={"image_seq_len": length})
    told = tokenizer()
    first = max(token["id"] for token in told["added_tokens"]) + 1
    flags = {k: v for k, v in told["added_tokens"][0].items() if k not in ("id", "content")}
    told["added_tokens"] += [
        {"id": first + n, "content": s, **flags} for n, s in enumerate([FAKE, "<end_of_utterance>", *tags])
    ]
    write(out, "tokenizer.json", told)
    if names:
        write(out, "special_tokens_map.json", names)
    return out


def asked(height, width):
    pixels = np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)
    return Document("q", (Image(height, width, pixels), Text("Why?")))


def test_quarters_and_the_whole_are_apart(tmp_path):
    """Idefics2: every view is the resampler's three tokens; a word behind a picture begins with a space."""
    ours = processor.load(made(tmp_path, SECOND, QUARTERS | {"do_image_splitting": True}, 3))
    assert ours.resolution == Bounded(4, 4, 12, True)
    example, pixels = ours.example(asked(10, 21))
    views = [FAKE, *["<image>"] * 3] * 5
    assert symbols(ours, example.tokens.tolist()) == ["<s>", *views, FAKE, "</s>"]
    assert ours.chat.decode(example.tokens[-7:].tolist()).startswith(" Why?")
    assert example.grid.tolist() == [[1, 1, 2]] * 4 + [[1, 1, 3]]
    assert sum(map(len, pixels)) == 4 * 2 + 3
    assert example.media == 15


@pytest.mark.parametrize("tags", [TAGS, []], ids=["tokens", "words"])
def test_tiles_and_their_places(tags, tmp_path):
    """A tile of 2 × 2 patches is one token; their places are words where the tokenizer has no tokens for them."""
    ours = processor.load(made(tmp_path, THIRD, TILES, 1, tags))
    assert ours.resolution == Splits(4, 8, 16)
    example, _ = ours.example(asked(10, 40))
    places = [["<row_1_col_1>"], ["<row_1_col_2>"], ["<global-img>"]] if tags else [[]] * 3
    expected = [symbol for place in places for symbol in (FAKE, *place, "<image>")]
    assert symbols(ours, example.tokens.tolist()) == ["<s>", *expected, FAKE, "</s>"]
    said = "user:<row_1_col_1><row_1_col_2>\n\n<global-img>Why?" if not tags else "user:\n\nWhy?"
    assert ours.chat.decode([t for t in example.tokens.tolist() if t not in ours.chat.controls.values()]) == said
    whole = ours.example(Document("t", (Text("<global-img><image>"),)))[0]
    assert symbols(ours, whole.tokens.tolist()) == ["<s>", "</s>"]


def test_frames_and_their_times(tmp_path):
    """SmolVLM's own way of writing conversations with videos, whatever the template says."""
    sampling = {"video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 16}}}
    ours = processor.load(made(tmp_path, THIRD, TILES | sampling, 1))
    assert ours.clips == Trimmed(Splits(4, 8, 16, split=False), 1.0, 64)
    film = Document("f", (Video(120, 9, 12, 2.0, np.zeros((120, 9, 12, 3), np.uint8)), Text("Why?")))
    example, pixels = ours.example(film)
    n = 60
    frame = [FAKE, "<global-img>", "<image>", FAKE]
    assert symbols(ours, example.tokens.tolist()) == ["<|im_start|>", *frame * n, "<end_of_utterance>"]
    said = ours.chat.decode([t for t in example.tokens.tolist() if t not in ours.chat.controls.values()])
    begin = "User: You are provided the following series of sixty frames from a 0:01:00 [H:MM:SS] video.\n"
    assert said.startswith(begin + "\nFrame from 00:00:\nFrame from 00:01:")
    assert said.endswith("\nFrame from 00:59:\n\nWhy?\nAssistant:")
    assert example.grid.tolist() == [[n, 2, 2]]
    assert example.media == n
    assert pixels[0].shape == (4 * n, 48)
    assert ours.films is not None
    assert ours.layout(asked(10, 40)).pieces[0].ids == (ours.chat.controls["<s>"],)
    (tmp_path / "second").mkdir()
    with pytest.raises(InputError, match="span 0 is of the type 'video'"):
        processor.load(made(tmp_path / "second", SECOND, QUARTERS, 3)).layout(film)


REFUSED = {
    "other counts": (SECOND, QUARTERS, 4, {}, "'image_seq_len' is 4, and the model makes 3 tokens"),
    "other tiles": (THIRD, TILES | {"max_image_size": {"longest_edge": 16}}, 1, {}, "'image_seq_len' is 1, and the mo"),
    "bounds": (SECOND, QUARTERS | {"size": {"shortest_edge": 14, "longest_edge": 12}}, 3, {}, "'size' is"),
    "no bounds": (
        SECOND,
        QUARTERS | {"size": {"height": 8, "width": 8}},
        3,
        {},
        "wants shortest_edge and longest_edge",
    ),
    "no tile": (THIRD, TILES | {"max_image_size": {"longest_edge": 3}}, 1, {}, "makes tiles of 3 pixels"),
    "half squares": (THIRD | {"scale_factor": 3}, TILES, 1, {}, "no squares of 3 × 3 patches"),
    "a square": (THIRD, TILES | {"size": {"height": 8, "width": 8}}, 1, {}, "wants longest_edge"),
    "other processors": (SECOND, TILES, 3, {}, "names the image processor 'SmolVLMImageProcessor'"),
    "other names": (SECOND, QUARTERS, 3, {"image_boundary_token": "</s>"}, "calls image_boundary_token '</s>'"),
    "half a choice": (THIRD, TILES | {"fps": 1}, 1, {}, "needs fps and the most frames"),
    "no choice": (THIRD, TILES | {"do_sample_frames": True}, 1, {}, "needs fps and the most frames"),
    "not resized": (THIRD, TILES | {"do_resize": False}, 1, {}, "do_resize"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_reproduced_is_refused(name, tmp_path):
    config, images, length, names, says = REFUSED[name]
    with pytest.raises(InputError, match=says) as found:
        processor.load(made(tmp_path, config, images, length, names=names))
    assert str(tmp_path) in str(found.value)
    assert "\n" not in str(found.value)


def test_symbols_that_must_be_tokens(tmp_path):
    path = made(tmp_path, THIRD, TILES, 1, TAGS[:-1])
    with pytest.raises(InputError, match="has no token '<row_6_col_6>'"):
        processor.load(path)
    write(path, "tokenizer.json", tokenizer())
    with pytest.raises(InputError, match="has no token '<fake_token_around_image>'"):
        processor.load(path)
    assert FAKE not in SYMBOLS


CONFIGS = [
    (SECOND | {"perceiver_config": {"qk_layer_norms_perceiver": True}}, "'qk_layer_norms_perceiver'"),
    (SECOND | {"perceiver_config": {"hidden_act": "mish"}}, "'hidden_act' is 'mish'"),
    (SECOND | {"text_config": {"model_type": "mixtral"}}, "model_type is 'mixtral'"),
    (THIRD | {"use_resampler": True}, "'use_resampler'"),
    (THIRD | {"text_config": {"qk_layer_norms": True}}, "'qk_layer_norms'"),
    (THIRD | {"scale_factor": 0}, "'scale_factor' is 0"),
    (THIRD | {"vision_config": "siglip"}, "'vision_config' is 'siglip'"),
]


@pytest.mark.parametrize(("config", "says"), CONFIGS, ids=[says for _, says in CONFIGS])
def test_models_that_are_not_computed_are_refused(config, says):
    with pytest.raises(InputError, match=says):
        Origin.of(config)


def test_left_out_parts_are_those_of_transformers():
    second, third = (Origin.of({"model_type": name}).found.cfg for name in ("idefics2", "smolvlm"))
    assert second.vision.table == third.vision.table == vit.Table(7, 7, "bucket")
    assert (second.vision.blocks.width, third.vision.blocks.width) == (768, 1152)
    assert (second.connector.latents, second.connector.width, third.connector.square) == (64, 4096, 2)
    assert (second.decoder.blocks.kv_heads, second.decoder.blocks.epsilon, third.decoder.blocks.epsilon) == (
        8,
        1e-5,
        1e-5,
    )
    assert (second.placeholder, third.placeholder, third.decoder.tied) == (32001, 128257, False)
