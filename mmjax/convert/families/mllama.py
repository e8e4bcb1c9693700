"""Llama 3.2 Vision: tiles seen together by a tower of two transformers, a decoder that looks at them from beside."""

import math
from collections.abc import Sequence
from dataclasses import replace

from mmjax.connectors import linear
from mmjax.convert import raw
from mmjax.convert.families import blocks, connectors, decoder
from mmjax.convert.families.clip import prefixed
from mmjax.convert.found import Found
from mmjax.convert.rules import Rule, Shape, patches
from mmjax.core.errors import InputError
from mmjax.encoders import tiled
from mmjax.models import decoder as decoders
from mmjax.models import vlm
from mmjax.nn import cross_attention, patch_embed, transformer

VISION = blocks.Names(
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    out="self_attn.o_proj",
    up="mlp.fc1",
    down="mlp.fc2",
)
GATES = {"attention": "attn", "mlp": "ffn"}
TABLES = {"before": "pre_tile", "after": "post_tile"}
# The shapes of canvases of four tiles (transformers 5.23).
SHAPES = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
CROSSED, TAPS = [3, 8, 13, 18, 23, 28, 33, 38], [3, 7, 15, 23, 30]
UNSAID = 8  # rows of the token table that the head does not have


def read(config: dict, keys: frozenset[str]) -> Found:
    """A directory of MllamaForConditionalGeneration.

    Files name their tensors `vision_model.…` and `language_model.model.…` (hub files, what transformers 5 writes) or
    `model.vision_model.…` and `model.language_model.…` (what it has in memory).
    """
    at = "model." if any(k.startswith("model.language_model.") for k in keys) else ""
    text_at, head = ("model.language_model.", "lm_head.weight")
    if not at:
        text_at, head = "language_model.model.", "language_model.lm_head.weight"
    raw.refuse(config, "quantization_config")
    vision = raw.part(config, "vision_config", {})
    text = raw.part(config, "text_config", {})
    tower, (language, numbers) = configure_vision(vision), configure_text(text)
    raw.refuse({"vision_output_dim": tower.outputs} | vision, "vision_output_dim", tower.outputs)
    projector = linear.Config(tower.outputs, language.blocks.width, True, tower.per_picture)
    table = prefixed("vision", vision_rules(tower, f"{at}vision_model."))
    table += prefixed("connector", connectors.paligemma(projector, f"{at}multi_modal_projector."))
    table += prefixed("decoder", text_rules(language, numbers, text_at, head))
    return Found(vlm, vlm.Config(tower, projector, language), tuple(table), decoder.DROPPED)


def configure_text(config: dict) -> tuple[decoders.Config, tuple[int, ...]]:
    """The decoder, and which of the layers that config.json counts are those of cross-attention.

    Raises:
      InputError: settings that mmjax does not compute.
    """
    layers = raw.size(config, "num_hidden_layers", 40)
    numbers = _rising(config, "cross_attention_layers", CROSSED, layers)
    if not numbers or len(numbers) == layers:
        raise InputError(
            f"config.json has {len(numbers)} layers of cross-attention in {layers}; mmjax wants some, and others."
        )
    raw.refuse(config, "tie_word_embeddings", False)  # transformers has both tables whatever it says
    words = raw.size(config, "vocab_size", 128_256)
    own = {"model_type": "mllama_text_model", "num_hidden_layers": layers - len(numbers), "vocab_size": words + UNSAID}
    of = decoder.configure({**config, **own}, False)
    b = of.blocks
    raw.refuse(config, "head_dim", raw.heads(b.width, b.heads))
    cross = cross_attention.Config(
        width=b.width,
        media=b.width,
        heads=b.heads,
        head=b.head,
        hidden=b.hidden,
        epsilon=b.epsilon,
        at=tuple(n - i for i, n in enumerate(numbers)),
        kv_heads=b.kv_heads,
        activation=b.activation,
        gated=True,
        norm_kind="rms",
        qk_norm=True,
        blind="all",
    )
    return replace(of, cross=cross, unsaid=UNSAID), numbers


def text_rules(cfg: decoders.Config, numbers: tuple[int, ...], prefix: str, head: str) -> list[Rule]:
    """The table of the decoder whose layers `numbers` are those of cross-attention."""
    others = [i for i in range(cfg.blocks.layers + len(numbers)) if i not in numbers]
    out = [replace(r, layers=others) if "{}" in r.theirs else r for r in decoder.rules(cfg, prefix, head)]
    at = f"{prefix}layers.{{}}."
    table = blocks.norm("attention_norm", f"{at}input_layernorm", "rms")
    table += blocks.norm("mlp_norm", f"{at}post_attention_layernorm", "rms")
    for name in ("q", "k", "v"):
        table += blocks.dense(name, f"{at}cross_attn.{name}_proj", False)
    table += blocks.dense("out", f"{at}cross_attn.o_proj", False, 2)
    for name in ("q_norm", "k_norm"):
        table += blocks.norm(name, f"{at}cross_attn.{name}", "rms")
    for name in ("gate", "up", "down"):
        table += blocks.dense(f"mlp/{name}", f"{at}mlp.{name}_proj", False)
    table += [Rule("attention_gate", f"{at}cross_attn_attn_gate"), Rule("mlp_gate", f"{at}cross_attn_mlp_gate")]
    return out + [replace(r, layers=numbers) for r in prefixed("cross", table)]


