"""Whole processors, read from directories of both layouts, against those of transformers 5.23.

Token ids, pixels as the encoder gets them, grids and positions of conversations with no picture, with one, and with
several of any size, asked for an answer or not. The ones that compute with Pillow are the reference.
"""

import functools
import json
import os
import random
import shutil
import tempfile
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the `parity` extra")
pytest.importorskip("transformers", reason="needs the `parity` extra")

from parity import vocabularies
from parity.test_conventions import (
    CHATML,
    DEEPSEEK,
    DEEPSEEK_NAMES,
    GEMMA,
    LLAVA_HF,
    QWEN_IMAGE,
    QWEN_SYSTEM,
    square,
    words,
)
from PIL import Image as Pictures
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    image_processing_backends,  # noqa: F401  (the *Pil classes ask for it)
)
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.paligemma.processing_paligemma import EXTRA_TOKENS
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.processing_utils import ProcessorMixin

from mmjax.convert import processor
from mmjax.nn import patch_embed
from mmjax.sequence import windows
from mmjax.sequence.document import Document, Image, Text

COUNT = 8
NATIVE = {"size": {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}}
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
ITEMS = "{% if content['type'] == 'image' %}{{ 'IMAGE' }}"
QWEN = (
    CHATML.replace(ITEMS, ITEMS + "{% elif content['type'] == 'video' %}{{ 'VIDEO' }}")
    .replace("IMAGE", QWEN_IMAGE)
    .replace("VIDEO", VIDEO)
    .replace("{% generation %}", "")
    .replace("{% endgeneration %}", "")
)
LLAVA = LLAVA_HF.replace("{% generation %}", "").replace("{% endgeneration %}", "")
TURNS_OF_GEMMA = GEMMA.replace("{% generation %}", "").replace("{% endgeneration %}", "")
TURNS_OF_DEEPSEEK = DEEPSEEK.replace("{% generation %}", "").replace("{% endgeneration %}", "")
CROPS = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 20, "pan_and_scan_max_num_crops": 3}
CROPS |= {"pan_and_scan_min_ratio_to_activate": 1.2}
SIGLIP = {"model_type": "siglip_vision_model", "patch_size": 14}
CLIP = {"size": {"shortest_edge": 28}, "crop_size": square(28)}
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
NINE = [[60 * rows, 60 * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]
LLAMA_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
QWEN_NAMES = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "video_token": "<|video_pad|>"}
COUNTED = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
GEMMA_MARKS = ("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>")
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN_SYMBOLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *VISION)
# model_type: (vocabulary, symbols, names, begin, template, image processor and its settings, the processor's, vision)
DIRECTORIES = {
    "llava": (
        "llama",
        ("<s>", "</s>", "<unk>", "<pad>", "<image>"),
        {**LLAMA_NAMES, "image_token": "<image>"},
        "<s>",
        LLAVA,
        "CLIPImageProcessor",
        CLIP,
        COUNTED | {"processor_class": "LlavaProcessor"},
        {"model_type": "clip_vision_model", "patch_size": 14, "image_size": 28},
    ),
    "llava_next": (
        "llama",
        ("<s>", "</s>", "<unk>", "<pad>", "<image>"),
        {**LLAMA_NAMES, "image_token": "<image>"},
        "<s>",
        LLAVA,
        "LlavaNextImageProcessor",
        {**CLIP, "image_grid_pinpoints": PINPOINTS},
        COUNTED | {"processor_class": "LlavaNextProcessor"},
        {"model_type": "clip_vision_model", "patch_size": 14, "image_size": 28},
    ),
    "llava_onevision": (
        "short",
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"),
        {"eos_token": "<|im_end|>", "image_token": "<image>", "video_token": "<video>"},
        "",
        QWEN.replace("SYSTEM", "").replace(QWEN_IMAGE, "<image>").replace(VIDEO, "<video>"),
        "LlavaOnevisionImageProcessor",
        {"size": square(60), "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_grid_pinpoints": NINE},
        {
            "processor_class": "LlavaOnevisionProcessor",
            "num_image_tokens": 16,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_2",
        },
        {"model_type": "siglip_vision_model", "patch_size": 14, "image_size": 60},
    ),
    "qwen2_vl": (
        "short",
        QWEN_SYMBOLS,
        QWEN_NAMES | {"image_token": "<|image_pad|>"},
        "",
        QWEN.replace("SYSTEM", QWEN_SYSTEM),
        "Qwen2VLImageProcessor",
        NATIVE,
        {"processor_class": "Qwen2VLProcessor"},
        {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2},
    ),
    "qwen2_5_vl": (
        "short",
        QWEN_SYMBOLS,
        QWEN_NAMES | {"image_token": "<|image_pad|>"},
        "",
        QWEN.replace("SYSTEM", QWEN_SYSTEM),
        "Qwen2VLImageProcessor",
        {"min_pixels": 56 * 56, "max_pixels": 140 * 140, "patch_size": 14},
        {"processor_class": "Qwen2_5_VLProcessor"},
        {"patch_size": 14, "window_size": 56, "tokens_per_second": 2, "spatial_merge_size": 2},
    ),
    "qwen3_vl": (
        "short",
        QWEN_SYMBOLS,
        QWEN_NAMES | {"image_token": "<|image_pad|>"},
        "",
        QWEN.replace("SYSTEM", ""),
        "Qwen2VLImageProcessor",
        {
            "size": {"shortest_edge": 64 * 64, "longest_edge": 128 * 128},
            "patch_size": 16,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        },
        {"processor_class": "Qwen3VLProcessor"},
        {"patch_size": 16, "spatial_merge_size": 2},
    ),
    "paligemma": (
        "gemma",
        ("<pad>", "<eos>", "<bos>", "<image>"),
        {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "image_token": "<image>"},
        "<bos>",
        None,
        "SiglipImageProcessor",
        {"size": square(28), "image_seq_length": 4},
        {"processor_class": "PaliGemmaProcessor"},
        SIGLIP | {"image_size": 28},
    ),
    "gemma3": (
        "gemma",
        ("<pad>", "<eos>", "<bos>", *GEMMA_MARKS),
        {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "boi_token": "<start_of_image>"}
        | {"eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
        "<bos>",
        TURNS_OF_GEMMA,
        "Gemma3ImageProcessor",
        {"size": square(56), **CROPS},
        {"processor_class": "Gemma3Processor", "image_seq_length": 4},
        SIGLIP | {"image_size": 56},
    ),
    "deepseek_vl": (
        "short",
        DEEPSEEK_NAMES.values(),
        DEEPSEEK_NAMES,
        DEEPSEEK_NAMES["bos_token"],
        TURNS_OF_DEEPSEEK,
        "DeepseekVLImageProcessor",
        {"size": square(30), "image_mean": [0.5] * 3, "image_std": [0.25] * 3},
        {"processor_class": "DeepseekVLProcessor", "num_image_tokens": 4},
        SIGLIP | {"image_size": 30},
    ),
}
CONFIGS = {"gemma3": {"mm_tokens_per_image": 4}}
PROCESSORS = {
    "llava_onevision": LlavaOnevisionProcessor,
    "qwen2_vl": Qwen2VLProcessor,
    "qwen2_5_vl": Qwen2_5_VLProcessor,
    "qwen3_vl": Qwen3VLProcessor,
}
MODELS = {"qwen2_vl": Qwen2VLModel, "qwen2_5_vl": Qwen2_5_VLModel, "qwen3_vl": Qwen3VLModel}


@pytest.fixture(autouse=True)
def _any_part(monkeypatch):
    """Processors ask of what class their parts are, which needs torchvision for the part for videos."""
    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *_: None)


