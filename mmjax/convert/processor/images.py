"""Settings of image processors to policies: what transformers 5 would do, or one sentence why it is not done.

Equal to the pixel to the processors that compute with Pillow (`*Pil`); those that compute with torchvision round
otherwise, by 1/255 mostly.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mmjax.convert.processor.files import Settings
from mmjax.core.errors import InputError
from mmjax.core.strict_json import shown
from mmjax.nn.patch_embed import HALF, OPENAI, Colours
from mmjax.tokenizers.canvas import Canvas
from mmjax.tokenizers.resolution import Ended, Fixed, Native, Pixtral, Policy
from mmjax.tokenizers.tiles import AnyRes, PanAndScan, Tiles
from mmjax.tokenizers.view import Filter

FILTERS: dict[int, Filter] = {1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
SIDE, PIXELS = 2**13, 2**27  # the largest picture that a setting may ask for
FACTOR = 1 / 255
Readers = Mapping[str, tuple[Callable[[Settings, "Tower"], Policy], Colours]]


@dataclass(frozen=True)
class Tower:
    """What config.json says of the encoder: pixels a patch, patches a token, pictures in a patch of a clip.

    size: pixels of the pictures (or tiles) that its position table is for; 0 where it has none of a size.
    tiles: of every picture; 0 where that depends on the picture.
    """

    patch: int
    merge: int = 1
    group: int = 1
    size: int = 0
    tiles: int = 0


def kind(of: Settings, default: str) -> str:
    """The image processor's class, without what says how it computes: "CLIPImageProcessor"."""
    for key in ("image_processor_type", "feature_extractor_type"):
        if key in of:
            name = re.sub(r"(Fast|Pil)$", "", of.text(key))
            return re.sub(r"FeatureExtractor$", "ImageProcessor", name)
    return default


def colours(of: Settings, default: Colours) -> Colours:
    """Mean and deviation of values in [0, 1] that the settings come to, whatever factor they rescale by."""
    mean, deviation = (
        _triple(of, key, values) if of.flag("do_normalize", True) else (fixed,) * 3
        for key, values, fixed in (("image_mean", default[0], 0.0), ("image_std", default[1], 1.0))
    )
    factor = of.number("rescale_factor", FACTOR) if of.flag("do_rescale", True) else 1.0
    if abs(factor / FACTOR - 1) < 1e-9:
        return mean, deviation
    return tuple(m * FACTOR / factor for m in mean), tuple(d * FACTOR / factor for d in deviation)


def _triple(of: Settings, key: str, default: tuple[float, ...]) -> tuple[float, float, float]:
    value = of.values.get(key)
    value = list(default) if value is None else value
    value = [value] * 3 if isinstance(value, int | float) else value
    fine = isinstance(value, list) and len(value) == 3
    fine = fine and all(isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e6 for v in value)
    if not fine or (key == "image_std" and min(value) <= 0):
        raise InputError(f"{of.where} says {key!r} is {shown(of.values[key])}; it must be three numbers, one a channel")
    return tuple(map(float, value))


def filter_of(of: Settings, default: Filter = "bicubic") -> Filter:
    """The filter that pictures are resized with; InputError for one that no policy has."""
    if "resample" not in of:
        return default
    number = of.whole("resample", least=0, most=5)
    if number not in FILTERS:
        raise InputError(f"{of.where} resizes with Pillow's filter {number}; mmjax has {FILTERS}")
    return FILTERS[number]


def size_of(of: Settings, key: str, default: dict[str, int], square: bool) -> dict[str, int]:
    """A size as a dict; one number is a square, or (`square` off) the shorter side."""
    value = of.values.get(key)
    if value is None:
        return default
    if isinstance(value, list) and len(value) == 2:
        value = {"height": value[0], "width": value[1]}
    if not isinstance(value, dict):
        value = {"height": value, "width": value} if square else {"shortest_edge": value}
    inner = Settings(value, f"{of.where} ({key})")
    out = {name: inner.whole(name) for name in value if value[name] is not None}
    if not set(out) <= {"height", "width", "shortest_edge", "longest_edge"} or not out:
        raise InputError(f"{of.where} says {key!r} is {shown(value)}, which is no size that mmjax knows")
    return out


def square_of(of: Settings, key: str, size: dict[str, int], keys: tuple[str, ...]) -> int:
    """The one number of a size that has these keys and is square."""
    if set(size) != set(keys) or len(set(size.values())) != 1:
        raise InputError(f"{of.where} says {key!r} is {size}; with these settings mmjax wants {', '.join(keys)} alike")
    (side,) = set(size.values())
    if side > SIDE:
        raise InputError(f"{of.where} says {key!r} is {side:,} pixels a side, where {SIDE:,} are allowed")
    return side


