"""Processors from tiny directories written by hand: what is honoured, and what is refused in one sentence."""

import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizer_files

pytest.importorskip("tokenizers", reason="needs the `data` extra")

from mmjax.connectors import linear
from mmjax.convert import huggingface, processor
from mmjax.convert.processor.files import Settings
from mmjax.convert.processor.images import Tower, colours, fixed_of, pinpoints
from mmjax.core.errors import InputError
from mmjax.encoders import vit
from mmjax.models import decoder, vlm
from mmjax.nn import patch_embed, transformer
from mmjax.sequence import invariants
from mmjax.sequence.batch import Bucket
from mmjax.sequence.buckets import ladder
from mmjax.sequence.document import Document, Image, Text, Video
from mmjax.sequence.layout import IMAGE, TEXT

ITEMS = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}IMAGE{% elif item['type'] == 'video' %}VIDEO{% else %}{{ item['text'] }}"
    "{% endif %}{% endfor %}{% endif %}"
)
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}: " + ITEMS + "</s>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
)
LLAVA = TEMPLATE.replace("IMAGE", "<image>")
QWEN = TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>").replace(
    "VIDEO", "<|vision_start|><|video_pad|><|vision_end|>"
)
SYMBOLS = ("</s>", "<image>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
SYMBOLS += ("<img>", "</img>", "<IMG_CONTEXT>", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "</image>")
CLIP = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 8}, "crop_size": 8}


def write(path, name, what):
    (path / name).write_text(what if isinstance(what, str) else json.dumps(what))


def tokenizer(**changed):
    """A tokenizer.json whose texts begin with <s>."""
    out = tokenizer_files.letters()
    first = max(token["id"] for token in out["added_tokens"]) + 1
    flags = {**tokenizer_files.FLAGS, "special": True}
    out["added_tokens"] += [{"id": first + n, "content": s, **flags} for n, s in enumerate(SYMBOLS)]
    begin = next(token["id"] for token in out["added_tokens"] if token["content"] == "<s>")
    out["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [begin], "tokens": ["<s>"]}},
    }
    return out | changed


def directory(path, config, images=None, template=LLAVA, **more):
    path = path / "model"
    path.mkdir()
    write(path, "config.json", {"vocab_size": 1000} | config)
    write(path, "tokenizer.json", tokenizer())
    write(path, "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template})
    if images is not None:
        write(path, "preprocessor_config.json", images)
    for name, what in more.items():
        write(path, f"{name}.json", what)
    return path


def llava(path, images=None, vision=None, config=None, **more):
    vision = {"model_type": "clip_vision_model", "patch_size": 4, "image_size": 8} | (vision or {})
    config = {"model_type": "llava", "vision_config": vision} | (config or {})
    return directory(path, config, CLIP | (images or {}), **more)


def qwen(path, images=None, kind="qwen2_5_vl", config=None, **more):
    vision = {"patch_size": 4, "window_size": 16, "tokens_per_second": 2}
    config = {"model_type": kind, "vision_config": vision} | (config or {})
    images = {"image_processor_type": "Qwen2VLImageProcessorFast", "patch_size": 4} | (images or {})
    return directory(path, config, images, QWEN, **more)


def ended():
    """A tokenizer.json whose texts end with </s>."""
    out = tokenizer()
    steps = out["post_processor"]
    steps["single"] = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}]
    end = next(token["id"] for token in out["added_tokens"] if token["content"] == "</s>")
    steps["special_tokens"] = {"</s>": {"id": "</s>", "ids": [end], "tokens": ["</s>"]}}
    return out


