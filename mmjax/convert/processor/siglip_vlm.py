"""The processors of PaliGemma and PaliGemma 2, Gemma 3 and DeepSeek-VL.

PaliGemma's has no chat template: it writes one question, of a user's turn, and one answer itself (PALIGEMMA of
tokenizers.conventions). What it adds to the tokenizer, places and segments ("<loc0000>"), are words like others, as the
file has them. Gemma 3's crops are made where the directory says `do_pan_and_scan`; transformers makes them where it is
called so.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from mmjax.convert.processor.family import Family, sequential
from mmjax.convert.processor.files import Found, Settings
from mmjax.convert.processor.images import Tower
from mmjax.core.errors import InputError
from mmjax.core.strict_json import shown
from mmjax.sequence import interleave
from mmjax.tokenizers.conventions import GEMMA3, PALIGEMMA
from mmjax.tokenizers.parts import Around
from mmjax.tokenizers.resolution import Policy

Check = Callable[[Found, Policy, Tower], None]


def _tower(patch: int, size: int) -> Callable[[Settings], Tower]:
    """patch, size: of the family's own encoder where config.json has none; SigLIP's own are 16 and 224."""

    def tower(config: Settings) -> Tower:
        inner = config.part("vision_config")
        own = (16, 224) if inner.values else (patch, size)
        return Tower(inner.whole("patch_size", own[0], most=2**10), size=inner.whole("image_size", own[1], most=2**13))

    return tower


def _pooled(config: Settings) -> Tower:
    """Gemma 3: patches are pooled to `mm_tokens_per_image` tokens."""
    tower = _tower(16, 224)(config)
    tokens, side = config.whole("mm_tokens_per_image", 256), tower.size // tower.patch
    merge = max(side // max(round(tokens**0.5), 1), 1)
    if (side // merge) ** 2 != tokens or side % merge:
        raise InputError(
            f"{config.where} says 'mm_tokens_per_image' is {tokens}, which {side} × {side} patches cannot be pooled to "
            f"in equal squares"
        )
    return replace(tower, merge=merge)


def _named(symbol: str, **others: str) -> Callable[[Found], Mapping[str, str]]:
    """What stands for a picture; InputError where the tokenizer has other names for the `others`."""

    def markers(found: Found) -> Mapping[str, str]:
        for key, own in others.items():
            if found.named.get(key, own) != own:
                raise InputError(
                    f"The tokenizer in {found.path} says {key!r} is {shown(found.named[key])}, where this model is "
                    f"asked with {own!r}; use its own tokenizer"
                )
        return {"image": symbol}

    return markers


def _counted(place: str, key: str, default: int | None) -> Check:
    """Raises InputError where the processor writes another number of tokens for a picture than the encoder makes.

    place: whose setting it is, "images" or "processor". default: transformers' own.
    """

    def check(found: Found, policy: Policy, tower: Tower) -> None:
        of, made = getattr(found, place), (tower.size // tower.patch // tower.merge) ** 2
        if of.whole(key, made if default is None else default) != made:
            raise InputError(
                f"{of.where} says {key!r} is {of.values.get(key, default)}, and the encoder makes {made} tokens of a "
                f"picture; use the files that belong together"
            )

    return check


def _asked(found: Found, policy: Policy, tower: Tower) -> None:
    _counted("images", "image_seq_length", None)(found, policy, tower)
    if found.template is not None:
        raise InputError(f"{found.path} has a chat template, which PaliGemma's processor does not read; delete it")


_PALIGEMMA = Family(
    ("SiglipImageProcessor",),
    _named("<image>", image_token="<image>", bos_token="<bos>"),
    _tower(14, 224),
    lambda config, tower: interleave.Config(position="sequential", see="prefix"),
    {key: getattr(PALIGEMMA, key) for key in ("assistant", "prompt", "apart", "one_turn")}
    | {"user": Around((), PALIGEMMA.user.after), "media": "before_all"},
    check=_asked,
    lead=("<bos>",),
    prompts=True,
)
_GEMMA3 = Family(
    ("Gemma3ImageProcessor",),
    _named(
        "<start_of_image>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        image_token=GEMMA3.placeholder,
    ),
    _pooled,
    lambda config, tower: interleave.Config(position="sequential", see="bidirectional_images", merge=tower.merge),
    {key: getattr(GEMMA3, key) for key in ("image", "tiles", "placeholder")},
    check=_counted("processor", "image_seq_length", 256),
    around=("image",),
)
_DEEPSEEK = Family(
    ("DeepseekVLImageProcessor",),
    lambda found: {"image": found.named.get("image_token", "<image_placeholder>")},
    _tower(16, 224),
    sequential,
    check=_counted("processor", "num_image_tokens", 576),
)
FAMILIES: dict[str, Family] = {"paligemma": _PALIGEMMA, "gemma3": _GEMMA3, "deepseek_vl": _DEEPSEEK}
