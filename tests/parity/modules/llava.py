"""LLaVA-1.5, -NeXT and -OneVision, whole: pictures of several sizes, text alone, rows of different lengths."""

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

from mmjax.nn.patch_embed import HALF, OPENAI
from mmjax.sequence import interleave
from mmjax.tokenizers.tiles import AnyRes

PATCH, SIDE = 8, 24
TOWER = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
TOWER |= {"image_size": SIDE, "patch_size": PATCH}
CLIP = {"model_type": "clip_vision_model"} | TOWER
SIGLIP = {"model_type": "siglip_vision_model"} | TOWER
TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT |= {"intermediate_size": 48, "vocab_size": VOCAB.size, "pad_token_id": 0}
SEQUENCE = interleave.Config(position="sequential")
PINPOINTS = ((1, 2), (2, 1), (2, 2))  # in tiles


def model(name: str, vision: dict, text: dict, **more: Any) -> torch.nn.Module:
    cls = getattr(transformers, f"{name}ForConditionalGeneration")
    ids = {"image_token_index": VOCAB.image}
    return twin(cls, cls.config_class(vision_config=vision, text_config=text, **ids, **more))


def one_view(seed: int, side: int = SIDE) -> list[np.ndarray]:
    return [documents.random_view(side, side, seed)]


def inputs(given: documents.Given) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor(given.ids), "attention_mask": torch.tensor(given.there.astype(np.int64))}


def tensor(views: list[np.ndarray], colours: Any, m: torch.nn.Module) -> torch.Tensor:
    return torch.tensor(documents.pixels(views, colours), dtype=next(m.parameters()).dtype)


def llava(c: Compare, vision: dict, text: dict, rewrite=lambda path: path, shard: str = "1GB", **more: Any) -> None:
    colours = OPENAI if vision is CLIP else HALF
    views = [one_view(i) for i in range(3)]
    first, second, third = (documents.picture(v, PATCH) for v in views)
    rows = [[words(3, 0), first, words(4, 1)], [second, words(2, 2), third, words(1, 3)], [words(6, 4)]]
    given = documents.given(rows, PATCH**2 * 3, SEQUENCE)
    twin = model("Llava", vision, text, **more)

    def call(m: torch.nn.Module) -> torch.Tensor:
        return m(
            **inputs(given), pixel_values=tensor([v for own in views for v in own], colours, m), use_cache=False
        ).logits

    documents.compare(c, twin, given, call, rewrite, shard)


@system("LLaVA-1.5")
def llava_15(c: Compare) -> None:
    llava(c, CLIP, TEXT | {"model_type": "llama"})


def hub(path: Path) -> Path:
    """As the hub has llava-1.5-7b-hf: an inner `vision_model.`, names of version 4, most of text_config left out."""
    weights = load_file(path / "model.safetensors")
    named = {k.replace("vision_tower.", "vision_tower.vision_model."): v for k, v in weights.items()}
    save_file(named, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    text = config["text_config"]
    for key in ("rope_parameters", "attention_bias", "mlp_bias", "tie_word_embeddings", "head_dim", "hidden_act"):
        del text[key]
    for key in ("projector_hidden_act", "vision_feature_layer", "multimodal_projector_bias", "tie_word_embeddings"):
        config.pop(key)
    (path / "config.json").write_text(json.dumps(config))
    return path


@system("LLaVA-1.5 (hub files)")
def llava_15_hub(c: Compare) -> None:
    llava(c, CLIP, TEXT | {"model_type": "llama"}, hub)


def inner(path: Path) -> Path:
    """The names that transformers 5 has in memory."""
    weights = load_file(path / "model.safetensors")
    named = {}
    for key, value in weights.items():
        if key.startswith("language_model."):
            key = key.replace("language_model.lm_head", "lm_head").replace(
                "language_model.model", "model.language_model"
            )
            named[key] = value
        else:
            named[f"model.{key}"] = value
    save_file(named, path / "model.safetensors", metadata={"format": "pt"})
    return path


@system("LLaVA, SigLIP and Qwen3, tied")
def llava_qwen3(c: Compare) -> None:
    text = TEXT | {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True}
    more = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full", "projector_hidden_act": "gelu_new"}
    llava(c, SIGLIP, text, inner, multimodal_projector_bias=False, **more)


def tiled(sizes: list[tuple[int, int]], most: int = 0) -> tuple[list[documents.Part], list[list[np.ndarray]]]:
    """Pictures of these heights and widths in tiles: for us, and their views for the reference."""
    policy = AnyRes(PATCH, SIDE, PINPOINTS, most=most)
    parts, views = [], []
    for i, (height, width) in enumerate(sizes):
        shown = policy.picture(height, width)
        own = [documents.random_view(SIDE, SIDE, 100 * i + n) for n in range(len(shown.views))]
        parts.append(documents.picture(own, PATCH, shown.slots, mixes=shown.mixes))
        views.append(own)
    return parts, views


def stacked(views: list[list[np.ndarray]], colours: Any, m: torch.nn.Module) -> torch.Tensor:
    """[pictures, views, 3, H, W], with zeros for the views that a picture does not have."""
    most = max(map(len, views))
    each = [tensor(v, colours, m) for v in views]
    return torch.stack([torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])]) for x in each])


