"""Text decoders: Llama 2 and 3, SmolLM2, Mistral, Qwen2, Qwen2.5, Qwen3, Gemma 1 to 3, and Qwen-VL's text models."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from mmjax.convert import raw
from mmjax.convert.families import blocks, rope
from mmjax.convert.found import Found
from mmjax.convert.rules import Rule
from mmjax.core.errors import InputError
from mmjax.models import decoder
from mmjax.nn import rope as rotary
from mmjax.nn import transformer

DROPPED = {r".*\.rotary_emb\.inv_freq": "a buffer: the rotary frequencies, which the config gives"}
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Family:
    """What transformers 5.23 takes where config.json is silent, and what is always so in a family.

    kv: of None as many as heads. head: of None, width over heads. positions: `max_position_embeddings`.
    qkv_bias: of None, `attention_bias` says it of q, k, v and the output; else it is as here and the output has none.
    """

    vocab: int
    width: int
    hidden: int
    layers: int = 32
    heads: int = 32
    kv: int | None = 32
    head: int | None = None
    positions: int = 32768
    epsilon: float = 1e-6
    theta: float = 10_000.0
    tied: bool = False
    qkv_bias: bool | None = None
    mlp_bias: bool = False
    qk_norm: bool = False
    gemma: int = 0
    mrope: str = ""


_GEMMA2 = Family(256_000, 2304, 9216, 26, 8, 4, 256, 8192, tied=True, gemma=2)
_QWEN2 = Family(151_936, 4096, 22016, qkv_bias=True)
_QWEN2_VL = Family(152_064, 8192, 29568, 80, 64, 8, None, 32768, 1e-5, 1e6, qkv_bias=True, mrope="sections")
_QWEN3 = Family(151_936, 4096, 22016, head=128, qk_norm=True)
FAMILIES = {
    "llama": Family(32_000, 4096, 11008, kv=None, positions=2048, mlp_bias=True),
    "mistral": Family(32_000, 4096, 14336, kv=8, positions=131_072, qkv_bias=False),
    "qwen2": _QWEN2,
    "qwen3": _QWEN3,
    "gemma": Family(256_000, 3072, 24576, 28, 16, 16, 256, 8192, tied=True, gemma=1),
    "gemma2": _GEMMA2,
    "gemma3_text": replace(_GEMMA2, vocab=262_208, positions=131_072, theta=1e6, qk_norm=True, gemma=3),
    "qwen2_vl_text": _QWEN2_VL,
    "qwen2_5_vl_text": _QWEN2_VL,
    "mllama_text_model": Family(
        128_256, 4096, 14336, 40, kv=8, positions=131_072, epsilon=1e-5, theta=5e5, qkv_bias=False
    ),
    "qwen3_vl_text": replace(_QWEN3, positions=128_000, theta=500_000.0, mrope="interleaved"),
}
NAMES = blocks.Names(
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    out="self_attn.o_proj",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    q_norm="self_attn.q_norm",
    k_norm="self_attn.k_norm",
)
GEMMA2_NAMES = replace(
    NAMES,
    mlp_norm="pre_feedforward_layernorm",
    attention_post_norm="post_attention_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)


def read(config: dict, keys: frozenset[str]) -> Found:
    """A directory of LlamaForCausalLM and its kin."""
    family = FAMILIES[config["model_type"]]

    def found(tied: bool) -> Found:
        cfg = configure(config, tied)
        return Found(decoder, cfg, tuple(rules(cfg, "model.", HEAD, keys)), DROPPED)

    return tie(found, raw.flag(config, "tie_word_embeddings", family.tied), keys, TABLE, HEAD)


def tied(config: dict, text: dict, keys: frozenset[str], head: str, nested: bool, default: bool = False) -> bool:
    """Whether the head of a model around a text model is its token table.

    Args:
      config, text: of the whole, and of the text model.
      keys: of the file; one without a head ties what either config says.
      head: its name.
      nested: whether transformers asks the text model's config too.
      default: what it takes where the whole's config says nothing.
    """
    family = FAMILIES.get(text.get("model_type"), FAMILIES["llama"])
    whole, inner = (raw.flag(c, "tie_word_embeddings", d) for c, d in ((config, default), (text, family.tied)))
    return whole or (inner and (nested or head not in keys))


def tie(found: Callable[[bool], Found], tied: bool, keys: frozenset[str], table: str, head: str) -> Found:
    """What there is of a model whose config says that its head is the token table, or is not.

    A file of a tied model may have both, and transformers then looks: if they are equal the model is tied, if not it
    is not (PreTrainedModel.tie_weights).

    Args:
      found: of whether it is tied, what is there.
      tied: what the config says.
      keys: of the file.
      table, head: the names of the two tensors.
    """
    if not tied or not {table, head} <= keys:
        return found(tied)
    one = found(True)
    copies, why = {**one.copies, head: table}, {head.replace(".", r"\."): "a copy of the token table"}
    return replace(one, dropped={**one.dropped, **why}, copies=copies, otherwise=found(False))


def configure(config: dict, tied: bool) -> decoder.Config:
    """The decoder that the config of a text model (its model_type is one of FAMILIES) describes.

    Raises:
      InputError: the config is of no family, or says something that we do not compute.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise InputError(
            f"config.json says the text model's model_type is {str(kind)[:100]!r}; mmjax.convert knows "
            f"{', '.join(FAMILIES)}."
        )
    family = FAMILIES[kind]
    raw.refuse(config, "quantization_config")
    raw.refuse(config, "use_bidirectional_attention", False)
    width = raw.size(config, "hidden_size", family.width)
    heads = raw.size(config, "num_attention_heads", family.heads)
    # What is null is what is left out, but for heads of keys: they are as many as those of queries then.
    given = {k: v for k, v in config.items() if v is not None}
    head = raw.size(given, "head_dim", family.head) if "head_dim" in given or family.head else raw.heads(width, heads)
    kv = family.kv if "num_key_value_heads" not in config else None
    layers = raw.size(config, "num_hidden_layers", family.layers)
    window, windowed = windows(config, kind, layers)
    bias = family.mlp_bias and raw.flag(config, "mlp_bias", False)
    qkv_bias, out_bias = family.qkv_bias, False
    if qkv_bias is None:
        qkv_bias = out_bias = raw.flag(config, "attention_bias", False)
    of = transformer.Config(
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=raw.size(given, "num_key_value_heads", kv or heads),
        head=head,
        hidden=raw.size(config, "intermediate_size", family.hidden),
        activation=_activation(config, family),
        bias=bias,
        qkv_bias=None if qkv_bias == bias else qkv_bias,
        out_bias=None if out_bias == bias else out_bias,
        epsilon=raw.number(config, "rms_norm_eps", family.epsilon),
        qk_norm="head" if family.qk_norm else "none",
        windowed=windowed,
        **_rope(config, family, head),
        **_gemma_blocks(config, family),
    )
    if of.heads % of.kv_heads:
        raise InputError(f"config.json has {of.heads} heads and {of.kv_heads} of keys, which do not divide them.")
    more = {"embed_scale": width**0.5, "softcap": _cap(config, "final_logit_softcapping", family)}
    more = more if family.gemma else {}
    return decoder.Config(
        raw.size(config, "vocab_size", family.vocab), of, tied, **({"window": window} if window else {}), **more
    )


