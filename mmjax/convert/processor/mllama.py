"""The processor of Llama 3.2 Vision: pictures on canvases of whole tiles, which text looks at from beside."""

from collections.abc import Mapping

from mmjax.convert.families.mllama import UNSAID
from mmjax.convert.processor.family import Family
from mmjax.convert.processor.files import Found, Settings
from mmjax.convert.processor.images import Tower
from mmjax.sequence import interleave


def _markers(found: Found) -> Mapping[str, str]:
    return {"image": found.named.get("image_token", "<|image|>")}


def _tower(config: Settings) -> Tower:
    inner = config.part("vision_config")
    patch, size = inner.whole("patch_size", 14, most=2**10), inner.whole("image_size", 448, most=2**13)
    return Tower(patch, size=size // patch * patch, tiles=inner.whole("max_num_tiles", 4, most=64))


def _media_tokens(config: Settings) -> int:
    """Of a picture, of any size: each of its tiles has a class token and its patches."""
    tower = _tower(config)
    return tower.tiles * ((tower.size // tower.patch) ** 2 + 1)


def _sequence(config: Settings, tower: Tower) -> interleave.Config:
    side = tower.size // tower.patch
    return interleave.Config(cross="last_images", position="sequential", window=side, canvas=tower.tiles)


FAMILIES: dict[str, Family] = {
    "mllama": Family(
        ("MllamaImageProcessor",),
        _markers,
        _tower,
        _sequence,
        {"media": "before_begin"},
        per_picture=_media_tokens,
        cross=True,
        lead=("<|begin_of_text|>",),
        more=UNSAID,
    ),
}
