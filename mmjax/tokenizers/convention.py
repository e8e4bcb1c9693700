"""How a family writes a conversation: turns, markers and media, as data.

What is written is a list of parts (tokenizers.parts): control tokens, words and media, each a thing of its own. So text
that looks like a marker stays text. The published conventions are in tokenizers.conventions; one is bound to a
tokenizer by tokenizers.chat.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Protocol, runtime_checkable

from mmjax.core.errors import InputError
from mmjax.sequence.document import Audio, Document, Image, Video
from mmjax.tokenizers.numerals import in_words
from mmjax.tokenizers.parts import NOTHING, Around, Medium, Part, Symbol, Writing, plain
from mmjax.tokenizers.writing import Fuse, Writer, written_around


@dataclass(frozen=True)
class Tiles:
    """What is written around each view of a picture that is shown as a whole and in tiles.

    "{row}" and "{column}" in a symbol or in words count a tile's place from 1. A picture of one view is written as the
    convention's `image` says.

    order: whether the tiles or the whole come first; as the resolution policy's views do.
    tile: around each tile.
    between: between two tiles of a row.
    row: after each row of tiles.
    whole: around the whole.
    """

    order: Literal["whole_last", "whole_first"]
    tile: Around = NOTHING
    between: Writing = ()
    row: Writing = ()
    whole: Around = NOTHING


@dataclass(frozen=True)
class Frames:
    """What is written around each frame of a video.

    stamp: words before it, in which "{seconds:.1f}" is its time, or "{minute:02d}:{second:02d}", rounded down, and
      "{number}" its number, from 1.
    around: its tokens.
    between: between two frames.
    before, after: words before the first frame and after the last; "{count}" is how many frames there are, in English,
      and "{hours}:{minute:02d}:{second:02d}" how long the video is.
    """

    stamp: str
    around: Around = NOTHING
    between: Writing = ()
    before: str = ""
    after: str = ""


@runtime_checkable
class Template(Protocol):
    """What writes the turns in a convention's place (tokenizers.template)."""

    symbols: Collection[str]  # the control tokens it may write

    @property
    def fingerprint(self) -> str:
        """Equal ones write every document alike."""

    def parts(self, document: Document, *, answer: bool = False) -> list[Part]: ...


@dataclass(frozen=True)
class Convention:
    """A family's way of writing.

    Of a turn that the model learns to write, the first of what follows its text is learnt as well: the token that ends
    it. Texts and words that follow each other are tokenized as one string, as they are where a template is rendered.

    name: for messages.
    begin: before every document.
    opens: whether what follows `begin` is still the beginning of a text, where some tokenizers write a space: where the
      tokenizer writes `begin`, not where a template does.
    end: after every document; learnt where its last text is.
    system, user, assistant, document: around a turn, and around what is no conversation.
    text, image, video, audio: around each text and medium.
    prompt: what opens the answer to a question; None: what opens the assistant's turn.
    default_system: the system's text where a conversation has none.
    media: where a turn's media stand: where they are, before its text, before what opens the turn, or before all else
      that is written of the document, `begin` included (BLIP-2). "before_begin": where they are, but `begin` is written
      after those that a document begins with (Llama 3.2 Vision).
    chunk: closes what was said about a medium: before the next one and at the document's end (Flamingo).
    lead: stands before a turn's text where no picture comes first (Idefics).
    strip: whether white space is left out at both ends of a turn, or of every text.
    system_into_user: whether the system's text stands at the beginning of the user's first turn.
    apart: whether turns are tokenized apart from each other.
    one_turn: whether there is but one question and one answer.
    once: symbols of which two that follow each other become one (Idefics).
    gap: symbols that are followed by a space where a word would follow (Idefics2).
    tiles: how the views of a picture are written; None: their tokens follow each other.
    frames: the same of the frames of a video.
    pad, stop, placeholder, placeholder_video, placeholder_audio, newline: symbols of the padding token, of the one that
      ends an answer, of those that stand where media tokens go ("" where a family has none), and of a row's end.
    numbered: as of Vocab.
    template: writes the turns instead of all that is above `tiles` but `begin`; `image`, `video` and `audio` are then
      written around a medium where the template has its marker: what transformers' processor adds, and no template.
    """

    name: str
    begin: Writing = ()
    opens: bool = True
    end: Writing = ()
    document: Around = NOTHING
    system: Around = NOTHING
    user: Around = NOTHING
    assistant: Around = NOTHING
    text: Around = NOTHING
    image: Around = NOTHING
    video: Around = NOTHING
    audio: Around = NOTHING
    prompt: Writing | None = None
    default_system: str | None = None
    media: Literal["in_place", "first", "ahead", "before_begin", "before_all"] = "in_place"
    chunk: Writing = ()
    lead: Writing = ()
    strip: Literal["nothing", "turn", "text"] = "nothing"
    system_into_user: bool = False
    apart: bool = False
    one_turn: bool = False
    once: tuple[str, ...] = ()
    gap: tuple[str, ...] = ()
    tiles: Tiles | None = None
    frames: Frames | None = None
    pad: str = ""
    stop: str = ""
    placeholder: str = ""
    placeholder_video: str = ""
    placeholder_audio: str = ""
    newline: str = ""
    numbered: bool = False
    more: tuple[str, ...] = ()  # control tokens of the family that nothing here writes
    template: Template | None = field(default=None, compare=False)

    @property
    def symbols(self) -> tuple[str, ...]:
        """Every control token of the convention, in a fixed order."""
        written = () if self.template is None else self.template.symbols
        return tuple(dict.fromkeys([*_symbols(self), *sorted(written)]))

    def parts(
        self, document: Document, *, answer: bool = False, fuse: Fuse = "sequence", skip: Collection[int] = ()
    ) -> list[Part]:
        """The document, written.

        Args:
          document: its spans; those of one role in a row are one turn, unless one says that it begins a turn.
          answer: whether to go on with what opens an answer.
          fuse: whether media tokens stand in the sequence, or text looks at them by cross-attention.
          skip: numbers of spans to leave out.

        Raises:
          InputError: a role that does not exist, or turns that the convention has no way to write.
        """
        if self.template is not None:
            if skip:
                raise InputError(
                    f"Document {document.id!r}: a chat template leaves nothing out; use one of mmjax's own conventions."
                )
            parts = self.template.parts(document, answer=answer)
            around = (self._around(p, document, fuse) if isinstance(p, Medium) else p for p in parts)
            return [*plain(self.begin), *around]
        written = Writer(self, document, fuse).write(answer, skip)
        first = 0
        if self.media == "before_begin":
            first = next((n for n, part in enumerate(written) if not isinstance(part, Medium)), len(written))
        out = [*written[:first], *plain(self.begin), *written[first:]]
        return sorted(out, key=lambda part: not isinstance(part, Medium)) if self.media == "before_all" else out

    def _around(self, medium: Medium, document: Document, fuse: Fuse) -> Medium:
        span = document.spans[medium.span]
        around = written_around({Image: self.image, Video: self.video, Audio: self.audio}[type(span)], span, fuse)
        return Medium(medium.span, tuple(plain(around.before)), tuple(plain(around.after)))


