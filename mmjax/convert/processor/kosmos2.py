"""The processor of Kosmos-2: a picture before the text, which is no conversation; phrases and places are words in it.

`<grounding>`, `<phrase>` and `<patch_index_0044>` are written as text, which the tokenizer's file has tokens for; the
markers of a picture are not.
"""

from collections.abc import Mapping

from mmjax.convert.processor.family import Family, sequential
from mmjax.convert.processor.files import Found, Settings
from mmjax.convert.processor.images import Tower
from mmjax.core.errors import InputError
from mmjax.tokenizers.conventions import KOSMOS2
from mmjax.tokenizers.resolution import Policy

WRITTEN = ("opens", "image", "assistant", "prompt", "media", "strip", "one_turn", "numbered")


def _markers(found: Found) -> Mapping[str, str]:
    return {"image": found.named.get("unk_token", "<unk>")}  # the ids behind it stand where media tokens go


def _tower(config: Settings) -> Tower:
    inner = config.part("vision_config")
    return Tower(inner.whole("patch_size", 14, most=2**10), size=inner.whole("image_size", 224, most=2**13))


def _check(found: Found, policy: Policy, tower: Tower) -> None:
    """Raises InputError for a chat template."""
    if found.template is not None:
        raise InputError(f"{found.path} has a chat template, which the processor of a kosmos-2 has not; delete it")


FAMILIES: dict[str, Family] = {
    "kosmos-2": Family(
        ("CLIPImageProcessor",),
        _markers,
        _tower,
        sequential,
        {key: getattr(KOSMOS2, key) for key in WRITTEN},
        lead=tuple(part.symbol for part in KOSMOS2.begin),
        check=_check,
        prompts=True,
        per_picture=lambda config: config.whole("latent_query_num", 64, most=2**16),
    ),
}
