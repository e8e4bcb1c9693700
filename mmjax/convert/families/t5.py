"""T5, T5 1.1 and Flan-T5 (Raffel et al. 2020; Chung et al. 2022)."""

from dataclasses import replace

from mmjax.convert import raw
from mmjax.convert.families import blocks
from mmjax.convert.families.decoder import tie
from mmjax.convert.found import Found
from mmjax.convert.rules import Rule
from mmjax.core.errors import InputError
from mmjax.models import encoder_decoder
from mmjax.nn import relative, transformer

DROPPED = {
    r"(.*\.)?(encoder|decoder)\.embed_tokens\.weight": "a copy of the token table",
    r"(.*\.)?decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight": "nothing reads it",
}
TABLE, HEAD = "shared.weight", "lm_head.weight"
ACTIVATIONS = {"relu": ("relu", False), "gated-gelu": ("gelu_tanh", True), "gated-silu": ("silu", True)}


def read(config: dict, keys: frozenset[str]) -> Found:
    """A directory of T5ForConditionalGeneration."""

    def found(tied: bool) -> Found:
        cfg = configure(config, tied)
        return Found(encoder_decoder, cfg, tuple(rules(cfg, "", keys)), DROPPED, copies=copies("", keys))

    return tie(found, tied(config, keys), keys, TABLE, HEAD)


def tied(config: dict, keys: frozenset[str] = frozenset()) -> bool:
    """Whether the head is the token table: transformers 5 says so of every T5, and looks at the file (decoder.tie).

    A config without a file is taken at its word.
    """
    return bool(keys) or not _apart(config)


def copies(prefix: str, keys: frozenset[str]) -> dict[str, str]:
    """Those of a file's tensors that are the token table once more."""
    others = (f"{prefix}{part}.embed_tokens.weight" for part in ("encoder", "decoder"))
    return {name: prefix + TABLE for name in others if name in keys and prefix + TABLE in keys}


def _apart(config: dict) -> bool:
    """Whether the config says that the head is no copy of the token table, as those of T5 1.1 do."""
    scaled = config.get("scale_decoder_outputs")
    return not scaled if scaled is not None else not raw.flag(config, "tie_word_embeddings", True)


def configure(config: dict, tied: bool) -> encoder_decoder.Config:
    """The model that a config describes.

    Raises:
      InputError: it says something that we do not compute.
    """
    raw.refuse(config, "quantization_config")
    kind = raw.get(config, "feed_forward_proj", "relu")
    if kind not in ACTIVATIONS:
        raise InputError(f"config.json says 'feed_forward_proj' is {str(kind)[:100]!r}; mmjax has {[*ACTIVATIONS]}.")
    activation, gated = ACTIVATIONS[kind]
    width, heads = raw.size(config, "d_model", 512), raw.size(config, "num_heads", 8)
    layers = raw.size(config, "num_layers", 6)
    ranges = raw.size(config, "relative_attention_num_buckets", 32)
    furthest = raw.size(config, "relative_attention_max_distance", 128)
    encoder = transformer.Config(
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head=raw.size(config, "d_kv", 64),
        hidden=raw.size(config, "d_ff", 2048),
        activation=activation,
        gated=gated,
        epsilon=raw.number(config, "layer_norm_epsilon", 1e-6),
        query_scale=1.0,
        relative=relative.Config(heads, ranges, furthest, both=True),
    )
    count = layers if config.get("num_decoder_layers") is None else raw.size(config, "num_decoder_layers")
    answer = replace(encoder, layers=count, look=width, relative=relative.Config(heads, ranges, furthest))
    return encoder_decoder.Config(
        raw.size(config, "vocab_size", 32128), encoder, answer, tied, 1.0 if _apart(config) else width**-0.5
    )


def rules(cfg: encoder_decoder.Config, prefix: str, keys: frozenset[str] = frozenset()) -> list[Rule]:
    """The table of a model whose tensors begin with `prefix`.

    Files may have the token table under the name of the encoder's or the decoder's alone, among `keys`.
    """
    names = (TABLE, "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    table = next((n for n in names if prefix + n in keys), TABLE)
    out = [Rule("embed", prefix + table)]
    for ours, theirs, of in (("encoder", "encoder", cfg.blocks), ("answer", "decoder", cfg.answer)):
        at, last = f"{prefix}{theirs}.block.{{}}.layer.", 1 if of.look is None else 2
        out += _attention(f"{ours}/blocks/attention", f"{at}0.SelfAttention")
        out += blocks.norm(f"{ours}/blocks/attention_norm", f"{at}0.layer_norm", "rms")
        if of.look is not None:
            out += _attention(f"{ours}/blocks/look", f"{at}1.EncDecAttention")
            out += blocks.norm(f"{ours}/blocks/look_norm", f"{at}1.layer_norm", "rms")
        out += blocks.norm(f"{ours}/blocks/mlp_norm", f"{at}{last}.layer_norm", "rms")
        dense = f"{at}{last}.DenseReluDense."
        for name, them in {"gate": "wi_0", "up": "wi_1" if of.gated else "wi", "down": "wo"}.items():
            if name != "gate" or of.gated:
                out += blocks.dense(f"{ours}/blocks/mlp/{name}", dense + them, False)
        table = f"{prefix}{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        out.append(Rule(f"{ours}/relative", table, _turned))
        out += blocks.norm(f"{ours}/norm", f"{prefix}{theirs}.final_layer_norm", "rms")
    return out if cfg.tied else [*out, Rule("head", prefix + HEAD)]


def _attention(ours: str, theirs: str) -> list[Rule]:
    out = blocks.dense(f"{ours}/out", f"{theirs}.o", False, 2)
    for name in ("q", "k", "v"):
        out += blocks.dense(f"{ours}/{name}", f"{theirs}.{name}", False)
    return out


def _turned(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Theirs is [ranges, heads], ours [heads, ranges]."""
    return shape[::-1], (1, 0)