@functools.cache
def tokenizer(name):
    """A directory with the family's tokenizer alone, as version 5 saves it, and the ids of its tokens for media."""
    vocabulary, symbols, names, begin, *_ = DIRECTORIES[name]
    folder = tempfile.TemporaryDirectory(prefix="mmjax-parity-")
    _folders.append(folder)
    path, made = vocabularies.pair(Path(folder.name), vocabulary, symbols, begin, **names)
    out = Path(folder.name) / "saved"
    if name == "paligemma":
        made.add_tokens(EXTRA_TOKENS)
    made.save_pretrained(out)
    if name != "paligemma":
        path.replace(out / "tokenizer.json")
    media = {k: names[f"{k}_token"] for k in ("image", "video") if f"{k}_token" in names}
    return out, {f"{k}_token_id": made.convert_tokens_to_ids(v) for k, v in media.items()}, len(made)


_folders = []


def directory(folder, name, layout):
    """A directory of the layout, as files are on the Hub or as version 5 writes them."""
    _, _, _, _, template, kind, settings, counted, vision = DIRECTORIES[name]
    out = folder / f"{name}-{layout}"
    saved, ids, size = tokenizer(name)
    shutil.copytree(saved, out, copy_function=os.link)
    pinpoints = {k: v for k, v in settings.items() if k == "image_grid_pinpoints"}
    flat = name.startswith("qwen") and layout == "hub"
    inside = {"vocab_size": size} if flat else {"text_config": {"vocab_size": size}}
    more = CONFIGS.get(name, {}) | pinpoints
    write(out, "config.json", {"model_type": name, "vision_config": vision, **inside, **ids, **more})
    write(out, "generation_config.json", {"eos_token_id": [3, 5]})
    images = {"image_processor_type": kind, **settings}
    if layout == "hub":
        write(out, "preprocessor_config.json", images | {"processor_class": counted["processor_class"]})
        if template is not None:
            write(out, "chat_template.json", {"chat_template": template})
        write(out, "processor_config.json", counted)
    else:
        write(out, "processor_config.json", counted | {"image_processor": images})
        if template is not None:
            (out / "chat_template.jinja").write_text(template)
    return out


