"""The processor of Idefics: a picture is a marker in the text, which looks at it; there is no chat template."""

from collections.abc import Collection, Mapping
from typing import Any

from mmjax.convert.processor.family import Family
from mmjax.convert.processor.files import Found, Settings
from mmjax.convert.processor.images import Tower
from mmjax.sequence import interleave
from mmjax.tokenizers.conventions import IDEFICS

# What stands in every prompt, and what a dialogue has besides (the "instruct" models).
PROMPT, DIALOGUE = ("begin", "opens", "image", "once"), ("user", "assistant", "lead")


def _markers(found: Found) -> Mapping[str, str]:
    return {}  # nothing of a picture stands in the sequence


def _tower(config: Settings) -> Tower:
    inner = config.part("vision_config")
    return Tower(inner.whole("patch_size", 14, most=2**10), size=inner.whole("image_size", 224, most=2**13))


def latents(config: Settings) -> int:
    """Media tokens of a picture."""
    return config.part("perceiver_config").whole("resampler_n_latents", 64, most=2**16)


def _sequence(config: Settings, tower: Tower) -> interleave.Config:
    return interleave.Config(cross="last_image", position="sequential")


def _writing(known: Collection[str]) -> dict[str, Any]:
    """A dialogue where the tokenizer has what ends an utterance; else a question is written as its text is."""
    names = (*PROMPT, *(DIALOGUE if IDEFICS.stop in known else ()))
    return {name: getattr(IDEFICS, name) for name in names}


FAMILIES: dict[str, Family] = {
    "idefics": Family(
        ("IdeficsImageProcessor",),
        _markers,
        _tower,
        _sequence,
        _writing,
        per_picture=latents,
        prompts=True,
        ends=(IDEFICS.stop,),
    ),
}
