"""Llama 3.2 Vision, whole: canvases of several shapes, pictures side by side and apart, text before them, and alone.

Every row by itself in the reference: of rows together it pads the number of pictures, and its tokens before the first
picture see that padding too. What a row's logits are would depend on its neighbours.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from parity import documents
from parity.documents import VOCAB, words
from parity.harness import Compare, system, twin
from safetensors.numpy import load_file, save_file
from transformers.models.mllama import processing_mllama as theirs

from mmjax.nn.patch_embed import OPENAI
from mmjax.sequence import interleave
from mmjax.sequence.layout import IMAGE, TEXT, Piece

PATCH, SIDE, TILES = 8, 16, 4
SHAPES = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
VISION = {"hidden_size": 32, "num_hidden_layers": 3, "num_global_layers": 2, "attention_heads": 4}
VISION |= {"intermediate_size": 48, "vision_output_dim": 96, "image_size": SIDE, "patch_size": PATCH}
VISION |= {"max_num_tiles": TILES, "intermediate_layers_indices": [0, 2], "supported_aspect_ratios": SHAPES}
ROPE = {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0}
ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
TEXTS = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXTS |= {"intermediate_size": 48, "vocab_size": VOCAB.size - 8, "pad_token_id": 0, "rope_parameters": ROPE}
TEXTS |= {"cross_attention_layers": [1, 3], "max_position_embeddings": 128}
PLACES = (SIDE // PATCH) ** 2 + 1
SEQUENCE = interleave.Config(cross="last_images", position="sequential", window=SIDE // PATCH, canvas=TILES)


def model(text: dict = TEXTS, vision: dict = VISION) -> torch.nn.Module:
    cls = transformers.MllamaForConditionalGeneration
    return twin(cls, cls.config_class(vision_config=vision, text_config=text, image_token_index=VOCAB.image))


def shown(rows: int, columns: int, seed: int) -> tuple[np.ndarray, list[documents.Part]]:
    """A canvas of so many tiles, and what stands for it in a document: its marker, and the picture beside it."""
    canvas = documents.random_view(rows * SIDE, columns * SIDE, seed)
    grid = (1, rows * SIDE // PATCH, columns * SIDE // PATCH)
    picture = Piece(IMAGE, 0, (), grid, media=TILES * PLACES)
    marker = Piece(TEXT, 1, (VOCAB.image,))
    return canvas, [(marker, None), (picture, documents.patchify(canvas, PATCH))]


def tiles(canvas: np.ndarray) -> np.ndarray:
    """u8[tiles, H, W, 3], row by row."""
    rows, columns = canvas.shape[0] // SIDE, canvas.shape[1] // SIDE
    x = canvas.reshape(rows, SIDE, columns, SIDE, 3)
    return x.transpose(0, 2, 1, 3, 4).reshape(-1, SIDE, SIDE, 3)


def row(m: torch.nn.Module, ids: np.ndarray, canvases: list[np.ndarray]) -> torch.Tensor:
    """The reference's logits [1, L, V] of one document."""
    given: dict[str, Any] = {"input_ids": torch.tensor(ids)[None]}
    if canvases:
        kind, n = next(m.parameters()).dtype, len(canvases)
        pixels, there = np.zeros((1, n, TILES, 3, SIDE, SIDE)), np.zeros((1, n, TILES), np.int64)
        shapes, counts = [], []
        for i, canvas in enumerate(canvases):
            own = documents.pixels(list(tiles(canvas)), OPENAI)
            pixels[0, i, : len(own)], there[0, i, : len(own)] = own, 1
            counts.append(len(own))
            shapes.append(SHAPES.index([canvas.shape[0] // SIDE, canvas.shape[1] // SIDE]) + 1)
        sees = theirs.get_cross_attention_token_mask(ids.tolist(), VOCAB.image)
        mask = theirs.convert_sparse_cross_attention_mask_to_dense([sees], [counts], TILES, len(ids))
        given |= {"pixel_values": torch.tensor(pixels, dtype=kind), "aspect_ratio_mask": torch.tensor(there)}
        given |= {"aspect_ratio_ids": torch.tensor([shapes]), "cross_attention_mask": torch.tensor(mask)}
    return m(**given, use_cache=False).logits


def mllama(c: Compare, twin: torch.nn.Module, rewrite=lambda path: path, shard: str = "1GB") -> None:
    pictures = [shown(*shape, seed) for seed, shape in enumerate([(1, 2), (2, 2), (1, 1), (3, 1), (1, 3)])]
    (a, b, d, e, f) = (parts for _, parts in pictures)
    rows = [
        [words(3, 0), *a, words(4, 1)],
        [*b, words(2, 2), *d, *e, words(3, 3)],
        [words(2, 4), *f, words(1, 5)],
        [words(6, 6)],
    ]
    canvases = [[0], [1, 2, 3], [4], []]
    given = documents.given(rows, PATCH**2 * 3, SEQUENCE)

    def call(m: torch.nn.Module) -> torch.Tensor:
        each = []
        for ids, there, of in zip(given.ids, given.there, canvases, strict=True):
            out = row(m, ids[there], [pictures[i][0] for i in of])
            each.append(torch.nn.functional.pad(out, (0, 0, 0, len(ids) - out.shape[1])))
        return torch.cat(each)

    documents.compare(c, twin, given, call, rewrite, shard)


@system("Llama 3.2 Vision")
def mllama_five(c: Compare) -> None:
    mllama(c, model(), shard="40KB")


def hub(path: Path) -> Path:
    """As the hub has Llama-3.2-11B-Vision: the rotary settings of version 4, most of what is default left out."""
    names = load_file(path / "model.safetensors")
    assert any(k.startswith("language_model.model.layers.") for k in names)
    config = json.loads((path / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    for key in ("hidden_act", "rms_norm_eps", "tie_word_embeddings", "dropout"):
        del text[key]
    for key in ("hidden_act", "norm_eps", "num_channels", "supported_aspect_ratios", "max_num_tiles"):
        del vision[key]
    (path / "config.json").write_text(json.dumps(config))
    return path


def inner(path: Path) -> Path:
    """The names that transformers 5 has in memory."""
    named = {}
    for key, value in load_file(path / "model.safetensors").items():
        key = key.replace("language_model.lm_head", "lm_head").replace("language_model.model", "language_model")
        named[key if key.startswith("lm_head") else f"model.{key}"] = value
    save_file(named, path / "model.safetensors", metadata={"format": "pt"})
    return path


@system("Llama 3.2 Vision (hub files)")
def mllama_hub(c: Compare) -> None:
    mllama(c, model(), lambda path: inner(hub(path)))