def write(folder, name, what):
    (folder / name).write_text(json.dumps(what))


def reference(path, name):
    """transformers' processor of the directory."""
    if name not in PROCESSORS:
        out = AutoProcessor.from_pretrained(path)
        if name == "gemma3":  # which it sets back to its own, where no call says otherwise
            out.images_kwargs = out.images_kwargs | {k: DIRECTORIES[name][6].get(k, v) for k, v in CROPS.items()}
        return out
    # The part for videos needs torchvision.
    parts = AutoImageProcessor.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    counted = DIRECTORIES[name][7] if name == "llava_onevision" else {}
    return PROCESSORS[name](*parts, video_processor=None, chat_template=DIRECTORIES[name][4], **counted)


def conversation(rng, pictures, first):
    """Messages as transformers takes them, and the document."""
    messages, spans = [], []

    def say(role, items):
        messages.append({"role": role, "content": items})
        for item in items:
            if item["type"] == "text":
                spans.append(Text(item["text"], role))
            else:
                pixels = np.asarray(item["image"])
                spans.append(Image(*pixels.shape[:2], pixels, role))

    if rng.random() < 0.3:
        say("system", [{"type": "text", "text": words(rng, False)}])
    turns = rng.randint(1, 3)
    for turn in range(turns):
        shown = []
        for _ in range(pictures if turn == 0 else rng.randint(0, pictures)):
            noise = np.random.default_rng(rng.randint(0, 10**6))
            height, width = rng.randint(20, 120), rng.randint(20, 120)
            shown.append(
                {"type": "image", "image": Pictures.fromarray(noise.integers(0, 256, (height, width, 3), np.uint8))}
            )
        content = [*shown, {"type": "text", "text": words(rng, False)}]
        if not first:
            rng.shuffle(content)
        say("user", content)
        if turn < turns - 1 or rng.random() < 0.4:
            say("assistant", [{"type": "text", "text": words(rng, False)}])
    return messages, Document(f"d{rng.random()}", tuple(spans))


def rope(name, config, ids, kinds, given):
    """transformers' position ids, by the model's method without the model."""
    cls = MODELS[name]
    model = cls.__new__(cls)
    torch.nn.Module.__init__(model)
    vision = types.SimpleNamespace(spatial_merge_size=2, tokens_per_second=config.get("tokens_per_second"))
    model.config = types.SimpleNamespace(vision_config=vision)
    found, _ = model.get_rope_index(torch.tensor([ids]), torch.tensor([kinds]), **given)
    return found[:, 0].T.numpy()


def normalised(ours, patches):
    """As the encoder normalises the bytes of a row."""
    mean, deviation = ours.colours
    cfg = patch_embed.Config(ours.patch, 1, mean=mean, deviation=deviation)
    return np.asarray(patch_embed.normalise(jnp.asarray(patches), cfg))


