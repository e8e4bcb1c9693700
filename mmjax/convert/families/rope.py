"""Rotary embeddings of text models as config.json describes them, in the words of hub files and of transformers 5.

Hub files have `rope_theta` beside `rope_scaling` {"type" or "rope_type", "factor", …}; transformers 5 writes all of it
into `rope_parameters`. Which wins is as in transformers 5.23 (modeling_rope_utils.py).
"""

from typing import Any

from mmjax.convert import raw
from mmjax.core.errors import InputError
from mmjax.nn import rope
from mmjax.nn.rope_scaling import Dynamic, Linear, Llama3, LongRope, Scaling, Yarn

KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


def parameters(config: dict) -> dict:
    """`rope_scaling` or `rope_parameters`, whichever says something."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    return raw.part(config, key, {})


def configure(config: dict, given: dict, head: int, theta: float, positions: int, **variant: Any) -> rope.Config:
    """The rotary embedding of heads of `head` values.

    Args:
      config: of the text model.
      given: what `parameters` found in it.
      head: values per head.
      theta: the base, where neither of the two says it.
      positions: `max_position_embeddings`, where config does not say it.
      variant: further fields of rope.Config (M-RoPE's sections and layout).

    Raises:
      InputError: a kind of scaling that we do not have, or one that lacks a number.
    """
    raw.refuse(config | given, "partial_rotary_factor", 1.0)
    if head % 2:
        raise InputError(f"config.json gives heads of {head} values; rotary positions need an even number.")
    base = raw.number(given, "rope_theta", raw.number(config, "rope_theta", theta))
    return rope.Config(
        head,
        **({"sections": (head // 2,)} | variant),
        theta=base,
        scaling=scaling(given, raw.size(config, "max_position_embeddings", positions)),
    )


def scaling(given: dict, positions: int) -> Scaling | None:
    """How frequencies change for long contexts, of a model of so many positions."""
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in KINDS and kind != "mrope":
        raise InputError(f"config.json says the rope_type is {str(kind)[:100]!r}; mmjax has {', '.join(KINDS)}.")
    if kind in ("default", "mrope"):
        return None
    if kind == "linear":
        return Linear(raw.number(given, "factor"))
    if kind == "dynamic":
        return Dynamic(raw.number(given, "factor"), positions)
    original = raw.size(given, "original_max_position_embeddings", positions)
    if kind == "llama3":
        low, high = raw.number(given, "low_freq_factor"), raw.number(given, "high_freq_factor")
        return Llama3(raw.number(given, "factor"), low, high, original)
    given = {k: v for k, v in given.items() if v is not None}
    factor = raw.number(given, "factor", positions / original)
    own = raw.number(given, "attention_factor") if "attention_factor" in given else None
    if kind == "longrope":
        short, long = (_numbers(given, key) for key in ("short_factor", "long_factor"))
        return LongRope(short, long, original, factor, own)
    mscale, all_dim = (
        raw.number(given, key) if given.get(key) else None  # 0 is none
        for key in ("mscale", "mscale_all_dim")
    )
    return Yarn(
        factor,
        original,
        raw.number(given, "beta_fast") if given.get("beta_fast") else 32.0,
        raw.number(given, "beta_slow") if given.get("beta_slow") else 1.0,
        own,
        mscale,
        all_dim,
        raw.flag(given, "truncate", True),
    )


def _numbers(given: dict, key: str) -> tuple[float, ...]:
    value = raw.get(given, key)
    if not isinstance(value, list) or not value:
        raise InputError(f"config.json says {key!r} is {str(value)[:100]!r}, which is no list of numbers.")
    return tuple(raw.number({key: x}, key) for x in value)


def sections(given: dict, default: tuple[int, int, int], head: int) -> tuple[int, ...]:
    """M-RoPE's pairs for time, height and width (`mrope_section`).

    Raises:
      InputError: they are not three, or do not add up to half a head.
    """
    found = given.get("mrope_section", list(default))
    if not isinstance(found, list) or len(found) != 3 or sum(raw.size({"": n}, "") for n in found) * 2 != head:
        raise InputError(
            f"config.json says 'mrope_section' is {str(found)[:100]}; it must be three sizes that add up to "
            f"{head // 2}, half a head."
        )
    return tuple(found)
