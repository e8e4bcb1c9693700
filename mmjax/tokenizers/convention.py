"""How a family writes a conversation: turns, markers and media, as data.

What is written is a list of parts (tokenizers.parts): control tokens, words and media, each a thing of its own. So text
that looks like a marker stays text. The published conventions are in tokenizers.conventions; one is bound to a
tokenizer by tokenizers.chat.
"""

import functools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal, Protocol, runtime_checkable

from mmjax.core.errors import InputError
from mmjax.sequence.document import Audio, Document, Image, Span, Text, Video
from mmjax.tokenizers.parts import Medium, Part, Symbol, Words

Writing = tuple[Symbol | str, ...]  # control tokens and words
Fuse = Literal["sequence", "cross"]


@dataclass(frozen=True)
class Around:
    """What is written around a turn, a text or a medium.

    cross: the same of a medium that text looks at by cross-attention; it does from the last of `before` on. None:
      `before` alone.
    """

    before: Writing = ()
    after: Writing = ()
    cross: "Around | None" = None


NOTHING = Around()


@dataclass(frozen=True)
class Tiles:
    """What is written around each view of a picture that is shown as a whole and in tiles.

    "{row}" and "{column}" in a symbol count a tile's place from 1. A picture of one view is written as the convention's
    `image` says.

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


@runtime_checkable
class Template(Protocol):
    """What writes the turns in a convention's place (tokenizers.template)."""

    symbols: Collection[str]  # the control tokens it may write

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
    media: where a turn's media stand: where they are, before its text, or before what opens the turn.
    chunk: closes what was said about a medium: before the next one and at the document's end (Flamingo).
    lead: stands before a turn's text where nothing but words comes first (Idefics).
    strip: whether white space is left out at both ends of a turn, or of every text.
    system_into_user: whether the system's text stands at the beginning of the user's first turn.
    apart: whether turns are tokenized apart from each other.
    one_turn: whether there is but one question and one answer.
    once: symbols of which two that follow each other become one (Idefics).
    gap: symbols that are followed by a space where a word would follow (Idefics2).
    tiles: how the views of a picture are written; None: their tokens follow each other.
    pad, stop, placeholder, placeholder_video, placeholder_audio, newline: symbols of the padding token, of the one that
      ends an answer, of those that stand where media tokens go ("" where a family has none), and of a row's end.
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
    media: Literal["in_place", "first", "ahead"] = "in_place"
    chunk: Writing = ()
    lead: Writing = ()
    strip: Literal["nothing", "turn", "text"] = "nothing"
    system_into_user: bool = False
    apart: bool = False
    one_turn: bool = False
    once: tuple[str, ...] = ()
    gap: tuple[str, ...] = ()
    tiles: Tiles | None = None
    pad: str = ""
    stop: str = ""
    placeholder: str = ""
    placeholder_video: str = ""
    placeholder_audio: str = ""
    newline: str = ""
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
            if fuse == "cross" or skip:
                raise InputError(
                    f"Document {document.id!r}: a chat template writes media in the sequence and leaves nothing out; "
                    f"use one of mmjax's own conventions."
                )
            parts = self.template.parts(document, answer=answer)
            return [*_plain(self.begin), *(self._around(p, document) if isinstance(p, Medium) else p for p in parts)]
        return [*_plain(self.begin), *_Writer(self, document, fuse).write(answer, skip)]

    def _around(self, medium: Medium, document: Document) -> Medium:
        around = {Image: self.image, Video: self.video, Audio: self.audio}[type(document.spans[medium.span])]
        return Medium(medium.span, tuple(_plain(around.before)), tuple(_plain(around.after)))


def _symbols(x: object) -> Iterator[str]:
    """All symbols inside, those of tiles for every place they may have."""
    if isinstance(x, Symbol):
        yield from _spelled(x.symbol)
    elif isinstance(x, Around | Tiles):
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


def _spelled(symbol: str) -> Iterator[str]:
    if "{row}" not in symbol:
        yield symbol
        return
    for row in range(1, MOST_TILES + 1):
        for column in range(1, MOST_TILES + 1):
            yield symbol.format(row=row, column=column)


@functools.lru_cache(maxsize=4096)  # there are few, and every document has a dozen of them
def _plain(writing: Writing, train: bool = False) -> tuple[Part, ...]:
    """What a convention writes, of which at most the first is learnt."""
    out: list[Part] = []
    for n, item in enumerate(writing):
        learnt = train and n == 0
        out.append(Words(item, learnt) if isinstance(item, str) else Symbol(item.symbol, learnt))
    return tuple(out)


Numbered = tuple[int, Span]
BORDER = Words("", span=-2)  # no text: where two strings are tokenized apart