def flat(shape: Shape) -> tuple[Shape, tuple[int, ...]]:
    """Theirs has all axes of a table but the first as one."""
    return (shape[0], math.prod(shape[1:])), (0, 1)


def configure_vision(config: dict) -> tiled.Config:
    """The tower.

    Raises:
      InputError: settings that mmjax does not compute.
    """
    width = raw.size(config, "hidden_size", 1280)
    heads = raw.size(config, "attention_heads", raw.size(config, "num_attention_heads", 16))
    image, patch = raw.square(config, "image_size", 448), raw.square(config, "patch_size", 14)
    most = raw.size(config, "max_num_tiles", 4)
    epsilon = raw.number(config, "norm_eps", 1e-5)

    def tower(layers: int, **more) -> transformer.Config:
        return transformer.Config(
            width=width,
            layers=layers,
            heads=heads,
            kv_heads=heads,
            head=raw.heads(width, heads),
            hidden=raw.size(config, "intermediate_size", 5120),
            activation=raw.activation(config, default="gelu"),
            gated=False,
            bias=True,
            qkv_bias=False,
            out_bias=False,
            norm_kind="layer",
            epsilon=epsilon,
            **more,
        )

    first = raw.size(config, "num_hidden_layers", 32)
    channels = raw.size(config, "num_channels", 3)
    return tiled.Config(
        embed=patch_embed.Config(patch, width, channels, *raw.OPENAI, bias=False),
        blocks=tower(first),
        whole=tower(raw.size(config, "num_global_layers", 8), gate=math.pi / 4),
        side=image // patch,
        tiles=most,
        shapes=_shapes(config, most),
        taps=_rising(config, "intermediate_layers_indices", TAPS, first),
    )


def _shapes(config: dict, most: int) -> tuple[tuple[int, int], ...]:
    """The canvases that the tables are for. The processor counts them through by itself: any other order is wrong."""
    given = config.get("supported_aspect_ratios") or SHAPES
    sides = range(1, min(most, 64) + 1)
    known = [[rows, columns] for rows in sides for columns in sides if rows * columns <= most]
    if given != known:
        raise InputError(
            f"config.json says 'supported_aspect_ratios' are {str(given)[:100]}; for {most} tiles the processor has "
            f"{str(known)[:100]}."
        )
    return tuple((rows, columns) for rows, columns in known)


def _rising(config: dict, key: str, default: Sequence[int], count: int) -> tuple[int, ...]:
    """Numbers of blocks, which must rise."""
    value = config.get(key)
    value = list(default) if value is None else value
    fine = isinstance(value, list) and all(type(n) is int and 0 <= n < count for n in value)
    if not fine or value != sorted(set(value)):
        raise InputError(f"config.json says {key!r} is {str(value)[:100]}; they must rise and lie below {count}.")
    return tuple(value)


def vision_rules(cfg: tiled.Config, prefix: str) -> list[Rule]:
    """The table of the tower."""
    out = [
        Rule("embed/kernel", f"{prefix}patch_embedding.weight", patches(cfg.embed.patch, cfg.embed.channels)),
        Rule("class", f"{prefix}class_embedding"),
        Rule("position", f"{prefix}gated_positional_embedding.embedding"),
        Rule("tile_position/table", f"{prefix}gated_positional_embedding.tile_embedding.weight", flat),
        Rule("tile_position/gate", f"{prefix}gated_positional_embedding.gate"),
    ]
    for ours, theirs in TABLES.items():
        at = f"{prefix}{theirs}_positional_embedding."
        out += [Rule(f"{ours}/table", f"{at}embedding.weight", flat), Rule(f"{ours}/gate", f"{at}gate")]
    out += blocks.norm("pre_norm", f"{prefix}layernorm_pre") + blocks.norm("norm", f"{prefix}layernorm_post")
    out += blocks.blocks(cfg.blocks, "blocks", f"{prefix}transformer.layers.{{}}.", VISION)
    at = f"{prefix}global_transformer.layers.{{}}."
    out += blocks.blocks(cfg.whole, "whole", at, VISION)
    return out + [Rule(f"whole/{ours}_gate", f"{at}gate_{theirs}") for ours, theirs in GATES.items()]
