"""OPT (Zhang et al. 2022): LayerNorm, biases, ReLU, learned positions."""

from mmjax.convert import raw
from mmjax.convert.families import blocks
from mmjax.convert.families.decoder import tie
from mmjax.convert.found import Found
from mmjax.convert.rules import Rule
from mmjax.models import decoder
from mmjax.nn import transformer

OFFSET = 2  # the row of position 0: fairseq counted from its padding id
NAMES = blocks.Names(
    attention_norm="self_attn_layer_norm",
    mlp_norm="final_layer_norm",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    out="self_attn.out_proj",
    up="fc1",
    down="fc2",
)
TABLE, HEAD = "decoder.embed_tokens.weight", "lm_head.weight"


def read(config: dict, keys: frozenset[str]) -> Found:
    """A directory of OPTForCausalLM; files of OPTModel, as most of the published ones are, lack a leading `model.`."""
    prefix = "" if any(k.startswith("decoder.") for k in keys) else "model."

    def found(tied: bool) -> Found:
        cfg = configure(config, tied)
        return Found(decoder, cfg, tuple(rules(cfg, prefix, HEAD, keys)))

    return tie(found, tied(config), keys, prefix + TABLE, HEAD)


def tied(config: dict) -> bool:
    return raw.flag(config, "tie_word_embeddings", True)


def configure(config: dict, tied: bool) -> decoder.Config:
    """The decoder that a config describes.

    Raises:
      InputError: it says something that we do not compute: norms after the branches and narrower tables of tokens are
        OPT-350M's alone.
    """
    width, heads = raw.size(config, "hidden_size", 768), raw.size(config, "num_attention_heads", 12)
    raw.refuse(config, "quantization_config")
    raw.refuse(config, "do_layer_norm_before", True)
    raw.refuse(config, "_remove_final_layer_norm", False)
    raw.refuse(config, "word_embed_proj_dim", width)
    raw.refuse(config, "layer_norm_elementwise_affine", True)
    of = transformer.Config(
        width=width,
        layers=raw.size(config, "num_hidden_layers", 12),
        heads=heads,
        kv_heads=heads,
        head=raw.heads(width, heads),
        hidden=raw.size(config, "ffn_dim", 3072),
        activation=raw.activation(config, "activation_function", "relu"),
        gated=False,
        bias=raw.flag(config, "enable_bias", True),
        norm_kind="layer",
        epsilon=1e-5,
    )
    positions = decoder.Positions(raw.size(config, "max_position_embeddings", 2048) + OFFSET, OFFSET)
    return decoder.Config(raw.size(config, "vocab_size", 50272), of, tied, positions=positions)


def rules(cfg: decoder.Config, prefix: str, head: str, keys: frozenset[str] = frozenset()) -> list[Rule]:
    """The table of a decoder whose tensors begin with `prefix` ("model."), and whose head is called `head`.

    A tied model's file may have the table under the head's name alone, among `keys`.
    """
    table = prefix + TABLE
    out = [
        Rule("embed", head if cfg.tied and table not in keys and head in keys else table),
        Rule("positions", f"{prefix}decoder.embed_positions.weight"),
        *blocks.blocks(cfg.blocks, "blocks", f"{prefix}decoder.layers.{{}}.", NAMES),
        *blocks.norm("norm", f"{prefix}decoder.final_layer_norm"),
    ]
    return out if cfg.tied else [*out, Rule("head", head)]