def still(of: Settings, tower: Tower, allowed: Sequence[str], more: Readers | None = None) -> tuple[Policy, Colours]:
    """The policy of pictures, and their mean and deviation.

    Args:
      of: the image processor's settings, which may be none.
      tower: the encoder's sizes.
      allowed: the image processors that the family's own processor works with; the first where none is named.
      more: readers of those that the family alone has.

    Raises:
      InputError: a class or settings that mmjax does not reproduce, or that the encoder has no patches for.
    """
    name = kind(of, allowed[0])
    if name not in allowed:
        raise InputError(f"{of.where} names the image processor {shown(name)}; mmjax has {', '.join(allowed)} for this")
    if not of.flag("do_resize", True):
        raise InputError(f"{of.where} does not resize pictures (do_resize), but these encoders take one size")
    read, default_colours = {**READERS, **(more or {})}[name]
    return read(of, tower), colours(of, default_colours)


def _clip(of: Settings, tower: Tower) -> Fixed:
    """CLIP's: the shorter side to a size, then the middle."""
    size = size_of(of, "size", {"shortest_edge": 224}, square=False)
    crop = size_of(of, "crop_size", {"height": 224, "width": 224}, square=True)
    if of.flag("use_square_size", False):  # Kosmos-2, whatever `size` says
        size = {"height": 224, "width": 224}
    cropped = of.flag("do_center_crop", True)
    if "shortest_edge" in size and cropped:
        short = square_of(of, "size", size, ("shortest_edge",))
        side = square_of(of, "crop_size", crop, ("height", "width"))
        return fixed_of(of, tower, side, "crop", short)
    side = square_of(of, "size", size, ("height", "width"))
    if cropped and set(crop.values()) != {side}:
        raise InputError(f"{of.where} resizes to {side} pixels and crops to {crop}; mmjax crops what keeps its shape")
    return fixed_of(of, tower, side)


def _llava(of: Settings, tower: Tower) -> Fixed:
    """LLaVA's own: as CLIP's, or with padding to a square first."""
    if not of.flag("do_pad", False):
        return _clip(of, tower)
    size = size_of(of, "size", {"shortest_edge": 224}, square=False)
    side = square_of(of, "size", size, tuple(size) if set(size) == {"height", "width"} else ("shortest_edge",))
    crop = size_of(of, "crop_size", {"height": 224, "width": 224}, square=True)
    if of.flag("do_center_crop", True) and set(crop.values()) != {side}:
        raise InputError(f"{of.where} pads pictures to squares of {side} pixels and crops those to {crop}; crop less")
    mean = _triple(of, "image_mean", OPENAI[0])
    return fixed_of(of, tower, side, "pad", fill=tuple(int(m * 255) for m in mean))


def several(of: Settings, tower: Tower, policy: AnyRes, mean: tuple[float, ...]) -> Ended:
    """LLaVA-OneVision's policy of pictures that are not alone: padded to a square, shown once, one newline."""
    fill = tuple(int(m * 255) for m in mean)
    return Ended(fixed_of(of, tower, policy.tile, "pad", fill=fill))


def _siglip(of: Settings, tower: Tower) -> Fixed:
    size = size_of(of, "size", {"height": 224, "width": 224}, square=True)
    if of.flag("do_center_crop", False):
        raise InputError(f"{of.where} crops pictures (do_center_crop), which SigLIP's processor does not do here")
    return fixed_of(of, tower, square_of(of, "size", size, ("height", "width")))


def _gemma3(of: Settings, tower: Tower) -> Fixed | PanAndScan:
    """Gemma 3's: SigLIP's, and with `do_pan_and_scan` crops of long pictures, whose sizes are its processor's own."""
    side = square_of(of, "size", size_of(of, "size", {"height": 224, "width": 224}, square=True), ("height", "width"))
    whole = fixed_of(of, tower, side, default="bilinear")
    if not of.flag("do_pan_and_scan", False):
        return whole
    least = of.whole("pan_and_scan_min_crop_size", 256, most=SIDE)
    most = of.whole("pan_and_scan_max_num_crops", 4, most=MOST_TILES)
    ratio = of.number("pan_and_scan_min_ratio_to_activate", 1.2)
    return PanAndScan(tower.patch, side, least, most, ratio, whole.filter)


