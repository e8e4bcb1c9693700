"""Settings of video processors to policies, as those of image processors beside this file."""

from mmjax.convert.processor.files import Settings
from mmjax.convert.processor.images import (
    Tower,
    bounds,
    colours,
    filter_of,
    fixed_of,
    kind,
    refuse_other_tower,
    size_of,
    square_of,
)
from mmjax.core.errors import InputError
from mmjax.core.strict_json import shown
from mmjax.nn.patch_embed import HALF, OPENAI, Colours
from mmjax.tokenizers.resolution import Fixed
from mmjax.tokenizers.video import Grouped, Pooled, Stills

MOST_FRAMES = 10_000  # of a clip; published: 768


def pooled(of: Settings, tower: Tower) -> tuple[Pooled, Colours]:
    """The policy of videos of LLaVA-OneVision, and their mean and deviation; errors as for `still`."""
    allowed = ("LlavaOnevisionVideoProcessor", "LlavaOnevisionImageProcessor")
    each, frames = _frames(of, tower, allowed)
    return Pooled(each, **frames), colours(of, OPENAI)


def stills(of: Settings, tower: Tower) -> tuple[Stills, Colours]:
    """The same of InternVL."""
    each, frames = _frames(of, tower, ("InternVLVideoProcessor", "GotOcr2ImageProcessor"))
    shift, said = None, of.values.get("initial_shift")
    if frames and said is not None and said is not True:
        shift = 0.0 if said is False else of.number("initial_shift")
    if frames and set(frames.values()) == {None}:
        raise InputError(f"{of.where} chooses frames (do_sample_frames) and needs either fps or num_frames")
    return Stills(each, **frames, shift=shift), colours(of, OPENAI)


def _frames(of: Settings, tower: Tower, allowed: tuple[str, str]) -> tuple[Fixed, dict[str, int | float | None]]:
    """How frames of one size become patches, and which are chosen: nothing where all are shown."""
    name = of.text("video_processor_type") or kind(of, allowed[0])
    if name not in allowed:
        raise InputError(f"{of.where} names the video processor {shown(name)}; mmjax has {allowed[0]} for this")
    if not of.flag("do_resize", True) or of.flag("do_center_crop", False):
        raise InputError(f"{of.where} has do_resize false or do_center_crop, which mmjax does not do for videos")
    size = size_of(of, "size", {"height": 384, "width": 384}, square=False)
    side = square_of(of, "size", size, ("height", "width"))
    frames: dict[str, int | float | None] = {}
    if of.flag("do_sample_frames", False):
        frames = {"number": of.whole("num_frames"), "fps": of.number("fps")}
    return fixed_of(of, tower, side), frames


def moving(of: Settings, tower: Tower, family: str, tokens_per_second: float) -> tuple[Grouped, Colours]:
    """The policy of videos of a Qwen-VL, and their mean and deviation; errors as for `still`.

    Where no file is of videos alone, `of` are the settings of pictures, as in transformers.
    """
    third = family.startswith("qwen3")
    allowed = ("Qwen3VLVideoProcessor" if third else "Qwen2VLVideoProcessor", "Qwen2VLImageProcessor")
    name = of.text("video_processor_type") or kind(of, allowed[0])
    if name not in allowed:
        raise InputError(f"{of.where} names the video processor {shown(name)}; {family} has {allowed[0]}")
    if not of.flag("do_resize", True) or of.flag("do_center_crop", False) or of.flag("cap_pixels_per_frame", False):
        raise InputError(
            f"{of.where} has one of do_resize false, do_center_crop and cap_pixels_per_frame, which mmjax does not "
            f"reproduce for videos; change it"
        )
    refuse_other_tower(of, tower)
    unit = (32 if third else 28) ** 2
    least, most = bounds(of, 128 * unit, 768 * unit)
    choose, fps, number = "all", None, None
    if of.flag("do_sample_frames", third):
        choose = "even" if third else "floor"
        number = of.whole("num_frames", most=MOST_FRAMES)
        fps = of.number("fps", 2.0 if third and number is None else None)
        if (fps is None) == (number is None):
            raise InputError(f"{of.where} chooses frames (do_sample_frames) and needs either fps or num_frames")
    return Grouped(
        tower.patch,
        tower.merge,
        tower.group,
        least,
        most,
        "clip" if third else "picture",
        choose,
        fps,
        number,
        of.whole("min_frames", 4, most=MOST_FRAMES),
        of.whole("max_frames", 768, most=MOST_FRAMES),
        tokens_per_second,
        filter_of(of),
    ), colours(of, HALF if third else OPENAI)
