"""InternVL, whole: pictures in tiles with a thumbnail, in one view, text alone, three text decoders, hub files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from parity import documents
from parity.documents import VOCAB, words
from parity.harness import Compare, system, twin

from mmjax.nn.patch_embed import IMAGENET
from mmjax.sequence import interleave
from mmjax.sequence.layout import IMAGE, Piece
from mmjax.tokenizers.tiles import Tiles

PATCH, SIDE = 4, 24
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
VISION |= {"image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH], "layer_scale_init_value": 0.5}
TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT |= {"intermediate_size": 48, "vocab_size": VOCAB.size, "pad_token_id": 0}


def tiled(height: int, width: int, seed: int) -> tuple[documents.Part, list[np.ndarray]]:
    """A picture of this height and width: for us, and its views for the reference."""
    policy = Tiles(PATCH, SIDE)
    shown = policy.picture(height, width)
    views = [documents.random_view(SIDE, SIDE, 100 * seed + n) for n in range(len(shown.views))]
    grids = [(1, *view) for view in shown.views]
    piece = Piece(IMAGE, len(views) * (SIDE // PATCH // 2) ** 2, (), grids[0], tiles=tuple(grids[1:]))
    return (piece, np.concatenate([documents.patchify(v, PATCH) for v in views])), views


def internvl(c: Compare, vision: dict, text: dict, rewrite=lambda path: path, tied: bool = False, **more: Any) -> None:
    """Pictures of 3 tiles, of 1 and of 2; those of several have the whole behind them."""
    sizes = [(24, 72), (24, 24), (60, 30)]
    (first, second, third), views = zip(*(tiled(*size, n) for n, size in enumerate(sizes)), strict=True)
    assert [len(v) for v in views] == [4, 1, 3]
    rows = [[words(3, 0), first, words(4, 1)], [second, words(2, 2), third, words(1, 3)], [words(6, 4)]]
    given = documents.given(rows, PATCH**2 * 3, interleave.Config(position="sequential", merge=2))
    cls = transformers.InternVLForConditionalGeneration
    sees = {"model_type": "internvl_vision"} | vision
    twins = cls.config_class(
        vision_config=sees, text_config=text, image_token_id=VOCAB.image, tie_word_embeddings=tied, **more
    )

    def call(m: torch.nn.Module) -> torch.Tensor:
        pixels = documents.pixels([v for own in views for v in own], IMAGENET)
        return m(
            input_ids=torch.tensor(given.ids),
            attention_mask=torch.tensor(given.there.astype(np.int64)),
            pixel_values=torch.tensor(pixels, dtype=next(m.parameters()).dtype),
            use_cache=False,
        ).logits

    documents.compare(c, twin(cls, twins), given, call, rewrite)


@system("InternVL, RMSNorm and Qwen3, tied")
def internvl_35(c: Compare) -> None:
    sees = VISION | {"use_qk_norm": True, "norm_type": "rms_norm", "attention_bias": False}
    internvl(c, sees, TEXT | {"model_type": "qwen3", "head_dim": 16}, tied=True)


def hub(path: Path) -> Path:
    """As the hub has InternVL3: heads and ties said nowhere, though the head is a tensor of its own."""
    config = json.loads((path / "config.json").read_text())
    del config["tie_word_embeddings"], config["downsample_ratio"], config["projector_hidden_act"]
    for key in ("rope_parameters", "layer_types", "tie_word_embeddings", "hidden_act"):
        config["text_config"].pop(key, None)
    (path / "config.json").write_text(json.dumps(config))
    return path


@system("InternVL (hub files)")
def internvl_hub(c: Compare) -> None:
    internvl(c, VISION | {"attention_bias": True}, TEXT | {"model_type": "qwen2"}, hub)


@system("InternVL, features of an earlier block, Llama")
def internvl_early(c: Compare) -> None:
    sees = VISION | {"attention_bias": True, "use_mean_pooling": False, "num_hidden_layers": 3}
    internvl(c, sees, TEXT | {"model_type": "llama"}, vision_feature_layer=-2)
