"""LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision: CLIP's or SigLIP's tower, a projector, any text decoder."""

import re
from collections.abc import Callable
from dataclasses import replace

from mmjax.connectors import mlp
from mmjax.convert import raw
from mmjax.convert.families import clip, connectors, decoder, siglip
from mmjax.convert.families.clip import prefixed
from mmjax.convert.found import Found
from mmjax.convert.rules import Rule
from mmjax.core.errors import InputError
from mmjax.encoders import vit
from mmjax.models import vlm

# What is there where config.json leaves a whole part out (transformers 5.23).
VISION = {
    "llava_onevision": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "patch_size": 14,
        "image_size": 384,
        "num_hidden_layers": 26,
        "num_attention_heads": 16,
        "vision_use_head": False,
    },
    "": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "patch_size": 14,
        "image_size": 336,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
}
Tower = tuple[Callable[[dict], vit.Config], Callable[[vit.Config, str], list[Rule]]]
TOWERS: dict[str, Tower] = {
    "clip_vision_model": (
        lambda config: clip.configure_vision(config, None),
        lambda cfg, prefix: clip.vision_rules(cfg, prefix, ""),
    ),
    "siglip_vision_model": (
        lambda config: siglip.configure_vision(config, "siglip"),
        lambda cfg, prefix: siglip.vision_rules(cfg, prefix, "siglip"),
    ),
}


def read(config: dict, keys: frozenset[str]) -> Found:
    """A directory of LlavaForConditionalGeneration, LlavaNextFor… or LlavaOnevisionFor…

    Files name their tensors `language_model.model.…` (hub files, and what transformers 5 writes) or
    `model.language_model.…` (what it has in memory).
    """
    kind = config["model_type"]
    at = "model." if any(k.startswith("model.language_model.") for k in keys) else ""
    text_at, head = ("model.language_model.", "lm_head.weight")
    if not at:
        text_at, head = "language_model.model.", "language_model.lm_head.weight"
    text = text_config(config)
    one = decoder.configure(text, False)  # refuses what it must, before the rest is read
    tower, vision_table, rest = vision(config, keys, f"{at}vision_tower.")
    projector = mlp.Config(
        tower.blocks.width,
        one.blocks.width,
        activation=raw.activation(config, "projector_hidden_act", "gelu"),
        bias=raw.flag(config, "multimodal_projector_bias", True),
    )

    def found(tied: bool) -> Found:
        cfg = vlm.Config(
            tower,
            projector,
            decoder.configure(text, tied),
            placeholder=placeholders(config),
            newline=kind != "llava",
        )
        table = prefixed("vision", vision_table)
        table += prefixed("connector", connectors.llava(projector, f"{at}multi_modal_projector."))
        table += prefixed("decoder", decoder.rules(cfg.decoder, text_at, head, keys))
        if cfg.newline:
            table.append(Rule("newline", f"{at}image_newline"))
        return Found(vlm, cfg, tuple(table), decoder.DROPPED | clip.DROPPED, rest)

    tied = decoder.tied(config, text, keys, head, nested=kind != "llava_next")
    return decoder.tie(found, tied, keys, f"{text_at}embed_tokens.weight", head)


def text_config(config: dict) -> dict:
    """The config of the text model; left out, it is Llama's, or Qwen2's for OneVision."""
    kind = "qwen2" if config["model_type"] == "llava_onevision" else "llama"
    return {"model_type": kind} | raw.part(config, "text_config", {})


def placeholders(config: dict) -> int | tuple[int, int]:
    """The id where pictures go, and in OneVision the one of videos: `…_token_index`, or in some files `…_token_id`."""

    def one(name: str, default: int) -> int:
        key = f"{name}_token_index" if f"{name}_token_index" in config else f"{name}_token_id"
        return raw.size(config, key, default)

    if config["model_type"] == "llava_onevision":
        return one("image", 151_646), one("video", 151_647)
    return one("image", 32_000)


def vision(config: dict, keys: frozenset[str], prefix: str) -> tuple[vit.Config, list[Rule], dict[str, str]]:
    """The tower as far as its features are used, its table, and which of its tensors are not.

    `vision_feature_layer` n of transformers is what block n - 1 puts out, without a final norm; from the end, -1 is the
    last block.

    Raises:
      InputError: a tower that we do not have, or features of it that we do not compute.
    """
    kind = config["model_type"]
    given = raw.part(config, "vision_config", VISION.get(kind, VISION[""]))
    which = given.get("model_type", VISION.get(kind, VISION[""])["model_type"])
    if which not in TOWERS:
        raise InputError(
            f"config.json says the vision tower's model_type is {str(which)[:100]!r}; mmjax.convert has "
            f"{', '.join(TOWERS)} for {kind}."
        )
    configure, rules = TOWERS[which]
    whole = configure(given)
    layers, layer = whole.blocks.layers, config.get("vision_feature_layer", -1 if kind == "llava_onevision" else -2)
    if isinstance(layer, list) and len(layer) == 1:
        layer = layer[0]
    if isinstance(layer, bool) or not isinstance(layer, int) or not -layers <= layer <= layers or layer == 0:
        raise InputError(
            f"config.json says 'vision_feature_layer' is {str(layer)[:100]}; mmjax has the features of one block, 1 to "
            f"{layers}, or -1 to -{layers}."
        )
    used = layer if layer > 0 else layers + 1 + layer
    raw.refuse(
        {"vision_feature_select_strategy": "full" if kind == "llava_onevision" else "default"} | config,
        "vision_feature_select_strategy",
        "default" if whole.classes else "full",
    )
    cfg = replace(whole, blocks=replace(whole.blocks, layers=used), final_norm=False, head=None)
    inner = "vision_model." if any(k.startswith(f"{prefix}vision_model.") for k in keys) or not keys else ""
    at, why = re.escape(prefix + inner), "behind the features that are used"
    numbers = "|".join(map(str, range(used, layers)))
    rest = {rf"{at}(post_layernorm|head)\..*": why}
    return cfg, rules(cfg, prefix + inner), rest | ({rf"{at}encoder\.layers\.({numbers})\..*": why} if numbers else {})
