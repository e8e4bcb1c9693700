"""BLIP-2 and InstructBLIP, whole: pictures in rows of different lengths, text alone, older files."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from parity import documents
from parity.documents import VOCAB, words
from parity.harness import Compare, system, twin
from safetensors.numpy import load_file, save_file

from mmjax.nn.patch_embed import OPENAI
from mmjax.sequence import interleave
from mmjax.sequence.layout import IMAGE, Piece

PATCH, SIDE, QUERIES = 8, 24, 3
BLOCKS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
VISION = BLOCKS | {"image_size": SIDE, "patch_size": PATCH}
QFORMER = BLOCKS | {"hidden_size": 24, "num_hidden_layers": 3, "encoder_hidden_size": 32, "vocab_size": 41}
QFORMER |= {"max_position_embeddings": 8}
OPT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 32}
OPT |= {"model_type": "opt", "vocab_size": VOCAB.size, "pad_token_id": 0, "max_position_embeddings": 32}
SEQUENCE = interleave.Config(position="sequential")


def picture(seed: int) -> tuple[documents.Part, np.ndarray]:
    """A picture of a fixed number of media tokens, and its pixels."""
    view = documents.random_view(SIDE, SIDE, seed)
    grid = (1, SIDE // PATCH, SIDE // PATCH)
    return (Piece(IMAGE, QUERIES, (), grid, media=QUERIES), documents.patchify(view, PATCH)), view


def model(name: str, text: dict) -> torch.nn.Module:
    cls = getattr(transformers, f"{name}ForConditionalGeneration")
    sizes = {"num_query_tokens": QUERIES, "image_token_index": VOCAB.image}
    return twin(cls, cls.config_class(vision_config=VISION, qformer_config=QFORMER, text_config=text, **sizes))


def pixels(views: list[np.ndarray], m: torch.nn.Module) -> torch.Tensor:
    return torch.tensor(documents.pixels(views, OPENAI), dtype=next(m.parameters()).dtype)


def blip2(c: Compare, rewrite=lambda path: path) -> None:
    (first, second, third), views = zip(*(picture(i) for i in range(3)), strict=True)
    rows = [[first, words(4, 1)], [words(2, 2), second, words(1, 5), third, words(1, 3)], [words(6, 4)]]
    given = documents.given(rows, PATCH**2 * 3, SEQUENCE)

    def call(m: torch.nn.Module) -> torch.Tensor:
        ids = {"input_ids": torch.tensor(given.ids), "attention_mask": torch.tensor(given.there.astype(np.int64))}
        return m(**ids, pixel_values=pixels(list(views), m), use_cache=False).logits

    documents.compare(c, model("Blip2", OPT), given, call, rewrite)


@system("BLIP-2, OPT")
def blip2_opt(c: Compare) -> None:
    blip2(c)


def older(path: Path) -> Path:
    """Files of before 2024: no id where pictures go, a copy of the tied table, buffers, much left out."""
    config = json.loads((path / "config.json").read_text())
    config.pop("image_token_index")
    for key in ("enable_bias", "layer_norm_elementwise_affine", "tie_word_embeddings", "activation_function"):
        config["text_config"].pop(key)
    (path / "config.json").write_text(json.dumps(config | {"use_decoder_only_language_model": True}))
    weights = load_file(path / "model.safetensors")
    weights["language_model.lm_head.weight"] = weights["language_model.model.decoder.embed_tokens.weight"]
    weights["qformer.embeddings.position_ids"] = np.arange(8)[None]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@system("BLIP-2, OPT (older files)")
def blip2_older(c: Compare) -> None:
    blip2(c, older)


LLAMA = BLOCKS | {"model_type": "llama", "num_key_value_heads": 2, "vocab_size": VOCAB.size, "pad_token_id": 0}
SAID = (5, 1, 3)  # tokens beside each picture


@system("InstructBLIP, Llama")
def instructblip(c: Compare) -> None:
    """Several pictures in a row, each with a text of its own length that its queries read."""
    (first, second, third), views = zip(*(picture(i) for i in range(3)), strict=True)
    rows = [[first, words(4, 1)], [words(2, 2), second, words(1, 5), third, words(1, 3)], [words(6, 4)]]
    ids = np.random.default_rng(8).integers(1, 41, (3, 5)).astype(np.int32)
    there = np.arange(5)[None] < np.array(SAID)[:, None]
    said = np.where(there, ids, -1)
    sequence = dataclasses.replace(SEQUENCE, instruction=6)
    given = documents.given(rows, PATCH**2 * 3, sequence, [said[:1], said[1:], said[:0]])
    reads = {"qformer_input_ids": torch.tensor(np.where(there, ids, 0)).long()}
    reads["qformer_attention_mask"] = torch.tensor(there.astype(np.int64))

    def call(m: torch.nn.Module) -> torch.Tensor:
        own = {"input_ids": torch.tensor(given.ids), "attention_mask": torch.tensor(given.there.astype(np.int64))}
        return m(**own, **reads, pixel_values=pixels(list(views), m), use_cache=False).logits

    documents.compare(c, model("InstructBlip", LLAMA), given, call)
