"""A layout: how many tokens each span takes and which text ids stand where, before any pixel is decoded."""

import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

from mmjax.core.errors import InputError
from mmjax.sequence import words
from mmjax.sequence.document import Audio, Document, Image, Video
from mmjax.tokenizers.convention import Convention, Frames, framed, views
from mmjax.tokenizers.conventions import GENERIC
from mmjax.tokenizers.mix import Mix
from mmjax.tokenizers.parts import Medium, Part, Words, plain
from mmjax.tokenizers.resolution import Picture
from mmjax.tokenizers.vocab import Vocab

EMPTY, TEXT, IMAGE, AUDIO, VIDEO = range(5)  # what `modality` says of a token
NAMES = ("empty", "text", "image", "audio", "video")
Grid = tuple[int, int, int]  # frames, rows, columns of patches
Size = tuple[int, int, int, int, int]  # tokens, patches, images, frames of sound, tokens of answers
DIMENSIONS = ("tokens", "patches", "images", "frames", "answer tokens")


@runtime_checkable
class Tokenizer(Protocol):
    """What a layout needs of a tokenizer: ordinary text to ids, and the ids of turns and media.

    A `tokenizers.chat.Chat` has more, and the layout uses it: a `convention`, `controls` (symbol → id), and `offsets`,
    with which neighbouring texts are tokenized as one string; without it they are tokenized one by one.
    """

    vocab: Vocab

    def encode(self, text: str) -> list[int]: ...


@runtime_checkable
class Resolution(Protocol):
    """What a layout needs of a resolution policy (tokenizers.resolution): rows and columns of patches.

    A policy that cuts a picture into several views has `picture` as well (see `tokenizers.resolution.Picture`). Where
    pixels are read too (data.source) it says with `views` what is done to them (tokenizers.view).
    """

    def grid(self, height: int, width: int) -> tuple[int, int]: ...


@runtime_checkable
class Clips(Protocol):
    """What a layout needs of a policy for videos (tokenizers.video).

    clip: the grid, and how many numbers of the time position its frames are apart. chosen: which pictures of the video
    its frames are made of, as many for each. times: when each of its frames is, in seconds. still: by which policy a
    frame becomes patches. places: which of its media tokens stands at each place of the sequence, and what it is mixed
    with (as `Picture.slots` and `mixes`); None: all of them in order. A policy whose frames are pictures of their
    own, as encoders with class tokens want them, says so (`apart`).
    """

    def clip(self, frames: int, height: int, width: int, fps: float) -> tuple[Grid, float]: ...

    def chosen(self, frames: int, fps: float) -> tuple[int, ...]: ...

    def times(self, frames: int, fps: float) -> tuple[float, ...]: ...

    def still(self, frames: int, height: int, width: int, fps: float) -> Resolution: ...

    def places(self, grid: Grid) -> tuple[tuple[int, ...], tuple[Mix | None, ...]] | None: ...


@runtime_checkable
class Sounds(Protocol):
    """What a layout needs of a policy for sound: how many frames the encoder gets."""

    def frames(self, samples: int, rate: int) -> int: ...


@dataclass(frozen=True)
class Piece:
    """A run of tokens of one modality: text ids, or one medium's tokens."""

    modality: int
    length: int  # places in the sequence
    ids: tuple[int, ...] = ()  # of text; of what is written between a picture's views
    grid: Grid | None = None  # of a picture or video, in patches; of sound (frames, 1, 1)
    train: bool = False  # whether these tokens are learnt
    interval: float = 1.0  # numbers of the time position per frame
    tiles: tuple[Grid, ...] = ()  # of a picture (or a video) in several views, those after the first
    # Which of its media tokens stands at each place, -1 a newline, -2 the next of `ids`; None: all in order.
    slots: tuple[int, ...] | None = None
    merge: int = (
        1  # patches a side that make one of the tokens counted by `slots`; 0: they are in the connector's order
    )
    policy: Resolution | None = None  # by which a picture (or a frame) becomes patches
    media: int | None = None  # media tokens its connector makes; None: as many as places
    span: int = -1  # of the document, -1 for what the convention adds
    fill: bool = False  # empty places for the model to fill
    mixes: tuple[Mix | None, ...] | None = None  # at each of `slots`, what its media token is mixed with
    frames: tuple[int, ...] = ()  # of a video, which of its pictures are shown; several that follow make one frame
    times: tuple[float, ...] = ()  # of a video, when each frame of its grid is, in seconds

    @property
    def views(self) -> tuple[Grid, ...]:
        """The grids whose patches the vision encoder sees, each apart from the others."""
        return () if self.grid is None or self.modality == AUDIO else (self.grid, *self.tiles)

    @property
    def features(self) -> int:
        """Media tokens its connector makes."""
        return (0 if self.modality == TEXT else self.length) if self.media is None else self.media


