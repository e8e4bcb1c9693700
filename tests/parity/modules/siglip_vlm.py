"""PaliGemma and PaliGemma 2, Gemma 3, DeepSeek-VL, whole: one and two pictures, text alone, rows of several lengths."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from parity import documents
from parity.documents import VOCAB, Part, words
from parity.harness import Compare, system, twin
from parity.modules.llava import SIGLIP, TEXT, inner, inputs, one_view, tensor
from safetensors.numpy import load_file, save_file

from mmjax.nn.patch_embed import HALF
from mmjax.sequence import interleave
from mmjax.sequence.layout import IMAGE

PATCH = 8
GEMMA = TEXT | {"head_dim": 16, "bos_token_id": 1, "eos_token_id": 2}
GEMMA2 = GEMMA | {"num_hidden_layers": 4, "query_pre_attn_scalar": 12, "final_logit_softcapping": 3.0}
GEMMA2 |= {"sliding_window": 5, "attn_logit_softcapping": 2.0, "model_type": "gemma2"}
GEMMA3 = GEMMA2 | {"model_type": "gemma3_text", "sliding_window": 3, "final_logit_softcapping": None}
GEMMA3["attn_logit_softcapping"] = None
GEMMA3 |= {"layer_types": ["sliding_attention", "full_attention"] * 2}
GEMMA3 |= {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    }
}


def learnt(part: Part) -> Part:
    """What an answer says: a prefix ends before it."""
    return dataclasses.replace(part[0], train=True), None


def pooled(views: Sequence[np.ndarray], tokens: int) -> Part:
    """A picture of so many media tokens."""
    piece, patches = documents.picture(views, PATCH)
    return dataclasses.replace(piece, length=tokens, media=tokens), patches


def compare(
    c: Compare,
    name: str,
    text: dict,
    sequence: interleave.Config,
    rewrite: Callable[[Path], Path] = lambda path: path,
    kinds: Callable[[documents.Given], np.ndarray] | None = None,
    side: int = 24,
    tokens: int = 9,
    **more: Any,
) -> None:
    """kinds: the reference's `token_type_ids`, without which it is silently causal."""
    views = [one_view(i, side) for i in range(3)]
    first, second, third = (pooled(v, tokens) for v in views)
    rows = [
        [first, words(5, 1), learnt(words(6, 2))],
        [second, words(1, 3), third, words(3, 4), learnt(words(2, 5))],
        [words(6, 6), learnt(words(1, 7))],
        [words(9, 8)],
    ]
    given = documents.given(rows, PATCH**2 * 3, sequence)
    cls = getattr(transformers, f"{name}ForConditionalGeneration")
    ids = {"image_token_id" if name == "DeepseekVL" else "image_token_index": VOCAB.image}
    vision = SIGLIP | {"image_size": side, "num_hidden_layers": 2}
    model = twin(cls, cls.config_class(vision_config=vision, text_config=text, **ids, **more))
    types = {} if kinds is None else {"token_type_ids": torch.tensor(kinds(given))}

    def call(m: torch.nn.Module) -> torch.Tensor:
        pictures = tensor([v for own in views for v in own], HALF, m)
        # Gemma 3's padding that no window reaches is NaN; without a mask it is text that nothing real sees.
        masked = inputs(given) | ({"attention_mask": None} if name == "Gemma3" else {})
        return m(**masked, **types, pixel_values=pictures, use_cache=False).logits

    documents.compare(c, model, given, call, rewrite)


def suffix(given: documents.Given) -> np.ndarray:
    """PaliGemma's: 1 in the suffix, after which nothing is seen that comes later."""
    at = np.arange(given.ids.shape[1])
    weight = np.asarray(given.batch.weight)[:, : len(at)]
    prefix = np.where(weight.any(1), weight.argmax(1) + 1, len(at))
    return (given.there & (at >= prefix[:, None])).astype(np.int64)


PREFIX = interleave.Config(position="sequential", see="prefix")


@system("PaliGemma")
def paligemma(c: Compare) -> None:
    compare(c, "PaliGemma", GEMMA | {"model_type": "gemma"}, PREFIX, inner, suffix, projection_dim=32)


def hub(path: Path) -> Path:
    """As the hub has them: an inner `vision_model.`, rope in the names of version 4, and what is so anyway left out."""
    weights = load_file(path / "model.safetensors")
    named = {k.replace("vision_tower.", "vision_tower.vision_model."): v for k, v in weights.items()}
    save_file(named, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    text = config["text_config"]
    rope = text.pop("rope_parameters")
    if "full_attention" in rope:
        text["rope_theta"], text["rope_local_base_freq"] = (rope[k]["rope_theta"] for k in rope)
        text["rope_scaling"] = {"rope_type": "linear", "factor": rope["full_attention"]["factor"]}
        text["sliding_window_pattern"] = 2
    for key in ("use_bidirectional_attention", "layer_types", "tie_word_embeddings", "hidden_activation"):
        del text[key]
    config.pop("tie_word_embeddings")
    (path / "config.json").write_text(json.dumps(config))
    return path


@system("PaliGemma 2 (hub files)")
def paligemma2(c: Compare) -> None:
    """Its windows are shorter than the prefix, in which they do not count."""
    compare(c, "PaliGemma", GEMMA2, PREFIX, hub, suffix, projection_dim=32)


def pictures(given: documents.Given) -> np.ndarray:
    """Gemma 3's: 1 where a picture's tokens are."""
    return (given.there & (np.asarray(given.batch.modality)[:, : given.ids.shape[1]] == IMAGE)).astype(np.int64)


@system("Gemma 3 with pictures (hub files)")
def gemma3(c: Compare) -> None:
    """A picture's four tokens are more than its windows hold."""
    sequence = interleave.Config(position="sequential", see="bidirectional_images", merge=2)
    sizes = {"side": 32, "tokens": 4, "mm_tokens_per_image": 4}
    compare(c, "Gemma3", GEMMA3, sequence, hub, pictures, **sizes)


@system("DeepSeek-VL")
def deepseek_vl(c: Compare) -> None:
    text = TEXT | {"model_type": "llama"}
    compare(c, "DeepseekVL", text, interleave.Config(position="sequential"), tie_word_embeddings=False)
