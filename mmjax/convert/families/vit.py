"""ViT, DeiT, DINOv2 and DINOv2 with registers."""

import dataclasses

from mmjax.convert import raw
from mmjax.convert.families import blocks
from mmjax.convert.found import Found
from mmjax.convert.rules import Rule, ones, patches
from mmjax.core.errors import InputError
from mmjax.encoders import head, vit
from mmjax.nn import patch_embed, transformer

VIT = blocks.Names(
    attention_norm="layernorm_before",
    mlp_norm="layernorm_after",
    q="attention.attention.query",
    k="attention.attention.key",
    v="attention.attention.value",
    out="attention.output.dense",
    up="intermediate.dense",
    down="output.dense",
)
DINO = blocks.Names(
    attention_norm="norm1",
    mlp_norm="norm2",
    q="attention.attention.query",
    k="attention.attention.key",
    v="attention.attention.value",
    out="attention.output.dense",
    up="mlp.fc1",
    down="mlp.fc2",
    attention_scale="layer_scale1.lambda1",
    mlp_scale="layer_scale2.lambda1",
)
DINO_GATED = dataclasses.replace(DINO, up="", down="mlp.weights_out", gate_up="mlp.weights_in")


def read(config: dict, keys: frozenset[str]) -> Found:
    """A directory of any of the four, with or without pooler and classifier."""
    kind = config["model_type"]
    root = {"vit": "vit.", "deit": "deit.", "dinov2": "dinov2."}.get(kind, "dinov2_with_registers.")
    prefix = root if any(k.startswith(root) for k in keys) else ""
    cfg = configure(config, keys, prefix)
    return Found(vit, cfg, tuple(rules(cfg, prefix, kind)))


def configure(config: dict, keys: frozenset[str], prefix: str) -> vit.Config:
    kind, width = config["model_type"], raw.size(config, "hidden_size", 768)
    dino = kind.startswith("dinov2")
    patch, image = raw.square(config, "patch_size", 14 if dino else 16), raw.square(config, "image_size", 224)
    gated = bool(config.get("use_swiglu_ffn", False))
    hidden = int(width * raw.get(config, "mlp_ratio", 4)) if dino else raw.size(config, "intermediate_size", 3072)
    if gated:
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
    count = raw.size(config, "num_attention_heads", 12)
    tower = transformer.Config(
        width=width,
        layers=raw.size(config, "num_hidden_layers", 12),
        heads=count,
        kv_heads=count,
        head=raw.heads(width, count),
        hidden=hidden,
        activation="silu" if gated else raw.activation(config),
        gated=gated,
        bias=True,
        qkv_bias=bool(config.get("qkv_bias", True)),
        norm_kind="layer",
        epsilon=raw.get(config, "layer_norm_eps", 1e-6 if dino else 1e-12),
        layer_scale=float(config.get("layerscale_value", 1.0)) if dino else None,
    )
    classes = 1 + (f"{prefix}embeddings.distillation_token" in keys)
    side = image // patch
    mean, deviation = raw.IMAGENET if dino or kind == "deit" else raw.HALF
    return vit.Config(
        embed=patch_embed.Config(patch, width, raw.size(config, "num_channels", 3), mean, deviation),
        blocks=tower,
        table=vit.Table(side, side, antialias=kind == "dinov2_with_registers"),
        classes=classes,
        registers=int(config.get("num_register_tokens", 4)) if kind == "dinov2_with_registers" else 0,
        mask=f"{prefix}embeddings.mask_token" in keys,
        head=_head(config, keys, prefix, width),
    )


def _head(config: dict, keys: frozenset[str], prefix: str, width: int) -> head.Config:
    labels = raw.labels(config)
    if "distillation_classifier.weight" in keys:
        return head.Config(width, "distilled", outputs=labels)
    if "classifier.weight" in keys:
        dino = config["model_type"].startswith("dinov2")
        return head.Config(width, "class_mean" if dino else "class", outputs=labels)
    if f"{prefix}pooler.dense.weight" in keys:
        if config.get("pooler_act", "tanh") != "tanh":
            raise InputError(f"config.json says 'pooler_act' is {config['pooler_act']!r}; mmjax has 'tanh'.")
        return head.Config(width, tanh=config.get("pooler_output_size") or width)
    return head.Config(width)


def rules(cfg: vit.Config, prefix: str, kind: str) -> list[Rule]:
    at = f"{prefix}embeddings."
    dino = kind.startswith("dinov2")
    names = (DINO_GATED if cfg.blocks.gated else DINO) if dino else VIT
    embed = patches(cfg.embed.patch, cfg.embed.channels)
    out = [
        Rule("embed/kernel", f"{at}patch_embeddings.projection.weight", embed),
        Rule("embed/bias", f"{at}patch_embeddings.projection.bias"),
        Rule("class_position", f"{at}position_embeddings", blocks.table(1), join=1),
        Rule("table", f"{at}position_embeddings", blocks.table(1), join=1),
    ]
    out += blocks.blocks(cfg.blocks, "blocks", f"{prefix}encoder.layer.{{}}.", names)
    out += blocks.norm("norm", f"{prefix}layernorm")
    out.append(Rule("class", f"{at}{{}}_token", ones(2), layers=("cls", "distillation")[: cfg.classes]))
    if cfg.registers:
        out.append(Rule("registers", f"{at}register_tokens", ones(1)))
    if cfg.mask:
        out.append(Rule("mask", f"{at}mask_token", ones(1 if dino else 2)))
    if cfg.head.tanh is not None:
        out += blocks.dense("head/tanh", f"{prefix}pooler.dense")
    if cfg.head.pool == "distilled":
        out += blocks.dense("head/project", "cls_classifier")
        out += blocks.dense("head/project_distilled", "distillation_classifier")
    elif cfg.head.outputs is not None:
        out += blocks.dense("head/project", "classifier")
    return out
