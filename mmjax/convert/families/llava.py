"""LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision, InternVL and Mistral 3 (and Pixtral-12B, which is a LLaVA).

A vision tower as far as its features are used, a connector, any text decoder.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from mmjax.connectors import Connector, merger, mlp, pixel_shuffle
from mmjax.convert import raw
from mmjax.convert.families import clip, connectors, decoder, internvl, pixtral, siglip
from mmjax.convert.families.clip import prefixed
from mmjax.convert.found import Found
from mmjax.convert.rules import Rule
from mmjax.core.errors import InputError
from mmjax.encoders import vit
from mmjax.models import vlm
from mmjax.models.decoder import Config as Language


@dataclass(frozen=True)
class Tower:
    """A vision tower inside of another model.

    configure: all of it, from its own config. rules: the table of a config, under a prefix.
    layers: what its blocks are called. behind: a regular expression of the tensors behind the last one.
    inner: whether hub files have a name of the whole tower in between (`vision_model.`).
    normed: whether the feature layer -1 is what its final norm makes, and not what the last block does.
    """

    configure: Callable[[dict], vit.Config]
    rules: Callable[[vit.Config, str], list[Rule]]
    layers: str = "encoder.layers"
    behind: str = r"(post_layernorm|head)\..*"
    inner: bool = True
    normed: bool = False


TOWERS = {
    "clip_vision_model": Tower(
        lambda config: clip.configure_vision(config, None),
        lambda cfg, prefix: clip.vision_rules(cfg, prefix, ""),
    ),
    "siglip_vision_model": Tower(
        lambda config: siglip.configure_vision(config, "siglip"),
        lambda cfg, prefix: siglip.vision_rules(cfg, prefix, "siglip"),
    ),
    "pixtral": Tower(pixtral.configure, pixtral.rules, "transformer.layers", "", False),
    "internvl_vision": Tower(internvl.configure, internvl.rules, "encoder.layer", r"layernorm\..*", False, True),
}


@dataclass(frozen=True)
class Family:
    """What transformers 5.23 takes where config.json is silent, and what is always so in a family.

    vision, text: where the whole part is left out; of a part that is there, its model_type alone.
    towers: those it may have; the first where no model_type says it.
    layer, full: `vision_feature_layer`, and whether `vision_feature_select_strategy` is "full".
    connector: from the config, the tower and the decoder, and its table under a prefix.
    placeholders: what config.json calls the ids where media tokens go, and their defaults.
    tied: whether the head is the token table. nested: whether the text model's config is asked too.
    newline: whether rows of a picture's tokens end with a vector of the model's own.
    """

    towers: tuple[str, ...]
    vision: Mapping[str, object]
    text: Mapping[str, object]
    connector: Callable[[dict, vit.Config, Language], Connector]
    rules: Callable[[Connector, str], list[Rule]]
    layer: int = -2
    full: bool = False
    placeholders: Mapping[str, int] = field(default_factory=lambda: {"image": 32_000})
    tied: bool = False
    nested: bool = True
    newline: bool = False


def _mlp(config: dict, tower: vit.Config, text: Language) -> mlp.Config:
    return mlp.Config(
        tower.blocks.width,
        text.blocks.width,
        activation=raw.activation(config, "projector_hidden_act", "gelu"),
        bias=raw.flag(config, "multimodal_projector_bias", True),
    )


def _shuffle(config: dict, tower: vit.Config, text: Language) -> pixel_shuffle.Config:
    ratio = raw.number(config, "downsample_ratio", 0.5)
    side = int(1 / ratio)
    if side * ratio != 1:
        raise InputError(f"config.json says 'downsample_ratio' is {ratio:g}; one over it must be a whole number.")
    act = raw.activation(config, "projector_hidden_act", "gelu")
    return pixel_shuffle.Config(tower.blocks.width, text.blocks.width, side, activation=act)


def _merger(config: dict, tower: vit.Config, text: Language) -> merger.Config:
    return merger.Config(
        tower.blocks.width,
        text.blocks.width,
        raw.size(config, "spatial_merge_size", 2),
        text.blocks.width,
        "rms",
        channels="channel",
        reduce=True,
        activation=raw.activation(config, "projector_hidden_act", "gelu"),
        bias=raw.flag(config, "multimodal_projector_bias", False),
        epsilon=text.blocks.epsilon,
    )


_LLAVA = Family(
    ("clip_vision_model", "siglip_vision_model", "pixtral"),
    {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "patch_size": 14,
        "image_size": 336,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
    {"model_type": "llama"},
    _mlp,
    connectors.llava,
)
FAMILIES = {
    "llava": _LLAVA,
    "llava_next": replace(_LLAVA, towers=_LLAVA.towers[:2], nested=False, newline=True),
    "llava_onevision": Family(
        ("siglip_vision_model", "clip_vision_model"),
        {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "patch_size": 14,
            "image_size": 384,
            "num_hidden_layers": 26,
            "num_attention_heads": 16,
            "vision_use_head": False,
        },
        {"model_type": "qwen2"},
        _mlp,
        connectors.llava,
        -1,
        True,
        {"image": 151_646, "video": 151_647},
        newline=True,
    ),
    "internvl": Family(
        ("internvl_vision",),
        {},
        {"model_type": "qwen2"},
        _shuffle,
        connectors.internvl,
        -1,
        placeholders={"image": 151_667},
        tied=True,
        nested=False,
    ),
    "mistral3": Family(
        ("pixtral",),
        {"patch_size": 14, "image_size": 1540},
        {
            "model_type": "mistral",
            "head_dim": 128,
            "hidden_size": 5120,
            "intermediate_size": 32768,
            "num_hidden_layers": 40,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e9,
            "sliding_window": None,
            "vocab_size": 131_072,
        },
        _merger,
        connectors.mistral3,
        -1,
        placeholders={"image": 10},
        tied=True,
        nested=False,
    ),
}


def read(config: dict, keys: frozenset[str]) -> Found:
    """A directory of LlavaForConditionalGeneration, LlavaNextFor…, LlavaOnevisionFor…, InternVLFor… or Mistral3For…

    Files name their tensors `language_model.model.…` (hub files, and what transformers 5 writes) or
    `model.language_model.…` (what it has in memory).
    """
    family = FAMILIES[config["model_type"]]
    at = "model." if any(k.startswith("model.language_model.") for k in keys) else ""
    text_at, head = ("model.language_model.", "lm_head.weight")
    if not at:
        text_at, head = "language_model.model.", "language_model.lm_head.weight"
    text = text_config(config)
    one = decoder.configure(text, False)  # refuses what it must, before the rest is read
    tower, vision_table, rest = vision(config, keys, f"{at}vision_tower.")
    projector = family.connector(config, tower, one)

    def found(tied: bool) -> Found:
        cfg = vlm.Config(
            tower,
            projector,
            decoder.configure(text, tied),
            placeholder=placeholders(config),
            newline=family.newline,
        )
        table = prefixed("vision", vision_table)
        table += prefixed("connector", family.rules(projector, f"{at}multi_modal_projector."))
        table += prefixed("decoder", decoder.rules(cfg.decoder, text_at, head, keys))
        if cfg.newline:
            table.append(Rule("newline", f"{at}image_newline"))
        return Found(vlm, cfg, tuple(table), decoder.DROPPED | clip.DROPPED, rest)

    tied = decoder.tied(config, text, keys, head, family.nested, family.tied)
    return decoder.tie(found, tied, keys, f"{text_at}embed_tokens.weight", head)


def text_config(config: dict) -> dict:
    """The config of the text model; left out, the family's own."""
    own = FAMILIES[config["model_type"]].text
    if config.get("text_config") is None:
        return dict(own)
    return {"model_type": own["model_type"]} | raw.part(config, "text_config")


