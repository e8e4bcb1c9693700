"""The processor of Pixtral and Mistral 3: a break after each row of a picture's tokens, an end after the last."""

from collections.abc import Mapping
from typing import Any

from mmjax.convert.processor.family import Family
from mmjax.convert.processor.files import Found, Settings
from mmjax.convert.processor.images import Tower
from mmjax.core.errors import InputError
from mmjax.sequence import interleave
from mmjax.tokenizers.parts import Around, Symbol
from mmjax.tokenizers.resolution import Policy


def _markers(found: Found) -> Mapping[str, str]:
    return {"image": found.processor.text("image_token", "[IMG]")}


def _writing(found: Found) -> Mapping[str, Any]:
    of = found.processor
    end = Symbol(of.text("image_end_token", "[IMG_END]"))
    return {"image": Around((), (end,)), "newline": of.text("image_break_token", "[IMG_BREAK]")}


def tower(config: Settings) -> Tower:
    inner = config.part("vision_config")
    third = config.text("model_type") == "mistral3"
    merge = config.whole("spatial_merge_size", 2, most=64) if third else 1
    return Tower(inner.whole("patch_size", 16 if inner.values or not third else 14, most=2**10), merge)


def _check(found: Found, policy: Policy, tower: Tower) -> None:
    """Raises InputError where the processor counts other tokens than the model makes."""
    of = found.processor
    for key, default, value in (("patch_size", 16, tower.patch), ("spatial_merge_size", 1, tower.merge)):
        if of.whole(key, default) != value:
            raise InputError(
                f"{of.where} says {key!r} is {of.whole(key, default)}, and config.json {value}; use the files that "
                f"belong together"
            )


PIXTRAL = Family(
    ("PixtralImageProcessor",),
    _markers,
    tower,
    lambda config, tower: interleave.Config(position="sequential", merge=tower.merge),
    writing=_writing,
    around=("image",),
    check=_check,
)
FAMILIES: dict[str, Family] = {"mistral3": PIXTRAL}
