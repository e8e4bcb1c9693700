"""Swin directories of transformers: SwinModel, SwinForImageClassification, SwinBackbone (model type "swin").

A SwinForMaskedImageModeling directory is read as the encoder in it.
"""

import re

from mmjax.convert import raw
from mmjax.convert.families import blocks
from mmjax.convert.found import Found
from mmjax.convert.rules import Rule, patches
from mmjax.encoders import swin
from mmjax.nn import patch_embed

DROPPED = {
    r".*\.relative_position_index": "a table made from the window's size",
    r".*\.attn_mask": "a table made from the picture's size",
    r"(swin\.)?embeddings\.mask_token": "stands in for masked patches while SimMIM trains; the encoder alone is read",
    r"decoder\..*": "SimMIM's reconstruction of pixels; the encoder alone is read",
}
UNUSED_NORM = {r"(swin\.)?layernorm\..*": "a backbone's maps have norms of their own; nothing looks at this one"}


def rules(cfg: swin.Config, prefix: str = "") -> list[Rule]:
    """The table; `prefix` is what stands before "embeddings" and "encoder" ("swin." in classifiers)."""
    embeddings, last = f"{prefix}embeddings.", len(cfg.depths) - 1
    projection = f"{embeddings}patch_embeddings.projection."
    out = [
        Rule("embed/kernel", f"{projection}weight", patches(cfg.embed.patch, cfg.embed.channels)),
        *([Rule("embed/bias", f"{projection}bias")] if cfg.embed.bias else []),
        *blocks.norm("embed_norm", f"{embeddings}norm"),
    ]
    if cfg.table is not None:
        out.append(Rule("table", f"{embeddings}position_embeddings", blocks.table(1)))
    for i in range(last + 1):
        ours, theirs = f"stage_{i}", f"{prefix}encoder.layers.{i}"
        layers, block = f"{ours}/layers", f"{theirs}.blocks.{{}}"
        out += [
            *blocks.norm(f"{layers}/attention_norm", f"{block}.layernorm_before"),
            *blocks.dense(f"{layers}/attention/q", f"{block}.attention.self.query", cfg.qkv_bias),
            *blocks.dense(f"{layers}/attention/k", f"{block}.attention.self.key", cfg.qkv_bias),
            *blocks.dense(f"{layers}/attention/v", f"{block}.attention.self.value", cfg.qkv_bias),
            *blocks.dense(f"{layers}/attention/out", f"{block}.attention.output.dense", inputs=2),
            Rule(f"{layers}/attention/relative", f"{block}.attention.self.relative_position_bias_table"),
            *blocks.norm(f"{layers}/mlp_norm", f"{block}.layernorm_after"),
            *blocks.dense(f"{layers}/mlp/up", f"{block}.intermediate.dense"),
            *blocks.dense(f"{layers}/mlp/down", f"{block}.output.dense"),
        ]
        if i < last:
            out += blocks.norm(f"{ours}/merge_norm", f"{theirs}.downsample.norm")
            out += blocks.dense(f"{ours}/merge", f"{theirs}.downsample.reduction", bias=False)
    for number in cfg.map_norms:
        out += blocks.norm(f"map_norm_{number}", f"hidden_states_norms.{_stage(number)}")
    if cfg.final_norm:
        out += blocks.norm("norm", f"{prefix}layernorm")
    if cfg.classes:
        out += blocks.dense("classifier", "classifier")
    return out


def read(config: dict, keys: frozenset[str]) -> Found:
    """The encoder of a Swin config.json whose weights have these tensors.

    Raises:
      InputError: sizes or an activation that mmjax has not.
    """
    patch, width = raw.square(config, "patch_size", 4), raw.size(config, "embed_dim", 96)
    side = raw.square(config, "image_size", 224) // patch if config.get("use_absolute_embeddings") else 0
    norms = tuple(sorted({_number(m[1]) for key in keys if (m := re.match(r"hidden_states_norms\.(\w+)\.", key))}))
    cfg = swin.Config(
        embed=patch_embed.Config(patch, width, raw.size(config, "num_channels", 3), *raw.IMAGENET),
        depths=tuple(raw.get(config, "depths", (2, 2, 6, 2))),
        heads=tuple(raw.get(config, "num_heads", (3, 6, 12, 24))),
        window=raw.size(config, "window_size", 7),
        ratio=float(raw.get(config, "mlp_ratio", 4.0)),
        activation=raw.activation(config),
        qkv_bias=bool(config.get("qkv_bias", True)),
        epsilon=float(raw.get(config, "layer_norm_eps", 1e-5)),
        table=(side, side) if side else None,
        always_shift=bool(norms),
        map_norms=norms,
        final_norm=not norms,
        classes=raw.labels(config) if "classifier.weight" in keys else None,
    )
    prefix = "swin." if any(key.startswith("swin.embeddings.") for key in keys) else ""
    return Found(swin, cfg, tuple(rules(cfg, prefix)), DROPPED | (UNUSED_NORM if norms else {}))


def _stage(number: int) -> str:
    return f"stage{number}" if number else "stem"


def _number(stage: str) -> int:
    return 0 if stage == "stem" else int(stage.removeprefix("stage"))
