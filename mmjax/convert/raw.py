"""Reading config.json: values that must be there, and the ones of which we know only some."""

import math
from typing import Any

from mmjax.core.errors import InputError
from mmjax.nn import mlp
from mmjax.nn.patch_embed import HALF as HALF
from mmjax.nn.patch_embed import IMAGENET as IMAGENET
from mmjax.nn.patch_embed import OPENAI as OPENAI

ACTIVATIONS: dict[str, mlp.Activation] = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}


def get(raw: dict, key: str, default: Any = None) -> Any:
    """raw[key], or the default that the family's own config has.

    Raises:
      InputError: it is not there and has no default.
    """
    value = raw.get(key, default)
    if value is None:
        raise InputError(f"config.json has no {key!r}; use the config.json that belongs to the weights.")
    return value


def size(raw: dict, key: str, default: int | None = None) -> int:
    """A positive whole number.

    Raises:
      InputError: it is something else.
    """
    value = get(raw, key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise InputError(
            f"config.json says {key!r} is {value!r}, which is no size; it must be a positive whole number."
        )
    return value


def number(raw: dict, key: str, default: float | None = None) -> float:
    """A positive real number.

    Raises:
      InputError: it is something else.
    """
    value = get(raw, key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InputError(f"config.json says {key!r} is {value!r}, which must be a positive number.")
    return float(value)


def flag(raw: dict, key: str, default: bool) -> bool:
    """True or false; null is false.

    Raises:
      InputError: it is something else.
    """
    value = raw.get(key, default)
    if value is not None and not isinstance(value, bool):
        raise InputError(f"config.json says {key!r} is {value!r}, which must be true or false.")
    return bool(value)


def part(raw: dict, key: str, default: dict | None = None) -> dict:
    """The config of a part of the model.

    Raises:
      InputError: it is none.
    """
    value = get(raw, key, default)
    if not isinstance(value, dict):
        raise InputError(f"config.json says {key!r} is {value!r}, which must be an object.")
    return value


def refuse(raw: dict, key: str, *fine: Any) -> None:
    """Raises InputError where raw[key] is there and is none of the values with which a model is what we compute."""
    if key in raw and raw[key] is not None and raw[key] not in fine:
        only = f"; mmjax computes {' and '.join(map(repr, fine))} alone" if fine else ", which mmjax does not compute"
        raise InputError(f"config.json says {key!r} is {str(raw[key])[:100]!r}{only}.")


def square(raw: dict, key: str, default: int) -> int:
    """A size given as one number or as two equal ones.

    Raises:
      InputError: it is something else.
    """
    value = get(raw, key, default)
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    return size({key: value}, key)


def activation(raw: dict, key: str = "hidden_act", default: str = "gelu") -> mlp.Activation:
    """The activation function.

    Raises:
      InputError: it is none of those we have.
    """
    value = get(raw, key, default)
    if value not in ACTIVATIONS:
        raise InputError(f"config.json says {key!r} is {value!r}; mmjax has {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[value]


def heads(width: int, count: int) -> int:
    """Values per head.

    Raises:
      InputError: the width does not divide.
    """
    if width % count:
        raise InputError(f"config.json has a width of {width} and {count} heads, which do not divide it evenly.")
    return width // count


def side(patches: int) -> int:
    """The side of a square of so many patches.

    Raises:
      InputError: it is no square.
    """
    out = math.isqrt(patches)
    if out * out != patches:
        raise InputError(f"config.json has a position table of {patches} patches, which is no square.")
    return out


def labels(raw: dict) -> int:
    """How many a classifier has; transformers leaves its own default of 2 out of the file."""
    return len(raw.get("id2label") or ()) or raw.get("num_labels") or 2