@system("LLaVA-NeXT")
def llava_next(c: Compare) -> None:
    sizes = [(40, 70), (90, 50), (30, 31)]
    (first, second, third), views = tiled(sizes)
    rows = [[words(3, 0), first, words(4, 1)], [second, words(2, 2), third, words(1, 3)], [words(6, 4)]]
    given = documents.given(rows, PATCH**2 * 3, SEQUENCE)
    points = [[h * SIDE, w * SIDE] for h, w in PINPOINTS]
    twin = model(
        "LlavaNext", CLIP, TEXT | {"model_type": "mistral", "sliding_window": None}, image_grid_pinpoints=points
    )

    def call(m: torch.nn.Module) -> torch.Tensor:
        pictures = {"pixel_values": stacked(views, OPENAI, m), "image_sizes": torch.tensor(sizes)}
        return m(**inputs(given), **pictures, use_cache=False).logits

    documents.compare(c, twin, given, call, shard="20KB")


@system("LLaVA-OneVision")
def llava_onevision(c: Compare) -> None:
    """A picture alone is tiled and, where large, resized; of several each is one view; a video is pooled."""
    text = TEXT | {"model_type": "qwen2", "tie_word_embeddings": True}
    points = [[h * SIDE, w * SIDE] for h, w in PINPOINTS]
    more = {"image_grid_pinpoints": points, "vision_aspect_ratio": "anyres_max_1", "video_token_index": VOCAB.video}
    twin = model("LlavaOnevision", SIGLIP, text, **more)
    sizes = [(40, 70), (47, 46)]
    (wide, square), views = tiled(sizes, most=1)
    assert all(part[0].mixes is not None for part in (wide, square))
    flat = [one_view(7), one_view(8)]
    several = [documents.picture(v, PATCH, (*range(9), -1)) for v in flat]
    film = [documents.random_view(SIDE, SIDE, 30 + i) for i in range(3)]
    rows = [
        [words(3, 0), wide, words(4, 1)],
        [words(2, 5), documents.clip(film, PATCH), words(3, 6)],
        [several[0], words(2, 2), several[1], words(1, 3)],
        [square, words(2, 7)],
        [words(6, 4)],
    ]
    given = documents.given(rows, PATCH**2 * 3, interleave.Config(position="sequential", mixes=True))
    order, counts = [views[0], *flat, views[1]], [1, 2, 1]

    def call(m: torch.nn.Module) -> torch.Tensor:
        pictures = {"pixel_values": stacked(order, HALF, m), "batch_num_images": torch.tensor(counts)}
        pictures["image_sizes"] = torch.tensor([sizes[0], (SIDE, SIDE), (SIDE, SIDE), sizes[1]])
        pictures["pixel_values_videos"] = tensor(film, HALF, m)[None]
        return m(**inputs(given), **pictures, use_cache=False).logits

    documents.compare(c, twin, given, call)
