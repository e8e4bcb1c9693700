"""Pixtral's vision tower, also Mistral 3's."""

from mmjax.convert import raw
from mmjax.convert.families import blocks
from mmjax.convert.found import Found
from mmjax.convert.rules import Rule, patches
from mmjax.core.errors import InputError
from mmjax.encoders import vit
from mmjax.nn import patch_embed, rope, transformer

NAMES = blocks.Names(
    attention_norm="attention_norm",
    mlp_norm="ffn_norm",
    q="attention.q_proj",
    k="attention.k_proj",
    v="attention.v_proj",
    out="attention.o_proj",
    gate="feed_forward.gate_proj",
    up="feed_forward.up_proj",
    down="feed_forward.down_proj",
)


def read(config: dict, keys: frozenset[str]) -> Found:
    """A directory of PixtralVisionModel."""
    cfg = configure(config)
    return Found(vit, cfg, tuple(rules(cfg, "")))


def theta(config: dict, default: float = 10_000.0) -> float:
    """The base of the rotary frequencies, where version 5 of transformers writes it or where hub files have it.

    Raises:
      InputError: the frequencies are scaled in a way that no vision tower's are.
    """
    given = config.get("rope_parameters") or {}
    kind = given.get("rope_type", "default")
    if kind not in ("default", "axial"):
        raise InputError(f"config.json says the vision tower's rope_type is {kind!r}; mmjax has 'axial' and 'default'.")
    return float(given.get("rope_theta", config.get("rope_theta", default)))


def configure(config: dict) -> vit.Config:
    width, heads = raw.size(config, "hidden_size", 1024), raw.size(config, "num_attention_heads", 16)
    head = config.get("head_dim") or raw.heads(width, heads)
    if head % 4:
        raise InputError(
            f"config.json gives heads of {head} values; rotary positions of two axes need a multiple of 4."
        )
    tower = transformer.Config(
        width=width,
        layers=raw.size(config, "num_hidden_layers", 24),
        heads=heads,
        kv_heads=heads,
        head=head,
        hidden=raw.size(config, "intermediate_size", 4096),
        activation=raw.activation(config),
        epsilon=1e-5,
        rope=rope.Config(head, (head // 4, head // 4), theta(config), "alternating"),
    )
    embed = patch_embed.Config(
        raw.square(config, "patch_size", 16), width, raw.size(config, "num_channels", 3), *raw.OPENAI, bias=False
    )
    return vit.Config(embed, tower, pre_norm=True, final_norm=False)


def rules(cfg: vit.Config, prefix: str) -> list[Rule]:
    out = [Rule("embed/kernel", f"{prefix}patch_conv.weight", patches(cfg.embed.patch, cfg.embed.channels))]
    out += blocks.norm("pre_norm", f"{prefix}ln_pre", "rms")
    return out + blocks.blocks(cfg.blocks, "blocks", f"{prefix}transformer.layers.{{}}.", NAMES)
