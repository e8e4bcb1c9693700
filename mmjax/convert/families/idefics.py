"""Idefics (Laurençon et al. 2023, OBELICS, section 4: an open Flamingo): a CLIP tower whose class token is looked at
too, a Perceiver resampler, and a Llama with gated cross-attention between its blocks."""

import re
from dataclasses import replace

from mmjax.convert import raw
from mmjax.convert.families import blocks, clip, decoder, perceiver
from mmjax.convert.families.clip import prefixed
from mmjax.convert.found import Found
from mmjax.convert.rules import Rule, ones, same
from mmjax.encoders import vit
from mmjax.models import decoder as decoders
from mmjax.models import vlm
from mmjax.nn import cross_attention

VISION = {  # what transformers 5.23 takes where config.json is silent
    "embed_dim": 768,
    "hidden_act": "gelu",
    "image_size": 224,
    "intermediate_size": 5120,
    "num_attention_heads": 16,
    "num_hidden_layers": 32,
    "patch_size": 14,
}
TEXT = (
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
)
TABLE, HEAD = ("weight", "additional_embedding.weight"), ("weight", "additional_fc.weight")
AT, CROSS = "model.vision_model.", "model.gated_cross_attn_layers.{}."


def read(config: dict, keys: frozenset[str]) -> Found:
    """A directory of IdeficsForVisionText2Text.

    Its token table and its head are two tensors each, for the tokens of Llama and those that were added: one of ours.
    What is frozen while it is trained (`freeze_…`) and how gates start (`alpha_initializer`) changes nothing here.
    """
    rows = raw.size(config, "vocab_size", 32_000), added(config)
    text = {key: config[key] for key in TEXT if key in config} | {"model_type": "llama", "vocab_size": sum(rows)}
    tower = configure_vision(raw.part(config, "vision_config", {}))
    resampler = replace(perceiver.idefics_config(config), prefix=True)

    def found(tied: bool) -> Found:
        own = decoder.configure(text, tied)
        own = replace(own, cross=cross(config, own, resampler.width))
        table = prefixed("vision", clip.vision_rules(tower, AT, ""))
        table += prefixed("connector", perceiver.idefics(resampler))
        table += prefixed("decoder", [*language_rules(own, rows), *cross_rules(own.cross)])
        rest = {rf"{re.escape(AT)}post_layernorm\..*": "of pooled features, which are not used"}
        return Found(vlm, vlm.Config(tower, resampler, own), tuple(table), decoder.DROPPED | clip.DROPPED, rest)

    if not raw.flag(config, "tie_word_embeddings", False):
        return found(False)
    pairs = {f"lm_head.{head}": f"model.embed_tokens.{own}" for head, own in zip(HEAD, TABLE, strict=True)}
    copies = {head: own for head, own in pairs.items() if {head, own} <= keys}
    why = {re.escape(head): "a copy of the token table" for head in copies}
    one = found(True)
    return replace(one, dropped={**one.dropped, **why}, copies=copies, otherwise=found(False) if copies else None)


def added(config: dict) -> int:
    """How many tokens were added to Llama's."""
    value = config.get("additional_vocab_size", 0)
    return 0 if value == 0 and not isinstance(value, bool) else raw.size(config, "additional_vocab_size")


def configure_vision(config: dict) -> vit.Config:
    """CLIP's tower (Idefics calls its width `embed_dim`), its last block's features without a final norm."""
    given = VISION | config
    width = config.get("embed_dim", config.get("hidden_size", VISION["embed_dim"]))
    return replace(clip.configure_vision(given | {"hidden_size": width}, None), head=None)


def cross(config: dict, text: decoders.Config, media: int) -> cross_attention.Config:
    """The layers between the blocks."""
    raw.refuse(config, "alpha_type", "float", "vector")
    of = text.blocks
    return cross_attention.Config(
        width=of.width,
        media=media,
        heads=of.heads,
        head=of.head,
        hidden=of.hidden,
        every=raw.size(config, "cross_layer_interval", 1),
        epsilon=of.epsilon,
        activation=of.activation,
        gated=True,
        norm_kind="rms",
        qk_norm=raw.flag(config, "qk_layer_norms", False),
        gate="vector" if config.get("alpha_type", "float") == "vector" else "scalar",
    )


def language_rules(cfg: decoders.Config, rows: tuple[int, int]) -> list[Rule]:
    """Llama's tensors; the two tables in two pieces, of so many rows each."""
    out = decoder.rules(cfg, "model.", decoder.HEAD)
    if not rows[1]:
        return out
    cut = {"embed": Rule("embed", "model.embed_tokens.{}", layers=TABLE, rows=rows)}
    cut["head"] = Rule("head", "lm_head.{}", layers=HEAD, rows=rows)
    return [cut.get(rule.ours, rule) for rule in out]


def cross_rules(cfg: cross_attention.Config) -> list[Rule]:
    gate = ones(2) if cfg.gate == "vector" else same
    out = [
        *blocks.norm("cross/attention_norm", f"{CROSS}input_layernorm", "rms"),
        *blocks.norm("cross/mlp_norm", f"{CROSS}post_attention_layernorm", "rms"),
        Rule("cross/attention_gate", f"{CROSS}alpha_cross_attn", gate),
        Rule("cross/mlp_gate", f"{CROSS}alpha_dense", gate),
        *blocks.dense("cross/out", f"{CROSS}cross_attn.o_proj", False, 2),
    ]
    for name in ("q", "k", "v"):
        out += blocks.dense(f"cross/{name}", f"{CROSS}cross_attn.{name}_proj", False)
    for name in ("gate", "up", "down"):
        out += blocks.dense(f"cross/mlp/{name}", f"{CROSS}mlp.{name}_proj", False)
    for name in ("q", "k") if cfg.qk_norm else ():
        out += blocks.norm(f"cross/{name}_norm", f"{CROSS}cross_attn.{name}_layer_norm", "rms")
    return out