def _symbols(x: object) -> Iterator[str]:
    """All symbols inside, those of tiles for every place they may have."""
    if isinstance(x, Symbol):
        yield from places(x.symbol)
    elif isinstance(x, Around | Tiles | Frames):
        for f in fields(x):
            yield from _symbols(getattr(x, f.name))
    elif isinstance(x, tuple):
        for item in x:
            yield from _symbols(item)
    elif isinstance(x, Convention):
        for f in fields(x):
            value = getattr(x, f.name)
            if f.name in ("pad", "stop", "newline") or f.name.startswith("placeholder"):
                yield from (value,) if value else ()
            elif f.name == "more":
                yield from value
            else:
                yield from _symbols(value)


MOST_TILES = 6  # a side, that families have symbols for


def places(symbol: str) -> Iterator[str]:
    """A symbol for every tile that there may be, if it counts them."""
    if "{row}" not in symbol:
        yield symbol
        return
    for row in range(1, MOST_TILES + 1):
        for column in range(1, MOST_TILES + 1):
            yield symbol.format(row=row, column=column)


def framed(of: Frames, times: Sequence[float], seconds: float) -> tuple[str, list[str]]:
    """The words before a video that is so long, and before each of its frames."""

    def clock(time: float) -> dict[str, int]:
        return {"hours": int(time // 3600), "minute": int(time // 60), "second": int(time % 60)}

    begin = of.before
    if begin:
        own = clock(seconds)
        begin = begin.format(count=in_words(len(times)), **own | {"minute": own["minute"] % 60})
    return begin, [of.stamp.format(seconds=time, number=n + 1, **clock(time)) for n, time in enumerate(times)]


def views(convention: Convention, count: int, rows: int) -> list[Sequence[Part] | int] | None:
    """What is written around the views of a picture, in reading order: parts, and numbers of views.

    Args:
      convention: the family's.
      count: how many views there are, the whole among them.
      rows: of tiles.

    Returns None where the views' tokens follow each other. InputError for more tiles than the family has symbols for.
    """
    of = convention.tiles
    if of is None or count == 1:
        return None
    rows = max(rows, 1)
    columns = (count - 1) // rows
    if rows * columns + 1 != count:
        raise InputError(f"{count} views are not the whole and {rows} rows of tiles; use the family's own policy.")
    if "{row}" in str(of.tile) and max(rows, columns) > MOST_TILES:
        raise InputError(
            f"{rows} × {columns} tiles are more than the {MOST_TILES} × {MOST_TILES} that {convention.name} has "
            f"symbols for; lower the resolution."
        )
    first = 0 if of.order == "whole_last" else 1
    whole = [plain(of.whole.before), count - 1 if of.order == "whole_last" else 0, plain(of.whole.after)]
    tiles: list[Sequence[Part] | int] = []
    for row in range(rows):
        for column in range(columns):
            tiles += [plain(of.between)] if column else []
            tiles.append(_placed(of.tile.before, row, column))
            tiles += [first + row * columns + column, _placed(of.tile.after, row, column)]
        tiles.append(plain(of.row))
    return [*tiles, *whole] if of.order == "whole_last" else [*whole, *tiles]


def _placed(writing: Writing, row: int, column: int) -> list[Part]:
    def fill(item: Symbol | str) -> Symbol | str:
        text = item if isinstance(item, str) else item.symbol
        if "{row}" not in text:
            return item
        text = text.format(row=row + 1, column=column + 1)
        return text if isinstance(item, str) else Symbol(text)

    return list(plain(tuple(map(fill, writing))))


def spelled(x: Any, symbols: Collection[str]) -> Any:
    """What is written, with these symbols as words: of a family whose tokenizer has no tokens for them."""
    if isinstance(x, Symbol):
        return x.symbol if x.symbol in symbols else x
    if isinstance(x, Around | Tiles | Frames):
        return replace(x, **{f.name: spelled(getattr(x, f.name), symbols) for f in fields(x)})
    return tuple(spelled(item, symbols) for item in x) if isinstance(x, tuple) else x