def _activation(config: dict, family: Family) -> str:
    if not family.gemma:
        return raw.activation(config, default="silu")
    key = "hidden_act" if family.gemma == 1 else "hidden_activation"
    found = raw.activation(config, key, "gelu_pytorch_tanh")
    return "gelu_tanh" if family.gemma == 1 and found == "gelu" else found  # so meant in Gemma 1's first files


def _cap(config: dict, key: str, family: Family) -> float | None:
    if family.gemma == 3:
        raw.refuse(config, "attn_logit_softcapping")  # transformers does not read it there
    if family.gemma < 2:
        return None
    default = {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}[key] if family.gemma == 2 else None
    value = config.get(key, default)
    return None if value is None else raw.number({key: value}, key)


def _gemma_blocks(config: dict, family: Family) -> dict:
    if not family.gemma:
        return {}
    if family.gemma == 1:
        return {"norm_offset": 1.0}
    return {
        "norm_offset": 1.0,
        "post_norm": True,
        "softcap": _cap(config, "attn_logit_softcapping", family),
        "query_scale": raw.number(config, "query_pre_attn_scalar", 256.0) ** -0.5,
    }


def _rope(config: dict, family: Family, head: int) -> dict[str, rotary.Config]:
    given, base = rope.parameters(config), (head, family.theta, family.positions)
    if family.mrope:
        default = (16, 24, 24) if family.mrope == "sections" else (24, 20, 20)
        sections = rope.sections(given, default, head)
        return {"rope": rope.configure(config, given, *base, sections=sections, layout=family.mrope)}
    if family.gemma < 3:
        return {"rope": rope.configure(config, given, *base)}
    kinds = ("full_attention", "sliding_attention")
    if config.get("rope_scaling"):  # hub files: of the full blocks alone
        given = {"full_attention": given}
    if not set(given) <= set(kinds):
        raise InputError(f"config.json says 'rope_parameters' have {sorted(given)}; Gemma 3 has them for {kinds}.")
    full, sliding = (given.get(kind) or {} for kind in kinds)
    local = raw.number(config, "rope_local_base_freq", 10_000.0)
    plain = {k: v for k, v in config.items() if k != "rope_theta"}
    return {
        "rope": rope.configure(config, full, *base),
        "window_rope": rope.configure(plain, sliding, head, local, family.positions),
    }


