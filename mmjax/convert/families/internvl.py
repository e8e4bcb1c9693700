"""InternViT, the vision tower of InternVL."""

from mmjax.convert import raw
from mmjax.convert.families import blocks
from mmjax.convert.found import Found
from mmjax.convert.rules import Rule, ones, patches
from mmjax.core.errors import InputError
from mmjax.encoders import head, vit
from mmjax.nn import patch_embed, transformer

NAMES = blocks.Names(
    attention_norm="layernorm_before",
    mlp_norm="layernorm_after",
    q="attention.q_proj",
    k="attention.k_proj",
    v="attention.v_proj",
    out="attention.projection_layer",
    up="mlp.fc1",
    down="mlp.fc2",
    q_norm="attention.q_norm",
    k_norm="attention.k_norm",
    attention_scale="lambda_1",
    mlp_scale="lambda_2",
)


def read(config: dict, keys: frozenset[str]) -> Found:
    """A directory of InternVLVisionModel."""
    cfg = configure(config)
    return Found(vit, cfg, tuple(rules(cfg, "")))


def configure(config: dict) -> vit.Config:
    width, heads = raw.size(config, "hidden_size", 1024), raw.size(config, "num_attention_heads", 16)
    kind = config.get("norm_type", "layer_norm")
    if kind not in ("layer_norm", "rms_norm"):
        raise InputError(f"config.json says 'norm_type' is {kind!r}; it is 'layer_norm' or 'rms_norm'.")
    tower = transformer.Config(
        width=width,
        layers=raw.size(config, "num_hidden_layers", 24),
        heads=heads,
        kv_heads=heads,
        head=raw.heads(width, heads),
        hidden=raw.size(config, "intermediate_size", 4096),
        activation=raw.activation(config),
        gated=False,
        bias=True,
        qkv_bias=bool(config.get("attention_bias", False)),
        norm_kind="layer" if kind == "layer_norm" else "rms",
        epsilon=raw.get(config, "layer_norm_eps", 1e-6),
        qk_norm="width" if config.get("use_qk_norm", False) else "none",
        qk_epsilon=1e-6 if config.get("use_qk_norm", False) else None,
        layer_scale=float(config.get("layer_scale_init_value", 0.1)),
    )
    patch, image = raw.square(config, "patch_size", 14), raw.square(config, "image_size", 448)
    mean = bool(config.get("use_mean_pooling", True))
    if not mean and kind == "rms_norm":
        raise InputError(
            "config.json has RMSNorm in the blocks and a LayerNorm at the end (use_mean_pooling is false); mmjax has "
            "one kind of norm in a tower."
        )
    return vit.Config(
        embed=patch_embed.Config(patch, width, raw.size(config, "num_channels", 3), *raw.IMAGENET),
        blocks=tower,
        table=vit.Table(image // patch, image // patch)
        if config.get("use_absolute_position_embeddings", True)
        else None,
        classes=1,
        mask=bool(config.get("use_mask_token", False)),
        # With mean pooling there is no last norm: features are as the last block puts them out.
        final_norm=not mean,
        head=head.Config(width, "mean" if mean else "class"),
    )


def rules(cfg: vit.Config, prefix: str) -> list[Rule]:
    at = f"{prefix}embeddings."
    out = [
        Rule("embed/kernel", f"{at}patch_embeddings.projection.weight", patches(cfg.embed.patch, cfg.embed.channels)),
        Rule("embed/bias", f"{at}patch_embeddings.projection.bias"),
        Rule("class", f"{at}cls_token", ones(1)),
    ]
    if cfg.table is not None:
        out += [Rule(name, f"{at}position_embeddings", blocks.table(1), join=1) for name in ("class_position", "table")]
    if cfg.mask:
        out.append(Rule("mask", f"{at}mask_token", ones(2)))
    out += blocks.blocks(cfg.blocks, "blocks", f"{prefix}encoder.layer.{{}}.", NAMES)
    return out + (blocks.norm("norm", f"{prefix}layernorm") if cfg.final_norm else [])
