"""What the families differ in where a processor is read: tokens for media, sizes, positions, when an answer ends."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mmjax.convert.processor_files import Found, Settings
from mmjax.convert.processor_images import Tower, moving, pinpoints, pooled, several
from mmjax.core.errors import InputError
from mmjax.nn.patch_embed import Colours
from mmjax.sequence import interleave
from mmjax.sequence.positions import MRope
from mmjax.tokenizers.convention import Frames
from mmjax.tokenizers.parts import Around, Symbol
from mmjax.tokenizers.resolution import Policy
from mmjax.tokenizers.tiles import AnyRes
from mmjax.tokenizers.video import Grouped, Pooled
from mmjax.tokenizers.vocab import Vocab

VISION = Around((Symbol("<|vision_start|>"),), (Symbol("<|vision_end|>"),))


@dataclass(frozen=True)
class Family:
    """A family of vision-language models.

    processors: the image processors that its own works with; the first where no file names one.
    markers: what its template writes for a medium of each type, which is also what stands where media tokens go.
    tower: its encoder's sizes, from config.json. sequence: its descriptors.
    writing: fields of its convention: what stands around media that no template wrote, and around a video's frames.
    check: raises InputError where files contradict each other.
    videos: the policy of videos and their mean and deviation; None: it takes none.
    several: the policy of pictures where a document has more than one; None: the same.
    refined: the policy of pictures with what the image processor's settings do not say.
    newline: whether rows of a picture's tokens end with a vector of the model's own.
    """

    processors: tuple[str, ...]
    markers: Callable[[Found], Mapping[str, str]]
    tower: Callable[[Settings], Tower]
    sequence: Callable[[Settings, Tower], interleave.Config]
    writing: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[Found, Policy, Tower], None] = lambda found, policy, tower: None
    videos: Callable[[Found, Tower], tuple[Grouped | Pooled, Colours]] | None = None
    several: Callable[[Found, Tower, AnyRes, Colours], Policy] | None = None
    refined: Callable[[Found, Policy], Policy] = lambda found, policy: policy
    newline: bool = False


def family_of(found: Found) -> Family | None:
    """The family of a directory, None for a model of text; InputError for one that shows pictures and is unknown."""
    name = found.config.text("model_type")
    if name in FAMILIES:
        return FAMILIES[name]
    if found.images.values or "vision_config" in found.config:
        raise InputError(
            f"{found.config.where} says 'model_type' is {name!r}, whose processor mmjax does not have; it has those of "
            f"{', '.join(FAMILIES)} and of models of text"
        )
    return None


def stops(found: Found, tokenizer: Any, vocab: Vocab) -> tuple[int, ...]:
    """The ids that end an answer: generation_config.json's, or else config.json's, or else the tokenizer's own."""
    inner = found.config.part("text_config")
    for of in (found.generation, found.config, inner):
        if "eos_token_id" in of:
            said = of.values["eos_token_id"]
            ids = said if isinstance(said, list) else [said]
            if not ids or len(ids) > 1000 or not all(type(i) is int and 0 <= i < vocab.size for i in ids):
                raise InputError(
                    f"{of.where} says 'eos_token_id' is {said!r}"[:200] + f"; it must be ids below {vocab.size:,}"
                )
            return tuple(dict.fromkeys(ids))
    end = tokenizer.controls.get(found.named.get("eos_token"))
    return () if end is None else (end,)


def _llava_markers(found: Found) -> Mapping[str, str]:
    return {"image": found.named.get("image_token") or found.processor.text("image_token", "<image>")}


def _onevision_markers(found: Found) -> Mapping[str, str]:
    video = found.named.get("video_token") or found.processor.text("video_token", "<video>")
    return {**_llava_markers(found), "video": video}


def _llava_tower(patch: int, size: int) -> Callable[[Settings], Tower]:
    """patch, size: of the family's own encoder where config.json has none."""

    def tower(config: Settings) -> Tower:
        inner = config.part("vision_config")
        clip = inner.text("model_type", "clip_vision_model") == "clip_vision_model"
        own = (patch, size) if not inner.values else (32, 224) if clip else (16, 224)
        return Tower(inner.whole("patch_size", own[0], most=2**10), size=inner.whole("image_size", own[1], most=2**13))

    return tower


