"""CLIP: both towers, or one, with or without projection."""

import dataclasses

from mmjax.convert import raw
from mmjax.convert.families import blocks
from mmjax.convert.found import Found
from mmjax.convert.rules import Rule, linear, patches, scalar, vector
from mmjax.encoders import head, text, vit
from mmjax.models import dual
from mmjax.nn import norm, patch_embed, transformer

DROPPED = {r".*embeddings\.position_ids": "a buffer: 0, 1, 2 …"}


def read(config: dict, keys: frozenset[str]) -> Found:
    """A directory of CLIPModel, or of one tower with or without projection."""
    kind = config["model_type"]
    if kind == "clip":
        width = raw.size(config, "projection_dim", 512)
        vision = configure_vision(raw.get(config, "vision_config"), width)
        words = configure_text(raw.get(config, "text_config"), width)
        table = prefixed("vision", vision_rules(vision, "vision_model.", "visual_projection"))
        table += prefixed("text", text_rules(words, "text_model.", "text_projection"))
        table.append(Rule("scale", "logit_scale", scalar))
        return Found(dual, dual.Config(vision, words), tuple(table), DROPPED)
    which = "vision" if kind == "clip_vision_model" else "text"
    prefix = f"{which}_model." if any(k.startswith(f"{which}_model.") for k in keys) else ""
    project = "visual_projection" if which == "vision" else "text_projection"
    width = raw.size(config, "projection_dim", 512) if f"{project}.weight" in keys else None
    if which == "vision":
        cfg = configure_vision(config, width)
        return Found(vit, cfg, tuple(vision_rules(cfg, prefix, project)), DROPPED)
    cfg = configure_text(config, width)
    return Found(text, cfg, tuple(text_rules(cfg, prefix, project)), DROPPED)


def prefixed(name: str, rules: list[Rule]) -> list[Rule]:
    """The same rules for a part of our tree."""
    return [dataclasses.replace(r, ours=f"{name}/{r.ours}") for r in rules]


def tower(config: dict, width: int, hidden: int, layers: int, heads: int, act: str, eps: float) -> transformer.Config:
    """CLIP's and SigLIP's blocks; the arguments are the family's own defaults."""
    width, heads = raw.size(config, "hidden_size", width), raw.size(config, "num_attention_heads", heads)
    return transformer.Config(
        width=width,
        layers=raw.size(config, "num_hidden_layers", layers),
        heads=heads,
        kv_heads=heads,
        head=raw.heads(width, heads),
        hidden=raw.size(config, "intermediate_size", hidden),
        activation=raw.activation(config, "hidden_act", act),
        gated=False,
        bias=True,
        norm_kind="layer",
        epsilon=raw.number(config, "layer_norm_eps", eps),
    )


def configure_vision(config: dict, outputs: int | None) -> vit.Config:
    patch, image = raw.square(config, "patch_size", 32), raw.square(config, "image_size", 224)
    of = tower(config, 768, 3072, 12, 12, "quick_gelu", 1e-5)
    pooled = norm.Config(of.width, "layer", of.epsilon)
    return vit.Config(
        embed=patch_embed.Config(patch, of.width, raw.size(config, "num_channels", 3), *raw.OPENAI, bias=False),
        blocks=of,
        table=vit.Table(image // patch, image // patch),
        classes=1,
        pre_norm=True,
        final_norm=False,
        head=head.Config(of.width, "class", norm=pooled, outputs=outputs, bias=False),
    )


def vision_rules(cfg: vit.Config, prefix: str, project: str) -> list[Rule]:
    at = f"{prefix}embeddings."
    out = [
        Rule("embed/kernel", f"{at}patch_embedding.weight", patches(cfg.embed.patch, cfg.embed.channels)),
        Rule("class", f"{at}class_embedding", vector),
        Rule("class_position", f"{at}position_embedding.weight", blocks.table(), join=0),
        Rule("table", f"{at}position_embedding.weight", blocks.table(), join=0),
    ]
    out += blocks.norm("pre_norm", f"{prefix}pre_layrnorm")  # so spelt in every file
    out += blocks.blocks(cfg.blocks, "blocks", f"{prefix}encoder.layers.{{}}.", blocks.CLIP)
    if cfg.head is None:
        return out
    out += blocks.norm("head/norm", f"{prefix}post_layernorm")
    if cfg.head.outputs is not None:
        out.append(Rule("head/project/kernel", f"{project}.weight", linear()))
    return out


def configure_text(config: dict, outputs: int | None) -> text.Config:
    vocab, positions = raw.size(config, "vocab_size", 49408), raw.size(config, "max_position_embeddings", 77)
    return text.Config(vocab, positions, tower(config, 512, 2048, 12, 8, "quick_gelu", 1e-5), outputs)


def text_rules(cfg: text.Config, prefix: str, project: str) -> list[Rule]:
    out = [
        Rule("embed", f"{prefix}embeddings.token_embedding.weight"),
        Rule("position", f"{prefix}embeddings.position_embedding.weight"),
    ]
    out += blocks.blocks(cfg.blocks, "blocks", f"{prefix}encoder.layers.{{}}.", blocks.CLIP)
    out += blocks.norm("norm", f"{prefix}final_layer_norm")
    return out if cfg.outputs is None else out + blocks.dense("project", project, cfg.bias)