def _deepseek(of: Settings, tower: Tower) -> Fixed:
    """DeepSeek-VL's: the longer side to a size, on a square canvas of the mean colour."""
    side = square_of(of, "size", size_of(of, "size", {"height": 384, "width": 384}, square=True), ("height", "width"))
    if not of.flag("do_pad", True):
        raise InputError(f"{of.where} does not pad pictures to squares (do_pad), which this encoder takes alone")
    mean = _triple(of, "image_mean", OPENAI[0])
    short = of.whole("min_size", 14, most=SIDE)
    return fixed_of(of, tower, side, "inset", short, fill=tuple(int(m * 255) for m in mean))


def fixed_of(
    of: Settings, tower: Tower, side: int, fit: str = "stretch", short: int = 0, default: Filter = "bicubic", **more
) -> Fixed:
    """Squares of one size; InputError where the encoder has no patches, or no positions, for it."""
    if side < tower.patch or (tower.size and side // tower.patch != tower.size // tower.patch):
        raise InputError(
            f"{of.where} makes pictures of {side} pixels, where config.json has an encoder for {tower.size or 'more'} "
            f"in patches of {tower.patch}; use the files that belong together"
        )
    return Fixed(
        tower.patch, side, side, fit, short, filter=filter_of(of, default), drop=side % tower.patch > 0, **more
    )


def _tiled(of: Settings, tower: Tower, size: dict[str, int], crop: dict[str, int] | None) -> AnyRes:
    """LLaVA-NeXT's and LLaVA-OneVision's: the whole, and tiles of it at the best of a few sizes."""
    side = square_of(of, "size", size, tuple(size) if set(size) == {"height", "width"} else ("shortest_edge",))
    cropped = of.flag("do_center_crop", crop is not None) and crop is not None
    if cropped and square_of(of, "crop_size", crop, ("height", "width")) != side:
        raise InputError(f"{of.where} makes tiles of {side} pixels and crops those to {crop}; mmjax does not crop them")
    fixed_of(of, tower, side)
    return AnyRes(tower.patch, side, pinpoints(of, side), filter=filter_of(of), drop=side % tower.patch > 0)


def _next(of: Settings, tower: Tower) -> AnyRes:
    size = size_of(of, "size", {"shortest_edge": 224}, square=False)
    return _tiled(of, tower, size, size_of(of, "crop_size", {"height": 224, "width": 224}, square=True))


def _onevision(of: Settings, tower: Tower) -> AnyRes:
    size = size_of(of, "size", {"height": 384, "width": 384}, square=False)
    crop = size_of(of, "crop_size", {}, square=True) or None
    return _tiled(of, tower, size, crop if of.flag("do_center_crop", False) else None)


def pinpoints(of: Settings, side: int, key: str = "image_grid_pinpoints") -> tuple[tuple[int, int], ...]:
    """The sizes that pictures are tiled at, in tiles; those of transformers where none are given."""
    value = of.values.get(key)
    if value is None:
        onevision = "Onevision" in kind(of, "")
        value = [[384 * r, 384 * c] for r in range(1, 7) for c in range(1, 7)] if onevision else NEXT
    pairs = isinstance(value, list) and 0 < len(value) <= 1024 and all(isinstance(p, list) for p in value)
    pairs = pairs and all(len(p) == 2 and all(type(n) is int and 0 < n <= 2**16 for n in p) for p in value)
    if not pairs or any(n % side for p in value for n in p):
        raise InputError(
            f"{of.where} says {key!r} is {shown(value)}; they must be pairs of multiples of the tile of {side} pixels"
        )
    out = tuple((height // side, width // side) for height, width in value)
    if max(height * width for height, width in out) > MOST_TILES:
        raise InputError(f"{of.where} tiles pictures by more than {MOST_TILES} tiles in {key!r}; no model has so many")
    return out


MOST_TILES = 64  # published: 36
NEXT = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def _qwen(of: Settings, tower: Tower) -> Native:
    refuse_other_tower(of, tower)
    least, most = bounds(of, 56 * 56, 28 * 28 * 1280)
    return Native(tower.patch, tower.merge, least, most, filter=filter_of(of))


def _canvas(of: Settings, tower: Tower) -> Canvas:
    """Llama 3.2 Vision's: whole tiles, as many as the encoder has."""
    side = square_of(of, "size", size_of(of, "size", {"height": 224, "width": 224}, square=True), ("height", "width"))
    most = of.whole("max_image_tiles", 4)
    if side != tower.size or most != tower.tiles or not of.flag("do_pad", True):
        raise InputError(
            f"{of.where} makes up to {most} tiles of {side} pixels, where config.json has {tower.tiles} of "
            f"{tower.size} and do_pad must be true; use the files that belong together"
        )
    return Canvas(tower.patch, side, most, filter_of(of, "bilinear"))


BOUNDS = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}


def bounds(of: Settings, least: int, most: int) -> tuple[int, int]:
    """The fewest and the most pixels: min_pixels and max_pixels come before what `size` says."""
    said = of.values.get("size")
    if isinstance(said, dict):  # with the names that they had before they were moved there
        of = Settings({**of.values, "size": {BOUNDS.get(key, key): value for key, value in said.items()}}, of.where)
    size = size_of(of, "size", {"shortest_edge": least, "longest_edge": most}, square=False)
    least = of.whole("min_pixels", size.get("shortest_edge"), most=PIXELS)
    most = of.whole("max_pixels", size.get("longest_edge"))
    if least is None or most is None or not least <= min(most, PIXELS):
        raise InputError(
            f"{of.where} bounds pictures by {least} and {most} pixels; give min_pixels and max_pixels, or size with "
            f"shortest_edge and longest_edge, of which the first is smaller and no more than {PIXELS:,}"
        )
    return least, most


def refuse_other_tower(of: Settings, tower: Tower) -> None:
    """Raises InputError where patches are not those of the encoder."""
    wants = {"patch_size": tower.patch, "merge_size": tower.merge, "temporal_patch_size": tower.group}
    for key, value in wants.items():
        if of.whole(key, value) != value:
            raise InputError(
                f"{of.where} says {key!r} is {of.values[key]}, and config.json {value}; use the files that belong "
                f"together"
            )


def _got(of: Settings, tower: Tower) -> Tiles:
    """InternVL's; its processor asks for tiles whatever `crop_to_patches` says here."""
    side = square_of(of, "size", size_of(of, "size", {"height": 384, "width": 384}, square=True), ("height", "width"))
    fixed_of(of, tower, side)
    least, most = (of.whole(f"{n}_patches", d, most=MOST_TILES) for n, d in (("min", 1), ("max", 12)))
    if least > most:
        raise InputError(f"{of.where} cuts pictures into {least} to {most} tiles (min_patches, max_patches); turn them")
    return Tiles(tower.patch, side, least, most, filter=filter_of(of))


def _pixtral(of: Settings, tower: Tower) -> Pixtral:
    """Pixtral's and Mistral 3's; its processor gives it the encoder's patches, whatever `patch_size` says here."""
    if of.flag("do_center_crop", False):
        raise InputError(f"{of.where} crops pictures (do_center_crop), which mmjax does not do after Pixtral's resize")
    size = size_of(of, "size", {"longest_edge": 1024}, square=True)
    longest = square_of(of, "size", size, tuple(size) if set(size) == {"height", "width"} else ("longest_edge",))
    return Pixtral(tower.patch, longest, tower.merge, filter=filter_of(of))


def _blip(of: Settings, tower: Tower) -> Fixed:
    """BLIP's: stretched to a square."""
    size = size_of(of, "size", {"height": 384, "width": 384}, square=True)
    if of.flag("do_center_crop", False):
        raise InputError(f"{of.where} crops pictures (do_center_crop), which BLIP's processor does not do here")
    return fixed_of(of, tower, square_of(of, "size", size, ("height", "width")))


def _idefics(of: Settings, tower: Tower) -> Fixed:
    """Idefics': stretched to a square, which its own files call `image_size`."""
    size = size_of(of, "image_size" if "image_size" in of else "size", {"height": 224, "width": 224}, square=True)
    if of.whole("image_num_channels", 3) != 3 or of.flag("do_center_crop", False):
        raise InputError(f"{of.where} crops pictures or gives them other channels than red, green and blue; mmjax not")
    return fixed_of(of, tower, square_of(of, "size", size, ("height", "width")))


READERS = {
    "IdeficsImageProcessor": (_idefics, OPENAI),
    "BlipImageProcessor": (_blip, OPENAI),
    "CLIPImageProcessor": (_clip, OPENAI),
    "LlavaImageProcessor": (_llava, OPENAI),
    "SiglipImageProcessor": (_siglip, HALF),
    "LlavaNextImageProcessor": (_next, OPENAI),
    "LlavaOnevisionImageProcessor": (_onevision, OPENAI),
    "Qwen2VLImageProcessor": (_qwen, OPENAI),
    "GotOcr2ImageProcessor": (_got, OPENAI),
    "PixtralImageProcessor": (_pixtral, OPENAI),
    "Gemma3ImageProcessor": (_gemma3, HALF),
    "DeepseekVLImageProcessor": (_deepseek, OPENAI),
    "MllamaImageProcessor": (_canvas, HALF),
}
