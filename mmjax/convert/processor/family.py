"""What the families differ in where a processor is read: tokens for media, sizes, positions, when an answer ends."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mmjax.convert.processor.files import Found, Settings
from mmjax.convert.processor.images import Readers, Tower
from mmjax.core.errors import InputError
from mmjax.nn.patch_embed import Colours
from mmjax.sequence import interleave
from mmjax.tokenizers.convention import Convention
from mmjax.tokenizers.resolution import Ended, Policy
from mmjax.tokenizers.tiles import AnyRes
from mmjax.tokenizers.video import Grouped, Pooled, Stills, Trimmed
from mmjax.tokenizers.vocab import Vocab


@dataclass(frozen=True)
class Family:
    """A family of vision-language models.

    processors: the image processors that its own works with; the first where no file names one.
    markers: what its template writes for a medium of each type, which is also what stands where media tokens go, unless
      `writing` has another placeholder.
    tower: its encoder's sizes, from config.json. sequence: its descriptors.
    writing: fields of its convention: what stands around media that no template wrote, and around a video's frames;
      or what makes them of the files, where these have names for it.
    around: the types of media that its processor writes that around, where a template has but a marker for them.
    lead: the special tokens that its processor writes before every text; None: those that its tokenizer writes.
    check: raises InputError where files contradict each other.
    videos: the policy of videos and their mean and deviation; None: it takes none.
    several: the policy of pictures where a document has more than one; None: the same.
    refined: the policy of pictures with what the image processor's settings do not say.
    per_picture: media tokens of a picture, where their number is fixed; 0: as many as its patches make.
    prompts: whether a question is written as its text is: the family has no chat template.
    reader: the folder of the tokenizer of what its connector reads beside a picture, where it does.
    adds: symbols that its own processor adds to a tokenizer that lacks them.
    ends: symbols that end a turn and so an answer too, where the tokenizer has them.
    dialogue: further fields of its convention, where the tokenizer has them.
    readers: of image processors that this family alone has: from settings and the encoder's sizes to the policy, and
      the mean and deviation where the settings have none.
    spelled: symbols of `writing` that are words where the tokenizer has none such.
    films: the convention that conversations with videos are written in, whatever the template; None: by the template.
    newline: whether rows of a picture's tokens end with a vector of the model's own.
    cross: whether text looks at media by cross-attention: their markers alone stand in the sequence.
    more: rows of its token table beyond what config.json calls vocab_size.
    """

    processors: tuple[str, ...]
    markers: Callable[[Found], Mapping[str, str]]
    tower: Callable[[Settings], Tower]
    sequence: Callable[[Settings, Tower], interleave.Config]
    writing: Mapping[str, Any] | Callable[[Found], Mapping[str, Any]] = field(default_factory=dict)
    around: tuple[str, ...] = ()
    lead: tuple[str, ...] | None = None
    check: Callable[[Found, Policy, Tower], None] = lambda found, policy, tower: None
    videos: Callable[[Found, Tower], tuple[Grouped | Pooled | Stills | Trimmed, Colours]] | None = None
    several: Callable[[Found, Tower, AnyRes, Colours], Ended] | None = None
    refined: Callable[[Found, Policy], Policy] = lambda found, policy: policy
    readers: Readers = field(default_factory=dict)
    spelled: tuple[str, ...] = ()
    films: Convention | None = None
    newline: bool = False
    per_picture: Callable[[Settings], int] = lambda config: 0
    prompts: bool = False
    reader: str = ""
    adds: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    dialogue: Mapping[str, Any] = field(default_factory=dict)
    cross: bool = False
    more: int = 0


def stops(found: Found, tokenizer: Any, vocab: Vocab, family: Family | None = None) -> tuple[int, ...]:
    """The ids that end an answer: generation_config.json's, or else config.json's, or else the tokenizer's own.

    And those of the family, which its files may not name.
    """
    more = [tokenizer.controls[s] for s in (() if family is None else family.ends) if s in tokenizer.controls]
    return tuple(dict.fromkeys([*_said(found, tokenizer, vocab), *more]))


def _said(found: Found, tokenizer: Any, vocab: Vocab) -> tuple[int, ...]:
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


def sequential(config: Settings, tower: Tower) -> interleave.Config:
    return interleave.Config(position="sequential")
