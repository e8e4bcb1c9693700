"""A model and where it came from: what config.json says, and the small things that are written again."""

import difflib
import importlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from mmjax.convert.found import Found
from mmjax.convert.header import Header
from mmjax.core import tree
from mmjax.core.errors import InputError
from mmjax.core.strict_json import shown

# The model_type in config.json → the module in mmjax.convert.families that has `read(raw, keys) -> Found`.
FAMILIES: dict[str, str] = {
    "vit": "vit",
    "deit": "vit",
    "dinov2": "vit",
    "dinov2_with_registers": "vit",
    "clip": "clip",
    "clip_vision_model": "clip",
    "clip_text_model": "clip",
    "siglip": "siglip",
    "siglip_vision_model": "siglip",
    "siglip_text_model": "siglip",
    "siglip2": "siglip",
    "siglip2_vision_model": "siglip",
    "siglip2_text_model": "siglip",
    "pixtral": "pixtral",
    "qwen2_vl_vision": "qwen_vision",
    "qwen2_5_vl_vision": "qwen_vision",
    "qwen3_vl_vision": "qwen_vision",
    "qwen3_vl_moe_vision": "qwen_vision",
    "internvl_vision": "internvl",
    "swin": "swin",
    "pvt": "pvt",
    "pvt_v2": "pvt",
    "perceiver": "perceiver",
    "blip_2_qformer": "qformer",
    "instructblip_qformer": "qformer",
    "llama": "decoder",
    "mistral": "decoder",
    "qwen2": "decoder",
    "qwen3": "decoder",
    "gemma": "decoder",
    "gemma2": "decoder",
    "gemma3_text": "decoder",
    "opt": "opt",
    "t5": "t5",
    "blip-2": "blip",
    "instructblip": "blip",
    "llava": "llava",
    "llava_next": "llava",
    "llava_onevision": "llava",
    "internvl": "llava",
    "mistral3": "llava",
    "idefics": "idefics",
    "kosmos-2": "kosmos2",
    "qwen2_vl": "qwen_vl",
    "qwen2_5_vl": "qwen_vl",
    "qwen3_vl": "qwen_vl",
    "mllama": "mllama",
    "paligemma": "siglip_vlm",
    "gemma3": "siglip_vlm",
    "deepseek_vl": "siglip_vlm",
    "deepseek_vl_hybrid": "siglip_vlm",
    "idefics2": "idefics2",
    "idefics3": "idefics2",
    "smolvlm": "idefics2",
}
# Everything that a table makes of a config is at least as long as its layers.
MAX_LAYERS = 10_000


@dataclass(frozen=True)
class Origin:
    """What a directory holds besides parameters: enough to write it again.

    config: the bytes of config.json. raw: what they say. found: what the family's reader made of it. headers, index:
    the layout of the files; none where the model came from no file. kept: small tensors that are no parameters,
    and parameters that the model does not compute with (`found.rest`). lost: the names of the large tensors that are
    no parameters, which are not written again. files: the small files beside the weights.
    """

    config: bytes
    raw: Mapping[str, Any]
    found: Found
    headers: Mapping[str, Header] = field(default_factory=dict)
    index: bytes | None = None
    kept: Mapping[str, Any] = field(default_factory=dict)
    lost: tuple[str, ...] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)

    @classmethod
    def of(cls, config: dict) -> "Origin":
        """For parameters that came from no directory: the config.json that `save` shall write.

        Raises:
          InputError: the family is unknown, or the config is not one of its.
        """
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        raw = json.loads(text)
        return cls(text.encode(), raw, understand(raw, frozenset(), "The config"))


@dataclass(frozen=True)
class Model:
    """A module (`of.spec`, `of.apply`), its Config, its parameters, and where they came from."""

    of: ModuleType
    cfg: Any
    params: dict
    origin: Origin | None = None


def origin_of(model: Model) -> Origin:
    """Where a model came from.

    Raises:
      InputError: from nowhere, or with another config.
    """
    origin = model.origin
    if origin is None:
        raise InputError(
            "This model came from no directory; give it origin=Origin.of(config), with a config.json's dict."
        )
    if (origin.found.of, origin.found.cfg) != (model.of, model.cfg):
        raise InputError(
            "The config of this model is not that of its origin; give it origin=Origin.of(config) with the new one."
        )
    return origin


def understand(raw: Mapping[str, Any], keys: frozenset[str], where: str) -> Found:
    """What the family that config.json names makes of it.

    Args:
      raw: what it says.
      keys: the names of the tensors beside it.
      where: names it in errors.

    Raises:
      InputError: the family is unknown, or the config is not one of its.
    """
    name = raw.get("model_type")
    if not isinstance(name, str):
        raise InputError(f"{where} has no model_type; it must name one of {', '.join(FAMILIES)}")
    if name not in FAMILIES:
        near = difflib.get_close_matches(name[:100], FAMILIES, 1, 0.6)
        hint = f"did you mean {near[0]}? M" if near else "m"
        code = "; the code that its auto_map names is never run" if "auto_map" in raw else ""
        known = f"mjax.convert knows {', '.join(FAMILIES)}{code}"
        raise InputError(f"{where} has the model_type {shown(name)}: {hint}{known}")
    _refuse_depths(raw, where)
    family = importlib.import_module(f"mmjax.convert.families.{FAMILIES[name]}")
    try:
        found = family.read(dict(raw), keys)
        shapes = [n for p in tree.flatten(found.of.spec(found.cfg)).values() for n in p.shape]
        if any(type(n) is not int or n < 0 for n in shapes):
            raise ValueError("a parameter has a size that is none")
        return found
    except InputError:
        raise
    except Exception as error:  # a stranger's values in arithmetic and dataclasses: anything may come of it
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InputError(
            f"{where} cannot be understood as that of a {name} ({why}); compare it with the published one"
        ) from error


def _refuse_depths(raw: Mapping[str, Any], where: str) -> None:
    for key, value in raw.items():
        if isinstance(value, dict):
            _refuse_depths(value, where)
        elif re.search("layers|depth|blocks|stages", key):
            numbers = value if isinstance(value, list) else [value]
            if any(isinstance(n, int | float) and n > MAX_LAYERS for n in numbers):
                raise InputError(f"{where} has {shown(key)} {shown(value)}, where {MAX_LAYERS:,} are allowed")
