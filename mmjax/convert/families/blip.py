"""BLIP-2 and InstructBLIP: EVA's tower, a Q-Former, one linear map, and OPT, T5 or a decoder of Llama's kind.

Li et al. 2023 (BLIP-2); Dai et al. 2023 (InstructBLIP), whose Q-Former reads the question beside each picture.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mmjax.convert import raw
from mmjax.convert.families import blocks, decoder, opt, qformer, t5
from mmjax.convert.families.clip import prefixed
from mmjax.convert.found import Found
from mmjax.convert.rules import Rule, ones, patches
from mmjax.core.errors import InputError
from mmjax.encoders import vit
from mmjax.models import decoder as decoders
from mmjax.models import encoder_decoder, vlm
from mmjax.nn import patch_embed, transformer

NAMES = blocks.Names(
    attention_norm="layer_norm1",
    mlp_norm="layer_norm2",
    qkv="self_attn.qkv",
    out="self_attn.projection",
    up="mlp.fc1",
    down="mlp.fc2",
)
AT = "language_model."


@dataclass(frozen=True)
class Language:
    """A family of language models: its readers, whether its head is its token table, and what that is called."""

    configure: Callable[[dict, bool], decoders.Config | encoder_decoder.Config]
    rules: Callable[[Any, frozenset[str]], list[Rule]]
    tied: Callable[[dict, frozenset[str]], bool]
    table: str
    dropped: Mapping[str, str] = field(default_factory=dict)
    copies: Callable[[frozenset[str]], dict[str, str]] = lambda keys: {}


_LLAMA = Language(
    decoder.configure,
    lambda cfg, keys: decoder.rules(cfg, f"{AT}model.", AT + decoder.HEAD, keys),
    lambda text, keys: raw.flag(text, "tie_word_embeddings", decoder.FAMILIES[text["model_type"]].tied),
    decoder.TABLE,
    decoder.DROPPED,
)
LANGUAGES: dict[str, Language] = {
    "opt": Language(
        opt.configure,
        lambda cfg, keys: opt.rules(cfg, f"{AT}model.", AT + opt.HEAD, keys),
        lambda text, keys: opt.tied(text),
        f"model.{opt.TABLE}",
    ),
    "t5": Language(
        t5.configure,
        lambda cfg, keys: t5.rules(cfg, AT, keys),
        t5.tied,
        t5.TABLE,
        t5.DROPPED,
        lambda keys: t5.copies(AT, keys),
    ),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
}


def read(config: dict, keys: frozenset[str]) -> Found:
    """A directory of Blip2ForConditionalGeneration or InstructBlipForConditionalGeneration."""
    instruct = config["model_type"] == "instructblip"
    text = {"model_type": "opt"} | raw.part(config, "text_config", {})
    language = LANGUAGES.get(text["model_type"]) if isinstance(text["model_type"], str) else None
    if language is None:
        raise InputError(
            f"config.json says the text model's model_type is {str(text['model_type'])[:100]!r}; mmjax.convert has "
            f"{', '.join(LANGUAGES)} for {config['model_type']}."
        )
    raw.refuse(raw.part(config, "qformer_config", {}), "use_qformer_text_input", False)
    tower = configure_vision(raw.part(config, "vision_config", {}))
    given = raw.part(config, "qformer_config", {}) | {"encoder_hidden_size": tower.blocks.width}

    def found(tied: bool) -> Found:
        own = language.configure(text, tied)
        connector = qformer.config(
            given, queries=raw.size(config, "num_query_tokens", 32), outputs=own.blocks.width, words=instruct
        )
        connector = replace(connector, prefix=True)
        cfg = vlm.Config(tower, connector, own, placeholder=placeholder(config))
        table = prefixed("vision", vision_rules(cfg.vision, "vision_model."))
        table += prefixed("connector", qformer.rules(connector, family="instructblip" if instruct else "blip_2"))
        table += prefixed("decoder", language.rules(own, keys))
        return Found(vlm, cfg, tuple(table), {**language.dropped, **qformer.DROPPED}, copies=language.copies(keys))

    return decoder.tie(found, language.tied(text, keys), keys, AT + language.table, AT + "lm_head.weight")


def placeholder(config: dict) -> int | None:
    """The id where pictures go; older files have none, and their queries stand before the text."""
    key = "image_token_id" if config.get("image_token_index") is None else "image_token_index"
    value = config.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31):
        raise InputError(f"config.json says {key!r} is {str(value)[:100]!r}, which is no token id.")
    return value


def configure_vision(config: dict) -> vit.Config:
    """Blip2VisionModel and InstructBlipVisionModel: a class token whose features the Q-Former reads as well."""
    width, count = raw.size(config, "hidden_size", 1408), raw.size(config, "num_attention_heads", 16)
    patch, image = raw.square(config, "patch_size", 14), raw.square(config, "image_size", 224)
    of = transformer.Config(
        width=width,
        layers=raw.size(config, "num_hidden_layers", 39),
        heads=count,
        kv_heads=count,
        head=raw.heads(width, count),
        hidden=raw.size(config, "intermediate_size", 6144),
        activation=raw.activation(config),
        gated=False,
        bias=True,
        qkv_bias=None if raw.flag(config, "qkv_bias", True) else False,
        norm_kind="layer",
        epsilon=raw.number(config, "layer_norm_eps", 1e-6),
    )
    return vit.Config(
        embed=patch_embed.Config(patch, width, 3, *raw.OPENAI),
        blocks=of,
        table=vit.Table(image // patch, image // patch),
        classes=1,
    )


def vision_rules(cfg: vit.Config, prefix: str) -> list[Rule]:
    at = f"{prefix}embeddings."
    return [
        Rule("embed/kernel", f"{at}patch_embedding.weight", patches(cfg.embed.patch, cfg.embed.channels)),
        Rule("embed/bias", f"{at}patch_embedding.bias"),
        Rule("class", f"{at}class_embedding", ones(1)),
        Rule("class_position", f"{at}position_embedding", blocks.table(1), join=1),
        Rule("table", f"{at}position_embedding", blocks.table(1), join=1),
        *blocks.blocks(cfg.blocks, "blocks", f"{prefix}encoder.layers.{{}}.", NAMES),
        *blocks.norm("norm", f"{prefix}post_layernorm"),
    ]
