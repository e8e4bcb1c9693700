"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL, whole: pictures and clips of several sizes, text alone, M-RoPE, DeepStack."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from parity import documents
from parity.documents import VOCAB, words
from parity.harness import Compare, system, twin

from mmjax.nn.patch_embed import HALF, OPENAI
from mmjax.sequence import interleave, positions, windows
from mmjax.sequence.layout import IMAGE, VIDEO, Piece

PATCH = 4
TEXT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT |= {"intermediate_size": 48, "vocab_size": VOCAB.size, "max_position_embeddings": 256, "pad_token_id": 0}
QWEN2 = {"depth": 2, "embed_dim": 32, "num_heads": 4, "patch_size": PATCH, "hidden_size": 32, "mlp_ratio": 2}
QWEN25 = {"depth": 3, "hidden_size": 32, "num_heads": 4, "patch_size": PATCH, "intermediate_size": 48}
QWEN25 |= {"out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1], "tokens_per_second": 4}
QWEN3 = {"depth": 3, "hidden_size": 32, "num_heads": 4, "patch_size": PATCH, "intermediate_size": 48}
QWEN3 |= {"out_hidden_size": 32, "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1]}
IDS = {"image_token_id": VOCAB.image, "video_token_id": VOCAB.video}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2}
SECONDS = 0.5  # per frame of two


def medium(grid: tuple[int, int, int], seed: int, video: bool = False, interval: float = 1.0) -> documents.Part:
    """A picture or a clip: its piece, and its patches row by row, of two frames each (a picture's are the same)."""
    n = grid[0] * grid[1] * grid[2]
    x = np.random.default_rng(seed).integers(0, 256, (n, 2, PATCH * PATCH * 3)).astype(np.uint8)
    if not video:
        x[:, 1] = x[:, 0]
    return Piece(VIDEO if video else IMAGE, n // 4, (), grid, interval=interval), x.reshape(n, -1)


def theirs(part: documents.Part, colours: Any) -> np.ndarray:
    """[P, channel × frame × row × column] in squares' order, normalised, as the reference's processors give patches."""
    piece, x = part
    mean, deviation = np.array(colours)
    x = (x.reshape(-1, 2, PATCH, PATCH, 3) / 255 - mean) / deviation
    order, _, _ = windows.order(piece.grid, 2)
    return x.transpose(0, 4, 1, 2, 3).reshape(len(x), -1)[order]


def compare(
    c: Compare, name: str, vision: dict, text: dict, rewrite=lambda path: path, colours=OPENAI, clips: bool = True
) -> None:
    """Rows: a picture and text; a small picture, text and a clip; text alone."""
    cls = getattr(transformers, f"{name}ForConditionalGeneration")
    tied = text.get("tie_word_embeddings", False)
    config = cls.config_class(vision_config=vision, text_config=TEXT | text, tie_word_embeddings=tied, **IDS)
    model = twin(cls, config)
    split = name == "Qwen3VL"  # every frame of a clip is a medium of its own, with text between them
    interval = 4 * SECONDS if name == "Qwen2_5_VL" else 1.0
    stills = [medium((1, 6, 10), 0), medium((1, 4, 4), 1)]
    clip = (3, 4, 6)
    whole = medium(clip, 2, True, interval)
    frames = [medium((1, *clip[1:]), 3 + i, True) for i in range(clip[0])] if split else [whole]
    if split:
        whole = Piece(VIDEO, 0, (), clip), np.concatenate([x for _, x in frames])
    film = [part for i, frame in enumerate(frames) for part in (words(2, 20 + i), frame)] if clips else []
    rows = [[words(3, 0), stills[0], words(4, 1)], [words(1, 5), stills[1], *film, words(3, 2)], [words(7, 3)]]
    window = vision.get("window_size", 0) // (2 * PATCH)
    sequence = interleave.Config(rope=positions.QWEN_VL, merge=2, window=window)
    given = documents.given(rows, 2 * PATCH**2 * 3, sequence)

    def call(m: torch.nn.Module) -> torch.Tensor:
        kind = next(m.parameters()).dtype
        ids = torch.tensor(given.ids, dtype=torch.int64)
        more = {"mm_token_type_ids": torch.where(ids == VOCAB.image, 1, torch.where(ids == VOCAB.video, 2, 0))}
        more["pixel_values"] = torch.tensor(np.concatenate([theirs(s, colours) for s in stills]), dtype=kind)
        more["image_grid_thw"] = torch.tensor([s[0].grid for s in stills])
        if clips:
            more["pixel_values_videos"] = torch.tensor(np.concatenate([theirs(f, colours) for f in frames]), dtype=kind)
            more["video_grid_thw"] = torch.tensor([whole[0].grid])
        if clips and name == "Qwen2_5_VL":
            more["second_per_grid_ts"] = torch.tensor([SECONDS])
        # Padding that no window reaches is NaN there; without a mask it is text that nothing real sees.
        seen = None if "sliding_window" in text else torch.tensor(given.there.astype(np.int64))
        return m(input_ids=ids, attention_mask=seen, use_cache=False, **more).logits

    documents.compare(c, model, given, call, rewrite, shard="30KB")


def flat(path: Path) -> Path:
    """As the hub has Qwen2-VL and Qwen2.5-VL: the text model's fields at the top, `mrope`, vision without a type."""
    config = json.loads((path / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    theta = rope.pop("rope_theta")
    rope = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    text = {k: v for k, v in text.items() if k not in ("model_type", "layer_types", "dtype")}
    config["vision_config"].pop("model_type")
    config = text | config | {"rope_theta": theta, "rope_scaling": rope, "torch_dtype": config.pop("dtype")}
    (path / "config.json").write_text(json.dumps(config))
    return path


def mrope(*sections: int, **more: Any) -> dict:
    kind = {"rope_type": "default", "rope_theta": 500.0, "mrope_section": list(sections)}
    return {"rope_parameters": kind} | more


@system("Qwen2-VL (hub files)")
def qwen2(c: Compare) -> None:
    compare(c, "Qwen2VL", QWEN2, mrope(2, 1, 1, tie_word_embeddings=True), flat)


@system("Qwen2.5-VL")
def qwen25(c: Compare) -> None:
    compare(c, "Qwen2_5_VL", QWEN25, mrope(1, 1, 2, use_sliding_window=True, sliding_window=9, max_window_layers=2))


@system("Qwen2.5-VL (hub files)")
def qwen25_hub(c: Compare) -> None:
    compare(c, "Qwen2_5_VL", QWEN25, mrope(2, 1, 1), flat)


@system("Qwen3-VL")
def qwen3(c: Compare) -> None:
    compare(c, "Qwen3VL", QWEN3, mrope(4, 2, 2, head_dim=16, num_hidden_layers=3), colours=HALF)


@system("Qwen3-VL, pictures alone, tied")
def qwen3_stills(c: Compare) -> None:
    text = mrope(4, 2, 2, head_dim=16, attention_bias=True, tie_word_embeddings=True)
    compare(c, "Qwen3VL", QWEN3, text, colours=HALF, clips=False)
