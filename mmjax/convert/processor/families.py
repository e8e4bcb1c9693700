"""Whose processors mmjax has: every family by the model_type in config.json, one file each beside this one."""

from mmjax.convert.processor import (
    blip,
    idefics,
    idefics2,
    internvl,
    kosmos2,
    llava,
    mllama,
    pixtral,
    qwen_vl,
    siglip_vlm,
)
from mmjax.convert.processor.family import Family
from mmjax.convert.processor.files import Found
from mmjax.core.errors import InputError

FAMILIES: dict[str, Family] = {
    **blip.FAMILIES,
    **idefics.FAMILIES,
    **idefics2.FAMILIES,
    **llava.FAMILIES,
    **mllama.FAMILIES,
    **qwen_vl.FAMILIES,
    **internvl.FAMILIES,
    **kosmos2.FAMILIES,
    **pixtral.FAMILIES,
    **siglip_vlm.FAMILIES,
}


def family_of(found: Found) -> Family | None:
    """The family of a directory, None for a model of text; InputError for one that shows pictures and is unknown."""
    name = found.config.text("model_type")
    if name == "llava" and found.config.part("vision_config").text("model_type") == "pixtral":
        return pixtral.PIXTRAL
    if name in FAMILIES:
        return FAMILIES[name]
    if found.images.values or "vision_config" in found.config:
        raise InputError(
            f"{found.config.where} says 'model_type' is {name!r}, whose processor mmjax does not have; it has those of "
            f"{', '.join(FAMILIES)} and of models of text"
        )
    return None
