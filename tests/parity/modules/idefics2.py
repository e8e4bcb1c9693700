"""Idefics2, Idefics3 and SmolVLM, whole: pictures of any shape and in tiles, text alone, rows of different lengths."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from parity import documents
from parity.documents import VOCAB, words
from parity.harness import Compare, system, twin

from mmjax.nn.patch_embed import HALF
from mmjax.sequence import interleave
from mmjax.sequence.layout import Piece

PATCH, SIDE = 8, 32
TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TOWER |= {"image_size": SIDE, "patch_size": PATCH}
TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT |= {"intermediate_size": 48, "vocab_size": VOCAB.size, "pad_token_id": 0}
RESAMPLER = {"resampler_n_latents": 3, "resampler_depth": 2, "resampler_n_heads": 4, "resampler_head_dim": 8}
RESAMPLER |= {"num_key_value_heads": 2, "hidden_size": 32, "rms_norm_eps": 1e-5}


def model(name: str, text: dict, tied: bool = False, **more: Any) -> torch.nn.Module:
    cls = getattr(transformers, f"{name}ForConditionalGeneration")
    ids = {"image_token_id": VOCAB.image, "tie_word_embeddings": tied}
    return twin(cls, cls.config_class(vision_config=TOWER, text_config=text, **ids, **more))


def padded(rows: list[list[np.ndarray]], m: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Pictures of different sizes and numbers as transformers takes them: canvases, and which of their pixels are."""
    each = [view for row in rows for view in row]
    tall, wide = (max(view.shape[axis] for view in each) for axis in (0, 1))
    shape = (len(rows), max(map(len, rows)))
    values, there = np.zeros((*shape, 3, tall, wide)), np.zeros((*shape, tall, wide), np.int64)
    for i, row in enumerate(rows):
        for j, view in enumerate(row):
            height, width = view.shape[:2]
            values[i, j, :, :height, :width] = documents.pixels([view], HALF)[0]
            there[i, j, :height, :width] = 1
    kind = next(m.parameters()).dtype
    return {"pixel_values": torch.tensor(values, dtype=kind), "pixel_attention_mask": torch.tensor(there)}


def compare(
    c: Compare, twin: torch.nn.Module, sizes: list[list[tuple[int, int]]], sequence: interleave.Config, **more: Any
) -> None:
    """Rows: pictures with text between them; text alone. `media`: tokens of a picture of so many patches."""
    media, rewrite = more["media"], more.get("rewrite", lambda path: path)
    views = [[documents.random_view(*s, 10 * i + j) for j, s in enumerate(own)] for i, own in enumerate(sizes)]
    rows = []
    for i, own in enumerate(views):
        parts = [words(2 + i, 40 + i)]
        for j, view in enumerate(own):
            piece, patches = documents.picture([view], PATCH)
            n = media(piece.grid)
            parts += [(Piece(piece.modality, n, (), piece.grid), patches), words(1 + j, 50 + 5 * i + j)]
        rows.append(parts)
    rows.append([words(7, 70)])
    given = documents.given(rows, PATCH**2 * 3, sequence)

    def call(m: torch.nn.Module) -> torch.Tensor:
        seen = {"input_ids": torch.tensor(given.ids), "attention_mask": torch.tensor(given.there.astype(np.int64))}
        return m(**seen, **padded([*views, []], m), use_cache=False).logits

    documents.compare(c, twin, given, call, rewrite, shard="40KB")


def hub(path: Path) -> Path:
    """As the hub has idefics2-8b: what transformers takes anyway is left out, and parts have the whole's type."""
    config = json.loads((path / "config.json").read_text())
    text = config["text_config"]
    theta = text.pop("rope_parameters")["rope_theta"]
    for key in ("head_dim", "hidden_act", "tie_word_embeddings", "attention_dropout"):
        text.pop(key, None)
    for key in ("hidden_act", "layer_norm_eps", "num_channels"):
        del config["vision_config"][key]
    config["text_config"] = text | {"rope_theta": theta}
    for name in ("vision_config", "perceiver_config"):
        config[name]["model_type"] = "idefics2"
    config["perceiver_config"] = {k: v for k, v in config["perceiver_config"].items() if k.startswith(("res", "num"))}
    config["torch_dtype"] = config.pop("dtype")
    (path / "config.json").write_text(json.dumps(config))
    return path


SIZES = [[(24, 40), (56, 24)], [(40, 40), (35, 70), (32, 32)]]


@system("Idefics2")
def idefics2(c: Compare) -> None:
    """Pictures of more and fewer patches than the table has, whole and (35 × 70 pixels) not whole patches a side."""
    twin = model("Idefics2", TEXT | {"model_type": "mistral", "sliding_window": None}, perceiver_config=RESAMPLER)
    compare(c, twin, SIZES, interleave.Config(position="sequential"), media=lambda grid: 3)


@system("Idefics2 (hub files), a window")
def idefics2_hub(c: Compare) -> None:
    text = TEXT | {"model_type": "mistral", "sliding_window": 5, "rms_norm_eps": 1e-5}
    own = {k: v for k, v in RESAMPLER.items() if k != "hidden_size"}  # the text's, and its epsilon
    twin = model("Idefics2", text, perceiver_config=own)
    compare(c, twin, SIZES[:1], interleave.Config(position="sequential"), media=lambda grid: 3, rewrite=hub)


def third(c: Compare, name: str, tied: bool) -> None:
    twin = model(name, TEXT | {"model_type": "llama"}, tied, scale_factor=2)
    sizes = [[(SIDE, SIDE)] * 2, [(SIDE, SIDE)]]
    compare(c, twin, sizes, interleave.Config(position="sequential", merge=2), media=lambda grid: 4)


@system("Idefics3")
def idefics3(c: Compare) -> None:
    third(c, "Idefics3", False)


@system("SmolVLM, tied")
def smolvlm(c: Compare) -> None:
    third(c, "SmolVLM", True)