def expected_patches(name, ours, output):
    """transformers' pixels as patches [n, values], picture after picture, row by row."""
    found = output.get("pixel_values")
    if found is None:
        return np.zeros((0, ours.patch**2 * 3), np.float32)
    p = ours.patch
    if "image_grid_thw" not in output:
        views = [np.asarray(picture).reshape(-1, 3, *np.shape(picture)[-2:]) for picture in found]
        if "image_sizes" in output:  # every picture has as many tiles as the one that has most
            sides = np.asarray(output["image_sizes"]).tolist()
            alone = name == "llava_next" or len(sides) == 1
            grids, tile = (PINPOINTS, 28) if name == "llava_next" else (NINE, 60)
            counts = [image_size_to_num_patches(size, grids, tile) if alone else 1 for size in sides]
            views = [picture[:count] for picture, count in zip(views, counts, strict=True)]
        views = np.concatenate(views)
        n, _, height, width = views.shape
        cut = views[:, :, : height // p * p, : width // p * p].reshape(n, 3, height // p, p, width // p, p)
        return cut.transpose(0, 2, 4, 3, 5, 1).reshape(-1, p * p * 3)
    out, at = [], 0
    found = np.asarray(found).reshape(-1, 3, 2, p, p)
    np.testing.assert_array_equal(found[:, :, 0], found[:, :, 1])
    for grid in np.asarray(output["image_grid_thw"]).tolist():
        n = int(np.prod(grid))
        order, _, _ = windows.order(tuple(grid), 2)
        raster = np.empty((n, p * p * 3), np.float32)
        raster[order] = found[at : at + n, :, 0].transpose(0, 2, 3, 1).reshape(n, -1)
        out, at = [*out, raster], at + n
    return np.concatenate(out)


def encoded(theirs, messages, asked=True, **how):
    """What transformers makes of a conversation; PaliGemma has one question and one answer, and no template."""
    if theirs.chat_template is not None:
        return theirs.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=asked, **how)
    said = ["".join(i.get("text", "<image>") for i in message["content"]) for message in messages]
    images = [item["image"] for item in messages[0]["content"] if item["type"] == "image"]
    if not images:  # which it refuses, and the model does not
        return theirs.tokenizer(f"<bos>{said[0]}\n", add_special_tokens=False, return_token_type_ids=True, **how)
    return theirs(images=[images], text=[said[0]], suffix=said[1:] or None, **how)


@pytest.mark.parametrize("layout", ["hub", "five"])
@pytest.mark.parametrize("name", [name for name in DIRECTORIES if DIRECTORIES[name][4]])
def test_ids_pixels_grids_and_positions(name, layout, tmp_path):
    path = directory(tmp_path, name, layout)
    ours, theirs = processor.load(path), reference(path, name)
    assert ours.stops == (3, 5)
    rng = random.Random(name)
    made = [conversation(rng, n % 4 if n % 4 < 3 else 3, name in ("llava", "llava_next")) for n in range(COUNT)]
    batch = ours.batch([document for _, document in made])
    examples = [ours.example(document)[0] for _, document in made]
    for row, (messages, _) in enumerate(made):
        asked = messages[-1]["role"] == "user"
        want = encoded(theirs, messages, asked)
        ids = np.asarray(want["input_ids"]).reshape(-1)
        n, x = len(ids), examples[row]
        got = batch.tokens[row]
        assert got[:n].tolist() == ids.tolist(), (theirs.tokenizer.decode(ids), ours.chat.decode(got[:n]))
        assert (batch.order[row, n:] == -1).all()
        raster = expected_patches(name, ours, want)
        p = len(x.patch_raster)
        assert p == len(raster)
        if p:
            np.testing.assert_allclose(
                normalised(ours, batch.patches[row, None, :p])[0], raster[x.patch_raster], atol=1e-6
            )
        if name in MODELS:
            grids = {"image_grid_thw": torch.as_tensor(np.asarray(want["image_grid_thw"]))} if p else {}
            if p:
                assert x.grid.tolist() == np.asarray(want["image_grid_thw"]).tolist()
            kinds = np.asarray(want["mm_token_type_ids"]).reshape(-1).tolist()
            expected = rope(name, DIRECTORIES[name][-1], ids.tolist(), kinds, grids)
            np.testing.assert_array_equal(batch.position[row, :n], expected)
        else:
            assert batch.position[row, :n, 0].tolist() == list(range(n))


@pytest.mark.parametrize("layout", ["hub", "five"])
def test_a_processor_without_a_template(layout, tmp_path):
    """PaliGemma's: the question is the prefix, up to the answer; places in the picture are ids of their own."""
    path = directory(tmp_path, "paligemma", layout)
    ours, theirs = processor.load(path), reference(path, "paligemma")
    rng = random.Random(layout)
    for n in range(COUNT):
        noise = np.random.default_rng(n).integers(0, 256, (30 + n, 50, 3), np.uint8)
        views = [Pictures.fromarray(noise[: 20 + 5 * i]) for i in range(1 + n % 3)]
        question, answer = words(rng, False), f"<loc0{n:03}><seg0{n:02}> {words(rng, False)}"
        shown = [{"type": "image", "image": view} for view in views]
        turns = [{"content": [*shown, {"type": "text", "text": question}]}, {"content": [{"text": answer}]}]
        spans = [Image(*np.shape(view)[:2], np.asarray(view)) for view in views]
        spans.insert(n % 2, Text(question))
        for asked in (True, False):
            document = Document("d", tuple(spans) + (() if asked else (Text(answer, "assistant", True),)))
            want, batch = encoded(theirs, turns[: 2 - asked]), ours.batch([document])
            ids, length = list(want["input_ids"][0]), len(want["input_ids"][0])
            assert batch.tokens[0, :length].tolist() == ids
            learnt = np.asarray(want["token_type_ids"][0])
            assert batch.hi[0, :length].tolist() == np.maximum(np.arange(length), (learnt == 0).sum() - 1).tolist()
            assert (batch.weight[0, : length - 1] == learnt[1:]).all()
            raster = expected_patches("paligemma", ours, want)
            np.testing.assert_allclose(normalised(ours, batch.patches[0, None])[0, : len(raster)], raster, atol=1e-6)
        assert ids[-1] == theirs.tokenizer.eos_token_id
        assert theirs.tokenizer.convert_tokens_to_ids(f"<loc0{n:03}>") in ids
    for text, span in (("<bos>x\n", Text("x")), ("<bos>x", Text("x", "document"))):
        want = theirs.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ours.example(Document("d", (span,)))[0].tokens.tolist() == want