@dataclass(frozen=True)
class Layout:
    """A document's pieces in order, and what it takes up in every dimension of a bucket."""

    id: str
    pieces: tuple[Piece, ...]
    tokens: int
    patches: int
    images: int
    frames: int = 0  # of sound
    answers: int = 0  # tokens of the second stream of an encoder–decoder, which are none of `tokens`; 0: there is none

    @property
    def size(self) -> Size:
        return self.tokens, self.patches, self.images, self.frames, self.answers

    @property
    def prefix(self) -> int:
        """Tokens before the first that is learnt or left to fill: what a prefix-LM sees in both directions."""
        n = 0
        for piece in self.pieces:
            if piece.train or piece.fill:
                break
            n += piece.length
        return n

    @classmethod
    def of(cls, id: str, pieces: tuple[Piece, ...], parted: bool = False) -> "Layout":
        """Pieces, counted; `parted`: as for `layout`."""
        views = [view for p in pieces for view in p.views]
        out = cls(
            id,
            pieces,
            sum(p.length for p in pieces),
            sum(map(patches_of, views)),
            len(views),
            sum(p.grid[0] for p in pieces if p.modality == AUDIO),
        )
        if not parted:
            return out
        # An answer has a first token even where nothing is said.
        return replace(out, tokens=out.prefix, answers=max(out.tokens - out.prefix, 1))


def described(size: Iterable) -> str:
    """A size in words; sound and answers only where there are any."""
    named = zip(DIMENSIONS, size, strict=False)
    return ", ".join(f"{n} {name}" for name, n in named if n or name in DIMENSIONS[:3])


def patches_of(grid: Grid) -> int:
    """How many patches a grid has; also the media tokens of a connector that keeps them all."""
    return grid[0] * grid[1] * grid[2]


