"""A layout: how many tokens each span takes and which text ids stand where, before any pixel is decoded."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from mmjax.core.errors import InputError
from mmjax.sequence.document import Document, Image, Text
from mmjax.tokenizers.vocab import Vocab

EMPTY, TEXT, IMAGE = 0, 1, 2  # what `modality` says of a token
Grid = tuple[int, int, int]  # frames, rows, columns of patches


@runtime_checkable
class Tokenizer(Protocol):
    """What a layout needs of a tokenizer: ordinary text to ids, and the ids of turns and media."""

    vocab: Vocab

    def encode(self, text: str) -> list[int]: ...


@runtime_checkable
class Resolution(Protocol):
    """What a layout needs of a resolution policy (tokenizers.resolution)."""

    def grid(self, height: int, width: int) -> tuple[int, int]: ...


@dataclass(frozen=True)
class Piece:
    """A run of tokens of one modality: text ids, or one picture's media tokens."""

    modality: int
    length: int
    ids: tuple[int, ...] = ()  # of text
    grid: Grid | None = None  # of a picture or video, in patches
    train: bool = False  # whether these tokens are learnt
    interval: float = 1.0  # numbers of the time position per frame


@dataclass(frozen=True)
class Layout:
    """A document's pieces in order, and what it takes up in every dimension of a bucket."""

    id: str
    pieces: tuple[Piece, ...]
    tokens: int
    patches: int
    images: int

    @property
    def size(self) -> tuple[int, int, int]:
        return self.tokens, self.patches, self.images


def patches_of(grid: Grid) -> int:
    """How many patches a grid has; also the media tokens of a connector that keeps them all."""
    return grid[0] * grid[1] * grid[2]


def layout(
    document: Document,
    tokenizer: Tokenizer,
    resolution: Resolution,
    media_tokens: Callable[[Grid], int] = patches_of,
    answer: int = 0,
) -> Layout:
    """The layout of a document in the generic convention.

        begin  user  [image_start …image… image_end]  text…  end  assistant  text…  end

    Spans of one role in a row make one turn. Where a turn's last text is trained its end is too, so that the model
    learns to stop.

    Args:
      document: its spans.
      tokenizer: turns text into ids.
      resolution: gives a picture's grid from its size.
      media_tokens: how many media tokens the connector makes of a grid.
      answer: where above 0, the document is a question: the last turn's marker is followed by so many empty
        places (padding ids) for the model to fill.

    Raises:
      InputError: text that cannot be encoded, a picture the policy refuses.
    """
    vocab = tokenizer.vocab
    marker = {"system": vocab.system, "user": vocab.user, "assistant": vocab.assistant}
    pieces = [_text([vocab.begin])]
    role = None
    train = False
    for number, span in enumerate(document.spans):
        if span.role not in marker:
            raise InputError(
                f"Document {document.id!r}, span {number} has the role {span.role!r}; give one of {', '.join(marker)}."
            )
        if span.role != role:
            pieces += [_text([vocab.end], train)] if role else []
            pieces.append(_text([marker[span.role]]))
            role, train = span.role, False
        try:
            if isinstance(span, Text):
                pieces.append(_text(tokenizer.encode(span.text), span.train))
                train = span.train
            else:
                pieces += [_text([vocab.image_start]), _image(span, resolution, media_tokens), _text([vocab.image_end])]
        except InputError as error:
            raise InputError(f"Document {document.id!r}, span {number}: {error}") from error
    pieces.append(_text([vocab.end], train))
    if answer:
        pieces.append(_text([vocab.assistant] + [vocab.pad] * answer))
    return Layout(
        document.id,
        tuple(p for p in pieces if p.length),
        sum(p.length for p in pieces),
        sum(patches_of(p.grid) for p in pieces if p.grid),
        sum(p.grid is not None for p in pieces),
    )


def _text(ids: list[int], train: bool = False) -> Piece:
    return Piece(TEXT, len(ids), tuple(ids), None, train)


def _image(span: Image, resolution: Resolution, media_tokens: Callable[[Grid], int]) -> Piece:
    grid = (1, *resolution.grid(span.height, span.width))
    length = media_tokens(grid)
    if length < 1:
        raise InputError(
            f"a picture of {grid} patches became {length} media tokens; a connector must leave at least one."
        )
    return Piece(IMAGE, length, (), grid)