def blip(path, kind="blip-2", images=None, config=None, **more):
    vision = {"patch_size": 4, "image_size": 8}
    config = {"model_type": kind, "vision_config": vision, "num_query_tokens": 3} | (config or {})
    images = {"image_processor_type": "BlipImageProcessor", "size": {"height": 8, "width": 8}} | (images or {})
    out = directory(path, config, images, None, **more)
    write(out, "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})
    if kind == "instructblip":
        (out / "qformer_tokenizer").mkdir()
        write(out / "qformer_tokenizer", "tokenizer.json", ended())
    return out


def internvl(path, images=None, length=1, ratio=0.5):
    config = {"model_type": "internvl", "vision_config": {"patch_size": [4, 4], "image_size": [8, 8]}}
    config["downsample_ratio"] = ratio
    images = {"image_processor_type": "GotOcr2ImageProcessorFast", "size": {"height": 8, "width": 8}} | (images or {})
    own = {"image_seq_length": length}
    return directory(path, config, images, TEMPLATE.replace("IMAGE", "<IMG_CONTEXT>"), processor_config=own)


def pixtral(path, images=None, **own):
    config = {"model_type": "llava", "vision_config": {"model_type": "pixtral", "patch_size": 4}}
    images = {"image_processor_type": "PixtralImageProcessor", "size": {"longest_edge": 16}} | (images or {})
    return directory(path, config, images, TEMPLATE.replace("IMAGE", "[IMG]"), processor_config=own)


def kosmos2(path, template=LLAVA, **config):
    vision = {"patch_size": 4, "image_size": 8}
    path = directory(path, {"model_type": "kosmos-2", "vision_config": vision} | config, CLIP, template)
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<|im_start|>"}
    write(path, "tokenizer_config.json", named | ({"chat_template": template} if template else {}))
    return path


MARKS = ("<bos>", "<eos>", "<start_of_image>", "<end_of_image>", "<image_soft_token>")
MARKS += ("<image_placeholder>", "<｜end｜>")
NAMES = {"bos_token": "<bos>", "eos_token": "<eos>"}


def siglip(path, kind, processor_name, images=None, config=None, template=None, **more):
    """A model around SigLIP at 16 pixels in patches of 4."""
    vision = {"model_type": "siglip_vision_model", "patch_size": 4, "image_size": 16}
    images = {"image_processor_type": processor_name, "size": 16} | (images or {})
    out = directory(path, {"model_type": kind, "vision_config": vision} | (config or {}), images, **more)
    made = tokenizer()
    first = max(token["id"] for token in made["added_tokens"]) + 1
    flags = {**tokenizer_files.FLAGS, "special": True}
    made["added_tokens"] += [{"id": first + n, "content": s, **flags} for n, s in enumerate(MARKS)]
    write(out, "tokenizer.json", made)
    write(out, "tokenizer_config.json", NAMES | ({"chat_template": template} if template else {}))
    return out


def paligemma(path, images=None, config=None, **more):
    return siglip(path, "paligemma", "SiglipImageProcessor", images, config, **more)


GEMMA = TEMPLATE.replace("IMAGE", "<start_of_image>").replace("<|im_start|>", "")


def gemma3(path, images=None, config=None, **more):
    config = {"mm_tokens_per_image": 4} | (config or {})
    counted = {"image_seq_length": 4} | more.pop("processor_config", {})
    images = {"size": {"height": 16, "width": 16}} | (images or {})
    return siglip(path, "gemma3", "Gemma3ImageProcessor", images, config, GEMMA, processor_config=counted, **more)


DEEPSEEK = TEMPLATE.replace("IMAGE", "<image_placeholder>").replace("<|im_start|>", "").replace("</s>", "<｜end｜>")


def deepseek(path, images=None, **more):
    counted = {"num_image_tokens": 16} | more.pop("processor_config", {})
    return siglip(
        path, "deepseek_vl", "DeepseekVLImageProcessor", images, None, DEEPSEEK, processor_config=counted, **more
    )


ECHO = "{{ messages[0].content[0].text }}"
SMALL = {"min_pixels": 64, "max_pixels": 1024}
PICTURE = Image(10, 14, np.arange(10 * 14 * 3, dtype=np.uint8).reshape(10, 14, 3))
SAID = Text("What is <image> or <|image_pad|>?")
QUESTION = Document("q", (PICTURE, SAID))


def symbols(made, tokens):
    names = {token: symbol for symbol, token in made.chat.controls.items()}
    return [names.get(token) for token in tokens if token in names]


def test_a_question_to_llava(tmp_path):
    made = processor.load(llava(tmp_path))
    batch = made.batch([QUESTION])
    n = int((batch.order[0] >= 0).sum())
    # <s> is the tokenizer's, since the template does not write it; what the text says is text.
    expected = ["<s>", "<|im_start|>", *["<image>"] * 4, "</s>", "<|im_start|>"]
    assert symbols(made, batch.tokens[0, :n].tolist()) == expected
    assert made.chat.decode(batch.tokens[0, :n].tolist()).endswith("What is <image> or <|image_pad|>?assistant:")
    assert (batch.modality[0] == IMAGE).sum() == 4 == batch.grid[0].prod()
    assert batch.patches.shape == (1, 4, 4 * 4 * 3)
    assert batch.position[0, :n, 0].tolist() == list(range(n))
    invariants.check(batch, made.vocab, [["q"]])


def test_queries_stand_before_everything(tmp_path):
    """A picture's, wherever the picture is; what the text says is text; and questions need no template."""
    made = processor.load(blip(tmp_path))
    behind = Document("d", (SAID, PICTURE))
    batch = made.batch([QUESTION, behind])
    n = int((batch.order[0] >= 0).sum())
    assert symbols(made, batch.tokens[0, :n].tolist()) == [*["<image>"] * 3, "<s>"]
    np.testing.assert_array_equal(batch.tokens[0], batch.tokens[1])
    assert batch.slot[0, :4].tolist() == [0, 1, 2, -1]
    assert batch.patches.shape == (2, 4, 4 * 4 * 3)
    assert batch.instruction is None
    with pytest.raises(InputError, match="one question and one answer"):
        made.layout(Document("d", (SAID, Text("x", "assistant"), SAID)))


def test_a_question_is_read_beside_its_pictures(tmp_path):
    made = processor.load(blip(tmp_path, "instructblip"))
    two = Document("two", (PICTURE, PICTURE, Text("a")))
    batch = made.batch([two, Document("one", (PICTURE, Text("abc"), Text("x", "assistant")))])
    read, end = batch.instruction, made.reader.tokenizer.controls["</s>"]
    ids = made.reader.tokenizer.encode("abc")
    assert made.reader.after == (end,)
    assert read.tokens.shape == (2, 2 * 16)
    assert read.tokens[1, : len(ids) + 1].tolist() == [*ids, end]
    assert [read.document[0, 0], read.document[0, 16]] == [0, 1]
    invariants.check(batch, made.vocab, media=np.array([[True] * 6, [True] * 3 + [False] * 3]))
    (tmp_path / "other").mkdir()
    other = processor.load(blip(tmp_path / "other", "instructblip"))
    assert other.fingerprint == made.fingerprint


def test_what_an_encoder_decoder_is_asked_ends(tmp_path):
    """</s> stands behind the question, and the answer begins with an id of its own."""
    path = blip(tmp_path, config={"text_config": {"model_type": "t5", "vocab_size": 1000, "pad_token_id": 5}})
    write(path, "tokenizer.json", ended())
    made = processor.load(path)
    example, _ = made.example(QUESTION)
    assert symbols(made, example.tokens.tolist()) == [*["<image>"] * 3, "</s>"]
    assert example.tokens[-1] == made.chat.controls["</s>"]
    assert example.answer.tokens.tolist() == [5]
    assert made.batch([QUESTION]).answer.tokens.shape == (1, 1)
    write(path, "generation_config.json", {"decoder_start_token_id": 7})  # where it is said, padding is not asked
    assert processor.load(path).sequence.start == 7


def test_a_question_to_internvl_and_to_pixtral(tmp_path):
    """What their processors write around media that the template has but a marker for."""
    made = processor.load(internvl(tmp_path, {"max_patches": 6}))
    batch = made.batch([QUESTION])
    n = int((batch.order[0] >= 0).sum())
    media = ["<img>", *["<IMG_CONTEXT>"] * 7, "</img>"]  # six tiles and the whole
    assert symbols(made, batch.tokens[0, :n].tolist()) == ["<s>", "<|im_start|>", *media, "</s>", "<|im_start|>"]
    assert batch.grid[0, :7].tolist() == [[1, 2, 2]] * 7
    invariants.check(batch, made.vocab, [["q"]], batch.patch_kind[:, ::4] == 1)
    other = tmp_path / "other"
    other.mkdir()
    made = processor.load(pixtral(other, patch_size=4, image_end_token="</img>"))
    batch = made.batch([QUESTION])
    n = int((batch.order[0] >= 0).sum())
    media = [*["[IMG]"] * 4, "[IMG_BREAK]", *["[IMG]"] * 4, "[IMG_BREAK]", *["[IMG]"] * 4, "</img>"]
    assert symbols(made, batch.tokens[0, :n].tolist()) == ["<s>", "<|im_start|>", *media, "</s>", "<|im_start|>"]
    assert (batch.slot[0, :n][batch.tokens[0, :n] == made.chat.controls["[IMG_BREAK]"]] == -1).all()
    invariants.check(batch, made.vocab, [["q"]])


def test_a_question_to_kosmos2(tmp_path):
    made = processor.load(kosmos2(tmp_path, "", latent_query_num=3))
    batch = made.batch([QUESTION])
    unknown = made.chat.controls["<|im_start|>"]
    tokens = batch.tokens[0].tolist()
    assert tokens[:6] == [made.chat.controls[s] for s in ("<s>", "<image>")] + [unknown + n for n in (1, 2, 3)] + [
        made.chat.controls["</image>"]
    ]
    assert made.chat.decode(tokens[6 : int((batch.order[0] >= 0).sum())]) == " What is <image> or <|image_pad|>?"
    assert made.layout(QUESTION, answer=5).tokens == made.layout(QUESTION).tokens + 5
    invariants.check(batch, made.vocab, [["q"]], (batch.grid > 0).all(-1).repeat(3, 1))


def test_what_is_asked_for_and_what_is_not(tmp_path):
    made = processor.load(llava(tmp_path))
    answered = Document("a", (*QUESTION.spans, Text("A cat.", "assistant", True)))
    asked = made.layout(QUESTION).tokens
    assert made.layout(QUESTION, ask=False).tokens < asked
    assert made.layout(QUESTION, answer=5).tokens == asked + 5
    assert (
        made.layout(answered).tokens == made.layout(answered, ask=False).tokens < made.layout(answered, ask=True).tokens
    )
    example, _ = made.example(answered)
    assert example.weight.sum() > 0


def test_text_outside_of_conversations(tmp_path):
    made = processor.load(llava(tmp_path))
    example, _ = made.example(Document("d", (Text("once <|im_start|>", "document"),)))
    assert symbols(made, example.tokens.tolist()) == ["<s>"]
    assert made.chat.decode(example.tokens.tolist()) == "once <|im_start|>"


def test_batches_share_few_buckets(tmp_path):
    made = processor.load(llava(tmp_path))
    both = [QUESTION, Document("t", (Text("Hello"),))]
    batch = made.batch(both)
    assert batch.tokens.shape[0] == 2
    assert (batch.grid[1] == 0).all()
    assert (batch.patch_order[1] == -1).all()
    alone = made.batch(both[1:])
    assert alone.patches.shape[1] == 0  # no pictures: no encoder runs
    np.testing.assert_array_equal(alone.tokens[0, :16], batch.tokens[1, :16])
    given = made.batch(both, Bucket(3, 128, 8, 2))
    assert given.tokens.shape == (3, 128)
    assert [ladder(n) for n in (0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 17, 25)] == [1, 1, 2, 3, 4, 6, 6, 8, 12, 16, 24, 32]


def test_a_clip_and_a_picture_for_qwen(tmp_path):
    made = processor.load(qwen(tmp_path, SMALL))
    assert (made.sequence.window, made.sequence.merge, made.group) == (2, 2, 2)
    film = np.random.default_rng(0).integers(0, 256, (5, 16, 24, 3), np.uint8)
    spans = (Video(5, 16, 24, 4.0, film), PICTURE, Text("what?"))
    batch = made.batch([Document("v", spans)])
    assert batch.grid[0, :2].tolist() == [[3, 4, 6], [1, 2, 4]]
    values = 4 * 4 * 3
    assert batch.patches.shape[2] == 2 * values
    # The last picture of an odd number is there twice, and so is a still one.
    last = batch.patches[0, 48:72].reshape(24, 2, values)
    np.testing.assert_array_equal(last[:, 0], last[:, 1])
    assert not (batch.patches[0, :24, :values] == batch.patches[0, :24, values:]).all()
    # Half a second a frame, two numbers a second.
    time = batch.position[0, batch.modality[0] == 4, 0]
    assert sorted(set((time - time.min()).tolist())) == [0, 1, 2]
    assert made.batch([Document("p", (PICTURE, Text("what?")))]).patches.shape[2] == values
    invariants.check(batch, made.vocab, [["v"]], batch.patch_kind[:, ::4] == 1)


def test_frames_of_qwen3_have_their_times(tmp_path):
    made = processor.load(
        qwen(
            tmp_path,
            {**SMALL, "image_mean": 0.5, "image_std": 0.5},
            "qwen3_vl",
            video_preprocessor_config={"do_sample_frames": False, "size": {"shortest_edge": 64, "longest_edge": 4096}},
        )
    )
    film = np.zeros((4, 8, 8, 3), np.uint8)
    example, _ = made.example(Document("v", (Video(4, 8, 8, 2.0, film), Text("what?"))))
    assert "<0.2 seconds>" in made.chat.decode(example.tokens.tolist())
    assert "<1.2 seconds>" in made.chat.decode(example.tokens.tolist())
    assert symbols(made, example.tokens.tolist()).count("<|vision_start|>") == 3
    between = example.modality[np.flatnonzero(example.slot >= 0).min() : np.flatnonzero(example.slot >= 0).max()]
    assert (between == TEXT).any()


def test_a_question_to_paligemma_is_a_prefix(tmp_path):
    """Without a template: pictures, its own first token whatever the tokenizer writes, the question, a line's end."""
    made = processor.load(paligemma(tmp_path, {"image_seq_length": 16}))
    example, _ = made.example(QUESTION)
    n = len(example.tokens)
    assert symbols(made, example.tokens.tolist()) == [*["<image>"] * 16, "<bos>"]
    assert made.chat.decode(example.tokens.tolist()) == f"{SAID.text}\n"
    assert example.hi.tolist() == [n - 1] * n  # all of it sees all of it
    answered = Document("a", (SAID, PICTURE, Text("A cat.", "assistant", True)))
    example, _ = made.example(answered)
    assert symbols(made, example.tokens.tolist()) == [*["<image>"] * 16, "<bos>", "<eos>"]
    assert example.hi.tolist() == [*[n - 1] * n, *range(n, len(example.tokens))]
    assert example.weight.sum() == len(example.tokens) - n
    with pytest.raises(InputError, match="several turns of one role"):
        made.layout(Document("m", (*answered.spans, Text("and?"))))


def test_pictures_and_crops_for_gemma_3(tmp_path):
    """The template has a mark, the processor writes around it; four patches are a token, seen by those beside it."""
    crops = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 4}
    made = processor.load(gemma3(tmp_path, crops))
    assert (made.sequence.merge, made.resolution.filter) == (2, "bilinear")
    wide = Image(8, 24, np.zeros((8, 24, 3), np.uint8))
    example, _ = made.example(Document("g", (PICTURE, wide, SAID)))
    one = ["<start_of_image>", *["<image_soft_token>"] * 4, "<end_of_image>"]
    assert symbols(made, example.tokens.tolist()) == ["<s>", *one * (3 + 4), "</s>"]
    assert "some crops to help you see better" in made.chat.decode(example.tokens.tolist())
    places = np.flatnonzero(example.modality == IMAGE).reshape(-1, 4)
    assert (example.hi[places] == places[:, 3:]).all()
    assert example.grid.tolist() == [[1, 4, 4]] * 7
    (tmp_path / "plain").mkdir()
    assert len(processor.load(gemma3(tmp_path / "plain")).example(Document("g", (wide, SAID)))[0].grid) == 1