class _Writer:
    """Writes one document."""

    def __init__(self, convention: Convention, document: Document, fuse: Fuse):
        self.of, self.id, self.fuse = convention, document.id, fuse
        self.document = document
        self.media = 0  # written so far
        self.train = False  # whether the last span is text that is learnt

    def write(self, answer: bool, skip: Collection[int]) -> list[Part]:
        of, out = self.of, []
        turns = self._turns(skip)
        roles = [role for role, _ in turns]
        if of.default_system is not None and roles[:1] not in (["system"], ["document"]):
            turns.insert(0, ("system", [(-1, Text(of.default_system, "system"))]))
        if of.system_into_user:
            turns = self._moved(turns)
        if of.one_turn and any(roles.count(role) > 1 for role in ("user", "assistant")):
            raise InputError(
                f"Document {self.id!r} has several turns of one role, but {of.name} has one question and one answer; "
                f"split the document."
            )
        for n, (role, spans) in enumerate(turns):
            if n and of.apart:
                out.append(BORDER)
            out += self._turn(role, spans)
        if answer:
            return [*out, *_plain(of.assistant.before if of.prompt is None else of.prompt)]
        return [*out, *_plain(of.chunk, self.train), *_plain(of.end, self.train)]

    def _turns(self, skip: Collection[int]) -> list[tuple[str, list[Numbered]]]:
        out: list[tuple[str, list[Numbered]]] = []
        for number, span in enumerate(self.document.spans):
            if span.role not in ("system", "user", "assistant", "document"):
                raise InputError(
                    f"Document {self.id!r}, span {number} has the role {span.role!r}; give one of system, user, "
                    f"assistant, document."
                )
            if number in skip:
                continue
            if not out or out[-1][0] != span.role or span.turn:
                out.append((span.role, []))
            out[-1][1].append((number, span))
        return [(role, spans if role == "document" else self._ordered(role, spans)) for role, spans in out]

    def _ordered(self, role: str, spans: list[Numbered]) -> list[Numbered]:
        """A turn's spans in the order in which they are written, without the white space that is left out."""
        out = spans if self.of.media == "in_place" else sorted(spans, key=lambda s: isinstance(s[1], Text))
        if self.of.strip == "nothing" or (role == "system" and self.of.system_into_user):
            return out
        for cut, places in ((str.lstrip, range(len(out))), (str.rstrip, reversed(range(len(out))))):
            for at in places:
                number, span = out[at]
                if isinstance(span, Text):
                    out[at] = (number, replace(span, text=cut(span.text)))
                if self.of.strip == "turn" and (not isinstance(span, Text) or out[at][1].text):
                    break  # no further: it was the edge of the turn
        return out

    def _moved(self, turns: list[tuple[str, list[Numbered]]]) -> list[tuple[str, list[Numbered]]]:
        """The system's text at the beginning of the first turn of the user."""
        first, rest = turns[:1], turns[1:]
        system = bool(first) and first[0][0] == "system"
        if any(role == "system" for role, _ in rest) or (system and [role for role, _ in rest[:1]] != ["user"]):
            raise InputError(
                f"Document {self.id!r} has a system turn that is not the first or that no user turn follows, which "
                f"{self.of.name} cannot write; put it before the user's first turn."
            )
        if not system:
            return turns
        words = [(n, replace(s, role="user")) for n, s in first[0][1]]
        between = [(-1, Text(item, "user")) for item in self.of.system.after if isinstance(item, str)]
        return [("user", [*words, *between, *rest[0][1]]), *rest[1:]]

    def _turn(self, role: str, spans: list[Numbered]) -> list[Part]:
        of = self.of
        around = getattr(of, role)
        seen = [s for s in spans if not isinstance(s[1], Text)]
        said = [s for s in spans if isinstance(s[1], Text)]
        if of.media == "in_place" or role == "document":
            lead = of.lead if role != "document" and spans and isinstance(spans[0][1], Text) else ()
            written = [part for s in spans for part in self._span(*s)]
            return [*_plain(around.before), *_plain(lead), *written, *_plain(around.after, self.train)]
        media = [part for s in seen for part in self._span(*s)]
        words = [part for s in said for part in self._span(*s)]
        opened = [*media, *_plain(around.before)] if of.media == "ahead" else [*_plain(around.before), *media]
        return [*opened, *words, *_plain(around.after, self.train)]

    def _span(self, number: int, span: Span) -> list[Part]:
        if isinstance(span, Text):
            around = self.of.text
            self.train = span.train
            said = [Words(span.text, span.train, number)]
            return [*_plain(around.before), *said, *_plain(around.after, span.train)]
        around = {Image: self.of.image, Video: self.of.video, Audio: self.of.audio}[type(span)]
        chunk = _plain(self.of.chunk, self.train) if self.media else ()
        self.media, self.train = self.media + 1, False
        if self.fuse == "cross" and not isinstance(span, Audio):
            around = Around(around.before) if around.cross is None else around.cross
        return [*chunk, Medium(number, _plain(around.before), _plain(around.after))]


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
    whole = [_plain(of.whole.before), count - 1 if of.order == "whole_last" else 0, _plain(of.whole.after)]
    tiles: list[Sequence[Part] | int] = []
    for row in range(rows):
        for column in range(columns):
            tiles += [_plain(of.between)] if column else []
            tiles.append(_placed(of.tile.before, row, column))
            tiles += [first + row * columns + column, _placed(of.tile.after, row, column)]
        tiles.append(_plain(of.row))
    return [*tiles, *whole] if of.order == "whole_last" else [*whole, *tiles]


def _placed(writing: Writing, row: int, column: int) -> list[Part]:
    def fill(part: Part) -> Part:
        return Symbol(part.symbol.format(row=row + 1, column=column + 1)) if isinstance(part, Symbol) else part

    return [fill(part) for part in _plain(writing)]
