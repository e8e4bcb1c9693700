"""Whole processors, read from directories of both layouts, against those of transformers 5.23.

Token ids, pixels as the encoder gets them, grids and positions of conversations with no picture, with one, and with
several of any size, asked for an answer or not. The ones that compute with Pillow are the reference.
"""

import functools
import json
import os
import random
import shutil
import sys
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
    IDEFICS,
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
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil
from transformers.models.idefics.processing_idefics import IdeficsProcessor
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.kosmos2.processing_kosmos2 import Kosmos2Processor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.paligemma.processing_paligemma import EXTRA_TOKENS
from transformers.models.pixtral import image_processing_pil_pixtral
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.smolvlm import processing_smolvlm
from transformers.processing_utils import ProcessorMixin

from mmjax.convert import processor
from mmjax.nn import patch_embed
from mmjax.nn.patch_embed import OPENAI
from mmjax.sequence import windows
from mmjax.sequence.document import Document, Image, Text
from mmjax.tokenizers.conventions import CONVENTIONS

# The one that computes with torchvision, of which its processor wants one function.
sys.modules.setdefault("transformers.models.pixtral.image_processing_pixtral", image_processing_pil_pixtral)
from transformers.models.pixtral.processing_pixtral import PixtralProcessor

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
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ message['content'][0]['text'] + eos_token }}{% else %}{{ '[INST]' }}{% for content in message['content'] %}"
    "{{ '[IMG]' if content['type'] == 'image' else content['text'] }}{% endfor %}{{ '[/INST]' }}{% endif %}{% endfor %}"
)
TURNS_OF_GEMMA = GEMMA.replace("{% generation %}", "").replace("{% endgeneration %}", "")
TURNS_OF_DEEPSEEK = DEEPSEEK.replace("{% generation %}", "").replace("{% endgeneration %}", "")
CROPS = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 20, "pan_and_scan_max_num_crops": 3}
CROPS |= {"pan_and_scan_min_ratio_to_activate": 1.2}
SIGLIP = {"model_type": "siglip_vision_model", "patch_size": 14}
UTTER = IDEFICS.replace("{% generation %}", "").replace("{% endgeneration %}", "")
CLIP = {"size": {"shortest_edge": 28}, "crop_size": square(28)}
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
NINE = [[60 * rows, 60 * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]
LLAMA_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
QWEN_NAMES = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "video_token": "<|video_pad|>"}
COUNTED = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
GEMMA_MARKS = ("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>")
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
IDEFICS_SYMBOLS = ("<fake_token_around_image>", "<image>", "<end_of_utterance>")
TAGS = ("<global-img>", *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)))
MEDIA = {"pad_token": "<|endoftext|>", "image_token": "<image>"}
QWEN_SYMBOLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *VISION)
HEADED_MEDIA = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' }}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<|image|>' }}{% else %}"
    "{{ content['text'] }}{% endif %}{% endfor %}{{ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA3_SYMBOLS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
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
    "mllama": (
        "llama3",
        ("<|finetune_right_pad_id|>", *LLAMA3_SYMBOLS, "<|image|>"),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "image_token": "<|image|>"},
        "",
        HEADED_MEDIA,
        "MllamaImageProcessor",
        {"size": square(28), "max_image_tiles": 4, "image_mean": OPENAI[0], "image_std": OPENAI[1]},
        {"processor_class": "MllamaProcessor"},
        {"patch_size": 14, "image_size": 28, "max_num_tiles": 4},
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
    "internvl": (
        "short",
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "video_token": "<video>"}
        | {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"},
        "",
        QWEN.replace("SYSTEM", "").replace(QWEN_IMAGE, "<IMG_CONTEXT>\n").replace(VIDEO, "<video>\n"),
        "GotOcr2ImageProcessor",
        {"size": square(56), "crop_to_patches": False, "max_patches": 6},
        {"processor_class": "InternVLProcessor", "image_seq_length": 4},
        {"patch_size": [14, 14], "image_size": [56, 56]},
    ),
    "pixtral": (
        "llama",
        ("<s>", "</s>", "<unk>", "<pad>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        {**LLAMA_NAMES, "image_token": "[IMG]"},
        "<s>",
        MISTRAL,
        "PixtralImageProcessor",
        {"size": {"longest_edge": 64}, "patch_size": {"height": 16, "width": 16}},
        {"processor_class": "PixtralProcessor", "patch_size": 16, "image_token": "[IMG]"},
        {"model_type": "pixtral", "patch_size": 16, "image_size": 64},
    ),
    "mistral3": (
        "llama",
        ("<s>", "</s>", "<unk>", "<pad>", "[INST]", "[/INST]", "[IMG]", "[BREAK]", "[IMG_END]"),
        {**LLAMA_NAMES, "image_token": "[IMG]"},
        "<s>",
        MISTRAL,
        "PixtralImageProcessor",
        {"size": {"longest_edge": 70}, "patch_size": 14},
        {"processor_class": "PixtralProcessor", "patch_size": 14, "spatial_merge_size": 2}
        | {"image_break_token": "[BREAK]"},
        {"model_type": "pixtral", "patch_size": 14, "image_size": 84},
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
    "idefics2": (
        "llama",
        ("<s>", "</s>", "<unk>", *IDEFICS_SYMBOLS),
        {**LLAMA_NAMES, "pad_token": "<unk>", "image_token": "<image>", "image_boundary_token": IDEFICS_SYMBOLS[0]},
        "<s>",
        UTTER.replace("START", ""),
        "Idefics2ImageProcessor",
        {"size": {"shortest_edge": 28, "longest_edge": 60}, "do_image_splitting": True},
        {"processor_class": "Idefics2Processor", "image_seq_len": 4},
        {"patch_size": 14, "image_size": 56},
    ),
    "idefics3": (  # whose tokenizer has no tokens for the places of tiles
        "short",
        ("<|endoftext|>", "<|begin_of_text|>", *IDEFICS_SYMBOLS),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<end_of_utterance>", **MEDIA},
        "<|begin_of_text|>",
        UTTER.replace("START", "<|begin_of_text|>"),
        "Idefics3ImageProcessor",
        {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 28}},
        {"processor_class": "Idefics3Processor", "image_seq_len": 1},
        {"patch_size": 14, "image_size": 28},
    ),
    "smolvlm": (
        "short",
        ("<|endoftext|>", "<|im_start|>", *IDEFICS_SYMBOLS, *TAGS),
        {"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>", **MEDIA},
        "",
        UTTER.replace("START", "<|im_start|>"),
        "SmolVLMImageProcessor",
        {"size": {"longest_edge": 90}, "max_image_size": {"longest_edge": 30}},
        {"processor_class": "SmolVLMProcessor", "image_seq_len": 1},
        {"patch_size": 14, "image_size": 30},
    ),
}
NUMBERS = {1: "one", 3: "three", 4: "four", 9: "nine"}
CONFIGS = {
    "gemma3": {"mm_tokens_per_image": 4},
    "idefics2": {"perceiver_config": {"resampler_n_latents": 4}},
    "idefics3": {"scale_factor": 2},
    "pixtral": {"model_type": "llava"},
}
PROCESSORS = {
    "smolvlm": processing_smolvlm.SmolVLMProcessor,
    "llava_onevision": LlavaOnevisionProcessor,
    "internvl": InternVLProcessor,
    "pixtral": PixtralProcessor,
    "mistral3": PixtralProcessor,
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
    if "context_image_token" in names:  # also where videos go
        media = {"image": names["context_image_token"]}
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
    more = {**ids, **pinpoints, **CONFIGS.get(name, {})}
    write(out, "config.json", {"model_type": name, "vision_config": vision, **inside} | more)
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
    counted = {} if name.startswith("qwen") else {k: v for k, v in DIRECTORIES[name][7].items() if "class" not in k}
    videos = types.SimpleNamespace(num_frames=64, fps=1) if name == "smolvlm" else None
    if name == "smolvlm":
        processing_smolvlm.num2words = NUMBERS.__getitem__  # of a package that it wants whatever it is given
    return PROCESSORS[name](*parts, video_processor=videos, chat_template=DIRECTORIES[name][4], **counted)


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


def canvases(ours, output):
    """transformers' tiles, put together again: [3, height, width] of each picture."""
    shapes, side = ours.resolution.shapes, ours.resolution.tile
    for found, number in zip(np.asarray(output["pixel_values"])[0], np.ravel(output["aspect_ratio_ids"]), strict=True):
        rows, columns = shapes[number - 1]
        tiles = found[: rows * columns].reshape(rows, columns, 3, side, side)
        yield tiles.transpose(2, 0, 3, 1, 4).reshape(3, rows * side, columns * side)


def looked_at(ours, x, output):
    """Which tiles every token looks at [tokens, pictures, tiles], and which transformers says."""
    want = np.asarray(output["cross_attention_mask"])[0]
    counts = x.grid.prod(-1) // ours.sequence.window**2
    first = np.cumsum(counts) - counts
    label = np.full(want.shape[1:], -1)
    for n, count in enumerate(counts):
        label[n, :count] = (first[n] + np.arange(count)) * (ours.per_picture // ours.sequence.canvas)
    return (x.media_lo[:, None, None] <= label) & (label <= x.media_hi[:, None, None]) & (label >= 0), want


def in_patches(views, p):
    """Whole patches [n, values] of views [views, 3, height, width], row by row."""
    n, _, height, width = views.shape
    cut = views[:, :, : height // p * p, : width // p * p].reshape(n, 3, height // p, p, width // p, p)
    return cut.transpose(0, 2, 4, 3, 5, 1).reshape(-1, p * p * 3)


def expected_patches(name, ours, output):
    """transformers' pixels as patches [n, values], picture after picture, row by row."""
    found = output.get("pixel_values")
    if found is None:
        return np.zeros((0, ours.patch**2 * 3), np.float32)
    p = ours.patch
    if "pixel_attention_mask" in output:  # canvases of one size, of which a part is the picture
        sides = [(int(m[:, 0].sum()), int(m[0].sum())) for m in np.asarray(output["pixel_attention_mask"])[0]]
        views = [view[:, :tall, :wide] for view, (tall, wide) in zip(np.asarray(found)[0], sides, strict=True)]
        return np.concatenate([in_patches(view[None], p) for view in views])
    if "aspect_ratio_ids" in output:
        return np.concatenate([in_patches(canvas[None], p) for canvas in canvases(ours, output)])
    if "image_grid_thw" not in output:
        views = [np.asarray(picture).reshape(-1, 3, *np.shape(picture)[-2:]) for picture in found]
        sizes = np.asarray(output["image_sizes"]).tolist() if "image_sizes" in output else []
        if "pixtral" in DIRECTORIES[name][-1].values():  # every picture is as large as the largest
            views = [own[:, :, :height, :width] for own, (height, width) in zip(views, sizes, strict=True)]
        elif sizes:  # every picture has as many tiles as the one that has most
            alone = name == "llava_next" or len(sizes) == 1
            grids, tile = (PINPOINTS, 28) if name == "llava_next" else (NINE, 60)
            counts = [image_size_to_num_patches(size, grids, tile) if alone else 1 for size in sizes]
            views = [picture[:count] for picture, count in zip(views, counts, strict=True)]
        return np.concatenate([in_patches(view[None], p) for own in views for view in own])
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
        if "cross_attention_mask" in want:
            np.testing.assert_array_equal(*looked_at(ours, x, want))
        if name in MODELS:
            grids = {"image_grid_thw": torch.as_tensor(np.asarray(want["image_grid_thw"]))} if p else {}
            if p:
                assert x.grid.tolist() == np.asarray(want["image_grid_thw"]).tolist()
            kinds = np.asarray(want["mm_token_type_ids"]).reshape(-1).tolist()
            expected = rope(name, DIRECTORIES[name][-1], ids.tolist(), kinds, grids)
            np.testing.assert_array_equal(batch.position[row, :n], expected)
        else:
            assert batch.position[row, :n, 0].tolist() == list(range(n))


def idefics(folder, layout, said=True):
    """A directory of Idefics, with or without what ends an utterance, and transformers' processor."""
    symbols = [s for s in CONVENTIONS["idefics"].symbols if said or s != "<end_of_utterance>"]
    names = LLAMA_NAMES | {"pad_token": "<unk>", "image_token": "<image>"}
    path, made = vocabularies.pair(folder, "llama", symbols, "", **names)
    out = folder / f"idefics-{layout}"
    made.save_pretrained(out)
    path.replace(out / "tokenizer.json")
    vision = {"embed_dim": 32, "image_size": 28, "patch_size": 14}
    sizes = {"vocab_size": len(made) - 2, "additional_vocab_size": 2, "perceiver_config": {"resampler_n_latents": 3}}
    write(out, "config.json", {"model_type": "idefics", "vision_config": vision, "use_resampler": True} | sizes)
    write(out, "generation_config.json", {"eos_token_id": 2})
    if layout == "hub":
        images = {"image_processor_type": "IdeficsImageProcessor", "image_size": 28, "image_num_channels": 3}
        write(out, "preprocessor_config.json", images)
    else:
        images = {"image_processor_type": "IdeficsImageProcessor", "size": square(28)}
        write(out, "processor_config.json", {"processor_class": "IdeficsProcessor", "image_processor": images})
    return out, IdeficsProcessor(IdeficsImageProcessorPil(image_size=28), made)


@pytest.mark.parametrize(("layout", "said"), [("hub", True), ("five", False)])
def test_idefics(layout, said, tmp_path):
    """Ids and pixels, and which picture each token looks at; a dialogue only where the tokenizer knows of such."""
    path, theirs = idefics(tmp_path, layout, said)
    ours = processor.load(path)
    assert ours.stops == ((2, theirs.tokenizer.convert_tokens_to_ids("<end_of_utterance>")) if said else (2,))
    rng = np.random.default_rng(3)
    views = [rng.integers(0, 256, (int(h), int(w), 3), np.uint8) for h, w in rng.integers(20, 120, (6, 2))]
    seen, shown = [Image(*v.shape[:2], v) for v in views], [Pictures.fromarray(v) for v in views]
    first = (Text("What is"), seen[0], seen[1], Text("this?")), ["What is", shown[0], shown[1], "this?"]
    second = (seen[2], Text("Who?"), Text("Ann.", "assistant"), Text("Again?"), seen[3], Text("and now?"))
    made = [first, (second[:2], [shown[2], "Who?"]), ((Text("Hello?"),), ["Hello?"])]
    if said:
        opened = "<end_of_utterance>\nAssistant:"
        start = [f"User: {first[1][0]}", *first[1][1:-1], first[1][-1] + opened]
        again = f"Who?{opened} Ann.<end_of_utterance>\nUser: Again?"
        made = [(first[0], start), (second, ["User:", shown[2], again, shown[3], "and now?" + opened])]
        made.append(((Text("Hello?"),), ["User: Hello?" + opened]))
    for spans, prompt in made:
        want = theirs(text=[prompt], add_end_of_utterance_token=False)
        batch = ours.batch([Document("d", spans)])
        ids, mask = want["input_ids"][0].tolist(), np.asarray(want["image_attention_mask"][0])
        n = len(ids)
        assert batch.tokens[0, :n].tolist() == ids, (theirs.tokenizer.decode(ids), ours.chat.decode(batch.tokens[0]))
        assert (batch.order[0, n:] == -1).all()
        media = np.arange(3 * mask.shape[1])
        looks = (batch.media_lo[0, :n, None] <= media) & (media <= batch.media_hi[0, :n, None])
        np.testing.assert_array_equal(looks, mask.repeat(3, 1) > 0)
        count = sum(isinstance(span, Image) for span in spans)
        raster = in_patches(np.asarray(want["pixel_values"][0][:count]), 14)
        np.testing.assert_allclose(normalised(ours, batch.patches[0, None, : 4 * count])[0], raster, atol=1e-6)


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


PHRASES = "<grounding> An image of<phrase> a cat</phrase><object><patch_index_0003><patch_index_0012></object>"
TOLD = ("An image of", " <grounding>Describe this image in detail: ", PHRASES, "a", "<b> is bold, <image-like> is not")


def kosmos2(folder, layout, patch=14):
    """A directory, transformers' processor of it, and how many tokens there are."""
    _, made = vocabularies.pair(folder, "llama", tuple(LLAMA_NAMES.values()), **LLAMA_NAMES)
    settings = {"size": {"shortest_edge": 224}, "use_square_size": True}
    theirs = Kosmos2Processor(CLIPImageProcessorPil(**settings), made, 16)
    out = folder / layout
    theirs.tokenizer.save_pretrained(out)
    vision = {"image_size": 224, "patch_size": patch}
    inner = {"text_config": {"vocab_size": len(made)}, "vision_config": vision}
    write(out, "config.json", {"model_type": "kosmos-2", "latent_query_num": 7} | inner)
    images = {"image_processor_type": "CLIPImageProcessor", **settings}
    if layout == "hub":
        write(out, "preprocessor_config.json", images)
    else:
        write(out, "processor_config.json", {"image_processor": images})
    return out, theirs, len(made)


@pytest.mark.parametrize("layout", ["hub", "five"])
def test_kosmos2(layout, tmp_path):
    """Pictures before text, and text alone; phrases and places are tokens that its processor adds to the tokenizer."""
    path, theirs, _ = kosmos2(tmp_path, layout)
    ours = processor.load(path)
    for n, text in enumerate(TOLD):
        view = np.random.default_rng(n).integers(0, 256, (60 + 40 * n, 100, 3), np.uint8)
        want = theirs(images=Pictures.fromarray(view), text=text, num_image_tokens=7)
        document = Document("d", (Image(*view.shape[:2], view), Text(text)))
        batch = ours.batch([document])
        ids = np.asarray(want["input_ids"]).reshape(-1).tolist()
        got = batch.tokens[0, : len(ids)].tolist()
        assert got == ids, (theirs.tokenizer.decode(ids), ours.chat.decode(got))
        assert (batch.order[0, len(ids) :] == -1).all()
        shows = np.asarray(want["image_embeds_position_mask"]).reshape(-1)
        np.testing.assert_array_equal(batch.slot[0, : len(ids)] >= 0, shows == 1)
        pixels = in_patches(np.asarray(want["pixel_values"])[:1], 14)
        np.testing.assert_allclose(normalised(ours, batch.patches[:, : len(pixels)])[0], pixels, atol=1e-6)
        example, _ = ours.example(Document("d", (Text(text),)))
        assert example.tokens.tolist() == np.asarray(theirs(text=text)["input_ids"]).reshape(-1).tolist()


def test_pictures_that_a_text_begins_with_stand_before_its_first_token(tmp_path):
    """Llama 3.2 Vision's own processor writes that token, behind them, and none where it is there."""
    path = directory(tmp_path, "mllama", "hub")
    ours, theirs = processor.load(path), reference(path, "mllama")
    noise = np.random.default_rng(0)
    pictures = [noise.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((30, 70), (50, 20), (9, 9))]
    shown = [Image(*one.shape[:2], one, "document") for one in pictures]
    first, middle = Text(" what? ", "document"), Text("and", "document")
    for spans, text, count in (
        ((*shown[:2], first, shown[2], middle), "<|image|><|image|> what? <|image|>and", 3),
        ((first, shown[0], middle), " what? <|image|>and", 1),
        ((first,), " what? ", 0),
    ):
        images = [[Pictures.fromarray(one) for one in pictures[:count]]] if count else None
        want = theirs(text=text, images=images)
        x, _ = ours.example(Document("d", spans))
        assert x.tokens.tolist() == np.ravel(want["input_ids"]).tolist()
        if count:
            np.testing.assert_array_equal(*looked_at(ours, x, want))


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