def placeholders(config: dict) -> int | tuple[int, ...]:
    """The id where pictures go, and in OneVision the one of videos: `…_token_index`, or in some files `…_token_id`."""

    def one(name: str, default: int) -> int:
        key = f"{name}_token_index" if f"{name}_token_index" in config else f"{name}_token_id"
        return raw.size(config, key, default)

    ids = tuple(one(name, default) for name, default in FAMILIES[config["model_type"]].placeholders.items())
    return ids if len(ids) > 1 else ids[0]


def vision(config: dict, keys: frozenset[str], prefix: str) -> tuple[vit.Config, list[Rule], dict[str, str]]:
    """The tower as far as its features are used, its table, and which of its tensors are not.

    `vision_feature_layer` n of transformers is what block n - 1 puts out, without a final norm; from the end, -1 is the
    last block.

    Raises:
      InputError: a tower that we do not have, or features of it that we do not compute.
    """
    family = FAMILIES[config["model_type"]]
    given = raw.part(config, "vision_config", dict(family.vision))
    which = given.get("model_type", family.towers[0])
    if which not in family.towers:
        raise InputError(
            f"config.json says the vision tower's model_type is {str(which)[:100]!r}; mmjax.convert has "
            f"{', '.join(family.towers)} for {config['model_type']}."
        )
    tower = TOWERS[which]
    whole = tower.configure(given)
    layers, layer = whole.blocks.layers, config.get("vision_feature_layer", family.layer)
    if isinstance(layer, list) and len(layer) == 1:
        layer = layer[0]
    if isinstance(layer, bool) or not isinstance(layer, int) or not -layers <= layer <= layers or layer == 0:
        raise InputError(
            f"config.json says 'vision_feature_layer' is {str(layer)[:100]}; mmjax has the features of one block, 1 to "
            f"{layers}, or -1 to -{layers}."
        )
    used = layer if layer > 0 else layers + 1 + layer
    if config["model_type"] != "mistral3":
        raw.refuse(
            {"vision_feature_select_strategy": "full" if family.full else "default"} | config,
            "vision_feature_select_strategy",
            "default" if whole.classes else "full",
        )
    normed = tower.normed and layer == -1 and whole.final_norm
    cfg = replace(whole, blocks=replace(whole.blocks, layers=used), final_norm=normed, head=None)
    inner = "vision_model." if any(k.startswith(f"{prefix}vision_model.") for k in keys) or not keys else ""
    inner = inner if tower.inner else ""
    at, why = re.escape(prefix + inner), "behind the features that are used"
    numbers = "|".join(map(str, range(used, layers)))
    rest = {rf"{at}{tower.behind}": why} if tower.behind and not normed else {}
    blocks = rf"{at}{re.escape(tower.layers)}\.({numbers})\..*"
    return cfg, tower.rules(cfg, prefix + inner), rest | ({blocks: why} if numbers else {})
