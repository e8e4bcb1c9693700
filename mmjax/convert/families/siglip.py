"""SigLIP, and SigLIP 2's NaFlex: both towers, or one. (SigLIP 2 at a fixed resolution is SigLIP.)"""

from mmjax.convert import raw
from mmjax.convert.families import blocks
from mmjax.convert.families.clip import DROPPED, prefixed, text_rules, tower
from mmjax.convert.found import Found
from mmjax.convert.rules import Rule, linear, ones, patches
from mmjax.encoders import head, text, vit
from mmjax.models import dual
from mmjax.nn import attention_pool, patch_embed


def read(config: dict, keys: frozenset[str]) -> Found:
    """A directory of SiglipModel, Siglip2Model, or of one tower."""
    kind = config["model_type"]
    if kind in ("siglip", "siglip2"):
        vision = configure_vision(raw.get(config, "vision_config"), kind)
        words = configure_text(raw.get(config, "text_config"))
        table = prefixed("vision", vision_rules(vision, "vision_model.", kind))
        table += prefixed("text", text_rules(words, "text_model.", "text_model.head"))
        table += [Rule("scale", "logit_scale"), Rule("bias", "logit_bias")]
        return Found(dual, dual.Config(vision, words, bias=True), tuple(table), DROPPED)
    which = "vision" if "vision" in kind else "text"
    prefix = f"{which}_model." if any(k.startswith(f"{which}_model.") for k in keys) else ""
    if which == "vision":
        cfg = configure_vision(config, kind)
        return Found(vit, cfg, tuple(vision_rules(cfg, prefix, kind)), DROPPED)
    cfg = configure_text(config)
    return Found(text, cfg, tuple(text_rules(cfg, prefix, f"{prefix}head")), DROPPED)


def configure_vision(config: dict, kind: str) -> vit.Config:
    of = tower(config, 768, 3072, 12, 12, "gelu_pytorch_tanh", 1e-6)
    patch = raw.square(config, "patch_size", 16)
    if kind.startswith("siglip2"):
        side = raw.side(raw.size(config, "num_patches", 256))
        table = vit.Table(side, side, "bilinear", antialias=True)
    else:
        side = raw.square(config, "image_size", 224) // patch
        table = vit.Table(side, side)
    pool = attention_pool.Config(of.width, of.heads, of.hidden, of.activation, of.epsilon)
    return vit.Config(
        embed=patch_embed.Config(patch, of.width, raw.size(config, "num_channels", 3), *raw.HALF),
        blocks=of,
        table=table,
        head=head.Config(of.width, "attention", attention=pool) if raw.flag(config, "vision_use_head", True) else None,
    )


def vision_rules(cfg: vit.Config, prefix: str, kind: str) -> list[Rule]:
    at = f"{prefix}embeddings."
    # NaFlex gets patches already cut, (row, column, channel) as ours, and has a plain matrix for them.
    embed = linear() if kind.startswith("siglip2") else patches(cfg.embed.patch, cfg.embed.channels)
    out = [
        Rule("embed/kernel", f"{at}patch_embedding.weight", embed),
        Rule("embed/bias", f"{at}patch_embedding.bias"),
        Rule("table", f"{at}position_embedding.weight", blocks.table()),
    ]
    out += blocks.blocks(cfg.blocks, "blocks", f"{prefix}encoder.layers.{{}}.", blocks.CLIP)
    if cfg.final_norm:
        out += blocks.norm("norm", f"{prefix}post_layernorm")
    return out if cfg.head is None else out + _pool_rules("head/attention", f"{prefix}head")


def _pool_rules(ours: str, theirs: str) -> list[Rule]:
    out = [Rule(f"{ours}/probe", f"{theirs}.probe", ones(1))]
    for name in ("q", "k", "v"):
        out.append(Rule(f"{ours}/{name}/kernel", f"{theirs}.attention.in_proj_weight", linear(), join=0))
        out.append(Rule(f"{ours}/{name}/bias", f"{theirs}.attention.in_proj_bias", blocks.vector, join=0))
    out += blocks.dense(f"{ours}/out", f"{theirs}.attention.out_proj", inputs=2)
    out += blocks.norm(f"{ours}/norm", f"{theirs}.layernorm")
    return (
        out
        + blocks.dense(f"{ours}/mlp/up", f"{theirs}.mlp.fc1")
        + blocks.dense(f"{ours}/mlp/down", f"{theirs}.mlp.fc2")
    )


def configure_text(config: dict) -> text.Config:
    of = tower(config, 768, 3072, 12, 12, "gelu_pytorch_tanh", 1e-6)
    vocab, positions = raw.size(config, "vocab_size", 32000), raw.size(config, "max_position_embeddings", 64)
    return text.Config(vocab, positions, of, config.get("projection_size") or of.width, bias=True)
