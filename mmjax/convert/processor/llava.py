"""The processors of LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from mmjax.convert.processor.family import Family, sequential
from mmjax.convert.processor.files import Found, Settings
from mmjax.convert.processor.images import Tower, pinpoints, several
from mmjax.convert.processor.videos import pooled
from mmjax.core.errors import InputError
from mmjax.sequence import interleave
from mmjax.tokenizers.resolution import Policy
from mmjax.tokenizers.tiles import AnyRes


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


_LLAVA = Family(
    ("LlavaImageProcessor", "CLIPImageProcessor", "SiglipImageProcessor"),
    _llava_markers,
    _llava_tower(14, 336),
    sequential,
    check=_llava_check,
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

FAMILIES: dict[str, Family] = {
    "llava": _LLAVA,
    "llava_next": replace(_LLAVA, processors=("LlavaNextImageProcessor",), newline=True),
    "llava_onevision": _ONEVISION,
}