def windows(config: dict, kind: str, layers: int) -> tuple[int, tuple[int, ...]]:
    """The sliding window of a text model, 0 for none, and the blocks that have it.

    Raises:
      InputError: a kind of attention that we do not have, or a window that is no size.
    """
    if kind in ("llama", "gemma", "qwen3_vl_text", "mllama_text_model"):
        return 0, ()
    window = config.get("sliding_window", 4096)
    if kind.startswith("qwen") and not raw.flag(config, "use_sliding_window", False):
        window = None
    types = config.get("layer_types")
    if kind == "mistral":
        sliding = tuple(range(layers)) if window is not None else ()
    elif types is not None:
        if not isinstance(types, list) or len(types) != layers:
            raise InputError(f"config.json has 'layer_types' that are not one for each of {layers} layers.")
        for one in types:
            raw.refuse({"layer_types": one}, "layer_types", "full_attention", "sliding_attention")
        sliding = tuple(i for i, one in enumerate(types) if one == "sliding_attention")
    elif kind.startswith("gemma"):
        pattern = 2 if kind == "gemma2" else raw.size(config, "sliding_window_pattern", 6)
        sliding = tuple(i for i in range(layers) if (i + 1) % pattern)
    else:
        first = raw.get(config, "max_window_layers", 80 if "vl" in kind else 28)
        sliding = tuple(i for i in range(layers) if window is not None and i >= first)
    if not sliding:
        return 0, ()
    return raw.size({"sliding_window": window}, "sliding_window"), sliding


def rules(cfg: decoder.Config, prefix: str, head: str, keys: frozenset[str] = frozenset()) -> list[Rule]:
    """The table of a decoder whose tensors begin with `prefix`, and whose head is called `head`.

    A tied model's file may have the table under the head's name alone, among `keys`.
    """
    table = f"{prefix}embed_tokens.weight"
    out = [Rule("embed", head if cfg.tied and table not in keys and head in keys else table)]
    names = GEMMA2_NAMES if getattr(cfg.blocks, "post_norm", False) else NAMES
    out += blocks.blocks(cfg.blocks, "blocks", f"{prefix}layers.{{}}.", names)
    out += blocks.norm("norm", f"{prefix}norm", "rms")
    return out if cfg.tied else [*out, Rule("head", head)]
