"""The processors of Qwen2-VL, Qwen2.5-VL and Qwen3-VL."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from mmjax.convert.processor.family import Family
from mmjax.convert.processor.files import Found, Settings
from mmjax.convert.processor.images import Tower
from mmjax.convert.processor.videos import moving
from mmjax.nn.patch_embed import Colours
from mmjax.sequence import interleave
from mmjax.sequence.positions import MRope
from mmjax.tokenizers.convention import Frames
from mmjax.tokenizers.parts import Around, Symbol
from mmjax.tokenizers.video import Grouped

VISION = Around((Symbol("<|vision_start|>"),), (Symbol("<|vision_end|>"),))


def _qwen_markers(found: Found) -> Mapping[str, str]:
    return {
        "image": found.named.get("image_token", "<|image_pad|>"),
        "video": found.named.get("video_token", "<|video_pad|>"),
    }


def _qwen_tower(patch: int) -> Callable[[Settings], Tower]:
    def tower(config: Settings) -> Tower:
        inner = config.part("vision_config")
        return Tower(
            inner.whole("patch_size", patch, most=2**10),
            inner.whole("spatial_merge_size", 2, most=64),
            inner.whole("temporal_patch_size", 2, most=64),
        )

    return tower


def _qwen_sequence(config: Settings, tower: Tower) -> interleave.Config:
    window = 0
    if config.text("model_type") == "qwen2_5_vl":
        window = config.part("vision_config").whole("window_size", 112) // (tower.patch * tower.merge)
    return interleave.Config(rope=MRope(tower.merge), merge=tower.merge, window=window)


def _qwen_videos(found: Found, tower: Tower) -> tuple[Grouped, Colours]:
    name, per_second = found.config.text("model_type"), 0.0
    if name == "qwen2_5_vl":
        per_second = found.config.part("vision_config").number("tokens_per_second", 4.0)
    return moving(found.videos, tower, name, per_second)


_QWEN = Family(
    ("Qwen2VLImageProcessor",),
    _qwen_markers,
    _qwen_tower(14),
    _qwen_sequence,
    {"image": VISION, "video": VISION},
    videos=_qwen_videos,
)
# A frame of a video stands between markers of its own, its time before it; transformers 5 keeps the outer ones as well.
_STAMPED = {"image": VISION, "video": VISION, "frames": Frames("<{seconds:.1f} seconds>", VISION)}


FAMILIES: dict[str, Family] = {
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": replace(_QWEN, tower=_qwen_tower(16), writing=_STAMPED),
}