INSTRUCT = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + "
    "' [/INST]' }}{% elif message['role'] == 'system' %}{{ '<<SYS>>' + message['content'] }}{% else %}"
    "{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
HEADED = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
TURNS = (
    "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + message['role'] + '\n' + message['content'] | "
    "trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PLAIN_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3_SYMBOLS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
GEMMA_SYMBOLS = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
LEGACY = {"tokenizer_class": "LlamaTokenizer", "legacy": True}
# name: (vocabulary, symbols, names, begin, template, settings of the tokenizer that are changed)
TEXTS = {
    "llama": ("llama", LLAMA_NAMES.values(), LLAMA_NAMES, "<s>", INSTRUCT, {"tokenizer_class": "LlamaTokenizer"}),
    "llama legacy": ("llama", LLAMA_NAMES.values(), LLAMA_NAMES, "<s>", INSTRUCT, LEGACY),
    "mistral": ("llama", LLAMA_NAMES.values(), LLAMA_NAMES, "<s>", INSTRUCT, LEGACY),
    "llama 3": (
        "llama3",
        LLAMA3_SYMBOLS,
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        "<|begin_of_text|>",
        HEADED,
        {"tokenizer_class": "PreTrainedTokenizerFast"},
    ),
    "qwen2": ("short", QWEN_SYMBOLS, {"eos_token": "<|im_end|>"}, "", PLAIN_CHATML, {}),
    "gemma": ("gemma", GEMMA_SYMBOLS, {"bos_token": "<bos>", "eos_token": "<eos>"}, "<bos>", TURNS, {}),
}


@pytest.mark.parametrize(("name", "layout"), [(name, ("hub", "five")[n % 2]) for n, name in enumerate(TEXTS)])
def test_models_of_text(name, layout, tmp_path):
    """Conversations as `apply_chat_template` writes them, and texts as the tokenizer itself reads them."""
    vocabulary, symbols, names, begin, template, changed = TEXTS[name]
    path, made = vocabularies.pair(tmp_path, vocabulary, list(symbols), begin, **names)
    out = tmp_path / "model"
    made.save_pretrained(out)
    path.replace(out / "tokenizer.json")
    settings = json.loads((out / "tokenizer_config.json").read_text()) | changed
    if layout == "hub":
        settings["chat_template"] = [{"name": "default", "template": template}, {"name": "tools", "template": "x"}]
    else:
        (out / "chat_template.jinja").write_text(template)
    write(out, "tokenizer_config.json", settings)
    write(out, "config.json", {"model_type": name.split()[0], "vocab_size": 200_000, "eos_token_id": 7})
    ours, theirs = processor.load(out), AutoTokenizer.from_pretrained(out)
    assert ours.stops == (7,)
    rng = random.Random(name)
    for n in range(20):
        roles = (["system"] if rng.random() < 0.3 else []) + ["user", "assistant"] * rng.randint(1, 3)
        roles = roles[: len(roles) - n % 2]
        messages = [{"role": role, "content": words(rng, False)} for role in roles]
        want = theirs.apply_chat_template(messages, add_generation_prompt=roles[-1] == "user", return_dict=False)
        example, media = ours.example(Document("d", tuple(Text(m["content"], m["role"]) for m in messages)))
        assert example.tokens.tolist() == want, (theirs.decode(want), ours.chat.decode(example.tokens.tolist()))
        assert not media
        text = words(rng, False)
        example, _ = ours.example(Document("d", (Text(text, "document"),)))
        assert example.tokens.tolist() == theirs(text)["input_ids"]
