"""The processors of BLIP-2 and InstructBLIP: a picture's queries before everything, and the question as it is."""

from collections.abc import Mapping
from dataclasses import replace

from mmjax.convert.processor.family import Family, sequential
from mmjax.convert.processor.files import Found, Settings
from mmjax.convert.processor.images import Tower
from mmjax.core.errors import InputError
from mmjax.tokenizers.resolution import Policy


def _markers(found: Found) -> Mapping[str, str]:
    return {"image": found.named.get("image_token", "<image>")}


def _tower(config: Settings) -> Tower:
    inner = config.part("vision_config")
    return Tower(inner.whole("patch_size", 14, most=2**10), size=inner.whole("image_size", 224, most=2**13))


def queries(config: Settings) -> int:
    """Media tokens of a picture."""
    return config.whole("num_query_tokens", 32, most=2**16)


def _check(found: Found, policy: Policy, tower: Tower) -> None:
    """Raises InputError where a picture is counted as other tokens than the model makes."""
    count = queries(found.config)
    if found.processor.whole("num_query_tokens", count) != count:
        raise InputError(
            f"{found.processor.where} says 'num_query_tokens' is {found.processor.values['num_query_tokens']}, and "
            f"config.json {count}; use the files that belong together"
        )


_BLIP2 = Family(
    ("BlipImageProcessor",),
    _markers,
    _tower,
    sequential,
    {"media": "before_all", "one_turn": True},
    check=_check,
    per_picture=queries,
    prompts=True,
    adds=("<image>",),
)
FAMILIES: dict[str, Family] = {
    "blip-2": _BLIP2,
    "instructblip": replace(_BLIP2, reader="qformer_tokenizer"),
}