def test_control_tokens_of_any_script(tmp_path):
    """DeepSeek's have full-width bars: what a template writes of them is a token, and what a text says is not."""
    made = processor.load(deepseek(tmp_path))
    said = Text("what is <｜end｜>?")
    assert symbols(made, made.example(Document("d", (said,)))[0].tokens.tolist()) == ["<s>", "<｜end｜>"]


def test_stops(tmp_path):
    assert processor.load(llava(tmp_path, generation_config={"eos_token_id": [7, 9]})).stops == (7, 9)
    other = tmp_path / "b"
    other.mkdir()
    made = processor.load(directory(other, {"model_type": "llama", "eos_token_id": 3}, template=LLAVA))
    assert made.stops == (3,)
    third = tmp_path / "c"
    third.mkdir()
    made = processor.load(directory(third, {"model_type": "llama"}))
    assert made.stops == (made.chat.controls["</s>"],)


def test_text_alone(tmp_path):
    made = processor.load(directory(tmp_path, {"model_type": "llama"}))
    example, media = made.example(Document("d", (Text("Hello"),)))
    # No <s>: a template is all that is written where there is no processor.
    assert symbols(made, example.tokens.tolist()) == ["<|im_start|>", "</s>", "<|im_start|>"]
    assert not media
    assert made.batch([Document("d", (Text("Hello"),))]).patches.shape[1] == 0
    with pytest.raises(InputError, match="'q', span 0 is no text"):
        made.batch([QUESTION])


