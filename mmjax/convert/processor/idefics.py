"""The processor of Idefics: a picture is a marker in the text, which looks at it; there is no chat template."""

from collections.abc import Mapping

from mmjax.convert.processor.family import Family
from mmjax.convert.processor.files import Found, Settings
from mmjax.convert.processor.images import Tower
from mmjax.sequence import interleave
from mmjax.tokenizers.conventions import IDEFICS

# A question is written as its text is; and as a dialogue (the "instruct" models) where there is what ends an utterance.
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


FAMILIES: dict[str, Family] = {
    "idefics": Family(
        ("IdeficsImageProcessor",),
        _markers,
        _tower,
        _sequence,
        {name: getattr(IDEFICS, name) for name in PROMPT},
        per_picture=latents,
        prompts=True,
        ends=(IDEFICS.stop,),
        dialogue={name: getattr(IDEFICS, name) for name in DIALOGUE},
    ),
}
