"""The processor of Kosmos-2: a picture before the text, which is no conversation; phrases and places are words in it.

`<grounding>`, `<phrase>` and `<patch_index_0044>` are written as text, which the tokenizer's file has tokens for; the
markers of a picture are not.
"""

from collections.abc import Mapping
from typing import Any

from mmjax.convert.processor.family import Family, sequential
from mmjax.convert.processor.files import Found, Settings
from mmjax.convert.processor.images import Tower
from mmjax.tokenizers.conventions import KOSMOS2
from mmjax.tokenizers.parts import Symbol

WRITTEN = ("image", "assistant", "prompt", "media", "strip", "one_turn", "numbered")


def _markers(found: Found) -> Mapping[str, str]:
    return {"image": found.named.get("unk_token", "<unk>")}  # the ids behind it stand where media tokens go


def _writing(found: Found) -> Mapping[str, Any]:
    begin = (Symbol(found.named.get("bos_token", "<s>")),)
    return {"begin": begin} | {key: getattr(KOSMOS2, key) for key in WRITTEN}


def _tower(config: Settings) -> Tower:
    inner = config.part("vision_config")
    return Tower(inner.whole("patch_size", 14, most=2**10), size=inner.whole("image_size", 224, most=2**13))


FAMILIES: dict[str, Family] = {
    "kosmos-2": Family(
        ("CLIPImageProcessor",),
        _markers,
        _tower,
        sequential,
        _writing,
        writes=True,
        prompts=True,
        per_picture=lambda config: config.whole("latent_query_num", 64, most=2**16),
    ),
}
