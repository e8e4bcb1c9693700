"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: the tower with its merger, DeepStack, and a decoder with M-RoPE."""

import re
from dataclasses import replace

from mmjax.convert import raw
from mmjax.convert.families import decoder, qwen_vision
from mmjax.convert.families.clip import prefixed
from mmjax.convert.found import Found
from mmjax.models import vlm

# Where pictures and videos go (transformers 5.23).
PLACEHOLDERS = {"image_token_id": 151_655, "video_token_id": 151_656}


def read(config: dict, keys: frozenset[str]) -> Found:
    """A directory of Qwen2VLForConditionalGeneration, Qwen2_5_VLFor… or Qwen3VLFor…

    Files of the first two name their tensors `visual.…` and `model.layers.…`; those of Qwen3-VL, and what transformers
    5 has in memory, `model.visual.…` and `model.language_model.layers.…`.
    """
    number = qwen_vision.version(config)
    nested = any(k.startswith("model.language_model.") for k in keys) or (number == 3 and not keys)
    visual, text_at, head = "visual.", "model.", "lm_head.weight"
    if nested:
        visual, text_at = "model.visual.", "model.language_model."
    seen = raw.part(config, "vision_config", {})
    tower = qwen_vision.configure(seen | {"model_type": f"{config['model_type']}_vision"})
    text = text_config(config)

    def found(tied: bool) -> Found:
        cfg = vlm.Config(
            tower.vision,
            tower.merger,
            decoder.configure(text, tied),
            placeholder=tuple(raw.size(config, key, default) for key, default in PLACEHOLDERS.items()),
            deepstack=tower.deepstack,
            deep=tower.deep,
        )
        table = [
            replace(r, ours=re.sub("^merger/", "connector/", r.ours)) for r in qwen_vision.rules(tower, visual, number)
        ]
        table += prefixed("decoder", decoder.rules(cfg.decoder, text_at, head, keys))
        return Found(vlm, cfg, tuple(table), decoder.DROPPED)

    tied = decoder.tied(config, text, keys, head, nested=number < 3)
    return decoder.tie(found, tied, keys, f"{text_at}embed_tokens.weight", head)


def text_config(config: dict) -> dict:
    """The config of the text model: nested, or, in hub files of Qwen2-VL and Qwen2.5-VL, config.json itself."""
    given = config.get("text_config")
    text = config if given is None else raw.part(config, "text_config")
    return text | {"model_type": f"{config['model_type']}_text"}
