"""PaliGemma and PaliGemma 2, Gemma 3, DeepSeek-VL: SigLIP's whole tower, a connector, a text decoder.

What they do not share, beside sizes, is who sees whom, which is no part of a model here (sequence.interleave, `see`):
PaliGemma's prefix, Gemma 3's pictures, and causal in DeepSeek-VL.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from mmjax.connectors import Connector, linear, mlp, pool
from mmjax.convert import raw
from mmjax.convert.families import connectors, decoder, siglip
from mmjax.convert.families.blocks import dense
from mmjax.convert.families.clip import prefixed
from mmjax.convert.found import Found
from mmjax.convert.rules import Rule
from mmjax.core.errors import InputError
from mmjax.encoders import vit
from mmjax.models import decoder as text_model
from mmjax.models import vlm
from mmjax.nn import norm

Names = tuple[str, str, str, str]  # what tensors of tower, connector and text begin with, and the head's name
HUB: Names = ("vision_tower.", "multi_modal_projector.", "language_model.model.", "language_model.lm_head.weight")
MEMORY: Names = ("model.vision_tower.", "model.multi_modal_projector.", "model.language_model.", "lm_head.weight")
DEEPSEEK: Names = ("model.vision_model.", "model.aligner.", "model.language_model.", "lm_head.weight")


@dataclass(frozen=True)
class Family:
    """connector: its config, of the whole config.json and of tower and decoder; and its table, of a prefix.

    vision, text: the configs of the parts that config.json leaves out (transformers 5.23). texts: the text models.
    image: the id where pictures go. names: of files, the last ones where there is no file.
    adapted: the decoder with what config.json does not say of it.
    """

    connector: Callable[[dict, vit.Config, text_model.Config], Connector]
    rules: Callable[[Connector, str], list[Rule]]
    image: int
    texts: tuple[str, ...]
    vision: dict = field(default_factory=dict)
    text: dict = field(default_factory=dict)
    names: tuple[Names, ...] = (MEMORY, HUB)
    adapted: Callable[[text_model.Config], text_model.Config] = lambda cfg: cfg


def _paligemma(config: dict, seen: vit.Config, text: text_model.Config) -> linear.Config:
    outputs = raw.size(config, "projection_dim", 2048)  # vision_config's own is not read
    if outputs != text.blocks.width:
        raise InputError(
            f"config.json says 'projection_dim' is {outputs}, and the text model is {text.blocks.width} wide; they "
            f"must be equal."
        )
    return linear.Config(seen.blocks.width, outputs)


def _prefixed(cfg: text_model.Config) -> text_model.Config:
    """PaliGemma 2: in transformers tokens of the prefix see all of it, whatever the window of their block.

    Its positions count from 1, which rotary embeddings do not see but where frequencies depend on the length.
    """
    rope = cfg.blocks.rope
    if rope is not None and rope.needs_length:
        raise InputError(
            f"config.json scales rotary positions by the length of the text ({type(rope.scaling).__name__}), which "
            f"mmjax does not compute for PaliGemma."
        )
    return replace(cfg, window_ahead=False) if cfg.window else cfg


def _gemma3(config: dict, seen: vit.Config, text: text_model.Config) -> pool.Config:
    tokens, patches = raw.size(config, "mm_tokens_per_image", 256), seen.table.rows
    side = math.isqrt(tokens)
    if side * side != tokens or patches % side:
        raise InputError(
            f"config.json says 'mm_tokens_per_image' is {tokens}, which {patches} × {patches} patches cannot be pooled "
            f"to in equal squares."
        )
    width = seen.blocks.width
    normed = norm.Config(width, "rms", seen.blocks.epsilon, offset=1.0)
    return pool.Config(patches // side, norm=normed, outputs=text.blocks.width, inputs=width)


def _aligner(cfg: mlp.Config, prefix: str) -> list[Rule]:
    return dense("up", f"{prefix}linear1") + dense("down", f"{prefix}linear2")


SO400M = {"hidden_size": 1152, "intermediate_size": 4096, "patch_size": 14, "image_size": 224, "vision_use_head": False}
SO400M |= {"num_hidden_layers": 27, "num_attention_heads": 16}
GEMMA_2B = {"hidden_size": 2048, "num_hidden_layers": 18, "intermediate_size": 16384, "num_attention_heads": 8}
GEMMA_2B |= {"num_key_value_heads": 1, "vocab_size": 257_152, "model_type": "gemma"}
FAMILIES = {
    "paligemma": Family(
        _paligemma,
        lambda cfg, prefix: connectors.paligemma(cfg, f"{prefix}linear."),
        256_000,
        ("gemma", "gemma2"),
        SO400M,
        GEMMA_2B,
        adapted=_prefixed,
    ),
    "gemma3": Family(_gemma3, connectors.gemma3, 262_144, ("gemma3_text",)),
    "deepseek_vl": Family(
        lambda config, seen, text: mlp.Config(seen.blocks.width, text.blocks.width),
        _aligner,
        100_015,
        ("llama",),
        names=(DEEPSEEK,),
    ),
}


def read(config: dict, keys: frozenset[str]) -> Found:
    """A directory of PaliGemmaForConditionalGeneration, Gemma3For… or DeepseekVLFor…

    Files of the first two name their tensors `language_model.model.…` (hub files, and what transformers 5 writes) or
    `model.language_model.…` (what it has in memory); DeepSeek-VL's have the latter alone.
    """
    kind = config["model_type"]
    if kind == "deepseek_vl_hybrid":
        raise InputError(
            "config.json says 'model_type' is 'deepseek_vl_hybrid' (DeepSeek-VL-7B), whose second encoder, SAM's at "
            "1,024 pixels, mmjax does not have; use deepseek-vl-1.3b."
        )
    family = FAMILIES[kind]
    config = {"tie_word_embeddings": True} | config  # as transformers has it
    at = next((n for n in family.names if any(k.startswith(n[2]) for k in keys)), family.names[-1])
    seen, seen_rules, rest = tower(config, keys, at[0], family.vision)
    text = text_config(config, family)

    def found(tied: bool) -> Found:
        language = family.adapted(decoder.configure(text, tied))
        connector = family.connector(config, seen, language)
        cfg = vlm.Config(seen, connector, language, placeholder=placeholder(config, family.image))
        table = prefixed("vision", seen_rules)
        table += prefixed("connector", family.rules(connector, at[1]))
        table += prefixed("decoder", decoder.rules(language, at[2], at[3], keys))
        return Found(vlm, cfg, tuple(table), decoder.DROPPED | siglip.DROPPED, rest)

    tied = decoder.tied(config, text, keys, at[3], nested=False)
    return decoder.tie(found, tied, keys, f"{at[2]}embed_tokens.weight", at[3])


def text_config(config: dict, family: Family) -> dict:
    """The config of the text model.

    PaliGemma sets `use_bidirectional_attention`, and means its prefix: its masks come from elsewhere.
    """
    text = {"model_type": family.texts[0]} | raw.part(config, "text_config", family.text)
    if text["model_type"] not in family.texts:
        raise InputError(
            f"config.json says the text model's model_type is {str(text['model_type'])[:100]!r}; "
            f"{config['model_type']} has {' or '.join(family.texts)}."
        )
    if config["model_type"] == "gemma3":
        raw.refuse(text, "final_logit_softcapping")  # which transformers has in models of text alone
    if config["model_type"] == "paligemma":
        raw.flag(text, "use_bidirectional_attention", True)
        text = {k: v for k, v in text.items() if k != "use_bidirectional_attention"}
    return text


def placeholder(config: dict, default: int) -> int:
    """The id where pictures go: `image_token_index`, or `image_token_id`."""
    return raw.size(config, "image_token_index" if "image_token_index" in config else "image_token_id", default)


def tower(
    config: dict, keys: frozenset[str], prefix: str, left_out: dict
) -> tuple[vit.Config, list[Rule], dict[str, str]]:
    """SigLIP's features behind its last norm, their table, and its pooling head, which nothing reads.

    Raises:
      InputError: another tower.
    """
    given = raw.part(config, "vision_config", left_out)
    raw.refuse(given, "model_type", "siglip_vision_model")
    cfg = replace(siglip.configure_vision(given, "siglip"), head=None)
    inner = "vision_model." if not keys or any(k.startswith(f"{prefix}vision_model.") for k in keys) else ""
    rest = {rf"{re.escape(prefix + inner)}head\..*": "a pooled picture, where features are used"}
    return cfg, siglip.vision_rules(cfg, prefix + inner, "siglip"), rest