def layout(
    document: Document,
    tokenizer: Tokenizer,
    resolution: Resolution | None,
    media_tokens: Callable[[Grid], int] = patches_of,
    answer: int = 0,
    *,
    clips: Clips | None = None,
    sounds: Sounds | None = None,
    sound_tokens: Callable[[int], int] = lambda frames: frames,
    fuse: Literal["sequence", "cross"] = "sequence",
    skip: Collection[int] = (),
    ask: bool = False,
    parted: bool = False,
) -> Layout:
    """The layout of a document in the tokenizer's convention (tokenizers.chat), the generic one if it has none.

        begin  user  [image_start …image… image_end]  text…  end  assistant  text…  end

    Spans of one role in a row make one turn. Where a turn's last text is trained its end is too, so that the model
    learns to stop. A token of which any character is trained is trained.

    Args:
      document: its spans.
      tokenizer: turns text into ids.
      resolution: gives a picture's grid from its size; None: there may be no pictures.
      media_tokens: how many media tokens the connector makes of a grid.
      answer: where above 0, the document is a question: what opens an answer is followed by so many empty places
        (padding ids) for the model to fill.
      clips: gives a video's grid.
      sounds: gives the frames of sound.
      sound_tokens: how many media tokens the connector makes of so many frames of sound.
      fuse: where pictures and videos enter. "sequence": their tokens stand between their markers, as those of sound
        always do. "cross": their markers stand alone, and text looks at them by cross-attention (Flamingo).
      skip: numbers of spans to leave out.
      ask: whether what opens an answer is written at the end, without empty places.
      parted: whether all from the first token on that is learnt or left to fill is counted apart, as a second stream
        that an encoder–decoder's decoder reads (sequence.answer).

    Raises:
      InputError: text that cannot be encoded, a medium the policy refuses or that there is no policy for.
    """
    convention = getattr(tokenizer, "convention", GENERIC)

    def medium(number: int) -> tuple[Piece, int]:
        span = document.spans[number]
        try:
            if isinstance(span, Image):
                if resolution is None:
                    raise InputError("there is no policy for pictures; give one (`resolution`).")
                return _image(span, resolution, media_tokens, tokenizer.vocab, number)
            if isinstance(span, Video):
                return _video(span, clips, media_tokens, tokenizer.vocab, number), 0
            return _audio(span, sounds, sound_tokens, number), 0
        except InputError as error:
            raise InputError(f"Document {document.id!r}, span {number}: {error}") from error

    writer = words.Writer(tokenizer, convention, document.id)
    pieces: dict[int, Piece] = {}
    for part in convention.parts(document, answer=ask or answer > 0, fuse=fuse, skip=skip):
        if not isinstance(part, Medium):
            writer.add(part)
            continue
        piece, rows = medium(part.span)
        if fuse == "cross" and piece.views:
            piece = _aside(piece)
        elif not tokenizer.vocab.placeholders:
            raise InputError(
                f"Document {document.id!r}, span {part.span}: {convention.name} has no token that stands where media "
                f"go; its text looks at them by cross-attention (fuse='cross')."
            )
        pieces[part.span] = piece
        written = None if fuse == "cross" else _written(convention, piece, rows, media_tokens, document)
        for item in written or [*part.before, range(piece.length), *part.after]:
            writer.view(part.span, item) if isinstance(item, range) else writer.add(item)
    out = [_piece(run, pieces) for run in writer.runs()]
    if answer:
        out.append(replace(_text([tokenizer.vocab.pad] * answer), fill=True))
    return Layout.of(document.id, tuple(p for p in out if p.length or p.features), parted)


def _text(ids: list[int], train: bool = False, span: int = -1) -> Piece:
    return Piece(TEXT, len(ids), tuple(ids), None, train, span=span)


@functools.lru_cache(maxsize=4096)
def _added(ids: tuple[int, ...], train: bool) -> Piece:
    """A piece of what the convention adds: most pieces of a document, and the same in all of them."""
    return Piece(TEXT, len(ids), ids, None, train)


def _piece(run: words.Run, media: dict[int, Piece]) -> Piece:
    """A run of tokens as a piece: of text, or all that belongs to one medium."""
    if run.slots is None:
        return _added(tuple(run.ids), run.train) if run.span < 0 else _text(run.ids, run.train, run.span)
    piece = media[run.span]
    if not run.ids:
        return piece
    return replace(
        piece, length=len(run.slots), slots=tuple(run.slots), ids=tuple(run.ids), merge=0, media=piece.length
    )


def _written(
    convention: Convention, piece: Piece, rows: int, media_tokens: Callable[[Grid], int], document: Document
) -> list[Part | range] | None:
    """What the convention writes around a picture's tiles or a video's frames: parts, and ranges of media tokens."""
    if piece.modality == VIDEO and convention.frames is not None:
        return _stamped(convention.frames, piece, document.spans[piece.span])
    if piece.modality != IMAGE:
        return None
    try:
        found = views(convention, len(piece.views), rows)
    except InputError as error:
        raise InputError(f"Document {document.id!r}, span {piece.span}: {error}") from error
    if found is None:
        return None
    if piece.slots is not None:
        raise InputError(
            f"Document {document.id!r}, span {piece.span}: {piece.policy} orders the tokens of all views together, but "
            f"{convention.name} writes between them; use the family's own policy."
        )
    stops = list(itertools.accumulate((media_tokens(view) for view in piece.views), initial=0))
    out: list[Part | range] = []
    for item in found:
        out += [range(stops[item], stops[item + 1])] if isinstance(item, int) else item
    return out