def test_both_layouts_are_one(tmp_path):
    hub = processor.load(llava(tmp_path))
    five = tmp_path / "five"
    five.mkdir()
    path = llava(five, processor_config={"image_processor": CLIP, "image_token": "<image>"})
    (path / "preprocessor_config.json").unlink()
    (path / "chat_template.jinja").write_text(LLAVA)
    write(path, "tokenizer_config.json", {"bos_token": {"content": "<s>"}, "eos_token": "</s>"})
    made = processor.load(path)
    assert made.fingerprint == hub.fingerprint
    assert made.batch([QUESTION]).tokens.tolist() == hub.batch([QUESTION]).tokens.tolist()


@pytest.mark.parametrize(
    ("settings", "mean", "deviation"),
    [
        ({}, 0.5, 0.25),
        ({"do_normalize": False}, 0.0, 1.0),
        ({"do_rescale": False}, 0.5 / 255, 0.25 / 255),
        ({"rescale_factor": 2 / 255}, 0.25, 0.125),
    ],
)
def test_every_factor_comes_to_a_mean_and_a_deviation(settings, mean, deviation):
    found = colours(Settings({"image_mean": [0.5] * 3, "image_std": 0.25} | settings, "f"), patch_embed.HALF)
    np.testing.assert_allclose(found, [[mean] * 3, [deviation] * 3])
    cfg = patch_embed.Config(1, 1, mean=found[0], deviation=found[1])
    factor = 1.0 if "do_rescale" in settings else settings.get("rescale_factor", 1 / 255)
    value = 51 * factor if "do_normalize" in settings else (51 * factor - 0.5) / 0.25
    got = patch_embed.normalise(jnp.full((1, 1, 3), 51, jnp.uint8), cfg)
    np.testing.assert_allclose(got, np.full((1, 1, 3), value), rtol=1e-5)