def _llava_check(found: Found, policy: Policy, tower: Tower) -> None:
    """Raises InputError where a picture is counted as other tokens than its patches, or tiled in two ways."""
    of = found.processor
    if of.whole("patch_size", tower.patch) != tower.patch:
        raise InputError(
            f"{of.where} says 'patch_size' is {of.values['patch_size']}, and config.json {tower.patch}; use the files "
            f"that belong together"
        )
    strategies = {
        place: where.text("vision_feature_select_strategy")
        for place, where in (("it", of), ("config.json", found.config))
        if "vision_feature_select_strategy" in where
    }
    if len(set(strategies.values())) > 1 or not set(strategies.values()) <= {"default", "full"}:
        raise InputError(
            f"{of.where}: 'vision_feature_select_strategy' must be 'default' or 'full', the same in both files; found "
            f"{strategies}"
        )
    clip = found.config.part("vision_config").text("model_type", "clip_vision_model") == "clip_vision_model"
    full = "full" in strategies.values()
    if clip and full:
        raise InputError(f"{of.where} keeps CLIP's class token ('full'), which mmjax has no place for; use 'default'")
    more = of.whole("num_additional_image_tokens", None, least=0, most=1000)
    if more is not None and strategies and more != (0 if full else 1):
        raise InputError(
            f"{of.where} counts {more} tokens more than patches, with the strategy {next(iter(strategies.values()))!r};"
            f" correct 'num_additional_image_tokens'"
        )
    if isinstance(policy, AnyRes) and "image_grid_pinpoints" in found.config:
        refuse_pinpoints(found, policy)


def refuse_pinpoints(found: Found, policy: AnyRes) -> None:
    """Raises InputError where the model takes pictures apart at other sizes than its processor puts them together."""
    if pinpoints(found.config, policy.tile) != policy.sizes:
        raise InputError(f"{found.config.where} and {found.images.where} have different 'image_grid_pinpoints'")


def _onevision_check(found: Found, policy: AnyRes, tower: Tower) -> None:
    side = policy.tile // policy.patch
    if found.processor.whole("num_image_tokens", side * side) != side * side:
        raise InputError(
            f"{found.processor.where} says 'num_image_tokens' is {found.processor.values['num_image_tokens']}, and the "
            f"encoder makes {side * side}; use the files that belong together"
        )
    for of in (found.processor, found.config):
        if of.text("vision_feature_select_strategy", "full") != "full":
            raise InputError(f"{of.where} has a 'vision_feature_select_strategy' that is not 'full', as SigLIP needs")
    if "image_grid_pinpoints" in found.config:
        refuse_pinpoints(found, policy)


def _anyres(found: Found, policy: AnyRes) -> AnyRes:
    """With the most tokens of a tiled picture: "anyres_max_9" is those of 9 tiles."""
    key = "vision_aspect_ratio"
    said = {of.text(key) for of in (found.processor, found.config) if key in of} or {"anyres_max_9"}
    most = re.fullmatch(r"anyres_max_([1-9][0-9]{0,3})", said.pop())
    if said or most is None:
        raise InputError(
            f"{found.config.where}: 'vision_aspect_ratio' must be 'anyres_max_' and a number, the same in "
            f"{found.processor.where}"
        )
    return replace(policy, most=int(most[1]))


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


def _sequential(config: Settings, tower: Tower) -> interleave.Config:
    return interleave.Config(position="sequential")


_LLAVA = Family(
    ("LlavaImageProcessor", "CLIPImageProcessor", "SiglipImageProcessor"),
    _llava_markers,
    _llava_tower(14, 336),
    _sequential,
    check=_llava_check,
)
_QWEN = Family(
    ("Qwen2VLImageProcessor",),
    _qwen_markers,
    _qwen_tower(14),
    _qwen_sequence,
    {"image": VISION, "video": VISION},
    videos=_qwen_videos,
)
_ONEVISION = Family(
    ("LlavaOnevisionImageProcessor",),
    _onevision_markers,
    _llava_tower(14, 384),
    lambda config, tower: interleave.Config(position="sequential", mixes=True),
    check=_onevision_check,
    videos=lambda found, tower: pooled(found.videos, tower),
    several=lambda found, tower, policy, colours: several(found.images, tower, policy, colours[0]),
    refined=_anyres,
    newline=True,
)
# A frame of a video stands between markers of its own, its time before it; transformers 5 keeps the outer ones as well.
_STAMPED = {"image": VISION, "video": VISION, "frames": Frames("<{seconds:.1f} seconds>", VISION)}

FAMILIES: dict[str, Family] = {
    "llava": _LLAVA,
    "llava_next": replace(_LLAVA, processors=("LlavaNextImageProcessor",), newline=True),
    "llava_onevision": _ONEVISION,
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": replace(_QWEN, tower=_qwen_tower(16), writing=_STAMPED),
}
