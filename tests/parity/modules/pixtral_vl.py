"""Pixtral (a LLaVA of another tower) and Mistral 3, whole: pictures of their own sizes, breaks between their rows."""

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
from mmjax.tokenizers.resolution import Pixtral

PATCH, BREAK = 8, 55
VISION = {"model_type": "pixtral", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"intermediate_size": 48, "patch_size": PATCH, "image_size": 64}
TEXT = {"model_type": "mistral", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": VOCAB.size, "head_dim": 16}
TEXT |= {"pad_token_id": 0, "sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}


def broken(height: int, width: int, merge: int, seed: int) -> tuple[documents.Part, np.ndarray]:
    """A picture of this height and width with a break after each row but the last: for us, and its pixels."""
    shown = Pixtral(PATCH, 64, merge).picture(height, width)
    rows, columns = shown.views[0]
    view = documents.random_view(rows * PATCH, columns * PATCH, seed)
    media = rows * columns // merge**2
    shows = {"slots": shown.slots, "merge": shown.merge, "media": media}
    piece = Piece(IMAGE, len(shown.slots), (), (1, rows, columns), **shows)
    return (piece, documents.patchify(view, PATCH)), view


def compare(c: Compare, name: str, merge: int, rewrite=lambda path: path, vision: dict = VISION, **more: Any) -> None:
    made = [broken(*size, merge, n) for n, size in enumerate([(48, 64), (90, 50), (17, 31)])]
    (first, second, third), views = zip(*made, strict=True)
    rows = [[words(3, 0), first, words(4, 1)], [second, words(2, 2), third, words(1, 3)], [words(6, 4)]]
    cls = getattr(transformers, f"{name}ForConditionalGeneration")
    twins = cls.config_class(vision_config=vision, text_config=TEXT, image_token_index=VOCAB.image, **more)
    given = documents.given(
        rows, PATCH**2 * 3, interleave.Config(position="sequential", merge=merge), image_newline=BREAK
    )
    assert (given.ids == BREAK).sum() == sum(list(p[0].slots).count(-1) for p in (first, second, third))
    sizes = [view.shape[:2] for view in views]
    tall, wide = np.max(sizes, axis=0)

    def call(m: torch.nn.Module) -> torch.Tensor:
        pixels = np.zeros((len(views), 3, tall, wide))
        for n, (view, (height, width)) in enumerate(zip(views, sizes, strict=True)):
            pixels[n, :, :height, :width] = documents.pixels([view], OPENAI)[0]
        return m(
            input_ids=torch.tensor(given.ids),
            attention_mask=torch.tensor(given.there.astype(np.int64)),
            pixel_values=torch.tensor(pixels, dtype=next(m.parameters()).dtype),
            image_sizes=torch.tensor(sizes),
            use_cache=False,
        ).logits

    documents.compare(c, twin(cls, twins), given, call, rewrite)


def hub(path: Path) -> Path:
    """As the hub has both: rotary bases at the top of either part, most else left out."""
    config = json.loads((path / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        config[part]["rope_theta"] = config[part].pop("rope_parameters")["rope_theta"]
        config[part].pop("layer_types", None)
        config[part].pop("hidden_act")
    config.pop("tie_word_embeddings", None)
    for key in ("projector_hidden_act", "spatial_merge_size", "multimodal_projector_bias"):
        config.pop(key, None)
    (path / "config.json").write_text(json.dumps(config))
    return path


ALL = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}


@system("Pixtral (hub files)")
def pixtral(c: Compare) -> None:
    compare(c, "Llava", 1, hub, **ALL)


@system("Pixtral, features of an earlier block")
def pixtral_early(c: Compare) -> None:
    compare(c, "Llava", 1, vision=VISION | {"hidden_act": "silu"}, **ALL | {"vision_feature_layer": -2})


@system("Mistral 3")
def mistral3(c: Compare) -> None:
    more = {"multimodal_projector_bias": True, "tie_word_embeddings": True}
    compare(c, "Mistral3", 2, vision=VISION | {"hidden_act": "silu"}, **more)


@system("Mistral 3 (hub files)")
def mistral3_hub(c: Compare) -> None:
    compare(c, "Mistral3", 2, hub, tie_word_embeddings=False)
