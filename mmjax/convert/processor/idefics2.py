"""The processors of Idefics2, Idefics3 and SmolVLM."""

from collections.abc import Mapping
from dataclasses import replace

from mmjax.convert.processor.family import Family, sequential
from mmjax.convert.processor.files import Found, Settings
from mmjax.convert.processor.images import MOST_TILES, SIDE, Tower, colours, filter_of, kind, size_of, square_of
from mmjax.convert.processor.videos import MOST_FRAMES
from mmjax.core.errors import InputError
from mmjax.core.strict_json import shown
from mmjax.nn.patch_embed import HALF, Colours
from mmjax.sequence import interleave
from mmjax.tokenizers.convention import Convention
from mmjax.tokenizers.conventions import IDEFICS2, IDEFICS3, SMOLVLM
from mmjax.tokenizers.resolution import Policy
from mmjax.tokenizers.slices import Bounded
from mmjax.tokenizers.tiles import Splits
from mmjax.tokenizers.video import Trimmed

TAGS = ("<global-img>", "<row_{row}_col_{column}>")
# What the tokenizers' files may call the tokens that the processors write.
NAMED = {
    "image_boundary_token": "<fake_token_around_image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
}


def _markers(found: Found) -> Mapping[str, str]:
    return {"image": found.named.get("image_token", "<image>")}


def _tower(config: Settings) -> Tower:
    return Tower(config.part("vision_config").whole("patch_size", 32, most=2**10))


def _shuffled(config: Settings) -> Tower:
    return replace(_tower(config), merge=config.whole("scale_factor", 2, most=64))


def _latents(config: Settings) -> int:
    return config.part("perceiver_config").whole("resampler_n_latents", 64, most=2**16)


def _squares(config: Settings, tower: Tower) -> interleave.Config:
    return interleave.Config(position="sequential", merge=tower.merge)


def _bounded(of: Settings, tower: Tower) -> Bounded:
    """Idefics2's: sides within bounds, with or without the picture's quarters."""
    size = size_of(of, "size", {"shortest_edge": 378, "longest_edge": 980}, square=False)
    least, most = size.get("shortest_edge"), size.get("longest_edge")
    if set(size) != {"shortest_edge", "longest_edge"} or not tower.patch <= least <= most <= SIDE:
        raise InputError(
            f"{of.where} says 'size' is {size}; mmjax wants shortest_edge and longest_edge, the first no larger than "
            f"the second, from {tower.patch} to {SIDE:,}"
        )
    return Bounded(tower.patch, least, most, of.flag("do_image_splitting", False), filter_of(of, "bilinear"))


def _splits(of: Settings, tower: Tower) -> Splits:
    """Idefics3's and SmolVLM's: tiles of the picture at a larger size, and the whole at a tile's."""
    size = size_of(of, "size", {"longest_edge": 4 * 364}, square=False)
    longest = square_of(of, "size", size, ("longest_edge",))
    inner = size_of(of, "max_image_size", {"longest_edge": 364}, square=False)
    tile = square_of(of, "max_image_size", inner, ("longest_edge",))
    if tile < tower.patch or tile // tower.patch % tower.merge:
        raise InputError(
            f"{of.where} makes tiles of {tile} pixels, which are no squares of {tower.merge} × {tower.merge} patches "
            f"of {tower.patch}; use the files that belong together"
        )
    if (-(-min(longest, Splits.LARGEST) // tile)) ** 2 > MOST_TILES:
        raise InputError(f"{of.where} makes more than {MOST_TILES} tiles of a picture; no model has so many")
    drop = tile % tower.patch > 0
    return Splits(tower.patch, tile, longest, of.flag("do_image_splitting", True), filter_of(of, "lanczos"), drop)


def _videos(found: Found, tower: Tower) -> tuple[Trimmed, Colours]:
    """SmolVLM's: frames as whole pictures of a tile's size, chosen by `video_sampling` or by fps and num_frames."""
    of = found.videos
    allowed = ("SmolVLMVideoProcessor", "SmolVLMImageProcessor", "Idefics3ImageProcessor")
    name = of.text("video_processor_type") or kind(of, allowed[0])
    if name not in allowed:
        raise InputError(f"{of.where} names the video processor {shown(name)}; SmolVLM has {allowed[0]}")
    if not of.flag("do_resize", True) or of.flag("do_center_crop", False):
        raise InputError(f"{of.where} has do_resize false or do_center_crop, which mmjax does not do for videos")
    fps, most = of.number("fps"), of.whole("num_frames", most=MOST_FRAMES)
    sampling = of.part("video_sampling")
    values = {k: v for k, v in of.values.items() if k != "do_image_splitting"} | {"do_image_splitting": False}
    if sampling.values:
        fps, most = sampling.number("fps"), sampling.whole("max_frames", most=MOST_FRAMES)
        values.setdefault("size", sampling.values.get("video_size"))
    if (fps is None) != (most is None) or (fps is None and (sampling.values or of.flag("do_sample_frames", False))):
        raise InputError(f"{of.where} chooses frames and needs fps and the most frames (video_sampling, or num_frames)")
    frame = _splits(Settings(values, of.where), tower)
    frame = replace(frame, longest=min(frame.longest, Splits.LARGEST))
    _refuse_count(found, (frame.tile // frame.patch // tower.merge) ** 2, 169)
    return Trimmed(frame, fps, most), colours(of, HALF)


def _check(found: Found, policy: Policy, tower: Tower) -> None:
    """Raises InputError where pictures are counted as other tokens than they become, or marked by other symbols."""
    if isinstance(policy, Splits):
        made, counted = (policy.tile // policy.patch // tower.merge) ** 2, 169
    else:
        made, counted = _latents(found.config), 64
    _refuse_count(found, made, counted)
    for name, symbol in NAMED.items():
        if found.named.get(name, symbol) != symbol:
            raise InputError(f"The tokenizer in {found.path} calls {name} {found.named[name]!r}, and not {symbol!r}")


def _refuse_count(found: Found, made: int, default: int) -> None:
    said = found.processor.whole("image_seq_len", default)
    if said != made:
        raise InputError(
            f"{found.processor.where} says 'image_seq_len' is {said}, and the model makes {made} tokens of a picture; "
            f"use the files that belong together"
        )


def _writing(of: Convention) -> dict:
    return {name: getattr(of, name) for name in ("image", "tiles", "frames", "once", "gap")}


_SECOND = Family(
    ("Idefics2ImageProcessor",),
    _markers,
    _tower,
    sequential,
    _writing(IDEFICS2),
    check=_check,
    readers={"Idefics2ImageProcessor": (_bounded, HALF)},
    around=("image", "video"),
    per_picture=_latents,
)
_THIRD = replace(
    _SECOND,
    processors=("Idefics3ImageProcessor", "SmolVLMImageProcessor"),
    tower=_shuffled,
    per_picture=lambda config: 0,
    sequence=_squares,
    writing=_writing(IDEFICS3),
    readers=dict.fromkeys(("Idefics3ImageProcessor", "SmolVLMImageProcessor"), (_splits, HALF)),
    spelled=TAGS,
)
FAMILIES: dict[str, Family] = {
    "idefics2": _SECOND,
    "idefics3": _THIRD,
    # transformers writes conversations with videos by a template of its own, whatever the directory's.
    "smolvlm": replace(
        _THIRD, processors=_THIRD.processors[::-1], writing=_writing(SMOLVLM), videos=_videos, films=SMOLVLM
    ),
}
