"""The processor of InternVL: tiles and the whole, their tokens between `<img>` and `</img>`."""

from collections.abc import Mapping
from typing import Any

from mmjax.convert.processor.family import Family
from mmjax.convert.processor.files import Found, Settings
from mmjax.convert.processor.images import Tower
from mmjax.convert.processor.videos import stills
from mmjax.core.errors import InputError
from mmjax.sequence import interleave
from mmjax.tokenizers.convention import Frames
from mmjax.tokenizers.parts import Around, Symbol
from mmjax.tokenizers.resolution import Policy


def _markers(found: Found) -> Mapping[str, str]:
    video = {"video": found.named["video_token"]} if "video_token" in found.named else {}
    return {"image": found.named.get("context_image_token", "<IMG_CONTEXT>")} | video


def _writing(found: Found) -> Mapping[str, Any]:
    start, end = found.named.get("start_image_token", "<img>"), found.named.get("end_image_token", "</img>")
    around = Around((Symbol(start),), (Symbol(end),))
    # Tokens of videos carry the id of those of pictures.
    return {"image": around, "frames": Frames("Frame{number}: ", around, ("\n",)), "placeholder_video": ""}


def _tower(config: Settings) -> Tower:
    inner = config.part("vision_config")
    patch, size = _square(inner, "patch_size", 14), _square(inner, "image_size", 448)
    ratio = config.number("downsample_ratio", 0.5)
    merge = round(1 / ratio) if 1e-3 < ratio <= 1 else 0
    if not merge or merge * ratio != 1 or size // patch < merge:
        raise InputError(
            f"{config.where} says 'downsample_ratio' is {ratio:g}; one over it must be a whole number, of at most "
            f"{size // patch} patches"
        )
    return Tower(patch, merge, size=size)


def _square(of: Settings, key: str, default: int) -> int:
    """A size given as one number or as two equal ones."""
    value = of.values.get(key)
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        of = Settings({key: value[0]}, of.where)
    return of.whole(key, default, most=2**13)


def _check(found: Found, policy: Policy, tower: Tower) -> None:
    """Raises InputError where a tile is counted as other tokens than the connector makes of it."""
    side, of = tower.size // tower.patch // tower.merge, found.processor
    if of.whole("image_seq_length", 256) != side * side:
        raise InputError(
            f"{of.where} says 'image_seq_length' is {of.whole('image_seq_length', 256)}, and the connector makes "
            f"{side * side} tokens of a tile; use the files that belong together"
        )


FAMILIES: dict[str, Family] = {
    "internvl": Family(
        ("GotOcr2ImageProcessor",),
        _markers,
        _tower,
        lambda config, tower: interleave.Config(position="sequential", merge=tower.merge),
        writing=_writing,
        around=("image",),
        check=_check,
        videos=lambda found, tower: stills(found.videos, tower),
    ),
}
