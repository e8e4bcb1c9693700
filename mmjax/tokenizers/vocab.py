"""The tokens that are not text: what they are called, and where a tokenizer has put them.

A conversation is written `begin`, then for each turn the role token, its spans and `end`; an image stands as
`image_start`, one `image` placeholder for each media token, `image_end`. Text can never produce any of them.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple

from mmjax.core.errors import InputError


class Control(NamedTuple):
    """One control token: the name the code uses, and the symbol the tokenizer model stores for it."""

    name: str
    symbol: str


# Their order is their id in every tokenizer trained here.
CONTROLS = (
    Control("pad", "<|pad|>"),  # fills empty slots
    Control("begin", "<|begin|>"),  # before a document
    Control("end", "<|end|>"),  # after a turn and after a document
    Control("system", "<|system|>"),  # before the turn of each role
    Control("user", "<|user|>"),
    Control("assistant", "<|assistant|>"),
    Control("image", "<|image|>"),  # one for each media token, which takes its place in the sequence
    Control("image_start", "<|image_start|>"),
    Control("image_end", "<|image_end|>"),
)


@dataclass(frozen=True)
class Vocab:
    """Ids of the control tokens and the number of ids: all that the sequence code needs of a tokenizer.

    Ids lie in [0, size). Roles may share an id with others (many published models pad with `end`), but placeholders may
    not, for a media slot must be told from every other slot; but with that of the ends of a picture's rows, where a
    vector of the model stands (models.vlm: `newline`). None: the family has no such token. InputError names the field
    that breaks a rule.

    numbered: whether a picture's media tokens carry the ids that follow `image` one after the other, whatever they mean
      in a text (Kosmos-2: those behind <unk>).
    """

    pad: int
    begin: int | None
    end: int  # of an answer
    system: int | None = None
    user: int | None = None
    assistant: int | None = None
    image: int | None = None  # stands where media tokens of pictures go; None: they never stand in the sequence
    image_start: int | None = None
    image_end: int | None = None
    size: int = 0
    image_newline: int | None = None  # ends a row of a picture's tokens, where the family does so (LLaVA-NeXT)
    video: int | None = None  # the same for videos and sound; None: as `image`
    audio: int | None = None
    numbered: bool = False

    @property
    def placeholders(self) -> tuple[int, ...]:
        """Every id that stands where media tokens go."""
        return tuple({i: None for i in (self.image, self.video, self.audio) if i is not None})

    def __post_init__(self):
        for field in fields(self):
            token = getattr(self, field.name)
            if field.name in ("size", "numbered") or token is None:
                continue
            if not 0 <= token < self.size:
                raise InputError(
                    f"vocabulary: the id of {field.name!r} is {token}, outside 0 to {self.size - 1}; take the "
                    "ids and the size from the same tokenizer"
                )
            media = ("image", "video", "audio")
            if token in self.placeholders and field.name not in (*media, "image_newline"):
                name = next(m for m in media if getattr(self, m) == token)
                raise InputError(
                    f"vocabulary: {name!r} and {field.name!r} share the id {token}; give the placeholder its own id"
                )
