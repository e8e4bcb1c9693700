"""Q-Formers of transformers (BLIP-2, InstructBLIP), alone or inside their models, and of LAVIS' first stage."""

from dataclasses import dataclass, replace
from typing import Literal

from mmjax.connectors import qformer, qformer_heads
from mmjax.convert import raw as config_json
from mmjax.convert.families.blocks import dense, norm
from mmjax.convert.found import Found
from mmjax.convert.rules import Rule, ones
from mmjax.core.errors import InputError

Family = Literal["blip_2", "instructblip", "lavis"]

# What files of the whole models hold besides; LAVIS' files name the tied word table twice.
DROPPED = {
    r"(.*\.)?position_ids": "the numbers 0, 1, 2 …, which older files hold",
    r"(.*\.)?cls\.predictions\.decoder\.(weight|bias)": "the word table and the bias once more",
}


@dataclass(frozen=True)
class _Names:
    """body: what comes before everything of the Q-Former. text, norm: before the tables, and the norm's own name."""

    body: str
    text: str
    norm: str
    inner: str = "attention"


_NAMES = {
    "blip_2": _Names("qformer.", "embeddings.", "layernorm"),
    "instructblip": _Names("qformer.", "qformer.embeddings.", "embeddings.layernorm"),
    "lavis": _Names("Qformer.bert.", "Qformer.bert.embeddings.", "embeddings.LayerNorm", "self"),
}


def rules(cfg: qformer.Config, prefix: str = "", family: Family = "blip_2", *, alone: bool = False) -> list[Rule]:
    """The table.

    Args:
      cfg: the Q-Former.
      prefix: what the whole model's names begin with.
      family: blip_2 (Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval, Blip2QFormerModel), instructblip
        (InstructBlipForConditionalGeneration, InstructBlipQFormerModel) or lavis (Blip2Qformer).
      alone: as in a directory of the Q-Former's own, whose names begin with nothing.

    Raises:
      ValueError: a LAVIS Q-Former with a projection, which is named after its language model there.
    """
    if family == "lavis" and cfg.outputs is not None:
        raise ValueError("LAVIS' first stage has no projection; leave outputs out.")
    names = _NAMES[family]
    body = prefix if alone else prefix + names.body
    text = prefix + (names.text.removeprefix(names.body) if alone else names.text)
    layer = f"{body}encoder.layer.{{}}"

    out = norm("norm", body + names.norm)
    out += _attention("layers/attention", f"{layer}.attention", names.inner)
    looking = range(0, cfg.layers, cfg.cross_every)
    out += [replace(r, layers=looking) for r in _attention("cross", f"{layer}.crossattention", names.inner)]
    for ours, theirs in (("query", "_query"), ("text", "")) if cfg.text else (("query", "_query"),):
        out += dense(f"layers/{ours}_mlp/up", f"{layer}.intermediate{theirs}.dense")
        out += dense(f"layers/{ours}_mlp/down", f"{layer}.output{theirs}.dense")
        out += norm(f"layers/{ours}_norm", f"{layer}.output{theirs}.LayerNorm")
    if cfg.queries is not None:
        out.append(Rule("queries", f"{prefix}query_tokens", ones(1)))
    if cfg.vocab is not None:
        out.append(Rule("words", f"{text}word_embeddings.weight"))
        out.append(Rule("positions", f"{text}position_embeddings.weight"))
    if cfg.outputs is not None:
        out += dense("projection", f"{prefix}language_projection")
    return out


def heads(cfg: qformer_heads.Config, prefix: str = "", family: Literal["blip_2", "lavis"] = "blip_2") -> list[Rule]:
    """The table of the first stage's heads, in Blip2ForImageTextRetrieval and in LAVIS' Blip2Qformer."""
    suffix = "proj" if family == "lavis" else "projection"
    out = [
        *dense("vision", f"{prefix}vision_{suffix}"),
        *dense("text", f"{prefix}text_{suffix}"),
        *dense("match", f"{prefix}itm_head"),
    ]
    if cfg.vocab is not None:
        theirs = f"{prefix}Qformer.cls.predictions"
        out += dense("language/transform", f"{theirs}.transform.dense")
        out += norm("language/norm", f"{theirs}.transform.LayerNorm")
        out.append(Rule("language/bias", f"{theirs}.bias"))
    return out


def config(
    raw: dict, *, queries: int | None = None, outputs: int | None = None, text: bool = False, words: bool = False
) -> qformer.Config:
    """Our Config of a `qformer_config`.

    Args:
      raw: the dictionary.
      queries: `num_query_tokens`, which the whole model's config holds.
      outputs: width of the language model, where there is a `language_projection`.
      text: text has MLPs, although the dictionary may not say so (InstructBLIP).
      words: the model has a word table.

    Raises:
      InputError: a size is none, the activation is none of ours, or positions are not absolute.
    """
    if config_json.get(raw, "position_embedding_type", "absolute") != "absolute":
        raise InputError(
            f"config.json says 'position_embedding_type' is {raw['position_embedding_type']!r}; mmjax's Q-Former has "
            f"absolute ones."
        )
    text = text or words or bool(raw.get("use_qformer_text_input", False))
    return qformer.Config(
        inputs=config_json.size(raw, "encoder_hidden_size", 1408),
        width=config_json.size(raw, "hidden_size", 768),
        queries=queries,
        layers=config_json.size(raw, "num_hidden_layers", 12),
        heads=config_json.size(raw, "num_attention_heads", 12),
        hidden=config_json.size(raw, "intermediate_size", 3072),
        outputs=outputs,
        text=text,
        vocab=config_json.size(raw, "vocab_size", 30522) if words else None,
        positions=config_json.size(raw, "max_position_embeddings", 512),
        cross_every=config_json.size(raw, "cross_attention_frequency", 2),
        activation=config_json.activation(raw),
        epsilon=config_json.get(raw, "layer_norm_eps", 1e-12),
    )


def read(raw: dict, keys: frozenset[str]) -> Found:
    """A directory of Blip2QFormerModel or InstructBlipQFormerModel: neither holds queries, they are handed over.

    Raises:
      InputError: a value of the config is none of ours.
    """
    kind = raw.get("model_type")
    if kind not in ("blip_2_qformer", "instructblip_qformer"):
        raise InputError(
            f"config.json is of model_type {kind!r}; a Q-Former's is blip_2_qformer or instructblip_qformer."
        )
    instruct = kind != "blip_2_qformer"
    cfg = config(raw, words=instruct)
    table = rules(cfg, family="instructblip" if instruct else "blip_2", alone=True)
    return Found(qformer, cfg, tuple(table), DROPPED)


def _attention(ours: str, theirs: str, inner: str) -> list[Rule]:
    out = norm(f"{ours}/norm", f"{theirs}.output.LayerNorm") + dense(f"{ours}/out", f"{theirs}.output.dense", inputs=2)
    for a, b in (("q", "query"), ("k", "key"), ("v", "value")):
        out += dense(f"{ours}/{a}", f"{theirs}.{inner}.{b}")
    return out