def test_the_rest_of_a_side_that_is_no_whole_patch_is_dropped():
    said, tower = Settings({}, "here"), Tower(14)
    assert [fixed_of(said, tower, side).drop for side in (378, 384)] == [False, True]


def test_pinpoints_are_height_and_width():
    assert pinpoints(Settings({"image_grid_pinpoints": [[28, 56], [84, 28]]}, "here"), 28) == ((1, 2), (3, 1))


def test_a_model_gets_the_colours_of_its_directory(tmp_path):
    made = processor.load(llava(tmp_path, {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}))
    blocks = transformer.Config(width=8, layers=1, heads=1, head=8, kv_heads=1, hidden=8)
    tower = vit.Config(patch_embed.Config(4, 8), blocks)
    cfg = vlm.Config(tower, linear.Config(8, 8), decoder.Config(1000, blocks))
    found = processor.with_colours(huggingface.Model(vlm, cfg, {}), made)
    assert (found.cfg.vision.embed.mean, found.cfg.vision.embed.deviation) == made.colours
    assert found.cfg.decoder == cfg.decoder
    again = tmp_path / "again"
    again.mkdir()
    with pytest.raises(InputError, match=r"a table of 1,000 tokens, and .* says 999"):
        processor.load(llava(again, config={"vocab_size": 999}), found)


