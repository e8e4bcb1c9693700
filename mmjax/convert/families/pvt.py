"""PVT and PVT v2 directories of transformers (model types "pvt" and "pvt_v2"): models, classifiers and backbones."""

from mmjax.convert import raw
from mmjax.convert.families import blocks
from mmjax.convert.found import Found
from mmjax.convert.rules import Rule, Shape, convolution, patches
from mmjax.core.errors import InputError
from mmjax.encoders import pyramid


def rules(cfg: pyramid.Config, prefix: str = "") -> list[Rule]:
    """The table; `prefix` is what stands before "encoder" ("pvt." and "pvt_v2." in classifiers)."""
    out: list[Rule] = []
    for i in range(cfg.stages):
        out += (_stage_v1 if cfg.kind == "v1" else _stage_v2)(cfg, i, f"{prefix}encoder.")
    if cfg.kind == "v1":
        out += blocks.norm("norm", f"{prefix}encoder.layer_norm")
    if cfg.classes:
        out += blocks.dense("classifier", "classifier")
    return out


def read(config: dict, keys: frozenset[str]) -> Found:
    """The encoder of a PVT or PVT v2 config.json whose weights have these tensors.

    Raises:
      InputError: sizes or an activation that mmjax has not.
    """
    second = config["model_type"] == "pvt_v2"
    stages = raw.size(config, "num_encoder_blocks", 4)

    def each(name: str, *default: int) -> tuple:
        return tuple(raw.get(config, name, default))[:stages]

    sides, strides = each("patch_sizes", *((7, 3, 3, 3) if second else (4, 2, 2, 2))), each("strides", 4, 2, 2, 2)
    if not second and sides != strides:
        raise InputError(
            f"config.json has patch_sizes {sides} and strides {strides}; mmjax's PVT has patches that tile, for which "
            f"they are equal."
        )
    cfg = pyramid.Config(
        kind=("v2_linear" if config.get("linear_attention") else "v2") if second else "v1",
        widths=each("hidden_sizes", *((32, 64, 160, 256) if second else (64, 128, 320, 512))),
        depths=each("depths", 2, 2, 2, 2),
        heads=each("num_attention_heads", 1, 2, 5, 8),
        ratios=tuple(map(float, each("mlp_ratios", 8, 8, 4, 4))),
        patches=sides,
        strides=strides,
        reductions=each("sr_ratios" if second else "sequence_reduction_ratios", 8, 4, 2, 1),
        image=224 if second else raw.square(config, "image_size", 224),
        channels=raw.size(config, "num_channels", 3),
        activation=raw.activation(config),
        qkv_bias=bool(config.get("qkv_bias", True)),
        epsilon=float(raw.get(config, "layer_norm_eps", 1e-6)),
        classes=raw.labels(config) if "classifier.weight" in keys else None,
    )
    whole = "pvt_v2." if second else "pvt."
    prefix = whole if any(key.startswith(whole) for key in keys) else ""
    return Found(pyramid, cfg, tuple(rules(cfg, prefix)))


def _block(cfg: pyramid.Config, i: int, theirs: str, attention: str, out: str, reduction: str) -> list[Rule]:
    """What both versions have in a block, under the names that theirs has in this one."""
    layers = f"stage_{i}/layers"
    rules = [
        *blocks.norm(f"{layers}/attention_norm", f"{theirs}.layer_norm_1"),
        *blocks.dense(f"{layers}/attention/q", f"{attention}.query", cfg.qkv_bias),
        *blocks.dense(f"{layers}/attention/k", f"{attention}.key", cfg.qkv_bias),
        *blocks.dense(f"{layers}/attention/v", f"{attention}.value", cfg.qkv_bias),
        *blocks.dense(f"{layers}/attention/out", out, inputs=2),
        *blocks.norm(f"{layers}/mlp_norm", f"{theirs}.layer_norm_2"),
        *blocks.dense(f"{layers}/mlp/up", f"{theirs}.mlp.dense1"),
        *blocks.dense(f"{layers}/mlp/down", f"{theirs}.mlp.dense2"),
    ]
    if cfg.reduce(i) is None:
        return rules
    side = 1 if cfg.kind == "v2_linear" else cfg.reductions[i]
    return [
        *rules,
        Rule(f"{layers}/attention/reduce/kernel", f"{reduction}.weight", patches(side, cfg.widths[i])),
        Rule(f"{layers}/attention/reduce/bias", f"{reduction}.bias"),
        *blocks.norm(f"{layers}/attention/reduce_norm", f"{attention}.layer_norm"),
    ]


def _embed(cfg: pyramid.Config, i: int, projection: str, norm: str) -> list[Rule]:
    below = cfg.widths[i - 1] if i else cfg.channels
    return [
        Rule(f"stage_{i}/embed/kernel", f"{projection}.weight", patches(cfg.patches[i], below)),
        Rule(f"stage_{i}/embed/bias", f"{projection}.bias"),
        *blocks.norm(f"stage_{i}/embed_norm", norm),
    ]


def _stage_v1(cfg: pyramid.Config, i: int, prefix: str) -> list[Rule]:
    embed, block = f"{prefix}patch_embeddings.{i}", f"{prefix}block.{i}.{{}}"
    attention = f"{block}.attention.self"
    out = _embed(cfg, i, f"{embed}.projection", f"{embed}.layer_norm")
    join = None
    if cfg.has_class(i):
        # The class token's position is the first of the table.
        join = 1
        out.append(Rule(f"stage_{i}/class", f"{embed}.cls_token", blocks.table(1)))
        out.append(Rule(f"stage_{i}/class_position", f"{embed}.position_embeddings", blocks.table(1), join))
    out.append(Rule(f"stage_{i}/table", f"{embed}.position_embeddings", blocks.table(1), join))
    return out + _block(cfg, i, block, attention, f"{block}.attention.output.dense", f"{attention}.sequence_reduction")


def _stage_v2(cfg: pyramid.Config, i: int, prefix: str) -> list[Rule]:
    stage = f"{prefix}layers.{i}"
    block, layers = f"{stage}.blocks.{{}}", f"stage_{i}/layers"
    attention = f"{block}.attention"
    return [
        *_embed(cfg, i, f"{stage}.patch_embedding.proj", f"{stage}.patch_embedding.layer_norm"),
        *_block(cfg, i, block, attention, f"{attention}.proj", f"{attention}.spatial_reduction"),
        Rule(f"{layers}/depthwise/kernel", f"{block}.mlp.dwconv.dwconv.weight", depthwise),
        Rule(f"{layers}/depthwise/bias", f"{block}.mlp.dwconv.dwconv.bias"),
        *blocks.norm(f"stage_{i}/norm", f"{stage}.layer_norm"),
    ]


def depthwise(shape: Shape) -> tuple[Shape, tuple[int, ...]]:
    """Theirs is [channels, 1, height, width] (torch.nn.Conv2d with as many groups as channels)."""
    return convolution((*shape[:2], 1, shape[2]))
