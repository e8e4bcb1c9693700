"""The vision towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, with their mergers."""

from mmjax.connectors import merger
from mmjax.convert import raw
from mmjax.convert.families import blocks
from mmjax.convert.families.clip import prefixed
from mmjax.convert.families.pixtral import theta
from mmjax.convert.found import Found
from mmjax.convert.rules import Rule, clips
from mmjax.core.errors import InputError
from mmjax.core.strict_json import shown
from mmjax.encoders import vit
from mmjax.models import tower
from mmjax.nn import patch_embed, rope, transformer

SHARED = {"attention_norm": "norm1", "mlp_norm": "norm2", "qkv": "attn.qkv", "out": "attn.proj"}
NAMES = {
    2.0: blocks.Names(**SHARED, up="mlp.fc1", down="mlp.fc2"),
    2.5: blocks.Names(**SHARED, gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj"),
    3.0: blocks.Names(**SHARED, up="mlp.linear_fc1", down="mlp.linear_fc2"),
}
# What the merger's norm and matrices are called.
MERGER = {
    2.0: ("ln_q", "mlp.0", "mlp.2"),
    2.5: ("ln_q", "mlp.0", "mlp.2"),
    3.0: ("norm", "linear_fc1", "linear_fc2"),
}


def version(config: dict) -> float:
    """2, 2.5 or 3, from the model type."""
    kind = config["model_type"]
    for name, number in (("qwen2_5_vl", 2.5), ("qwen2_vl", 2.0), ("qwen3_vl", 3.0)):
        if kind.startswith(name):
            return number
    raise InputError(f"config.json says 'model_type' is {kind!r}, which is no vision tower of Qwen-VL.")


def read(config: dict, keys: frozenset[str]) -> Found:
    """A directory of one of the three towers."""
    cfg = configure(config)
    return Found(tower, cfg, tuple(rules(cfg, "", version(config))))


def configure(config: dict) -> tower.Config:
    number = version(config)
    third = number == 3
    width = raw.size(config, "embed_dim" if number == 2 else "hidden_size", 1152 if third else 1280)
    outputs = raw.size(config, "hidden_size", 3584) if number == 2 else raw.size(config, "out_hidden_size", 3584)
    hidden = (
        int(width * raw.get(config, "mlp_ratio", 4))
        if number == 2
        else raw.size(config, "intermediate_size", 4304 if third else 3420)
    )
    layers, heads = raw.size(config, "depth", 27 if third else 32), raw.size(config, "num_heads", 16)
    patch, merge = raw.square(config, "patch_size", 16 if third else 14), raw.size(config, "spatial_merge_size", 2)
    head = raw.heads(width, heads)
    if head % 4:
        raise InputError(
            f"config.json gives heads of {head} values; rotary positions of two axes need a multiple of 4."
        )
    whole = set(_blocks(config, "fullatt_block_indexes", [7, 15, 23, 31], layers) if number == 2.5 else range(layers))
    of = transformer.Config(
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head=head,
        hidden=hidden,
        activation=raw.activation(config, default={2.0: "quick_gelu", 2.5: "silu", 3.0: "gelu_pytorch_tanh"}[number]),
        gated=number == 2.5,
        bias=True,
        norm_kind="rms" if number == 2.5 else "layer",
        epsilon=1e-6,
        rope=rope.Config(head, (head // 4, head // 4), theta(config), "repeated"),
        windowed=tuple(i for i in range(layers) if i not in whole),
    )
    frames = raw.size(config, "temporal_patch_size", 2)
    colours = raw.size(config, "in_channels", 3)
    embed = patch_embed.Config(
        patch, width, colours, *(raw.HALF if number == 3 else raw.OPENAI), bias=number == 3, frames=frames
    )
    table = None
    if number == 3:
        side = raw.side(raw.size(config, "num_position_embeddings", 2304))
        table = vit.Table(side, side, "bilinear", align_corners=True)
    merge_config = merger.Config(width, outputs, merge, norm="rms" if number == 2.5 else "layer")
    taps = tuple(_blocks(config, "deepstack_visual_indexes", [8, 16, 24], layers)) if number == 3 else ()
    if list(taps) != sorted(set(taps)):
        raise InputError(f"config.json says 'deepstack_visual_indexes' are {list(taps)}; mmjax wants them rising.")
    deep = merger.Config(width, outputs, merge, norm_after=True) if taps else None
    return tower.Config(vit.Config(embed, of, table, final_norm=False), merge_config, taps, deep)


def _blocks(config: dict, key: str, default: list[int], layers: int) -> list[int]:
    """Numbers of blocks."""
    value = raw.get(config, key, default)
    if not isinstance(value, list) or len(value) > layers or not all(type(n) is int and 0 <= n < layers for n in value):
        raise InputError(f"config.json says {key!r} is {shown(value)}; they must be numbers of its {layers} blocks.")
    return value


def window(config: dict) -> int:
    """Merged tokens per side of an attention window, for sequence.windows.order (Qwen2.5-VL); 0: there are none."""
    if version(config) != 2.5:
        return 0
    pixels = raw.square(config, "patch_size", 14) * raw.size(config, "spatial_merge_size", 2)
    return raw.size(config, "window_size", 112) // pixels


def rules(cfg: tower.Config, prefix: str, number: float) -> list[Rule]:
    of, embed = cfg.vision.blocks, cfg.vision.embed
    out = [Rule("embed/kernel", f"{prefix}patch_embed.proj.weight", clips(embed.patch, embed.frames, embed.channels))]
    if embed.bias:
        out.append(Rule("embed/bias", f"{prefix}patch_embed.proj.bias"))
    if cfg.vision.table is not None:
        out.append(Rule("table", f"{prefix}pos_embed.weight", blocks.table()))
    out += blocks.blocks(of, "blocks", f"{prefix}blocks.{{}}.", NAMES[number])
    out = prefixed("vision", out) + merger_rules("merger", f"{prefix}merger.", of.norm_kind, number)
    if cfg.deep is not None:
        out += merger_rules("deep", f"{prefix}deepstack_merger_list.{{}}.", of.norm_kind, number)
    return out


def merger_rules(ours: str, theirs: str, kind: str, number: float) -> list[Rule]:
    norm, up, down = MERGER[number]
    out = blocks.norm(f"{ours}/norm", theirs + norm, kind)
    return out + blocks.dense(f"{ours}/mlp/up", theirs + up) + blocks.dense(f"{ours}/mlp/down", theirs + down)