# name: (how the directory is made, what the error says)
REFUSED = {
    "tiles of other tokens": (
        lambda p: internvl(p, length=256),
        "'image_seq_length' is 256, and the connector makes 1",
    ),
    "no whole shuffle": (lambda p: internvl(p, ratio=2.0), "'downsample_ratio' is 2; one over it must be"),
    "a shuffle of all": (lambda p: internvl(p, ratio=1e-320), "one over it must be a whole number"),
    "tiles of another size": (lambda p: internvl(p, {"size": {"height": 16, "width": 16}}), "an encoder for 8"),
    "fewer tiles than fewest": (lambda p: internvl(p, {"min_patches": 5, "max_patches": 2}), "into 5 to 2 tiles"),
    "another patch": (lambda p: pixtral(p), "'patch_size' is 16, and config.json 4"),
    "merged breaks": (lambda p: pixtral(p, patch_size=4, spatial_merge_size=2), "'spatial_merge_size' is 2"),
    "cropped": (lambda p: pixtral(p, {"do_center_crop": True}, patch_size=4), "do_center_crop"),
    "two longest": (lambda p: pixtral(p, {"size": {"height": 8, "width": 16}}, patch_size=4), "height, width alike"),
    "a template too many": (lambda p: kosmos2(p, ECHO), "the processor of a kosmos-2 has not"),
    "another count": (
        lambda p: paligemma(p, {"image_seq_length": 4}),
        "'image_seq_length' is 4, and the encoder makes",
    ),
    "unread template": (lambda p: paligemma(p, template=LLAVA), "which PaliGemma's processor does not read"),
    "a count left out": (
        lambda p: gemma3(p, processor_config={"image_seq_length": None}),
        "'image_seq_length' is (None|256), and the encoder makes 4",
    ),
    "unequal squares": (lambda p: gemma3(p, config={"mm_tokens_per_image": 9}), "'mm_tokens_per_image' is 9, which"),
    "other marks": (
        lambda p: gemma3(p, processor_config={}, special_tokens_map={"boi_token": "<boi>"}),
        "says 'boi_token' is '<boi>'",
    ),
    "no canvas": (lambda p: deepseek(p, {"do_pad": False}), "does not pad pictures to squares"),
    "other patches": (
        lambda p: deepseek(p, processor_config={"num_image_tokens": 9}),
        "'num_image_tokens' is 9, and the encoder makes 16",
    ),
    "unknown family": (lambda p: llava(p, config={"model_type": "idefics9"}), "'idefics9', whose processor mmjax"),
    "another encoder's": (lambda p: llava(p, {"image_processor_type": "ViTImageProcessor"}), "'ViTImageProcessor'"),
    "no resize": (lambda p: llava(p, {"do_resize": False}), "does not resize pictures"),
    "odd filter": (lambda p: llava(p, {"resample": 0}), "Pillow's filter 0"),
    "no filter": (lambda p: llava(p, {"resample": "bicubic"}), "'resample' is 'bicubic'"),
    "size of text": (lambda p: llava(p, {"size": "large"}), "'shortest_edge' is 'large'"),
    "negative size": (lambda p: llava(p, {"size": {"shortest_edge": -8}}), "'shortest_edge' is -8"),
    "huge size": (lambda p: llava(p, {"size": 2**30}), "1,073,741,824 pixels a side"),
    "strange size": (lambda p: llava(p, {"size": {"area": 5}}), "no size that mmjax knows"),
    "other crop": (lambda p: llava(p, {"size": {"height": 8, "width": 8}, "crop_size": 4}), "resizes to 8 pixels"),
    "other encoder": (lambda p: llava(p, vision={"image_size": 16}), "an encoder for 16 in patches of 4"),
    "two means": (lambda p: llava(p, {"image_mean": [0.5, 0.5]}), "'image_mean' is"),
    "deviation of zero": (lambda p: llava(p, {"image_std": [0.5, 0.0, 0.5]}), "'image_std' is"),
    "flag of text": (lambda p: llava(p, {"do_normalize": "yes"}), "'do_normalize' is 'yes'"),
    "class token": (
        lambda p: llava(p, processor_config={"vision_feature_select_strategy": "full"}),
        "keeps CLIP's class token",
    ),
    "one token too many": (
        lambda p: llava(
            p, processor_config={"vision_feature_select_strategy": "default", "num_additional_image_tokens": 2}
        ),
        "counts 2 tokens more than patches",
    ),
    "other queries": (
        lambda p: blip(p, processor_config={"num_query_tokens": 4}),
        "'num_query_tokens' is 4, and config.json 3",
    ),
    "crop": (lambda p: blip(p, images={"do_center_crop": True}), "which BLIP's processor does not do"),
    "text that ends": (lambda p: llava(p, tokenizer=ended()), "writes a token after every text"),
    "two patches": (lambda p: llava(p, processor_config={"patch_size": 7}), "'patch_size' is 7, and config.json 4"),
    "two ids": (lambda p: llava(p, config={"image_token_index": 3}), "'image_token_index' is 3, and the tokenizer has"),
    "no image token": (lambda p: llava(p, processor_config={"image_token": "<picture>"}), "no token '<picture>'"),
    "end of nothing": (lambda p: llava(p, generation_config={"eos_token_id": ["x"]}), "'eos_token_id' is"),
    "end outside": (lambda p: llava(p, generation_config={"eos_token_id": 10**6}), "'eos_token_id' is 1000000"),
    "list for an object": (lambda p: llava(p, processor_config=[1]), "is not a JSON object"),
    "number for a part": (lambda p: llava(p, processor_config={"image_processor": 3}), "'image_processor' is 3"),
    "globals": (
        lambda p: llava(p, template="{{ self.__init__.__globals__['os'].system('id') }}"),
        "Document 'the first'.*unsafe",
    ),
    "endless": (lambda p: llava(p, template="{% for i in range(10**12) %}{% endfor %}x"), "Document 'the first'"),
    "small before large": (lambda p: qwen(p, {"min_pixels": 1024, "max_pixels": 64}), "bounds pictures by 1024 and 64"),
    "half a size": (lambda p: qwen(p, {"size": {"shortest_edge": 64}}), "bounds pictures by 64 and None"),
    "merged otherwise": (lambda p: qwen(p, {"merge_size": 3}), "'merge_size' is 3, and config.json 2"),
    "two colours": (
        lambda p: qwen(p, SMALL, video_preprocessor_config={"image_mean": [0.5] * 3}),
        "normalises pictures by",
    ),
    "frames of nothing": (
        lambda p: qwen(p, SMALL, video_preprocessor_config={"do_sample_frames": True}),
        "needs either fps or num_frames",
    ),
    "a frame for every number": (
        lambda p: qwen(p, SMALL, video_preprocessor_config={"do_sample_frames": True, "num_frames": 2**31 - 1}),
        "'num_frames' is",
    ),
    "capped": (
        lambda p: qwen(p, SMALL, video_preprocessor_config={"cap_pixels_per_frame": True}),
        "cap_pixels_per_frame",
    ),
    "other films": (
        lambda p: qwen(p, SMALL, video_preprocessor_config={"video_processor_type": "SmolVLMVideoProcessor"}),
        "names the video processor 'SmolVLMVideoProcessor'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_reproduced_is_refused(name, tmp_path):
    make, says = REFUSED[name]
    with pytest.raises(InputError, match=says) as found:
        processor.load(make(tmp_path))
    assert str(tmp_path) in str(found.value) or "Document" in str(found.value)
    assert "\n" not in str(found.value)


def test_files_that_are_not_there_or_too_large(tmp_path):
    with pytest.raises(InputError, match="is no directory"):
        processor.load(tmp_path / "nothing")
    path = llava(tmp_path)

    def refused(says):
        with pytest.raises(InputError, match=says):
            processor.load(path)

    held = (path / "preprocessor_config.json").read_text()
    (path / "preprocessor_config.json").write_text(json.dumps({"x": "y" * (5 << 20)}))
    refused("preprocessor_config.json has 5,242,.* bytes")
    (path / "preprocessor_config.json").unlink()
    os.mkfifo(path / "preprocessor_config.json")
    refused("is not a regular file")
    (path / "preprocessor_config.json").unlink()
    (path / "preprocessor_config.json").symlink_to(tmp_path / "gone")
    refused("a link to a file that is not there")
    (path / "preprocessor_config.json").unlink()
    refused("of 224 pixels")  # the family's own defaults, which do not fit this encoder
    (path / "preprocessor_config.json").write_text(held)
    write(
        path,
        "tokenizer.json",
        tokenizer(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
            }
        ),
    )
    refused("writes a token after every text")
    write(path, "tokenizer.json", tokenizer(post_processor=[7]))
    refused("is broken")
    (path / "tokenizer.json").unlink()
    refused("neither tokenizer.json nor tokenizer.model")
    (path / "config.json").unlink()
    refused("config.json is missing")


def test_a_conversation_needs_a_template(tmp_path):
    path = llava(tmp_path)
    write(path, "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})
    made = processor.load(path)
    with pytest.raises(InputError, match="'q' is a conversation, but the model's directory has no chat template"):
        made.layout(QUESTION)
    spans = (Image(10, 14, PICTURE.source, "document"), Text("A", "document"))
    assert symbols(made, made.example(Document("d", spans))[0].tokens.tolist()) == ["<s>", *["<image>"] * 4]


def test_a_picture_that_is_another_one(tmp_path):
    made = processor.load(llava(tmp_path))
    wrong = Image(11, 14, PICTURE.source)
    with pytest.raises(InputError, match="Document 'd', span 0: declared as 11x14 but is 10x14"):
        made.batch([Document("d", (wrong, Text("x")))])
    with pytest.raises(InputError, match="There is no document"):
        made.batch([])