def _stamped(of: Frames, piece: Piece, video: Video) -> list[Part | range]:
    """Every frame of a video with its time before it."""
    each = piece.length // len(piece.times)
    begin, stamps = framed(of, piece.times, video.frames / video.fps)
    out: list[Part | range] = [Words(begin)]
    for n, stamp in enumerate(stamps):
        out += plain(of.between) if n else []
        out += [Words(stamp), *plain(of.around.before)]
        out += [range(n * each, (n + 1) * each), *plain(of.around.after)]
    return [*out, Words(of.after)]


def _image(
    span: Image, resolution: Resolution | None, media_tokens: Callable[[Grid], int], vocab: Vocab, number: int
) -> tuple[Piece, int]:
    """A picture's piece, and how many rows of tiles it is cut into."""
    if resolution is None:
        raise InputError("there is no policy for pictures, as of a model of text alone; leave it out, or give one.")
    if not hasattr(resolution, "picture"):
        grid = (1, *resolution.grid(span.height, span.width))
        return Piece(IMAGE, _counted(grid, media_tokens), (), grid, span=number, policy=resolution), 0
    picture: Picture = resolution.picture(span.height, span.width)
    grids = tuple((1, *view) for view in picture.views)
    media = sum(_counted(grid, media_tokens) for grid in grids)
    slots = picture.slots
    ordered = sum(map(patches_of, grids)) // picture.merge**2
    if slots is not None and media != ordered:
        raise InputError(
            f"{resolution} orders {ordered} media tokens, but the connector makes {media} of "
            f"{sum(map(patches_of, grids))} patches; use one that makes as many, or another policy."
        )
    _refuse_newlines(slots, resolution, vocab)
    piece = Piece(
        IMAGE,
        media if slots is None else len(slots),
        (),
        grids[0],
        tiles=grids[1:],
        slots=slots,
        media=media,
        span=number,
        merge=picture.merge,
        mixes=picture.mixes,
        policy=resolution,
    )
    return piece, picture.rows


def _refuse_newlines(slots: Sequence[int] | None, policy: object, vocab: Vocab) -> None:
    if slots is not None and -1 in slots and vocab.image_newline is None:
        raise InputError(f"{policy} ends rows with newline tokens, but the tokenizer has none; give it one.")


def _video(span: Video, clips: Clips | None, media_tokens: Callable[[Grid], int], vocab: Vocab, number: int) -> Piece:
    if clips is None:
        raise InputError("there is no policy for videos; give one (`clips`).")
    size = span.frames, span.height, span.width, span.fps
    grid, interval = clips.clip(*size)
    views = ((1, *grid[1:]),) * grid[0] if getattr(clips, "apart", False) else (grid,)
    media = sum(_counted(view, media_tokens) for view in views)
    slots, mixes = clips.places(grid) or (None, None)
    _refuse_newlines(slots, clips, vocab)
    return Piece(
        VIDEO,
        media if slots is None else len(slots),
        (),
        views[0],
        tiles=views[1:],
        slots=slots,
        mixes=mixes,
        media=media,
        interval=interval,
        span=number,
        policy=clips.still(*size),
        frames=clips.chosen(span.frames, span.fps),
        times=clips.times(span.frames, span.fps),
    )


def _audio(span: Audio, sounds: Sounds | None, sound_tokens: Callable[[int], int], number: int) -> Piece:
    if sounds is None:
        raise InputError("there is no policy for sound; give one (`sounds`).")
    frames = sounds.frames(span.samples, span.rate)
    length = sound_tokens(frames)
    if length < 1:
        raise InputError(f"{frames} frames of sound became {length} tokens; a connector must leave at least one.")
    return Piece(AUDIO, length, (), (frames, 1, 1), span=number)


def _aside(medium: Piece) -> Piece:
    """A medium that takes no place in the sequence."""
    return replace(medium, length=0, slots=None, media=medium.features)


def _counted(grid: Grid, media_tokens: Callable[[Grid], int]) -> int:
    length = media_tokens(grid)
    if length < 1:
        raise InputError(
            f"a picture of {grid} patches became {length} media tokens; a connector must leave at least one."
        )
    return length
