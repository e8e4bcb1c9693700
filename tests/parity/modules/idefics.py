"""Idefics, whole: rows of two, one and no pictures, words before the first one, gates that are not zero."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from parity import documents
from parity.documents import VOCAB, words
from parity.harness import Compare, system, twin

from mmjax.nn.patch_embed import OPENAI
from mmjax.sequence import interleave
from mmjax.sequence.layout import IMAGE, Piece

PATCH, SIDE, LATENTS, ADDED = 8, 24, 3, 2
VISION = {"embed_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
VISION |= {"image_size": SIDE, "patch_size": PATCH}
RESAMPLER = {"resampler_n_latents": LATENTS, "resampler_depth": 2, "resampler_n_heads": 2, "resampler_head_dim": 12}
TEXT = {"hidden_size": 40, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
TEXT |= {"vocab_size": VOCAB.size - ADDED, "additional_vocab_size": ADDED, "cross_layer_interval": 2}
TEXT |= {"use_resampler": True, "pad_token_id": 0, "vision_config": VISION}
TEXT |= {"freeze_text_layers": False, "freeze_vision_layers": False}
SEQUENCE = interleave.Config(cross="last_image", position="sequential")


def aside(view: np.ndarray) -> documents.Part:
    """A picture that is looked at: nothing of it stands in the sequence."""
    piece, patches = documents.picture([view], PATCH)
    return Piece(IMAGE, 0, (), piece.grid, media=LATENTS), patches


def mark() -> documents.Part:
    """<image>, one of the tokens that were added to Llama's."""
    return Piece(1, 1, (VOCAB.size - 1,)), None


def idefics(
    c: Compare, rewrite=lambda path: path, shard: str = "1GB", resampler: dict | None = None, **more: Any
) -> None:
    views = [documents.random_view(SIDE, SIDE, i) for i in range(3)]
    first, second, third = ([mark(), aside(view)] for view in views)
    rows = [[words(3, 0), *first, words(4, 1), *second, words(2, 2)], [*third, words(3, 3)], [words(6, 4)]]
    given = documents.given(rows, PATCH**2 * 3, SEQUENCE)
    config = transformers.IdeficsConfig(**TEXT, perceiver_config=RESAMPLER | (resampler or {}), **more)
    model = twin(transformers.IdeficsForVisionText2Text, config)
    # Eager attention takes softmax in float32, where a token that sees no picture is NaN for a model in float64.
    model.config._attn_implementation = "sdpa"
    # As IdeficsProcessor has it: each token sees the last picture so far; rows have pictures of zeros to fill up.
    last = (given.ids == VOCAB.size - 1).cumsum(1) - 1
    mask = (last[:, :, None] == np.arange(2)).astype(np.int64)

    def call(m: torch.nn.Module) -> torch.Tensor:
        pictures = documents.pixels(views, OPENAI)
        nothing = np.zeros_like(pictures[0])
        rows = [[pictures[0], pictures[1]], [pictures[2], nothing], [nothing, nothing]]
        shown = torch.tensor(np.array(rows), dtype=next(m.parameters()).dtype)
        there = torch.tensor(given.there.astype(np.int64))
        seen = {"pixel_values": shown, "image_attention_mask": torch.tensor(mask)}
        return m(input_ids=torch.tensor(given.ids), attention_mask=there, **seen, use_cache=False).logits

    documents.compare(c, model, given, call, rewrite, shard)


@system("Idefics")
def one_number(c: Compare) -> None:
    idefics(c, qk_layer_norms=True, resampler={"qk_layer_norms_perceiver": True})


def hub(path: Path) -> Path:
    """As the hub has idefics-9b: `rope_parameters` and what is a default left out."""
    config = json.loads((path / "config.json").read_text())
    for key in ("rope_parameters", "hidden_act", "rms_norm_eps", "qk_layer_norms"):
        config.pop(key, None)
    for key in ("hidden_act", "layer_norm_eps", "model_type"):
        config["vision_config"].pop(key, None)
    (path / "config.json").write_text(json.dumps(config))
    return path


@system("Idefics, gates of a vector, tied (hub files)")
def a_vector(c: Compare) -> None:
    idefics(c, hub, shard="20KB", alpha_type="vector", alpha_initializer="ones", tie_word_embeddings=True)
