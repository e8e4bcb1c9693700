"""Kosmos-2 (Peng et al. 2023): CLIP's tower, latent queries of one attention, a decoder of MAGNETO's blocks."""

from dataclasses import replace

from mmjax.connectors import perceiver
from mmjax.convert import raw
from mmjax.convert.families import blocks, clip
from mmjax.convert.families.clip import prefixed
from mmjax.convert.families.decoder import tie
from mmjax.convert.found import Found
from mmjax.convert.rules import Rule
from mmjax.core.errors import InputError
from mmjax.models import decoder, vlm
from mmjax.nn import transformer

# What is there where config.json leaves it out (transformers 5.23).
VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
VISION |= {"image_size": 224, "patch_size": 14}
SAME = {"hidden_size": "embed_dim", "num_hidden_layers": "layers", "num_attention_heads": "attention_heads"}
NAMES = blocks.Names(
    attention_norm="self_attn_layer_norm",
    mlp_norm="final_layer_norm",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    out="self_attn.out_proj",
    up="ffn.fc1",
    down="ffn.fc2",
    attention_inner_norm="self_attn.inner_attn_ln",
    mlp_inner_norm="ffn.ffn_layernorm",
)
TEXT, HEAD = "text_model.model.", "text_model.lm_head.weight"
DROPPED = {r".*\.embed_positions\.weights": "a buffer: sines and cosines"}


def read(config: dict, keys: frozenset[str]) -> Found:
    """A directory of Kosmos2ForConditionalGeneration."""
    text = {SAME.get(k, k): v for k, v in raw.part(config, "text_config", {}).items()}
    tower = clip.configure_vision(VISION | raw.part(config, "vision_config", {}), None)
    vision = replace(tower, final_norm=True, head=None)  # of every token, whatever it is called

    def found(tied: bool) -> Found:
        own = configure(text, tied)
        latents = raw.size(config, "latent_query_num", 64)
        cfg = vlm.Config(vision, connector(latents, vision.blocks.width, own.blocks), own, scaled=True)
        at = "vision_model.model."
        table = prefixed("vision", clip.vision_rules(vision, at, "") + blocks.norm("norm", f"{at}post_layernorm"))
        table += prefixed("connector", connector_rules("image_to_text_projection."))
        table += prefixed("decoder", rules(own))
        return Found(vlm, cfg, tuple(table), DROPPED | clip.DROPPED)

    tied = any(raw.flag(of, "tie_word_embeddings", True) for of in (config, text))
    return tie(found, tied, keys, f"{TEXT}embed_tokens.weight", HEAD)


def configure(config: dict, tied: bool) -> decoder.Config:
    """The decoder that the config of the text model describes.

    Raises:
      InputError: it says something that we do not compute.
    """
    raw.refuse(config, "add_cross_attention", False)
    raw.refuse(config, "quantization_config")
    pad = config.get("pad_token_id", 1)
    if isinstance(pad, bool) or not isinstance(pad, int) or not 0 <= pad < 2**31:
        raise InputError(f"config.json says 'pad_token_id' is {str(pad)[:100]!r}; positions count from behind it.")
    width, heads = raw.size(config, "embed_dim", 2048), raw.size(config, "attention_heads", 32)
    of = transformer.Config(
        width=width,
        layers=raw.size(config, "layers", 24),
        heads=heads,
        kv_heads=heads,
        head=raw.heads(width, heads),
        hidden=raw.size(config, "ffn_dim", 8192),
        activation=raw.activation(config, "activation_function", "gelu"),
        gated=False,
        bias=True,
        norm_kind="layer",
        epsilon=raw.number(config, "layer_norm_eps", 1e-5),
        inner_norm=True,
    )
    return decoder.Config(
        raw.size(config, "vocab_size", 65037),
        of,
        tied,
        embed_scale=width**0.5 if raw.flag(config, "scale_embedding", True) else 1.0,
        positions=decoder.Positions(None, pad + 1),
    )


def connector(latents: int, inputs: int, text: transformer.Config) -> perceiver.Config:
    """Latents that look once at features of length one, and at each other."""
    return perceiver.Config(
        inputs=inputs,
        width=text.width,
        latents=latents,
        layers=1,
        heads=text.heads,
        head=text.head,
        hidden=0,
        norm_kind="none",
        residual=False,
        bias=True,
        unit=True,
        prefix=True,
        dense=True,
    )


def connector_rules(prefix: str) -> list[Rule]:
    out = [Rule("latents", f"{prefix}latent_query"), *blocks.dense("projection", f"{prefix}dense")]
    for name in ("q", "k", "v", "out"):
        attention = blocks.dense(f"layers/{name}", f"{prefix}{{}}.{name}_proj", True, 2 if name == "out" else 1)
        out += [replace(rule, layers=("x_attn",)) for rule in attention]
    return out


def rules(cfg: decoder.Config) -> list[Rule]:
    out = [Rule("embed", f"{TEXT}embed_tokens.weight")]
    out += blocks.blocks(cfg.blocks, "blocks", f"{TEXT}layers.{{}}.", NAMES)
    out += blocks.norm("norm", f"{TEXT}layer_norm")
    return out if cfg.tied else [*out, Rule("head", HEAD)]
